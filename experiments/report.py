"""Tables, figures and the sample browser of an experiment, computed from its records only.

Two builds from the same records give the same bytes: no dates, fixed random streams, fixed order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.files import new_folder, replace
from experiments.readings import Difference, Reading, adjust, available, difference, samples_per_item
from experiments.records import Run, find_runs, latest_experiment, load_run
from methods.errors import ConfigError, RecordError, nearest

CLONE_CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass(frozen=True)
class Goal:
    """A metric with the direction that counts as better, and (for the primary one) the arm it is about."""

    metric: str
    direction: str = "higher"
    arm: str | None = None


@dataclass
class Study:
    """Everything that the tables and figures show: the plan, the finished runs by arm, and the comparisons."""

    name: str
    plan: dict[str, Any]
    arms: dict[str, list[Reading]]
    baseline: str
    primary: Goal
    goals: list[Goal]
    metrics: list[str]
    left_out: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)  # overrides of every arm, left out of the arms' names
    differences: list[Difference] = field(default_factory=list)
    controls: dict[str, tuple[str, Difference]] = field(default_factory=dict)

    @property
    def registered(self) -> bool:
        """Whether the primary comparison was fixed in the experiment's YAML."""
        return self.primary.arm is not None

    @property
    def pairs(self) -> int:
        """Paired seeds of the primary comparison (of the largest comparison, if none was registered)."""
        found = self.find(self.primary.metric, self.primary.arm) if self.primary.arm else None
        return found.seeds if found else max((d.seeds for d in self.differences), default=0)

    @property
    def others(self) -> list[str]:
        return [arm for arm in self.arms if arm != self.baseline]

    def find(self, metric: str, arm: str | None) -> Difference | None:
        return next((d for d in self.differences if d.metric == metric and d.arm == arm), None)


def build(
    target: str | Sequence[str] | None = None,
    root: str | Path = "results",
    conf_dirs: Sequence[str | Path] = ("conf",),
    baseline: str | None = None,
    power: bool = False,
    out: str | Path | None = None,
    metrics: Sequence[str] = (),
) -> Path:
    """Write runs.csv, table.md, figures/ and samples.html; print the table; return the path of table.md.

    `target` is an experiment's name, or paths of runs (or folders of runs), or None for the latest experiment. It
    goes to ``<root>/<experiment>/`` (``<root>/selected/`` for paths) unless `out` names another folder; one path
    ``ROOT/raw/EXPERIMENT`` is that experiment in its own root, with the comparison that its YAML fixed. `metrics`
    replaces the metrics of the experiment's YAML in the tables.
    Raises ConfigError for an unknown experiment, arm or metric, RecordError for damaged records.
    """
    from experiments import browser, plots, table

    root = _root_of(target, root)
    study = read_study(target, root, conf_dirs, baseline, metrics)
    folder = Path(out) if out is not None else Path(root) / study.name
    with new_folder(folder):
        replace(folder / "runs.csv", runs_csv(study).encode())
        figures = plots.draw(study, folder / "figures")
        browser.write([r.run for arm in study.arms.values() for r in arm], folder / "samples.html", study.name)
        text = table.markdown(study, power, figures)
        replace(folder / "table.md", text.encode())
    print(text, end="")
    return folder / "table.md"


def browse(targets: Sequence[str], root: str | Path = "results", out: str | Path | None = None) -> Path:
    """Write only the sample browser for these runs or this experiment; return its path.

    Unfinished runs are shown too. One run's browser goes into its own folder.
    """
    from experiments import browser

    runs, name = find(list(targets), root)
    folder = runs[0].path if len(runs) == 1 else Path(root) / name
    folder = folder if out is None else Path(out)
    with new_folder(folder):
        browser.write(runs, folder / "samples.html", name)
    return folder / "samples.html"


# ---------------------------------------------------------------- which runs


