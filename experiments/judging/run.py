"""The job behind `assay judge`: profiles, rubrics, the filter, verdicts and benchmark scores, with a record."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engines.build import build_engine, engine_factory, instantiate
from experiments.engines.progress import progress_bar
from experiments.evaluate import is_done, sigterm_interrupts
from experiments.judging.pairs import Question, Verdict, questions, write_verdicts
from methods.errors import ConfigError, RecordError, RunError

if TYPE_CHECKING:
    from omegaconf import DictConfig

STEPS = ("profile", "synthesise", "filter", "judge", "bench")
OF_RUBRICS = STEPS[:3]
TRAINED = ("generator", "model")  # keys of judge.by that name a model of one's own
WINDOW = 2048
"""Questions held at once: the memory of a run does not grow with the benchmark."""


def run(cfg: DictConfig) -> Path:
    """Do the step that `cfg` (conf/judge.yaml) names and return the run folder.

    A finished record of the same configuration is returned at once, unless the judge's own trained models (its rubric
    generator, its reward model) have other weights since. An interrupted run goes on where it was, because
    every answer is in the cache. Raises RecordError for a record of another configuration or other data in its place,
    RunError if a request failed that can be asked again (files are written, the record is not finished),
    KeyboardInterrupt on SIGINT and SIGTERM.
    """
    from experiments.recording import make_room, only_writer, open_record, run_folder

    path = run_folder(cfg)
    if is_done(path, cfg) and not _trained_since(path, cfg):
        _refuse_other_data(path, cfg)
        print(f"{path}: finished earlier, skipped", file=sys.stderr)
        return path
    check(cfg)
    with only_writer(path):
        make_room(path, cfg)
        writer = open_record(path, cfg, "judge")
        writer.update(data=_data(cfg), weights=_weights(cfg))
        try:
            with sigterm_interrupts():
                values, cost = _work(cfg, writer)
        except BaseException as error:
            writer.fail("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", str(error))
            raise
        writer.finish(values, cost)
    return path


def _data(cfg: DictConfig) -> dict[str, Any]:
    """What tells the benchmark's files apart from others of their names; {} where no file is read."""
    benchmark = instantiate(cfg.benchmark)
    return benchmark.fingerprint() if hasattr(benchmark, "fingerprint") else {}


def _refuse_other_data(path: Path, cfg: DictConfig) -> None:
    from experiments.records import load_run

    earlier, here = load_run(path).run.get("data"), _data(cfg)
    if earlier and here and earlier != here:
        raise RecordError(
            "The data has changed since this record was made",
            where=str(path),
            got=", ".join(sorted(name for name in {**earlier, **here} if earlier.get(name) != here.get(name))[:4]),
            fix="give the run another name=..., or overwrite=true to throw the old record away",
        )


def _weights(cfg: DictConfig) -> dict[str, str]:
    """Digest of the weights behind `judge.by.generator` and `judge.by.model`; none for a hub id or what is gone."""
    from experiments.weights import find_init

    found = {}
    for key in TRAINED:
        with contextlib.suppress(ConfigError):
            folder = find_init(cfg.judge.by[key], int(cfg.seed), cfg.results_dir) if cfg.judge.by.get(key) else None
            for file in sorted(folder.glob("*.safetensors")) if folder else ():
                with file.open("rb") as data:
                    found[key] = found.get(key, "") + hashlib.file_digest(data, "sha256").hexdigest()
    return found


def _trained_since(path: Path, cfg: DictConfig) -> bool:
    from experiments.records import load_run

    earlier, here = load_run(path).run.get("weights") or {}, _weights(cfg)
    return any(earlier.get(key, here[key]) != here[key] for key in here)


def check(cfg: DictConfig) -> None:
    """Raises ConfigError for what cannot be run, without loading a model or asking an endpoint."""
    for key, known in (("step", STEPS), ("orders", ("both", "seeded"))):
        if cfg.judge[key] not in known:
            raise ConfigError("Unknown value", where=f"judge.{key}", got=cfg.judge[key], expected=", ".join(known))
    make = _factory(cfg)
    if cfg.judge.step in OF_RUBRICS and not hasattr(make.func, "rubrics"):
        raise ConfigError(
            f"The step {cfg.judge.step} makes rubrics, and this judge has none",
            where=f"judge.step={cfg.judge.step}",
            fix="choose judge=cdrrm, or judge.step=bench",
        )
    if cfg.judge.step in OF_RUBRICS and make.keywords.get("writer") != "contrast":
        raise ConfigError(
            "Profiles are contrasted by judge=cdrrm only", where="judge.by.writer", got=make.keywords.get("writer")
        )
    published = getattr(instantiate(cfg.benchmark), "format", None)
    if cfg.judge.step == "filter" and published is not None and published.rows:
        raise ConfigError(
            "The step filter makes training rows, and rows of a published benchmark are never trained on",
            where=f"benchmark={cfg.benchmark.name}",
            fix="make them from pairs of your own (benchmark=pairs), or write rubrics only (judge.step=synthesise)",
        )
    if make.keywords.get("generator"):
        _weights_of_generator(cfg)
    if getattr(make.func, "needs", "") == "engine":
        make(engine=None, **({"generator": None} if "generator" in make.keywords else {}))
        asks = engine_factory(cfg)
        if asks.func.needs == "nothing":
            asks()
        elif asks.func.needs == "folder":
            asks(model=cfg.engine.model or "known later")
    elif not make.keywords.get("model"):
        make()


def _factory(cfg: DictConfig) -> Any:
    return instantiate(cfg.judge.by, _partial_=True)


