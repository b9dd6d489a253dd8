"""Does the score go with the measured changes? Correlations over ALL domains, with the checks that few points need.

x_c is the score of domain c, y_c the size of the change that training really made there, C domains.

    r = Pearson, R^2 = r^2, Spearman = Pearson of average ranks
    p = share of the permutations of y with |r| at least as large (exact up to 8 domains, else (1 + hits) / (1 + draws))
    interval: tanh(atanh r +- 1.96 / sqrt(C - 3)), Fisher's, for domains drawn at random
    leave-one-out: r without each domain in turn

Differs from the paper (arXiv 2603.02908): it correlates over 8 of 14 domains, the 4 that changed most and the 4 that
changed least. That choice needs the outcome and inflates r (.5 over 14 domains becomes .66 over the 8 in the median);
here it is only offered by `extremes`, and a correlation over it is labelled.

Degenerate: fewer than 3 domains, or no variance in either -> r and all else NaN, with the reason; fewer than 8 domains
-> a note that r is weak evidence; up to 3 domains have no interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from methods.errors import DataError

ENOUGH = 8  # domains from which on r alone is not called weak evidence; up to here p is exact
DRAWS = 100_000
SELECTED = "only the domains that changed most and least, chosen by the outcome: r is inflated"
_FLAT = 1e-12  # spread, relative to size, that is rounding and not variance


@dataclass(frozen=True)
class Correlation:
    """One validation: r and everything that qualifies it. `reason` says why r is NaN, `notes` what weakens it."""

    domains: int
    r: float = math.nan
    r2: float = math.nan
    low: float = math.nan
    high: float = math.nan
    spearman: float = math.nan
    p: float = math.nan
    exact: bool = False
    leave_one_out: tuple[float, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest leave-one-out r; NaN if there is none."""
        known = [r for r in self.leave_one_out if not math.isnan(r)]
        return (min(known), max(known)) if known else (math.nan, math.nan)


def correlate(
    scores: Sequence[float],
    changes: Sequence[float],
    *,
    extremes_only: int | None = None,
    rng: np.random.Generator | None = None,
) -> Correlation:
    """The correlation of scores with |changes| over all domains.

    `changes` may be signed; their sizes are used. `extremes_only=4` is the paper's rule of 4 + 4, labelled in `notes`.
    `rng` draws the permutations where there are too many to count. DataError for lists of different lengths or values
    that are not finite.
    """
    x, y = np.asarray(scores, float), np.abs(np.asarray(changes, float))
    if x.shape != y.shape or x.ndim != 1:
        raise DataError("A correlation needs one score and one change per domain", got=f"{x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("A score or a change is not a finite number", expected="one finite number per domain")
    notes: list[str] = []
    if extremes_only is not None:
        chosen = extremes(changes, extremes_only)
        x, y = x[chosen], y[chosen]
        notes.append(SELECTED)
    n = len(x)
    if reason := _refusal(x, y):
        return Correlation(n, reason=reason, notes=tuple(notes))
    if n < ENOUGH:
        notes.append(f"r over {n} domains is weak evidence")
    r = pearson(x, y)
    p, exact = permutation_p(x, y, rng)
    low, high = fisher_interval(r, n)
    return Correlation(n, r, r * r, low, high, spearman(x, y), p, exact, tuple(leave_one_out(x, y)), notes=tuple(notes))


def _refusal(x: np.ndarray, y: np.ndarray) -> str:
    if len(x) < 3:
        return f"a correlation needs at least 3 domains, there {'is' if len(x) == 1 else 'are'} {len(x)}"
    for values, what in ((x, "score"), (y, "change")):
        if _flat(values):
            return f"the {what} is the same in every domain"
    return ""


def _flat(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= _FLAT * np.abs(values).max())


def pearson(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Pearson's r; NaN without variance or with fewer than 2 points."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) < 2 or _flat(a) or _flat(b):
        return math.nan
    a, b = _standard(a), _standard(b)
    return float(np.clip(a @ b, -1.0, 1.0))


def _standard(a: np.ndarray) -> np.ndarray:
    """Centred and of norm 1; scaled first, so that tiny and huge values neither vanish nor overflow."""
    a = a / np.abs(a).max()
    a = a - a.mean()
    return a / np.linalg.norm(a)


def ranks(x: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 1, ties by their mean."""
    _, index, count = np.unique(np.asarray(x, float), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return ((last - count + 1 + last) / 2)[index]


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation, ties by average ranks; NaN where Pearson's would be."""
    return pearson(ranks(x), ranks(y))


def permutation_p(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, rng: np.random.Generator | None = None
) -> tuple[float, bool]:
    """Two-sided p of Pearson's r, and whether all permutations were counted (up to 8 domains). NaN without variance."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) < 2 or _flat(a) or _flat(b):
        return math.nan, False
    a, b = _standard(a), _standard(b)
    bound = abs(a @ b) - 1e-9  # permutations that tie exactly differ in the last digits
    if len(a) <= ENOUGH:
        orders = np.array(list(itertools.permutations(range(len(a)))))
        return float((np.abs(b[orders] @ a) >= bound).mean()), True
    rng = np.random.default_rng(0) if rng is None else rng
    hits = 0
    for start in range(0, DRAWS, 10_000):
        drawn = rng.permuted(np.tile(b, (min(10_000, DRAWS - start), 1)), axis=1)
        hits += int((np.abs(drawn @ a) >= bound).sum())
    return (1 + hits) / (1 + DRAWS), False


def fisher_interval(r: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Fisher's 95 % interval of r over n points; NaN for up to 3 points."""
    if n <= 3 or math.isnan(r):
        return math.nan, math.nan
    if abs(r) >= 1:
        return r, r
    half = z / math.sqrt(n - 3)
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def leave_one_out(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> list[float]:
    """Pearson's r without each point in turn; NaN where the rest has no variance."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    return [pearson(np.delete(a, i), np.delete(b, i)) for i in range(len(a))]


def extremes(changes: Sequence[float], k: int = 4) -> list[int]:
    """The paper's choice of domains: the k of largest and the k of smallest |change|, by falling |change|.

    It needs the outcome. DataError with fewer than 2 k domains.
    """
    size = np.abs(np.asarray(changes, float))
    if k < 1 or len(size) < 2 * k:
        raise DataError("Too few domains to take the extremes of", got=f"{len(size)} domains, k={k}", expected="2 k")
    order = np.argsort(-size, kind="stable").tolist()
    return order[:k] + order[-k:]


def change_note(before: float, after: float, items: int, chance: float = 0.0) -> str:
    """What one domain's accuracies can say at all, or an empty string.

    A change of at most twice the sampling error sqrt(p (1 - p) / items) of the accuracy before is no detectable
    change; an accuracy within that error of 0 or of `chance` cannot drop.
    """
    error = 2 * math.sqrt(before * (1 - before) / items) if items > 0 else math.inf
    if before <= error or before <= chance + error:
        return "near 0 or chance before training: it cannot drop"
    return "no detectable change" if abs(after - before) <= error else ""
