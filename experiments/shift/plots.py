"""Figures of `assay report --shift`: how much the tokens moved, which ones, and the path of the checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.files import new_folder
from experiments.plots import BASELINE, COLOURS, INK, STYLE, new_figure, save, short
from experiments.shift.compare import Comparison
from methods.token_shift import THRESHOLDS

MOST = 6  # checkpoints in one figure of token shifts; of more, evenly spread ones and the last
RESPONSES, WIDTH = 18, 40  # of the heat map
BINS = 8  # groups of equally many tokens by base entropy
LETTERS = 900  # cells up to which the heat map spells the tokens

CAPTIONS = {
    "shift": "How far tokens moved: share of tokens by |Δp| (log scale; dotted: the thresholds of the table), and mean "
    "|Δp| in eight equally large groups of tokens by the base model's entropy, with standard errors.",
    "heat": "Which tokens moved: one row per response, one cell per token, coloured by Δp (blue rose, orange fell).",
    "dynamics": "Learning dynamics: mean token cross-entropy of every checkpoint on pairs of reference sets; arrows "
    "lead from a checkpoint to the one that goes on from it. The intervals are in the table.",
}


def draw(result: Comparison, folder: Path) -> dict[str, str]:
    """Write the figures; their captions and paths relative to the table."""
    import matplotlib

    made = {}
    with matplotlib.rc_context(STYLE), new_folder(folder):
        for name, figure in (("shift", _shift(result)), ("heat", _heat(result)), ("dynamics", _dynamics(result))):
            save(figure, folder / name)
            made[CAPTIONS[name]] = f"figures/{name}.png"
    return made


def _shown(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MOST))})


# ---------------------------------------------------------------- token shift


def _shift(result: Comparison) -> Any:
    figure, axes = new_figure(8.6, 3.5, 1, 2)
    left, right = axes[0]
    edges = np.linspace(0, _top(result), 21)
    for colour, i in zip(COLOURS, _shown(len(result.tokens)), strict=False):
        token = result.tokens[i]
        size, name = np.abs(token["dp"]), short(result.new[i].name, 26)
        left.stairs(np.histogram(size, edges)[0] / len(size), edges, color=colour, lw=1.9, label=name)
        x, mean, error = _by_entropy(token["entropy"], size)
        right.errorbar(x, mean, yerr=error, color=colour, marker="o", ms=4.5, capsize=2, elinewidth=1)
    for tau in THRESHOLDS:
        left.axvline(tau, color=BASELINE, lw=0.9, ls=":", zorder=0)
    left.set(yscale="log", xlim=(0, _top(result)), xlabel="|Δp|", ylabel="share of tokens")
    left.set_title("how far the tokens moved", loc="left")
    left.legend(frameon=False, fontsize=9, handlelength=1.4)
    right.set(xlabel=f"entropy of {short(result.found[0].name)} (nats)", ylabel="mean |Δp|")
    right.set_ylim(bottom=0)
    right.set_title("where the base was unsure", loc="left")
    for axis in (left, right):
        axis.grid(axis="y")
    return figure


def _top(result: Comparison) -> float:
    """Where the axis of |dp| ends: the next tenth beyond the largest, but not before the largest threshold."""
    largest = max(float(np.abs(token["dp"]).max()) for token in result.tokens)
    return min(1.0, max(THRESHOLDS[-1] + 0.1, np.ceil(10 * largest) / 10))


def _by_entropy(entropy_N: np.ndarray, size_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean entropy, mean |dp| and its standard error in groups of equally many tokens."""
    parts = [part for part in np.array_split(np.argsort(entropy_N, kind="stable"), BINS) if len(part)]
    error = [size_N[part].std(ddof=1) / np.sqrt(len(part)) if len(part) > 1 else 0.0 for part in parts]
    return (
        np.array([entropy_N[part].mean() for part in parts]),
        np.array([size_N[part].mean() for part in parts]),
        np.array(error),
    )


# ---------------------------------------------------------------- heat map


