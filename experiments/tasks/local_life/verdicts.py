"""From rollouts to the cases that a judge reads, and from its verdicts to named values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.tasks.local_life import metrics
from experiments.tasks.local_life.judge import ANSWER, CONTEXT, TRAJECTORY, Judge
from experiments.tasks.local_life.playground import Playground, block

if TYPE_CHECKING:
    from methods.base import Trajectory

NAMES = 3  # merchants of each step that the judge of a trajectory sees
VALUES = (*(f"judge_{name}" for name in (*ANSWER, "total", *TRAJECTORY, "overall")), "judge_failed")
Episode = tuple[str, Sequence[metrics.Call]]


def build_judge(engine: Any, max_tokens: int) -> Judge:
    """The judge behind an engine; its verdicts are kept on disk."""
    from experiments.artefacts import cache_root, digest
    from experiments.engines.cache import CachedEngine

    kept = CachedEngine(engine, cache_root() / "requests" / digest(engine.identity())[:20])
    return Judge(kept, max_tokens)


def judged(
    judge: Judge, trajs: Sequence[Trajectory], episodes: Sequence[Episode], grounds: Sequence[Playground]
) -> list[dict[str, float]]:
    """`VALUES` of each rollout; NaN and `judge_failed` 1 where a verdict could not be had, NaN alone for a rollout that
    an engine's error ended. An id that was never retrieved is a veto on correctness, whatever the judge says."""
    live = [i for i, traj in enumerate(trajs) if traj.finish != "error"]
    answers = judge.answers([answer_case(trajs[i], *episodes[i], grounds[i]) for i in live])
    steps = judge.trajectories([trajectory_case(trajs[i], *episodes[i], grounds[i]) for i in live])
    values: list[dict[str, float]] = [dict.fromkeys(VALUES, math.nan) for _ in trajs]
    for i, answer, step in zip(live, answers, steps, strict=True):
        reply, calls = episodes[i]
        values[i]["judge_failed"] = float(answer is None)
        if answer is not None:
            cited = metrics.cited(reply)
            veto = bool(cited) and not metrics.in_context(cited, metrics.retrieved(calls))
            values[i] |= {f"judge_{name}": score for name, score in answer.items()}
            values[i]["judge_correctness"] *= not veto
            values[i]["judge_total"] -= answer["correctness"] - values[i]["judge_correctness"]
        values[i] |= {f"judge_{name}": score for name, score in (step or {}).items()}
    return values


def answer_case(traj: Trajectory, reply: str, calls: Sequence[metrics.Call], ground: Playground) -> dict[str, Any]:
    """What the judge of an answer reads; the context is every merchant that a search returned, once."""
    found = list(dict.fromkeys(poi for call in calls for poi in call.found))
    context = "\n".join(block(ground.world.merchant(poi)) for poi in found)
    return {
        "question": traj.row.prompt[-1]["content"],
        "conversation": [turn.text for turn in traj.turns[:-1]],
        "calls": [{"round": c.round, "tool": c.tool, "query": c.query, "ok": c.ok} for c in calls],
        "reply": reply,
        "answer": metrics.answer_part(reply),
        "reference": traj.row.meta["reference"],
        "retrieved context": context[:CONTEXT],
    }


def trajectory_case(traj: Trajectory, _: str, calls: Sequence[metrics.Call], ground: Playground) -> dict[str, Any]:
    """What the judge of a trajectory reads: per step the tool, query, success, number of results, first names."""
    steps = [
        {
            "round": call.round,
            "tool": call.tool,
            "query": call.query,
            "ok": call.ok,
            "results": len(call.found),
            "first": [ground.world.merchant(poi).name for poi in call.found[:NAMES]],
        }
        for call in calls
    ]
    return {"question": traj.row.prompt[-1]["content"], "reference": traj.row.meta["reference"], "steps": steps}
