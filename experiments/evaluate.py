"""Score a model on a task: ask an engine, score each completion, summarise with intervals clustered by item.

`evaluate` and `summarise` serve training too; `run` is the job behind `assay eval`.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engines.base import Engine, Progress, Request, Result
from experiments.engines.build import build_engine, engine_factory, instantiate
from experiments.engines.progress import progress_bar
from experiments.seeds import derive
from methods.errors import ConfigError, RecordError, RunError

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from experiments.tasks.base import Row, Task

COLUMNS = ("split", "item_id", "sample", "score", "length", "tier", "finish")
SOLVED = 1 - 1e-9
"""pass@k counts full scores only."""

ToRequest = Callable[["Row", Request], Request]
Metrics = Callable[[str, "Row"], Mapping[str, float]]


# ---------------------------------------------------------------- asking and scoring


def evaluate(
    engine: Engine,
    task: Task,
    rows: Sequence[Row],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    split: str = "eval",
    progress: Progress | None = None,
    to_request: ToRequest | None = None,
    metrics: Metrics | None = None,
) -> pd.DataFrame:
    """One row per item and sample: `COLUMNS`, the columns of `task.metrics`, and those of `metrics`.

    temperature 0 with samples 1 is greedy. max_tokens: None takes the task's budget. An item's random stream depends
    on `seed` and its id only, not on the other items. progress: called with the number of items just finished.
    to_request(row, request): may change what is asked, such as the prompt. metrics(text, row): further values.

    A completion that could not be had (finish "error") has NaN in score, length and metrics; the frame's
    `attrs["errors"]` counts the reasons. Raises what the engine raises.
    """
    requests = make_requests(
        task, rows, samples=samples, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed,
        to_request=to_request,
    )  # fmt: skip
    return score_results(task, rows, engine.generate(requests, progress), split=split, metrics=metrics)


def make_requests(
    task: Task,
    rows: Sequence[Row],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int | None,
    seed: int,
    to_request: ToRequest | None = None,
) -> list[Request]:
    """One request per row, with a seed of its own."""
    budget = max_tokens or task.max_completion_tokens
    requests = []
    for row in rows:
        prompt: dict[str, Any] = {"prompt" if isinstance(row.prompt, str) else "messages": row.prompt}
        request = Request(
            **prompt, n=samples, max_tokens=budget, temperature=temperature, top_p=top_p,
            seed=derive(seed, "eval", row.id),
        )  # fmt: skip
        requests.append(to_request(row, request) if to_request else request)
    return requests


def score_results(
    task: Task,
    rows: Sequence[Row],
    results: Sequence[Sequence[Result]],
    *,
    split: str = "eval",
    metrics: Metrics | None = None,
) -> pd.DataFrame:
    """The frame of `evaluate` for results that were had in any way; `results[i]` are the samples of `rows[i]`."""
    import pandas as pd

    records: list[dict[str, Any]] = []
    errors: Counter[str] = Counter()
    for row, answers in zip(rows, results, strict=True):
        for sample, result in enumerate(answers):
            record = {"split": split, "item_id": row.id, "sample": sample, "score": math.nan, "length": math.nan,
                      "tier": row.tier, "finish": result.finish}  # fmt: skip
            if result.finish == "error":
                errors[result.error or "no reason given"] += 1
            else:
                record["score"] = float(task.score(result.text, row))
                record["length"] = float(result.usage.completion_tokens if result.ids is None else len(result.ids))
                record |= task.metrics(result.text, row)
                record |= metrics(result.text, row) if metrics else {}
            records.append(record)
    frame = pd.DataFrame(records, columns=None if records else list(COLUMNS))
    frame.attrs["errors"] = dict(errors)
    return frame


# ---------------------------------------------------------------- summary


def summarise(frame: pd.DataFrame, ks: Sequence[int] = (1,)) -> dict[str, float]:
    """Named values of one evaluation (one step); `<name>.low` and `<name>.high` are 95 % intervals clustered by item.

    `score` and `score/<tier>`: mean of item means (that is avg@samples, also given as `avg@<n>` if all items have
    n > 1 samples). `pass@<k>` for k in `ks`: unbiased, over the items with at least k scored samples. `length` in
    tokens. `truncated`: share of scored completions that hit the budget. `errors`: share of completions that could not
    be had; these enter nothing else. `items`: items with a score. Further columns: their means. Where every item
    scores 0 (or 1) no resampling shows doubt, and the exact binomial bound is given.
    """
    from experiments import stats
    from experiments.tasks.base import tier_order

    scored: Any = frame[frame["finish"] != "error"]
    items = scored["split"] + "\0" + scored["item_id"]
    values: dict[str, float] = {"items": items.nunique(), "completions": len(frame)}
    values |= _with_interval("score", scored["score"], items)
    if scored["tier"].nunique() > 1:
        for tier in tier_order(scored["tier"], ("easy", "medium", "hard")):
            part = scored[scored["tier"] == tier]
            values |= _with_interval(f"score/{tier}", part["score"], items[part.index])
    counts = (scored["score"] >= SOLVED).groupby(items).agg(["size", "sum"])
    most = int(counts["size"].min()) if len(counts) else 0
    if most > 1 and most == counts["size"].max():
        values[f"avg@{most}"] = values["score"]
    for k in ks:
        enough = counts[counts["size"] >= k]
        if len(enough):
            chances = stats.pass_at_k(enough["size"], enough["sum"], k)
            values |= _with_interval(f"pass@{k}", chances, enough.index)
    values |= _with_interval("length", scored["length"], items)
    values |= _with_interval("truncated", scored["finish"] == "length", items)
    values["errors"] = Counter(frame["finish"])["error"] / len(frame) if len(frame) else 0.0
    for column in frame.columns:
        if column not in (*COLUMNS, "step"):
            values |= _with_interval(column, scored[column], items)
    return values


def _with_interval(name: str, scores: Any, items: Any) -> dict[str, float]:
    import numpy as np

    from experiments import stats

    found = stats.item_interval(scores, items)
    low, high = found.low, found.high
    known = np.asarray(scores, float)
    known = known[~np.isnan(known)]
    shares = name.startswith(("score", "pass@", "truncated"))
    if shares and len(known) and found.items and known.min() == known.max() and known[0] in (0.0, 1.0):
        bound = 0.025 ** (1 / found.items)
        low, high = (0.0, 1 - bound) if known[0] == 0 else (bound, 1.0)
    return {name: found.mean, f"{name}.low": low, f"{name}.high": high}


def powers(samples: int) -> tuple[int, ...]:
    """The k of pass@k that are shown: 1, 2, 4, ... and `samples`."""
    return tuple(sorted({2**i for i in range(samples.bit_length())} | {samples}))


def table(frame: pd.DataFrame, title: str = "") -> str:
    """The summary of a frame as text, one block per split; splits of a suite end with their mean."""
    lines = [title] if title else []
    scores = []
    for split, part in frame.groupby("split", sort=False):
        samples = Counter(part["item_id"]).most_common(1)[0][1]
        values = summarise(part, powers(samples))
        scores.append(values["score"])
        lines.append(f"{split}: {values['items']:.0f} items, {samples} sample{'s' if samples > 1 else ''} each")
        for name in values:
            if "." not in name and name not in ("items", "completions", "errors") and not name.startswith("avg@"):
                span = f"[{values[f'{name}.low']:.3f}, {values[f'{name}.high']:.3f}]" if f"{name}.low" in values else ""
                lines.append(f"  {name:<20} {values[name]:>9.3f}  {span}".rstrip())
        if values["errors"]:
            lost = Counter(part["finish"])["error"]
            lines.append(f"  {lost} of {len(part)} completions could not be had; they count nowhere above")
    if len(scores) > 1:
        lines.append(f"mean of {len(scores)} tasks: {sum(scores) / len(scores):.3f}")
    return "\n".join([*lines, "[95 % intervals, clustered by item]"])


# ---------------------------------------------------------------- the job


def run(cfg: DictConfig, *, to_request: ToRequest | None = None, metrics: Metrics | None = None) -> Path:
    """Evaluate as `cfg` (conf/eval.yaml) says and return the run folder. `to_request`, `metrics`: as in `evaluate`.

    A finished record of the same configuration is returned at once. Raises RecordError for a record of another
    configuration in its place, RunError if every completion failed, KeyboardInterrupt on SIGINT and SIGTERM (the
    answers so far are in the cache).
    """
    from omegaconf import OmegaConf

    from experiments.records import RunWriter
    from experiments.run import config_hash, run_folder

    path = run_folder(cfg)
    if _is_done(path, cfg):
        print(f"{path}: finished earlier, skipped", file=sys.stderr)
        return path
    check(cfg)
    if cfg.method and to_request is None and metrics is None:
        raise ConfigError(
            "This evaluation would leave out what its methods do",
            where="method",
            got=list(cfg.method),
            fix="evaluate with method=[]",
        )
    meta = {
        "command": "eval",
        "experiment": cfg.experiment,
        "arm": cfg.arm,
        "seed": cfg.seed,
        "pair": f"seed{cfg.seed}",
        "config_hash": config_hash(cfg),
        "argv": sys.argv[1:],
        "parent": cfg.model.get("init"),
    }
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    writer = RunWriter.open(path, meta, config, samples_per_step=200)
    try:
        with _sigterm_interrupts():
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
    make = engine_factory(cfg)
    if make.func.needs == "nothing":
        make()
    elif make.func.needs == "folder":
        make(model=cfg.engine.model or "known later")


def _measure(cfg: DictConfig, writer: Any, to_request: Any, metrics: Any) -> tuple[dict[str, float], dict[str, float]]:
    import pandas as pd

    tasks = _tasks(cfg)
    rows = {name: task.rows(cfg.eval.split, cfg.eval.seed)[: cfg.eval["items"]] for name, task in tasks.items()}
    began = time.monotonic()
    frames = []
    with build_engine(cfg, next(iter(tasks.values())), cache=cfg.eval.cache) as engine:
        for name, task in tasks.items():
            requests = make_requests(
                task, rows[name], samples=cfg.eval.samples, temperature=cfg.eval.temperature, top_p=cfg.eval.top_p,
                max_tokens=cfg.eval.max_tokens, seed=cfg.seed, to_request=to_request,
            )  # fmt: skip
            with progress_bar(f"{task.name} on {engine.name}", len(requests)) as progress:
                results = engine.generate(requests, progress)
            frame = score_results(task, rows[name], results, split=name, metrics=metrics)
            for reason, count in frame.attrs["errors"].items():
                print(f"{name}: {count} of {len(frame)} completions could not be had: {reason}", file=sys.stderr)
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
    if len(tasks) > 1:
        values["suite/score"] = sum(values[f"{name}/score"] for name in tasks) / len(tasks)
    return values, {**cost, "seconds": time.monotonic() - began}


def _reasons(frames: Sequence[pd.DataFrame]) -> Iterator[str]:
    return (reason for frame in frames for reason in frame.attrs["errors"])


def _record_samples(writer: Any, rows: Sequence[Row], results: Sequence[Sequence[Result]], frame: pd.DataFrame) -> None:
    scores = iter(frame["score"].tolist())
    for row, answers in zip(rows, results, strict=True):
        for result in answers:
            writer.sample(
                {"step": 0, "row_id": row.id, "group_id": row.id, "tier": row.tier, "prompt": row.prompt,
                 "completion": result.text, "tokens": [result.text], "advantages": [0.0],
                 "rewards": {"score": next(scores)}, "finish": result.finish}
            )  # fmt: skip


def _tasks(cfg: DictConfig) -> dict[str, Task]:
    """The tasks by the split under which they are recorded: a suite's members by name, or the one task."""
    if not cfg.suite:
        return {cfg.eval.split: instantiate(cfg.task)}
    tasks = {}
    for name, node in cfg.suite.items():
        tasks[str(name)] = instantiate(node, name=str(name))
        tasks[str(name)].config_key = f"suite.{name}"  # for error texts
    return tasks


