"""`assay report`: tables, figures and a browser of samples, from records alone."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.words import ConfigDir


def report(
    targets: Annotated[
        list[str] | None, typer.Argument(help="An experiment, or folders of runs. Default: the latest experiment.")
    ] = None,
    results_dir: Annotated[str, typer.Option(help="Where the runs were recorded (under raw/).")] = "results",
    baseline: Annotated[str | None, typer.Option(help="Arm to compare with. Default: the experiment's own.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to test and show instead of the experiment's own; repeatable.")
    ] = None,
    power: Annotated[bool, typer.Option("--power", help="Also print the full power table.")] = False,
    browse: Annotated[bool, typer.Option("--browse", help="Only write samples.html and print its path.")] = False,
    config_dir: ConfigDir = None,
) -> None:
    """Compare the arms of an experiment on the same seeds and items.

    Writes runs.csv, table.md, figures/ and samples.html into results/EXPERIMENT/ and prints the table. The last line
    is the path of table.md (with --browse, of samples.html). Every mean and difference comes with an interval.

    \b
    Examples:
      assay report                                     the latest experiment
      assay report ha_dw_tiers --power                 with the full power table
      assay report ha_dw_tiers --metric eval/score/hard --baseline grpo
      assay report results/raw/a/grpo/seed0 results/raw/b/grpo/seed0
      assay report results/raw/a/grpo/seed0 --browse   read its samples in a browser
    """
    from cli.compose import conf_dirs
    from experiments import report as tables

    if browse:
        typer.echo(str(tables.browse(targets or [], results_dir)))
        return
    path = tables.build(
        targets or None,
        results_dir,
        conf_dirs=conf_dirs(config_dir or ()),
        baseline=baseline,
        power=power,
        metrics=metric or (),
    )
    typer.echo(str(path))
