"""Statistics for comparisons on the same seeds and items. Numpy only; every random number from a Generator.

Shapes: S seeds, I items, N differences. A matrix (S, I) holds one value per seed and item (samples of an item are
averaged first); NaN marks an item that a seed did not see. Intervals are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

LEVEL = 0.95
DRAWS = 4000
ROUNDING = 1e-13  # what rounding leaves of a difference between equal numbers is below
Array = Any  # anything that numpy turns into an array


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; `low` and `high` are NaN where no interval can be computed."""

    mean: float
    low: float
    high: float
    seeds: int = 0
    items: int = 0
    basis: str = ""  # what was resampled: "seeds", "items", "seeds and items", or "" (no interval)

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def _generator(rng: np.random.Generator | None) -> np.random.Generator:
    return np.random.default_rng(0) if rng is None else rng


# ---------------------------------------------------------------- intervals


def mean_interval(values: Array, level: float = LEVEL) -> Interval:
    """Student's t interval for the mean of one value per seed: mean +- t(n-1) * sd / sqrt(n).

    NaNs are left out. One value has no interval (NaN bounds), none has no mean.
    """
    from scipy import special

    x = np.asarray(values, float).ravel()
    x = x[~np.isnan(x)]
    n = len(x)
    if n < 2:
        return Interval(float(x[0]) if n else math.nan, math.nan, math.nan, seeds=n)
    half = special.stdtrit(n - 1, 0.5 + level / 2) * x.std(ddof=1) / math.sqrt(n)
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), seeds=n, basis="seeds")


def item_interval(
    scores: Array, items: Array, level: float = LEVEL, draws: int = DRAWS, rng: np.random.Generator | None = None
) -> Interval:
    """Mean score of one run with an interval clustered by item: items are resampled with all their samples.

    `scores` (N,) and `items` (N,) are parallel; samples of one item carry the same id. The mean is the mean of the
    item means. It says nothing about other training seeds.
    """
    scores, items = np.asarray(scores, float).ravel(), np.asarray(items).ravel()
    if len(scores) != len(items):
        raise ValueError(f"{len(scores)} scores but {len(items)} item ids")
    known = ~np.isnan(scores)
    _, index = np.unique(items[known], return_inverse=True)
    means = np.bincount(index, scores[known]) / np.bincount(index) if known.any() else np.zeros(0)
    return bootstrap(means[None, :], level, draws, rng)