def _heat(result: Comparison) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    shown = _shown(len(result.tokens))[-3:]
    pieces = [row[:WIDTH] for row in result.pieces[:RESPONSES]]
    width = max(map(len, pieces))
    colours = LinearSegmentedColormap.from_list("shift", [COLOURS[1], "#FFFFFF", COLOURS[0]])
    cell = min(0.3, 9.5 / (width * len(shown)))
    figure, axes = new_figure(
        cell * width * len(shown) + 1.6 + 0.25 * len(shown), 0.26 * len(pieces) + 1.0, 1, len(shown), sharey=True
    )
    letters = len(pieces) * width * len(shown) <= LETTERS and max(len(p.strip()) for row in pieces for p in row) <= 6
    for axis, i in zip(axes[0], shown, strict=True):
        axis.set_facecolor("#F0F0F0")  # beyond the end of a response
        grid = _grid(result.tokens[i], len(pieces), width)
        image = axis.imshow(grid, cmap=colours, vmin=-result.scale, vmax=result.scale, aspect="auto")
        if letters:
            _spell(axis, pieces, grid, result.scale)
        axis.set_title(short(result.new[i].name, 24), loc="left")
        axis.set(xlabel="token of the response", xticks=range(0, width, max(1, width // 6)))
        axis.spines[:].set_visible(False)
    axes[0][0].set(ylabel="response", yticks=[0, len(pieces) - 1], yticklabels=["1", str(len(pieces))])
    figure.colorbar(image, ax=axes[0][-1], label="Δp", shrink=0.8, pad=0.03).outline.set_visible(False)
    return figure


def _grid(token: dict[str, np.ndarray], rows: int, width: int) -> np.ndarray:
    grid = np.full((rows, width), np.nan)
    inside = (token["response"] < rows) & (token["position"] < width)
    grid[token["response"][inside], token["position"][inside]] = token["dp"][inside]
    return grid


def _spell(axis: Any, pieces: Sequence[Sequence[str]], grid: np.ndarray, scale: float) -> None:
    for row, column in itertools.product(range(len(pieces)), range(grid.shape[1])):
        if column < len(pieces[row]):
            piece = pieces[row][column].strip() or "␣"
            ink = "white" if abs(grid[row, column]) > 0.75 * scale else INK
            size = 8.5 if len(piece) < 3 else 5
            axis.text(column, row, piece.replace("$", r"\$"), ha="center", va="center", fontsize=size, color=ink)


# ---------------------------------------------------------------- dynamics


def _dynamics(result: Comparison) -> Any:
    dynamics = result.dynamics
    pairs = list(itertools.combinations(range(len(dynamics.sets)), 2))
    figure, axes = new_figure(3.3 * len(pairs) + 2.2, 3.5, 1, len(pairs))
    hues = {p: COLOURS[c % len(COLOURS)] for c, chain in reversed(list(enumerate(dynamics.chains))) for p in chain[1:]}
    for axis, (h, v) in zip(axes[0], pairs, strict=True):
        for chain in dynamics.chains:
            for a, b in itertools.pairwise(chain):
                start, end = ((dynamics.points[p][h].mean, dynamics.points[p][v].mean) for p in (a, b))
                arrow = {"arrowstyle": "-|>", "color": hues[b], "lw": 1.6, "shrinkA": 4, "shrinkB": 5}
                axis.annotate("", end, start, arrowprops=arrow)
        for p in range(len(result.found)):
            at, hue = (dynamics.points[p][h].mean, dynamics.points[p][v].mean), hues.get(p, BASELINE)
            axis.plot(*at, "o", color=hue, ms=6, zorder=3)
            axis.annotate(str(p), at, (5, 5), textcoords="offset points", color=hue, fontweight="bold")
        axis.set(xlabel=f"on {short(dynamics.sets[h])}", ylabel=f"on {short(dynamics.sets[v])}")
        axis.grid(True)
        axis.margins(0.15)
    axes[0][0].set_title("cross-entropy (nats per token)", loc="left")
    marks = [axes[0][-1].plot([], [], "o", color=hues.get(p, BASELINE))[0] for p in range(len(result.found))]
    names = [f"{p}  {short(one.name, 26)}" for p, one in enumerate(result.found)]
    axes[0][-1].legend(marks, names, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=9)
    return figure
