"""How a run shows that it moves: a bar with rate and time left on a terminal, one line per interval elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

INTERVAL = 10.0  # seconds between lines where nobody watches a terminal


def progress_of(path: Path, headline: str, shown: bool = True) -> AbstractContextManager:
    """A Progress, or nothing to see for a process that is not the first of its run."""
    return Progress(path, headline) if shown else nullcontext(lambda *_: None)


class Progress:
    """`progress(step, total, metrics)`; a context manager."""

    def __init__(self, path: Path, headline: str) -> None:
        self.label = f"{path.parent.name}/{path.name}"
        self._bar = None
        self._said = 0.0
        self._started = time.perf_counter()
        self._first: int | None = None
        print(f"{self.label}: {headline}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=None, note="")
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: int, total: int, metrics: dict[str, float]) -> None:
        shown = ("loss", "reward", "eval/score", "groups/dead")
        note = "  ".join(f"{k} {metrics[k]:.3f}" for k in shown if metrics.get(k) is not None)
        # Some methods give groups with equal rewards a signal of their own.
        if metrics.get("groups/dead", 0) >= 0.9 and metrics.get("groups/live", 0) <= 0.1:
            note += (
                "  (nearly all groups have equal rewards: no signal; change the task's difficulty or the temperature)"
            )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=total, note=note)
            return
        self._first = step if self._first is None else self._first
        now = time.perf_counter()
        if now - self._said < INTERVAL and step < total:
            return
        self._said = now
        rate = (now - self._started) / max(step - self._first, 1)
        left = f", about {rate * (total - step):.0f} s left" if step > self._first and step < total else ""
        print(f"{self.label}: step {step}/{total}  {note}{left}", file=sys.stderr, flush=True)
