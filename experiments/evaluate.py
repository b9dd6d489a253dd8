"""The job behind `assay eval`: a model, checkpoint or endpoint on a task, a suite or a study, with a record."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engines.base import Result
from experiments.engines.build import build_engine, engine_factory, instantiate
from experiments.engines.progress import progress_bar
from experiments.scoring import Metrics, ToRequest, make_requests, powers, score_results, summarise
from experiments.seeds import derive
from methods.errors import ConfigError, RunError

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from experiments.tasks.base import Row, Task


def run(cfg: DictConfig, *, to_request: ToRequest | None = None, metrics: Metrics | None = None) -> Path:
    """Evaluate as `cfg` (conf/eval.yaml) says and return the run folder. `to_request`, `metrics`: as in `evaluate`.

    A finished record of the same configuration is returned at once. Raises RecordError for a record of another
    configuration in its place, RunError if every completion failed, KeyboardInterrupt on SIGINT and SIGTERM (the
    answers so far are in the cache).
    """
    from experiments.recording import make_room, only_writer, open_record, run_folder

    path = run_folder(cfg)
    if is_done(path, cfg):
        print(f"{path}: finished earlier, skipped", file=sys.stderr)
        return path
    check(cfg)
    with only_writer(path):
        make_room(path, cfg)
        writer = open_record(path, cfg, "eval", samples_per_step=200)
        try:
            with sigterm_interrupts():
                values, cost = _measure(cfg, writer, to_request, metrics)
        except BaseException as error:
            writer.fail("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", str(error))
            raise
        writer.finish(values, cost)
    return path


def check(cfg: DictConfig) -> None:
    """Raises ConfigError for an evaluation that cannot be run, without loading a model or asking an endpoint."""
    for key, least in (("items", 1), ("samples", 1), ("max_tokens", 1), ("temperature", 0)):
        value = cfg.eval[key]
        if value is not None and value < least:
            raise ConfigError("An evaluation setting is too small", where=f"eval.{key}", got=value,
                              expected=f"at least {least}")  # fmt: skip
    if cfg.eval.samples > 1 and cfg.eval.temperature == 0:
        raise ConfigError(
            "Greedy decoding gives the same completion every time",
            where="eval.samples",
            got=cfg.eval.samples,
            fix="set eval.temperature=1, or eval.samples=1",
        )
    if not cfg.method and not cfg.suite and not cfg.get("study"):
        from experiments.run import check_episodes

        check_episodes(cfg)
    make = engine_factory(cfg)
    if make.func.needs == "nothing":
        make()
    elif make.func.needs == "folder":
        make(model=cfg.engine.model or "known later")


def _measure(cfg: DictConfig, writer: Any, to_request: Any, metrics: Any) -> tuple[dict[str, float], dict[str, float]]:
    import pandas as pd

    study = instantiate(cfg.study) if cfg.get("study") else None
    if hasattr(study, "simulate"):
        return _simulated(cfg, writer, study)
    tasks = _tasks(cfg)
    rows = {name: task.rows(cfg.eval.split, cfg.eval.seed)[: cfg.eval["items"]] for name, task in tasks.items()}
    began = time.monotonic()
    frames = []
    with build_engine(cfg, next(iter(tasks.values())), cache=cfg.eval.cache) as engine:
        for name, task in tasks.items():
            frame, results = _answers(cfg, engine, name, task, rows[name], to_request, metrics)
            for reason, count in frame.attrs["errors"].items():
                print(f"{name}: {count} of {len(frame)} completions could not be had: {reason}", file=sys.stderr)
            if results:  # a study keeps no completions
                _record_samples(writer, rows[name], results, frame)
            frames.append(frame)
        cost = engine.cost()
    frame = pd.concat(frames, ignore_index=True)
    writer.eval(frame, step=0)
    if set(frame["finish"]) == {"error"}:
        raise RunError("No completion could be had", where=f"engine={engine.name}", got=next(iter(_reasons(frames))),
                       fix="see the reasons above; the same command then asks again")  # fmt: skip
    values: dict[str, float] = {}
    for name, part in zip(tasks, frames, strict=True):
        values |= {f"{name}/{key}": value for key, value in summarise(part, powers(cfg.eval.samples)).items()}
        values |= {f"{name}/left_out/{key}": count for key, count in tasks[name].left_out.items()}
    if len(tasks) > 1:
        values["suite/score"] = sum(values[f"{name}/score"] for name in tasks) / len(tasks)
    return values, {**cost, "seconds": time.monotonic() - began}


def _simulated(cfg: DictConfig, writer: Any, study: Any) -> tuple[dict[str, float], dict[str, float]]:
    """A study that needs no model: it gives its frame for a seed, and no engine is built."""
    began = time.monotonic()
    frame = study.simulate(int(cfg.seed)).assign(finish="stop", split=cfg.eval.split)
    writer.eval(frame, step=0)
    values = {f"{cfg.eval.split}/{key}": value for key, value in summarise(frame).items()}
    return values, {"seconds": time.monotonic() - began}


def _answers(cfg: DictConfig, engine: Any, name: str, task: Task, rows: list[Row], to_request: Any, metrics: Any):
    """(frame, results) of one task: asked plainly, through the hooks of `method=`, or measured by a study."""
    e = cfg.eval
    if cfg.get("study"):
        return _study(cfg, engine, task, rows), []
    if cfg.method or getattr(task, "tools", None) is not None:
        return _hooked(cfg, engine, name, task, rows)
    requests = make_requests(
        task, rows, samples=e.samples, temperature=e.temperature, top_p=e.top_p, max_tokens=e.max_tokens,
        seed=cfg.seed, to_request=to_request,
    )  # fmt: skip
    with progress_bar(f"{task.name} on {engine.name}", len(requests)) as progress:
        results = engine.generate(requests, progress)
    return score_results(task, rows, results, split=name, metrics=metrics), results


def _study(cfg: DictConfig, engine: Any, task: Task, rows: list[Row]) -> pd.DataFrame:
    """A measurement on many rollouts per item; the study names its own columns."""

    def scores(n: int) -> list[list[float]]:
        requests = make_requests(task, rows, samples=n, temperature=1.0, top_p=1.0, max_tokens=None, seed=cfg.seed)
        with progress_bar(f"{n} rollouts per item", len(requests)) as progress:
            results = engine.generate(requests, progress)
        return [[task.score(r.text, row) for r in answers] for answers, row in zip(results, rows, strict=True)]

    frame = instantiate(cfg.study).run(scores, rows).assign(finish="stop", split=cfg.eval.split)
    frame.attrs["errors"] = {}
    return frame


def _hooked(cfg: DictConfig, engine: Any, name: str, task: Task, rows: list[Row]):
    """Rollouts through the methods' evaluation hooks, with the state that training left in `model.init`."""
    from types import SimpleNamespace

    from experiments import hooked
    from experiments.engines.base import Request, encode
    from experiments.services import Services
    from methods.base import Context

    e, stack = cfg.eval, hooked.stack_of(cfg)
    budget = e.max_tokens or task.max_completion_tokens
    how = hooked.Sampling(e.samples, e.temperature, e.top_p, budget, derive(cfg.seed, "eval"))
    limits = SimpleNamespace(max_completion_tokens=budget)
    tokenizer = getattr(engine, "tokenizer", None)
    services = Services(engine, task, int(cfg.seed), limits, tokenizer)
    ctx = Context("eval", 0, 0, e.samples, services=services, signal_fn=stack.signal)

    def ids(prompt: Any) -> list[int]:
        return encode(tokenizer, Request(**hooked.prompt_field(prompt)), engine.chat)

    trajs, columns = hooked.rollouts(stack, ctx, engine, rows, how, None if tokenizer is None else ids)
    results = hooked.as_results(trajs, e.samples)
    frame = score_results(task, rows, results, split=name).assign(**columns)
    frame.attrs["turns"] = [[{"text": turn.text, "result": turn.result} for turn in t.turns] for t in trajs]
    return frame, results


