"""Episodes through an engine that knows texts and no token ids, such as an endpoint: for evaluation only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.engines.base import Request, Result
from experiments.rollout import carry_out, resolved
from experiments.seeds import derive
from experiments.tokenizers import plain_text
from experiments.tools import Environment, ToolRunner, Tools, ToolText
from methods.base import Segment, Trajectory, Turn
from methods.errors import ConfigError

CHARACTERS = 4  # of a token, roughly: where only texts are known, a result is cut by its characters


@dataclass
class Conversation:
    """One episode while it grows; `left` is how many tokens the model may still write.

    A result in chat form becomes a message of its own. In a form without chat it goes on in the assistant's message,
    which the next request then continues: vLLM and SGLang can, others refuse it.
    """

    env: Environment
    messages: list[dict[str, str]]
    left: int
    turns: list[Turn] = field(default_factory=list)
    text: str = ""
    finish: str = "length"

    def add(self, role: str, text: str) -> None:
        if role == "assistant" == self.messages[-1]["role"]:
            self.messages[-1] = {"role": role, "content": self.messages[-1]["content"] + text}
        else:
            self.messages.append({"role": role, "content": text})

    def request(self, plain: bool, tools: Tools, **how: Any) -> Request:
        budget = min(self.left, tools.max_turn_tokens or self.left)
        if not plain:
            return Request(messages=list(self.messages), max_tokens=budget, stop=tools.form.stop, **how)
        text = self.messages[0]["content"] if len(self.messages) == 1 else plain_text(self.messages)
        if text is None:
            raise ConfigError(
                "This form of calls needs messages, and the endpoint takes plain text",
                where="engine.endpoint",
                got="completions",
                fix="set engine.endpoint=chat, or choose a form of calls without messages such as task.form=search",
            )
        return Request(prompt=text, max_tokens=budget, stop=tools.form.stop, **how)

    def record(self, result: Result, tools: Tools) -> bool:
        """Takes a turn in; whether the episode waits for results. An engine's error ends it, its reason as the text."""
        if result.finish == "error":
            self.text, self.finish = result.error or "", "error"
            return False
        self.text = result.text if result.finish == "length" else closed(result.text, tools.form)
        kind, calls = tools.read(self.text)
        start, written = self.turns[-1].end if self.turns else 0, result.usage.completion_tokens
        self.turns.append(Turn(0, start, start + written, kind, calls, text=self.text))
        self.left -= max(written, 1)
        self.add("assistant", self.text)
        if kind == "answer" and result.finish == "stop":
            self.finish = "stop"
        return result.finish == "stop" and kind != "answer" and len(self.turns) <= tools.max_calls and self.left > 0

    def tell(self, result: str, tools: Tools) -> None:
        shown = tools.form.result.format(result[: CHARACTERS * tools.max_result_tokens])
        self.add(tools.form.role if tools.form.chat else "assistant", shown)


def closed(text: str, form: ToolText) -> str:
    """`text` with the stop text that the engine cut off, where that completes its last call."""
    whole = (text + stop for stop in form.stop if form.parse(text)[-1:] == [None])
    return next((t for t in whole if form.parse(t)[-1] is not None), text)


def episodes(task: Any, rows: Sequence[Any], engine: Any, seeds: Sequence[int], max_tokens: int, **how: Any):
    """One `Conversation` per row of a task with tools, as `rollout.ToolLoop` runs them, all live ones together.

    max_tokens counts what the model writes; what tools say is cut by characters and not counted, because nobody here
    knows its tokens. how: `temperature` and `top_p`. A turn's `start:end` counts tokens of the model as the engine
    reports them.
    """
    tools: Tools = task.tools
    runner = ToolRunner(tools.timeout)
    plain = getattr(getattr(engine, "engine", engine), "endpoint", "chat") == "completions"
    talks = []
    for row in rows:
        asked = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
        talks.append(Conversation(task.environment(row), asked, max_tokens))
    live, turn = list(range(len(talks))), 0
    while live:
        requests = [talks[i].request(plain, tools, seed=derive(seeds[i], "turn", turn), **how) for i in live]
        results = [r[0] for r in engine.generate(requests)]
        live = [i for i, result in zip(live, results, strict=True) if talks[i].record(result, tools)]
        carry_out(runner, tools, [talks[i] for i in live])
        for i in live:
            talks[i].tell(talks[i].turns[-1].result or "", tools)
        turn += 1
    return talks


def trajectory(talk: Conversation, row: Any, group_id: int, sample_id: int) -> Trajectory:
    """The record that methods see, without ids; an error has the engine's reason as its text."""
    text = talk.text if talk.finish == "error" else resolved(talk.env, talk.text)
    return Trajectory(row.id, group_id, sample_id, [Segment([], [])], talk.turns, talk.finish, text=text, row=row)
