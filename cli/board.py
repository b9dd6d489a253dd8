"""The display of runs side by side: a live table on a terminal, else one line per event and per interval."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

INTERVAL = 30.0  # seconds between progress lines where there is no terminal


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `3700` -> `1:01:40`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Board:
    """Finished and total runs, time left, and the latest line of each run that is going on. Writes to stderr."""

    def __init__(self, title: str, labels: Sequence[str]) -> None:
        self.title, self.total = title, len(labels)
        self.finished = self.failed = 0
        self.running: dict[str, str] = {}
        self.started = self.spoke = time.monotonic()
        self.live: Any = None

    def __enter__(self) -> Board:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def start(self, label: str) -> None:
        self.running[label] = "starting"

    def line(self, label: str, text: str) -> None:
        if label in self.running:
            self.running[label] = text.removeprefix(f"{label}: ")

    def finish(self, label: str, status: str, text: str) -> None:
        self.running.pop(label, None)
        self.finished += 1
        self.failed += status == "failed"
        self.say(f"[{self.finished}/{self.total}] {label}: {status}{f': {text}' if status == 'failed' else ''}")

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
        self.spoke = time.monotonic()

    def status(self) -> str:
        """`demo: 3/6 runs, 1 failed, 0:40 passed, about 0:42 left`."""
        passed = time.monotonic() - self.started
        failed = f", {self.failed} failed" if self.failed else ""
        left = ""
        if self.finished:
            left = f", about {duration(passed / self.finished * (self.total - self.finished))} left"
        return f"{self.title}: {self.finished}/{self.total} runs{failed}, {duration(passed)} passed{left}"

    def tick(self) -> None:
        """Called often; draws, or speaks when the interval is over."""
        if self.live is not None:
            from rich.text import Text

            rows = [self.status(), *(f"  {label}  {text}" for label, text in self.running.items())]
            self.live.update(Text("\n".join(rows), overflow="ellipsis", no_wrap=True))
        elif time.monotonic() - self.spoke >= INTERVAL:
            lines = [self.status(), *(f"  {label}  {text}" for label, text in self.running.items())]
            self.say("\n".join(lines))