def _reasons(frames: Sequence[pd.DataFrame]) -> Iterator[str]:
    return (reason for frame in frames for reason in frame.attrs["errors"])


def _record_samples(writer: Any, rows: Sequence[Row], results: Sequence[Sequence[Result]], frame: pd.DataFrame) -> None:
    """One sample per completion; an episode with tools has its `turns`, each with the text and what it was told."""
    scores, turns = iter(frame["score"].tolist()), iter(frame.attrs.pop("turns", ()))
    for row, answers in zip(rows, results, strict=True):
        for result in answers:
            writer.sample(
                {"step": 0, "row_id": row.id, "group_id": row.id, "tier": row.tier, "prompt": row.prompt,
                 "completion": result.text, "tokens": [result.text], "advantages": [0.0],
                 "rewards": {"score": next(scores)}, "finish": result.finish} | _turns(row, next(turns, []))
            )  # fmt: skip


def _turns(row: Row, turns: list[dict]) -> dict[str, Any]:
    more = {"turns": turns, "reference": row.meta.get("reference")} if any(turn["text"] for turn in turns) else {}
    return {key: value for key, value in more.items() if value is not None}


def _tasks(cfg: DictConfig) -> dict[str, Task]:
    """The tasks by the split under which they are recorded: a suite's members by name, or the one task."""
    if not cfg.suite:
        return {cfg.eval.split: instantiate(cfg.task)}
    tasks = {}
    for name, node in cfg.suite.items():
        tasks[str(name)] = instantiate(node, name=str(name))
        tasks[str(name)].config_key = f"suite.{name}"  # for error texts
    return tasks


def is_done(path: Path, cfg: DictConfig) -> bool:
    from experiments.recording import already_done

    return already_done(path, cfg) and not _newer_weights(cfg, path / "summary.json")


def _newer_weights(cfg: DictConfig, summary: Path) -> bool:
    """Whether the run that is evaluated was trained on since."""
    from experiments.weights import find_init

    if not cfg.model.get("init"):
        return False
    folder = find_init(cfg.model.init, int(cfg.seed), cfg.results_dir)
    return max(file.stat().st_mtime for file in folder.iterdir()) > summary.stat().st_mtime


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does, so that the record says what happened."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, _: Any) -> None:
        raise KeyboardInterrupt(signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
