"""`assay memory`: what a graph memory has learned; merging, saving and exporting memories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def memory(
    targets: Annotated[
        list[str], typer.Argument(help="Runs (folder or experiment/arm) or memory files; several merge.")
    ],
    results_dir: Annotated[str, typer.Option(help="Where the runs were recorded (under raw/).")] = "results",
    seed: Annotated[int, typer.Option(help="Seed of experiment/arm words.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the memory to this file (.safetensors).")] = None,
    graphml: Annotated[Path | None, typer.Option(help="Write the graph for Gephi, yEd or Cytoscape.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the three layers (.png and .svg).")] = None,
) -> None:
    """List the strategies that a graph memory has learned, with their weights; merge, save, export and draw it.

    \b
    Examples:
      assay memory graph_memory_gap/trained
      assay memory results/raw/my/run/seed0 --figure memory.png
      assay memory first.safetensors second.safetensors --out both.safetensors
      assay memory my/build --seed 3 --graphml memory.graphml

    A run that begins with a file: method.graph_memory.memory='{_target_: experiments.memory_file.load, path: FILE}'.
    The last lines of the output are the paths of what was written.
    """
    from experiments import memory_file, memory_report

    found = memory_file.find_all(targets, seed, results_dir)
    typer.echo(memory_report.listing(found))
    for path, write in ((out, memory_file.save), (graphml, memory_file.write_graphml), (figure, memory_report.draw)):
        if path is not None:
            typer.echo(write(found, path))
