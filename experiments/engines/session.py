"""Requests one by one, answers as they come: for work in which an answer decides what is asked next.

An endpoint is kept busy with as many requests as it takes at once, however the work that needs them is arranged; any
other engine is given what has gathered, all together. With a cache, an answer is on disk before anybody hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

from experiments.engines.base import BaseEngine, Request, Result
from experiments.engines.cache import CachedEngine
from experiments.engines.openai import OpenAIEngine

Answer = tuple[Hashable, list[Result]]

SWITCH = 0.0005
"""Seconds for which another thread may hold Python's lock while the event loop wants it; Python's own are ten times as
long, which a loop that needs the lock several times per request cannot make up for beside a thread that computes."""


class Session(Protocol):
    """`submit` any number of requests, each with a tag of its own; `get` waits for an answer, in any order."""

    def submit(self, tag: Hashable, request: Request) -> None: ...

    def get(self) -> Answer:
        """Raises LookupError where nothing is under way, and what the engine raises."""
        ...

    def drain(self) -> int:
        """The last call: asks nothing more, waits for the answers under way, which reach the cache, and counts them."""
        ...

    def close(self) -> None: ...


def open_session(engine: BaseEngine) -> Session:
    """The session that suits an engine, which may be wrapped in a cache."""
    inner = engine.engine if isinstance(engine, CachedEngine) else engine
    if isinstance(inner, OpenAIEngine):
        return LiveSession(inner, engine if isinstance(engine, CachedEngine) else None)
    return GatheredSession(engine)


class GatheredSession:
    """Over an engine that answers lists: `get` asks for all that was submitted since, once earlier answers are out."""

    def __init__(self, engine: BaseEngine) -> None:
        self.engine = engine
        self._waiting: list[tuple[Hashable, Request]] = []
        self._running: Iterator[Answer] = iter(())

    def submit(self, tag: Hashable, request: Request) -> None:
        self._waiting.append((tag, request))

    def get(self) -> Answer:
        for answer in self._running:
            return answer
        if not self._waiting:
            raise LookupError("nothing is under way")
        self._running, self._waiting = self._asked(self._waiting), []
        return self.get()

    def _asked(self, batch: list[tuple[Hashable, Request]]) -> Iterator[Answer]:
        for index, results in self.engine.stream([request for _, request in batch]):
            yield batch[index][0], results

    def drain(self) -> int:
        self._waiting = []
        inner: Any = self.engine.engine if isinstance(self.engine, CachedEngine) else self.engine
        inner.halted = True
        return sum(1 for _ in self._running)

    def close(self) -> None:
        close = getattr(self._running, "close", None)
        if close is not None:
            close()


class LiveSession:
    """Over an endpoint: `concurrency` requests at any time, from a thread with an event loop of its own."""

    def __init__(self, engine: OpenAIEngine, cache: CachedEngine | None = None) -> None:
        self.engine, self.cache = engine, cache
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tags: dict[str, list[Hashable]] = {}  # of requests under way that are equal
        self._under_way = 0
        engine.identity()  # names the model, or says why it cannot, before anything is asked
        self._loop = asyncio.new_event_loop()
        self._todo: asyncio.Queue[tuple[Hashable, str | None, Request] | None] = asyncio.Queue()
        self._fresh: deque[tuple[Hashable, str | None, Request]] = deque()  # on the way to the thread
        self._woken = False
        self._job = self._loop.create_task(self._serve())
        self._thread = threading.Thread(target=self._work, name="assay-session", daemon=True)
        self._switch = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH, self._switch))
        self._thread.start()

    def submit(self, tag: Hashable, request: Request) -> None:
        key = None if self.cache is None else self.cache.key(request)
        if self.cache is not None and (stored := self.cache.lookup(key, request.n)) is not None:
            self._under_way += 1
            self._inbox.put((tag, None, stored))
            return
        self._under_way += 1
        if key is not None:
            tags = self._tags.setdefault(key, [])
            tags.append(tag)
            if len(tags) > 1:
                return
        self._fresh.append((tag, key, request))
        if not self._woken:  # to wake the loop is a system call; one does for all that gather before it looks
            self._woken = True
            self._loop.call_soon_threadsafe(self._take)

    def get(self) -> Answer:
        if not self._under_way:
            raise LookupError("nothing is under way")
        item = self._inbox.get()
        if isinstance(item, BaseException):
            raise item
        tag, key, results = item
        self._under_way -= 1
        for twin in self._tags.pop(key, [])[1:] if key is not None else []:
            self._inbox.put((twin, None, results))
        return tag, results

    def drain(self) -> int:
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join()
        came = 0
        with contextlib.suppress(queue.Empty):
            while True:
                came += not isinstance(self._inbox.get_nowait(), BaseException)
        return came

    def close(self) -> None:
        if self._loop.is_closed():
            return
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._job.cancel)
        self._thread.join()
        self._loop.close()
        sys.setswitchinterval(self._switch)

    # ---------------------------------------------------------------- in the thread

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._job)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._inbox.put(error)

    async def _serve(self) -> None:
        workers = [asyncio.create_task(self._worker()) for _ in range(self.engine.service.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _worker(self) -> None:
        # A client of its own for each: httpcore looks through all connections of a pool at every request.
        async with self.engine.service.client() as client:
            while (item := await self._todo.get()) is not None:
                tag, key, request = item
                results = await self.engine.answer(client, request)
                self.engine.count(results)
                if self.cache is not None:
                    self.cache.store(key, results)
                self._inbox.put((tag, key, results))

    def _take(self) -> None:
        self._woken = False  # first, so that what comes from now on wakes the loop again
        while self._fresh:
            self._todo.put_nowait(self._fresh.popleft())

    def _stop(self) -> None:
        """Lets every worker finish what it asked and take nothing more."""
        self._fresh.clear()
        while not self._todo.empty():
            self._todo.get_nowait()
        for _ in range(self.engine.service.concurrency):
            self._todo.put_nowait(None)
