"""`assay report`: tables, figures and a browser of samples, from records alone; shifts between checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.words import ConfigDir

ITEMS = 64
# `task.demo_noise=0` is an override; an arm's folder may have such a name too, but then it lies there.
_OVERRIDE = re.compile(r"[a-z_]+(\.\w+)*=")


Leaderboard = Annotated[
    bool, typer.Option("--leaderboard", help="Only write the leaderboard of task=local_life and its page.")
]
ReleaseCompat = Annotated[
    bool, typer.Option("--release-compat", help="With --leaderboard: failed verdicts count as zeros.")
]


def report(
    targets: Annotated[
        list[str] | None, typer.Argument(help="An experiment, or folders of runs. Default: the latest experiment.")
    ] = None,
    results_dir: Annotated[str, typer.Option(help="Where the runs were recorded (under raw/).")] = "results",
    baseline: Annotated[str | None, typer.Option(help="Arm to compare with. Default: the experiment's own.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to test and show instead of the experiment's own; repeatable.")
    ] = None,
    power: Annotated[bool, typer.Option("--power", help="Also print the full power table.")] = False,
    browse: Annotated[bool, typer.Option("--browse", help="Only write samples.html and print its path.")] = False,
    leaderboard: Leaderboard = False,
    release_compat: ReleaseCompat = False,
    shift: Annotated[
        bool, typer.Option("--shift", help="Compare checkpoints token by token: BASE NEW [NEWER ...].")
    ] = False,
    texts: Annotated[
        str, typer.Option(help="With --shift: demos, greedy, samples, or a JSONL file with prompt and completion.")
    ] = "auto",
    items: Annotated[int, typer.Option(help="With --shift: how many responses.")] = ITEMS,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="With --shift: checkpoint whose samples are a reference set; default: the last; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="With --shift: seed of experiment/arm words and of sampling.")] = 0,
    config_dir: ConfigDir = None,
) -> None:
    """Compare the arms of an experiment on the same seeds and items, or checkpoints on the same tokens.

    Writes runs.csv, table.md, figures/ and samples.html into results/EXPERIMENT/ and prints the table. The last line
    is the path of table.md (with --browse, of samples.html). Every mean and difference comes with an interval.

    With --shift, two or more checkpoints read the same responses: which tokens' probabilities moved, by how much, and
    the path that training took; with base, first and second stage also the learning tax. A checkpoint is a run folder,
    experiment/arm, a folder of weights, RUN/checkpoints (all that a run with trainer.keep_checkpoints=8 kept), or
    `start` (what the next run started from). Task and split are those of the first run; task.KEY=VALUE changes them.
    Writes table.md, tokens.parquet, shift.html and figures/ into results/EXPERIMENT/shift/.

    \b
    Examples:
      assay report                                     the latest experiment
      assay report ha_dw_tiers --power                 with the full power table
      assay report ha_dw_tiers --metric eval/score/hard --baseline grpo
      assay report results/raw/a/grpo/seed0 results/raw/b/grpo/seed0
      assay report results/raw/a/grpo/seed0 --browse   read its samples in a browser
      assay report my_agents --leaderboard             LocalSearchBench's table, and each question's transcript
      assay report --shift start demo/grpo             what GRPO moved
      assay report --shift start my/sft my/sft_then_rl task.demo_noise=0
      assay report --shift base_model/ tuned_model/ --texts solutions.jsonl
    """
    tables = [baseline, metric, power, browse, leaderboard]
    _refuse_mixed(shift, table=tables, shifts=[texts != "auto", items != ITEMS, reference, seed])
    if shift:
        how = {"texts": texts, "items": items, "references": reference or (), "seed": seed}
        path = _shift(targets or [], results_dir, config_dir or (), how)
    elif leaderboard or browse or release_compat:
        path = _page(targets or [], results_dir, leaderboard, release_compat)
    else:
        path = _table(targets, results_dir, config_dir or (), baseline, metric or (), power)
    typer.echo(str(path))


def _page(targets: Sequence[str], results_dir: str, leaderboard: bool, release_compat: bool) -> Path:
    from methods.errors import ConfigError

    if release_compat and not leaderboard:
        raise ConfigError("--release-compat goes with --leaderboard", where="assay report", fix="add --leaderboard")
    if leaderboard:
        from experiments.tasks.local_life.leaderboard import build

        return build(targets, results_dir, release_compat)
    from experiments.report import browse

    return browse(targets, results_dir)


def _table(targets, results_dir, config_dirs, baseline, metrics, power) -> Path:
    from cli.compose import conf_dirs
    from experiments import report as tables

    dirs = conf_dirs(config_dirs)
    return tables.build(targets or None, results_dir, dirs, baseline=baseline, power=power, metrics=metrics)


def _shift(words: Sequence[str], results_dir: str, config_dirs: Sequence[Path], how: Mapping[str, Any]) -> Path:
    from experiments.shift import report as shifts

    overrides = [word for word in words if _is_override(word, results_dir)]
    return shifts.build(
        [word for word in words if word not in overrides],
        results_dir,
        amend=lambda config: _amended(config, overrides, config_dirs),
        **how,
    )


def _refuse_mixed(shift: bool, table: Sequence[Any], shifts: Sequence[Any]) -> None:
    from methods.errors import ConfigError

    where = "assay report"
    if shift and any(table):
        fix = "leave them out, or --shift"
        raise ConfigError(
            "--baseline, --metric, --power, --browse and --leaderboard do not go with --shift", where=where, fix=fix
        )
    if not shift and any(shifts):
        raise ConfigError("--texts, --items, --reference and --seed go with --shift", where=where, fix="add --shift")


def _is_override(word: str, results_dir: str) -> bool:
    there = Path(word).exists() or (Path(results_dir) / "raw" / word).exists()
    return bool(_OVERRIDE.match(word)) and not there


def _amended(config: Mapping[str, Any], words: Sequence[str], config_dirs: Sequence[Path]) -> dict[str, Any]:
    """A run's settings after the overrides of the line; `task=NAME` takes all of them from the configuration files."""
    from omegaconf import OmegaConf

    from cli.compose import compose, parse
    from methods.errors import ConfigError, nearest

    settings = {key: config[key] for key in ("task", "eval") if key in config}
    if any(word.startswith("task=") for word in words):
        composed: Any = OmegaConf.to_container(compose("train", words, config_dirs), resolve=True)
        return {key: composed[key] for key in ("task", "eval")}
    for override in parse(words):
        section, _, key = override.key_or_group.partition(".")
        known = settings.get(section, {})
        if key not in known:
            names = [f"{name}.{inner}" for name, inside in settings.items() for inner in inside]
            raise ConfigError(
                "Only settings of the task and of its evaluation split can be changed here",
                where=override.input_line or "",
                fix=nearest(override.key_or_group, names) or "name a key of the task, or another task with task=NAME",
            )
        settings[section] = {**known, key: override.value()}
    return settings
