"""Choosing by scores: the best of all candidates, the best of each group, and fixed rules to compare with."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from methods.rollout_bandits.features import COLUMN

POLICIES = ("scheduler", "random", "advantage", "no_truncated")


def best(scores_N: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the `count` highest scores (all if there are fewer); equal ones: lower index first."""
    return torch.argsort(scores_N, descending=True, stable=True)[:count].sort().values


def best_of_groups(scores_N: Tensor, group_N: Tensor, share: float) -> Tensor:
    """Indices, ascending, of the best max(1, ceil(share x size)) of each group; a score of -inf is never chosen."""
    by_score = torch.argsort(scores_N, descending=True, stable=True)
    order = by_score[torch.argsort(group_N[by_score], stable=True)]
    _, sizes = torch.unique_consecutive(group_N[order], return_counts=True)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(order)) - torch.repeat_interleave(starts, sizes)
    # Without the small step back .7 x 10 would round up to 8.
    allowed = torch.ceil(share * sizes.double() - 1e-9).clamp(min=1)
    kept = order[rank < torch.repeat_interleave(allowed, sizes)]
    return kept[scores_N[kept] > -math.inf].sort().values


def fixed_rule(policy: str, facts_NF: Tensor, rng: np.random.Generator) -> Tensor:
    """(N,) scores without learning: `random`, |`advantage`|, `no_truncated` (truncated ones last)."""
    if policy == "advantage":
        return torch.nan_to_num(facts_NF[:, COLUMN["advantage"]]).abs()
    random_N = torch.from_numpy(rng.random(len(facts_NF))).float()
    return random_N - 2 * facts_NF[:, COLUMN["truncated"]] if policy == "no_truncated" else random_N
