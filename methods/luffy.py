"""LUFFY: off-policy guidance with policy shaping, a baseline of SRFT (arXiv 2504.14945)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import LossContext
from methods.demonstrations import Demonstrations


@dataclass
class Luffy(Demonstrations):
    """LUFFY: GRPO over a mixed group, in which demonstrations count with a reshaped probability.

    A is the group-relative advantage over rollouts and demonstrations together; per token
        rollout:        -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A),   r = pi / pi_old
        demonstration:  -f(pi) A,   f(pi) = pi / (pi + gamma)             (behaviour probability 1, no clip)
    and the loss is their mean over all tokens of the batch. f lifts the gradient of unlikely tokens, which -pi A
    would hardly move: its coefficient on grad log pi is A gamma pi / (pi + gamma)^2.

    Differs from the paper: nothing in the equations. The released script divides advantages by no standard deviation
    (objective.scale_rewards=none) and token sums by a constant length.
    Degenerate: equal rewards in a group give A = 0; a demonstration that the verifier rejects is pushed down.
    """

    gamma: float = 0.1
    epsilon: float = 0.2

    name = "luffy"

    def loss(self, lctx: LossContext) -> Tensor:
        adv_BT = lctx.adv_BT
        ratio_BT = torch.exp(lctx.logps_BT - lctx.old_logps_BT)
        clipped_BT = torch.clamp(ratio_BT, 1 - self.epsilon, 1 + self.epsilon)
        on_BT = -torch.min(ratio_BT * adv_BT, clipped_BT * adv_BT)
        pi_BT = torch.exp(lctx.logps_BT)
        off_BT = -pi_BT / (pi_BT + self.gamma) * adv_BT
        demo_B1 = lctx.extras["demo"].unsqueeze(1).bool()
        demo_BT = demo_B1 & lctx.mask_BT.bool()
        lctx.log("luffy/demo_probability", (pi_BT.detach() * demo_BT).sum() / demo_BT.sum())
        return (torch.where(demo_B1, off_BT, on_BT) * lctx.mask_BT).sum() / lctx.denominator_tokens
