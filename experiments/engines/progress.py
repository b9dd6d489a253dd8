"""A progress bar on a terminal, a line now and then elsewhere; both with rate and time left, both on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from experiments.engines.base import Progress

INTERVAL = 10.0
"""Seconds between lines where there is no terminal."""


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, interval: float = INTERVAL, unit: str = "requests", beside: Callable[[], str] = str
) -> Iterator[Progress]:
    """A function to call with the number of requests (or other units) just finished, 0 where only what `beside` says
    has changed. The last line always comes."""
    bar = _bar(title, total, beside) if sys.stderr.isatty() else _lines(title, total, interval, unit, beside)
    with bar as advance:
        yield advance


@contextlib.contextmanager
def _bar(title: str, total: int, beside: Callable[[], str]) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task(title, total=total, rate="")

        def advance(count: int) -> None:
            bar.advance(row, count)
            bar.update(row, rate=_speed(bar.tasks[0].speed or 0.0) + _more(beside))

        yield advance


@contextlib.contextmanager
def _lines(title: str, total: int, interval: float, unit: str, beside: Callable[[], str]) -> Iterator[Progress]:
    began = spoke = time.monotonic()
    done = 0

    def say() -> None:
        passed = time.monotonic() - began
        rate = done / passed if passed > 0 else 0.0
        left = f", about {(total - done) / rate:.0f} s left" if rate and done < total else ""
        line = f"{title}: {done}/{total} {unit}, {_speed(rate)}, {passed:.0f} s passed{left}{_more(beside)}"
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


def _more(beside: Callable[[], str]) -> str:
    said = beside()
    return f", {said}" if said else ""


def _speed(rate: float) -> str:
    return f"{1 / rate:.1f} s each" if 0 < rate < 1 else f"{rate:.1f}/s"
