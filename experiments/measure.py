"""Evaluation of the live policy between training steps: fixed items, own random stream, hooks in evaluation mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.engines.base import Request, Result, Usage
from experiments.evaluate import score_results
from experiments.probe import Probe
from experiments.seeds import derive
from methods.base import Context, Segment, Trajectory, Turn


class Measure:
    """`measure(step)` gives the rows of eval.parquet and extra metrics (`kl/start`, `eval/score`).

    Items are fixed by `eval.seed`, so that arms and seeds pair on them; sampling is seeded by the run. What it
    generates is not a cost of the method.
    """

    def __init__(self, trainer, cfg, folder: Path) -> None:
        self.trainer, self.cfg = trainer, cfg
        self.engine = trainer.services.engine
        self.engine.batch_size = cfg.eval.batch_size
        model, pad = trainer.accelerator.unwrap_model(trainer.model), trainer.services.tokenizer.pad_token_id
        self.probe = Probe(model, self.engine, pad, folder / "probe.safetensors") if cfg.eval.kl_probe else None
        self.rows: list[Any] = []

    def prepare(self) -> None:
        e = self.cfg.eval
        self.rows = self.trainer.task.rows(e.split, e.seed)[: e["items"]]
        if self.probe is not None and self.rows:
            prompts = self._prompt_ids(self.rows[: e.kl_probe])
            self.probe.prepare(prompts, self.trainer.max_completion_length, derive(self.cfg.seed, "probe"))

    def _prompt_ids(self, rows) -> list[list[int]]:
        return self.trainer.tokenize([row.prompt for row in rows])

    def __call__(self, step: int):
        if not self.rows:
            return None
        trajs, columns = self.rollouts(step)
        samples = self.cfg.eval.samples
        results = [_as_result(t) for t in trajs]
        grouped = [results[i : i + samples] for i in range(0, len(results), samples)]
        items = [t.row for t in trajs[::samples]]
        frame = score_results(self.trainer.task, items, grouped, split=self.cfg.eval.split)
        frame = frame.assign(**columns)
        extra = {"eval/score": float(frame["score"].mean())}
        if self.probe is not None:
            extra["kl/start"] = self.probe.kl()
        return frame, extra

    def rollouts(self, step: int) -> tuple[list[Trajectory], dict[str, list[float]]]:
        """Trajectories of every item and sample, and the methods' own columns."""
        trainer, samples = self.trainer, self.cfg.eval.samples
        ctx: Context = trainer.new_context("eval")
        ctx.group_size = samples
        cost = dict(trainer.cost)
        ctx.rows = trainer.stack.prepare_rows([row for row in self.rows for _ in range(samples)], ctx)
        ctx.trajs = trainer.stack.rollout(ctx.rows, ctx, lambda rows: self._sample(rows, step))
        columns = trainer.stack.eval_metrics(ctx.trajs, ctx)
        trainer.cost.update(cost)
        return ctx.trajs, columns

    def _sample(self, rows, step: int) -> list[Trajectory]:
        trainer, e = self.trainer, self.cfg.eval
        prompts = self._prompt_ids(rows)
        base = derive(self.cfg.seed, "eval", step)
        requests = [
            Request(
                prompt_ids=ids,
                max_tokens=trainer.max_completion_length,
                temperature=e.temperature,
                top_p=e.top_p,
                seed=derive(base, i),
            )
            for i, ids in enumerate(prompts)
        ]
        results = [r[0] for r in self.engine.generate(requests)]
        return [
            Trajectory(
                row_id=row.id,
                group_id=i // e.samples,
                sample_id=i % e.samples,
                segments=[Segment(requests[i].prompt_ids or [], result.ids or [])],
                turns=[Turn(0, 0, len(result.ids or []))],
                finish=result.finish,
                text=result.text,
                row=row,
            )
            for i, (row, result) in enumerate(zip(rows, results, strict=True))
        ]


def _as_result(t: Trajectory) -> Result:
    return Result(t.text, None, None, t.finish, Usage(0, t.length))
