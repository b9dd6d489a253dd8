"""Relevance of strategies to a question, the choice among them, and the slopes of the loss (sheet 3.3 and 3.4)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def candidate_probabilities(relevance_BM: Floats, temperature: float = 1.0) -> Floats:
    """p(m | q): the softmax of rho over the reached strategies (rho > 0); all zeros where none is reached."""
    reached_BM = relevance_BM > 0
    scaled_BM = np.where(reached_BM, relevance_BM / temperature, -np.inf)
    top_B = scaled_BM.max(axis=1, initial=-np.inf, keepdims=True)
    raised_BM = np.where(reached_BM, np.exp(scaled_BM - np.where(np.isfinite(top_B), top_B, 0.0)), 0.0)
    return raised_BM / np.maximum(raised_BM.sum(axis=1, keepdims=True), np.finfo(float).tiny)


def sampled_slope(p_BM: Floats, chosen_B: Ints, gap_B: Floats, temperature: float = 1.0) -> Floats:
    """dL/drho of L = - dR log p(k) for one sampled strategy k per question: - dR (1[l = k] - p_l) / tau."""
    slope_BM = p_BM * gap_B[:, None]
    slope_BM[np.arange(len(chosen_B)), chosen_B] -= gap_B
    return slope_BM / temperature


def expected_slope(p_BM: Floats, gap_BM: Floats, temperature: float = 1.0) -> Floats:
    """dL/drho of L = - sum_k p_k dR_k, the expectation of the above over k ~ p: - p_l (dR_l - sum_k p_k dR_k) / tau."""
    return -p_BM * (gap_BM - (p_BM * gap_BM).sum(axis=1, keepdims=True)) / temperature


def best(relevance_M: Floats, count: int) -> Ints:
    """The `count` most relevant strategies that are reached, best first; equal ones by their number."""
    order = np.argsort(-relevance_M, kind="stable")[:count]
    return order[relevance_M[order] > 0]


def nearest_of(similarity_BQ: Floats, count: int) -> tuple[Ints, Ints]:
    """Rows and columns, in this order, of the `count` largest positive entries of each row; of equal ones the first."""
    B, Q = similarity_BQ.shape
    if not B or not Q:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    top = torch.from_numpy(similarity_BQ).topk(min(count, Q), dim=1).values.numpy()
    enough_BQ = similarity_BQ >= np.maximum(top[:, -1:], np.nextafter(0, 1, dtype=similarity_BQ.dtype))
    row, column = np.divmod(np.flatnonzero(enough_BQ), Q)  # `nonzero` of two dimensions takes much longer
    order = np.lexsort((column, -similarity_BQ[row, column], row))
    row, column = row[order], column[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    row, column = row[rank < count], column[rank < count]
    order = np.lexsort((column, row))
    return row[order], column[order]


def unit(vectors: Floats) -> Floats:
    """Rows of length 1; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
