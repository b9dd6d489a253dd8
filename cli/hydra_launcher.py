"""Runs handed to one of Hydra's launcher plugins: joblib, submitit_local, submitit_slurm, ray.

`jobs=N` is the number of runs at once for each of them; submitit_local, which would start all of them together, gets
them N by N.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import compose as composing
from methods.errors import ConfigError, RunError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from cli.launch import Plan


class _Task:
    """What Hydra's launcher calls in each job. The configurations are those that were checked, found by number."""

    def __init__(self, configs: list[DictConfig], target: str) -> None:
        self.configs, self.target = configs, target

    def __call__(self, _: DictConfig) -> str:
        from hydra.core.hydra_config import HydraConfig

        from cli import pool

        return str(pool.resolve(self.target)(self.configs[HydraConfig.get().job.num]))


CAPS = {
    "joblib": "hydra.launcher.n_jobs",
    "submitit_slurm": "hydra.launcher.array_parallelism",
    "ray": "hydra.launcher.ray.init.num_cpus",
}
"""What `jobs=N` is called in the presets."""


def run(plan: Plan, target: str) -> Path:
    """Run all jobs of a plan; RunError after the last one if some failed."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import JobStatus
    from hydra.errors import HydraException
    from hydra.types import HydraContext, RunMode

    wanted = next(w for w in plan.hydra if w.startswith("hydra/launcher=")).partition("=")[2]
    words = [
        *plan.hydra,
        *([f"{CAPS[wanted]}={plan.workers}"] if plan.workers and wanted in CAPS else []),
        f"hydra.sweep.dir='{plan.folder / '.launcher'}'",
        "hydra.output_subdir=null",
        "hydra.job.chdir=False",
    ]
    with composing.hydra_for(plan.dirs) as hydra:
        try:
            with warnings.catch_warnings():  # our presets have the names of the plugins' schemas, which check them
                warnings.filterwarnings("ignore", message=r"[\s\S]*validated against ConfigStore schema")
                config = hydra.compose_config(plan.config_name, words, RunMode.MULTIRUN, from_shell=False)
        except HydraException as error:
            known = hydra.config_loader.get_group_options("hydra/launcher")
            raise ConfigError(
                f"Hydra cannot load the launcher '{wanted}'",
                got=str(error).splitlines()[0],
                expected=", ".join(known),
                fix=nearest(wanted, known) if wanted not in known else "",
            ) from error
        launcher = _instantiate(
            wanted,
            hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config)),
            task_function=_Task([job.cfg for job in plan.jobs], target),
            config=config,
        )
        results = _launched(launcher, plan, wanted)
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


def _instantiate(wanted: str, **parts: Any) -> Any:
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException

    try:
        return Plugins.instance().instantiate_launcher(**parts)
    except (HydraException, ImportError, RuntimeError) as error:
        extra = "ray" if wanted == "ray" else "slurm"
        raise ConfigError(
            f"The launcher '{wanted}' cannot be used here",
            where=f"hydra/launcher={wanted}",
            got=" ".join(str(error).split()),
            fix=f"install its extra: pip install 'assay[{extra}]'" if wanted != "joblib" else "pip install assay again",
        ) from error


def _launched(launcher: Any, plan: Plan, wanted: str) -> list[Any]:
    from cli import pool

    jobs: list[list[str]] = [[] for _ in plan.jobs]
    most = len(jobs)
    if wanted == "submitit_local":
        most = plan.workers or pool.default_workers(most)
    results = []
    try:
        for start in range(0, len(jobs), most):
            results += launcher.launch(jobs[start : start + most], initial_job_idx=start)
    except Exception as error:
        raise RunError(
            f"The launcher '{wanted}' failed",
            where=str(plan.folder / ".launcher"),
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
            fix="the same line again runs only what is missing",
        ) from error
    return results
