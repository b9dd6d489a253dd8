"""Figures from verdicts: accuracy against the length ratio, and what was said in which slot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import stats
from experiments.files import new_folder
from experiments.judging.bias import Said, said
from experiments.plots import BASELINE, COLOURS, FAINT, STYLE, new_figure, save, short

if TYPE_CHECKING:
    from experiments.judging.table import Measured

EDGES = np.array([-np.inf, -2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2, np.inf])  # log2 of right length / wrong length
LEAST = 5  # verdicts in a bin that is drawn
SAID = ("A", "B", "tie", "unparsable")


def draw(rows: Sequence[Measured], folder: Path) -> dict[str, str]:
    """Write the figures; their titles and paths relative to the table's folder. None where no pair was judged."""
    import matplotlib

    told = {row.judge: said(row.verdicts) for row in rows}
    if not any(len(found.first_V) for found in told.values()):
        return {}
    made = {}
    # Names of judges come from files: a dollar sign is no mathematics.
    style: dict[Any, Any] = {**STYLE, "text.parse_math": False}
    with matplotlib.rc_context(style), new_folder(folder):
        for title, name, figure in (
            ("Accuracy against the length ratio", "length", _length(told)),
            ("What was said, by the slot of the right answer", "slots", _slots(told)),
        ):
            save(figure, folder / name)
            made[title] = f"figures/{name}.png"
    return made


def by_length(told: Said) -> list[tuple[float, stats.Interval]]:
    """(median log2 length ratio, accuracy of all verdicts with its interval) of each bin; unparsable ones are wrong."""
    right = np.where(told.gold_first_V, told.length_first_V, told.length_second_V)
    wrong = np.where(told.gold_first_V, told.length_second_V, told.length_first_V)
    ratio = np.log2(np.maximum(right, 1) / np.maximum(wrong, 1))
    value = np.nan_to_num(told.right_V)
    found = []
    for low, high in itertools.pairwise(EDGES):
        rows = (ratio >= low) & (ratio < high)
        if rows.sum() >= LEAST:
            zeros = np.zeros(int(rows.sum()), int)
            interval = stats.clustered(value[rows], zeros, told.cluster_V[rows], [[1.0]])[0]
            found.append((float(np.median(ratio[rows])), interval))
    return found


def confusion(told: Said) -> np.ndarray:
    """(2, 4): counts by the slot of the right answer (A, B) and by what was said (`SAID`)."""
    choice = np.select([np.isnan(told.first_V), told.first_V == 1, told.first_V == 0], [3, 0, 1], 2)
    return np.bincount(np.where(told.gold_first_V, 0, 4) + choice, minlength=8).reshape(2, 4)


def _length(told: dict[str, Said]) -> Any:
    figure, axes = new_figure(6.2, 3.6, 1, 1)
    axis = axes[0][0]
    axis.axhline(0.5, color=FAINT, linewidth=1)
    axis.axvline(0, color=FAINT, linewidth=1)
    for k, (judge, found) in enumerate(told.items()):
        points = by_length(found)
        x, y = [at for at, _ in points], [interval.mean for _, interval in points]
        low = [max(0.0, i.mean - i.low) if i.basis else 0.0 for _, i in points]
        high = [max(0.0, i.high - i.mean) if i.basis else 0.0 for _, i in points]
        colour = COLOURS[k % len(COLOURS)]
        axis.errorbar(
            x, y, yerr=(low, high), marker="o", markersize=4, color=colour, elinewidth=1, label=_legend(judge)
        )
    axis.set_xlabel("log2 (length of the right answer / length of the wrong one)")
    axis.set_ylabel("accuracy, 95 % interval")
    axis.set_ylim(-0.03, 1.03)
    axis.legend(frameon=False, fontsize=9)
    return figure


def _legend(judge: str) -> str:
    return f" {short(judge)}" if judge.startswith("_") else short(judge)  # a label with `_` in front is left out


def _slots(told: dict[str, Said]) -> Any:
    figure, axes = new_figure(1.2 + 2.9 * len(told), 2.3, 1, len(told))
    for axis, (judge, found) in zip(axes[0], told.items(), strict=True):
        counts = confusion(found)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if share[i, j] > 0.6 else BASELINE
            axis.text(j, i, f"{share[i, j]:.2f}\n{count:,}", ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(4), SAID)
        axis.set_yticks(range(2), ["right in A", "right in B"])
        axis.set_title(short(judge), loc="left")
    return figure
