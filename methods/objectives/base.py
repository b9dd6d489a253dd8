"""The contract of an objective and the group-relative advantage that most of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Context, LossContext
from methods.errors import ConfigError, check_range
from methods.numerics import STD_EPS, group_stats, nanstd


@dataclass
class Objective:
    """Creates advantages and computes the loss.

    Class attributes: `ratio_level` (token | sequence), `clips` (it has a clip range), `group_baseline`,
    `needs` (old_logps, ref_logps ...), `methods` (it serves only a stack with these; empty: any stack), `frozen` (the
    policy stays as it is). `beta` is the weight of the KL to the start model (k3 estimator times the
    ratio, TRL's default form); 0 loads no reference model.
    """

    beta: float = 0.0
    scale_rewards: str = "group"  # group | batch | none

    name = ""
    trainer = "grpo"
    ratio_level = "token"
    clips = False
    group_baseline = True
    dynamic_sampling = False
    methods: ClassVar[tuple[str, ...]] = ()
    frozen = False
    modules_learning_rate = None  # of `modules`; None = the policy's

    def __post_init__(self) -> None:
        if self.scale_rewards not in ("group", "batch", "none"):
            raise ConfigError(
                "unknown reward scaling",
                where="objective.scale_rewards",
                got=self.scale_rewards,
                expected="group, batch or none",
            )
        check_range("objective.beta", self.beta, 0.0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logps"}) if self.beta else frozenset()

    def advantages(self, ctx: Context) -> Tensor:
        """(S, T): the trajectory's group-relative advantage on each of its model tokens."""
        batch = ctx.batch
        assert batch is not None
        adv_N = self.group_advantages(ctx)
        return adv_N.to(batch.adv_ST.device)[batch.traj_S].unsqueeze(1) * batch.model_mask_ST

    def trajectory_reward(self, ctx: Context) -> Tensor:
        """(N,) weighted sum of the named rewards; the sum of the token rewards where a method supplies them."""
        if ctx.token_rewards_ST is None:
            return ctx.total_reward()
        batch = ctx.batch
        assert batch is not None
        per_row_S = (ctx.token_rewards_ST * batch.model_mask_ST).sum(1)
        total_N = torch.zeros(len(ctx.trajs), dtype=per_row_S.dtype, device=per_row_S.device)
        return total_N.index_add(0, batch.traj_S, per_row_S).cpu()

    def group_advantages(self, ctx: Context) -> Tensor:
        """(N,) `(r - mean of the group) / (std + 1e-4)`; 0 for an unscorable trajectory or a group without spread.

        scale_rewards: `group` divides by the Bessel std of the group, `batch` by that of all processes' rewards,
        `none` does not divide (Dr. GRPO).
        """
        reward_N = self.trajectory_reward(ctx)
        mean_N, std_N = group_stats(reward_N, ctx.group_N)
        if self.scale_rewards == "batch":
            std_N = nanstd(ctx.gather(reward_N)).expand_as(reward_N)
        adv_N = reward_N - mean_N
        if self.scale_rewards != "none":
            adv_N = adv_N / (std_N + STD_EPS)
        return torch.nan_to_num(adv_N, nan=0.0)

    def loss(self, lctx: LossContext) -> Tensor:
        raise AssertionError("an objective computes its loss")

    def modules(self, policy: nn.Module) -> dict[str, nn.Module]:
        """Own trained modules (a critic), optimised and saved with the policy, which they may start from."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def kl_to_start(ratio: Tensor, lctx: LossContext) -> Tensor:
    """(B, T) KL to the start model per token: k3 estimator, times the ratio (unbiased off policy)."""
    assert lctx.ref_logps_BT is not None
    # The gap is formed twice on purpose: as in TRL, so that the gradients are summed in the same order.
    kl_BT = torch.exp(lctx.ref_logps_BT - lctx.logps_BT) - (lctx.ref_logps_BT - lctx.logps_BT) - 1
    kl_BT = kl_BT * ratio
    lctx.log("kl", (kl_BT.detach() * lctx.mask_BT).sum() / lctx.mask_BT.sum().clamp(min=1.0))
    return kl_BT


def mean_over_rows(loss: Tensor, lctx: LossContext) -> Tensor:
    """Mean over the tokens of each row, then (weighted) mean over rows: GRPO's aggregation."""
    mask_BT = lctx.mask_BT
    row_B = (loss * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1.0)
    mean = row_B.mean() if lctx.row_weight_B is None else (row_B * lctx.row_weight_B).sum()
    return mean / lctx.accumulation


def mean_over_tokens(loss: Tensor, lctx: LossContext) -> Tensor:
    """Mean over all trained tokens of the accumulation window, over all processes: DAPO's aggregation."""
    return (loss * lctx.mask_BT).sum() / lctx.denominator_tokens
