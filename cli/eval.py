"""`assay eval`: score a model, a checkpoint or an endpoint on a task or suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from cli.train import report, show
from cli.words import ConfigDir, Multirun, Overrides, ShowJob

if TYPE_CHECKING:
    from cli.launch import Plan


def eval_(
    overrides: Overrides = None,
    multirun: Multirun = False,
    cfg: ShowJob = None,
    config_dir: ConfigDir = None,
) -> None:
    """Score a model, a checkpoint or an endpoint on a task or suite.

    \b
    Examples:
      assay eval task=arithmetic
      assay eval model=smollm2 task=gsm8k task.path=test.parquet eval.items=50
      assay eval model.init=results/raw/demo/grpo/seed0 task=arithmetic
      assay eval model=hf model.path=Qwen/Qwen2.5-0.5B-Instruct suite=math eval.samples=8 eval.temperature=1
      assay eval engine=openai engine.url=http://localhost:8000/v1 task=gsm8k task.path=test.parquet
      assay eval engine=openai engine.url=https://api.openai.com/v1 engine.model=gpt-4.1-mini \\
          engine.api_key_env=OPENAI_API_KEY task=gsm8k task.path=test.parquet
      assay eval -m model=tiny,smollm2 task=arithmetic

    The same line again skips finished runs; an interrupted one goes on where it was, because every answer is kept.
    Keys: assay eval --cfg job. Choices: assay ls. The last line of the output is the path of what was written.
    """
    from cli import launch

    line, dirs = list(overrides or []), config_dir or ()
    if cfg is not None:
        show("eval", cfg, line, multirun, dirs)
        return
    from experiments import evaluate

    plan = launch.plan("eval", line, multirun=multirun, config_dirs=dirs, check=evaluate.check)
    path = launch.launch(plan, target="experiments.evaluate:run")
    _tables(plan)
    if plan.spec is not None and plan.report:
        report(plan)
    typer.echo(path)


def _tables(plan: Plan) -> None:
    """One table per run, from its record."""
    from experiments.recording import run_folder
    from experiments.records import load_run
    from experiments.scoring import table

    for job in plan.jobs:
        run = load_run(run_folder(job.cfg))
        typer.echo(table(run.evals(), f"{plan.name}/{job.label}"))
        metrics = (run.summary or {}).get("metrics", {}).items()
        gone = [f"{key.partition('/left_out/')[2]} ({count:.0f})" for key, count in metrics if "/left_out/" in key]
        if gone:
            typer.echo(f"[left out, cannot be scored here: {', '.join(gone)}]")
