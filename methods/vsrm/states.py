"""Accuracy of intermediate states: cut the thinking, force an answer a few times, see how often it is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from methods.base import Context, Method, Trajectory
from methods.errors import ConfigError, check_range
from methods.vsrm.segmentation import CLOSE, CUES, Pieces, Trace, cue_pattern, segment

SOLVED = 0.8  # a state from which so many answers are right counts as solved
INEFFECTIVE = 1e-5  # a step that gains no more than this does not help


@dataclass
class StateAccuracy(Method):
    """Segments trajectories and estimates A_1..A_{K+1} of each by `samples` continuations per state.

    State j is prompt + response up to the first token of step j + `</think>`; state K+1 holds the whole thinking.
    An unclosed thinking is closed at its end. A continuation for which the verifier raises (or says NaN) scores 0 and
    is counted; a trajectory with a state that cannot be continued (context full) is left out and counted.
    """

    cues: Sequence[str] = CUES
    word_boundary: bool = True
    first_gap: int = 1000
    gap: int = 400
    samples: int = 5
    max_tokens: int = 768
    temperature: float = 0.6
    top_p: float = 0.95
    counts: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        where = f"method.{self.name}"
        if not self.cues or any(not isinstance(cue, str) or not cue for cue in self.cues):
            raise ConfigError("steps are opened by cue words", where=f"{where}.cues", got=list(self.cues))
        for key, least in (("first_gap", 0), ("gap", 0), ("samples", 1), ("max_tokens", 1)):
            check_range(f"{where}.{key}", getattr(self, key), least)
        self._pattern = cue_pattern(list(self.cues), self.word_boundary)
        self._pieces: Pieces | None = None

    def traces(self, trajs: Sequence[Trajectory], ctx: Context) -> list[Trace]:
        """The segmented response of each trajectory (its last segment)."""
        if self._pieces is None or self._pieces.tokenizer is not ctx.tokenizer:
            self._pieces = Pieces(ctx.tokenizer)
        of = self._pieces
        return [segment(of(t.segments[-1].completion_ids), self._pattern, self.first_gap, self.gap) for t in trajs]

    def accuracies(
        self, trajs: Sequence[Trajectory], traces: Sequence[Trace], ctx: Context
    ) -> list[list[float] | None]:
        """A_1..A_{K+1} per trajectory, None where there is no step or a state could not be continued.

        All states of all trajectories are continued in one call.
        """
        owners = [i for i, trace in enumerate(traces) if trace.steps]
        close = closing_ids(ctx.tokenizer) if owners else []
        how = {"n": self.samples, "max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        requests, rows = [], []
        for i in owners:
            last = trajs[i].segments[-1]
            for cut in traces[i].cuts:
                requests.append({"prompt_ids": [*last.prompt_ids, *last.completion_ids[:cut], *close], **how})
                rows.append(trajs[i].row)
        results = ctx.generate(requests, stream=self.name) if requests else []
        texts = [answer.text for answers in results for answer in answers]
        scores = self._score(texts, [row for row in rows for _ in range(self.samples)], ctx)
        failed = [any(answer.finish == "error" for answer in answers) for answers in results]
        self.counts |= {
            "states": float(len(requests)),
            "state_tokens": float(sum(len(answer.ids or ()) for answers in results for answer in answers)),
        }
        means = [sum(scores[k : k + self.samples]) / self.samples for k in range(0, len(scores), self.samples)]
        out: list[list[float] | None] = [None] * len(trajs)
        at = 0
        for i in owners:
            count = len(traces[i].steps) + 1
            out[i] = None if any(failed[at : at + count]) else means[at : at + count]
            at += count
        self.counts["unmeasured"] = float(sum(out[i] is None for i in owners))
        return out

    def _score(self, texts: list[str], rows: list[Any], ctx: Context) -> list[float]:
        try:
            scores = ctx.score(texts, rows) if texts else []
        except Exception:  # one bad answer must not cost the others: find it
            scores = [self._one(text, row, ctx) for text, row in zip(texts, rows, strict=True)]
        wrong = [math.isnan(score) for score in scores]
        self.counts["verifier_errors"] = float(sum(wrong))
        return [0.0 if bad else float(score) for bad, score in zip(wrong, scores, strict=True)]

    def _one(self, text: str, row: Any, ctx: Context) -> float:
        try:
            return ctx.score([text], [row])[0]
        except Exception:  # whatever a verifier raises on what a model wrote
            return math.nan


def closing_ids(tokenizer: Any) -> list[int]:
    """Ids of `</think>`. ConfigError if the vocabulary cannot spell it."""
    ids = list(tokenizer(CLOSE, add_special_tokens=False)["input_ids"])
    if getattr(tokenizer, "unk_token_id", None) in ids:
        raise ConfigError(
            "the tokenizer cannot write the tag that closes a thinking block",
            where="the vocabulary of the model",
            got=f"no token for '{CLOSE}'",
            fix="choose a task whose symbols hold it, such as task=chain, or a model with a full vocabulary",
        )
    return ids


def ineffective_share(accuracy: Sequence[float]) -> float:
    """Share of the K steps whose gain A_{j+1} - A_j is at most 1e-5; NaN for K = 0."""
    gains = [b - a for a, b in pairwise(accuracy)]
    return sum(gain <= INEFFECTIVE for gain in gains) / len(gains) if gains else math.nan


def post_solution_share(accuracy: Sequence[float], trace: Trace) -> float:
    """Share of the thinking's tokens behind the first state with A >= 0.8; 0 if no state is that good."""
    solved = [cut for cut, a in zip(trace.cuts, accuracy, strict=True) if a >= SOLVED]
    return (trace.end - solved[0]) / max(trace.end - trace.begin, 1) if solved else 0.0
