"""Answers after exactly so many searches, for the study of accuracy against depth."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from methods.autosearch.probes import observed
from methods.base import Context, Method, Segment, Trajectory, Turn
from methods.errors import ConfigError, check_range


@dataclass
class ForcedDepth(Method):
    """Every episode of an evaluation searches exactly `depth` times and then answers.

    The policy's own episode is cut after `depth` searches, or goes on with forced ones, so that all depths share what
    they can. A forced turn begins with `search_opening` and ends at `search_closing`; `search_form` is a regular
    expression whose groups are the arguments of the environment's one tool, and `result` shows what it returns. The
    answer begins with `answer_opening`. Forced turns are greedy.

    Degenerate: a search that cannot be read, or a tool that raises, shows a text that begins with `error:` and counts;
    a turn that cannot be generated is empty. In training, and for a task without tools, nothing is forced.
    """

    depth: int = 2
    search_opening: str = "<search>"
    search_closing: str = "</search>"
    search_form: str = r"<search>(?P<query>.*?)</search>"
    result: str = "\n\n<information>{}</information>\n\n"
    answer_opening: str = "<answer>"
    turn_tokens: int = 64

    name = "forced_depth"

    def __post_init__(self) -> None:
        check_range("method.forced_depth.depth", self.depth, 0)
        check_range("method.forced_depth.turn_tokens", self.turn_tokens, 1)
        if "{}" not in self.result:
            raise ConfigError(
                "the form of a result has no place for it",
                where="method.forced_depth.result",
                got=self.result,
                expected="a text with {}",
            )
        try:
            re.compile(self.search_form)
        except re.error as error:
            raise ConfigError(
                "the form of a search is no regular expression",
                where="method.forced_depth.search_form",
                got=f"{self.search_form}: {error}",
            ) from error

    def rollout(self, rows: list[Any], ctx: Context, default: Callable[..., list[Trajectory]]) -> list[Trajectory]:
        trajs = default(rows)
        if ctx.mode != "eval" or ctx.env(rows[0]) is None:
            return trajs
        episodes = [Forced(traj, ctx.env(traj.row), self.depth) for traj in trajs]
        while going_on := [e for e in episodes if len(e.turns) < self.depth]:
            for episode, (start, text) in zip(going_on, self._write(going_on, self.search_opening, ctx), strict=True):
                call = self._call(text, episode)
                shown = episode.called(call)
                episode.turns.append(Turn(0, start, len(episode.ids), "call", [call], shown))
                ids = ctx.tokenizer(self.result.format(shown), add_special_tokens=False)["input_ids"]
                episode.add(ids, by_model=False)
        written = self._write(episodes, self.answer_opening, ctx)
        return [e.trajectory(start, text) for e, (start, text) in zip(episodes, written, strict=True)]

    def _write(self, episodes: list[Forced], opening: str, ctx: Context) -> list[tuple[int, str]]:
        """One turn of each episode that begins with `opening`: where it starts, and its text."""
        begun = ctx.tokenizer(opening, add_special_tokens=False)["input_ids"]
        how = {"max_tokens": self.turn_tokens, "temperature": 0.0, "stop": (self.search_closing,)}
        requests = [{"prompt_ids": [*e.prompt_ids, *e.ids, *begun], **how} for e in episodes]
        out = []
        for episode, answer in zip(episodes, ctx.generate(requests, stream="forced_depth"), strict=True):
            start, ids = len(episode.ids), [*begun, *(answer[0].ids or [])]
            episode.add(ids, by_model=True)
            out.append((start, ctx.tokenizer.decode(ids, skip_special_tokens=True)))
        return out

    def _call(self, text: str, episode: Forced) -> dict[str, Any] | None:
        found = re.match(self.search_form, text, re.DOTALL)
        return {"tool": next(iter(episode.env.tools)), "args": found.groupdict()} if found else None


class Forced:
    """One episode while it is cut or prolonged; `turns` holds its searches with their results."""

    def __init__(self, traj: Trajectory, env: Any, depth: int) -> None:
        self.traj, self.env = traj, env
        kept = observed(traj)[:depth]
        segment = traj.segments[0]
        starts = [*(turn.start for turn in traj.turns), len(segment.completion_ids)]
        end = starts[kept[-1] + 1] if kept else 0
        self.prompt_ids, self.ids = list(segment.prompt_ids), list(segment.completion_ids[:end])
        self.mask = list(segment.model_mask or [1] * len(segment.completion_ids))[:end]
        self.turns = [traj.turns[k] for k in kept]
        for turn in self.turns:  # a world whose answers depend on the calls before is brought to the same place
            for call in turn.calls:
                self.called(call)

    def called(self, call: dict[str, Any] | None) -> str:
        if call is None:
            return "error: the call could not be read"
        try:
            return str(self.env.tools[call["tool"]](**call["args"]))
        except Exception as error:  # a tool raises whatever its author chose
            return f"error: {error}"

    def add(self, ids: list[int], by_model: bool) -> None:
        self.ids += ids
        self.mask += [int(by_model)] * len(ids)

    def trajectory(self, start: int, text: str) -> Trajectory:
        """The episode with the turn from `start` on as its answer."""
        turns = [*self.turns, Turn(0, start, len(self.ids), "answer")]
        segments = [Segment(self.prompt_ids, self.ids, model_mask=self.mask)]
        return replace(self.traj, segments=segments, turns=turns, finish="stop", text=text)
