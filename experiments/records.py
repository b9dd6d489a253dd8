"""What a run leaves on disk, and the only code that writes or reads it.

A run folder ``results/raw/<experiment>/<arm>/seed<k>/`` holds ``run.json``, ``config.yaml``, ``env.json``,
``metrics.jsonl``, ``eval.parquet``, ``samples.jsonl``, ``checkpoints/`` and, written last, ``summary.json``.
Whole files are replaced atomically; lines are appended one write at a time, and a last line cut off by a kill
is not seen by the readers. NaN and infinities are stored as null. In a run of several processes only the first
one writes.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.environment import environment
from experiments.files import append_line, clean, new_folder, os_errors, replace, write_json
from methods.errors import ConfigError, RecordError, RunError

__all__ = ["SCHEMA", "Run", "RunWriter", "environment", "find_runs", "latest_experiment", "load_run", "write_json"]

SCHEMA = 1
Frame = Any  # a pandas DataFrame; pandas is imported late and its annotations reject ordinary indexing
STATUSES = ("running", "finished", "failed", "interrupted")
EVAL_COLUMNS = ("step", "split", "item_id", "sample", "score", "length", "tier", "finish")
_EVAL_DEFAULTS: dict[str, Any] = {"split": "eval", "sample": 0, "length": math.nan, "tier": "all", "finish": ""}


# ---------------------------------------------------------------- reading


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RecordError("This is not a run folder", where=str(path.parent), got=f"no {path.name}") from None
    except NotADirectoryError:
        raise RecordError("This is not a run folder", where=str(path.parent), got="a file") from None
    except (ValueError, OSError) as error:
        fix = "delete that run's folder and run it again"
        raise RecordError("A record is damaged", where=str(path), got=str(error), fix=fix) from error
    if not isinstance(value, dict):
        raise RecordError("A record is damaged", where=str(path), got=type(value).__name__, expected="an object")
    return value


def _whole_lines(path: Path) -> list[bytes]:
    """The newline-terminated lines of a file; a last line without its newline was cut off and does not count."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)


