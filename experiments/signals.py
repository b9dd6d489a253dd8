"""Stopping on a signal: the first asks, the second insists."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """First SIGINT, SIGTERM or SIGUSR1: `received` says which, and the work stops where it can go on later; a second
    one: stop at once. `where` says where it will stop."""

    def __init__(self, where: str = "stopping at the next generation boundary, with a checkpoint") -> None:
        self.received: int | None = None
        self.insisted = False
        self.where = where
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        if self.received is not None:
            self.insisted = True
            raise KeyboardInterrupt(number)
        self.received = number
        print(f"{self.where} (again to stop at once)", file=sys.stderr)
