"""The clipped policy-gradient family: grpo, dr_grpo, bnpo, dapo, cispo, gspo, gspo_token, sapo.

A member is a ratio (token, sequence, or GSPO-token), a per-token loss (clip, CISPO, SAPO gate) and an
aggregation. With `r = pi / pi_old`, `A` the token advantage:

    clip:   -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
    CISPO:  -sg(min(r, eps_high)) A log pi                                  arXiv 2506.13585
    SAPO:   -sigmoid(tau (r - 1)) 4 / tau A, tau by the sign of A           arXiv 2511.20347

The off-policy part only acts when a generation serves several updates; else r = 1 and all members differ in
their aggregation alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from methods.base import LossContext
from methods.errors import check_range
from methods.objectives.base import Objective, kl_to_start, mean_over_rows, mean_over_tokens


@dataclass
class PolicyGradient(Objective):
    """A ratio, a per-token loss and an aggregation; the last two are what members choose."""

    clips = False

    def log_ratio(self, lctx: LossContext) -> Tensor:
        """(B, T) or (B, 1) log of the importance ratio."""
        return lctx.logps_BT - lctx.old_logps_BT

    def token_loss(self, ratio: Tensor, lctx: LossContext) -> Tensor:
        raise AssertionError("a member of the family defines its per-token loss")

    def aggregate(self, loss: Tensor, lctx: LossContext) -> Tensor:
        return mean_over_rows(loss, lctx)

    def loss(self, lctx: LossContext) -> Tensor:
        ratio = torch.exp(self.log_ratio(lctx))
        kl = kl_to_start(ratio, lctx) if self.beta else None
        loss = self.token_loss(ratio, lctx)
        return self.aggregate(loss if kl is None else loss + self.beta * kl, lctx)


@dataclass
class Grpo(PolicyGradient):
    """GRPO: token ratio, clip, mean over tokens of a row then over rows (arXiv 2402.03300)."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2

    name = "grpo"
    clips = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("objective.epsilon_low", self.epsilon_low, 0.0)
        check_range("objective.epsilon_high", self.epsilon_high, 0.0)

    def token_loss(self, ratio: Tensor, lctx: LossContext) -> Tensor:
        low: Any
        high: Any
        low, high = lctx.clip_range or (self.epsilon_low, self.epsilon_high)
        if isinstance(low, Tensor) or isinstance(high, Tensor):  # clamp takes two numbers or two tensors
            low, high = (torch.as_tensor(x, dtype=ratio.dtype, device=ratio.device) for x in (low, high))
        clipped = torch.clamp(ratio, 1 - low, 1 + high)
        self._log_clipping(ratio, low, high, lctx)
        return -torch.min(ratio * lctx.adv_BT, clipped * lctx.adv_BT)

    def _log_clipping(self, ratio: Tensor, low, high, lctx: LossContext) -> None:
        with torch.no_grad():
            below = (ratio < 1 - low) & (lctx.adv_BT < 0)
            above = (ratio > 1 + high) & (lctx.adv_BT > 0)
            tokens = lctx.mask_BT.sum().clamp(min=1.0)
            lctx.log("clip/low", (below * lctx.mask_BT).sum() / tokens)
            lctx.log("clip/high", (above * lctx.mask_BT).sum() / tokens)


@dataclass
class DrGrpo(Grpo):
    """Dr. GRPO: no std division, a constant denominator (arXiv 2503.20783)."""

    scale_rewards: str = "none"
    name = "dr_grpo"

    def aggregate(self, loss: Tensor, lctx: LossContext) -> Tensor:
        row_B = (loss * lctx.mask_BT).sum(-1) / lctx.max_completion_tokens
        if lctx.row_weight_B is not None:
            return (row_B * lctx.row_weight_B).sum() / lctx.accumulation
        total = (loss * lctx.mask_BT).sum() / (loss.size(0) * lctx.max_completion_tokens)
        return total / lctx.accumulation


@dataclass
class Bnpo(Grpo):
    """BNPO-style normalisation: mean over the tokens of each micro-batch, so it depends on rows_per_device."""

    name = "bnpo"

    def aggregate(self, loss: Tensor, lctx: LossContext) -> Tensor:
        mean = (loss * lctx.mask_BT).sum() / lctx.mask_BT.sum().clamp(min=1.0)
        return (mean if lctx.share == 1.0 else mean * lctx.share) / lctx.accumulation


@dataclass
class Dapo(Grpo):
    """DAPO: higher upper clip, mean over all tokens, optional dynamic sampling (arXiv 2503.14476).

    `dynamic_sampling` replaces groups whose rewards are all equal by fresh prompts, at most `max_draws` draws.
    """

    epsilon_high: float = 0.28
    dynamic_sampling: bool = False
    max_draws: int = 4
    name = "dapo"

    def aggregate(self, loss: Tensor, lctx: LossContext) -> Tensor:
        return mean_over_tokens(loss, lctx)


@dataclass
class Cispo(PolicyGradient):
    """CISPO: clipped importance weight as a constant, no token loses its gradient (arXiv 2506.13585)."""

    epsilon_high: float = 5.0
    name = "cispo"

    def token_loss(self, ratio: Tensor, lctx: LossContext) -> Tensor:
        weight = torch.clamp(ratio, max=self.epsilon_high).detach()
        return -weight * lctx.adv_BT * lctx.logps_BT

    def aggregate(self, loss: Tensor, lctx: LossContext) -> Tensor:
        return mean_over_tokens(loss, lctx)


@dataclass
class Gspo(Grpo):
    """GSPO: one length-normalised ratio per sequence (arXiv 2507.18071)."""

    epsilon_low: float = 3e-4
    epsilon_high: float = 4e-4
    name = "gspo"
    ratio_level = "sequence"

    def log_ratio(self, lctx: LossContext) -> Tensor:
        gap_BT = lctx.logps_BT - lctx.old_logps_BT
        return ((gap_BT * lctx.mask_BT).sum(-1) / lctx.mask_BT.sum(-1).clamp(min=1.0)).unsqueeze(-1)

    def token_loss(self, ratio: Tensor, lctx: LossContext) -> Tensor:
        # One ratio per row needs one advantage per row: that of its first model token (all are equal here).
        first_B1 = lctx.mask_BT.argmax(1, keepdim=True)
        return super().token_loss(ratio, replace(lctx, adv_BT=lctx.adv_BT.gather(1, first_B1)))


@dataclass
class GspoToken(Gspo):
    """GSPO-token: the sequence ratio's value with each token's own gradient, for credit inside a row.

    s_it = sg[s_i] pi(y_it) / sg[pi(y_it)]. Plain GSPO gives every token of a row the same gradient whatever its
    advantage; with equal advantages in a row both have equal gradients.
    """

    name = "gspo_token"
    ratio_level = "token"

    def log_ratio(self, lctx: LossContext) -> Tensor:
        sequence = super().log_ratio(lctx).detach()
        return lctx.logps_BT - lctx.logps_BT.detach() + sequence

    def token_loss(self, ratio: Tensor, lctx: LossContext) -> Tensor:
        return Grpo.token_loss(self, ratio, lctx)


@dataclass
class Sapo(PolicyGradient):
    """SAPO: a sigmoid gate in place of the hard clip (arXiv 2511.20347)."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    name = "sapo"

    def token_loss(self, ratio: Tensor, lctx: LossContext) -> Tensor:
        tau = torch.where(lctx.adv_BT > 0, self.tau_pos, self.tau_neg)
        return -(torch.sigmoid(tau * (ratio - 1)) * 4 / tau) * lctx.adv_BT
