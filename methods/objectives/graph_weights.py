"""The step belongs to a method that learns from rollouts of a policy that stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from methods.base import Context, LossContext
from methods.objectives.base import Objective


@dataclass
class GraphWeights(Objective):
    """Trains the weights of the graph memory and nothing else: advantages and loss are zero."""

    beta: float = field(default=0.0, init=False)
    scale_rewards: str = field(default="none", init=False)

    name = "graph_weights"
    methods = ("graph_memory",)
    frozen = True

    def advantages(self, ctx: Context) -> Tensor:
        assert ctx.batch is not None
        return torch.zeros_like(ctx.batch.adv_ST)

    def loss(self, lctx: LossContext) -> Tensor:
        return (lctx.logps_BT * 0.0).sum()
