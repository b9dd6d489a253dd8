"""Multi-turn rollouts with tools: token in, token out, all live episodes of a batch advanced together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from experiments.tools import Environment, ResultIds, ToolRunner, Tools
from experiments.vision import images_of
from methods.base import Segment, Trajectory, Turn


class Writer(Protocol):
    """Lets a model write one turn of several rows (`CachedDecoder`, or `EngineWriter` over any engine with ids)."""

    def write(self, appended: dict[int, list[int]], budget: dict[int, int]) -> dict[int, list[int]]: ...


@dataclass
class Episode:
    """One rollout while it grows: at most `room` ids; `mask` is 1 on those that the model wrote."""

    env: Environment
    room: int
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish: str = "length"

    def add(self, ids: Sequence[int], by_model: bool) -> None:
        self.ids += ids
        self.mask += [int(by_model)] * len(ids)

    def trajectory(self, row: Any, prompt_ids: list[int], group_id: int, sample_id: int) -> Trajectory:
        """The record that methods see; `text` is the last turn, which the verifier reads."""
        return Trajectory(
            row_id=row.id,
            group_id=group_id,
            sample_id=sample_id,
            segments=[Segment(prompt_ids, self.ids, model_mask=self.mask)],
            turns=self.turns,
            finish=self.finish,
            text=resolved(self.env, self.texts[-1]),
            row=row,
        )


class ToolLoop:
    """Writes turns, carries out their calls, appends the results, until each episode has given an answer.

    An episode ends with an answer (finish `stop`), with a turn cut by its budget or the model's context, with a call
    beyond `tools.max_calls`, or where a result leaves no room for a further turn (finish `length`; that result is left
    out of the ids). A call that cannot be read, an unknown tool, a tool that raises, hangs or returns too much: the
    episode goes on with a text that says so. max_tokens: of a whole completion, tool text included.
    """

    def __init__(
        self, tokenizer: Any, tools: Tools, max_tokens: int, ends: set[int], runner: ToolRunner, context: int = 2**31
    ) -> None:
        self.tokenizer, self.tools, self.max_tokens, self.ends = tokenizer, tools, max_tokens, ends
        self.runner, self.context = runner, context
        self.result_ids = ResultIds(tokenizer, tools.form)

    def run(self, writer: Writer, prompts: Sequence[list[int]], envs: Sequence[Environment]) -> list[Episode]:
        most = self.max_tokens
        episodes = [Episode(env, min(most, self.context - len(p))) for env, p in zip(envs, prompts, strict=True)]
        appended = {i: list(ids) for i, ids in enumerate(prompts) if episodes[i].room > 0}
        for episode in episodes:
            if episode.room < 1:  # the prompt alone fills the context
                self._record(episode, [], "")
        while appended:
            written = writer.write(appended, {i: self._budget(episodes[i]) for i in appended})
            texts = self.tokenizer.batch_decode(
                list(written.values()), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            turns = zip(written.items(), texts, strict=True)
            going_on = [i for (i, ids), text in turns if self._record(episodes[i], ids, text)]
            appended = self._answer(episodes, going_on)
        return episodes

    def _budget(self, episode: Episode) -> int:
        room = episode.room - len(episode.ids)
        return min(room, self.tools.max_turn_tokens or room)

    def _record(self, episode: Episode, ids: list[int], text: str) -> bool:
        """Records a turn of the model; whether the episode waits for results."""
        kind, calls = self.tools.read(text)
        cut = not ids or (ids[-1] not in self.ends and not any(s in text for s in self.tools.form.stop))
        episode.turns.append(Turn(0, len(episode.ids), len(episode.ids) + len(ids), kind, calls, text=text))
        episode.add(ids, by_model=True)
        episode.texts.append(text)
        if not episode.ids:  # nothing could be written; a completion has at least one id
            episode.add([min(self.ends)], by_model=False)
        episode.finish = "stop" if kind == "answer" and not cut else "length"
        return not cut and kind != "answer" and len(episode.turns) <= self.tools.max_calls

    def _answer(self, episodes: list[Episode], going_on: list[int]) -> dict[int, list[int]]:
        """Carries out all calls of this round; the ids that follow, for the episodes that have room to go on."""
        carry_out(self.runner, self.tools, [episodes[i] for i in going_on])
        shown = self.result_ids([episodes[i].turns[-1].result or "" for i in going_on], self.tools.max_result_tokens)
        appended = {}
        for i, ids in zip(going_on, shown, strict=True):
            if len(episodes[i].ids) + len(ids) < episodes[i].room:
                episodes[i].add(ids, by_model=False)
                appended[i] = ids
        return appended


class Talk(Protocol):
    """What `carry_out` needs of an episode."""

    env: Environment
    turns: list[Turn]


def carry_out(runner: ToolRunner, tools: Tools, waiting: Sequence[Talk]) -> None:
    """Sets the `result` of each episode's latest turn: those of its calls, line by line, or the notice that it was no
    answer. What is said before the last results comes first, where no cut can lose it."""
    results = iter(runner([(talk.env, call) for talk in waiting for call in talk.turns[-1].calls]))
    for talk in waiting:
        turn = talk.turns[-1]
        shown = [next(results) for _ in turn.calls] or [tools.notice]
        last = [tools.last] if tools.last and len(talk.turns) == tools.max_calls else []
        turn.result = "\n".join(last + shown)


def resolved(env: Environment, text: str) -> str:
    """What the verifier reads of an episode's last turn."""
    resolve = getattr(env, "resolve", None)
    return resolve(text) if resolve else text


