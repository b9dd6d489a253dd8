"""How a judge errs: position, length, what it does not parse. Everything per verdict, both orders together.

consistency = share of pairs whose two verdicts parse and name the same answer (a tie names none); first slot = (#A +
#tie / 2) / #parsed; longer bias = P(picks the longer) - P(the longer is right), equal lengths left out; length gap =
accuracy where the right answer is longer - where it is shorter. One regression for all three, ridge .01 on the slopes:
logit P(pick A) = b0 + b_gold g + b_len log(len_A / len_B), g = +1 where A is right, else -1.
Degenerate: where nothing is left to count (no second order, all lengths equal), the number is NaN, not 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from experiments import stats
from experiments.judging.credit import NOT_ASKED, RIGHT, TIED, WRONG, Verdicts

RIDGE = 0.01
FACTS = ("consistency", "first slot", "longer bias", "length gap", "ties", "unparsable")


@dataclass(frozen=True)
class Said:
    """V verdicts on pairs. first_V: share of the verdict that goes to slot A: 1, 0, 1/2 for a tie, NaN unparsable."""

    first_V: np.ndarray
    gold_first_V: np.ndarray
    length_first_V: np.ndarray
    length_second_V: np.ndarray
    cluster_V: np.ndarray

    @property
    def right_V(self) -> np.ndarray:
        return np.where(self.gold_first_V, self.first_V, 1 - self.first_V)


def said(verdicts: Verdicts) -> Said:
    """Every verdict on a pair, the seeded order first. Pairs that scores decided are in it once."""
    pairs = verdicts.pairs
    parts = []
    for told, gold_first in ((pairs.seeded_N, pairs.first_N), (pairs.swapped_N, ~pairs.first_N)):
        asked = told != NOT_ASKED
        share = np.select([told == RIGHT, told == WRONG, told == TIED], [1.0, 0.0, 0.5], np.nan)
        first = np.where(gold_first, share, 1 - share)
        long_a = np.where(gold_first, pairs.length_better_N, pairs.length_worse_N)
        long_b = np.where(gold_first, pairs.length_worse_N, pairs.length_better_N)
        cluster = verdicts.cluster_I[pairs.item_N]
        parts.append([column[asked] for column in (first, gold_first, long_a, long_b, cluster)])
    return Said(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def facts(verdicts: Verdicts) -> dict[str, stats.Interval]:
    """`FACTS` with clustered 95 % intervals; NaN where a fact cannot be had."""
    pairs, told = verdicts.pairs, said(verdicts)
    parsed = ~np.isnan(told.first_V)
    apart = parsed & (told.length_first_V != told.length_second_V)
    twice = pairs.swapped_N != NOT_ASKED
    same = ((pairs.seeded_N == pairs.swapped_N) & np.isin(pairs.seeded_N, (RIGHT, WRONG))).astype(float)
    cluster_N = verdicts.cluster_I[pairs.item_N]
    # A judge that scores responses one by one has no slots, unless it was asked twice.
    slots = parsed & (twice.any() or not pairs.scored_N.all())
    lists = [found for found in verdicts.lists if found.grade_Rk.shape[1] > 2 and not found.scored_R.any()]
    unparsed = np.concatenate([~parsed, *(found.choice_R < 0 for found in lists)])
    clusters = np.concatenate([told.cluster_V, *(verdicts.cluster_I[found.item_R] for found in lists)])
    return {
        "consistency": _mean(same[twice], cluster_N[twice]),
        "first slot": _mean(told.first_V[slots], told.cluster_V[slots]),
        "longer bias": _mean(longer_bias(told)[apart], told.cluster_V[apart]),
        "length gap": length_gap(told),
        "ties": _mean((told.first_V == 0.5)[parsed], told.cluster_V[parsed]),
        "unparsable": _mean(unparsed, clusters),
    }


def longer_bias(told: Said) -> np.ndarray:
    """Per verdict: 1 where it picks the longer, minus 1 where the longer is right."""
    a_longer = told.length_first_V > told.length_second_V
    picked = np.where(a_longer, told.first_V, 1 - told.first_V)
    return picked - (a_longer == told.gold_first_V)


def length_gap(told: Said) -> stats.Interval:
    """Accuracy of the parsed verdicts where the right answer is longer, minus that where it is shorter."""
    gold_longer = (told.length_first_V > told.length_second_V) == told.gold_first_V
    keep = ~np.isnan(told.first_V) & (told.length_first_V != told.length_second_V)
    group = np.where(gold_longer, 0, 1)[keep]
    return stats.clustered(told.right_V[keep], group, told.cluster_V[keep], [[1.0, -1.0]])[0]


def _mean(values: np.ndarray, clusters: np.ndarray) -> stats.Interval:
    if not len(values):
        return stats.Interval(math.nan, math.nan, math.nan)
    return stats.clustered(values, np.zeros(len(values), int), clusters, [[1.0]])[0]


def regression(told: Said, steps: int = 100) -> tuple[float, ...]:
    """(b0, b_gold, b_len): position, discernment and verbosity, by Newton's method on the penalised likelihood.

    sum log-likelihood - RIDGE / 2 (b_gold^2 + b_len^2); ties count as half a pick, unparsable verdicts are left out.
    An empty answer counts as one character. NaN where no verdict parses; one-sided picks make b0 large: it has no
    maximum, and the steps end there.
    """
    keep = ~np.isnan(told.first_V)
    if not keep.any():
        return math.nan, math.nan, math.nan
    y = told.first_V[keep]
    lengths = np.log(np.maximum(told.length_first_V[keep], 1) / np.maximum(told.length_second_V[keep], 1))
    x = np.stack([np.ones(len(y)), np.where(told.gold_first_V[keep], 1.0, -1.0), lengths], axis=1)
    ridge, b = np.diag([1e-9, RIDGE, RIDGE]), np.zeros(3)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ b, -30, 30)))
        step = np.linalg.solve(x.T * (p * (1 - p)) @ x + ridge, x.T @ (y - p) - ridge @ b)
        b = b + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return tuple(round(float(slope), 6) + 0.0 for slope in b)
