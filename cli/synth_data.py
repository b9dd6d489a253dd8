"""`assay synth-data`: tool-calling conversations from question-answer triples (ToolForge)."""

from __future__ import annotations

import typer

from cli.words import ConfigDir, Overrides, ShowJob
from methods.errors import ConfigError


def synth_data(
    overrides: Overrides = None,
    cfg: ShowJob = None,
    config_dir: ConfigDir = None,
) -> None:
    """Synthesise tool-calling conversations from (question, golden context, answer) triples.

    \b
    Examples:
      assay synth-data input=hotpotqa.jsonl.gz
      assay synth-data 'input=[hotpotqa.jsonl.gz,musique.jsonl.gz]' output=forged 'languages=[en,zh]'
      assay synth-data input=triples.parquet engine=openai engine.url=http://localhost:8000/v1 window=512
      assay synth-data input=triples.jsonl engine=openai engine.url=https://api.openai.com/v1 engine.model=gpt-4.1 \\
          engine.api_key_env=OPENAI_API_KEY engine.prices.prompt=2 engine.prices.completion=8 conversations=200
      assay synth-data input=triples.jsonl engine=transformers model=smollm2 max_tokens=256 stages.plan=template
      assay synth-data input=triples.jsonl tools.path=my_tools.jsonl rules=release

    Without an engine, templates write everything. Interrupted at any point, the same line goes on and ends in the same
    files; what an engine answered is not asked again. Then: assay train objective=sft task=toolforge task.path=FOLDER.
    Keys: assay synth-data --cfg job input=FILE. The last line of the output is the path of what was written.
    """
    from cli.compose import compose

    config = compose("synth_data", list(overrides or []), config_dir or ())
    if cfg is not None:
        if cfg != "job":
            raise ConfigError("--cfg shows the configuration of the job", got=cfg, expected="job")
        from omegaconf import OmegaConf

        typer.echo(OmegaConf.to_yaml(config, resolve=True), nl=False)
        return
    from experiments import synthesis, synthesis_report

    folder = synthesis.run(config)
    typer.echo(synthesis_report.summary(folder))
    typer.echo(folder)
