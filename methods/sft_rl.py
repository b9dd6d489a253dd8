"""Naive SFT + RL: the plain sum of both losses, the baseline that SRFT is compared with (arXiv 2506.19767)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from methods.base import Batch, Context, LossContext, Trajectory
from methods.demonstrations import Demonstrations, tokens_of


@dataclass
class SftRl(Demonstrations):
    """Naive SFT + RL: `L_SFT + L_GRPO`, without weights.

    L_SFT = sum -log pi / N_demo over the tokens of the demonstrations, in the last slots of each group; L_GRPO is the
    objective's loss over the rollouts alone, whose group statistics do not see the demonstrations.

    Differs from the paper: it names this baseline without an equation; the coefficients 1 and 1 are our reading.
    Degenerate: a generation without demonstrations has L_SFT = 0.
    """

    name = "sft_rl"

    def rewards(self, trajs: list[Trajectory], ctx: Context) -> None:
        """Takes the demonstrations out of the rewards, and with that out of the groups' statistics."""
        for t in trajs:
            if t.is_demo:
                t.rewards = dict.fromkeys(t.rewards, math.nan)

    def select(self, batch: Batch, ctx: Context) -> Batch:
        batch = super().select(batch, ctx)
        demo_S = batch.extras["demo"]
        batch.extras["demo_tokens"] = tokens_of(batch, demo_S, ctx)
        batch.row_weight_S = 1 - demo_S  # the objective's mean goes over the rollouts
        return batch

    def extra_loss(self, lctx: LossContext) -> Tensor:
        tokens = lctx.extras["demo_tokens"][0].clamp(min=1)
        mask_BT = lctx.mask_BT * lctx.extras["demo"].unsqueeze(1)
        nll = -(lctx.logps_BT * mask_BT).sum() / tokens
        lctx.log("sft_rl/demo_nll", nll.detach())
        # A sum over this chunk of one micro-batch; the layer takes the term for a mean and scales it down as one.
        return nll * (lctx.updates * lctx.accumulation / lctx.share)
