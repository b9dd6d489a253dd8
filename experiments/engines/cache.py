"""A disk cache around any engine: an interrupted job goes on where it was.

Each writer appends to a JSONL shard of its own, so that writers need no lock and a kill can only cut the last line of
one shard. Answers are written as they arrive. Errors, and sampled requests without a seed, are never stored.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.engines.base import BaseEngine, Engine, Request, Result, Usage, request_key
from methods.errors import ConfigError, RunError

CHUNK = 64
"""Requests given at once to an engine that can only answer them all together."""


class CachedEngine(BaseEngine):
    """`engine`, answering from `folder` what was answered before.

    Raises ConfigError if the folder cannot be made, RunError if it cannot be written later. A damaged line counts as
    not there. Answers that another process writes meanwhile are seen when the cache is opened next.
    """

    def __init__(self, engine: Engine, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.engine, self.folder, self.name = engine, Path(folder), engine.name
        self.chat = getattr(engine, "chat", False)
        self._shard: Any = None
        self._shard_path, self._end = self.folder, 0
        self._where: dict[str, tuple[Path, int]] = {}
        self._hits = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.folder.glob("*.jsonl")):
                self._scan(path)
        except OSError as error:
            raise ConfigError(
                "The request cache cannot be opened",
                where=str(self.folder),
                got=error.strerror or error,
                expected="a folder that can be read and written",
                fix="give another folder, or null for no cache",
            ) from None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.engine, "tokenizer", None)

    def _scan(self, path: Path) -> None:
        offset = 0
        with path.open("rb") as shard:
            for line in shard:
                key = _key_of(line)
                if key:
                    self._where[key] = (path, offset)
                offset += len(line)

    def _get(self, key: str, n: int) -> list[Result] | None:
        if key not in self._where:
            return None
        path, offset = self._where[key]
        try:
            with path.open("rb") as shard:
                shard.seek(offset)
                record = json.loads(shard.readline())
            results = [Result(**{**item, "usage": Usage(**item["usage"])}) for item in record["results"]]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return results if record["key"] == key and len(results) == n else None

    def _put(self, key: str, results: list[Result]) -> None:
        line = json.dumps({"key": key, "results": [asdict(result) for result in results]}).encode() + b"\n"
        try:
            if self._shard is None:
                # Unbuffered: one write per answer, so that a kill loses at most the answer being written.
                self._shard_path = self.folder / f"{uuid.uuid4().hex}.jsonl"  # one object for all its entries
                self._shard = self._shard_path.open("ab", buffering=0)
                self._end = 0  # nobody else writes here
            offset = self._end
            if self._shard.write(line) != len(line):
                raise OSError(28, "the file system took only part of the line")
        except OSError as error:
            self._close_shard()  # a later answer must not be glued to half a line
            raise RunError(
                "The request cache cannot be written",
                where=str(self.folder),
                got=error.strerror or error,
                fix="free some space; the same command then goes on from what is stored",
            ) from None
        self._end += len(line)
        self._where[key] = (self._shard_path, offset)

    def _stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Result]]]:
        # Asked anew in each call: the weights of a live model change between calls.
        identity = self.engine.identity() if isinstance(self.engine, BaseEngine) else {"engine": self.engine.name}
        keys = [request_key(identity, request) if request.repeatable else None for request in requests]
        waiting: dict[str, list[int]] = {}
        todo: list[int] = []
        for index, key in enumerate(keys):
            if key is None:
                todo.append(index)
            elif (stored := self.lookup(key, requests[index].n)) is not None:
                yield index, stored
            else:
                waiting.setdefault(key, []).append(index)
                if len(waiting[key]) == 1:
                    todo.append(index)
        for position, results in _answers(self.engine, [requests[index] for index in todo]):
            index = todo[position]
            key = keys[index]
            self.store(key, results)
            for twin in waiting[key] if key is not None else [index]:
                yield twin, results

    def key(self, request: Request) -> str | None:
        """What an answer to `request` is stored under; None for one that is never stored."""
        return request_key(self.identity(), request) if request.repeatable else None

    def lookup(self, key: str | None, n: int) -> list[Result] | None:
        """The stored answer, counted as one that the disk gave; None if there is none."""
        stored = None if key is None else self._get(key, n)
        self._hits += stored is not None
        return stored

    def store(self, key: str | None, results: list[Result]) -> None:
        """Keeps an answer, unless it is an error. Raises RunError where the disk refuses."""
        if key is not None and all(result.finish != "error" for result in results):
            self._put(key, results)

    def identity(self) -> dict[str, Any]:
        return self.engine.identity() if isinstance(self.engine, BaseEngine) else {"engine": self.engine.name}

    def cost(self) -> dict[str, float]:
        """What the wrapped engine was asked, and `cached`: the requests that the disk answered."""
        inner = self.engine.cost() if isinstance(self.engine, BaseEngine) else super().cost()
        return {**inner, "cached": self._hits}

    def close(self) -> None:
        self._close_shard()
        self.engine.close()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


def _answers(engine: Engine, requests: list[Request]) -> Iterator[tuple[int, list[Result]]]:
    if isinstance(engine, BaseEngine):
        yield from engine.stream(requests)
        return
    for start in range(0, len(requests), CHUNK):
        for position, results in enumerate(engine.generate(requests[start : start + CHUNK])):
            yield start + position, results


def _key_of(line: bytes) -> str | None:
    """The key of a whole record line, without parsing its results; None for a line that was cut."""
    prefix = b'{"key": "'
    if not (line.startswith(prefix) and line.endswith(b"]}\n")):
        return None
    return line[len(prefix) :].split(b'"', 1)[0].decode("ascii", "replace")
