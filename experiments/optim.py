"""Own modules of an objective (a critic) in the policy's optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def add_modules(optimizer: Any, modules: nn.Module, learning_rate: float, max_grad_norm: float) -> None:
    """Adds the modules' parameters as a group; HF clips and zeroes the gradients of the model only."""
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer.add_param_group({"params": parameters, "lr": learning_rate})

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))

    optimizer.register_step_pre_hook(clip)
    optimizer.register_step_post_hook(lambda *_: modules.zero_grad())
