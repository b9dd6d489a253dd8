"""Verdicts as arrays, and what each pair of responses is worth to a benchmark.

N pairs (one item, a better and a worse response). `seeded_N` and `swapped_N` hold what was said in each order: RIGHT,
WRONG, TIED, UNPARSED, or NOT_ASKED. A score file gives its pairs by comparing scores; it is the same in both orders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.judging.pairs import FAILED, TIE, UNPARSABLE
from methods.errors import DataError

AGAIN = "delete the file and judge again"
RIGHT, WRONG, TIED, UNPARSED, NOT_ASKED = 0, 1, 2, 3, -1


@dataclass(frozen=True)
class Pairs:
    """item_N indexes `Verdicts.subset` and its fellows; first_N: the better one stood first in the seeded order;
    failed_N: a request about the pair failed (UNPARSED in that order)."""

    item_N: np.ndarray
    better_N: np.ndarray
    worse_N: np.ndarray
    seeded_N: np.ndarray
    swapped_N: np.ndarray
    first_N: np.ndarray
    scored_N: np.ndarray
    length_better_N: np.ndarray
    length_worse_N: np.ndarray
    failed_N: np.ndarray


@dataclass(frozen=True)
class Lists:
    """Verdicts that show k responses at once, by k: R rows. choice is a slot; score_Rk is NaN where none was given."""

    item_R: np.ndarray
    grade_Rk: np.ndarray
    score_Rk: np.ndarray
    choice_R: np.ndarray
    scored_R: np.ndarray


@dataclass(frozen=True)
class Verdicts:
    """One benchmark's verdicts by one judge. Per item: subset_I, an index of `subsets`; cluster_I, a code; id_I."""

    benchmark: str
    subsets: list[str]
    subset_I: np.ndarray
    id_I: np.ndarray
    cluster_I: np.ndarray
    pairs: Pairs
    lists: list[Lists]
    count: int
    source: str = "verdicts"


def arrays(table: Any, source: str = "verdicts") -> Verdicts:
    """The verdicts of a table (`read_verdicts`). DataError: several benchmarks in it, damaged rows, a question
    answered twice, or only some questions answered in both orders."""
    names = table["benchmark"].unique().to_pylist()
    if len(names) != 1:
        raise DataError("One benchmark is scored at a time", where=source, got=", ".join(map(str, names)))
    subset, id_, cluster = (_encoded(table[name]) for name in ("subset", "id", "cluster"))
    _, first, item = np.unique(subset[0] * (len(id_[1]) + 1) + id_[0], return_index=True, return_inverse=True)
    choice, swapped = table["choice"].to_numpy(), table["order"].to_numpy(zero_copy_only=False) == "swapped"
    columns = {name: _ragged(table[name]) for name in ("slots", "grades", "lengths", "scores")}
    size, scored = columns["slots"].size, columns["scores"].size > 0
    agree = (columns["grades"].size == size) & (columns["lengths"].size == size)
    agree &= ~scored | (columns["scores"].size == size)
    if not (agree & (size >= 2) & (choice < size) & (choice >= FAILED)).all():
        raise DataError("A verdict names a slot that was not shown, or lacks grades or lengths", where=source)
    parts, lists = [], []
    for k in np.unique(size):
        rows = np.flatnonzero(size == k)
        slots, grades, lengths = (columns[name].rows(rows, k) for name in ("slots", "grades", "lengths"))
        score = np.full(grades.shape, np.nan)
        score[scored[rows]] = columns["scores"].rows(rows[scored[rows]], k)
        lists.append(Lists(item[rows], grades, score, choice[rows], scored[rows]))
        asked = item[rows][~scored[rows]]
        if k > 2 and len(np.unique(asked)) < len(asked):
            raise DataError("A question was answered twice", where=source, fix=AGAIN)
        # Lists without scores tell of one response only, which pairs cannot say.
        told = (k == 2) | scored[rows]
        r, i, j = np.nonzero((grades[:, :, None] > grades[:, None, :]) & told[:, None, None])
        at = rows[r]
        said = _outcome(score[r, i], score[r, j], scored[at], choice[at], i, j)
        lengths_r = lengths[r, i], lengths[r, j]
        parts.append(
            (item[at], slots[r, i], slots[r, j], swapped[at], said, i < j, scored[at], *lengths_r, choice[at] == FAILED)
        )
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Verdicts(
        names[0],
        list(subset[1]),
        subset[0][first],
        id_[1][id_[0][first]],
        cluster[0][first],
        _paired(joined, source),
        lists,
        table.num_rows,
        source,
    )


