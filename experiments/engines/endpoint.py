"""JSON over HTTP with patience: tries again what may pass, says plainly what will not, and keeps the key to itself."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx
import tenacity

from experiments.engines.connection import OneConnection
from methods.errors import ConfigError, RunError

# httpcore looks for this package several times in each request; where it is missing, along the whole path.
if importlib.util.find_spec("sniffio") is None:
    sys.modules.setdefault("sniffio", None)  # type: ignore[arg-type]

# httpx reports every request at level INFO; a thousand lines would bury the progress.
logging.getLogger("httpx").setLevel(logging.WARNING)

QUOTED = 300
"""Characters of a server's message that an error repeats."""


class Transient(Exception):
    """Worth another try. `wait`: seconds that the server asks for; `limit`: it is the rate limit."""

    def __init__(self, reason: str, wait: float = 0.0, limit: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.limit = wait, limit


class Refused(Exception):
    """The endpoint will not serve this one request."""


class Endpoint:
    """The base address of a service and how long to insist.

    api_key_env: name of the environment variable that holds the key; None sends none. timeout: seconds for one try.
    deadline: seconds for one request with all its tries, at most `attempts`. backoff: seconds before the second try.
    Raises ConfigError for an address or a name that cannot be right, without repeating what may hold a key.
    """

    def __init__(
        self,
        url: str | None,
        *,
        api_key_env: str | None,
        concurrency: int,
        timeout: float,
        deadline: float,
        attempts: int,
        backoff: float,
    ) -> None:
        settings = {"concurrency": concurrency, "attempts": attempts, "timeout": timeout, "deadline": deadline}
        for key, value in settings.items():
            if value <= 0:
                raise ConfigError("This setting must be positive", where=f"engine.{key}", got=value)
        self.url, self.api_key_env = _checked_url(url), _checked_name(api_key_env)
        self.concurrency, self.timeout, self.deadline = concurrency, timeout, deadline
        self.attempts, self.backoff = attempts, backoff
        self.retries, self.seconds_waited = 0, 0.0
        self._last_answer = float("-inf")
        self._ssl: Any = None
        self._addresses: dict[str, httpx.URL] = {}

    def client(self) -> httpx.AsyncClient:
        """A client for one request at a time. Raises ConfigError if the named environment variable is not set."""
        headers = {}
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise ConfigError(
                    "The environment variable that should hold the API key is not set",
                    where="engine.api_key_env",
                    got=self.api_key_env,
                    fix=f"export {self.api_key_env}=...",
                )
            if not (key.isascii() and key.isprintable()):
                raise ConfigError("The API key holds characters that no key has", where=self.api_key_env)
            headers["Authorization"] = f"Bearer {key}"
        if urlsplit(self.url).scheme == "http" and not {"http", "all"} & getproxies().keys():
            return httpx.AsyncClient(timeout=self.timeout, headers=headers, transport=OneConnection())
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        # Made once: a context reads all certificates of the machine.
        self._ssl = self._ssl or httpx.create_ssl_context()
        return httpx.AsyncClient(timeout=self.timeout, headers=headers, limits=limits, verify=self._ssl)

    async def send(
        self, client: httpx.AsyncClient, verb: str, path: str, body: dict | None, read: Callable[[Any], Any]
    ) -> Any:
        """`read` of the JSON answer; `read` may raise Transient too.

        Raises Refused if this request cannot be served, RunError if the endpoint is down, ConfigError for a wrong key
        or a wrong address, which concern every request.
        """
        began = time.monotonic()
        first_failure = float("inf")

        def note(state: tenacity.RetryCallState) -> None:
            nonlocal first_failure
            first_failure = min(first_failure, time.monotonic())

        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Transient),
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_before_delay(self.deadline),
            wait=self._pause,
            after=note,
            before_sleep=self._count,
            reraise=True,
        )
        try:
            async for attempt in tries:
                with attempt:
                    answer = read(await self._once(client, verb, path, body, began))
        except Transient as error:
            tried = f"{error} (tries: {tries.statistics.get('attempt_number', 1)})"
            # Others were served meanwhile, or the service lives: then it is this request that it cannot bear.
            if self._last_answer > first_failure or (not error.limit and await self._alive(client)):
                raise Refused(tried) from None
            raise RunError(
                "The endpoint does not answer",
                where=f"{self.url}/{path}",
                got=tried,
                fix="start the server, check engine.url or wait for the rate limit; the same command then goes on from "
                "what was answered",
            ) from None
        self._last_answer = time.monotonic()
        return answer

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error: Any = state.outcome.exception() if state.outcome else None
        jitter = random.uniform(0.5, 1.5)  # when to try again decides nothing that is recorded
        return max(error.wait, min(self.backoff * 2.0 ** (state.attempt_number - 1), 60.0) * jitter)

    def _count(self, state: tenacity.RetryCallState) -> None:
        self.retries += 1
        self.seconds_waited += state.next_action.sleep if state.next_action else 0.0

    async def _once(self, client: httpx.AsyncClient, verb: str, path: str, body: dict | None, began: float) -> Any:
        timeout = max(0.001, min(self.timeout, began + self.deadline - time.monotonic()))
        try:
            # httpx counts its time-out between bytes; a server that trickles would never reach it.
            async with asyncio.timeout(timeout):
                response = await client.request(verb, self._address(path), json=body)
        except (TimeoutError, httpx.TimeoutException):
            raise Transient(f"no answer within {timeout:.3g} seconds") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise Transient(self.clean(f"{type(error).__name__}: {error}")) from None
        status = response.status_code
        if status < 300:
            try:
                return response.json()
            except ValueError:
                raise Transient(f"an answer that is no JSON: {self.clean(response.text)}") from None
        said = self.clean(response.text)
        if status == 429 or status >= 500:
            raise Transient(
                f"status {status}: {said}", _retry_after(response.headers.get("retry-after")), status == 429
            )
        if status == 401:
            raise ConfigError(
                "The endpoint wants a valid API key",
                where=self.url,
                got=f"status 401: {said}",
                fix="set engine.api_key_env to the name of the environment variable that holds the key",
            )
        if status == 404:
            raise ConfigError(
                "The endpoint does not know this path or model",
                where=f"{self.url}/{path}",
                got=f"status 404: {said}",
                fix="check engine.url (the base, which often ends in /v1) and engine.model",
            )
        raise Refused(f"status {status}: {said}")

    def _address(self, path: str) -> httpx.URL:
        """Read once: httpx takes a text apart at every request."""
        if path not in self._addresses:
            self._addresses[path] = httpx.URL(f"{self.url}/{path}")
        return self._addresses[path]

    async def _alive(self, client: httpx.AsyncClient) -> bool:
        try:
            async with asyncio.timeout(min(10.0, self.timeout)):
                status = (await client.get(f"{self.url}/models")).status_code
        except (TimeoutError, httpx.HTTPError):
            return False
        return status < 500 and status != 429

    def clean(self, text: str) -> str:
        """A server's words in one line, cut, and blanked out where they repeat the key."""
        key = os.environ.get(self.api_key_env or "", "").strip()
        return " ".join((text.replace(key, "***") if key else text).split())[:QUOTED]


def _retry_after(value: str | None) -> float:
    """Seconds from a Retry-After header, a number or a date; 0 if there is none or it cannot be read."""
    if not value:
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _checked_url(url: str | None) -> str:
    expected = "the base address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1"
    try:
        parts = urlsplit(url or "")
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        raise ConfigError("The address of the endpoint cannot be read", where="engine.url", expected=expected) from None
    if parts.username or parts.password or parts.query:
        # Not repeated in the message: a key may be in it.
        raise ConfigError(
            "The address of the endpoint must hold no user name, password or query",
            where="engine.url",
            expected=expected,
            fix="put the key into an environment variable and name that in engine.api_key_env",
        )
    if not valid:
        raise ConfigError("The engine needs an endpoint", where="engine.url", got=url, expected=expected)
    return (url or "").rstrip("/")


def _checked_name(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        # Not repeated in the message: it may be the key itself.
        raise ConfigError(
            "This is not the name of an environment variable",
            where="engine.api_key_env",
            expected="a name such as OPENAI_API_KEY, never the key itself",
        )
    return name
