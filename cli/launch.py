"""A command line to a list of jobs, all of them checked before the first starts; then the jobs to runs.

A sweep (`-m`) multiplies its values out; an experiment multiplies its arms with its seeds; both together sweep
every arm. Where a run is recorded follows from the line alone, so that the same line again finds its runs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import compose as composing
from cli import experiment as experiment_files
from methods.errors import ConfigError, nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

TARGET = "experiments.run:run"
# Words that steer launching; they are no keys of the configuration.
WORDS = ("experiment", "arms", "seeds", "smoke", "report", "jobs")
# Keys that do not make a run another run.
BOOKKEEPING = re.compile(
    r"(seed|name|jobs|results_dir|overwrite|debug|record(\..*)?|trainer\.(save|keep)_\w+|eval\.progress|hydra[./].*)$"
)


@dataclass(frozen=True)
class Job:
    """One run: its words, and the composed configuration that they give."""

    words: tuple[str, ...]
    cfg: DictConfig

    @property
    def label(self) -> str:
        return f"{self.cfg.arm}/seed{self.cfg.seed}"


@dataclass(frozen=True)
class Plan:
    """What one command line asks for. `spec` is None without `experiment=`."""

    jobs: list[Job]
    name: str
    spec: experiment_files.Experiment | None = None
    hydra: tuple[str, ...] = ()
    smoke: bool = False
    report: bool = True
    workers: int | None = None
    dirs: tuple[Path, ...] = ()
    config_name: str = "train"

    @property
    def folder(self) -> Path:
        """`<results_dir>/raw/<experiment>`."""
        return Path(str(self.jobs[0].cfg.results_dir)) / "raw" / self.name


def plan(
    config_name: str,
    line: Sequence[str],
    *,
    multirun: bool = False,
    config_dirs: Sequence[str | Path] = (),
    check: Callable[[DictConfig], Any] | None = None,
) -> Plan:
    """Expand, compose and check a command line.

    `check(cfg)` raises ConfigError for a configuration that cannot run; it is called for every job before this
    returns. Raises ConfigError for everything that is wrong with the line.
    """
    dirs = composing.conf_dirs(config_dirs)
    parsed = composing.parse(line, composing.groups(dirs))
    hydra = tuple(str(o.input_line) for o in parsed if o.key_or_group.split("/")[0].split(".")[0] == "hydra")
    words, rest = _split(parsed)
    spec = experiment_files.load(str(words["experiment"]), dirs) if words.get("experiment") is not None else None
    if spec is None:
        for key in ("arms", "smoke", "seeds"):
            if key in words:
                raise ConfigError(f"{key}= belongs to an experiment", fix="add experiment=NAME, or sweep: -m seed=0,1")
    elif spec.command != config_name:
        raise ConfigError(
            f"the experiment '{spec.name}' is run by another subcommand",
            fix=f"assay {spec.command} experiment={spec.name}",
        )
    lines = _experiment_lines(spec, words, rest, multirun) if spec else [("", w) for w in _sweep(rest, multirun)]
    name = _value(rest, "name")
    if spec and name is None:
        name = f"{spec.name}-smoke" if _flag(words, "smoke") else spec.name
    jobs = [_job(config_name, arm, w, name, config_dirs, spec) for arm, w in lines]
    _check_jobs(jobs, check)
    return Plan(
        jobs,
        str(jobs[0].cfg.experiment),
        spec=spec,
        hydra=hydra,
        smoke=_flag(words, "smoke"),
        report=_flag(words, "report", True),
        workers=_workers(words.get("jobs")),
        dirs=dirs,
        config_name=config_name,
    )


def launch(plan: Plan, *, target: str = TARGET) -> Path:
    """Run all jobs of a plan and return the path of what was written: the run's, or the experiment's if several.

    Raises RunError after the last job if some failed, KeyboardInterrupt if a signal stopped them.
    """
    from cli import pool

    _keep_experiment(plan)
    if any(word.startswith("hydra/launcher=") for word in plan.hydra):
        return _launch_by_hydra(plan, target)
    if len(plan.jobs) == 1:
        return Path(pool.resolve(target)(plan.jobs[0].cfg))
    workers = plan.workers or pool.default_workers(len(plan.jobs))
    pool.run([(job.label, job.cfg) for job in plan.jobs], target, workers, title=plan.name)
    return plan.folder


def _keep_experiment(plan: Plan) -> None:
    """Runs under another name than their file's take their comparison along, so that a report finds it."""
    if plan.spec is None or plan.spec.name == plan.name:
        return
    import yaml

    from experiments.files import os_errors, replace

    file = plan.folder / "experiment" / f"{plan.name}.yaml"
    with os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, yaml.safe_dump(plan.spec.variant(plan.smoke), sort_keys=False).encode())