def _outcome(better: np.ndarray, worse: np.ndarray, scored: np.ndarray, choice: np.ndarray, i: Any, j: Any) -> Any:
    """What verdicts say about the better responses in slots i and the worse ones in slots j."""
    by_choice = np.select([choice == i, choice == TIE, choice <= UNPARSABLE], [RIGHT, TIED, UNPARSED], WRONG)
    unknown = np.isnan(better) | np.isnan(worse)
    by_score = np.select([unknown, better > worse, better == worse], [UNPARSED, RIGHT, TIED], WRONG)
    return np.where(scored, by_score, by_choice)


def _paired(joined: list[np.ndarray], source: str) -> Pairs:
    """Both orders of a pair brought together."""
    item, better, worse, swapped, told, first, scored, long_better, long_worse, lost = joined
    most = int(max(better.max(initial=0), worse.max(initial=0))) + 1
    key = (item.astype(np.int64) * most + better) * most + worse
    _, order, code = np.unique(key, return_index=True, return_inverse=True)
    said = np.full((2, len(order)), NOT_ASKED)
    if (np.bincount(code * 2 + swapped, minlength=2 * len(order)) > 1).any():
        raise DataError("A question was answered twice", where=source, fix=AGAIN)
    said[swapped.astype(int), code] = told
    half = (said == NOT_ASKED).sum(axis=1)
    if half[0] or (0 < half[1] < len(order)):
        got = f"{half[0]} pairs without the seeded order, {half[1]} of {len(order)} without the swapped one"
        fix = "run the same line again to go on where judging stopped"
        raise DataError("Some questions were not answered", where=source, got=got, fix=fix)
    gold_first = np.empty(len(order), bool)
    gold_first[code] = first ^ swapped
    kept = (item[order], better[order], worse[order])
    lengths, failed = (long_better[order], long_worse[order]), np.bincount(code, lost, len(order)) > 0
    return Pairs(*kept, said[0], said[1], gold_first, scored[order], *lengths, failed)


# ---------------------------------------------------------------- credit


def both_orders(pairs: Pairs) -> np.ndarray:
    """1 where both orders are right, 0 where both are wrong, else 1/2 (split, tied or unparsable)."""
    right = (pairs.seeded_N == RIGHT) & (pairs.swapped_N == RIGHT)
    wrong = (pairs.seeded_N == WRONG) & (pairs.swapped_N == WRONG)
    return np.where(right, 1.0, np.where(wrong, 0.0, 0.5))


def one_order(said_N: np.ndarray, scored_N: np.ndarray, tie: float, unparsed: float) -> np.ndarray:
    """Credit of one order: 1 right, 0 wrong; `tie` and `unparsed` are for verdicts, equal or absent scores earn 0."""
    values = np.array([1.0, 0.0, tie, unparsed])[said_N]
    return np.where(scored_N & (said_N != RIGHT), 0.0, values)


# ---------------------------------------------------------------- columns


@dataclass(frozen=True)
class _Ragged:
    values: np.ndarray
    start: np.ndarray
    size: np.ndarray

    def rows(self, index: np.ndarray, k: int) -> np.ndarray:
        """(len(index), k): the rows `index`, which all have k values."""
        return self.values[self.start[index][:, None] + np.arange(k)]


def _ragged(column: Any) -> _Ragged:
    import pyarrow.compute as pc

    size = pc.fill_null(pc.call_function("list_value_length", [column]), 0).to_numpy().astype(np.int64)
    return _Ragged(pc.call_function("list_flatten", [column]).to_numpy(), np.cumsum(size) - size, size)


def _encoded(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Codes and the words they stand for."""
    whole = column.combine_chunks().dictionary_encode()
    return whole.indices.to_numpy().astype(np.int64), np.array(whole.dictionary.to_pylist(), dtype=object)
