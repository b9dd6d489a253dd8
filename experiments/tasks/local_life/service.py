"""LocalPlayground over HTTP, for agents built elsewhere: the same tools, the same answers, on this machine only.

POST /search {"query", "city", "top_k"}, /detail {"poi_id"}, /web_search {"query"}, /distance {"from_id", "to_id"},
/hours {"poi_id", "weekday", "time"}; GET /health. Every refusal is a 4xx with {"error": "..."}.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import socket
import time
from collections import OrderedDict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from experiments.tasks.local_life.hours import WEEKDAYS
from experiments.tasks.local_life.playground import LONGEST, Playground
from methods.errors import ConfigError, check_range

if TYPE_CHECKING:
    from fastapi import FastAPI

BODY = 16_384  # bytes of a request
RATE = 200.0  # requests per second of one client, 0 for no limit
SLOWEST = 10.0  # seconds in which a body must have come
CLIENTS = 10_000  # that are remembered for the rate
CONCURRENT = 512  # requests at a time; more are told 503


def make_app(playground: Playground, *, rate: float = RATE, body: int = BODY) -> FastAPI:
    """The application. Raises ConfigError for limits out of range and where FastAPI is not installed."""
    try:
        from fastapi import FastAPI, Request
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import Response
        from starlette.exceptions import HTTPException
    except ImportError as error:
        raise ConfigError(
            "The HTTP service needs packages that are not installed", got=str(error), fix="pip install 'assay[serve]'"
        ) from error
    check_range("rate", rate, 0)
    check_range("body", body, 64)
    app = FastAPI(title="LocalPlayground", openapi_url=None)
    answers = Answers(playground)

    def reply(status: int, value: Any) -> Response:
        return Response(json.dumps(value, ensure_ascii=False), status, media_type="application/json")

    # The handlers are coroutines: a search is too short for a thread's switch to pay.
    def route(name: str, model: Any) -> None:
        async def handler(asked):
            try:
                return reply(200, getattr(answers, name)(asked))
            except (LookupError, ValueError) as error:
                return reply(404, {"error": str(error)})

        handler.__annotations__ = {"asked": model}
        app.post(f"/{name}")(handler)

    for name, model in bodies(playground.show).items():
        route(name, model)

    @app.get("/health")
    async def health() -> Response:
        return reply(200, answers.health())

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if "json" not in request.headers.get("content-type", ""):  # such as what curl -d sends by itself
            return reply(422, {"error": "body: not read as JSON; send the header content-type: application/json"})
        said = [(".".join(part for part in e["loc"][1:] if isinstance(part, str)), e["msg"]) for e in error.errors()]
        return reply(422, {"error": "; ".join(f"{where or 'body'}: {what}" for where, what in said[:5])})

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return reply(error.status_code, {"error": str(error.detail)})

    app.add_middleware(Limits, rate=rate, body=body)
    return app


def bodies(show: int) -> dict[str, type]:
    """What each path takes: exactly these fields, of exactly these types."""
    from pydantic import BaseModel, ConfigDict, Field

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

    short, text = Field(min_length=1, max_length=100), Field(min_length=1, max_length=LONGEST)

    class Search(Strict):
        query: str = text
        city: str = short
        top_k: int = Field(show, ge=1, le=show)

    class Detail(Strict):
        poi_id: str = short

    class Web(Strict):
        query: str = text

    class Distance(Strict):
        from_id: str = short
        to_id: str = short

    class Hours(Strict):
        poi_id: str = short
        weekday: str = Field(min_length=1, max_length=20)
        time: str = Field(pattern=r"^([01]?\d|2[0-3]):[0-5]\d$")

    return {"search": Search, "detail": Detail, "web_search": Web, "distance": Distance, "hours": Hours}


class Answers:
    """What each path answers, as JSON values."""

    def __init__(self, playground: Playground) -> None:
        self.playground = playground
        self.merchant = functools.lru_cache(maxsize=65_536)(self._merchant)

    def _merchant(self, poi_id: str) -> dict[str, Any]:
        fields = asdict(self.playground.world.merchant(poi_id))
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in fields.items()}

    def search(self, asked: Any) -> dict[str, Any]:
        found = self.playground.search(asked.query, asked.city)[: asked.top_k]
        results = [{**self.merchant(poi), "similarity": round(float(value), 6)} for poi, value in found]
        return {"city": asked.city, "query": asked.query, "n": len(results), "results": results}

    def detail(self, asked: Any) -> dict[str, Any]:
        return self.merchant(asked.poi_id)

    def web_search(self, asked: Any) -> dict[str, Any]:
        pages = self.playground.web_search(asked.query)
        results = [{"link": f"page:{p.doc_id}", "title": p.title, "snippet": p.text} for p in pages]
        return {"query": asked.query, "n": len(results), "results": results}

    def distance(self, asked: Any) -> dict[str, Any]:
        return {"km": round(self.playground.distance(asked.from_id, asked.to_id), 3)}

    def hours(self, asked: Any) -> dict[str, Any]:
        named = [i for i, day in enumerate(WEEKDAYS) if day.lower() == asked.weekday.lower()]
        if not named:
            raise ValueError(f"there is no weekday {asked.weekday!r}; there are {', '.join(WEEKDAYS)}")
        hour, minute = asked.time.split(":")
        return {"open": self.playground.is_open(asked.poi_id, named[0], 60 * int(hour) + int(minute))}

    def health(self) -> dict[str, Any]:
        world = self.playground.world
        return {"status": "ok", "world": world.source, "merchants": len(world), "cities": list(world.cities)}


class Limits:
    """Refuses a client that asks too often (429) and a body that is too long (413) or too slow (408), before the
    application sees it. A client is an address; its requests fill a bucket of one second's rate, at least one."""

    def __init__(self, app: Any, *, rate: float, body: int) -> None:
        self.app, self.rate, self.body = app, rate, body
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not self._allowed((scope.get("client") or ("?",))[0]):
            return await _refuse(send, 429, f"more than {self.rate:g} requests per second; wait a second", retry=True)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self.body:
            return await _refuse(send, 413, f"the body has {int(length)} bytes; at most {self.body} are read")
        try:
            content = await asyncio.wait_for(self._read(receive), SLOWEST)
        except TimeoutError:
            return await _refuse(send, 408, f"the body did not come within {SLOWEST:g} s")
        if content is None:
            return await _refuse(send, 413, f"the body is longer than {self.body} bytes")
        waiting = [{"type": "http.request", "body": content, "more_body": False}]
        await self.app(scope, lambda: _next(waiting, receive), send)

    async def _read(self, receive: Any) -> bytes | None:
        content = b""
        while True:
            message = await receive()
            content += message.get("body", b"")
            if len(content) > self.body:
                return None
            if not message.get("more_body"):
                return content

    def _allowed(self, client: str) -> bool:
        if not self.rate:
            return True
        now, most = time.monotonic(), max(self.rate, 1.0)
        level, since = self.buckets.pop(client, (0.0, now))
        level = max(0.0, level - (now - since) * self.rate)
        allowed = level + 1 <= most
        self.buckets[client] = (level + allowed, now)
        if len(self.buckets) > CLIENTS:
            self.buckets.popitem(last=False)
        return allowed


async def _next(waiting: list[dict], receive: Any) -> dict:
    return waiting.pop() if waiting else await receive()


async def _refuse(send: Any, status: int, text: str, retry: bool = False) -> None:
    content = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    # What is left of a body that nobody reads would be taken for the next request.
    headers += [(b"retry-after", b"1")] if retry else [(b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def serve(app: FastAPI, host: str, port: int, started: Any = lambda url: None) -> None:
    """Runs until it is interrupted; `started(url)` is called before. port 0 takes a free one. ConfigError for a place
    where nothing can listen."""
    import uvicorn

    try:
        listening = socket.create_server((host, port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            "The service cannot listen there",
            where=f"{host}:{port}",
            got=str(error).rstrip("."),
            fix="choose another --port or --host",
        ) from error
    with listening:
        started(f"http://{host}:{listening.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", access_log=False, limit_concurrency=CONCURRENT)
        uvicorn.Server(config).run(sockets=[listening])
