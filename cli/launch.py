"""A command line to a list of jobs, all of them checked before the first starts; then the jobs to runs.

A sweep (`-m`) multiplies its values out; an experiment multiplies its arms with its seeds; both together sweep
every arm. Where a run is recorded follows from the line alone, so that the same line again finds its runs.

In an experiment `model.init=arm:NAME` starts an arm from the run of arm NAME with the same seed, under the same name
of the experiment and with the same swept values; such an arm waits until that run has finished.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import compose as composing
from cli import experiment as experiment_files
from methods.errors import ConfigError, RunError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

TARGET = "experiments.run:run"
# Words that steer launching; they are no keys of the configuration.
WORDS = ("experiment", "arms", "seeds", "smoke", "report", "jobs")
# Groups whose choices name an experiment that has no name.
NAMING = {"judge": ("benchmark", "judge"), "score_transfer": ("domains", "model")}
# Keys that do not make a run another run.
BOOKKEEPING = re.compile(
    r"(seed|name|jobs|results_dir|overwrite|debug|record(\..*)?|trainer\.(save|keep)_\w+|eval\.progress|hydra[./].*)$"
)


@dataclass(frozen=True)
class Job:
    """One run: its words, the composed configuration that they give, and the label of the run that it starts from."""

    words: tuple[str, ...]
    cfg: DictConfig
    earlier: str | None = None

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
            fix=f"assay {spec.command.replace('_', '-')} experiment={spec.name}",
        )
    lines = _experiment_lines(spec, words, rest, multirun) if spec else [("", w) for w in _sweep(rest, multirun)]
    name = _value(rest, "name")
    if spec and name is None:
        name = f"{spec.name}-smoke" if _flag(words, "smoke") else spec.name
    jobs = [_job(config_name, arm, w, name, config_dirs, spec) for arm, w in lines]
    _check_jobs(jobs, check)
    made = Plan(
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
    for job in jobs:
        _check_earlier(made, job)
    return made


def launch(plan: Plan, *, target: str = TARGET) -> Path:
    """Run all jobs of a plan and return the path of what was written: the run's, or the experiment's if several.

    Runs on several processes go one after the other unless `jobs=` says otherwise.
    Raises RunError after the last job if some failed, KeyboardInterrupt if a signal stopped them.
    """
    from omegaconf import OmegaConf

    from cli import hydra_launcher, pool

    _keep_experiment(plan)
    by_hydra = any(word.startswith("hydra/launcher=") for word in plan.hydra)
    if len(plan.jobs) == 1 and not by_hydra:
        return Path(pool.resolve(target)(plan.jobs[0].cfg))
    error, path = None, plan.folder
    for stage in stages(plan.jobs):
        ready = [job for job in stage if job.earlier is None or _has_finished(plan, job.earlier)]
        for job in stage:
            if job not in ready:
                print(f"{job.label} does not start: {job.earlier}, its first stage, has not finished", file=sys.stderr)
        try:
            if by_hydra and ready:
                path = hydra_launcher.run(replace(plan, jobs=ready), target)
            elif ready:
                several = any(OmegaConf.select(job.cfg, "scale.num_processes", default=1) != 1 for job in ready)
                workers = plan.workers or (1 if several else pool.default_workers(len(ready)))
                pool.run([(job.label, job.cfg) for job in ready], target, workers, title=plan.name)
        except RunError as failed:  # the other arms of the next stage still run
            error = error or failed
    if error is not None:
        raise error
    return path if len(plan.jobs) == 1 else plan.folder


def stages(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The jobs in the order in which they can run: those of a stage start from runs of earlier stages only."""
    left = list(jobs)
    while left:
        labels = {job.label for job in left}
        stage = [job for job in left if job.earlier not in labels]
        yield stage
        left = [job for job in left if job.earlier in labels]


def _has_finished(plan: Plan, label: str) -> bool:
    return (plan.folder / label / "summary.json").is_file()


def _check_earlier(plan: Plan, job: Job) -> None:
    if job.earlier is None or job.earlier in {j.label for j in plan.jobs} or _has_finished(plan, job.earlier):
        return
    arm = job.earlier.partition("/")[0]
    raise ConfigError(
        f"{job.label} starts from {job.earlier}, which this line does not run and which has not finished",
        where=str(plan.folder),
        fix=f"run the arm '{arm.partition(',')[0]}' too, or before",
    )


def _keep_experiment(plan: Plan) -> None:
    """Runs under another name than their file's take their comparison along, so that a report finds it."""
    if plan.spec is None or plan.spec.name == plan.name:
        return
    import yaml

    from experiments.files import os_errors
    from experiments.files import replace as write

    file = plan.folder / "experiment" / f"{plan.name}.yaml"
    with os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write(file, yaml.safe_dump(plan.spec.variant(plan.smoke), sort_keys=False).encode())


def arm_name(words: Sequence[str], naming: Sequence[str] = ("task", "model")) -> str:
    """The arm of a run that belongs to no experiment: its overrides in a form that is safe in a path.

    The groups in `naming` name the experiment already (none do if the user named it). No override at all: `default`.
    """
    parts = []
    for word in sorted(words):
        key, _, value = word.partition("=")
        if BOOKKEEPING.match(key.lstrip("+~")) or key in naming:
            continue
        parts.append(f"{key}={_slug(value)}")
    return _fitted(",".join(parts) or "default")


def _fitted(text: str) -> str:
    """File systems allow 255 bytes per name; a long line keeps its beginning and a hash of all of it."""
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
                lines.append((f"{arm},{_fitted(suffix)}" if suffix else arm, line))
    return lines


def _refuse_own_keys(spec: experiment_files.Experiment, arm: str, rest: Sequence[Override]) -> None:
    own = [word.partition("=")[0].lstrip("+~") for word in spec.arms[arm]]
    for override in [o for o in rest if not o.is_sweep_override()]:  # a sweep's runs are named after its values
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
    cfg, earlier = composed.cfg, None
    with open_dict(cfg):
        naming = NAMING.get(config_name, ("task", "model"))
        cfg.arm = arm or arm_name(words, () if name is not None else naming)
        cfg.experiment = name or "-".join(_slug(composed.choices.get(g, "none")) for g in naming)
        init = str((cfg.get("model") or {}).get("init"))
        if init.startswith("arm:"):
            if spec is None:
                raise ConfigError(
                    "arm: names another arm of an experiment", where=f"model.init={init}", fix="give a run"
                )
            _, comma, swept = cfg.arm.partition(",")
            start = init.removeprefix("arm:") + comma + swept
            cfg.model.init, earlier = f"{cfg.experiment}/{start}", f"{start}/seed{cfg.seed}"
    for part in (cfg.experiment, cfg.arm):
        if not part or "/" in part or part.startswith(".") or len(part.encode()) > 255:
            what = "a name that becomes a folder has no slash, no leading dot and at most 255 bytes"
            raise ConfigError(what, got=part[:80], fix="name=WORD")
    return Job(words, cfg, earlier)


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