def find(targets: Sequence[str], root: str | Path) -> tuple[list[Run], str]:
    """The runs that `targets` name (experiments or paths; none = the latest experiment) and a name for them."""
    if not targets:
        latest = latest_experiment(root)
        if latest is None:
            fix = "train something first, for example: assay train method=ha_dw task=arithmetic model=tiny"
            raise ConfigError("There are no runs to report", where=str(Path(root) / "raw"), fix=fix)
        targets = [latest]
    raw = Path(root) / "raw"
    name = Path(targets[0]).name
    if len(targets) == 1 and (raw / name).is_dir() and (targets[0] == name or _same(raw / name, targets[0])):
        runs = find_runs(root, name)
    else:
        name = "selected"
        runs = [run for target in targets for run in _at(target, root)]
    if not runs:
        raise ConfigError("There are no runs to report", where=str(raw / targets[0]))
    return list({run.path.resolve(): run for run in runs}.values()), name


def _root_of(target: str | Sequence[str] | None, root: str | Path) -> str | Path:
    """The results folder that a single path ``ROOT/raw/EXPERIMENT`` lies in; `root` for anything else."""
    targets = [target] if isinstance(target, str) else list(target or ())
    folder = Path(targets[0]).resolve() if len(targets) == 1 and os.path.isdir(targets[0]) else None
    elsewhere = folder is not None and folder.parent.name == "raw" and not _same(Path(root) / "raw", str(folder.parent))
    return folder.parents[1] if folder is not None and elsewhere else root


def _same(a: Path, b: str) -> bool:
    return a.resolve() == Path(b).resolve()


def _at(target: str, root: str | Path) -> list[Run]:
    path = Path(target)
    if (path / "run.json").exists():
        return [load_run(path)]
    inside = sorted([*path.glob("*/run.json"), *path.glob("*/*/run.json")]) if path.is_dir() else []
    if inside:
        return [load_run(file.parent) for file in inside]
    if runs := find_runs(root, target):
        return runs
    names = sorted(p.name for p in (Path(root) / "raw").glob("*") if p.is_dir())
    fix = nearest(target, names) or "name an experiment with records, or the folder of a run"
    committed = Path(root) / target / "table.md"
    if committed.exists():
        fix = f"its table is already at {committed}; its records are not here: run it again to rebuild the table"
    expected = ", ".join(names[:20]) or "an experiment that was run"
    raise ConfigError("No such experiment or run", got=target, expected=expected, fix=fix)


def read_plan(name: str, conf_dirs: Sequence[str | Path]) -> dict[str, Any]:
    """The experiment's YAML from the first folder that has it, {} if none does."""
    import yaml

    for folder in (*conf_dirs, CLONE_CONF):
        path = Path(folder) / "experiment" / f"{name}.yaml"
        if not path.is_file():
            continue
        try:
            plan = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ConfigError("An experiment file is not valid YAML", where=str(path), got=str(error)) from error
        if isinstance(plan, dict) and isinstance(plan.get("experiment"), dict):
            plan = plan["experiment"]
        if not isinstance(plan, dict):
            raise ConfigError("An experiment file is not a mapping", where=str(path), got=type(plan).__name__)
        return plan
    return {}


def read_study(
    target: str | Sequence[str] | None,
    root: str | Path = "results",
    conf_dirs: Sequence[str | Path] = ("conf",),
    baseline: str | None = None,
    metrics: Sequence[str] = (),
) -> Study:
    """Find and read the runs, choose baseline and metrics, make the comparisons; arguments as in `build`."""
    runs, name = find([target] if isinstance(target, str) else list(target or ()), root)
    plan = read_plan(name, (*conf_dirs, Path(root) / "raw" / name)) if name != "selected" else {}
    finished = [run for run in runs if run.finished]
    arms, shared = _by_arm(finished, list(plan.get("arms") or {})) if finished else ({}, [])
    left_out = [f"{_label(run, runs)} ({run.run.get('status')})" for run in runs if not run.finished]
    left_out += _not_run(plan, runs)
    if not arms:
        fix = "run the same line again to finish them, or look at them with --browse"
        raise ConfigError("None of these runs has finished", got=", ".join(left_out[:8]), fix=fix)
    chosen = _baseline(baseline or plan.get("baseline"), arms, required=baseline is not None)
    primary, goals, shown = _metrics(plan, [r for arm in arms.values() for r in arm], metrics)
    if primary.arm not in arms or primary.arm == chosen:
        primary = Goal(primary.metric, primary.direction)
    study = Study(name, plan, arms, chosen, primary, goals, shown, left_out, shared)
    _compare(study)
    return study


