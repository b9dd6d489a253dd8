"""Rubrics as rewards in reinforcement learning. An extension: the paper has no such step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ALPHA = 0.2  # share of the principles


def pointwise(hard: Sequence[float], principles: Sequence[float], alpha: float = ALPHA) -> float:
    """r = (1 - alpha) mean of the hard rules' values + alpha mean of the principles' grades, all in [0, 1].

    Degenerate: a rubric without principles is its hard rules alone.
    """
    if not len(principles):
        return float(np.mean(hard))
    return float((1 - alpha) * np.mean(hard) + alpha * np.mean(principles))


def tournament(W_GG: np.ndarray) -> np.ndarray:
    """r_i = mean over j other than i of W_ij in {0, 1/2, 1}, the credit of i against j over both orders: (G,).

    Takes G (G - 1) judge calls. The diagonal is not read. Degenerate: a single answer gets 1/2.
    """
    W_GG = np.asarray(W_GG, float)
    G = len(W_GG)
    if G < 2:
        return np.full(G, 0.5)
    return (W_GG.sum(axis=1) - np.diag(W_GG)) / (G - 1)
