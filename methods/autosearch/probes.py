"""Self-answers: what the policy would answer after each of its searches, asked apart from the trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from methods.base import Context, Trajectory

ASK = (
    "Answer the question from the search trajectory below. Think first, then give the final answer in a few words "
    "inside <answer> and </answer>.\n\nQuestion: {question}\n\nTrajectory:\n{trajectory}"
)


@dataclass
class SelfAnswers:
    """One trajectory's self-answers after its n observations: texts, right (the verifier's score above 1/2), f1."""

    texts: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)


def observed(traj: Trajectory) -> list[int]:
    """Indices of the turns that were followed by an observation (a result, or a notice of an invalid action)."""
    return [k for k, turn in enumerate(traj.turns) if turn.result is not None]


def _request(
    traj: Trajectory, turn: int, opening: list[int], ctx: Context, budget: int, temperature: float
) -> dict[str, Any]:
    """The probe after the observation of `turn`: the history up to and including it."""
    segment = traj.segments[traj.turns[turn].segment]
    following = traj.turns[turn + 1].start if turn + 1 < len(traj.turns) else len(segment.completion_ids)
    history = segment.completion_ids[:following]
    how = {"max_tokens": budget, "temperature": temperature}
    if opening:
        return {"prompt_ids": [*segment.prompt_ids, *history, *opening], **how}
    text = ctx.tokenizer.decode(history, skip_special_tokens=True)
    question = (getattr(traj.row, "meta", None) or {}).get("question", traj.row.prompt)
    return {"prompt": ASK.format(question=question, trajectory=text), **how}


def self_answers(
    trajs: Sequence[Trajectory], ctx: Context, forced: str, budget: int, temperature: float
) -> list[SelfAnswers]:
    """Probes of all trajectories in one generation; none of them becomes part of a trajectory.

    forced: the opening of an answer that is put behind the history; empty: a prompt of its own that shows the question
    and the history. A probe that fails counts as an empty answer.
    """
    places = [(i, k) for i, traj in enumerate(trajs) for k in observed(traj)]
    opening = ctx.tokenizer(forced, add_special_tokens=False)["input_ids"] if forced else []
    requests = [_request(trajs[i], k, opening, ctx, budget, temperature) for i, k in places]
    results = ctx.generate(requests, stream="autosearch") if requests else []
    texts = ["" if r[0].finish == "error" else forced + r[0].text for r in results]
    rows = [trajs[i].row for i, _ in places]
    out = [SelfAnswers() for _ in trajs]
    for (i, _), text, score, more in zip(places, texts, ctx.score(texts, rows), ctx.measure(texts, rows), strict=True):
        out[i].texts.append(text)
        out[i].right.append(more.get("em", score) > 0.5)
        out[i].f1.append(more.get("f1", score))
    return out
