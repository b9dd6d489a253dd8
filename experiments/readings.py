"""Named values of runs, and the paired comparison of two arms in one of them.

Metric names: ``eval/<column>[/<tier>]`` (mean of the last evaluation; ``<split>/...`` for another split),
``eval@<step>/...`` (the same at that optimiser step),
``auc/<column>[/<tier>]`` (area under the evaluation curve over optimiser steps, divided by the step range),
``eval/pass@<k>[/<tier>]``, ``train/<key>`` (last value of a key of metrics.jsonl; ``mean/<key>`` its mean over the
steps), and any name of summary.json's metrics. A value that comes from an evaluation is known item by item, and
every such value is linear in the scores, so that differences pair on items as well as on seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd

from experiments import stats
from experiments.records import EVAL_COLUMNS, Run

Frame = Any  # a pandas DataFrame or Series; their annotations reject ordinary indexing
AXES = {"steps": None, "tokens": "cost/generated_tokens", "seconds": "time/total"}
LADDER = ("easy", "medium", "hard")
SOLVED = 1 - 1e-9  # pass@k counts full scores only


@dataclass(frozen=True)
class Spec:
    """Where a metric's values come from: one column of one split, perhaps of one tier or at one step only."""

    kind: str  # "final" or "area"
    split: str
    column: str
    tier: str | None
    step: int | None = None


