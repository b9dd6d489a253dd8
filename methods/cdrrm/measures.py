"""What is measured of a filter and of a judge: purity, position and length bias, discernment.

The formulas are our choice; the paper's own evidence for less bias is accuracy on RM-Bench's hard split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NAN = float("nan")
RIDGE = 0.01  # on the slopes of the regression


def filter_purity(p: float, a: float, b: float, passes: int = 1) -> tuple[float, float]:
    """(purity, kept share) behind `passes` independent passes of the preference-consistency filter.

    A share p of the rubrics is good; a good one reproduces the label with chance a, a bad one with b:
    kept = p a^m + (1 - p) b^m, purity = p a^m / kept. b is at least what the judge gets right without a rubric, so the
    filter cannot see a rubric that is merely useless on an easy pair. Degenerate: nothing kept gives purity NaN.
    """
    good, bad = p * a**passes, (1 - p) * b**passes
    kept = good + bad
    return (good / kept if kept > 0 else NAN), kept


def position_metrics(chosen_first: Sequence[int | None], chosen_second: Sequence[int | None]) -> dict[str, float]:
    """Bias by slot from verdicts on the same pairs in both orders; a verdict is a slot (0 = A, 1 = B) or None.

    acc (mean of both orders, unparsable is wrong), consistency (both parse and name the same answer),
    acc_consistent (both right), first_bias = share of slot A among parsed verdicts - 1/2. NaN without pairs.
    """
    first = np.array([NAN if v is None else v for v in chosen_first], float)
    second = np.array([NAN if v is None else v for v in chosen_second], float)
    if not len(first):
        return dict.fromkeys(("acc", "consistency", "acc_consistent", "first_bias"), NAN)
    right = first == 0, second == 1
    said = np.concatenate([first, second])
    said = said[~np.isnan(said)]
    return {
        "acc": float((right[0].mean() + right[1].mean()) / 2),
        "consistency": float(np.mean(first == 1 - second)),
        "acc_consistent": float(np.mean(right[0] & right[1])),
        "first_bias": float((said == 0).mean()) - 0.5 if len(said) else NAN,
    }


def verbosity_metrics(
    correct: Sequence[float], len_chosen: Sequence[float], len_rejected: Sequence[float]
) -> dict[str, float]:
    """Bias by length; equal lengths are left out, and a side without pairs is NaN.

    longer_bias = P(judge picks the longer) - P(gold is the longer); gap = accuracy where the chosen is longer minus
    accuracy where it is shorter.
    """
    right, c, r = (np.asarray(x, float) for x in (correct, len_chosen, len_rejected))
    right, gold_longer = right[c != r], (c > r)[c != r]
    if not len(right):
        return dict.fromkeys(("pick_longer", "gold_longer", "longer_bias", "acc_long", "acc_short", "gap"), NAN)
    picks = np.where(gold_longer, right, 1 - right)
    long = float(right[gold_longer].mean()) if gold_longer.any() else NAN
    short = float(right[~gold_longer].mean()) if (~gold_longer).any() else NAN
    return {
        "pick_longer": float(picks.mean()),
        "gold_longer": float(gold_longer.mean()),
        "longer_bias": float(picks.mean() - gold_longer.mean()),
        "acc_long": long,
        "acc_short": short,
        "gap": long - short,
    }


def bias_regression(
    pick_a: Sequence[int], gold_a: Sequence[int], len_a: Sequence[float], len_b: Sequence[float], ridge: float = RIDGE
) -> tuple[float, float, float]:
    """(b0, b_gold, b_len) of logit P(pick A) = b0 + b_gold g + b_len log(len_A / len_B), g = +1 if A is right, else -1.

    b0 is position bias, b_gold discernment, b_len verbosity bias; ridge/2 times the squared slopes is added to the
    negative log-likelihood. Pairs with an empty answer are left out. Degenerate: NaN for all three where the judge
    always names one slot (b0 has no maximum).
    """
    y, gold, a, b = (np.asarray(x, float) for x in (pick_a, gold_a, len_a, len_b))
    use = (a > 0) & (b > 0)
    y, gold, a, b = y[use], gold[use], a[use], b[use]
    if not len(y) or y.min() == y.max():
        return NAN, NAN, NAN
    X = np.stack([np.ones(len(y)), 2 * gold - 1, np.log(a / b)], axis=1)
    R = np.diag([0.0, ridge, ridge])

    def objective(w: np.ndarray) -> float:
        z = X @ w
        return float(np.logaddexp(0, z).sum() - y @ z + w @ R @ w / 2)

    w = np.zeros(3)
    for _ in range(200):
        p = 1 / (1 + np.exp(-np.clip(X @ w, -500, 500)))
        gradient = X.T @ (p - y) + R @ w
        step = np.linalg.lstsq(X.T @ (X * (p * (1 - p))[:, None]) + R, gradient, rcond=None)[0]
        size = 1.0
        while size > 1e-8 and objective(w - size * step) > objective(w):  # a full Newton step can overshoot
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return float(w[0]), float(w[1]), float(w[2])