def paired_bootstrap(
    a: Array, b: Array, level: float = LEVEL, draws: int = DRAWS, rng: np.random.Generator | None = None
) -> Interval:
    """Interval for the mean of a - b, both (S, I) on the same seeds and items (or (S,): one value per seed).

    Both arms keep the same resampled seeds and items, so that what they share cancels.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"the arms are not paired: shapes {a.shape} and {b.shape}")
    return bootstrap(a - b, level, draws, rng)


def bootstrap(
    values: Array, level: float = LEVEL, draws: int = DRAWS, rng: np.random.Generator | None = None
) -> Interval:
    """Percentile interval for the mean of `values` (S, I): seeds and items resampled with replacement, crossed.

    The estimate is the mean over seeds of each seed's mean over its items. With one seed only items are resampled,
    with one item only seeds, with one of each there is no interval. Resampling few seeds alone is too narrow (a plain
    percentile interval over 8 normal values covers 87 %, over 3 values 75 %), so each draw's deviation that is due to
    seeds is widened by t(n-1) / z * sqrt(n / (n-1)): 1.29 for 8 seeds, 2.69 for 3. With many noisy items per seed
    the interval is somewhat wide (crossed resampling counts the noise within cells more than once).
    """
    from scipy import special

    x = np.asarray(values, float)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2:
        raise ValueError(f"values have shape {x.shape}, expected (seeds, items) or (seeds,)")
    x = x[~np.isnan(x).all(axis=1)]
    x = x[:, ~np.isnan(x).all(axis=0)]
    seeds, items = x.shape
    if seeds == 0 or items == 0:
        return Interval(math.nan, math.nan, math.nan)
    known = ~np.isnan(x)
    weight = known / known.sum(axis=1, keepdims=True)
    total = np.where(known, x, 0.0) * weight
    mean = float(total.sum() / weight.sum())
    basis = " and ".join(name for name, size in (("seeds", seeds), ("items", items)) if size > 1)
    if not basis:
        return Interval(mean, math.nan, math.nan, seeds, items)
    rng = _generator(rng)
    wider = 0.0
    if seeds > 1:
        quantile = 0.5 + level / 2
        wider = special.stdtrit(seeds - 1, quantile) / special.ndtri(quantile) * math.sqrt(seeds / (seeds - 1)) - 1
    found = []
    for start in range(0, draws, 500):  # in pieces: draws x items counts may not fit into memory at once
        size = min(500, draws - start)
        by_seed, by_item = _counts(rng, size, seeds), _counts(rng, size, items)
        total_by_item, weight_by_item = by_seed @ total, by_seed @ weight
        bottom = (weight_by_item * by_item).sum(axis=1)
        drawn = (total_by_item * by_item).sum(axis=1) / np.where(bottom > 0, bottom, math.nan)
        due_to_seeds = total_by_item.sum(axis=1) / weight_by_item.sum(axis=1) - mean
        found.append((drawn + wider * due_to_seeds)[bottom > 0])
    low, high = np.quantile(np.concatenate(found), [0.5 - level / 2, 0.5 + level / 2])
    return Interval(mean, float(low), float(high), seeds, items, basis)


def cluster_bootstrap(
    statistic: Callable[[np.ndarray], Array],
    clusters: Array,
    level: float = LEVEL,
    draws: int = 1000,
    rng: np.random.Generator | None = None,
) -> list[Interval]:
    """Percentile intervals for any numbers that `statistic(weight_N)` gives, clusters resampled whole.

    `clusters` (N,) says to which cluster each unit belongs (a token to its response); `weight_N` is how often a draw
    holds the unit, all ones for the estimate. Draws in which a number is NaN do not count for it. With one cluster
    there is no interval.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    found = np.asarray(statistic(np.ones(len(index))), float)
    count = int(index.max()) + 1 if len(index) else 0
    if count < 2:
        return [Interval(float(x), math.nan, math.nan, items=count) for x in found]
    drawn = np.stack([np.asarray(statistic(c[index]), float) for c in _counts(_generator(rng), draws, count)])
    tails = [0.5 - level / 2, 0.5 + level / 2]
    known = [column[~np.isnan(column)] for column in drawn.T]
    ends = [np.quantile(column, tails) if len(column) else (math.nan, math.nan) for column in known]
    return [
        Interval(float(x), float(low), float(high), items=count, basis="items")
        for x, (low, high) in zip(found, ends, strict=True)
    ]


def clustered(
    value_N: Array, group_N: Array, cluster_N: Array, coefficient_MG: Array, level: float = LEVEL
) -> list[Interval]:
    """Student's t intervals for M weighted sums of group means, value_N not independent within a cluster.

    estimate_m = sum_g c_mg mean_g;  SE_m^2 = C/(C-1) sum_k (sum_{i in k} c_mg(i) (x_i - mean_g(i)) / n_g(i))^2, k
    over the C clusters with a value in a group of m, C-1 degrees of freedom. For one group this is the usual clustered
    standard error of a mean. group_N holds 0..G-1; a group without values makes its sums NaN; one cluster: no interval.
    """
    from scipy import special

    x, g, c = np.asarray(value_N, float), np.asarray(group_N), np.asarray(coefficient_MG, float)
    _, k = np.unique(np.asarray(cluster_N), return_inverse=True)
    groups, clusters = c.shape[1], int(k.max()) + 1 if len(k) else 0
    size = np.bincount(g, minlength=groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(g, weights=x, minlength=groups) / size
    used = c != 0
    estimate = np.where(used, c * mean, 0.0).sum(axis=1)
    cells = k * groups + g
    residual = np.bincount(cells, weights=(x - mean[g]) / size[g], minlength=clusters * groups).reshape(-1, groups)
    present = (np.bincount(cells, minlength=clusters * groups).reshape(-1, groups) > 0).astype(float)
    count = ((present @ used.T.astype(float)) > 0).sum(axis=0)
    squares = ((residual @ c.T) ** 2).sum(axis=0)
    squares[squares < 1e-24] = 0.0  # rounding, where all values of a group are equal
    found = []
    for m, n, square in zip(estimate, count, squares, strict=True):
        if n < 2 or math.isnan(m):
            found.append(Interval(float(m), math.nan, math.nan, items=int(n)))
            continue
        half = special.stdtrit(n - 1, 0.5 + level / 2) * math.sqrt(n / (n - 1) * square)
        found.append(Interval(float(m), float(m - half), float(m + half), items=int(n), basis="items"))
    return found


def _counts(rng: np.random.Generator, draws: int, n: int) -> np.ndarray:
    """How often each of n units is drawn in each of `draws` resamples: (draws, n), rows sum to n."""
    picked = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * n).reshape(draws, n).astype(float)


