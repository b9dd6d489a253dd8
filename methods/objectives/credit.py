"""Rewards on tokens, and what objectives without a group baseline make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import Batch, Context


def rewards_on_tokens(ctx: Context, beta: float = 0.0) -> tuple[Tensor, Tensor]:
    """(S, T) rewards of tokens, and the (S, T) mask of the tokens whose trajectory can be scored.

    A method's token rewards; without any, the trajectory's reward on its last model token. With `beta` each token
    pays `beta (log pi_old - log pi_ref)`, the k1 estimate of the KL to the start model. A row with a NaN among its
    token rewards, or of a trajectory without a reward, is not scorable and gets zeros.
    """
    batch = ctx.batch
    assert batch is not None
    mask_ST, rewards_ST = batch.model_mask_ST, ctx.token_rewards_ST
    scorable_S = torch.ones(batch.rows, dtype=torch.bool, device=mask_ST.device)
    if rewards_ST is None:
        total_N = ctx.total_reward().to(mask_ST.device)
        scorable_S = ~torch.isnan(total_N)[batch.traj_S]
        rewards_ST = place_on_last_token(torch.nan_to_num(total_N), batch)
    if beta:
        assert batch.old_logps_ST is not None and batch.ref_logps_ST is not None
        rewards_ST = rewards_ST - beta * (batch.old_logps_ST - batch.ref_logps_ST) * mask_ST
    unknown_ST = torch.isnan(rewards_ST)
    valid_ST = mask_ST.bool() & scorable_S.unsqueeze(1) & ~unknown_ST.any(1, keepdim=True)
    return torch.where(unknown_ST, 0.0, rewards_ST), valid_ST


def place_on_last_token(total_N: Tensor, batch: Batch) -> Tensor:
    """(S, T) zeros with each trajectory's scalar on the last model token of its last row."""
    rewards_ST = torch.zeros_like(batch.adv_ST)
    rows = torch.arange(batch.rows, device=rewards_ST.device)
    last_row_of = torch.full((len(batch.trajs),), -1, dtype=torch.long, device=rewards_ST.device)
    last_row_of.scatter_reduce_(0, batch.traj_S, rows, reduce="amax")
    width = batch.model_mask_ST.shape[1]
    positions = torch.arange(1, width + 1, device=rewards_ST.device) * batch.model_mask_ST
    last_token_S = (positions.argmax(1)).clamp(min=0)
    rewards_ST[last_row_of, last_token_S[last_row_of]] = total_N.to(rewards_ST.dtype)
    return rewards_ST * batch.model_mask_ST


def whiten(x_ST: Tensor, valid_ST: Tensor, ctx: Context) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the valid tokens of all processes, Bessel-corrected var; 0 elsewhere."""
    values = x_ST[valid_ST].double()
    sums = torch.stack([values.sum(), (values**2).sum(), values.new_tensor(float(values.numel()))])
    total, square, count = ctx.gather(sums.unsqueeze(0)).sum(0).tolist()
    if count < 2:
        return torch.zeros_like(x_ST)
    mean = total / count
    variance = max(square / count - mean**2, 0.0) * count / (count - 1)
    return torch.where(valid_ST, (x_ST - mean) / (variance + 1e-8) ** 0.5, torch.zeros_like(x_ST))
