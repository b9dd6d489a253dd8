"""Sampling by inversion: a token is where the cumulative distribution passes a number drawn beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(B, count) numbers in [0, 1): each row from its own seed, so that it does not depend on its neighbours."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def pick(scores_BV: Tensor, uniform_B1: Tensor | None, temperature: float, top_p: float = 1.0) -> Tensor:
    """(B, 1) next tokens; the likeliest ones for temperature 0, where no numbers are needed."""
    if temperature == 0:
        return scores_BV.argmax(-1, keepdim=True)
    assert uniform_B1 is not None
    probs_BV = (scores_BV / temperature).softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        # A token stays if the mass before it is below top_p: the smallest set that reaches top_p.
        cut_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        cut_BV[:, 0] = False
        probs_BV = probs_BV.masked_fill(torch.zeros_like(cut_BV).scatter(1, order_BV, cut_BV), 0.0)
    cumulative_BV = probs_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # Rounding must not reach the total: beyond it there is no token.
    target_B1 = torch.minimum(uniform_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, target_B1, right=True)
