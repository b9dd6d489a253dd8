"""The three batch words, and everything that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """Sizes derived from prompts_per_step, rollouts_per_prompt and rows_per_device.

    period: optimiser steps that one generation serves; metrics, state and resume are exact at its multiples.
    """

    prompts_per_step: int
    group_size: int
    rows_per_device: int
    accumulation: int
    updates_per_generation: int
    iterations: int
    world: int

    @property
    def slices(self) -> int:
        """Micro-batches per generation (TRL's steps_per_generation)."""
        return self.accumulation * self.updates_per_generation

    @property
    def period(self) -> int:
        return self.updates_per_generation * self.iterations

    @property
    def prompts_per_generation(self) -> int:
        return self.prompts_per_step * self.updates_per_generation

    def __str__(self) -> str:
        devices = f" x {self.world} devices" if self.world > 1 else ""
        return (
            f"one step = {self.prompts_per_step} prompts x {self.group_size} rollouts"
            f" = {self.accumulation} x {self.rows_per_device} rows{devices};"
            f" one generation = {self.prompts_per_generation} prompts, {self.period} step(s)"
        )


def plan(trainer, world: int = 1) -> BatchPlan:
    """The plan of `cfg.trainer` on `world` processes. ConfigError where the words do not divide."""
    prompts, group = trainer.prompts_per_step, trainer.rollouts_per_prompt
    for key in ("max_steps", "prompts_per_step", "updates_per_generation", "iterations"):
        if trainer[key] < 1:
            raise ConfigError("a count must be at least 1", where=f"trainer.{key}", got=trainer[key])
    if group < 2:
        raise ConfigError(
            "a group needs at least two rollouts",
            where="trainer.rollouts_per_prompt",
            got=group,
            expected="2 or more (TRL refuses 1; ppo and reinforce_pp treat them as independent)",
        )
    rows = prompts * group
    if world > prompts * trainer.updates_per_generation:
        raise ConfigError(
            "there are more processes than prompts",
            where="scale.num_processes",
            got=f"{world} processes, {prompts * trainer.updates_per_generation} prompts per generation",
            expected="at least one whole group for each process",
            fix="raise trainer.prompts_per_step, or lower scale.num_processes",
        )
    if rows % world:
        raise _undivided("the rows of a step do not divide by the processes", rows, world, "trainer.prompts_per_step")
    local = rows // world
    per_device = trainer.rows_per_device or local
    if local % per_device:
        raise _undivided("a step's rows on one device do not divide by rows_per_device", local, per_device)
    if prompts * trainer.updates_per_generation % world:
        raise ConfigError(
            "the groups of a generation do not divide by the processes, so one would be cut",
            where="trainer.prompts_per_step",
            got=f"{prompts * trainer.updates_per_generation} groups of {group}, {world} processes",
            expected="the same number of whole groups for each process",
            fix=f"trainer.prompts_per_step={-(-prompts // world) * world}",
        )
    return BatchPlan(
        prompts, group, per_device, local // per_device, trainer.updates_per_generation, trainer.iterations, world
    )


def _undivided(what: str, rows: int, by: int, where: str = "trainer.rows_per_device") -> ConfigError:
    divisors = [d for d in range(1, rows + 1) if rows % d == 0]
    close = min(divisors, key=lambda d: abs(d - by))
    return ConfigError(what, where=where, got=f"{rows} rows and {by}", expected="a divisor", fix=f"{close} would do")


def log_every(cfg, period: int) -> int:
    """Steps between log lines. ConfigError unless log, save and end fall on generation boundaries."""
    every = cfg.trainer.log_every or period
    if cfg.trainer.keep_checkpoints < 1:
        raise ConfigError(
            "a run keeps at least one checkpoint", where="trainer.keep_checkpoints", got=cfg.trainer.keep_checkpoints
        )
    checks = (
        ("trainer.log_every", every, period, "one generation"),
        ("trainer.save_every", cfg.trainer.save_every, every, "trainer.log_every"),
        ("trainer.max_steps", cfg.trainer.max_steps, every, "trainer.log_every"),
        ("eval.every", cfg.eval.every, every, "trainer.log_every"),
    )
    for key, value, unit, unit_name in checks:
        if value % unit:
            raise ConfigError(
                "a run can only be resumed exactly where a generation ends",
                where=key,
                got=value,
                expected=f"a multiple of {unit} steps ({unit_name})",
                fix=f"{key}={max(unit, round(value / unit) * unit)}",
            )
    return every


def caught_up(sampler: Any, rounds: int) -> Any:
    """TRL's sampler as it stands after `rounds` generations: the orders of all epochs that are over are drawn.

    On resume the skipped batches of the epoch under way are drawn again by transformers, earlier epochs are not: the
    run would go on in the order of the first one.
    """
    import torch

    for _ in range(rounds // max(1, sampler.num_samples // sampler.batch_size)):
        torch.randperm(sampler.num_samples, generator=sampler.generator)
    return sampler
