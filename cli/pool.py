"""Runs side by side: worker processes, each doing one run after another, so that slow imports happen once each.

A failed run does not stop the others. SIGINT, SIGTERM and SIGUSR1 are passed on once, so that every run can
write its checkpoint; a second one ends the workers at once. A worker that loses its parent ends itself.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from cli.board import Board
from methods.errors import AssayError, RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def resolve(target: str) -> Callable[[Any], Any]:
    """The function that `module:function` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Names of the visible NVIDIA devices, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [d for d in visible.split(",") if d.strip() and d.strip() != "-1"]
    return [str(i) for i in range(len(glob("/dev/nvidia[0-9]*")))]


def default_workers(runs: int) -> int:
    """One worker per GPU where there are GPUs, else one per core; never more than runs."""
    return max(1, min(runs, len(gpus()) or cores()))


@dataclass
class _Worker:
    process: BaseProcess
    tasks: Connection
    results: Connection
    output: Connection
    job: int | None = None
    text: str = ""
    tail: list[str] = field(default_factory=list)


def run(jobs: Sequence[tuple[str, Any]], target: str, workers: int, *, title: str = "runs") -> list[str]:
    """Run `target(argument)` for every `(label, argument)`; the results as texts, in order.

    Raises RunError with the failed labels after the last run, KeyboardInterrupt(signal number) after a signal.
    """
    state = _Pool(list(jobs), target, max(1, min(workers, len(jobs))), Board(title, [label for label, _ in jobs]))
    with state.board, state.signals():
        try:
            state.loop()
        finally:
            state.end()
    if state.signal is not None:
        raise KeyboardInterrupt(int(state.signal))
    if state.failed:
        causes = _causes(state.failed)
        raise RunError(
            f"{len(state.failed)} of {len(jobs)} runs failed",
            got=causes,
            fix="the same line again runs only what is missing",
        )
    return [state.done[i] for i in range(len(jobs))]


def _causes(failed: dict[str, str]) -> str:
    """Each reason once, with the first runs that it hit."""
    runs: dict[str, list[str]] = {}
    for label, reason in failed.items():
        runs.setdefault(reason, []).append(label)
    shown = [f"{', '.join(n[:3])}{f' and {len(n) - 3} more' if len(n) > 3 else ''}: {r}" for r, n in runs.items()]
    return "; ".join(shown)