def build_judge(cfg: DictConfig, stack: contextlib.ExitStack) -> Any:
    """The judge of `cfg.judge.by`, with the engines that it asks; `stack` closes them."""
    from experiments.reward_model import trained
    from experiments.tasks.base import Task

    make = _factory(cfg)
    if getattr(make.func, "needs", "") != "engine":
        own = make.keywords.get("model")
        return make(model=trained(own, int(cfg.seed), cfg.results_dir)) if own else make()
    engine = stack.enter_context(build_engine(cfg, Task(name="judge")))
    if not make.keywords.get("generator"):
        return make(engine=engine)
    return make(engine=engine, generator=stack.enter_context(_generator(cfg)))


def _weights_of_generator(cfg: DictConfig) -> Path:
    from experiments.weights import find_init

    try:
        return find_init(cfg.judge.by.generator, int(cfg.seed), cfg.results_dir)
    except ConfigError as error:
        raise ConfigError(
            error.what, where="judge.by.generator", got=error.got, expected=error.expected, fix=error.fix
        ) from error


def _generator(cfg: DictConfig) -> Any:
    """An engine on the weights of the trained rubric generator, cached as any other."""
    from omegaconf import OmegaConf

    from experiments.tasks.base import Task

    node = {"_target_": "experiments.models.HF", "path": None, "init": cfg.judge.by.generator}
    engine = {"_target_": "experiments.engines.transformers.TransformersEngine", "batch_size": 64, "device": None}
    theirs = OmegaConf.merge(cfg, {})
    theirs.model, theirs.engine = OmegaConf.create(node), OmegaConf.create(engine)
    return build_engine(theirs, Task(name="generator"))  # type: ignore[arg-type]


def shown(cfg: DictConfig) -> str:
    """What a finished run says: its table where it scored a benchmark, else its figures."""
    from experiments.recording import run_folder
    from experiments.records import load_run

    path = run_folder(cfg)
    if (path / "table.md").is_file():
        return (path / "table.md").read_text(encoding="utf-8")
    metrics = (load_run(path).summary or {}).get("metrics") or {}
    known = {key: value for key, value in metrics.items() if value is not None and "." not in key}
    return "\n".join(f"{key:<50} {value:>10.4g}" for key, value in known.items())


# ---------------------------------------------------------------- the work


def _work(cfg: DictConfig, writer: Any) -> tuple[dict[str, float], dict[str, float]]:
    from experiments.judging import steps

    began = time.monotonic()
    benchmark = instantiate(cfg.benchmark)
    with contextlib.ExitStack() as stack:
        judge = build_judge(cfg, stack)
        if cfg.judge.step in OF_RUBRICS:
            values = steps.run(cfg, judge, benchmark, writer.path)
        else:
            values = _verdicts(cfg, judge, benchmark, writer)
        cost = engine_cost(judge)
    for reason, count in judge.counts.most_common() if hasattr(judge, "counts") else ():
        print(f"{reason}: {count}", file=sys.stderr)
        values[f"count/{reason}"] = float(count)
    if 0 < cost.get("requests", 0) == cost.get("errors", 0) and not cost.get("cached"):
        raise RunError("No answer could be had", got="; ".join(judge.counts) or "errors only",
                       fix="see the reasons above; the same command then asks again")  # fmt: skip
    if lost := _unanswered(judge):
        raise RunError(f"{lost} requests failed, so the run is not finished", where=str(writer.path),
                       got="; ".join(reason for reason in judge.counts if reason.startswith("request failed")),
                       fix="the same command asks only those again; until then they count as unparsable")  # fmt: skip
    return values, {**cost, "seconds": time.monotonic() - began}


def _unanswered(judge: Any) -> int:
    """Requests that failed and can be asked again."""
    return sum(getattr(asker, "unanswered", 0) for asker in vars(judge).values())


def engine_cost(judge: Any) -> dict[str, float]:
    """What was asked of all engines of a judge, summed."""
    engines = {id(e): e for e in (getattr(a, "engine", None) for a in (judge, *vars(judge).values())) if e is not None}
    total: dict[str, float] = {}
    for engine in engines.values():
        for key, value in engine.cost().items():
            total[key] = total.get(key, 0) + value
    return total


def _verdicts(cfg: DictConfig, judge: Any, benchmark: Any, writer: Any) -> dict[str, float]:
    from experiments.judging import outcome

    def asked() -> Iterator[Question]:
        return questions(benchmark.stream(), int(cfg.seed), judge.form, cfg.judge.orders)

    file = writer.path / "verdicts.parquet"
    total = sum(1 for _ in asked())
    calls = getattr(judge, "calls", 1)
    with progress_bar(f"{benchmark.name} by {judge.name}", total * calls, unit="calls") as progress:
        watch = getattr(judge, "watch", None)
        if watch is not None:
            watch(progress)
        write_verdicts(file, in_order(judge, asked(), None if watch else progress),
                       {"judge": judge.name, "seed": str(cfg.seed)})  # fmt: skip
    return outcome.record(cfg, file, writer, benchmark)


def in_order(judge: Any, asked: Iterator[Question], progress: Any = None) -> Iterator[Verdict]:
    """The verdicts in the order of their questions, a window at a time, whatever the order in which they came.

    Raises RunError where a judge leaves a question out.
    """
    while window := list(itertools.islice(asked, WINDOW)):
        found = {}
        for verdict in judge.judge(window):
            found[verdict.question.key] = verdict
            if progress:
                progress(1)
        if len(found) < len(window):
            raise RunError("The judge left questions out", where=judge.name, got=f"{len(found)} of {len(window)}")
        yield from (found[question.key] for question in window)
