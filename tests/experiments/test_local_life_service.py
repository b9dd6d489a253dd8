"""LocalPlayground over HTTP: the answers of the tools in process, and a clear 4xx for everything else."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest

from experiments.tasks.local_life.generate import generated
from experiments.tasks.local_life.playground import Playground
from methods.errors import ConfigError

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
from experiments.tasks.local_life import service


@pytest.fixture(scope="module")
def ground():
    return Playground(generated(0, 200, cities=2, districts=2, areas=2), retrieve=30, show=5)


@pytest.fixture(scope="module")
def app(ground):
    return service.make_app(ground, rate=0, body=2000)


def ask(app, method, path, **keys):
    async def once():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://local") as client:
            return await client.request(method, path, **keys)

    return asyncio.run(once())


def refused(reply, status):
    assert reply.status_code == status, reply.text
    text = reply.json()["error"]
    assert text and "Traceback" not in text
    return text


def test_answers_are_those_of_the_tools(app, ground):
    city = ground.world.cities[1]
    for query in ("hotpot", "quiet cafe wifi", "xyzzy", "火锅"):
        reply = ask(app, "POST", "/search", json={"query": query, "city": city})
        assert reply.status_code == 200
        found = [(r["poi_id"], r["similarity"]) for r in reply.json()["results"]]
        assert found == [(poi, round(s, 6)) for poi, s in ground.search(query, city)]
        assert reply.json()["n"] == len(found)
    assert ask(app, "POST", "/search", json={"query": "hotpot", "city": city, "top_k": 2}).json()["n"] == 2
    a, b = (ground.world.merchant(p) for p in ground.world.merchants["poi_id"][:2])
    assert ask(app, "POST", "/detail", json={"poi_id": a.poi_id}).json()["phone"] == a.phone
    km = ask(app, "POST", "/distance", json={"from_id": a.poi_id, "to_id": b.poi_id}).json()["km"]
    assert km == pytest.approx(ground.distance(a.poi_id, b.poi_id), abs=1e-3)
    asked = {"poi_id": a.poi_id, "weekday": "friday", "time": "12:30"}
    assert ask(app, "POST", "/hours", json=asked).json() == {"open": ground.is_open(a.poi_id, 4, 750)}
    pages = ask(app, "POST", "/web_search", json={"query": ground.world.events[0].name}).json()
    assert pages["n"] and ground.world.events[0].name in pages["results"][0]["title"]
    health = ask(app, "GET", "/health").json()
    assert health["status"] == "ok" and health["merchants"] == 200 and city in health["cities"]


BAD = [
    {"content": b"", "says": "body"},
    {"content": b"{", "says": "JSON"},
    {"content": b"\xff\xfe", "says": ""},
    {"content": b"[" * 1900, "says": ""},
    {"content": b"null", "says": "body"},
    {"content": b"[1]", "says": "body"},
    {"json": {"query": "x"}, "says": "city"},
    {"json": {"query": "", "city": "x"}, "says": "query"},
    {"json": {"query": 1, "city": "x"}, "says": "query"},
    {"json": {"query": "y" * 501, "city": "x"}, "says": "query"},
    {"json": {"query": "y", "city": "x", "top_k": 0}, "says": "top_k"},
    {"json": {"query": "y", "city": "x", "top_k": 6}, "says": "top_k"},
    {"json": {"query": "y", "city": "x", "top_k": "2"}, "says": "top_k"},
    {"json": {"query": "y", "city": "x", "path": "/etc/passwd"}, "says": "path"},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad)[:40])
def test_bad_bodies_are_told_what_is_wrong(app, bad):
    keys = {k: v for k, v in bad.items() if k != "says"}
    reply = ask(app, "POST", "/search", headers={"content-type": "application/json"}, **keys)
    assert bad["says"] in refused(reply, reply.status_code) and reply.status_code in (400, 422)


def test_a_body_without_its_content_type_is_told_the_header(app, ground):
    body = json.dumps({"query": "hotpot", "city": ground.world.cities[0]})
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        reply = ask(app, "POST", "/search", content=body, headers={"content-type": kind})
        assert "content-type: application/json" in refused(reply, 422)


def test_what_is_not_there_is_404(app, ground):
    city = ground.world.cities[0]
    assert "Nowhere" in refused(ask(app, "POST", "/search", json={"query": "x", "city": "Nowhere"}), 404)
    for trick in ("../../etc/passwd", "poi_no_1", "..\\..\\x", "/etc/passwd", "poi_\u0000_1", "%2e%2e%2f"):
        refused(ask(app, "POST", "/detail", json={"poi_id": trick}), 404)
        refused(ask(app, "POST", "/search", json={"query": "x", "city": trick}), 404)
    for path in (
        "/",
        "/../etc/passwd",
        "/search/../../etc/passwd",
        "/detail/%2e%2e%2fetc%2fpasswd",
        "/docs",
        "/openapi.json",
        "//health",
    ):
        refused(ask(app, "GET", path), 404 if path != "/search" else 405)
    refused(ask(app, "GET", "/search"), 405)
    refused(ask(app, "DELETE", "/detail"), 405)
    refused(ask(app, "POST", "/hours", json={"poi_id": "poi_no_1", "weekday": "Friday", "time": "12:00"}), 404)
    first = ground.world.merchants["poi_id"][0]
    assert "weekday" in refused(
        ask(app, "POST", "/hours", json={"poi_id": first, "weekday": "x", "time": "12:00"}), 404
    )
    refused(ask(app, "POST", "/hours", json={"poi_id": first, "weekday": "Friday", "time": "25:00"}), 422)
    assert ask(app, "POST", "/search", json={"query": "\u0000<script>", "city": city}).status_code == 200


def test_long_bodies_are_not_read(app):
    assert "2000" in refused(ask(app, "POST", "/search", content=b"x" * 2001), 413)

    async def endless():
        for _ in range(50):
            yield b"x" * 100

    assert "2000" in refused(ask(app, "POST", "/search", content=endless()), 413)


def test_a_client_that_asks_too_often_waits(ground, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(service.time, "monotonic", lambda: clock.now)
    app = service.make_app(ground, rate=3)
    codes = [ask(app, "GET", "/health").status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    reply = ask(app, "GET", "/health")
    assert "3 requests per second" in refused(reply, 429) and reply.headers["retry-after"] == "1"
    clock.now += 0.34
    assert [ask(app, "GET", "/health").status_code for _ in range(2)] == [200, 429]


def test_a_slow_body_is_given_up(ground, monkeypatch):
    monkeypatch.setattr(service, "SLOWEST", 0.05)
    sent = []

    async def receive():
        await asyncio.sleep(5)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [], "client": ("1.2.3.4", 5), "path": "/search", "method": "POST"}
    asyncio.run(service.Limits(None, rate=0, body=100)(scope, receive, send))
    assert sent[0]["status"] == 408 and "error" in json.loads(sent[1]["body"])


def test_limits_are_checked(ground):
    for keys in ({"rate": -1}, {"rate": float("nan")}, {"body": 1}):
        with pytest.raises(ConfigError):
            service.make_app(ground, **keys)


def test_a_port_in_use_is_one_paragraph(app):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen"):
        service.serve(app, "127.0.0.1", taken.getsockname()[1])