def arm_name(words: Sequence[str], *, named: bool = False) -> str:
    """The arm of a run that belongs to no experiment: its overrides in a form that is safe in a path.

    `task=` and `model=` name the experiment already, unless the user named it. No override at all: `default`.
    """
    parts = []
    for word in sorted(words):
        key, _, value = word.partition("=")
        if BOOKKEEPING.match(key.lstrip("+~")) or (key in ("task", "model") and not named):
            continue
        parts.append(f"{key}={_slug(value)}")
    text = ",".join(parts) or "default"
    # File systems allow 255 bytes per name; a long line keeps its beginning and a hash of all of it.
    return text if len(text) <= 160 else f"{text[:140]}~{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _slug(value: str) -> str:
    bare = value.strip("[]").replace(" ", "").replace(",", "+")
    slug = re.sub(r"[^A-Za-z0-9_.+=-]+", "-", re.sub(r"[\[\]'\"{}]", "", bare)).strip("-") or "none"
    return f"-{slug}" if bare.startswith("-") else slug  # a minus sign makes another run


def _split(parsed: Sequence[Override]) -> tuple[dict[str, Any], list[Override]]:
    """Launch words with their values, and the overrides; a key given twice counts as given last."""
    words: dict[str, Any] = {}
    rest: dict[str, Override] = {}
    for override in parsed:
        key = override.key_or_group
        if key in WORDS:
            words[key] = _values(override) if key in ("arms", "seeds") else override.value()
        elif key.split("/")[0].split(".")[0] != "hydra":
            rest.pop(override.get_key_element(), None)
            rest[override.get_key_element()] = override
    return words, list(rest.values())


def _flag(words: dict[str, Any], key: str, default: bool = False) -> bool:
    value = words.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} has the wrong type", got=f"'{value}'", expected=f"true or false (default {default})")
    return value


