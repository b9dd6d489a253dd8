"""Tool calls as text: how a model writes them, how results are shown, and calling tools without trusting them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass
from typing import Any, Protocol

from methods.errors import ConfigError

Call = dict[str, Any]
"""`{"tool": name, "args": {name: value}}`."""


class Environment(Protocol):
    """What one rollout acts on; made anew for each rollout by `task.environment(row)`.

    It may have a method `resolve(text) -> str`: what the verifier reads in place of the last turn, where that refers to
    what the tools have shown.
    """

    tools: Mapping[str, Callable[..., str]]


@dataclass(frozen=True)
class ToolText:
    """The written form of calls and results.

    call: a regular expression of one call. Either it has a group `json` that holds `{"name": ..., "arguments":
    {...}}`, or its other named groups are the arguments of the one tool `tool`. opening: the text with which a call
    begins; a turn that holds it but no call that can be read is an attempt, kept as None. stop: texts at which a turn
    ends beside the end-of-sequence token. result: how a result is shown. chat: results become a message of the role
    `role`, through the chat template; otherwise they follow the call as they are.
    """

    call: str
    opening: str
    tool: str = ""
    stop: tuple[str, ...] = ()
    result: str = "{}"
    chat: bool = False
    role: str = "tool"

    def parse(self, text: str) -> list[Call | None]:
        """The calls of one turn in order, None for each that cannot be read; an empty list is an answer."""
        calls: list[Call | None] = []
        for part in text.split(self.opening)[1:]:
            match = re.match(self.call, self.opening + part, re.DOTALL)
            calls.append(self._call(match) if match else None)
        return calls

    def _call(self, match: re.Match) -> Call | None:
        groups = match.groupdict()
        if "json" not in groups:
            return {"tool": self.tool, "args": groups}
        try:
            written = json.loads(groups["json"])
        except (json.JSONDecodeError, RecursionError):
            return None
        if not isinstance(written, dict) or not isinstance(written.get("name"), str):
            return None
        arguments = written.get("arguments", {})
        return {"tool": written["name"], "args": arguments} if isinstance(arguments, dict) else None


@dataclass(frozen=True)
class Tools:
    """How the episodes of a task run (`task.tools`; None for a task that is one answer).

    max_calls: tool turns of an episode; a call beyond them is not carried out. max_turn_tokens: of one model turn
    (None: what is left of the completion). max_result_tokens: what is shown of one result. timeout: seconds for one
    call (None: tools are trusted to return). answer: a regular expression that a turn without a call must hold to
    count as an answer; any other turn is told `notice` and the episode goes on (None: every such turn is the answer).
    last: said before the results of the last tool turn, so that the model knows that an answer must follow.
    """

    form: ToolText
    max_calls: int = 4
    max_turn_tokens: int | None = None
    max_result_tokens: int = 256
    timeout: float | None = None
    answer: str | None = None
    notice: str = ""
    last: str = ""

    def read(self, text: str) -> tuple[str, list[Call | None]]:
        """What a turn is (call, answer or invalid) and its calls."""
        calls = self.form.parse(text)
        answer = not calls and (self.answer is None or re.search(self.answer, text, re.DOTALL) is not None)
        return "call" if calls else "answer" if answer else "invalid", calls


# The form of Qwen, Hermes and others: JSON between tags, results as a message of their own.
HERMES = ToolText(call=r"<tool_call>\s*(?P<json>\{.*?\})\s*</tool_call>", opening="<tool_call>", result="{}", chat=True)
# The form of Search-R1: one tool, its query between tags, the result in the same turn.
SEARCH = ToolText(
    call=r"<search>(?P<query>.*?)</search>",
    opening="<search>",
    tool="search",
    stop=("</search>",),
    result="\n\n<information>{}</information>\n\n",
)
FORMS = {"hermes": HERMES, "search": SEARCH}


class ResultIds:
    """The tokens that stand between a model's call and its next turn, never re-tokenised with it.

    For a chat form that is what the template puts between the end of an assistant's turn and the next one. ConfigError
    for a template that cannot show a tool's message or rewrites the turns before it.
    """

    def __init__(self, tokenizer: Any, form: ToolText) -> None:
        self.tokenizer = tokenizer
        before, after = _template_around(tokenizer, form.role) if form.chat else ("", "")
        opening, closing = form.result.split("{}")
        self.before, self.after = self._ids([before + opening, closing + after])

    def __call__(self, results: Sequence[str], most: int) -> list[list[int]]:
        """For each result at most `most` ids of its own, and what stands around it."""
        return [[*self.before, *inner[:most], *self.after] for inner in self._ids(results)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # Together: a call of the tokenizer costs far more than the few tokens of one result.
        return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]


def _template_around(tokenizer: Any, role: str) -> tuple[str, str]:
    asked = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "TURN"}]
    told = [*asked, {"role": role, "content": "RESULT"}]
    try:
        text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises whatever its author chose
        raise ConfigError(
            f"The chat template cannot show a message of the role '{role}'",
            where="model",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="choose a model whose template knows tools, or another form of calls",
        ) from error
    _, _, rest = text.partition("TURN")
    # The model itself wrote the end of its turn.
    rest = rest.removeprefix(tokenizer.eos_token)
    before, found, after = rest.partition("RESULT")
    if not found:
        raise ConfigError(
            "The chat template leaves a tool's message out", where="model", fix="choose a model that knows tools"
        )
    return before, after


# ---------------------------------------------------------------- calling


@dataclass
class ToolRunner:
    """Calls tools on behalf of a model. Whatever happens, the episode gets a text and the run lives.

    timeout: seconds after which a call is given up (None: tools are trusted to return, and are called directly). An
    abandoned thread goes on in the background. An unknown tool, wrong arguments, an exception and a result that is no
    text give a text that begins with `error:`. counts: calls, errors, timeouts since the start.
    """

    timeout: float | None = None
    most_characters: int = 20_000

    def __post_init__(self) -> None:
        self.counts = {"calls": 0, "unparsable": 0, "errors": 0, "timeouts": 0}
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, jobs: Sequence[tuple[Environment, Call | None]]) -> list[str]:
        """One text per call, in order; with a timeout they run side by side."""
        if self.timeout is None:
            return [self._text(self._run, env, call) for env, call in jobs]
        self._pool = self._pool or ThreadPoolExecutor(max_workers=32, thread_name_prefix="tool")
        waiting = [self._pool.submit(self._run, env, call) for env, call in jobs]
        return [self._text(future.result, self.timeout) for future in waiting]

    def _run(self, env: Environment, call: Call | None) -> str:
        if call is None:
            raise CannotRead("the call could not be read")
        if call["tool"] not in env.tools:
            raise LookupError(f"there is no tool '{call['tool']}'; there are {', '.join(env.tools)}")
        result = env.tools[call["tool"]](**call["args"])
        if not isinstance(result, str):
            raise TypeError(f"the tool returned {type(result).__name__} instead of text")
        return result[: self.most_characters]

    def _text(self, function: Callable[..., str], *args: Any) -> str:
        self.counts["calls"] += 1
        try:
            return function(*args)
        except CannotRead as error:
            self.counts["unparsable"] += 1
            return f"error: {error}"
        except TooLate:
            self.counts["timeouts"] += 1
            # The pool's threads may all be stuck; the next calls get fresh ones.
            self._pool = ThreadPoolExecutor(max_workers=32, thread_name_prefix="tool")
            return f"error: no result within {self.timeout:g} s"
        except Exception as error:
            self.counts["errors"] += 1
            return f"error: {str(error)[:500] or type(error).__name__}"


class CannotRead(ValueError):
    """A call that does not follow the form."""
