"""Request, Result and the Engine protocol: ask any model for text in the same words.

Three engines speak it: `transformers` (a live model in this process), `vllm` (its offline engine) and `openai`
(any compatible endpoint). This module imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

from experiments.tokenizers import chat_ids, plain_text, prefilled
from methods.errors import ConfigError

Progress = Callable[[int], None]
"""Called with the number of requests that were finished since the last call."""


@dataclass(frozen=True)
class Request:
    """One prompt and how to sample from it. Exactly one of `messages`, `prompt` and `prompt_ids` is set.

    prompt: plain text; an engine with a chat model wraps it into one user message, others use it raw.
    n: completions wanted; each has a random stream of its own, derived from `seed`.
    max_tokens: longest completion, in tokens. temperature: 0 is greedy decoding.
    stop: the completion ends before the first of these strings; `Result.ids` still hold the tokens that spelled it.
    seed: None asks for any randomness; such a request is not cached unless it is greedy.
    json_schema: the completion must be JSON of this schema (engines `vllm` and `openai`).
    images: those of `prompt_ids`, which hold their image tokens (engine `transformers`); never cached.

    Raises ConfigError for values outside their range.
    """

    messages: list[dict] | None = None
    prompt: str | None = None
    prompt_ids: list[int] | None = None
    n: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    json_schema: dict | None = None
    images: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("messages", "prompt", "prompt_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                "A request has exactly one prompt",
                got=" and ".join(given) or "none",
                expected="one of messages, prompt, prompt_ids",
            )
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for key, bad, expected in (
            ("n", self.n < 1, "at least 1"),
            ("max_tokens", self.max_tokens < 1, "at least 1"),
            ("temperature", not 0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            ("top_p", not 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("stop", "" in self.stop, "strings with at least one character"),
            ("messages", self.messages == [], "at least one message"),
        ):
            if bad:
                raise ConfigError(
                    "A request asks for the impossible", where=key, got=getattr(self, key), expected=expected
                )

    @property
    def repeatable(self) -> bool:
        """Whether asking twice may be answered once: greedy, or sampled with a seed, and without images."""
        if self.images:
            return False
        return self.temperature == 0 or self.seed is not None


@dataclass(frozen=True)
class Usage:
    """Tokens of one result. The prompt counts in full in each of the n results of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Result:
    """One completion.

    text: without the stop string and without special tokens.
    ids: the tokens sampled, with the end-of-sequence token if there was one, without padding; None if not known.
    logprobs: one natural logarithm per id, under the model itself (temperature 1, no nucleus); None if not asked for.
    finish: "stop" (end of sequence or a stop string), "length" (token budget or context full), "error".
    error: for finish "error" what went wrong with this request; its text is empty and it must not be scored as 0.
    """

    text: str
    ids: list[int] | None
    logprobs: list[float] | None
    finish: Literal["stop", "length", "error"]
    usage: Usage = Usage()
    error: str | None = None


TOO_LONG = "the prompt fills the context"
"""How the error of a request begins that no second attempt can mend."""


def failed(request: Request, error: str, prompt_tokens: int = 0) -> list[Result]:
    """The n results of a request that could not be served."""
    return [Result("", None, None, "error", Usage(prompt_tokens, 0), error)] * request.n


@runtime_checkable
class Engine(Protocol):
    """What evaluation, judges and synthesis know of an engine."""

    name: str

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[list[Result]]:
        """One inner list of length n per request, in the order of the requests."""
        ...

    def close(self) -> None:
        """Free what the engine holds; calling it twice is fine."""
        ...


class BaseEngine:
    """`generate` on top of a stream of finished requests, with token counts; the three engines fill in `_stream`."""

    name = "engine"
    needs: Literal["model", "folder", "nothing"] = "nothing"
    tokenizer: Any = None  # where the engine works on token ids
    chat = False  # plain prompts become one user message
    halted = False  # a stream under way ends after the answers that are computed already

    def __init__(self) -> None:
        self._cost: dict[str, float] = {"requests": 0, "errors": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def _stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Result]]]:
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """JSON that names everything but the request on which an answer depends; the cache key. No secret."""
        raise NotImplementedError

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Result]]]:
        """(index of the request, its n results), as they are finished, in any order."""
        for index, results in self._stream(requests):
            self.count(results)
            yield index, results

    def count(self, results: list[Result]) -> None:
        """Adds one answered request to the cost."""
        self._cost["requests"] += 1
        self._cost["errors"] += results[0].finish == "error"
        self._cost["prompt_tokens"] += results[0].usage.prompt_tokens
        self._cost["completion_tokens"] += sum(result.usage.completion_tokens for result in results)

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[list[Result]]:
        requests = list(requests)
        done: dict[int, list[Result]] = {}
        for index, results in self.stream(requests):
            done[index] = results
            if progress:
                progress(1)
        return [done[index] for index in range(len(requests))]

    def cost(self) -> dict[str, float]:
        """What was asked of the model so far: requests, errors, tokens; the prompt of a request counts once."""
        return dict(self._cost)

    def close(self) -> None:
        """Free what the engine holds; calling it twice is fine."""

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def encode(tokenizer: Any, request: Request, chat: bool) -> list[int]:
    """Prompt token ids of `request`: a chat goes through the tokenizer's template, plain text in as it is.

    A final assistant message is continued. Raises ConfigError for messages where there is no chat template.
    """
    if request.prompt_ids is not None:
        return list(request.prompt_ids)
    messages = request.messages
    if messages is None and chat:
        messages = [{"role": "user", "content": request.prompt}]
    if messages is None:
        return list(tokenizer(request.prompt)["input_ids"])
    if not chat and prefilled(messages) and (text := plain_text(messages)) is not None:
        return list(tokenizer(text)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "The prompt is a list of chat messages, but the tokenizer has no chat template",
            expected="a chat model, or a task whose prompts are plain text",
            fix="choose an instruction-tuned model, or set its chat switch to false for a task with plain prompts",
        )
    return chat_ids(messages, tokenizer)


def request_key(identity: dict[str, Any], request: Request) -> str:
    """Hex digest of model and request: equal keys mean that one answer serves both."""
    asked = {field.name: getattr(request, field.name) for field in fields(Request) if field.name != "images"}
    payload = json.dumps([identity, asked], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(payload.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
