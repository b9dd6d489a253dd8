"""The job behind `assay synth-data`: triples in, validated conversations out, in the order of the input.

Many triples are under way at once; what is written is in their order, and depends on the triples, the settings and the
engine's answers only. So a job that was killed goes on from its last state with the same file as its result, and the
cache answers what the engine was asked before.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import synthesis_files as files
from experiments.engines.base import Request, Result
from methods.errors import ConfigError, RunError, check_range
from methods.toolforge.items import Item, Skip, read_item
from methods.toolforge.labels import Label, Rounds
from methods.toolforge.pipeline import Attempt, Recipe, converse, label_item
from methods.toolforge.shapes import ROUTES, Shape, of_route

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.engines.session import Session

SAVE_SECONDS = 2.0
REMEMBERED = 10  # triples of each route that are tried again for shapes that are still missing at the end


def run(cfg: DictConfig) -> Path:
    """Synthesise as `cfg` (conf/synth_data.yaml) says; returns the folder.

    A finished folder of the same job is returned at once. Raises ConfigError and DataError before anything is written,
    RecordError for another job's folder, RunError if nothing was kept or the engine is down, KeyboardInterrupt after a
    stop (resumable).
    """
    from experiments import synthesis_report as report
    from experiments.engines.progress import progress_bar
    from experiments.signals import StopSignals
    from experiments.synthesis_setup import job_key, open_output, own_bank, set_up

    check(cfg)
    sources = files.input_files(_plain(cfg.input))
    content, total = files.measured(sources)
    if not total:
        raise ConfigError("The input has no rows", where="input", got=", ".join(map(str, sources)))
    own = own_bank(cfg)
    output = open_output(cfg, job_key(cfg, content))
    if output.finished:
        print(f"{output.folder}: finished earlier, skipped", file=sys.stderr)
        return output.folder
    began = time.monotonic()
    with (
        contextlib.closing(output),
        StopSignals("waiting for the answers under way, then stopping") as stop,
        set_up(cfg, output, own, stop) as (recipe, session, cost),
    ):
        forge = Forge(recipe, session, cfg, output.state)
        beside = (lambda: f"{forge.answers} answers") if session else str
        with progress_bar("synthesis", total, unit="triples", beside=beside) as progress:
            forge.heard = lambda: progress(0)  # a model that takes minutes for a triple is seen to live
            progress(output.state["position"])
            _write_all(forge, sources, output, cfg, stop, progress, cost)
        if session is not None:
            session.drain()  # more may be under way than was wanted: it is paid for, and a larger job will ask it
        report.finish(output, cfg, total, cost(), time.monotonic() - began)
    return output.folder


def check(cfg: DictConfig) -> None:
    """Raises ConfigError for settings that cannot be right."""
    for key in ("attempts", "tries", "max_tokens", "window", "conversations", "batch_tokens"):
        if cfg[key] is not None:
            check_range(key, cfg[key], 1)
    for key in ("variants", "attempts"):
        check_range(f"tools.{key}", cfg.tools[key], 1)
    for gate in ("tools", "negatives"):
        for key, least in (("theta_c", -1.0), ("theta_b", 0.0), ("theta_max", 0.0)):
            if key != "theta_max" or cfg[gate][key] is not None:
                check_range(f"{gate}.{key}", cfg[gate][key], least, 1.0)
    if isinstance(cfg.languages, str):
        raise ConfigError("Not a list", where="languages", got=cfg.languages, expected="[en], [zh] or [en,zh]")
    if unknown := [name for name in cfg.languages if name not in ("en", "zh")]:
        raise ConfigError("Unknown language of tools", where="languages", got=unknown[0], expected="en, zh or both")
    if not len(cfg.languages):
        raise ConfigError("There is no language of tools", where="languages", expected="en, zh or both")
    for stage, how in cfg.stages.items():
        if how not in ("auto", "template", "engine"):
            raise ConfigError("Unknown writer", where=f"stages.{stage}", got=how, expected="auto, template or engine")
        if how == "engine" and not cfg.get("engine"):
            raise ConfigError(
                "There is no engine for this stage",
                where=f"stages.{stage}=engine",
                fix="choose engine=transformers, vllm or openai, or set the stage to template",
            )
    if cfg.rules not in ("paper", "release"):
        raise ConfigError("Unknown set of rules", where="rules", got=cfg.rules, expected="paper or release")


def _plain(value: Any) -> Any:
    return list(value) if not isinstance(value, str) and value is not None else value


def _write_all(
    forge: Forge, sources: Sequence[Path], output: files.Output, cfg: DictConfig, stop: Any, progress: Any, cost: Any
) -> None:
    """Main pass over the triples, then the shapes that no triple got in its turn. KeyboardInterrupt after a signal."""
    saved, position = time.monotonic(), output.state["position"]
    rows = ((n, record) for n, record in files.triples(sources) if n >= position)
    wanted = cfg.conversations or sys.maxsize

    def enough() -> bool:
        return stop.received is not None or forge.kept_total >= wanted

    for job in forge.jobs(rows, enough):
        _emit(job, output, forge, wanted)
        position = job.number + 1
        progress(1)
        if time.monotonic() - saved > SAVE_SECONDS:
            output.save(**forge.state(), position=position, cost=cost())
            saved = time.monotonic()
    output.save(**forge.state(), position=position, cost=cost())
    if stop.received is None and forge.kept_total < wanted:
        for job in forge.missing(sources, enough):
            _emit(job, output, forge, wanted)
    if stop.received is not None:
        raise KeyboardInterrupt(stop.received)
    for file in output.files.values():
        file.flush()


def _emit(job: Job, output: files.Output, forge: Forge, wanted: int) -> None:
    from experiments.synthesis_report import row_of

    for attempt in job.attempts:
        if attempt.kept and forge.kept_total < wanted:
            assert attempt.record is not None and job.label is not None
            forge.keep(job, attempt)
            output.write(files.RECORDS, attempt.record)
            output.write(files.TRAIN, row_of(attempt.record, job.label.route))
        elif not attempt.kept:
            messages = attempt.record[1]["messages"] if attempt.record else None
            output.write(
                files.REJECTED,
                {"row": job.number, "item": attempt.item, "shape": attempt.shape, "stage": attempt.stage,
                 "reason": attempt.reason, "detail": attempt.detail, "scores": attempt.scores, "messages": messages},
            )  # fmt: skip


# ---------------------------------------------------------------- triples under way


@dataclass
class Job:
    """One triple on its way. `talk` is the stage that waits for an answer; `todo` the shapes still to be tried."""

    number: int
    item: Item | None = None
    label: Label | None = None
    rounds: Rounds | None = None
    talk: Any = None
    todo: list[Shape] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    done: bool = False


class Forge:
    """Keeps a window of triples under way and gives them back, finished, in the order of the input.

    Shapes go round within each route in the order of the input, which waits for the labels of all earlier triples, so
    that answers that come in another order change nothing.
    """

    def __init__(self, recipe: Recipe, session: Session | None, cfg: Any, state: dict[str, Any]) -> None:
        self.recipe, self.session = recipe, session
        # Read once: a look into the configuration costs as much as a small stage.
        self.window, self.wanted, self.attempts = cfg.window, cfg.conversations, cfg.attempts
        self.max_tokens, self.seed = cfg.max_tokens, cfg.seed
        self.turns: dict[str, int] = dict(state.get("turns") or dict.fromkeys(ROUTES, 0))
        self.kept: dict[str, int] = dict(state.get("kept") or {})
        self.seen: dict[str, list[int]] = {k: list(v) for k, v in (state.get("seen") or {}).items()}
        self._jobs: dict[int, Job] = {}
        self.answers = 0
        self.heard: Callable[[], None] = lambda: None  # called after each answer

    @property
    def kept_total(self) -> int:
        return sum(self.kept.values())

    def state(self) -> dict[str, Any]:
        """As of the last job that was given back: what later ones have advanced is replayed."""
        return {"turns": self._turns_out, "kept": self.kept, "seen": self.seen}

    def keep(self, job: Job, attempt: Attempt) -> None:
        self.kept[attempt.shape] = self.kept.get(attempt.shape, 0) + 1

    def jobs(self, rows: Iterator[tuple[int, Any]], stopped: Any) -> Iterator[Job]:
        """All triples in order, each with its attempts."""
        window: deque[Job] = deque()
        waiting: deque[Job] = deque()  # for their shapes
        self._turns_out = dict(self.turns)
        more = True
        while (more or window) and not stopped():
            while more and len(window) < self._room() and not (window and window[0].done):
                row = next(rows, None)
                if row is None:
                    more = False
                    break
                job = self._begin(*row)
                window.append(job)
                waiting.append(job)
                self._assign(waiting)
            if window and window[0].done:
                job = window.popleft()
                self._note(job)
                yield job
            elif window:
                self._answer()
                self._assign(waiting)

    def _room(self) -> int:
        """Triples under way at once: hardly more than can still be wanted, because each is paid for."""
        if self.wanted is None:
            return self.window
        return min(self.window, max(1, 2 * (self.wanted - self.kept_total)))

    def missing(self, sources: Sequence[Path], stopped: Any) -> Iterator[Job]:
        """Further dialogues for shapes that have none although their route occurs: the first triples of the route are
        tried one after the other."""
        lacking = [s for route in self.seen for s in of_route(route) if not self.kept.get(s.name)]
        wanted = {n for numbers in self.seen.values() for n in numbers} if lacking else set()
        found = {n: record for n, record in files.triples(sources) if n in wanted} if wanted else {}
        for shape in lacking:
            route = next(r for r, family in ROUTES.items() if family == shape.family)
            for number in self.seen[route]:
                if stopped():
                    return
                job = self._begin(number, found[number])
                while not job.label and not job.done:
                    self._answer()
                if not job.done:
                    job.todo = [shape]
                    self._next(job)
                    while not job.done:
                        self._answer()
                yield job
                if any(attempt.kept for attempt in job.attempts):
                    break

    # ---------------------------------------------------------------- one triple

    def _begin(self, number: int, record: dict | str) -> Job:
        job = Job(number)
        self._jobs[number] = job
        try:
            if isinstance(record, str):
                raise Skip("item", record)
            job.item = read_item(record, name=f"row-{number}")
            self._start(job, label_item(job.item, self.recipe))
        except Skip as skip:
            self._reject(job, skip)
        return job

    def _assign(self, waiting: deque[Job]) -> None:
        """Shapes for the triples whose label is known, in the order of the input."""
        while waiting and (waiting[0].done or waiting[0].label):
            job = waiting.popleft()
            if job.done or job.label is None:
                continue
            shapes, first = of_route(job.label.route), self.turns[job.label.route]
            job.todo = [shapes[(first + i) % len(shapes)] for i in range(min(self.attempts, len(shapes)))]
            self.turns[job.label.route] = (first + 1) % len(shapes)
            self._next(job)

    def _next(self, job: Job) -> None:
        assert job.item is not None and job.label is not None
        if not job.todo or any(attempt.kept for attempt in job.attempts):
            job.done = True
            self._jobs.pop(job.number, None)
            return
        self._start(job, converse(job.item, job.label, job.rounds, job.todo.pop(0), self.recipe))

    def _start(self, job: Job, talk: Any) -> None:
        job.talk = talk
        self._advance(job, None)

    def _advance(self, job: Job, text: str | None) -> None:
        try:
            ask = job.talk.send(text)
        except StopIteration as end:
            if isinstance(end.value, Attempt):
                job.attempts.append(end.value)
                self._next(job)
            else:
                job.label, job.rounds = end.value
            return
        except Skip as skip:
            self._reject(job, skip)
            return
        assert self.session is not None
        request = Request(
            messages=ask.messages, max_tokens=self.max_tokens, temperature=ask.temperature, seed=self.seed + ask.seed
        )
        self.session.submit(job.number, request)

    def _answer(self) -> None:
        """Waits for one answer and lets its triple go on."""
        assert self.session is not None
        tag, results = self.session.get()
        self.answers += 1
        self.heard()
        self._advance(self._jobs[int(tag)], text_of(results))  # type: ignore[arg-type]

    def _reject(self, job: Job, skip: Skip) -> None:
        name = job.item.id if job.item else f"row-{job.number}"
        job.attempts.append(Attempt(name, "", None, {}, skip.stage, skip.reason, skip.detail))
        job.done = True
        self._jobs.pop(job.number, None)

    def _note(self, job: Job) -> None:
        if job.label is None:
            return
        route = job.label.route
        self._turns_out[route] = (self._turns_out[route] + 1) % len(of_route(route))
        if job.item is not None and any(attempt.kept for attempt in job.attempts):
            numbers = self.seen.setdefault(route, [])
            if len(numbers) < REMEMBERED:
                numbers.append(job.number)


def text_of(results: Sequence[Result]) -> str | None:
    """The text of the first result; None for an error."""
    return None if results[0].finish == "error" else results[0].text


def nothing_kept(reasons: dict[str, int]) -> RunError:
    """The error of a job without a single conversation."""
    top = sorted(reasons.items(), key=lambda pair: -pair[1])[:3]
    return RunError(
        "No conversation passed",
        got="; ".join(f"{reason}: {count}" for reason, count in top),
        expected="triples with question, answer and golden context",
        fix=f"look into {files.REJECTED} and statistics.json in the output folder",
    )
