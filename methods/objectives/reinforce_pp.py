"""REINFORCE++: global normalisation of token returns, no critic, no group (arXiv 2501.03262)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Context
from methods.numerics import trajectory_returns
from methods.objectives.base import mean_over_tokens
from methods.objectives.policy_gradient import Grpo


@dataclass
class ReinforcePP(Grpo):
    """REINFORCE++: returns of token rewards, whitened over every valid token of the global batch.

    rho_t = token reward - beta (log pi_old - log pi_ref)      (k1 KL inside the reward)
    G_t = rho_t + gamma G_{t+1},  A_t = (G_t - mean) / sqrt(var + 1e-8), Bessel-corrected var, no group baseline.
    Without token rewards the trajectory's reward sits on its last model token. The loss is the clipped one with
    a mean over all tokens.

    Differs from the paper: one rollout per prompt would do; TRL needs at least two, they count as independent.
    Degenerate: all returns equal gives advantage 0 everywhere; an unscorable trajectory gets 0.
    """

    gamma: float = 1.0
    scale_rewards: str = "none"
    name = "reinforce_pp"
    group_baseline = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logps", "ref_logps"}) if self.beta else frozenset()

    def advantages(self, ctx: Context) -> Tensor:
        batch = ctx.batch
        assert batch is not None
        mask_ST = batch.model_mask_ST
        rewards_ST = ctx.token_rewards_ST
        scorable_S = torch.ones(batch.rows, dtype=torch.bool, device=mask_ST.device)
        if rewards_ST is None:
            total_N = ctx.total_reward().to(mask_ST.device)
            scorable_S = ~torch.isnan(total_N)[batch.traj_S]
            rewards_ST = place_on_last_token(torch.nan_to_num(total_N), batch)
        if self.beta:
            assert batch.old_logps_ST is not None and batch.ref_logps_ST is not None
            rewards_ST = rewards_ST - self.beta * (batch.old_logps_ST - batch.ref_logps_ST) * mask_ST
        unknown_ST = torch.isnan(rewards_ST)
        rewards_ST = torch.where(unknown_ST, 0.0, rewards_ST)
        returns_ST = trajectory_returns(rewards_ST, mask_ST, batch.traj_S, self.gamma)
        valid_ST = mask_ST.bool() & scorable_S.unsqueeze(1) & ~unknown_ST.any(1, keepdim=True)
        return whiten(returns_ST, valid_ST, ctx)

    def loss(self, lctx):
        # The KL already sits in the reward; adding it to the loss again would count it twice.
        ratio = torch.exp(self.log_ratio(lctx))
        return mean_over_tokens(self.token_loss(ratio, lctx), lctx)


def place_on_last_token(total_N: Tensor, batch) -> Tensor:
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
    """(x - mean) / sqrt(var + 1e-8) over the valid tokens of all processes; 0 elsewhere."""
    values = x_ST[valid_ST].double()
    sums = torch.stack([values.sum(), (values**2).sum(), values.new_tensor(float(values.numel()))])
    total, square, count = ctx.gather(sums.unsqueeze(0)).sum(0).tolist()
    if count < 2:
        return torch.zeros_like(x_ST)
    mean = total / count
    variance = max(square / count - mean**2, 0.0) * count / (count - 1)
    return torch.where(valid_ST, (x_ST - mean) / (variance + 1e-8) ** 0.5, torch.zeros_like(x_ST))