def _by_arm(runs: Sequence[Run], order: Sequence[str]) -> tuple[dict[str, list[Reading]], list[str]]:
    """Readings by arm, in the order of the plan, and the overrides that the names of a plain sweep's arms share."""
    several = len({run.run.get("experiment") for run in runs}) > 1
    full = [f"{run.run.get('experiment')}/{run.run.get('arm')}" if several else str(run.run.get("arm")) for run in runs]
    short, shared = ({}, []) if order else shortened(sorted(set(full)))
    arms: dict[str, list[Reading]] = {}
    for run, name in zip(runs, full, strict=True):
        name = short.get(name, name)
        arms.setdefault(name, []).append(Reading(run, name))
    for name, readings in arms.items():
        if len({reading.pair for reading in readings}) < len(readings):
            for reading in readings:
                reading.pair = str(reading.seed)
        if len({reading.pair for reading in readings}) < len(readings):
            raise RecordError("Two runs of one arm have the same seed", where=name, fix="name only one of them")
    ranked = sorted(arms, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: arms[name] for name in ranked}, shared


def shortened(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`{name: short name}` without the `key=value` parts that all names share, and these parts.

    The cut end of a long name (`...~hash`) goes too where the rest tells the names apart; {} where nothing does.
    """
    parts = {name: name.rpartition("/")[2].split(",") for name in names}
    shared = [part for part in parts[names[0]] if "=" in part and all(part in other for other in parts.values())]
    for droppable in ("~", "\0"):
        short = {}
        for name, own in parts.items():
            kept = [part for part in own if part not in shared and droppable not in part]
            short[name] = "/".join(text for text in (name.rpartition("/")[0], ",".join(kept)) if text)
        if all(short.values()) and len(set(short.values())) == len(names) > 1:
            return short, shared
    return {}, []


def _label(run: Run, runs: Sequence[Run]) -> str:
    several = len({other.run.get("experiment") for other in runs}) > 1
    return "/".join([*([str(run.run.get("experiment"))] if several else []), str(run.run.get("arm")), run.path.name])


def _not_run(plan: Mapping, runs: Sequence[Run]) -> list[str]:
    there = {(str(run.run.get("arm")), str(run.run.get("seed"))) for run in runs}
    seeds = plan.get("seeds") if isinstance(plan.get("seeds"), list) else []
    planned = [(str(arm), str(seed)) for arm in plan.get("arms") or {} for seed in seeds or []]
    return [f"{arm}/seed{seed} (not run)" for arm, seed in planned if (arm, seed) not in there]


def _baseline(wanted: str | None, arms: Mapping[str, list[Reading]], required: bool) -> str:
    full = {str(reading.run.run.get("arm")): name for name, readings in arms.items() for reading in readings}
    wanted = wanted if wanted in arms else full.get(str(wanted), wanted)
    if wanted in arms:
        return str(wanted)
    if required:
        fix = nearest(str(wanted), arms)
        raise ConfigError("No finished run of that baseline", got=wanted, expected=", ".join(arms), fix=fix)
    bare = [name for name, readings in arms.items() if not readings[0].run.config.get("method")]
    return bare[0] if bare else next(iter(arms))


# ---------------------------------------------------------------- which metrics


def _metrics(plan: Mapping, readings: Sequence[Reading], wanted: Sequence[str]) -> tuple[Goal, list[Goal], list[str]]:
    """The primary goal, all goals that are tested, and the metrics whose means are shown."""
    there = available(readings)
    for name in wanted:
        if all(math.isnan(reading.value(name)) for reading in readings):
            fix = nearest(name, there)
            raise ConfigError("No run has that metric", got=name, expected=", ".join(there[:30]), fix=fix)
    if wanted:
        declared = [_goal(entry) for entry in (plan.get("primary"), *(plan.get("secondary") or [])) if entry]
        goals = [next((goal for goal in declared if goal.metric == name), Goal(name)) for name in wanted]
        return goals[0], goals, list(wanted)
    if plan.get("primary"):
        goals = [_goal(plan["primary"]), *map(_goal, plan.get("secondary") or [])]
        context = [name for name in there if name == "eval/score" or name.startswith("eval/score/")]
        return goals[0], goals, list(dict.fromkeys([*(goal.metric for goal in goals), *context]))
    tested, shown = _usual(readings, there)
    return Goal(tested[0]), [Goal(name) for name in tested], shown


def _goal(entry: str | Mapping) -> Goal:
    if isinstance(entry, str):
        return Goal(entry)
    return Goal(entry["metric"], entry.get("direction", "higher"), entry.get("arm"))


def _usual(readings: Sequence[Reading], there: Sequence[str]) -> tuple[list[str], list[str]]:
    """Without a plan: the final score and the area under its curve are tested; tiers and length are shown too."""
    if any(reading.points for reading in readings):
        tested = [name for name in ("eval/score", "auc/score") if name in there]
        tiers = [name for name in there if name.startswith("eval/score/")]
        k = min(samples_per_item(reading) for reading in readings if reading.points)
        passes = [f"eval/pass@{k}"] if k > 1 else []
        return tested, [*tested, *tiers, *passes, *(name for name in ("eval/length",) if name in there)]
    recorded = [name for reading in readings for name in (reading.run.summary or {}).get("metrics") or {}]
    summaries = [name for name in recorded if not name.endswith((".low", ".high"))]
    logged = [name for name in ("train/reward", "train/loss") if name in there]
    shown = list(dict.fromkeys([*summaries, *logged]))[:8] or list(there[:4])
    if not shown:
        raise RecordError("These runs recorded no metrics", where=str(readings[0].run.path))
    return shown[:2], shown


# ---------------------------------------------------------------- comparisons and files


def _compare(study: Study) -> None:
    """Fill in differences (every tested metric, every arm against the baseline) and controls, Holm over all but one."""
    base = study.arms[study.baseline]
    found = [difference(study.arms[arm], base, goal.metric) for goal in study.goals for arm in study.others]
    expected = {
        arm: sign for arm, sign in (study.plan.get("controls") or {}).items() if study.registered and arm in study.arms
    }
    primary = study.arms.get(study.primary.arm or "", [])
    checks = [difference(study.arms[arm], primary, study.primary.metric) for arm in expected]
    first = [d for d in found if study.registered and (d.arm, d.metric) == (study.primary.arm, study.primary.metric)]
    adjusted = adjust([d for d in [*found, *checks] if d not in first])
    split = len(found) - len(first)
    study.differences = sorted(
        [*first, *adjusted[:split]],
        key=lambda d: ([goal.metric for goal in study.goals].index(d.metric), study.others.index(d.arm)),
    )
    study.controls = {
        arm: (str(sign), check) for (arm, sign), check in zip(expected.items(), adjusted[split:], strict=True)
    }


def runs_csv(study: Study) -> str:
    """One row per finished run: experiment, arm, seed, every metric of the tables, every cost."""
    import pandas as pd

    readings = [reading for arm in study.arms.values() for reading in arm]
    keys = sorted({key for reading in readings for key in reading.metrics if key.startswith("cost/")})
    rows = []
    for reading in readings:
        row = {"experiment": reading.run.run.get("experiment"), "arm": reading.arm, "seed": reading.seed}
        row |= {"pair": reading.pair, "steps": reading.steps}
        row |= {metric: reading.value(metric) for metric in study.metrics}
        row |= {key: reading.value(f"train/{key}") for key in [*keys, "time/total"]}
        rows.append(row | {"groups/dead": reading.value("mean/groups/dead")})
    frame = pd.DataFrame(rows).dropna(axis=1, how="all")
    return frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")