def _is_done(path: Path, cfg: DictConfig) -> bool:
    """Whether `path` holds the finished record of `cfg`. With `overwrite` any record there is thrown away."""
    from omegaconf import OmegaConf

    from experiments.records import load_run
    from experiments.run import config_hash

    if cfg.overwrite and path.exists():
        shutil.rmtree(path)
    if not (path / "run.json").exists():
        return False
    earlier = load_run(path)
    if earlier.run.get("config_hash") != config_hash(cfg):
        old, new = _flat(earlier.config), _flat(OmegaConf.to_container(cfg, resolve=True))
        other = sorted(key for key in {**old, **new} if old.get(key) != new.get(key))
        raise RecordError(
            "This folder holds the record of another configuration",
            where=str(path),
            got=", ".join(f"{key}={old.get(key)} there, {new.get(key)} here" for key in other[:3]),
            fix="record this one elsewhere with name=..., or replace the old one with overwrite=true",
        )
    return earlier.finished and not _newer_weights(cfg, path / "summary.json")


def _newer_weights(cfg: DictConfig, summary: Path) -> bool:
    """Whether the run that is evaluated was trained on since."""
    from experiments.weights import find_init

    if not cfg.model.get("init"):
        return False
    folder = find_init(cfg.model.init, int(cfg.seed), cfg.results_dir)
    return max(file.stat().st_mtime for file in folder.iterdir()) > summary.stat().st_mtime


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix[:-1]: config}
    return {key: value for name, node in config.items() for key, value in _flat(node, f"{prefix}{name}.").items()}


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
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
