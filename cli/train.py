"""`assay train`: one run, a sweep, or a whole experiment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.words import ConfigDir, Multirun, Overrides, ShowJob
from methods.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from cli.launch import Plan


def train(
    overrides: Overrides = None,
    multirun: Multirun = False,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run's own configuration.")] = None,
    cfg: ShowJob = None,
    config_dir: ConfigDir = None,
) -> None:
    """Train one run, a sweep, or a whole experiment.

    \b
    Examples:
      assay train method=ha_dw task=arithmetic seed=1
      assay train 'method=[ha_dw,flip]' method.flip.target=ha_dw.direction objective=dapo
      assay train -m 'method=[],[ha_dw]' objective=grpo,gspo 'seed=range(8)' jobs=2
      assay train experiment=demo
      assay train experiment=demo smoke=true
      assay train experiment=demo 'arms=[grpo]' seeds=0,1 name=my_try
      assay train model=smollm2 task=jsonl task.path=rows.jsonl reward=my_reward.py:score
      assay train -m method=ha_dw seed=0,1 hydra/launcher=joblib
      assay train --resume results/raw/demo/grpo/seed0
      assay train method=ha_dw --cfg job

    The same line again skips finished runs and goes on with unfinished ones. Put quotes around brackets.
    Keys: assay train --cfg job. Choices: assay ls. The last line of the output is the path of what was written.
    """
    line = list(overrides or [])
    if resume is not None:
        typer.echo(_resume(resume, line))
        return
    if cfg is not None:
        show("train", cfg, line, multirun, config_dir or ())
        return
    from cli import launch
    from experiments.run import check

    plan = launch.plan("train", line, multirun=multirun, config_dirs=config_dir or (), check=check)
    _announce(plan)
    path = launch.launch(plan)
    if plan.spec is not None and plan.report:
        report(plan)
    typer.echo(path)


def _resume(run: Path, line: list[str]) -> Path:
    """Go on with a run from its own record. Raises RecordError if there is none."""
    if line:
        what = "--resume takes the run's own configuration"
        raise ConfigError(what, got=" ".join(line), fix="leave the overrides out")
    file = run / "config.yaml"
    if not file.is_file():
        raise RecordError("this folder holds no run", where=str(run), expected="config.yaml in it")
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        cfg = OmegaConf.load(file)
        # The folder may have been moved or be named from elsewhere: <results_dir>/raw/<experiment>/<arm>/seed<k>.
        folder = run.resolve()
        same = (str(cfg.experiment), str(cfg.arm), f"seed{cfg.seed}") == folder.parts[-3:]
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0]
        raise RecordError("the run's configuration is damaged", where=str(file), got=reason) from error
    if not same:
        raise RecordError(
            "the run does not lie where its record says",
            where=str(run),
            expected=f"a path that ends in {cfg.experiment}/{cfg.arm}/seed{cfg.seed}",
        )
    if Path(str(cfg.results_dir)).resolve() != folder.parents[3]:
        cfg.results_dir = str(folder.parents[3])
    _go_home(folder, cfg)
    from experiments.run import check
    from experiments.run import run as start

    check(cfg)  # type: ignore[arg-type]
    return Path(start(cfg))  # type: ignore[arg-type]


def _go_home(folder: Path, cfg: Any) -> None:
    """Changes to the folder in which the run was started, if it is still there: data and reward files may be named
    from it."""
    from experiments.records import load_run

    home = load_run(folder).run.get("cwd") if (folder / "run.json").is_file() else None
    if home and os.path.isdir(home) and Path(home) != Path.cwd():
        cfg.results_dir = str(folder.parents[3])
        os.chdir(home)


def show(command: str, what: str, line: list[str], multirun: bool = False, dirs: Sequence[Path] = ()) -> None:
    """Print the resolved configuration of every job of the line, as `--cfg job` asks for. ConfigError for others."""
    from omegaconf import OmegaConf

    from cli import launch

    if what != "job":
        raise ConfigError("--cfg shows the configuration of the job", got=what, expected="job")
    plan = launch.plan(command, line, multirun=multirun, config_dirs=dirs)
    for job in plan.jobs:
        if len(plan.jobs) > 1:
            typer.echo(f"--- # {job.label}")
        typer.echo(OmegaConf.to_yaml(job.cfg, resolve=True), nl=False)


def carry_out(command: str, job: Any, line: list[str], multirun: bool, dirs: Sequence[Path]) -> None:
    """Start every job of the line by module `job` (its `check` and `run`) and print the experiment's table, or what
    `shown` makes of each record."""
    from cli import launch

    plan = launch.plan(command, line, multirun=multirun, config_dirs=dirs, check=job.check)
    path = launch.launch(plan, target=f"{job.__name__}:run")
    if plan.spec is None:
        for one in plan.jobs:
            typer.echo(job.shown(one.cfg))
    elif plan.report:
        report(plan)
    typer.echo(path)


def _announce(plan: Plan) -> None:
    if plan.spec is not None:
        typer.echo(f"{plan.name}: {plan.spec.title}", err=True)
    if len(plan.jobs) > 1:
        arms = len({str(job.cfg.arm) for job in plan.jobs})
        typer.echo(f"{plan.name}: {len(plan.jobs)} runs, {arms} arms, into {plan.folder}", err=True)


def report(plan: Plan) -> None:
    """Write and print the tables of an experiment that has just run."""
    from experiments.report import build

    build(plan.name, root=str(plan.jobs[0].cfg.results_dir), conf_dirs=(*plan.dirs, plan.folder))
