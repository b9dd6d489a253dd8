"""`assay score-transfer`: which domains a fine-tune will change, predicted from the untouched model (STS)."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.train import carry_out, show
from cli.words import ConfigDir, Overrides


def score_transfer(
    overrides: Overrides = None,
    multirun: Annotated[bool, typer.Option("-m", "--multirun", help="Sweep: one run per combination.")] = False,
    cfg: Annotated[str | None, typer.Option(metavar="job", help="Print the resolved configuration and stop.")] = None,
    config_dir: ConfigDir = None,
) -> None:
    """Rank domains by how much a fine-tune on a source will change them, without training (STS).

    \b
    Examples:
      assay score-transfer domains=jsonl domains.path=mine.jsonl source.domain=math sae.path=SAE_FOLDER
      assay score-transfer domains=domain_text domains.path=domain_text.parquet source.domain=legal sae.train=true
      assay score-transfer domains=mmlu_pro source.path=limo.jsonl model=hf model.path=Qwen/Qwen2.5-7B-Instruct \\
          sae.path=FOLDER scale=gpu
      assay score-transfer domains=jsonl domains.path=mine.jsonl source.domain=math sae.path=FOLDER measure=true \\
          'sft.lora={r: 8}' sft.epochs=2
      assay score-transfer domains=jsonl domains.path=mine.jsonl source.domain=math sae.path=FOLDER changes=mine.csv
      assay score-transfer domains=jsonl domains.path=mine.jsonl source.domain=math sae.path=FOLDER mixture.budget=220
      assay score-transfer experiment=sts_smollm2

    Tables have the columns domain, prompt and answer, or domain and text. Written: table.md, table.csv, result.json
    (scores with intervals over texts), latents.html (the most shifted latents with the texts that excite them most),
    figures. measure=true fine-tunes on the source and measures every domain before and after; changes=FILE gives
    measured changes (columns domain and change, or before and after). Correlations are over all domains;
    extremes=4 adds those over the 4 + 4 most and least changed, labelled.

    The same line again skips finished runs; an interrupted one goes on with the next domain and ends in the same files.
    Keys: assay score-transfer --cfg job. The last line of the output is the path of what is written.
    """
    line, dirs = list(overrides or []), config_dir or ()
    if cfg is not None:
        show("score_transfer", cfg, line, multirun, dirs)
        return
    from experiments.transfer import run

    carry_out("score_transfer", run, line, multirun, dirs)
