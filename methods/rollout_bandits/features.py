"""The context of a rollout: ten features by name, over all candidates at once.

Facts are raw values, one row per rollout and one column per name; a feature is a scaled fact. Candidates keep their
facts, so that scaling, switching features off and scoring are a few tensor operations whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Batch
from methods.numerics import group_stats

CLIP = (0.2, 0.2)  # a token counts as clipped where the ratio leaves [1 - low, 1 + high]


@dataclass(frozen=True)
class Scale:
    """What facts are measured against: the token budget, the vocabulary, the rounds that the buffer holds."""

    max_tokens: int
    vocab_size: int
    rounds: int


FEATURES: dict[str, Callable[[Tensor, Scale], Tensor]] = {
    "reward": lambda x, s: x,
    "advantage": lambda x, s: x.clamp(-3, 3) / 3,
    "group_mean": lambda x, s: x,
    "group_std": lambda x, s: 2 * x,
    "length": lambda x, s: x / s.max_tokens,
    "truncated": lambda x, s: x,
    "entropy": lambda x, s: x / math.log(s.vocab_size),
    "clip_ratio": lambda x, s: x,
    "age": lambda x, s: x / max(s.rounds - 1, 1),
    "usage": lambda x, s: x.clamp(max=s.rounds) / s.rounds,
}
COLUMN = {name: i for i, name in enumerate(FEATURES)}


def context(facts_NF: Tensor, scale: Scale, names: Sequence[str] = tuple(FEATURES)) -> Tensor:
    """(N, len(names)) features of (N, 10) facts; NaN becomes 0, an infinite value +1 or -1."""
    columns = [FEATURES[name](facts_NF[:, COLUMN[name]], scale) for name in names]
    return torch.nan_to_num(torch.stack(columns, dim=1), nan=0.0, posinf=1.0, neginf=-1.0)


def facts_of(batch: Batch, reward_N: Tensor) -> Tensor:
    """(N, 10) facts of fresh rollouts: no mismatch with the policy, no age, never used.

    reward_N is the verifiable reward (NaN: unknown). The advantage is the mean over a trajectory's model tokens.
    """
    group_N = torch.tensor([t.group_id for t in batch.trajs], dtype=torch.long)
    mean_N, _ = group_stats(reward_N, group_N)
    variance_N, _ = group_stats((reward_N - mean_N) ** 2, group_N)
    assert batch.entropies_ST is not None
    nothing_N = torch.zeros(len(reward_N))
    columns = {
        "reward": reward_N,
        "advantage": token_mean(batch.adv_ST, batch),
        "group_mean": mean_N,
        "group_std": variance_N.sqrt(),
        "length": token_sum(torch.ones_like(batch.adv_ST), batch),
        "truncated": torch.tensor([float(t.finish == "length") for t in batch.trajs]),
        "entropy": token_mean(batch.entropies_ST, batch),
    }
    return torch.stack([columns.get(name, nothing_N) for name in FEATURES], dim=1)


def clip_ratio(logps_ST: Tensor, stored_ST: Tensor, batch: Batch) -> Tensor:
    """(N,) share of a trajectory's model tokens with exp(logp - stored) outside [1 - low, 1 + high]; 0 if empty."""
    ratio_ST = torch.exp(logps_ST - stored_ST)
    low, high = CLIP
    return token_mean(((ratio_ST < 1 - low) | (ratio_ST > 1 + high)).float(), batch)


def token_sum(x_ST: Tensor, batch: Batch) -> Tensor:
    """(N,) sums over the model tokens of each trajectory, on the CPU."""
    mask_ST = batch.model_mask_ST
    per_row_S = torch.where(mask_ST.bool(), x_ST, 0.0).sum(1).float()
    total_N = torch.zeros(len(batch.trajs), device=per_row_S.device)
    return total_N.index_add(0, batch.traj_S, per_row_S).cpu()


def token_mean(x_ST: Tensor, batch: Batch) -> Tensor:
    """(N,) means over the model tokens of each trajectory, 0 for one without any, on the CPU."""
    return token_sum(x_ST, batch) / token_sum(torch.ones_like(x_ST), batch).clamp(min=1)
