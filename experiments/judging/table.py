"""What verdict files say, one markdown page per benchmark: scores, biases beside them, trivial judges on the rows."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import stats
from experiments.files import new_folder, replace
from experiments.judging.bias import FACTS, facts, regression, said
from experiments.judging.credit import TIED, UNPARSED, Verdicts, arrays
from experiments.judging.formats import RMB_ROWS, group
from experiments.judging.pairs import TIE, judge_of, read_verdicts
from experiments.judging.scores import PROTOCOLS, Protocol, difference, score
from experiments.table import UNKNOWN, cell, grid, number
from methods.errors import DataError

MAIN = {
    "rewardbench": ("Chat", "Chat Hard", "Safety", "Reasoning", "Overall"),
    "rewardbench2": ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties", "Overall"),
    "rm_bench": ("hard", "normal", "easy", "Overall"),
    "rmb": (*RMB_ROWS, "Overall"),
    "llmbar": ("Natural", "Adversarial", "Overall"),
    "pairs": ("Overall",),
}
TRIVIAL = ("random", "longer", "shorter", "always_first")
WORDS = {
    "official": "`official`: one order, drawn by the seed, with the benchmark's credit for ties and unparsable ones",
    "strict": "`strict`: the same with 0 for what cannot be parsed",
    "both": "`both`: both orders, 1 agree right, 0 agree wrong, else 1/2",
}


@dataclass(frozen=True)
class Measured:
    """One judge on one benchmark. slopes: (b0, b_gold, b_len) of the regression in `experiments.judging.bias`."""

    judge: str
    verdicts: Verdicts
    scores: dict[str, dict[str, stats.Interval]]
    facts: dict[str, stats.Interval]
    slopes: tuple[float, ...]
    notes: list[str] = field(default_factory=list)
    trivial: bool = False


def measure(table: Any, judge: str, source: str = "verdicts", official: bool = False) -> Measured:
    """All numbers of one verdict table. `official`: DataError unless the rows are the published ones.

    Degenerate: equal scores everywhere are a degenerate judge (0, or .25 on RewardBench 2), said in a note and not to
    be read as below chance; NaN scores are wrong and counted.
    """
    from experiments.tasks.judge_benchmarks import check_rows

    verdicts = arrays(table, source)
    if official:
        names = [group(verdicts.benchmark, verdicts.subsets[k]) for k in verdicts.subset_I]
        check_rows(verdicts.benchmark, Counter(names), source)
    scores, notes, pairs = score(verdicts), [], verdicts.pairs
    if not scores:
        raise DataError("Nothing here can be scored", where=source, got=f"{verdicts.count} verdicts")
    if official and verdicts.benchmark == "rewardbench2" and "Ties" not in scores:
        raise DataError("Ties needs absolute scores", where=source, fix="use a judge that scores each response")
    unknown = sum(int(np.isnan(found.score_Rk[found.scored_R]).sum()) for found in verdicts.lists)
    if unknown:
        notes.append(f"{judge}: {unknown} scores are not numbers; what they decide counts as wrong.")
    if verdicts.benchmark == "rewardbench2" and "Ties" not in scores:
        notes.append(f"{judge}: without Ties, which needs absolute scores; its Overall is the mean of what is there.")
    if len(pairs.seeded_N) and (pairs.seeded_N == TIED).all():
        notes.append(f"{judge}: degenerate judge, all its scores or verdicts tie; this is not below chance.")
    if len(pairs.seeded_N) and (pairs.seeded_N == UNPARSED).all():
        notes.append(f"{judge}: not one verdict could be parsed.")
    return Measured(judge, verdicts, scores, facts(verdicts), regression(said(verdicts)), notes)


def trivial(table: Any, rule: str) -> Any:
    """The same questions answered by a trivial judge; what it needs is in the table. random: a coin for each verdict,
    or random scores where the judge scored responses one by one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rng, n = np.random.default_rng(0), table.num_rows
    lengths = table["lengths"].combine_chunks()
    sizes = pc.call_function("list_value_length", [lengths]).to_numpy()
    flat = pc.call_function("list_flatten", [lengths]).to_numpy().astype(float)
    choice, values = np.full(n, TIE), None
    if rule == "always_first":
        choice = np.zeros(n, int)
    elif rule == "random" and table["scores"].null_count == n:
        choice = rng.integers(sizes)
    elif rule == "random":
        values = rng.random(len(flat))
    else:
        values = flat if rule == "longer" else -flat
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    scores = pa.nulls(n, pa.list_(pa.float64())) if values is None else pa.ListArray.from_arrays(offsets, values)
    table = table.set_column(table.column_names.index("choice"), "choice", pa.array(choice, pa.int16()))
    return table.set_column(table.column_names.index("scores"), "scores", scores)


def with_trivial(table: Any, judge: str, source: str, official: bool = False) -> list[Measured]:
    """The judge, then the trivial judges on the same rows."""
    found = [measure(table, judge, source, official)]
    for rule in TRIVIAL:
        if rule == judge:
            continue
        answers = trivial(table, rule)
        if not score(arrays(answers, source)):
            continue  # which stands first says nothing of pairs where more than two were shown
        other = measure(answers, rule, source)
        found.append(Measured(rule, other.verdicts, other.scores, other.facts, other.slopes, trivial=True))
    return found


# ---------------------------------------------------------------- the page


