"""The one callback that all trainers share: metrics, evaluations, checkpoints, stop signals, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from experiments import checkpoints
from experiments.records import RunWriter
from experiments.signals import StopSignals
from experiments.team import ALONE, Team
from methods.errors import RunError


class AfterStep(TrainerCallback):
    """Calls the methods' `after_step`. Callbacks do not get the trainer, so this one is given it."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kw):
        if self.trainer.last_ctx is not None:
            self.trainer.last_ctx.step = state.global_step
            self.trainer.stack.after_step(self.trainer.last_ctx)


class Recorder(TrainerCallback):
    """Writes one run's record while HF's loop runs.

    state: the trainer's state beside the policy, for checkpoints. evaluate(step): rows for eval.parquet and extra
    metrics, or None. boundary: steps between points at which the run may be cut.
    """

    def __init__(
        self,
        writer: RunWriter,
        *,
        state: Callable[[], dict],
        evaluate: Callable[[int], tuple[Any, dict[str, float]] | None],
        boundary: int,
        eval_every: int,
        keep: int,
        stop: StopSignals,
        progress: Callable[[int, int, dict], None],
        team: Team = ALONE,
    ) -> None:
        self.writer, self.state_fn, self.evaluate_fn = writer, state, evaluate
        self.boundary, self.eval_every, self.keep = boundary, eval_every, keep
        self.stop, self.progress, self.team = stop, progress, team
        self.seconds = 0.0  # training time of earlier sittings
        self._mark = time.perf_counter()
        self._logged_at = (0, 0.0)
        self.step = 0
        self.last_logs: dict[str, float] = {}
        self.extra: dict[str, float] = {}

    # ---- time: evaluation and checkpoints are not training ----
    def _pause(self) -> None:
        self.seconds += time.perf_counter() - self._mark

    def _go(self) -> None:
        self._mark = time.perf_counter()

    @property
    def total_seconds(self) -> float:
        return self.seconds + time.perf_counter() - self._mark

    def state(self) -> dict:
        own = {"seconds": self.total_seconds, "last_logs": self.last_logs, "processes": self.team.size}
        return {"trainer": self.state_fn(), **own}

    def load(self, step: int, state: dict) -> None:
        """Takes up the record where an earlier sitting saved it."""
        self.step, self.seconds, self.last_logs = step, state["seconds"], state["last_logs"]

    # ---- HF's events ----
    def on_train_begin(self, args, state, control, **kw):
        self._go()
        if state.global_step == 0:
            self._evaluate(0)
        self._logged_at = (state.global_step, self.total_seconds)

    def on_step_end(self, args, state, control, **kw):
        self.step = step = state.global_step
        due = self.eval_every and step % self.eval_every == 0
        if due or step >= args.max_steps:
            self._evaluate(step)
        if step % self.boundary == 0 and (received := self.team.largest(self.stop.received or 0)):
            self.stop.received = received  # a signal that reached one process stops all, at the same step
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **kw):
        if not logs or "train_runtime" in logs:
            return
        if not math.isfinite(logs.get("loss", 0.0)):
            raise RunError(
                "the loss is not finite",
                where=f"step {state.global_step}",
                got=logs["loss"],
                fix="lower trainer.learning_rate; the run goes on from its last checkpoint",
            )
        step, total = state.global_step, self.total_seconds
        before_step, before = self._logged_at
        timing = {"time/step": (total - before) / max(step - before_step, 1), "time/total": total}
        self._logged_at = (step, total)
        drop = ("epoch", "num_tokens", "step_time", "step")
        values = {k: v for k, v in logs.items() if k not in drop and isinstance(v, (int, float))}
        self.last_logs = {**values, **self.extra, **timing}
        self.writer.log(step, self.last_logs)
        logs.update(self.extra)  # for the trackers behind
        self.extra = {}
        self.progress(step, args.max_steps, self.last_logs)

    def on_save(self, args, state, control, **kw):
        self._pause()
        self._go()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.team.largest(0)  # every process has written its part
        if self.team.is_main:
            checkpoints.seal(folder, self.state(), self.keep)
        self.team.largest(0)  # nobody writes the next one, or is asked for it, before this one is whole
        self.writer.update(step=state.global_step)
        self._go()

    def _evaluate(self, step: int) -> None:
        self._pause()
        if (result := self.evaluate_fn(step)) is not None:
            rows, extra = result
            self.writer.eval(rows, step)
            self.extra |= {k: v for k, v in extra.items() if math.isfinite(v)}
            if step == 0:
                self.extra = {}
        self._go()
