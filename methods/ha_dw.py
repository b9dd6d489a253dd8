"""HA-DW: history-aware adaptive difficulty weighting (arXiv 2601.08521)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.base import Context, Method, RunError
from methods.errors import ConfigError
from methods.numerics import group_stats


@dataclass
class HaDw(Method):
    """HA-DW: reweights advantages by sign and by the group's accuracy against a running belief.

    Anchor, once per generation, over all responses y_t (Eqs. in section 4 of the paper):
        soft:  C+ = (1 - eta_t) C- + eta_t y_t,  eta_t = clip(eta * std(last m beliefs), eta_min, 1)
        hard:  C+ = mean of the last h batch accuracies
        fixed: C stays `fixed_anchor` (the paper's ablation)
    Weight, per token of a rollout with incoming advantage A and group accuracy p_hat:
        diff = p_hat - C-,  Phi = lambda_scale * exp(-sgn(A) sgn(diff) |diff|),  A <- Phi A

    `correctness` names the reward used for p_hat and y; empty = the one with role `outcome`. Rewards must lie in
    [0, 1]; NaN rewards are left out of p_hat and y.

    Differs from the paper: eta, m and the floor eta_min are not published (our choice; without a floor the anchor
    freezes on a constant history); the first belief is y_1 and a running mean of y until m beliefs exist.
    `use_posterior` reads C after the batch is absorbed, as the authors' code does.
    Degenerate: groups with equal rewards keep advantage 0 but count in y; p_hat == C gives Phi = lambda_scale;
    with G = 2 every live group has p_hat = 1/2, so difficulty cannot be told apart.
    """

    anchor: str = "soft"
    lambda_scale: float = 1.3
    eta: float = 20.0
    window: int = 10
    eta_min: float = 0.02
    fixed_anchor: float = 0.5
    use_posterior: bool = False
    only_with_std: bool = False
    correctness: str = ""
    beliefs: list[float] = field(default_factory=list, init=False)
    accuracies: list[float] = field(default_factory=list, init=False)
    last: dict[str, float] = field(default_factory=dict, init=False)

    name = "ha_dw"
    needs = frozenset({"group_baseline"})
    signals = ("direction", "magnitude")

    def __post_init__(self) -> None:
        if self.anchor not in ("soft", "hard", "fixed"):
            raise ConfigError(
                "unknown anchor", where="method.ha_dw.anchor", got=self.anchor, expected="soft, hard or fixed"
            )
        if self.window < 1 or self.lambda_scale <= 0:
            raise ConfigError("window must be at least 1 and lambda_scale positive", where="method.ha_dw")

    def advantages(self, adv_ST: Tensor, ctx: Context) -> Tensor:
        batch = ctx.batch
        assert batch is not None
        name = self.correctness or ctx.reward_name("outcome")
        reward_N = ctx.reward(name)
        everything = ctx.gather(ctx.rewards_all.get(name, reward_N))
        accuracy = _accuracy(everything, name)
        prior = self.prior(accuracy)
        posterior = self.update(accuracy)
        if self.only_with_std and ctx.limits.scale_rewards == "none":
            return adv_ST
        belief = posterior if self.use_posterior else prior
        p_hat_N, _ = group_stats(reward_N, ctx.group_N)
        # A group without any valid reward has no p_hat; its advantages are 0 already.
        diff_S = torch.nan_to_num(p_hat_N - belief).to(adv_ST.device)[batch.traj_S]
        direction_ST = -torch.sign(adv_ST) * torch.sign(diff_S).unsqueeze(1)
        direction_ST = ctx.signal(self, "direction", direction_ST, batch.group_S)
        magnitude_S = ctx.signal(self, "magnitude", diff_S.abs())
        phi_ST = self.lambda_scale * torch.exp(direction_ST * magnitude_S.unsqueeze(1))
        weighted_ST = phi_ST * adv_ST
        self._note(phi_ST, adv_ST, weighted_ST, diff_S, batch, prior, accuracy)
        return weighted_ST

    # ---- the anchor ----
    def prior(self, accuracy: float) -> float:
        """C-: the belief before this batch; the batch's own accuracy when there is no history."""
        if self.anchor == "fixed":
            return self.fixed_anchor
        return self.beliefs[-1] if self.beliefs else accuracy

    def update(self, accuracy: float) -> float:
        """Absorbs one batch accuracy and returns C+; called once per generation, never in evaluation."""
        prior = self.prior(accuracy)
        self.accuracies = [*self.accuracies, accuracy][-self.window :]
        sigma = eta = 0.0
        if self.anchor == "fixed":
            posterior = prior
        elif self.anchor == "hard" or len(self.beliefs) < self.window:
            posterior = sum(self.accuracies) / len(self.accuracies)
        else:
            sigma = _population_std(self.beliefs)
            eta = min(max(self.eta * sigma, self.eta_min), 1.0)
            posterior = (1 - eta) * prior + eta * accuracy
        self.beliefs = [*self.beliefs, posterior][-self.window :]
        self.last |= {"sigma": sigma, "eta": eta, "posterior": posterior}
        return posterior

    # ---- records ----
    def _note(self, phi_ST, adv_ST, weighted_ST, diff_S, batch, prior: float, accuracy: float) -> None:
        self.last |= {"prior": prior, "accuracy": accuracy}
        hard_ST = (diff_S < 0).unsqueeze(1).expand_as(adv_ST)
        quadrants = {
            "phi/hard_correct": hard_ST & (adv_ST > 0),
            "phi/hard_wrong": hard_ST & (adv_ST < 0),
            "phi/easy_correct": (diff_S > 0).unsqueeze(1) & (adv_ST > 0),
            "phi/easy_wrong": (diff_S > 0).unsqueeze(1) & (adv_ST < 0),
        }
        masks = torch.stack(list(quadrants.values())).float()
        means = (masks * phi_ST).sum((1, 2)) / masks.sum((1, 2))
        self.last |= dict(zip(quadrants, means.tolist(), strict=True))
        lengths_S = batch.model_mask_ST.sum(1).clamp(min=1)
        net_S = weighted_ST.sum(1) / lengths_S
        hard_S = diff_S < 0
        self.last |= {"net/hard": float(net_S[hard_S].sum()), "net/easy": float(net_S[~hard_S].sum())}

    def metrics(self) -> dict[str, float]:
        return dict(self.last)

    def state_dict(self) -> dict[str, Any]:
        return {"beliefs": self.beliefs, "accuracies": self.accuracies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beliefs, self.accuracies = list(state["beliefs"]), list(state["accuracies"])


def _accuracy(reward_N: Tensor, name: str) -> float:
    valid = reward_N[~torch.isnan(reward_N)]
    if valid.numel() == 0:
        raise RunError(
            f"no rollout of the batch has the reward '{name}'", where="method.ha_dw", fix="check the task's scorer"
        )
    low, high = float(valid.min()), float(valid.max())
    if low < 0 or high > 1:
        raise RunError(
            f"HA-DW reads the reward '{name}' as an accuracy",
            where="method.ha_dw.correctness",
            got=f"values from {low:g} to {high:g}",
            expected="values in [0, 1]",
            fix="name a 0/1 reward in method.ha_dw.correctness, or rescale it",
        )
    return float(valid.mean())


def _population_std(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
