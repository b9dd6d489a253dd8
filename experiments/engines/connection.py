"""HTTP/1.1 over one connection, as a transport of httpx."""

from __future__ import annotations

import asyncio
import contextlib

import h11
import httpx

CHUNK = 1 << 16


class OneConnection(httpx.AsyncBaseTransport):
    """One request after the other to one plain-http server, over a connection that stays open; answers come whole.

    httpx's own transport, a pool of connections over anyio, takes four times as long for a request, most of it for
    what a worker with a connection of its own does not need: hundreds of requests a second would fill a core. No
    time-outs of its own, no proxies, no TLS. Raises httpx.TransportError; a request that is cancelled closes the
    connection.
    """

    def __init__(self) -> None:
        self._http: h11.Connection | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        # A server that closed the connection meanwhile, as idle ones are, has left its end in the reader.
        if self._http is None or self._reader.at_eof():
            await self._open(request.url)
        assert self._http is not None
        try:
            return await self._exchange(self._http, request)
        except h11.ProtocolError as error:
            self._close()
            raise httpx.ProtocolError(str(error)) from None
        except OSError as error:
            self._close()
            raise httpx.ReadError(str(error)) from None
        except BaseException:  # half an answer may be under way
            self._close()
            raise

    async def _open(self, url: httpx.URL) -> None:
        self._close()
        try:
            self._reader, self._writer = await asyncio.open_connection(url.host, url.port or 80)
        except OSError as error:
            raise httpx.ConnectError(str(error)) from None
        self._http = h11.Connection(h11.CLIENT)

    async def _exchange(self, http: h11.Connection, request: httpx.Request) -> httpx.Response:
        head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        parts = [http.send(head), http.send(h11.Data(data=await request.aread())), http.send(h11.EndOfMessage())]
        self._writer.write(b"".join(part for part in parts if part))
        with contextlib.suppress(OSError):  # a server may refuse, and say why, before it has read everything
            await self._writer.drain()
        answer: h11.Response | None = None
        body: list[bytes] = []
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                http.receive_data(await self._reader.read(CHUNK))
            elif isinstance(event, h11.Response):
                answer = event
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif isinstance(event, h11.ConnectionClosed):
                raise h11.RemoteProtocolError("the server closed the connection without an answer")
        assert answer is not None
        if http.our_state is h11.DONE and http.their_state is h11.DONE:
            http.start_next_cycle()
        else:
            self._close()
        return httpx.Response(answer.status_code, headers=answer.headers.raw_items(), content=b"".join(body))

    def _close(self) -> None:
        if self._http is not None:
            self._http = None
            self._writer.close()

    async def aclose(self) -> None:
        self._close()