# ---------------------------------------------------------------- tests


def sign_flip(
    differences: Array, exact_up_to: int = 16, draws: int = 100_000, rng: np.random.Generator | None = None
) -> float:
    """Two-sided sign-flip permutation p value of the mean of paired differences (N,), one per seed.

    Under the null hypothesis each difference is as likely with the other sign. Up to `exact_up_to` differences all
    2^N sign patterns are counted (so p >= 2 / 2^N: five seeds cannot get below .0625); beyond, p = (1 + hits) /
    (1 + draws). NaNs are left out; NaN if nothing is left. What rounding leaves of equal numbers counts as 0.
    """
    d = np.asarray(differences, float).ravel()
    d = d[~np.isnan(d)]
    d[np.abs(d) < ROUNDING] = 0.0
    n = len(d)
    if n == 0:
        return math.nan
    # Sums in another order differ in the last digits; patterns that tie exactly must count as ties.
    bound = abs(d.sum()) - 1e-9 * np.abs(d).sum()
    if n <= exact_up_to:
        signs = 1 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ d) >= bound).mean())
    rng = _generator(rng)
    hits = 0
    for start in range(0, draws, 10_000):
        signs = 1 - 2.0 * rng.integers(2, size=(min(10_000, draws - start), n))
        hits += int((np.abs(signs @ d) >= bound).sum())
    return (1 + hits) / (1 + draws)


def smallest_p(n: int) -> float:
    """The smallest p value that `sign_flip` can return for n pairs, 2 / 2^n."""
    return min(1.0, 2.0 / 2.0**n)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p values, in the order given: max over j <= i of (m - j + 1) p_(j), at most 1.

    NaNs (tests that could not be made) stay NaN and do not count towards m.
    """
    p = np.asarray(p_values, float)
    adjusted = np.full(p.shape, math.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * (len(order) - np.arange(len(order)))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted


# ---------------------------------------------------------------- power


def power(effect: float, sd: float, n: int, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t test for a true mean difference `effect`, sd of differences `sd`, n pairs.

    With c = t(1 - alpha/2; n-1) and d = effect sqrt(n) / sd: P(T > c) + P(T < -c), T noncentral t(n-1, d), which is
    the mean of Phi(d - c s) + Phi(-d - c s) over s = sqrt(chi2(n-1) / (n-1)) (scipy's nct is NaN in the tails).
    """
    from scipy import special

    if n < 2 or math.isnan(effect) or math.isnan(sd):
        return math.nan
    if sd == 0:
        return 1.0 if effect else alpha
    d = abs(effect) * math.sqrt(n) / sd
    s = _chi_grid(n - 1)
    c = special.stdtrit(n - 1, 1 - alpha / 2)
    return float((special.ndtr(d - c * s) + special.ndtr(-d - c * s)).mean())


@lru_cache
def _chi_grid(df: int) -> np.ndarray:
    """2000 equally likely values of sqrt(chi2(df) / df)."""
    from scipy import special

    return np.sqrt(special.chdtri(df, (np.arange(2000) + 0.5) / 2000) / df)


