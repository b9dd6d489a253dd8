"""Supervised fine-tuning through TRL's SFTTrainer: warm starts, `objective=sft` and later supervised stages.

Rows are tokenised by `experiments.tokenizers`, not by TRL, so that exactly the model's own tokens are trained.
The order of the rows is a function of the seed alone and every optimiser step has exactly `batch_size` rows,
which is what makes a resumed run equal to the uninterrupted one.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.tokenizers import IGNORED, encode
from methods.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from experiments.weights import LoadedModel


SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class SFTSettings:
    """How to fine-tune; a step is an optimiser step.

    Exactly one of `steps` and `epochs` is set. `rows_per_device` None puts the whole batch on the device at
    once. `save_steps` 0 writes no checkpoint. Warm-up is linear and counted in steps.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 64
    rows_per_device: int | None = None
    learning_rate: float = 1e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    max_length: int = 2048
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    use_liger_kernel: bool = False
    use_cpu: bool | None = None
    logging_steps: int = 10
    save_steps: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                "Fine-tuning needs a length", got=f"steps={self.steps}, epochs={self.epochs}", expected="one of them"
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError("Unknown learning-rate schedule", got=self.schedule, expected=", ".join(SCHEDULES))
        for name in ("steps", "epochs", "batch_size", "rows_per_device", "max_length", "logging_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive", got=value)
        if self.batch_size % (self.rows_per_device or self.batch_size):
            raise ConfigError(
                "The batch cannot be divided among micro-batches",
                got=f"batch_size={self.batch_size}, rows_per_device={self.rows_per_device}",
                expected="a divisor of batch_size as rows_per_device",
            )

    def total_steps(self, n_rows: int) -> int:
        """Optimiser steps over `n_rows` rows, at least one."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * n_rows / self.batch_size))


# ---------------------------------------------------------------- the data set


@dataclass(frozen=True)
class Batches:
    """Encoded rows in training order; the costs are cumulative tokens after 0, 1, ... steps."""

    dataset: Any
    trained_tokens: list[int]
    forwarded_tokens: list[int]
    truncated_rows: int


def make_batches(rows: Sequence[Any], loaded: LoadedModel, cfg: SFTSettings, seed: int) -> Batches:
    """Encode `rows`, cut them to `cfg.max_length` tokens and lay them out for all steps, epoch after epoch.

    Every epoch is a fresh permutation that depends on `seed` only. DataError if nothing is left to train on.
    """
    encoded = [encode(row, loaded) for row in rows]
    truncated = sum(len(e["input_ids"]) > cfg.max_length for e in encoded)
    encoded = [{k: v[: cfg.max_length] for k, v in e.items()} for e in encoded]
    encoded = [e for e in encoded if any(label != IGNORED for label in e["labels"][1:])]
    if not encoded:
        raise DataError(
            "There is nothing to train on",
            got=f"{len(rows)} rows, {truncated} of them longer than max_length={cfg.max_length}",
            expected="at least one row with a trained token",
        )
    # The first position has no prediction, so its label costs and teaches nothing.
    trained = [sum(label != IGNORED for label in e["labels"][1:]) for e in encoded]
    return lay_out(encoded, trained, [len(e["input_ids"]) for e in encoded], truncated, cfg, seed)


def lay_out(
    encoded: list[dict], trained: list[int], forwarded: list[int], truncated: int, cfg: SFTSettings, seed: int
) -> Batches:
    """The rows in training order for all steps; `trained` and `forwarded` are their tokens."""
    import datasets

    total = cfg.total_steps(len(encoded)) * cfg.batch_size
    rng = np.random.default_rng(seed)
    epochs = -(-total // len(encoded))
    order = np.concatenate([rng.permutation(len(encoded)) for _ in range(epochs)])[:total]

    def cumulative(per_row: list[int]) -> list[int]:
        return [0, *np.array(per_row)[order].reshape(-1, cfg.batch_size).sum(1).cumsum().tolist()]

    dataset = datasets.Dataset.from_list(encoded).select(order)
    return Batches(dataset, cumulative(trained), cumulative(forwarded), truncated)


# ---------------------------------------------------------------- training


def train_sft(
    loaded: LoadedModel,
    rows: Sequence[Any],
    cfg: SFTSettings,
    *,
    output_dir: str | Path,
    seed: int,
    callbacks: Sequence[Any] = (),
    progress: bool | str = True,
    resume: str | Path | None = None,
    run_name: str | None = None,
) -> dict[str, float]:
    """Fine-tune `loaded.model` in place on `rows` and return its last metrics.

    Callbacks are transformers' TrainerCallbacks; the logs they see carry `cost/trained_tokens` and
    `cost/forwarded_tokens` (cumulative, exact). Checkpoints go to `output_dir/checkpoint-<step>`; `resume` is
    such a folder. `progress` may be a label, `run_name` is for trackers. On one CPU thread the weights are a function
    of the model, the rows, the settings and `seed`, bit for bit; the caller's random streams are as before afterwards.
    Returns loss, steps, seconds, trained_tokens, forwarded_tokens, truncated_rows. RunError if the loss is
    not finite.
    """
    with untouched_random_state():
        return _train(loaded, rows, cfg, Path(output_dir), seed, callbacks, progress, resume, run_name)


def _train(loaded, rows, cfg, output_dir, seed, callbacks, progress, resume, run_name) -> dict[str, float]:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    batches = make_batches(rows, loaded, cfg, seed)
    steps = len(batches.trained_tokens) - 1
    own = [costs_callback(batches)]
    if progress:
        own.append(_progress_callback(progress if isinstance(progress, str) else "fine-tuning", steps))
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = SFTTrainer(
        model=loaded.model,
        args=arguments(SFTConfig, cfg, steps, output_dir, seed, run_name, **prepared),
        train_dataset=batches.dataset,
        processing_class=loaded.tokenizer,
        callbacks=[*own, *callbacks],
    )
    return fit(trainer, batches, resume)


def fit(trainer: Any, batches: Batches, resume: str | Path | None) -> dict[str, float]:
    """Run a trainer of TRL's over its batches; what `train_sft` returns."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to results
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    done = trainer.state.global_step
    return {
        "loss": next((log["loss"] for log in reversed(trainer.state.log_history) if "loss" in log), float("nan")),
        "steps": done,
        "seconds": time.perf_counter() - start,
        "trained_tokens": batches.trained_tokens[done],
        "forwarded_tokens": batches.forwarded_tokens[done],
        "truncated_rows": batches.truncated_rows,
    }