def report(
    files: Sequence[str | Path],
    folder: str | Path,
    *,
    official: bool = False,
    left_out: Mapping[str, int] | None = None,
) -> Path:
    """Write table.md and figures/ for verdict files of one benchmark, the first judge being the one compared with."""
    from experiments.judging.figures import draw

    folder, rows = Path(folder), []
    tables = [(read_verdicts(file), str(file)) for file in files]
    rows = [measure(table, judge_of(source), source, official) for table, source in tables]
    names = sorted({row.verdicts.benchmark for row in rows})
    if len(names) > 1:
        raise DataError("One table holds one benchmark", got=", ".join(names))
    rows += with_trivial(tables[0][0], rows[0].judge, tables[0][1])[1:]
    with new_folder(folder):
        figures = draw([row for row in rows if not row.trivial], folder / "figures")
        text = markdown(rows, official=official, left_out=left_out or {}, figures=figures)
        replace(folder / "table.md", text.encode("utf-8", "replace"))
    return folder / "table.md"


def markdown(
    rows: Sequence[Measured],
    *,
    official: bool = False,
    left_out: Mapping[str, int] | None = None,
    figures: Mapping[str, str] | None = None,
) -> str:
    """The whole page: what was asked, main numbers, biases, every number of each judge, differences, notes."""
    judged = [row for row in rows if not row.trivial]
    sections = [
        _head(judged[0], official, left_out or {}),
        _main(rows),
        _beside(rows),
        *(_every(row) for row in judged),
        *(_differences(row, judged[0]) for row in judged[1:]),
        "\n".join(f"* {safe(note)}" for row in judged for note in row.notes),
        "\n\n".join(f"![{title}]({path})" for title, path in (figures or {}).items()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def safe(name: str) -> str:
    """A name from data as a table shows it: one line, no markup, no link."""
    text = html.escape("".join(c if c.isprintable() else " " for c in name), quote=False)
    return text.replace("[", "&#91;").replace("]", "&#93;")


def _head(row: Measured, official: bool, left_out: Mapping[str, int]) -> str:
    verdicts = row.verdicts
    text = (
        f"# {safe(verdicts.benchmark)}\n\n{len(verdicts.subset_I):,} items, {verdicts.count:,} verdicts by each judge. "
    )
    text += "The published rows." if official else "Not the published rows: do not compare with published scores."
    lost = ", ".join(f"{count} with {why}" for why, count in left_out.items())
    return text + (f" Left out: {lost}." if lost else "")


def _protocols(rows: Sequence[Measured]) -> list[Protocol]:
    """Those that are known and say something: without unparsable verdicts `strict` is `official`."""
    known: list[Protocol] = [p for p in PROTOCOLS if any(p in row.scores.get("Overall", {}) for row in rows)]
    return [p for p in known if p != "strict" or any(row.facts["unparsable"].mean > 0 for row in rows)]


def _main(rows: Sequence[Measured]) -> str:
    there = [name for name in MAIN[rows[0].verdicts.benchmark] if any(name in row.scores for row in rows)]
    protocols = _protocols(rows)
    columns = [(name, "official") for name in there] + [("Overall", p) for p in protocols[1:]]
    header = [name if p == "official" else f"{name}, {p}" for name, p in columns]
    lines = [[_judge(row), *(_cell(row, name, p) for name, p in columns)] for row in rows]
    legend = ". ".join(WORDS[p] for p in protocols)
    return f"## Scores\n\n{grid(['judge', *header], lines)}\n\n{legend}. Intervals: 95 %, clustered by prompt."


def _beside(rows: Sequence[Measured]) -> str:
    lines = []
    for row in rows:
        slopes = [number(slope, True) for slope in row.slopes]
        lines.append([_judge(row), *(cell(row.facts[name]) for name in FACTS), *slopes])
    text = "## Beside the score\n\n" + grid(["judge", *FACTS, "b0", "b_gold", "b_len"], lines)
    return text + (
        "\n\nconsistency: both orders parse and name the same answer. first slot: share of slot A among parsed "
        "verdicts. longer bias: P(picks the longer) - P(the longer is right). length gap: accuracy where the right "
        "answer is longer, minus where it is shorter. b: logit P(pick A) = b0 + b_gold g + b_len log(length A / length "
        "B), g = 1 where A is right, else -1. Equal lengths and unparsable verdicts are left out of the length figures."
    )


def _every(row: Measured) -> str:
    protocols = _protocols([row])
    lines = [[safe(name), *(_cell(row, name, p) for p in protocols)] for name in row.scores]
    return f"## Every number of {safe(row.judge)}\n\n" + grid(["number", *protocols], lines)


def _differences(row: Measured, base: Measured) -> str:
    found = {p: difference(row.verdicts, base.verdicts, p) for p in _protocols([row, base])}
    protocols = [p for p in found if found[p]]
    names = [name for name in MAIN[row.verdicts.benchmark] if any(name in found[p] for p in protocols)]
    lines = [[name, *(_signed(found[p].get(name)) for p in protocols)] for name in names]
    title = f"## {safe(row.judge)} minus {safe(base.judge)}, on the same items"
    return f"{title}\n\n" + grid(["number", *protocols], lines) if lines else ""


def _judge(row: Measured) -> str:
    return safe(row.judge) + (" (trivial)" if row.trivial else "")


def _cell(row: Measured, name: str, protocol: str) -> str:
    found = row.scores.get(name, {}).get(protocol)
    return UNKNOWN if found is None else cell(found)


def _signed(found: stats.Interval | None) -> str:
    if found is None:
        return UNKNOWN
    return f"{number(found.mean, True)} [{number(found.low, True)}, {number(found.high, True)}]"