class Reading:
    """One finished run with its records read once.

    Steps and costs go on from those of the run that it started from (`before` in run.json): a second stage that is
    compared with one long run has spent what both stages have spent.
    """

    def __init__(self, run: Run, arm: str | None = None) -> None:
        self.run = run
        self.arm = arm or str(run.run.get("arm"))
        self.seed = run.run.get("seed")
        pair = run.run.get("pair")
        self.pair = str(self.seed if pair is None else pair)
        self._pivots: dict[tuple[str, str, str | None], Frame] = {}

    @cached_property
    def before(self) -> dict[str, float]:
        return self.run.run.get("before") or {}

    @cached_property
    def metrics(self) -> Frame:
        frame = self.run.metrics()
        return frame.assign(**{key: frame[key] + spent for key, spent in self.before.items() if key in frame})

    @cached_property
    def evals(self) -> Frame:
        frame = self.run.evals()
        return frame.assign(step=frame["step"] + self.before["step"]) if "step" in self.before else frame

    @cached_property
    def splits(self) -> list[str]:
        """Evaluated splits, ``eval`` first if it is one of them."""
        return sorted(self.evals["split"].unique(), key=lambda name: (name != "eval", name))

    @cached_property
    def columns(self) -> list[str]:
        """Columns that hold one number per completion: score, length and the task's and methods' own."""
        own = [name for name in self.evals if name not in EVAL_COLUMNS and self.evals[name].dtype.kind in "fiub"]
        return ["score", *(["length"] if self.evals["length"].notna().any() else []), *own] if len(self.evals) else []

    @cached_property
    def tiers(self) -> list[str]:
        """Tiers, easy first: in the order of the task's configuration if it has one, else by name."""
        task = self.run.config.get("task")
        listed = (task.get("tiers") if isinstance(task, dict) else None) or LADDER
        order = {str(tier): place for place, tier in enumerate(listed)}
        found = {str(tier) for tier in self.evals["tier"].unique()}
        return sorted(found, key=lambda tier: (order.get(tier, len(order)), _natural(tier)))

    @cached_property
    def points(self) -> int:
        """Number of evaluation points on the main split."""
        return self.evals.loc[self.evals["split"] == self.splits[0], "step"].nunique() if self.splits else 0

    @cached_property
    def last_items(self) -> frozenset[str]:
        """Items of the last evaluation of the main split."""
        rows = self.evals[self.evals["split"] == self.splits[0]] if self.splits else self.evals
        return frozenset(rows.loc[rows["step"] == rows["step"].max(), "item_id"])

    @property
    def steps(self) -> int:
        seen = [int(frame["step"].max()) for frame in (self.metrics, self.evals) if len(frame)]
        return max(seen, default=0)

    # -------- curves

    def curve(self, spec: Spec) -> tuple[np.ndarray, Frame]:
        """Steps (T,) and item means, a frame of T rows and one column per item of the tier."""
        key = (spec.split, spec.column, spec.tier)
        if key not in self._pivots:
            rows = self.evals[self.evals["split"] == spec.split]
            if spec.tier is None:
                means = rows.groupby(["step", "item_id"], sort=True)[spec.column].mean()
                self._pivots[key] = means.unstack().dropna(axis=1, how="all")
            else:
                _, frame = self.curve(replace(spec, tier=None))
                of_tier = set(rows.loc[rows["tier"] == spec.tier, "item_id"])
                self._pivots[key] = frame[[item for item in frame if item in of_tier]]
        frame = self._pivots[key]
        return frame.index.to_numpy(float), frame

    def cost(self, axis: str, steps: np.ndarray) -> np.ndarray | None:
        """Cumulative cost at these steps, linear from the start over the logged steps; None if it was not logged."""
        key = AXES[axis]
        if key is None:
            return steps
        if key not in self.metrics:
            return None
        logged = self.metrics[["step", key]].dropna()
        if not len(logged):
            return None
        start, spent = self.before.get("step", 0.0), self.before.get(key, 0.0)
        return np.interp(steps, np.append(start, logged["step"]), np.append(spent, logged[key]))

    def at_budget(self, spec: Spec, axis: str = "steps", span: Sequence[float] | None = None) -> Frame | None:
        """Value per item: the curve's height at the end of `span` (``final``) or its mean height over it (``area``).

        `span` is (start, end) in units of `axis`, by default the whole curve; None if the axis was not logged.
        """
        steps, frame = self.curve(spec)
        x = self.cost(axis, steps) if len(steps) else None
        if x is None:
            return None
        frame = frame.dropna(axis=1)
        start, end = (x[0], x[-1]) if span is None else span
        weights = stats.area_weights(x, end, start) if spec.kind == "area" else stats.point_weights(x, end)
        return pd.Series(weights @ frame.to_numpy(float), index=frame.columns) if frame.shape[1] else None

    # -------- named values

    def spec(self, metric: str) -> Spec | None:
        """The evaluation column behind a metric name, or None if the name is not one of this run's evaluations."""
        head, _, rest = metric.partition("/")
        head, at, when = head.partition("@")
        if at and (not when.isdigit() or head == "auc"):
            return None
        if not self.splits or (head not in ("auc", "eval") and head not in self.splits):
            return None
        split = head if head in self.splits else self.splits[0]
        for column, tier in ((rest, None), (rest.rpartition("/")[0], rest.rpartition("/")[2])):
            known = column in self.columns or (head != "auc" and not at and _passes(column) is not None)
            if known and (tier is None or tier in self.tiers):
                kind = "area" if head == "auc" else "final"
                return Spec(kind, split, column, tier, int(when) if at else None)
        return None

    def items(self, metric: str) -> Frame | None:
        """The metric's value per item (index item_id), or None if it is not an evaluation metric of this run."""
        spec = self.spec(metric)
        if spec is None:
            return None
        if spec.kind == "area":
            return self.at_budget(spec)
        k = _passes(spec.column)
        if k is not None:
            return self._pass_at(spec, k)
        steps, frame = self.curve(spec)
        if spec.step is not None:
            frame = frame[steps == spec.step]
        last = frame.iloc[-1].dropna() if len(frame) else pd.Series(dtype=float)
        return last if len(last) else None

    def _pass_at(self, spec: Spec, k: int) -> Frame | None:
        rows = self.evals[self.evals["split"] == spec.split]
        rows = rows[rows["step"] == rows["step"].max()]
        if spec.tier is not None:
            rows = rows[rows["tier"] == spec.tier]
        counts = (rows["score"] >= SOLVED).groupby(rows["item_id"]).agg(["size", "sum"])
        counts = counts[counts["size"] >= k]
        if not len(counts):
            return None
        return pd.Series(stats.pass_at_k(counts["size"], counts["sum"], k), index=counts.index)

    def value(self, metric: str) -> float:
        """The metric's value for this run, NaN if the run does not have it."""
        items = self.items(metric)
        if items is not None:
            return float(items.mean())
        head, _, key = metric.partition("/")
        if head in ("train", "mean") and key in self.metrics:
            column = self.metrics[key].dropna()
            if len(column):
                return float(column.mean() if head == "mean" else column.iloc[-1])
        found = ((self.run.summary or {}).get("metrics") or {}).get(metric)
        return float(found) if isinstance(found, (int, float)) else math.nan

    def pick(self, metric: str) -> Frame | float:
        items = self.items(metric)
        return self.value(metric) if items is None else items


@lru_cache
def _passes(column: str) -> int | None:
    head, at, k = column.partition("@")
    return int(k) if head == "pass" and at and k.isdigit() and int(k) > 0 else None


def available(readings: Sequence[Reading]) -> list[str]:
    """Every metric name that at least one of these runs has, evaluation first."""
    names: dict[str, None] = {}
    for reading in readings:
        tiers = ["", *(f"/{tier}" for tier in reading.tiers)] if len(reading.tiers) > 1 else [""]
        for column in reading.columns:
            names |= dict.fromkeys(f"eval/{column}{tier}" for tier in tiers)
        if reading.points > 1:
            names |= dict.fromkeys(f"auc/{column}{tier}" for column in reading.columns for tier in tiers)
        names |= dict.fromkeys(f"{split}/score" for split in reading.splits[1:])
        most = samples_per_item(reading)
        names |= dict.fromkeys(f"eval/pass@{k}" for k in (most,) if most > 1)
        names |= dict.fromkeys((reading.run.summary or {}).get("metrics") or {})
        names |= dict.fromkeys(f"train/{key}" for key in reading.metrics if key != "step")
    # The bounds of an interval are no metrics; the table has its own intervals.
    return [name for name in names if not name.endswith((".low", ".high"))]


