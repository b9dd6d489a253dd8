"""How far and in what manner training moved a policy: numbers of SRFT's analysis (arXiv 2506.19767, Fig. 2 and 3).

Token-distribution shift: fixed responses are read under a base and a tuned policy; token n has dp_n = p_new - p_base,
base entropy H_n (nats) and KL_n(base || new). Learning dynamics: a checkpoint is a point whose K coordinates are its
mean token cross-entropies on K reference sets; a training is a path of such points.

Differs from the paper: it prints neither its threshold for "changed" nor these summaries; thresholds, Gini,
straightness, turning cosines and the learning tax are defined here.

Shapes: N tokens, P checkpoints, K reference sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = (0.01, 0.1, 0.5)


def shift(
    dp_N: np.ndarray,
    entropy_N: np.ndarray,
    kl_N: np.ndarray,
    thresholds: Sequence[float] = THRESHOLDS,
    weight_N: np.ndarray | None = None,
) -> dict[str, float]:
    """The token-shift numbers of one pair of policies.

    `changed/<tau>`: share of tokens with |dp| > tau. `mean`: mean |dp|. `rose`: share with dp > 0. `gini`: see `gini`,
    of |dp|. `correlation`: Pearson's, of |dp| with base entropy. `kl`: mean KL(base || new) per token. `weight_N`
    counts a token several times or not at all (a bootstrap draw); default once each.

    Degenerate: without a token all are NaN; identical policies give 0 everywhere and no correlation (NaN).
    """
    dp, weight = np.asarray(dp_N, float), _weights(dp_N, weight_N)
    size, total = np.abs(dp), weight.sum()
    if total == 0:
        names = [*(f"changed/{tau:g}" for tau in thresholds), "mean", "rose", "gini", "correlation", "kl"]
        return dict.fromkeys(names, math.nan)
    values = {f"changed/{tau:g}": float(weight @ (size > tau) / total) for tau in thresholds}
    values |= {"mean": float(weight @ size / total), "rose": float(weight @ (dp > 0) / total)}
    values |= {"gini": gini(size, weight), "correlation": pearson(size, entropy_N, weight)}
    return values | {"kl": float(weight @ np.asarray(kl_N, float) / total)}


def gini(size_N: np.ndarray, weight_N: np.ndarray | None = None) -> float:
    """Gini coefficient of sizes s_1 <= ... <= s_n: sum (2i - n - 1) s_i / (n sum s_i); 0 = evenly spread, 1 = on one.

    A weight w repeats a size w times. Degenerate: NaN without a size, 0 where all are 0.
    """
    size, weight = np.asarray(size_N, float), _weights(size_N, weight_N)
    total, mass = weight.sum(), float(weight @ size)
    if total == 0:
        return math.nan
    if mass == 0:
        return 0.0
    order = np.argsort(size, kind="stable")
    size, weight = size[order], weight[order]
    upto = np.cumsum(weight)
    # The ranks i of the w copies of one size run from upto - w + 1 to upto: their sum of 2i - n - 1 in closed form.
    return float((weight * (2 * upto - weight - total)) @ size / (total * mass))


def pearson(x_N: np.ndarray, y_N: np.ndarray, weight_N: np.ndarray | None = None) -> float:
    """Weighted Pearson correlation. Degenerate: NaN where x or y is constant (or empty)."""
    x, y, weight = np.asarray(x_N, float), np.asarray(y_N, float), _weights(x_N, weight_N)
    x, y, weight = x[weight > 0], y[weight > 0], weight[weight > 0]
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    share = weight / weight.sum()
    x, y = x - share @ x, y - share @ y
    spread = math.sqrt((share @ x**2) * (share @ y**2))
    return float(np.clip(share @ (x * y) / spread, -1, 1)) if spread > 0 else math.nan


def _weights(values: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    return np.ones(len(values)) if weight is None else np.asarray(weight, float)


# ---------------------------------------------------------------- learning dynamics


@dataclass(frozen=True)
class Trajectory:
    """What a path of P points says: see `trajectory`."""

    distance: tuple[float, ...]  # of each point from the first one, P of them
    net: float
    path: float
    straightness: float
    turning: tuple[float, ...]  # P - 2
    tax: tuple[float, ...]  # P - 2: entry i takes point i + 1 for the end of the first stage


def trajectory(points_PK: np.ndarray) -> Trajectory:
    """Numbers of the path through the points, in their order.

    net = |x_P - x_1|; path = sum |x_{i+1} - x_i|; straightness = net / path; turning cosines = cosines of
    consecutive displacements; tax = `learning_tax` with each inner point as the end of the first stage and the last
    point as the end of the second.

    Degenerate: two points have no turning and no tax; a path of length 0 has no straightness (NaN), a displacement of
    length 0 no cosine (NaN). ValueError for fewer than two points.
    """
    x = np.asarray(points_PK, float)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"a trajectory needs at least two points (P, K), got shape {x.shape}")
    steps = np.diff(x, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    net, path = float(np.linalg.norm(x[-1] - x[0])), float(lengths.sum())
    cosines = (steps[:-1] * steps[1:]).sum(axis=1), lengths[:-1] * lengths[1:]
    turning = tuple(_ratio(float(top), float(bottom)) for top, bottom in zip(*cosines, strict=True))
    tax = tuple(learning_tax(x[0], inner, x[-1]) for inner in x[1:-1])
    distance = tuple(float(d) for d in np.linalg.norm(x - x[0], axis=1))
    return Trajectory(distance, net, path, _ratio(net, path), turning, tax)


def learning_tax(base_K: np.ndarray, first_K: np.ndarray, second_K: np.ndarray) -> float:
    """The share of the first stage's displacement that the second stage takes back: -(s . f) / |f|^2.

    f = first - base, s = second - first. 1 = all of it, 0 = none, negative = the second stage goes on in the same
    direction. Degenerate: NaN where the first stage moved nothing.
    """
    base, first, second = (np.asarray(point, float) for point in (base_K, first_K, second_K))
    moved = first - base
    return _ratio(-float((second - first) @ moved), float(moved @ moved))


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 else math.nan
