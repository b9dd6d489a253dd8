"""Overthinking in evaluation: how many steps help, and how much is thought after the answer is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from methods.base import Context, Trajectory
from methods.errors import ConfigError
from methods.vsrm.states import StateAccuracy, ineffective_share, post_solution_share


@dataclass
class Overthinking(StateAccuracy):
    """Two columns of any arm's evaluation, from the same state accuracies as VSRM; it changes nothing in training.

    `ineffective_steps`: share of the steps after which the accuracy is not higher; NaN without a step.
    `post_solution`: share of the thinking's tokens behind the first state with accuracy >= 0.8.
    Only the first sample of the first `items` items is measured, NaN elsewhere: each takes (K + 1) x `samples` short
    completions. ConfigError where the engine gives no token ids.
    """

    items: int = 64

    name = "overthinking"

    def eval_metrics(self, trajs: list[Trajectory], ctx: Context) -> dict[str, list[float]]:
        chosen = [i for i, t in enumerate(trajs) if t.sample_id == 0 and t.finish != "error"][: self.items]
        if ctx.tokenizer is None or any(not trajs[i].segments[-1].prompt_ids for i in chosen):
            raise ConfigError(
                "states are cut in token ids, and this engine gives none",
                where="engine",
                fix="choose engine=transformers or engine=vllm, or drop overthinking from method",
            )
        some = [trajs[i] for i in chosen]
        traces = self.traces(some, ctx)
        columns = {name: [math.nan] * len(trajs) for name in ("ineffective_steps", "post_solution")}
        for i, trace, accuracy in zip(chosen, traces, self.accuracies(some, traces, ctx), strict=True):
            if accuracy is not None:
                columns["ineffective_steps"][i] = ineffective_share(accuracy)
                columns["post_solution"][i] = post_solution_share(accuracy, trace)
            elif not trace.steps:
                columns["post_solution"][i] = 0.0
        return columns
