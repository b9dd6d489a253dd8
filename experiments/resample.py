"""Dynamic sampling: groups whose rewards are all equal are replaced by groups of new prompts."""

from __future__ import annotations

from typing import Any

from experiments import collect
from methods.base import Context


def replace_dead_groups(trainer: Any, ctx: Context) -> None:
    """Draws new prompts for the dead groups of `ctx.trajs`, up to `max_draws` draws; fills `ctx.rewards_all` too."""
    kept, every = ctx.trajs, [ctx.trajs]
    draws, names = 1, collect.learning_names(ctx)
    dead = collect.dead_groups(kept, names)
    while dead and draws < getattr(trainer.stack.objective, "max_draws", 1):
        rows = fresh_rows(trainer, len(dead))
        repeated = [row for row in rows for _ in range(trainer.num_generations)]
        trainer.draw(repeated, ctx, first_group=draws * len(trainer.rows))
        every.append(ctx.trajs)
        kept = collect.replace_groups(kept, dead, ctx.trajs, names)
        dead = collect.dead_groups(kept, names)
        draws += 1
    ctx.trajs = [t for draw in every for t in draw]
    ctx.rewards_all = {name: ctx.reward(name) for name in ctx.reward_names}
    ctx.trajs = kept
    ctx.rows = [t.row for t in kept]
    trainer.meter["groups/draws"].append(draws)


def fresh_rows(trainer: Any, count: int) -> list[Any]:
    """The next `count` training rows of an order of its own, which goes on over generations and resumes."""
    if trainer.use_vllm:  # all processes ask vLLM together, so each needs a prompt
        count = -(-count // trainer.team.size) * trainer.team.size
    start = trainer.stream_position
    order = trainer.services.order(len(trainer.rows), "dynamic_sampling")
    trainer.stream_position += count
    return [trainer.rows[order[(start + k) % len(order)]] for k in range(count)]
