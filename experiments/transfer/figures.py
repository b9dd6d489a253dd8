"""Bars of the scores, and scores against measured changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.files import new_folder
from experiments.plots import BASELINE, COLOURS, STYLE, new_figure, save, short

KINDS = (("act", "STS_act"), ("icl", "STS_ICL"))


def draw(rows: Sequence[dict[str, Any]], folder: Path, measured: str = "") -> dict[str, str]:
    """Write the figures; titles and paths. `rows`: domains in rank order with `act`, `icl`, their bounds, `change`."""
    import matplotlib

    # Names come from data: a dollar sign is no mathematics.
    style: dict[Any, Any] = {**STYLE, "text.parse_math": False}
    made = {"Scores": ("scores", _bars)} | ({"Scores and changes": ("transfer", _scatter)} if measured else {})
    with matplotlib.rc_context(style), new_folder(folder):
        for name, figure in made.values():
            save(figure(rows, measured), folder / name)
    return {title: f"figures/{name}.png" for title, (name, _) in made.items()}


def _bars(rows: Sequence[dict[str, Any]], measured: str) -> Any:
    figure, axes = new_figure(8.6, 1.2 + 0.28 * len(rows), 1, 2, sharey=True)
    for axis, (key, title), colour in zip(axes[0], KINDS, COLOURS, strict=False):
        values = [row[key] for row in rows]
        low = [max(0.0, row[key] - row[f"{key}_low"]) if row[f"{key}_low"] is not None else 0.0 for row in rows]
        high = [max(0.0, row[f"{key}_high"] - row[key]) if row[f"{key}_high"] is not None else 0.0 for row in rows]
        axis.barh(range(len(rows)), values, color=colour, xerr=(low, high), error_kw={"elinewidth": 1}, height=0.7)
        axis.set_title(f"{title}, 95 % interval over texts", loc="left")
    axes[0][0].set_yticks(range(len(rows)), [short(row["domain"]) for row in rows])
    axes[0][0].invert_yaxis()
    return figure


def _scatter(rows: Sequence[dict[str, Any]], measured: str) -> Any:
    figure, axes = new_figure(8.6, 3.9, 1, 2, sharey=True)
    for axis, (key, title), colour in zip(axes[0], KINDS, COLOURS, strict=False):
        axis.scatter([row[key] for row in rows], [abs(row["change"]) for row in rows], color=colour, s=22)
        for row in rows:
            at = (row[key], abs(row["change"]))
            axis.annotate(short(row["domain"], 18), at, (4, 3), textcoords="offset points", fontsize=8, color=BASELINE)
        axis.set_xlabel(title)
    axes[0][0].set_ylabel(f"size of the change of {measured}")
    return figure