def episodes(
    task: Any,
    rows: Sequence[Any],
    prompts: Sequence[list[int]],
    engine: Any,
    tokenizer: Any,
    seeds: Sequence[int],
    max_tokens: int,
    *,
    temperature: float,
    top_p: float,
) -> list[Episode]:
    """One episode per row of a task with tools, each in an environment of its own; row i samples from `seeds[i]`."""
    tools: Tools = task.tools
    how = {"temperature": temperature, "top_p": top_p, "stop": tools.form.stop}
    runner = ToolRunner(tools.timeout)
    loop = ToolLoop(tokenizer, tools, max_tokens, engine.ends(), runner, engine.context())
    envs = [task.environment(row) for row in rows]
    images = [tuple(images_of(row.prompt)) for row in rows]
    return loop.run(writer_for(engine, tokenizer, seeds, max_tokens, images, **how), prompts, envs)


class EngineWriter:
    """Turns through an engine that knows ids: the whole history is sent each time, so a prefix cache pays."""

    def __init__(
        self,
        engine: Any,
        seeds: Sequence[int],
        images: Sequence[tuple] = (),
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: tuple[str, ...] = (),
    ) -> None:
        self.engine, self.seeds = engine, seeds
        self.images = images or [()] * len(seeds)
        self.how = {"temperature": temperature, "top_p": top_p, "stop": stop}
        self.history: dict[int, list[int]] = {}
        self.turn = 0

    def write(self, appended: dict[int, list[int]], budget: dict[int, int]) -> dict[int, list[int]]:
        from experiments.engines.base import Request
        from experiments.seeds import derive

        requests = []
        for row, ids in appended.items():
            self.history[row] = self.history.get(row, []) + ids
            seed = derive(self.seeds[row], "turn", self.turn)
            asked = {"prompt_ids": self.history[row], "images": self.images[row]}
            requests.append(Request(**asked, max_tokens=budget[row], seed=seed, **self.how))
        self.turn += 1
        results = [r[0] for r in self.engine.generate(requests)]
        written = {}
        for row, result in zip(appended, results, strict=True):
            written[row] = list(result.ids or [])
            self.history[row] = self.history[row] + written[row]
        return written


def writer_for(
    engine: Any, tokenizer: Any, seeds: Sequence[int], most: int, images: Sequence[tuple] = (), **how: Any
) -> Writer:
    """The cached decoder on a model of this process whose layers allow it, else the engine; it alone takes images."""
    from experiments.engines.transformers import TransformersEngine

    if isinstance(engine, TransformersEngine) and not any(images):
        from experiments.decoder import CachedDecoder, supports

        if supports(engine.model):
            return CachedDecoder(engine.model, tokenizer, seeds, most, **how)
    return EngineWriter(engine, seeds, images, **how)