def _workers(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError("jobs has the wrong type", got=f"'{value}'", expected="the number of runs at once, such as 2")
    return value


def _values(override: Override) -> list[Any]:
    """All values of `key=a`, `key=a,b`, `key=[a,b]` or `key=range(2)`."""
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise ConfigError("an interval has no list of values", where=str(override.input_line), fix="use range(...)")
        return list(override.sweep_iterator())
    value = override.value()
    return list(value) if isinstance(value, list) else [value]


def _value(overrides: Sequence[Override], key: str) -> str | None:
    for override in overrides:
        if override.key_or_group == key and not override.is_sweep_override() and override.value() is not None:
            return str(override.value())
    return None


def _text(override: Override) -> str:
    return str(override.input_line)


def _sweep(overrides: Sequence[Override], multirun: bool) -> list[tuple[str, ...]]:
    """The product over all swept values, the last key fastest, as in Hydra's own sweeper."""
    columns = []
    for override in overrides:
        if not override.is_sweep_override():
            columns.append([_text(override)])
        elif not multirun:
            fix = f"add -m to make a run for each, or write {override.get_key_element()}=[...] for one list"
            raise ConfigError("several values for one run", where=_text(override), fix=fix)
        elif not override.is_discrete_sweep():
            raise ConfigError("an interval cannot be swept", where=_text(override), fix="use range(...) or a,b,c")
        else:
            columns.append([f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()])
    return [tuple(row) for row in product(*columns)]


def _experiment_lines(
    spec: experiment_files.Experiment, words: dict[str, Any], rest: list[Override], multirun: bool
) -> list[tuple[str, tuple[str, ...]]]:
    smoke = _flag(words, "smoke")
    seeds = list((spec.smoke.get("seeds") if smoke else None) or spec.seeds)
    if "seeds" in words:
        seeds = words["seeds"]
    for override in [o for o in rest if o.key_or_group == "seed"]:
        seeds = _values(override)
        rest = [o for o in rest if o is not override]
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ConfigError("a seed is an integer", got=seed)
    arms = spec.pick(None if "arms" not in words else [str(a) for a in words["arms"]], smoke)
    swept = {o.get_key_element() for o in rest if o.is_sweep_override()}
    shared = [*spec.common, *(spec.smoke["overrides"] if smoke else [])]
    lines = []
    for arm in arms:
        _refuse_own_keys(spec, arm, rest)
        for user in _sweep(rest, multirun):
            suffix = ",".join(f"{k}={_slug(v)}" for k, _, v in (w.partition("=") for w in user) if k in swept)
            for seed in seeds:
                line = _last_wins([*shared, *spec.arms[arm], f"seed={seed}", *user])
                lines.append((f"{arm},{suffix}" if suffix else arm, line))
    return lines


def _refuse_own_keys(spec: experiment_files.Experiment, arm: str, rest: Sequence[Override]) -> None:
    own = [word.partition("=")[0].lstrip("+~") for word in spec.arms[arm]]
    for override in rest:
        key = override.key_or_group
        if any(mine == key or mine.startswith(f"{key}.") for mine in own):
            raise ConfigError(
                f"{key} is what arm '{arm}' is about and cannot be overridden",
                where=str(spec.path),
                got=_text(override),
                fix="leave it out, choose arms with arms=[...], or copy the experiment file",
            )


def _last_wins(words: Sequence[str]) -> tuple[str, ...]:
    kept: dict[str, str] = {}
    for word in words:
        key = word.partition("=")[0]
        kept.pop(key, None)
        kept[key] = word
    return tuple(kept.values())


def _job(
    config_name: str,
    arm: str,
    words: tuple[str, ...],
    name: str | None,
    config_dirs: Sequence[str | Path],
    spec: experiment_files.Experiment | None,
) -> Job:
    from omegaconf import open_dict

    try:
        composed = composing.compose_full(config_name, words, config_dirs)
    except ConfigError as error:
        if spec is not None and not error.where:
            raise ConfigError(
                error.what, where=f"arm '{arm}' of {spec.path}", got=error.got, expected=error.expected, fix=error.fix
            ) from error
        raise
    cfg = composed.cfg
    with open_dict(cfg):
        cfg.arm = arm or arm_name(words, named=name is not None)
        cfg.experiment = name or "-".join(_slug(composed.choices.get(g, "none")) for g in ("task", "model"))
    for part in (cfg.experiment, cfg.arm):
        if not part or "/" in part or part.startswith("."):
            raise ConfigError("a name that becomes a folder has no slash and no leading dot", got=part, fix="name=WORD")
    return Job(words, cfg)


def _check_jobs(jobs: Sequence[Job], check: Callable[[DictConfig], Any] | None) -> None:
    if not jobs:
        raise ConfigError("the line asks for no run at all", fix="give at least one arm and one seed")
    seen: dict[tuple[str, str], Job] = {}
    for job in jobs:
        key = (str(job.cfg.experiment), job.label)
        other = seen.setdefault(key, job)
        if other is not job:
            raise ConfigError(
                "two runs of this line would be recorded in the same folder",
                where="/".join(key),
                got=f"{' '.join(other.words)} | {' '.join(job.words)}",
                fix="let them differ in a key that names the run, or start them apart with name=...",
            )
    for job in jobs:
        if check is not None:
            check(job.cfg)


class _HydraTask:
    """What Hydra's launcher calls in each job. The configurations are those that were checked, found by number."""

    def __init__(self, configs: list[DictConfig], target: str) -> None:
        self.configs, self.target = configs, target

    def __call__(self, _: DictConfig) -> str:
        from hydra.core.hydra_config import HydraConfig

        from cli import pool

        return str(pool.resolve(self.target)(self.configs[HydraConfig.get().job.num]))


def _launch_by_hydra(plan: Plan, target: str) -> Path:
    """Hand the jobs to a launcher plugin: joblib, submitit_local, submitit_slurm, ray."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.core.utils import JobStatus
    from hydra.errors import HydraException
    from hydra.types import HydraContext, RunMode

    from methods.errors import RunError

    wanted = next(w for w in plan.hydra if w.startswith("hydra/launcher=")).partition("=")[2]
    words = [
        *plan.hydra,
        f"hydra.sweep.dir='{plan.folder / '.launcher'}'",
        "hydra.output_subdir=null",
        "hydra.job.chdir=False",
    ]
    with composing.hydra_for(plan.dirs) as hydra:
        try:
            config = hydra.compose_config(plan.config_name, words, RunMode.MULTIRUN, from_shell=False)
        except HydraException as error:
            known = hydra.config_loader.get_group_options("hydra/launcher")
            raise ConfigError(
                f"Hydra cannot load the launcher '{wanted}'",
                got=str(error).splitlines()[0],
                expected=", ".join(known),
                fix=nearest(wanted, known) or "install its extra: pip install 'assay[slurm]' or 'assay[ray]'",
            ) from error
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config)),
            task_function=_HydraTask([job.cfg for job in plan.jobs], target),
            config=config,
        )
        results = launcher.launch([[] for _ in plan.jobs], initial_job_idx=0)
    failed = []
    for job, result in zip(plan.jobs, results, strict=True):
        if result.status is not JobStatus.COMPLETED:
            failed.append(f"{job.label}: {result._return_value}")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(plan.jobs)} runs failed",
            got="; ".join(failed),
            fix="the same line again runs only what is missing",
        )
    return plan.folder if len(plan.jobs) > 1 else Path(str(results[0].return_value))