def detectable(sd: float, n: int, target: float = 0.8, alpha: float = 0.05) -> float:
    """Minimum detectable effect: the mean difference that n pairs see with power `target` (see `power`).

    Close to (t(1 - alpha/2) + t(target)) sd / sqrt(n), both with n - 1 degrees. NaN below two pairs; 0 if sd is 0.
    """
    if n < 2 or math.isnan(sd):
        return math.nan
    if sd == 0:
        return 0.0
    low, high = 0.0, 1.0
    while power(high, 1.0, n, alpha) < target:
        low, high = high, high * 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, 1.0, n, alpha) < target else (low, middle)
    return sd * high


def seeds_needed(effect: float, sd: float, target: float = 0.8, alpha: float = 0.05, most: int = 10_000) -> float:
    """Fewest pairs that see `effect` with power `target` (see `power`); inf beyond `most`, NaN if unknown."""
    if math.isnan(effect) or math.isnan(sd):
        return math.nan
    low, high = 1, 2
    while power(effect, sd, high, alpha) < target:
        low, high = high, high * 2
        if high > most:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, sd, middle, alpha) >= target else (middle, high)
    return high


# ---------------------------------------------------------------- scores and curves


def pass_at_k(n: Array, c: Array, k: int) -> np.ndarray:
    """Unbiased estimate of P(at least one of k samples is right) from c right ones among n: 1 - C(n-c, k) / C(n, k).

    `n` and `c` broadcast. ValueError if k < 1, k > n, or c is not in 0..n.
    """
    n, c = np.broadcast_arrays(np.asarray(n, int), np.asarray(c, int))
    if k < 1 or (k > n).any():
        raise ValueError(f"pass@{k} needs 1 <= k <= samples, got {n.min() if n.size else 'no'} samples")
    if (c < 0).any() or (c > n).any():
        raise ValueError("the number of right samples must lie between 0 and the number of samples")
    drawn = np.arange(k)
    factors = np.clip((n - c)[..., None] - drawn, 0, None) / (n[..., None] - drawn)
    return 1.0 - factors.prod(axis=-1)


def point_weights(x: Array, at: float) -> np.ndarray:
    """Weights w (T,) with w @ y = the curve (x, y) at `at`, linear between points, flat beyond the ends."""
    x = np.asarray(x, float)
    at = float(np.clip(at, x[0], x[-1]))
    right = min(int(np.searchsorted(x, at, side="left")), len(x) - 1)
    left = max(right - 1, 0)
    weights = np.zeros(len(x))
    gap = x[right] - x[left]
    share = (at - x[left]) / gap if gap > 0 else 1.0
    weights[left] += 1 - share
    weights[right] += share
    return weights


def area_weights(x: Array, upto: float | None = None, start: float | None = None) -> np.ndarray:
    """Weights w (T,) with w @ y = the mean height of the curve (x, y) from `start` to `upto` (default: its ends).

    That is the trapezoid area divided by the range, in units of y. A range of no length gives the value there.
    """
    x = np.asarray(x, float)
    low = float(np.clip(x[0] if start is None else start, x[0], x[-1]))
    high = float(np.clip(x[-1] if upto is None else upto, x[0], x[-1]))
    if high <= low:
        return point_weights(x, high)
    return (_integral_weights(x, high) - _integral_weights(x, low)) / (high - low)


def _integral_weights(x: np.ndarray, end: float) -> np.ndarray:
    inside = x < end
    widths = np.diff(np.append(x[inside], end))
    weights = np.zeros(len(x))
    weights[inside] = (widths + np.append(0, widths[:-1])) / 2 if len(widths) else 0.0
    return weights + (widths[-1] / 2 if len(widths) else 0.0) * point_weights(x, end)


def area(x: Array, y: Array, upto: float | None = None) -> np.ndarray:
    """Area under curves y (..., T) over x (T,), divided by the range of x: see `area_weights`."""
    return np.asarray(y, float) @ area_weights(x, upto)
