"""Evaluation of the live policy between training steps: fixed items, own random stream, hooks in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from experiments import hooked
from experiments.probe import Probe
from experiments.scoring import score_results
from experiments.seeds import derive
from experiments.team import ALONE, Team
from experiments.vision import images_of
from methods.base import Context
from methods.stack import Stack


class Measure:
    """`measure(step)` gives the frame for eval.parquet and extra metrics (`kl/start`, `eval/score`).

    Items are fixed by `eval.seed`, so that arms and seeds pair on them; sampling is seeded by the run. What it
    generates is not a cost of the method. `encode(prompt)` gives prompt ids; `context()` an evaluation Context;
    inside `whole()` this process has all weights. The processes of a team divide the items and the first one scores
    them; the others get None.
    """

    def __init__(
        self,
        cfg: Any,
        task: Any,
        *,
        model: Any,
        engine: Any,
        encode: Callable[[Any], list[int]],
        pad_id: int,
        max_tokens: int,
        stack: Stack,
        context: Callable[[], Context],
        folder: Path,
        team: Team = ALONE,
        whole: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.team, self.whole = team, whole
        self.cfg, self.task, self.engine, self.encode = cfg, task, engine, encode
        self.max_tokens, self.stack, self.context = max_tokens, stack, context
        engine.batch_size = cfg.eval.batch_size
        self.rows = task.rows(cfg.eval.split, cfg.eval.seed)[: cfg.eval["items"]]
        probed = cfg.eval.kl_probe and not any(images_of(row.prompt) for row in self.rows)  # the probe is text alone
        self.probe = Probe(model, engine, pad_id, folder / "probe.safetensors") if probed else None

    def prepare(self) -> None:
        """Fixes the probe, before the first step."""
        if self.probe is None or not self.rows:
            return
        with self.whole():
            if self.team.is_main:
                prompts = [self.encode(row.prompt) for row in self.rows[: self.cfg.eval.kl_probe]]
                self.probe.prepare(prompts, self.max_tokens, derive(self.cfg.seed, "probe"))

    def __call__(self, step: int):
        if not self.rows:
            return None
        e = self.cfg.eval
        how = hooked.Sampling(e.samples, e.temperature, e.top_p, self.max_tokens, derive(self.cfg.seed, "eval", step))
        ctx = self.context()
        services: Any = ctx.services
        cost, seconds, hook_seconds = dict(services.cost), dict(services.seconds), dict(self.stack.seconds)
        with self.whole():
            trajs, columns = hooked.rollouts(self.stack, ctx, self.engine, self.rows, how, self.encode, self.team)
            distance = {"kl/start": self.probe.kl()} if self.probe is not None and self.team.is_main else {}
        services.cost.update(cost)
        services.seconds.clear()
        services.seconds.update(seconds)
        self.stack.seconds.clear()
        self.stack.seconds.update(hook_seconds)
        if not self.team.is_main:
            return None
        results = hooked.as_results(trajs, e.samples)
        frame = score_results(self.task, self.rows, results, split=e.split).assign(**columns)
        return frame, {"eval/score": float(frame["score"].to_numpy().mean()), **distance}


def of_trainer(trainer, cfg, folder: Path) -> Measure:
    """The measure of a reinforcement-learning run."""
    return Measure(
        cfg,
        trainer.task,
        model=trainer.accelerator.unwrap_model(trainer.model),
        engine=trainer.services.engine,
        encode=lambda prompt: trainer.tokenize([prompt])[0],
        pad_id=trainer.services.tokenizer.pad_token_id,
        max_tokens=trainer.max_completion_length,
        stack=trainer.stack,
        context=lambda: trainer.new_context("eval"),
        folder=folder,
        team=trainer.team,
        whole=trainer.whole,
    )
