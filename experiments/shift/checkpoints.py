"""Which weights are compared, what they are called, and which of them was trained from which."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.checkpoints import all_steps
from experiments.records import Run
from experiments.weights import LoadedModel, find_init
from methods.errors import ConfigError, nearest

START = "start"
LONG = 40  # characters of a name; the arms of a sweep are lists of overrides
WHERE = "assay report --shift"


@dataclass(frozen=True)
class Checkpoint:
    """Weights with the run they come from.

    `weights`: their folder; None for the model that the run started from. `run`: the run's folder, None for a plain
    folder of weights. `config`: the run's configuration, {} without a run. `origin`: what the run started from.
    `identity` equals the `origin` of a run that started from this checkpoint.
    """

    name: str
    weights: Path | None
    run: Path | None
    config: dict[str, Any]
    results_dir: Path

    @property
    def origin(self) -> str:
        return _origin(self.config, self.results_dir) if self.config else ""

    @property
    def identity(self) -> str:
        return self.origin if self.weights is None else str(self.weights.resolve())

    @property
    def experiment(self) -> str:
        return str(self.config.get("experiment") or "selected")

    def load(self) -> LoadedModel:
        """The model on the accelerator, if there is one. ConfigError if it cannot be read."""
        import torch

        from experiments.engines.build import instantiate
        from experiments.run import threads_for

        model: dict[str, Any] = dict(self.config.get("model") or {"_target_": "experiments.models.HF"})
        if self.weights is not None:
            model["init"] = str(self.weights)
        if "lora" in model:
            model["lora"] = None  # exports are merged, and a start has no adapters yet
        task = instantiate(self.config["task"]) if self.config else None
        loaded = instantiate(model).load(task, int(self.config.get("seed", 0)), results_dir=self.results_dir)
        threads_for(loaded)
        if torch.cuda.is_available() and not hasattr(loaded.model, "hf_device_map"):
            loaded.model.to("cuda")
        return loaded


def _origin(config: dict[str, Any], results_dir: Path) -> str:
    model = config.get("model") or {}
    if not model.get("init"):
        # A model built here depends on the task (symbols, warm start) and perhaps on the run's seed.
        built = [config.get("task"), config.get("seed") if model["seed"] is None else None] if "seed" in model else []
        return json.dumps([model, *built], sort_keys=True, default=str)
    try:
        return str(find_init(model["init"], int(config.get("seed", 0)), results_dir).resolve())
    except ConfigError:  # moved or deleted since; then nothing given here can be told to be it
        return str(model["init"])


# ---------------------------------------------------------------- finding


def find(targets: Sequence[str], seed: int, results_dir: str | Path, least: int = 2) -> list[Checkpoint]:
    """The checkpoints that the words name, in their order, with short names that tell them apart.

    A word is a run folder, `experiment/arm` (the run with `seed`), a folder of weights, a run's `checkpoints` folder
    (all that it kept, oldest first), or `start`: the model that the next run named started from. ConfigError for fewer
    than `least` checkpoints or a word that names none.
    """
    found: list[Checkpoint | None] = []
    for target in targets:
        found += [None] if target == START else _at(target, seed, Path(results_dir))
    for i in reversed([i for i, one in enumerate(found) if one is None]):
        run = next((one for one in found[i + 1 :] if one is not None and one.config), None)
        if run is None:
            fix = "name a run after it, or give a folder of weights instead"
            raise ConfigError(
                f"'{START}' is the start of the run named after it, and there is none", where=WHERE, fix=fix
            )
        found[i] = replace(run, name=START, weights=None)
    known = [one for one in found if one is not None]
    if len(known) < least:
        raise ConfigError(
            "A shift is measured between at least two checkpoints",
            where=WHERE,
            got=" ".join(targets) or "none",
            expected="BASE NEW [NEWER ...]",
            fix=f"put '{START}' before a run to compare it with the model that it started from",
        )
    return [replace(one, name=name) for one, name in zip(known, _names(known), strict=True)]


def _at(target: str, seed: int, results_dir: Path) -> list[Checkpoint]:
    kept = Path(target).expanduser()
    if kept.name == "checkpoints" and all_steps(kept):
        return [one for step in all_steps(kept) for one in _at(str(step), seed, results_dir)]
    try:
        weights = find_init(target, seed, results_dir)
    except ConfigError:
        raw = results_dir / "raw"
        names = [p.relative_to(raw).as_posix() for p in (*raw.glob("*"), *raw.glob("*/*")) if p.is_dir()]
        raise ConfigError(
            "There are no weights to compare",
            where=WHERE,
            got=target,
            expected=f"a run folder, experiment/arm of a run with seed {seed}, a folder of weights, or '{START}'",
            fix=nearest(target, names) or "train the run first, or give the path of its folder",
        ) from None
    run = next((place for place in (weights, *weights.parents[:2]) if (place / "run.json").is_file()), None)
    return [Checkpoint("", weights, run, Run(run).config if run else {}, results_dir)]


def _names(found: Sequence[Checkpoint]) -> list[str]:
    """The first way to name them that gives no name twice and is short, or at least gives no name twice."""
    ways = [("arm",), ("experiment",), ("arm", "seed"), ("experiment", "arm"), ("experiment", "arm", "seed")]
    named = [[_name(one, way) for one in found] for way in ways]
    named.append([str(one.weights or f"{START} of {one.run}") for one in found])
    telling = [names for names in named if len(set(names)) == len(names)]
    short = [names for names in telling if max(map(len, names), default=0) <= LONG]
    return [*short, *telling, [f"{name} ({i + 1})" for i, name in enumerate(named[-1])]][0]


def _name(one: Checkpoint, way: Sequence[str]) -> str:
    if one.weights is not None and one.run is None:
        return one.weights.name
    words = [f"seed{one.config.get('seed')}" if key == "seed" else str(one.config.get(key) or "run") for key in way]
    if one.weights is None:
        return START if len(way) == 1 else " ".join([START, "of", *words])
    kept = one.weights.parent.name == "checkpoints"
    return " ".join([*words, *(["step", one.weights.name.removeprefix("step_")] if kept else [])])


# ---------------------------------------------------------------- which was trained from which


def predecessors(found: Sequence[Checkpoint]) -> list[int]:
    """For every checkpoint but the first the index of the one that it goes on from; entry 0 is 0.

    That is an earlier point of the same run, or the one that its run is recorded to have started from, or the first
    one if that is not among them. Weights without a record go on from the one named just before them.
    """
    before = [0]
    for i, one in enumerate(found[1:], start=1):
        same = [k for k in range(i) if one.run and found[k].run == one.run and found[k].weights is not None]
        began = [k for k in range(i) if one.origin and found[k].identity == one.origin]
        before.append((same or began or [0 if one.config else i - 1])[-1])
    return before


def paths(found: Sequence[Checkpoint]) -> list[list[int]]:
    """The chains of indices from the first checkpoint to each one that nothing goes on from."""
    before = predecessors(found)
    chains = []
    for end in range(1, len(found)):
        if end not in before[1:]:
            chain = [end]
            while chain[-1]:
                chain.append(before[chain[-1]])
            chains.append(chain[::-1])
    return chains


def ancestry(one: Checkpoint) -> Iterator[dict[str, Any]]:
    """The configurations of the run, of the run that it started from, and so on: what the weights have seen."""
    config, seen = one.config, set()
    while config:
        yield config
        init = (config.get("model") or {}).get("init")
        if not init or init in seen:
            return
        seen.add(init)
        try:
            config = _at(init, int(config.get("seed", 0)), one.results_dir)[0].config
        except ConfigError:
            return
