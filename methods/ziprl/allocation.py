"""Dividing a budget of tokens among documents: when is giving the relevant ones more better than an equal share?

U(b) = sum_i r_i u(b_i), sum b_i = B, b_i >= 0, r_i >= 0, u(b) = log(1 + b). The paper's Theorem 4.1 is public in words
only; this is the checkable form:
    (i)  max U >= U(uniform), equal only if all r_i are equal; the maximiser is water-filling.
    (ii) if r_i u'(b_i) and b_i are ordered the same way, then U(b) >= U(uniform): concavity bounds the loss of b by
         sum_i g_i (B/n - b_i), g_i = r_i u'(b_i), and Chebyshev's sum inequality makes that <= 0.
    Being ordered as r is is not enough, and (ii) is not necessary.
"""

from __future__ import annotations

import numpy as np


def utility(r: np.ndarray, b: np.ndarray) -> float:
    """sum_i r_i log(1 + b_i)."""
    return float(np.dot(r, np.log1p(b)))


def water_filling(r: np.ndarray, budget: float) -> np.ndarray:
    """b_i = max(0, r_i / lam - 1) with lam set by the budget. ValueError for a negative r or budget, or no r.

    Degenerate: where all r are 0 every division is as good; the uniform one is given.
    """
    r = np.asarray(r, dtype=float)
    if r.size == 0 or (r < 0).any() or budget < 0:
        raise ValueError("water-filling needs relevances >= 0 and a budget >= 0")
    if not r.any():
        return np.full(r.size, budget / r.size)
    r = r / r.max()  # only ratios matter, and tiny numbers would divide to nothing
    ranked = np.sort(r)[::-1]
    lam = np.cumsum(ranked) / (budget + np.arange(1, r.size + 1))
    # The largest set of documents all of which get something: the water stands above each one's ground.
    served = int(np.flatnonzero(ranked >= lam).max())
    return np.maximum(0.0, r / lam[served] - 1)


def follows_margins(r: np.ndarray, b: np.ndarray) -> bool:
    """Condition (ii): (g_i - g_k)(b_i - b_k) >= 0 for all pairs, g_i = r_i / (1 + b_i)."""
    g = r / (1 + b)
    return bool((np.subtract.outer(g, g) * np.subtract.outer(b, b) >= -1e-12).all())
