"""PPO: a critic, generalised advantage estimation, clipped policy and value losses (arXiv 1707.06347)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Context, LossContext
from methods.errors import check_range
from methods.numerics import generalised_advantages
from methods.objectives.base import mean_over_tokens
from methods.objectives.credit import rewards_on_tokens, whiten
from methods.objectives.policy_gradient import Grpo


class Critic(nn.Module):
    """A copy of the policy's decoder with a linear head: V_t from the state that predicts token t.

    The head starts at zero, so that the first advantages are those of REINFORCE++. Kept in float32.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(policy.get_decoder()).float()
        self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids_BL: Tensor, attention_BL: Tensor, width: int) -> Tensor:
        """(B, T) values of the last `width` tokens."""
        states_BLD = self.decoder(input_ids=ids_BL, attention_mask=attention_BL, use_cache=False)[0]
        return self.head(states_BLD[:, -width - 1 : -1].float()).squeeze(-1)


@dataclass
class Ppo(Grpo):
    """PPO with a critic of the policy's size, trained with its own learning rate.

    rho_t = token reward - beta (log pi_old - log pi_ref);  GAE over model tokens:
        delta_t = rho_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  Ret_t = A_t + V_t
    A is whitened over all valid tokens of the generation. With x = pi / pi_old, over all tokens:
        policy  max(-A x, -A clip(x, 1 - eps_low, 1 + eps_high)), and for A < 0 at most -A dual_clip
        value   1/2 max((v - Ret)^2, (clip(v, v_old - value_clip, v_old + value_clip) - Ret)^2)
    Without token rewards the trajectory's reward sits on its last model token. The critic's parameters are its own,
    so the value loss needs no weight beside the learning rate `critic_learning_rate` (null = the policy's).

    Differs from the original: one rollout per prompt would do; TRL needs two, they count as independent.
    Degenerate: equal advantages are whitened to 0; an unscorable trajectory gets advantage 0 and no value error.
    """

    scale_rewards: str = "none"
    gamma: float = 1.0
    lam: float = 1.0
    dual_clip: float = 3.0
    value_clip: float = 0.5
    critic_learning_rate: float | None = None

    name = "ppo"
    group_baseline = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("objective.gamma", self.gamma, 0.0, 1.0)
        check_range("objective.lam", self.lam, 0.0, 1.0)
        check_range("objective.dual_clip", self.dual_clip, 1.0, above=True)
        check_range("objective.value_clip", self.value_clip, 0.0, above=True)
        if self.critic_learning_rate is not None:
            check_range("objective.critic_learning_rate", self.critic_learning_rate, 0.0, above=True)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logps", "ref_logps"}) if self.beta else frozenset()

    @property
    def modules_learning_rate(self) -> float | None:  # type: ignore[override]
        return self.critic_learning_rate

    def modules(self, policy: nn.Module) -> dict[str, nn.Module]:
        self.critic = Critic(policy)
        return {"critic": self.critic}

    # ---- one generation ----
    def advantages(self, ctx: Context) -> Tensor:
        batch = ctx.batch
        assert batch is not None
        mask_ST = batch.model_mask_ST
        rewards_ST, valid_ST = rewards_on_tokens(ctx, self.beta)
        values_ST = self.old_values(ctx)
        adv_ST = generalised_advantages(rewards_ST, values_ST, mask_ST, batch.traj_S, self.gamma, self.lam)
        returns_ST = torch.where(valid_ST, adv_ST + values_ST, values_ST)
        batch.extras |= {"old_values": values_ST, "returns": returns_ST}
        self._log_fit(values_ST[valid_ST], returns_ST[valid_ST], ctx)
        return whiten(adv_ST, valid_ST, ctx)

    def old_values(self, ctx: Context) -> Tensor:
        """(S, T) values of the generation's tokens under the critic as it is now; 0 outside the model's tokens."""
        batch = ctx.batch
        assert batch is not None
        width, limit = batch.completion_ids_ST.shape[1], ctx.limits.rows_per_device

        def work(part: slice) -> Tensor:
            ids, mask = batch.rows_at(part).sequences()
            ctx.services.cost["forwarded_tokens"] += int(mask.sum())
            starts = range(0, len(ids), limit)
            return torch.cat([self.critic(ids[k : k + limit], mask[k : k + limit], width) for k in starts])

        with torch.no_grad(), ctx.services.counted("forward"):
            return ctx.services.divided_rows(batch.rows, work) * batch.model_mask_ST

    def _log_fit(self, values: Tensor, returns: Tensor, ctx: Context) -> None:
        spread = returns.var() if returns.numel() > 1 else torch.tensor(0.0)
        if spread > 0:
            ctx.log("ppo/explained_variance", float(1 - (returns - values).var() / spread))

    # ---- one micro-batch ----
    def loss(self, lctx: LossContext) -> Tensor:
        value = mean_over_tokens(self.value_loss(lctx), lctx)
        lctx.log("ppo/value_loss", value.detach())
        # The KL already sits in the reward; adding it to the loss again would count it twice.
        return mean_over_tokens(self.token_loss(torch.exp(self.log_ratio(lctx)), lctx), lctx) + value

    def token_loss(self, ratio: Tensor, lctx: LossContext) -> Tensor:
        loss_BT = super().token_loss(ratio, lctx)
        most_BT = torch.minimum(loss_BT, -self.dual_clip * lctx.adv_BT)
        return torch.where(lctx.adv_BT < 0, most_BT, loss_BT)

    def value_loss(self, lctx: LossContext) -> Tensor:
        """(B, T) clipped squared error of the critic."""
        assert lctx.ids_BL is not None and lctx.attention_BL is not None
        values_BT = self.critic(lctx.ids_BL, lctx.attention_BL, lctx.mask_BT.shape[1])
        old_BT, returns_BT = lctx.extras["old_values"], lctx.extras["returns"]
        return clipped_value_loss(values_BT, old_BT, returns_BT, self.value_clip)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Elementwise 1/2 max((v - Ret)^2, (clip(v, v_old - c, v_old + c) - Ret)^2)."""
    near = old + torch.clamp(values - old, -clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)
