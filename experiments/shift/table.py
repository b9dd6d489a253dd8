"""table.md of `assay report --shift`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from experiments import stats
from experiments.shift.compare import Comparison, Numbers
from experiments.table import UNKNOWN, grid, number

MOST = 6  # new checkpoints among which differences are shown
TITLES = {
    "mean": "mean abs Δp",
    "rose": "rose",
    "gini": "Gini of abs Δp",
    "correlation": "corr(abs Δp, base H)",
    "kl": "KL(base, new)",
}
MEANING = (
    "Δp = p_new - p_base of a token of the text. The first columns are shares of tokens whose Δp is above a threshold "
    "in absolute value; `rose`: share with Δp > 0. Gini: 0 = all tokens moved alike, towards 1 = few carry all of the "
    "change. corr: Pearson's, with the entropy of the base model at the token. KL is per token, in nats."
)


def markdown(result: Comparison, figures: Mapping[str, str]) -> str:
    """The whole of table.md; `figures` (caption: path) are linked at the end."""
    sections = [
        _head(result),
        _shift(result),
        _difference(result),
        _points(result),
        _trajectories(result),
        _tax(result),
    ]
    pictures = [f"![{caption.split(':')[0]}]({path})\n\n{caption}" for caption, path in figures.items()]
    return "\n\n".join(section for section in [*sections, *pictures] if section) + "\n"


def _head(result: Comparison) -> str:
    texts = result.texts
    names = ", ".join(f"`{one.name}`" for one in result.new)
    lost = f" {texts.left_out} were empty or longer than the context and left out." if texts.left_out else ""
    return (
        f"# Token shift and learning dynamics\n\n"
        f"`{result.found[0].name}` (base) against {names} on {len(texts.rows)} responses with {texts.tokens} tokens: "
        f"{texts.told}.{lost}\n\n"
        f"Intervals: 95 %, percentile bootstrap over whole responses. They say how far other responses would change a "
        f"number, nothing about other training seeds.\n\n{_weights(result)}"
    )


def _weights(result: Comparison) -> str:
    rows = [[one.name, str(one.weights or f"what {one.run} started from")] for one in result.found]
    return grid(["checkpoint", "weights"], rows)


def cell(interval: stats.Interval, sign: bool = False) -> str:
    if math.isnan(interval.mean):
        return UNKNOWN
    mean = number(interval.mean, sign)
    if math.isnan(interval.low):
        return mean
    return f"{mean} [{number(interval.low, sign)}, {number(interval.high, sign)}]"


def _title(name: str) -> str:
    return TITLES.get(name) or f"abs Δp > {name.partition('/')[2]}"


def _shift_grid(names: Sequence[str], rows: Sequence[Numbers], sign: bool = False) -> str:
    cells = [[name, *(cell(x, sign) for x in row.values())] for name, row in zip(names, rows, strict=True)]
    return grid(["checkpoint", *map(_title, rows[0])], cells)


def _shift(result: Comparison) -> str:
    names = [one.name for one in result.new]
    return (
        f"## Token-distribution shift from `{result.found[0].name}`\n\n{_shift_grid(names, result.shift)}\n\n{MEANING}"
    )


def _difference(result: Comparison) -> str:
    if not 0 < len(result.difference) < MOST:
        return ""
    names = [one.name for one in result.new[1:]]
    table = _shift_grid(names, result.difference, sign=True)
    return f"## The same numbers minus those of `{result.new[0].name}`, on the same tokens\n\n{table}"


def _points(result: Comparison) -> str:
    dynamics = result.dynamics
    header = ["", "checkpoint", *dynamics.sets, "distance from base"]
    rows = [
        [str(p), one.name, *map(cell, dynamics.points[p]), cell(dynamics.distance[p]) if p else UNKNOWN]
        for p, one in enumerate(result.found)
    ]
    return (
        f"## Learning dynamics\n\n{grid(header, rows)}\n\n"
        f"A checkpoint is a point: its mean token cross-entropy (nats) on each reference set, all on the same "
        f"{dynamics.rows} prompts. A distance cannot be negative, so noise makes it, and its interval, a little too "
        "large."
    )


def _trajectories(result: Comparison) -> str:
    rows = []
    for chain, numbers in zip(result.dynamics.chains, result.dynamics.trajectories, strict=True):
        turning = [cell(x) for name, x in numbers.items() if name.startswith("turning/")]
        shown = [cell(numbers[name]) for name in ("net", "path", "straightness")]
        rows.append([" → ".join(map(str, chain)), *shown, ", ".join(turning) or UNKNOWN])
    table = grid(["path", "net", "length", "straightness = net / length", "turning cosines"], rows)
    note = (
        "A path runs from the base through checkpoints that go on from each other by the records of their runs; plain "
        "folders of weights, which have no record, follow each other in the order given."
    )
    return f"{table}\n\n{note}"


def _tax(result: Comparison) -> str:
    lines = []
    for chain, numbers in zip(result.dynamics.chains, result.dynamics.trajectories, strict=True):
        base, last = result.found[chain[0]].name, result.found[chain[-1]].name
        for name, tax in numbers.items():
            if name.startswith("tax/"):
                first = result.found[chain[int(name.partition("/")[2])]].name
                lines.append(
                    f"**Learning tax** of `{base}` → `{first}` → `{last}`: {cell(tax)}. It is the share of the first "
                    "stage's displacement that the second takes back (1 = all; negative = it goes on the same way)."
                )
    if not lines and len(result.found) > 2:
        return "No path here has a second stage, so there is no learning tax."
    return "\n\n".join(lines)
