"""What of TRL's private names the trainer relies on, checked at start-up."""

from __future__ import annotations

import inspect
from importlib.metadata import version

from packaging.version import Version
from trl.trainer.grpo_trainer import GRPOTrainer

from methods.errors import ConfigError

TRL_RANGE = ("1.15", "1.17")
RELIED_ON = {
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "num_generations"),
    "_generate_and_score_completions": ("inputs",),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_tokenize_prompts": ("prompts",),
    "_get_train_sampler": ("dataset",),
    "_compute_loss": ("model", "inputs"),
    "_prepare_inputs": ("generation_batch",),
    "_save_checkpoint": ("model", "trial"),
    "log": ("logs", "start_time"),
}


def self_check() -> list[str]:
    """What has moved in TRL, one line each; an empty list when everything relied on is in place."""
    problems = []
    low, high = TRL_RANGE
    if not Version(low) <= Version(version("trl")) < Version(high):
        problems.append(f"trl {version('trl')} is outside the tested range >={low},<{high}")
    for name, parameters in RELIED_ON.items():
        method = getattr(GRPOTrainer, name, None)
        if method is None:
            problems.append(f"GRPOTrainer.{name} is gone")
            continue
        found = inspect.signature(method).parameters
        problems += [f"GRPOTrainer.{name} lost its parameter '{p}'" for p in parameters if p not in found]
    return problems


def require_trl() -> None:
    if problems := self_check():
        raise ConfigError(
            "this TRL is not the one assay was written for",
            where="the installed package trl",
            got="; ".join(problems),
            expected=f"trl >={TRL_RANGE[0]},<{TRL_RANGE[1]}",
            fix="pip install -c constraints.txt trl",
        )
