"""The connection of an engine to a plain-http server: framings, reuse, and what servers do wrong."""

from __future__ import annotations

import asyncio
import gzip

import httpx
import pytest

from experiments.engines.connection import OneConnection

OK = b"HTTP/1.1 200 OK\r\n"
FRAMED = {
    "a length": OK + b"Content-Length: 5\r\n\r\nhello",
    "chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    "a word before": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 5\r\n\r\nhello",
    "gzip": OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(gzip.compress(b"hello", mtime=0))
    + gzip.compress(b"hello", mtime=0),
}  # fmt: skip
CLOSED = {
    "until it closes": OK + b"\r\nhello",
    "said to close": OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
}
BROKEN = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": OK + b"Content-Length: 50\r\n\r\nhello",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
}


class Server:
    """Answers each request with the next of `replies`; closes after those in `last`."""

    def __init__(self, *replies: bytes, last: tuple[int, ...] = (), wait: float = 0.0) -> None:
        self.replies, self.last, self.wait = list(replies), last, wait
        self.connections, self.bodies, self.paths = 0, [], []

    async def serve(self, reader, writer) -> None:
        self.connections += 1
        while not reader.at_eof():
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            size = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"]
            self.bodies.append(await reader.readexactly(size[0] if size else 0))
            self.paths.append(head.split()[1])
            await asyncio.sleep(self.wait)
            for part in (reply := self.replies.pop(0))[:20], reply[20:]:  # never all at once
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.001)
            if len(self.bodies) - 1 in self.last:
                break
        writer.close()


def talk(server, talk_):
    """What `talk_(client, url)` returns with `server` running."""

    async def main():
        running = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}/v1/x?y=1"
        async with httpx.AsyncClient(transport=OneConnection()) as client:
            found = await talk_(client, url)
        running.close()
        return found

    return asyncio.run(main())


async def ask(client, url, times=1):
    return [(await client.post(url, json={"n": n})).text for n in range(times)]


@pytest.mark.parametrize("reply", FRAMED.values(), ids=FRAMED)
def test_an_answer_is_whole_and_the_connection_stays(reply):
    server = Server(reply, reply, reply)
    assert talk(server, lambda *to: ask(*to, 3)) == ["hello"] * 3
    assert server.connections == 1 and server.bodies == [b'{"n":0}', b'{"n":1}', b'{"n":2}']
    assert set(server.paths) == {b"/v1/x?y=1"}


@pytest.mark.parametrize("reply", CLOSED.values(), ids=CLOSED)
def test_a_connection_that_ends_is_opened_again(reply):
    server = Server(reply, reply, last=(0, 1))
    assert talk(server, lambda *to: ask(*to, 2)) == ["hello"] * 2 and server.connections == 2


def test_an_idle_connection_that_was_closed_is_opened_again():
    server = Server(FRAMED["a length"], FRAMED["a length"], last=(0,))

    async def pause(client, url):
        first = await ask(client, url)
        await asyncio.sleep(0.05)
        return first + await ask(client, url)

    assert talk(server, pause) == ["hello"] * 2 and server.connections == 2


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_an_answer_that_breaks_off_is_a_transport_error_and_the_next_request_is_well(reply):
    server = Server(reply, FRAMED["a length"], last=(0,))

    async def twice(client, url):
        with pytest.raises(httpx.TransportError):
            await ask(client, url)
        return await ask(client, url)

    assert talk(server, twice) == ["hello"] and server.connections == 2


def test_a_request_that_was_given_up_leaves_nothing_behind():
    server = Server(FRAMED["a length"], FRAMED["chunks"].replace(b"llo", b"lp!"), wait=0.1)

    async def impatient(client, url):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await ask(client, url)
        return await ask(client, url)

    assert talk(server, impatient) == ["help!"] and server.connections == 2


def test_nobody_there():
    async def main():
        async with httpx.AsyncClient(transport=OneConnection()) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get("http://127.0.0.1:9/v1/models")

    asyncio.run(main())


@pytest.mark.parametrize(("url", "proxy", "own"), [("http://a", "", True), ("https://a", "", False),
                                                   ("http://a", "http://p:1", False)])  # fmt: skip
def test_tls_and_proxies_are_left_to_httpx(url, proxy, own, monkeypatch):
    from experiments.engines.endpoint import Endpoint

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if proxy:
        monkeypatch.setenv("http_proxy", proxy)
    service = Endpoint(url, api_key_env=None, concurrency=1, timeout=1, deadline=1, attempts=1, backoff=1)
    assert isinstance(service.client()._transport, OneConnection) == own