class _Pool:
    def __init__(self, jobs: list[tuple[str, Any]], target: str, size: int, board: Board) -> None:
        self.jobs, self.target, self.size, self.board = jobs, target, size, board
        self.waiting = list(range(len(jobs)))
        self.workers: list[_Worker] = []
        self.done: dict[int, str] = {}
        self.failed: dict[str, str] = {}
        self.signal: int | None = None
        self._passed_on = False

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: Any) -> None:
        if self.signal is not None:
            for worker in self.workers:
                worker.process.kill()
        self.signal = self.signal or number

    def loop(self) -> None:
        while self.waiting or any(w.job is not None for w in self.workers):
            if self.signal is None:
                self._feed()
            elif not self._passed_on:
                self._pass_on()
            elif not any(w.job is not None for w in self.workers):
                return
            sources = [s for w in self.workers for s in (w.results, w.output, w.process.sentinel)]
            ready = set(wait(sources, timeout=0.3))
            for worker in list(self.workers):
                self._read(worker, ready)
            self.board.tick()

    def _feed(self) -> None:
        while self.waiting and len(self.workers) < min(self.size, len(self.waiting) + self._busy()):
            self.workers.append(_start(self.target, len(self.workers), self.size))
        for worker in self.workers:
            if worker.job is None and self.waiting:
                index = self.waiting.pop(0)
                # A worker that died while idle is noticed by its sentinel; its job goes back in the queue.
                try:
                    worker.tasks.send((index, self.jobs[index][1]))
                    worker.job, worker.tail = index, []
                    self.board.start(self.jobs[index][0])
                except OSError:
                    self.waiting.insert(0, index)

    def _busy(self) -> int:
        return sum(w.job is not None for w in self.workers)

    def _pass_on(self) -> None:
        self._passed_on = True
        self.waiting.clear()
        self.board.say(f"stopping: {self._busy()} runs write their checkpoints (again to stop at once)")
        for worker in self.workers:
            if worker.process.pid and worker.process.is_alive():
                os.kill(worker.process.pid, self.signal or signal.SIGTERM)

    def _read(self, worker: _Worker, ready: set[Any]) -> None:
        if worker.output in ready:
            self._drain(worker)
        if worker.results in ready:
            with contextlib.suppress(EOFError, OSError):
                self._take(worker, *worker.results.recv())
                return
        if worker.process.sentinel in ready:
            self.workers.remove(worker)
            if worker.job is not None:
                worker.process.join()
                self._drain(worker)
                last = f"; its last line: {worker.tail[-1]}" if worker.tail else ""
                code = worker.process.exitcode
                killed = f"was killed by signal {-code}" if code and code < 0 else f"ended with code {code}"
                hint = " (out of memory?)" if code == -9 else ""
                self._take(worker, "stopped" if self.signal else "failed", f"its process {killed}{hint}{last}")

    def _drain(self, worker: _Worker) -> None:
        with contextlib.suppress(OSError):
            # Only what is there: a read that waits would stall all other runs.
            data = os.read(worker.output.fileno(), 65536) if worker.output.poll() else b""
            worker.text += data.decode("utf-8", "replace").replace("\r", "\n")
        *lines, worker.text = worker.text.split("\n")
        lines = [line.strip() for line in lines if line.strip()]
        worker.tail = [*worker.tail, *lines][-50:]
        if lines and worker.job is not None:
            self.board.line(self.jobs[worker.job][0], lines[-1])

    def _take(self, worker: _Worker, status: str, text: str, trace: str = "") -> None:
        index, worker.job = worker.job, None
        if index is None:
            return
        label = self.jobs[index][0]
        if status == "finished":
            self.done[index] = text
        elif status == "failed":
            self.failed[label] = text
            if trace and "--debug" in sys.argv:
                self.board.say(trace)
        elif self.signal is None:
            # The run stopped by itself, for instance because the batch system signalled only this process.
            self.failed[label] = text or "interrupted"
        self.board.finish(label, status, text)

    def end(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.tasks.send(None)
                worker.tasks.close()
        for worker in self.workers:
            worker.process.join(timeout=None if worker.job is None else 0.1)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _start(target: str, number: int, size: int) -> _Worker:
    context = mp.get_context("spawn")
    tasks_in, tasks = context.Pipe(duplex=False)
    results, results_out = context.Pipe(duplex=False)
    output, output_out = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(tasks_in, results_out, output_out, target), daemon=False)
    # Thread counts and devices are read when torch is imported, so they must be in the environment at the start.
    extra = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // size))}
    devices = gpus()
    if devices and size > 1:
        extra["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    before = {key: os.environ.get(key) for key in extra}
    os.environ.update(extra)
    try:
        process.start()
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
    for connection in (tasks_in, results_out, output_out):
        connection.close()
    return _Worker(process, tasks, results, output)


def _work(tasks: Connection, results: Connection, output: Connection, target: str) -> None:
    """A worker's life: one run after another, until told to stop."""
    # Own process group: Ctrl-C in the terminal reaches the parent only, which passes it on exactly once.
    with contextlib.suppress(OSError, AttributeError):
        os.setpgid(0, 0)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, EOFError, OSError):
        while (task := tasks.recv()) is not None:
            status, text, trace = _one(target, task[1])
            sys.stdout.flush()
            results.send((status, text, trace))
            if status == "stopped":
                return


def _one(target: str, argument: Any) -> tuple[str, str, str]:
    try:
        return "finished", str(resolve(target)(argument)), ""
    except KeyboardInterrupt:
        return "stopped", "", ""
    except SystemExit as stop:
        return "stopped", f"exit code {stop.code}", ""
    except Exception as error:
        kind = "" if isinstance(error, AssayError) else f"{type(error).__name__}: "
        return "failed", kind + " ".join(str(error).split()), traceback.format_exc()


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
