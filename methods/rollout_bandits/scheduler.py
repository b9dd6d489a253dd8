"""The online scheduler: a small network that predicts the gain of a kept set from the features of its rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LOSSES = ("set_mean", "shared_label")
EXPLORATIONS = ("ts", "none", "gumbel")
POOL, EPOCHS, WEIGHT_DECAY = 64, 2, 1e-4
NU, RIDGE, TEMPERATURE = 0.1, 0.01, 0.3


class Scheduler:
    """f(x): a ReLU network over the features of one rollout, trained by Adam on the gains of past decisions.

    Label of a decision: y = (gain - mean) / std over all gains so far (population std; 0 if it is 0). Over the last
    64 decisions, two steps of Adam per gain on
        set_mean:      mean_t (mean_i f(x_i) - y_t)^2          i runs over the rollouts kept in round t
        shared_label:  mean_t mean_i (f(x_i) - y_t)^2          = set_mean + the spread of f inside the kept sets
    Score: f(x) + u(x), and during the first `warmup` rounds u alone (random for `none` and `gumbel`):
        ts      u(x) = w.(x - mean x), one w ~ N(0, nu^2 A^-1) per round, A = 0.01 I + sum_t c_t c_t^T,
                c_t = mean features of the kept minus mean features of the candidates
        none    u = 0
        gumbel  u = 0.3 x Gumbel noise, one draw per rollout: softmax sampling without replacement
    Feedback is one number per set: noise drawn per rollout averages out over the set and leaves nothing to regress
    on, which a draw shared by all rollouts does.

    `seed` fixes the initial weights; the global random state is neither read nor changed.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (32,),
        learning_rate: float = 5e-3,
        loss: str = "set_mean",
        exploration: str = "ts",
        warmup: int = 20,
        seed: int = 0,
    ) -> None:
        self.sizes = [features, *hidden, 1]
        self.loss_kind, self.exploration, self.warmup = loss, exploration, warmup
        self.theta = _initial(self.sizes, seed).requires_grad_()
        self.adam = torch.optim.Adam([self.theta], lr=learning_rate, weight_decay=WEIGHT_DECAY)
        self.A_FF = RIDGE * torch.eye(features, dtype=torch.float64)
        self.pool: list[tuple[Tensor, float]] = []
        self.rounds = 0
        self.gains, self.mean, self.square = 0, 0.0, 0.0  # Welford's running mean and sum of squared deviations
        self._rng = np.random.default_rng(0)
        self._w_F = torch.zeros(features)

    # ---- decisions ----
    def begin(self, rng: np.random.Generator) -> None:
        """A round begins: everything random in its scores comes from `rng`."""
        self.rounds += 1
        self._rng = rng
        if self.exploration == "ts":
            z_F = torch.from_numpy(rng.standard_normal(len(self.A_FF)))
            root_FF = torch.linalg.cholesky(self.A_FF)
            w_F1 = torch.linalg.solve_triangular(root_FF.T, z_F.unsqueeze(1), upper=True)
            self._w_F = (NU * w_F1.squeeze(1)).float()

    @property
    def warming_up(self) -> bool:
        return self.rounds <= self.warmup

    def scores(self, x_NF: Tensor) -> Tensor:
        """(N,) prediction and exploration for the candidates of this round."""
        if self.exploration == "ts":
            u_N = (x_NF - x_NF.mean(0)) @ self._w_F
        elif self.warming_up:
            u_N = torch.from_numpy(self._rng.random(len(x_NF))).float()
        elif self.exploration == "gumbel":
            u_N = TEMPERATURE * torch.from_numpy(self._rng.gumbel(size=len(x_NF))).float()
        else:
            u_N = torch.zeros(len(x_NF))
        return u_N if self.warming_up else self.predict(x_NF).detach() + u_N

    def predict(self, x_NF: Tensor) -> Tensor:
        """(N,) f(x)."""
        start = 0
        for i, (fan_in, fan_out) in enumerate(pairwise(self.sizes)):
            weight = self.theta[start : start + fan_in * fan_out].view(fan_out, fan_in)
            start += fan_in * fan_out
            x_NF = F.linear(x_NF, weight, self.theta[start : start + fan_out])
            start += fan_out
            if i < len(self.sizes) - 2:
                x_NF = torch.relu(x_NF)
        return x_NF.squeeze(1)

    # ---- learning ----
    def label(self, gain: float) -> float:
        """A gain in standard deviations of all gains so far."""
        std = math.sqrt(self.square / self.gains) if self.gains else 0.0
        return (gain - self.mean) / std if std > 0 else 0.0

    def learn(
        self, kept_KF: Tensor, contrast_F: Tensor, gain: float, change: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Takes in the gain of one decision and trains. `change` may permute the labels of the pool (a control)."""
        self.gains += 1
        gap = gain - self.mean
        self.mean += gap / self.gains
        self.square += gap * (gain - self.mean)
        self.A_FF = self.A_FF + torch.outer(contrast_F.double(), contrast_F.double())
        self.pool = [*self.pool, (kept_KF, gain)][-POOL:]
        labels_W = torch.tensor([self.label(g) for _, g in self.pool])
        labels_W = labels_W if change is None else change(labels_W)
        sizes_W = torch.tensor([len(x) for x, _ in self.pool])
        x_NF = torch.cat([x for x, _ in self.pool])
        with torch.enable_grad():
            for _ in range(EPOCHS):
                self.adam.zero_grad()
                self.loss(x_NF, sizes_W, labels_W).backward()
                self.adam.step()

    def loss(self, x_NF: Tensor, sizes_W: Tensor, labels_W: Tensor) -> Tensor:
        """The chosen loss over W kept sets that lie one after the other in x_NF."""
        f_N = self.predict(x_NF)
        round_N = torch.repeat_interleave(torch.arange(len(sizes_W)), sizes_W)
        if self.loss_kind == "shared_label":
            f_N = (f_N - labels_W[round_N]) ** 2
        mean_W = torch.zeros(len(sizes_W)).index_add(0, round_N, f_N) / sizes_W
        return mean_W.mean() if self.loss_kind == "shared_label" else ((mean_W - labels_W) ** 2).mean()

    # ---- state ----
    def state_dict(self) -> dict[str, Any]:
        moments = {k: v.clone() for k, v in self.adam.state.get(self.theta, {}).items()}
        return {
            "theta": self.theta.detach().clone(),
            "adam": moments,
            "A": self.A_FF,
            "pool": {str(i): {"x": x, "gain": gain} for i, (x, gain) in enumerate(self.pool)},
            "counts": [self.rounds, self.gains],
            "statistics": [self.mean, self.square],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.theta.copy_(state["theta"])
        self.adam.state.clear()
        if state["adam"]:
            self.adam.state[self.theta] = {k: v.clone() for k, v in state["adam"].items()}
        self.A_FF = state["A"].clone()
        self.pool = [(entry["x"], float(entry["gain"])) for entry in state["pool"].values()]
        self.rounds, self.gains = state["counts"]
        self.mean, self.square = state["statistics"]


def _initial(sizes: Sequence[int], seed: int) -> Tensor:
    """Flat weights and biases, uniform in +-1/sqrt(fan-in), layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for fan_in, fan_out in pairwise(sizes):
        draws = torch.rand(fan_in * fan_out + fan_out, generator=generator)
        parts.append((2 * draws - 1) / math.sqrt(fan_in))
    return torch.cat(parts)
