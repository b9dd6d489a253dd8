"""Own modules of an objective (a critic) in the policy's optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def add_modules(
    optimizer: Any, modules: nn.Module, learning_rate: float, max_grad_norm: float, processes: int = 1
) -> None:
    """Adds the modules' parameters as a group; HF averages, clips and zeroes the gradients of the model only."""
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer.add_param_group({"params": parameters, "lr": learning_rate})

    def clip(*_: Any) -> None:
        if processes > 1:
            average(parameters, processes)
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))

    optimizer.register_step_pre_hook(clip)
    optimizer.register_step_post_hook(lambda *_: modules.zero_grad())


def average(parameters: list[nn.Parameter], processes: int) -> None:
    """Means of the gradients over processes, in one exchange."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / processes).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