def _read_lines(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            where = f"{path}:{number}"
            expected = 'an object with an integer "step"'
            raise RecordError("A record line is damaged", where=where, got=str(error), expected=expected) from error
        rows.append(row)
    return rows


def _read_evals(path: Path) -> Frame:
    import pandas as pd

    if not path.exists():
        return pd.DataFrame({name: [] for name in EVAL_COLUMNS})
    try:
        frame = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        fix = "delete that run's folder and run it again"
        raise RecordError("A record is damaged", where=str(path), got=str(error), fix=fix) from error
    missing = [name for name in EVAL_COLUMNS if name not in frame]
    if missing:
        raise RecordError("An evaluation record lacks columns", where=str(path), got=f"no {', '.join(missing)}")
    return frame


@dataclass
class Run:
    """One run folder, read late: `run` (run.json), `config`, `summary` (None until the run has finished)."""

    path: Path

    @cached_property
    def run(self) -> dict:
        return _read_json(self.path / "run.json")

    @cached_property
    def config(self) -> dict:
        import yaml

        try:
            return yaml.safe_load((self.path / "config.yaml").read_text()) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RecordError("A record is damaged", where=str(self.path / "config.yaml"), got=str(error)) from error

    @cached_property
    def env(self) -> dict:
        return _read_json(self.path / "env.json") if (self.path / "env.json").exists() else {}

    @cached_property
    def summary(self) -> dict | None:
        path = self.path / "summary.json"
        return _read_json(path) if path.exists() else None

    @property
    def finished(self) -> bool:
        return self.summary is not None and self.summary.get("status") == "finished"

    def metrics(self) -> Frame:
        """One row per logged step, in order; lines of the same step are merged, the later value wins."""
        import pandas as pd

        rows: dict[int, dict] = {}
        for row in _read_lines(self.path / "metrics.jsonl"):
            rows.setdefault(row["step"], {}).update({k: v for k, v in row.items() if v is not None})
        frame = pd.DataFrame([rows[step] for step in sorted(rows)])
        return frame if len(frame) else pd.DataFrame({"step": []})

    def evals(self) -> Frame:
        """All evaluation points: one row per step, split, item and sample (`EVAL_COLUMNS` and the task's own)."""
        return _read_evals(self.path / "eval.parquet")

    def samples(self) -> list[dict]:
        return _read_lines(self.path / "samples.jsonl")


def load_run(path: str | os.PathLike) -> Run:
    """The run at `path`. RecordError if it is missing, damaged or of another schema version."""
    run = Run(Path(path))
    found = run.run.get("schema")
    if found != SCHEMA:
        raise RecordError(
            "This record is of another version",
            where=str(run.path / "run.json"),
            got=f"schema {found}",
            expected=f"schema {SCHEMA}",
            fix="use the version of assay that wrote it, or run it again in another folder",
        )
    return run


def find_runs(root: str | os.PathLike, experiment: str) -> list[Run]:
    """Every run under ``<root>/raw/<experiment>``, by arm and then by seed number; [] if there is none."""
    found = (Path(root) / "raw" / experiment).glob("*/*/run.json")
    return [load_run(path.parent) for path in sorted(found, key=lambda path: _order(path.parent))]


def _order(path: Path) -> tuple:
    digits = "".join(filter(str.isdigit, path.name))
    return path.parent.name, int(digits or 0), path.name


def latest_experiment(root: str | os.PathLike) -> str | None:
    """The experiment whose records changed last, or None."""
    newest: dict[str, float] = {}
    for pattern in ("run.json", "metrics.jsonl", "summary.json"):
        for path in (Path(root) / "raw").glob(f"*/*/*/{pattern}"):
            name = path.parents[2].name
            newest[name] = max(newest.get(name, 0.0), path.stat().st_mtime)
    return max(sorted(newest), key=lambda name: newest[name]) if newest else None


# ---------------------------------------------------------------- the writer


class RunWriter:
    """Writes one run folder. Get it from `RunWriter.open`.

    `max_samples` bounds ``samples.jsonl`` and `samples_per_step` what one step may add. When the file is full,
    every second step is dropped and the spacing doubles, so that samples always cover the whole run evenly.
    """

    def __init__(self, path: Path, run: dict, *, max_samples: int = 200, samples_per_step: int = 8) -> None:
        self.path, self.run = path, run
        self.max_samples, self.samples_per_step = max_samples, samples_per_step
        self._sampled = [row["step"] for row in _read_lines(path / "samples.jsonl")]

    @classmethod
    def open(cls, path: str | os.PathLike, meta: Mapping, config: Mapping, **limits: int) -> RunWriter:
        """Create the folder, or take up an unfinished or finished run in it (then `created` and `step` stay).

        `meta`: command, experiment, arm, seed, pair, parent, config_hash, argv. Raises ConfigError or RunError if
        the folder cannot be written (nothing new is left behind), RecordError if it holds another schema version.
        """
        import yaml

        path = Path(path)
        with os_errors(path):
            earlier = load_run(path).run if (path / "run.json").exists() else {}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        run = {"schema": SCHEMA, "created": now, "step": 0} | earlier | clean(meta) | {"status": "running"}
        run.pop("error", None)
        with new_folder(path):
            with os_errors(path):
                (path / "summary.json").unlink(missing_ok=True)
            replace(path / "config.yaml", yaml.safe_dump(clean(config), sort_keys=False).encode())
            write_json(path / "env.json", environment())
            write_json(path / "run.json", run)
            for name in ("metrics.jsonl", "samples.jsonl"):  # an append must not continue a line that a kill cut off
                _keep_lines(path / name, lambda _: True)
        return cls(path, run, **limits)

    def update(self, **fields: Any) -> None:
        """Change fields of run.json (such as ``step`` after a checkpoint)."""
        self.run = self.run | clean(fields)
        write_json(self.path / "run.json", self.run)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        append_line(self.path / "metrics.jsonl", {"step": int(step), **values})

    def eval(self, rows: Any, step: int) -> None:
        """Add one evaluation point: a DataFrame or dicts with at least item_id and score.

        Evaluating the same step and split again replaces the earlier rows.
        """
        import pandas as pd

        new = pd.DataFrame(rows).assign(step=int(step))
        missing = [name for name in ("item_id", "score") if name not in new]
        if missing:
            raise RecordError("Evaluation rows lack columns", got=f"no {', '.join(missing)}", expected="item_id, score")
        for name, value in _EVAL_DEFAULTS.items():
            new[name] = new[name].fillna(value) if name in new else value
        kinds = {"item_id": str, "split": str, "tier": str, "finish": str}
        new = new.astype(kinds | {"score": float, "length": float, "sample": int})
        new = new[[*EVAL_COLUMNS, *(name for name in new if name not in EVAL_COLUMNS)]]
        old = _read_evals(self.path / "eval.parquet")
        if len(old):
            again = (old["step"] == int(step)) & old["split"].isin(list(new["split"]))
            new = pd.concat([old[~again], new], ignore_index=True)
        _write_evals(self.path / "eval.parquet", new)

    def sample(self, row: Mapping[str, Any]) -> bool:
        """Offer one sample (with its "step"); whether it was kept. Whole groups should come one after the other."""
        step = int(row["step"])
        if not self._wants(step):
            return False
        if len(self._sampled) >= self.max_samples:
            self._thin()
            if len(self._sampled) >= self.max_samples or not self._wants(step):
                return False
        append_line(self.path / "samples.jsonl", {**row, "step": step})
        self._sampled.append(step)
        return True

    def _wants(self, step: int) -> bool:
        steps = sorted(set(self._sampled))
        if not steps or step == steps[-1]:
            return self._sampled.count(step) < self.samples_per_step
        gap = min((b - a for a, b in itertools.pairwise(steps)), default=1)
        return step - steps[-1] >= gap

    def _thin(self) -> None:
        keep = set(sorted(set(self._sampled))[::2])
        _keep_lines(self.path / "samples.jsonl", keep.__contains__)
        self._sampled = [step for step in self._sampled if step in keep]

    def cut(self, step: int) -> None:
        """Drop metrics, evaluations and samples after `step`: what a resumed run will write again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep_lines(self.path / name, lambda found: found <= step)
        self._sampled = [found for found in self._sampled if found <= step]
        evals = _read_evals(self.path / "eval.parquet")
        if (evals["step"] > step).any():
            _write_evals(self.path / "eval.parquet", evals[evals["step"] <= step])
        self.update(step=int(step))

    def finish(self, metrics: Mapping[str, Any], cost: Mapping[str, Any] | None = None) -> None:
        """Mark the run as finished; summary.json is written last, so its presence proves a whole record."""
        self.update(status="finished")
        write_json(self.path / "summary.json", {"status": "finished", "metrics": metrics, "cost": cost or {}})

    def fail(self, status: str, error: str = "") -> bool:
        """Mark the run as ``failed`` or ``interrupted``; False if even that cannot be written (a full disk).

        It runs while another error is on its way to the user and must not hide it.
        """
        if status not in STATUSES[2:]:
            raise ValueError(f"status {status!r}, expected one of {STATUSES[2:]}")
        try:
            self.update(status=status, error=str(error))
        except (ConfigError, RunError):
            return False
        return True


def _write_evals(path: Path, frame: Frame) -> None:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    replace(path, buffer.getvalue())


def _keep_lines(path: Path, wanted: Callable[[int], bool]) -> None:
    """Rewrite a jsonl file with the whole lines whose step is `wanted`; untouched if that changes nothing."""
    if not path.exists():
        return
    rows = zip(_whole_lines(path), _read_lines(path), strict=True)
    data = b"".join(line for line, row in rows if wanted(row["step"]))
    if len(data) != path.stat().st_size:
        replace(path, data)
