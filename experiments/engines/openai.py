"""Engine on any OpenAI-compatible endpoint: bounded concurrency, back-off, token and cost accounting.

The key is read from the environment variable that the configuration names. It goes into the request header and
nowhere else: no record, cache key, error or log holds it, and a server that echoes it is blanked out.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from experiments.engines.base import BaseEngine, Request, Result, Usage, failed
from experiments.engines.endpoint import Endpoint, Refused, Transient
from experiments.seeds import derive
from experiments.tokenizers import prefilled
from methods.errors import ConfigError


class OpenAIEngine(BaseEngine):
    """Completions from `url`, the endpoint's base such as http://localhost:8000/v1.

    model: name at the endpoint; None takes the only one it lists. endpoint: `chat` (plain prompts become a user
    message) or `completions` (plain prompts and prompt ids as they are). api_key_env: name of the environment variable
    that holds the key; None sends none. concurrency: requests under way at once. timeout: seconds for one try;
    deadline: seconds for one request with all its tries, at most `attempts`. prices: US dollars per million tokens,
    {prompt: .., completion: ..}. max_tokens_key: the name that the endpoint gives to the budget. extra: more fields of
    the request body.

    429, 5xx, time-outs, dropped connections and unreadable answers are tried again with growing, jittered pauses, at
    least as long as Retry-After. If that does not help and the endpoint serves nothing else either, it is down:
    RunError. Otherwise that request has an error result, as after any other 4xx. 401 and 404 concern every request:
    ConfigError. Results carry ids only where the endpoint tells them (vLLM with `extra={return_token_ids: true}`).
    With n > 1 endpoints count tokens only in sum: without `logprobs` or ids each completion gets its share by length
    of text.
    """

    name = "openai"
    needs = "nothing"

    def __init__(
        self,
        url: str | None = None,
        model: str | None = None,
        *,
        endpoint: str = "chat",
        api_key_env: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        deadline: float = 900.0,
        attempts: int = 8,
        backoff: float = 1.0,
        logprobs: bool = False,
        prices: dict[str, float] | None = None,
        max_tokens_key: str = "max_tokens",
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if endpoint not in ("chat", "completions"):
            raise ConfigError(
                "Unknown kind of endpoint", where="engine.endpoint", got=endpoint, expected="chat or completions"
            )
        self.service = Endpoint(
            url,
            api_key_env=api_key_env,
            concurrency=concurrency,
            timeout=timeout,
            deadline=deadline,
            attempts=attempts,
            backoff=backoff,
        )
        self.model, self.endpoint, self.logprobs, self.max_tokens_key = model, endpoint, logprobs, max_tokens_key
        self.prices, self.extra = dict(prices or {}), dict(extra or {})

    def __repr__(self) -> str:
        return f"OpenAIEngine(url={self.service.url!r}, model={self.model!r})"

    def identity(self) -> dict[str, Any]:
        """Asks the endpoint for its model if none was named."""
        if self.model is None:
            self.model = _in_thread(self._only_model())
        return {
            "engine": self.name,
            "url": self.service.url,
            "model": self.model,
            "endpoint": self.endpoint,
            "logprobs": self.logprobs,
            "extra": self.extra,
        }

    def cost(self) -> dict[str, float]:
        """Also tries that were repeated, seconds spent waiting, and `usd` where both prices are given."""
        cost = {**super().cost(), "retries": self.service.retries, "seconds_waited": self.service.seconds_waited}
        if {"prompt", "completion"} <= self.prices.keys():
            cost["usd"] = sum(cost[f"{kind}_tokens"] * self.prices[kind] for kind in ("prompt", "completion")) / 1e6
        return cost

    def _stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Result]]]:
        if not requests:
            return
        self.identity()
        bodies = [self._body(request) for request in requests]
        inbox: queue.Queue = queue.Queue()
        loop = asyncio.new_event_loop()
        job = loop.create_task(self._all(requests, bodies, inbox))

        def work() -> None:
            try:
                loop.run_until_complete(job)
                inbox.put(None)
            except BaseException as error:
                inbox.put(error)

        # A loop in a thread of its own also works below a running loop, such as a notebook's.
        thread = threading.Thread(target=work, name="assay-openai", daemon=True)
        thread.start()
        try:
            while (item := inbox.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(job.cancel)
            thread.join()
            loop.close()

    async def _all(self, requests: Sequence[Request], bodies: list[dict], inbox: queue.Queue) -> None:
        """Serve every request with `concurrency` workers; the first RunError or ConfigError ends them all."""
        todo = iter(range(len(requests)))

        async def worker() -> None:
            # A client of its own for each: httpcore looks through all connections of a pool at every request.
            async with self.service.client() as client:
                for index in todo:
                    inbox.put((index, await self._serve(client, requests[index], bodies[index])))

        tasks = [asyncio.create_task(worker()) for _ in range(min(self.service.concurrency, len(requests)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            self.max_tokens_key: request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            **self.extra,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if request.json_schema is not None:
            schema = {"name": "answer", "schema": request.json_schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.endpoint == "chat":
            if request.prompt_ids is not None:
                raise _mismatch("Token ids cannot be sent to a chat endpoint", "chat", "completions")
            body["messages"] = request.messages or [{"role": "user", "content": request.prompt}]
            if prefilled(body["messages"]):  # as vLLM and SGLang know it; others refuse it
                body |= {"add_generation_prompt": False, "continue_final_message": True}
            return body | ({"logprobs": True} if self.logprobs else {})
        if request.messages is not None:
            raise _mismatch("Chat messages cannot be sent to a completions endpoint", "completions", "chat")
        body["prompt"] = request.prompt if request.prompt_ids is None else list(request.prompt_ids)
        return body | ({"logprobs": 0} if self.logprobs else {})

    async def answer(self, client: httpx.AsyncClient, request: Request) -> list[Result]:
        """The n results of one request over a client of the service (`service.client()`)."""
        return await self._serve(client, request, self._body(request))

    async def _serve(self, client: httpx.AsyncClient, request: Request, body: dict) -> list[Result]:
        """The n results of one request; an endpoint that gives fewer choices than asked for is asked again."""
        path = "chat/completions" if self.endpoint == "chat" else "completions"
        results: list[Result] = []
        try:
            while len(results) < request.n:
                more: dict[str, int] = {"n": request.n - len(results)}
                if request.seed is not None:
                    # 31 bits: some servers keep seeds in 32-bit integers, JavaScript proxies round beyond 53 bits.
                    more["seed"] = derive(request.seed, "engine", len(results)) % 2**31
                answer = await self.service.send(client, "POST", path, body | more, self._results)
                results += answer[: more["n"]]
        except Refused as refusal:
            return failed(request, str(refusal))
        return results

    def _results(self, answer: Any) -> list[Result]:
        try:
            choices = answer["choices"]
            usage = answer.get("usage") or {}
            texts = [(c["message"].get("content") if self.endpoint == "chat" else c["text"]) or "" for c in choices]
            logps = [_logps(choice) for choice in choices]
            ids = [_ids(choice) for choice in choices]
            known = [a if a is not None else b for a, b in zip(ids, logps, strict=True)]
            sizes = _sizes(texts, known, int(usage.get("completion_tokens") or 0))
            prompt_tokens = int(usage.get("prompt_tokens") or 0)
            results = [
                _result(
                    text, one, logp if self.logprobs else None, choice.get("finish_reason"), Usage(prompt_tokens, n)
                )
                for text, one, logp, choice, n in zip(texts, ids, logps, choices, sizes, strict=True)
            ]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise Transient(self.service.clean(f"an answer of unknown form: {answer}")) from None
        if not results:
            raise Transient("an answer without choices")
        return results

    async def _only_model(self) -> str:
        def names(answer: Any) -> list[str]:
            try:
                return [str(entry["id"]) for entry in answer["data"]]
            except (KeyError, TypeError):
                raise Transient(self.service.clean(f"an answer of unknown form: {answer}")) from None

        found: list[str] = []
        got = ""
        async with self.service.client() as client:
            try:
                found = await self.service.send(client, "GET", "models", None, names)
            except Refused as refusal:
                got = str(refusal)
        if len(found) != 1:
            raise ConfigError(
                "The endpoint does not say which model to use",
                where=f"{self.service.url}/models",
                got=got or ", ".join(found) or "no model",
                expected="exactly one model",
                fix="name it with engine.model=...",
            )
        return found[0]


def _mismatch(what: str, got: str, fix: str) -> ConfigError:
    return ConfigError(what, where="engine.endpoint", got=got, fix=f"set engine.endpoint={fix}")


def _in_thread(coroutine: Any) -> Any:
    """`asyncio.run` that also works where a loop is running already."""
    outcome: list[Any] = [None, None]

    def work() -> None:
        try:
            outcome[0] = asyncio.run(coroutine)
        except BaseException as error:
            outcome[1] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _result(text: str, ids: list[int] | None, logps: list[float] | None, finish: str | None, usage: Usage) -> Result:
    if finish == "content_filter":
        return Result("", None, None, "error", usage, "the endpoint withheld the text (content filter)")
    return Result(text, ids, logps, "length" if finish == "length" else "stop", usage)


def _ids(choice: dict) -> list[int] | None:
    return [int(token) for token in choice["token_ids"]] if choice.get("token_ids") is not None else None


def _logps(choice: dict) -> list[float] | None:
    found = choice.get("logprobs") or {}
    if found.get("content"):
        return [float(entry["logprob"]) for entry in found["content"]]
    return [float(value) for value in found["token_logprobs"]] if found.get("token_logprobs") else None


def _sizes(texts: list[str], tokens: list[Any], total: int) -> list[int]:
    """Tokens of each completion: counted where they are listed, else shares of the sum by length of text."""
    if all(listed is not None for listed in tokens):
        return [len(listed) for listed in tokens]
    weights = [len(text.encode("utf-8", "replace")) + 1 for text in texts]
    ends = [round(total * sum(weights[: place + 1]) / sum(weights)) for place in range(len(weights))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