def arguments(
    kind: Any, cfg: SFTSettings, steps: int, output_dir: Path, seed: int, run_name: str | None, **more: Any
) -> Any:
    """The training arguments of class `kind`, TRL's SFTConfig or RewardConfig."""
    import torch

    devices = int(os.environ.get("WORLD_SIZE", "1"))
    per_device = cfg.rows_per_device or max(1, cfg.batch_size // devices)
    if cfg.batch_size % (per_device * devices):
        raise ConfigError(
            "The batch cannot be divided among the devices",
            got=f"batch_size={cfg.batch_size}, {devices} devices with {per_device} rows each",
            expected="batch_size a multiple of their product",
        )
    with warnings.catch_warnings():  # transformers warns about a default of TRL's own
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
        return kind(
            output_dir=str(output_dir),
            max_steps=steps,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=cfg.batch_size // (per_device * devices),
            learning_rate=cfg.learning_rate,
            lr_scheduler_type=SCHEDULES[cfg.schedule],
            warmup_steps=cfg.warmup_steps,
            weight_decay=cfg.weight_decay,
            adam_beta2=cfg.adam_beta2,
            max_grad_norm=cfg.max_grad_norm,
            max_length=None,  # rows are cut in make_batches, before their cost is counted
            train_sampling_strategy="sequential",  # make_batches has laid the rows out in training order
            seed=seed % 2**32,  # numpy's legacy generator takes no more
            use_cpu=not torch.cuda.is_available() if cfg.use_cpu is None else cfg.use_cpu,
            bf16=cfg.bf16,
            gradient_checkpointing=cfg.gradient_checkpointing,
            use_liger_kernel=cfg.use_liger_kernel,
            logging_steps=cfg.logging_steps,
            logging_nan_inf_filter=False,  # it would replace a NaN by the mean of the losses before it
            save_strategy="steps" if cfg.save_steps else "no",
            save_steps=cfg.save_steps or 500,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
            run_name=run_name,
            project="assay",
            **more,
        )


def costs_callback(batches: Batches) -> Any:
    from transformers import TrainerCallback

    class Costs(TrainerCallback):
        """Adds the exact costs to every log and stops a run whose loss is not a number."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs is None or "loss" not in logs:
                return
            if not math.isfinite(logs["loss"]):
                raise RunError(
                    "The loss is not finite",
                    where=f"step {state.global_step}",
                    got=logs["loss"],
                    fix="lower the learning rate or raise the warm-up",
                )
            logs["cost/trained_tokens"] = batches.trained_tokens[state.global_step]
            logs["cost/forwarded_tokens"] = batches.forwarded_tokens[state.global_step]

    return Costs()


def _progress_callback(label: str, steps: int) -> Any:
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """A bar with rate and time left on a terminal, else one line every ten seconds; on stderr."""

        def on_train_begin(self, args, state, control, **kwargs):
            live = sys.stderr.isatty()
            quiet = not state.is_world_process_zero
            interval = 0.1 if live else 10.0
            self.bar = tqdm(
                total=steps,
                initial=state.global_step,
                desc=label,
                unit="step",
                mininterval=interval,
                maxinterval=max(10.0, interval),
                dynamic_ncols=live,
                ascii=not live,
                disable=quiet,
                leave=live,
            )

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Progress()


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Restore the global streams of Python, numpy and torch (all devices) on leaving."""
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