def samples_per_item(reading: Reading) -> int:
    """Completions per item at the last evaluation of the main split (the smallest over items)."""
    if not reading.splits:
        return 0
    rows = reading.evals[reading.evals["split"] == reading.splits[0]]
    return int(rows[rows["step"] == rows["step"].max()].groupby("item_id").size().min())


def arm_interval(readings: Sequence[Reading], metric: str) -> stats.Interval:
    """Mean over seeds with a t interval; for a single seed an interval over its items; NaN bounds if neither is."""
    values = [reading.value(metric) for reading in readings]
    known = [reading for reading, value in zip(readings, values, strict=True) if not math.isnan(value)]
    if len(known) == 1 and (items := known[0].items(metric)) is not None and len(items) > 1:
        return stats.bootstrap(items.to_numpy()[None, :])
    return stats.mean_interval(values)


@dataclass(frozen=True)
class Difference:
    """arm - other in one metric, paired by seed and, where both saw the same items, by item."""

    arm: str
    other: str
    metric: str
    interval: stats.Interval
    per_seed: tuple[float, ...]
    p: float
    adjusted: float = math.nan

    @property
    def sd(self) -> float:
        return float(np.std(self.per_seed, ddof=1)) if len(self.per_seed) > 1 else math.nan

    @property
    def seeds(self) -> int:
        return len(self.per_seed)


Pick = Callable[[Reading], "Frame | float | None"]


def difference(arm: Sequence[Reading], other: Sequence[Reading], metric: str, pick: Pick | None = None) -> Difference:
    """Compare two arms on the seeds (pair keys) that both have, in `metric` or in what `pick` takes from a run."""
    pick = pick or (lambda reading: reading.pick(metric))
    left, right = {r.pair: r for r in arm}, {r.pair: r for r in other}
    rows, per_seed = [], []
    for pair in sorted(left.keys() & right.keys(), key=_natural):
        row = _paired(pick(left[pair]), pick(right[pair]), apart=tasks_differ(left[pair], right[pair]))
        if row is not None:
            rows.append(row)
            per_seed.append(float(row.mean()))
    if rows and all(isinstance(row, pd.Series) for row in rows):
        matrix = pd.concat(rows, axis=1).T.to_numpy(float)
    else:
        matrix = np.asarray(per_seed, float)[:, None]
    interval = stats.bootstrap(matrix) if rows else stats.Interval(math.nan, math.nan, math.nan)
    p = stats.sign_flip(per_seed) if len(per_seed) > 1 else math.nan
    names = (arm[0].arm if arm else "", other[0].arm if other else "")
    return Difference(*names, metric, interval, tuple(per_seed), p)


def tasks_differ(a: Reading, b: Reading) -> bool:
    """Whether the two runs were evaluated on different tasks, by the names in their configurations."""
    tasks = [reading.run.config.get("task") for reading in (a, b)]
    names = [task.get("name") if isinstance(task, dict) else None for task in tasks]
    return names[0] != names[1]


def _paired(a: Frame | float | None, b: Frame | float | None, apart: bool = False):
    """a - b on their common items; of the two means where the items differ, or None if they are of tasks `apart`;
    None if one side has no value."""
    if a is None or b is None:
        return None
    if isinstance(a, pd.Series) and isinstance(b, pd.Series):
        common = (a - b).dropna()
        if len(common) or apart:
            return common if len(common) else None
    gap = np.float64(np.mean(a)) - np.float64(np.mean(b))
    return None if np.isnan(gap) else gap


def _natural(key: str) -> tuple:
    digits = "".join(filter(str.isdigit, key))
    return int(digits or 0), key


def adjust(differences: Sequence[Difference]) -> list[Difference]:
    """The same differences with Holm's adjusted p values over this family."""
    adjusted = stats.holm([difference.p for difference in differences])
    return [replace(d, adjusted=float(p)) for d, p in zip(differences, adjusted, strict=True)]


def common_span(arm: Sequence[Reading], other: Sequence[Reading], spec: Spec, axis: str) -> tuple[float, float] | None:
    """The range of `axis` that every paired run of both arms covers, or None if there is none or it was not logged."""
    pairs = {r.pair for r in arm} & {r.pair for r in other}
    spans = []
    for reading in (*arm, *other):
        if reading.pair in pairs:
            steps, _ = reading.curve(spec)
            x = reading.cost(axis, steps) if len(steps) else None
            if x is None:
                return None
            spans.append((float(x[0]), float(x[-1])))
    if not spans:
        return None
    start, end = max(first for first, _ in spans), min(last for _, last in spans)
    return (start, end) if end > start else None
