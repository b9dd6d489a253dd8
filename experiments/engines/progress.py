"""A progress bar on a terminal, a line now and then elsewhere; both with rate and time left, both on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from experiments.engines.base import Progress

INTERVAL = 10.0
"""Seconds between lines where there is no terminal."""


@contextlib.contextmanager
def progress_bar(title: str, total: int, interval: float = INTERVAL, unit: str = "requests") -> Iterator[Progress]:
    """A function to call with the number of requests (or other units) just finished. The last line always comes."""
    with _bar(title, total) if sys.stderr.isatty() else _lines(title, total, interval, unit) as advance:
        yield advance


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task(title, total=total, rate="")

        def advance(count: int) -> None:
            bar.advance(row, count)
            bar.update(row, rate=_speed(bar.tasks[0].speed or 0.0))

        yield advance


@contextlib.contextmanager
def _lines(title: str, total: int, interval: float, unit: str) -> Iterator[Progress]:
    began = spoke = time.monotonic()
    done = 0

    def say() -> None:
        passed = time.monotonic() - began
        rate = done / passed if passed > 0 else 0.0
        left = f", about {(total - done) / rate:.0f} s left" if rate and done < total else ""
        line = f"{title}: {done}/{total} {unit}, {_speed(rate)}, {passed:.0f} s passed{left}"
        print(line, file=sys.stderr, flush=True)

    def advance(count: int) -> None:
        nonlocal done, spoke
        done += count
        if time.monotonic() - spoke >= interval:
            spoke = time.monotonic()
            say()

    try:
        yield advance
    finally:
        say()


def _speed(rate: float) -> str:
    return f"{1 / rate:.1f} s each" if 0 < rate < 1 else f"{rate:.1f}/s"
