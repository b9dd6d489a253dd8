"""Rollouts for evaluation with the methods' hooks in evaluation mode: `prepare_rows`, `rollout`, `eval_metrics`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from experiments.engines.base import Request, Result, Usage
from experiments.engines.base import encode as ids_of
from experiments.seeds import derive
from experiments.team import ALONE, Team
from methods.base import ConfigError, Context, Segment, Trajectory, Turn
from methods.stack import Stack


@dataclass(frozen=True)
class Sampling:
    """How to sample: `samples` completions per item, each with a stream of its own derived from `seed`."""

    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


def rollouts(
    stack: Stack,
    ctx: Context,
    engine: Any,
    items: Sequence[Any],
    how: Sampling,
    encode: Callable[[Any], list[int]] | None = None,
    team: Team = ALONE,
) -> tuple[list[Trajectory], dict[str, list[float]]]:
    """Trajectories of every item and sample (samples of an item in a row), and the methods' own columns.

    `encode` turns a row's prompt into ids; without it the engine does, and segments carry no prompt ids. The processes
    of a team divide the items; all get all trajectories.
    """
    ctx.group_size, ctx.first_group = how.samples, 0
    ctx.temperature, ctx.top_p = how.temperature, how.top_p
    ctx.rows = stack.prepare_rows([row for row in items for _ in range(how.samples)], ctx)
    services: Any = ctx.services  # the bench's own, not only what it lends to methods
    task: Any = getattr(services, "task", None)
    draw = _episodes if getattr(task, "tools", None) is not None else _sample
    mine = team.part(len(ctx.rows), how.samples)
    trajs = []
    if ctx.rows[mine]:
        with services.apart() if team.size > 1 else nullcontext():
            trajs = stack.rollout(
                ctx.rows[mine], ctx, lambda rows, slots=None: draw(task, engine, rows, how, encode, slots)
            )
    for t in trajs:
        t.group_id += mine.start // how.samples
    ctx.trajs = team.trajectories(trajs, ctx.rows)
    asked = [(row.id, False) for row in items for _ in range(how.samples)]
    if [(t.row_id, t.is_demo) for t in ctx.trajs] != asked:
        raise ConfigError(
            "a hook chose other items, left some out, or gave demonstrations in evaluation",
            where="method",
            got=", ".join(m.name for m in stack.methods),
            expected="one own rollout per item and sample, in order",
            fix="look at ctx.mode in prepare_rows and rollout",
        )
    columns = task.measure(ctx.trajs) if draw is _episodes else []
    own = {name: [c[name] for c in columns] for name in columns[0]} if columns else {}
    return ctx.trajs, own | stack.eval_metrics(ctx.trajs, ctx)


def as_results(trajs: Sequence[Trajectory], samples: int) -> list[list[Result]]:
    """Trajectories as engine results, `samples` per item, for scoring."""
    results = []
    for t in trajs:
        usage, lost = Usage(0, t.length or sum(turn.end - turn.start for turn in t.turns)), t.finish == "error"
        results.append(Result("" if lost else t.text, None, None, t.finish, usage, t.text if lost else None))  # type: ignore[arg-type]
    return [results[i : i + samples] for i in range(0, len(results), samples)]


def _episodes(task: Any, engine: Any, rows: Sequence[Any], how: Sampling, encode, slots=None) -> list[Trajectory]:
    """Episodes of a task with tools: in token ids where the engine knows them, else in messages."""
    from experiments import messages, rollout

    slots = slots or range(len(rows))
    seeds = [derive(how.seed, row.id, slot % how.samples) for row, slot in zip(rows, slots, strict=True)]
    sampling = {"temperature": how.temperature, "top_p": how.top_p}
    ids = [(slot // how.samples, slot % how.samples) for slot in slots]
    model = getattr(engine, "engine", engine)  # the request cache holds completions, not episodes
    if not hasattr(model, "ends"):
        talks = messages.episodes(task, rows, engine, seeds, how.max_tokens, **sampling)
        return [messages.trajectory(t, row, *at) for t, row, at in zip(talks, rows, ids, strict=True)]
    encode = encode or (lambda prompt: ids_of(model.tokenizer, Request(**prompt_field(prompt)), model.chat))
    prompts = [encode(row.prompt) for row in rows]
    done = rollout.episodes(task, rows, prompts, model, model.tokenizer, seeds, how.max_tokens, **sampling)
    return [e.trajectory(row, p, *at) for e, row, p, at in zip(done, rows, prompts, ids, strict=True)]


def prompt_field(prompt: Any) -> dict[str, Any]:
    """A row's prompt as a field of Request."""
    return {"prompt" if isinstance(prompt, str) else "messages": prompt}


def _sample(task: Any, engine: Any, rows: Sequence[Any], how: Sampling, encode, slots=None) -> list[Trajectory]:
    slots = slots or range(len(rows))
    requests, ids_of = [], {}
    for i, row in enumerate(rows):
        if encode is not None:
            ids_of[id(row)] = ids_of.get(id(row)) or encode(row.prompt)
            prompt: dict[str, Any] = {"prompt_ids": ids_of[id(row)]}
        else:
            prompt = prompt_field(row.prompt)
        seed = derive(how.seed, row.id, slots[i] % how.samples)
        requests.append(
            Request(**prompt, max_tokens=how.max_tokens, temperature=how.temperature, top_p=how.top_p, seed=seed)
        )
    results = [r[0] for r in engine.generate(requests)]
    return [
        Trajectory(
            row_id=row.id,
            group_id=slots[i] // how.samples,
            sample_id=slots[i] % how.samples,
            segments=[Segment(requests[i].prompt_ids or [], result.ids or [])],
            turns=[Turn(0, 0, result.usage.completion_tokens)],
            finish=result.finish,
            text=result.text or result.error or "",
            row=row,
        )
        for i, (row, result) in enumerate(zip(rows, results, strict=True))
    ]


def stack_of(cfg: Any) -> Stack:
    """The methods of `cfg.method` as they were trained in `cfg.model.init`, or fresh; for evaluation only."""
    from experiments.engines.build import instantiate
    from methods.objectives.base import Objective

    # Nothing is trained, so no objective can be wrong.
    stack = Stack([instantiate(node) for node in cfg.method.values()], Objective(), check=False)
    saved = saved_states(cfg)
    for method in stack.methods:
        if method.name in saved:
            method.load_state_dict(saved[method.name])
    return stack


def saved_states(cfg: Any) -> dict[str, Any]:
    """The states that methods had at the end of the run that `cfg.model.init` names; {} where there is none."""
    from pathlib import Path

    from experiments import checkpoints
    from experiments.weights import find_init

    if not cfg.model.get("init"):
        return {}
    folder = Path(find_init(cfg.model.init, int(cfg.seed), cfg.results_dir))
    if not (folder / "state.json").is_file():
        return {}
    return checkpoints.read_state(folder)["trainer"].get("stack", {}).get("methods", {})
