"""REINFORCE++: global normalisation of token returns, no critic, no group (arXiv 2501.03262)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Context
from methods.errors import check_range
from methods.numerics import trajectory_returns
from methods.objectives.base import mean_over_tokens
from methods.objectives.credit import rewards_on_tokens, whiten
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("objective.gamma", self.gamma, 0.0, 1.0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logps", "ref_logps"}) if self.beta else frozenset()

    def advantages(self, ctx: Context) -> Tensor:
        batch = ctx.batch
        assert batch is not None
        rewards_ST, valid_ST = rewards_on_tokens(ctx, self.beta)
        return whiten(trajectory_returns(rewards_ST, batch.model_mask_ST, batch.traj_S, self.gamma), valid_ST, ctx)

    def loss(self, lctx):
        # The KL already sits in the reward; adding it to the loss again would count it twice.
        ratio = torch.exp(self.log_ratio(lctx))
        return mean_over_tokens(self.token_loss(ratio, lctx), lctx)
