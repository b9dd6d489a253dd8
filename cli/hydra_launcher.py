"""Runs handed to one of Hydra's launcher plugins: joblib, submitit_local, submitit_slurm, ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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


def run(plan: Plan, target: str) -> Path:
    """Run all jobs of a plan; RunError after the last one if some failed."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.core.utils import JobStatus
    from hydra.errors import HydraException
    from hydra.types import HydraContext, RunMode

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
            task_function=_Task([job.cfg for job in plan.jobs], target),
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
