"""Which folder a configuration's record lies in, and whether the one that lies there is its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.files import os_errors
from experiments.records import RunWriter, load_run
from methods.errors import AssayError, RecordError

# What does not change the numbers of a run, and so does not make its record another one's.
BOOKKEEPING = ("results_dir", "overwrite", "name", "record", "experiment", "arm")
BOOKKEEPING_TRAINER = ("save_every", "keep_checkpoints")


def run_folder(cfg: DictConfig) -> Path:
    return Path(cfg.results_dir) / "raw" / str(cfg.experiment or "adhoc") / str(cfg.arm or "run") / f"seed{cfg.seed}"


def config_hash(cfg: DictConfig) -> str:
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain = {k: v for k, v in plain.items() if k not in BOOKKEEPING}
    plain["trainer"] = {k: v for k, v in plain.get("trainer", {}).items() if k not in BOOKKEEPING_TRAINER}
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()


def already_done(path: Path, cfg: DictConfig) -> bool:
    """Whether `path` holds the finished record of `cfg`. RecordError if it holds another configuration.

    `overwrite=true` answers no whatever is there; the caller then throws it away.
    """
    with os_errors(path):
        if cfg.overwrite or not (path / "run.json").exists():
            return False
    earlier = load_run(path)
    if earlier.run.get("config_hash") != config_hash(cfg):
        changed = _changed_keys(earlier.config, OmegaConf.to_container(cfg, resolve=True))
        raise RecordError(
            "this folder holds the record of another configuration",
            where=str(path),
            got="; ".join(changed[:4]) if changed else "another version of the configuration",
            fix="give the run another name=..., or overwrite=true to throw the old record away",
        )
    if earlier.finished:
        _refuse_changed_inputs(path, earlier.run.get("inputs") or {}, inputs(cfg))
    return earlier.finished


def inputs(cfg: DictConfig) -> dict[str, str]:
    """`{name: digest}` of the files that the configuration names (data, reward functions); folders are not read."""
    found: dict[str, str] = {}

    def walk(value: Any) -> None:
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner)
        if isinstance(value, str) and ("." in value or os.sep in value):
            path = os.path.expanduser(re.sub(r"(?<=\.py):\w+$", "", value))
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    found[value] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()

    walk({k: v for k, v in OmegaConf.to_container(cfg, resolve=True).items() if k not in BOOKKEEPING})  # type: ignore
    return found


def _refuse_changed_inputs(path: Path, before: dict[str, str], now: dict[str, str]) -> None:
    changed = [name for name, digest in now.items() if before.get(name, digest) != digest]
    if changed:
        raise RecordError(
            "a file that this finished run has read has changed since",
            where=str(path),
            got=", ".join(changed[:4]),
            fix="give the new run another name=..., or overwrite=true to throw the old record away",
        )


def make_room(path: Path, cfg: DictConfig) -> None:
    """Throws an earlier record away where `overwrite=true` asks for it; after `check`, so that a typo costs nothing."""
    if cfg.overwrite and path.exists():
        with os_errors(path):
            shutil.rmtree(path)


def _changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [f"{prefix[:-1]}={old} there, {new} here"] if old != new else []
    keys = [k for k in {**old, **new} if prefix or k not in BOOKKEEPING]
    return [c for k in keys for c in _changed_keys(old.get(k), new.get(k), f"{prefix}{k}.")]


@contextmanager
def only_writer(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Holds a run's folder for this process. RecordError if another process still writes there after `patience` s."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.parent / f".{path.name}.lock")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise RecordError(
                "another process is writing this run",
                where=str(path),
                fix="wait for it, or give this one another name=...",
            ) from None
    try:
        yield
    finally:
        lock.release()


def open_record(path: Path, cfg: DictConfig, command: str, **limits: int) -> RunWriter:
    """Starts the record of `cfg` at `path`, or takes up the unfinished one there."""
    meta = {
        "command": command,
        "experiment": cfg.experiment,
        "arm": cfg.arm,
        "seed": cfg.seed,
        "pair": f"seed{cfg.seed}",
        "config_hash": config_hash(cfg),
        "inputs": inputs(cfg),
        "cwd": os.getcwd(),  # relative paths of the configuration start here
        "argv": sys.argv[1:],
        "parent": cfg.model.get("init"),
        "before": spent_before(cfg) if command == "train" else {},
    }
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    return RunWriter.open(path, meta, resolved, **limits)


def spent_before(cfg: DictConfig) -> dict[str, float]:
    """Steps and costs of the finished runs that led to the weights of `model.init`; {} where there is no such run.

    ConfigError if there are no such weights.
    """
    from experiments.weights import find_init

    init = cfg.model.get("init")
    if not init:
        return {}
    folder = find_init(init, cfg.seed, cfg.results_dir)
    path = next((place for place in (folder, *folder.parents[:2]) if (place / "summary.json").is_file()), None)
    if path is None:
        return {}
    earlier = load_run(path)
    spent = {"step": earlier.run.get("step", 0), **((earlier.summary or {}).get("metrics") or {})}
    earliest = earlier.run.get("before") or {}
    counted = {k: v for k, v in spent.items() if k.startswith("cost/") or k in ("step", "time/total")}
    return {k: counted.get(k, 0) + earliest.get(k, 0) for k in {**earliest, **counted}}


class Bystander(RunWriter):
    """The writer of a process that is not the first of its run: it knows the folder and writes nothing."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, {}

    def _nothing(self, *_: Any, **__: Any) -> bool:
        return False

    update: Any = _nothing
    log = eval = sample = cut = finish = fail = update


def note_failure(path: Path, error: AssayError) -> None:
    """Says in a record that is there why its run ended, in place of what its processes could say themselves."""
    if (path / "run.json").is_file() and not (path / "summary.json").is_file():
        RunWriter(path, load_run(path).run).fail("failed", str(error))
