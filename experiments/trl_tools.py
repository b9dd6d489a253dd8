"""TRL's own tool loop below the methods: for users who have `tools=` or `environment_factory=` written for TRL.

    AssayTrainer(..., tools=[multiply])                  # typed functions with Google docstrings
    AssayTrainer(..., environment_factory=Environment)   # reset(**row), public methods are tools

The model needs a chat template that TRL accepts for tools and, unless TRL knows the template, a `response_template` on
the tokenizer. Methods see the same record as of a task's own tools: turns, calls, results, and which tokens the model
wrote. Rewards are assay's; evaluation asks without these tools. A task with tools of its own goes through
`experiments.rollout`, which is several times faster (`python -m experiments.bench rollout`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from methods.base import Segment, Trajectory, Turn
from methods.errors import ConfigError


def rollout(trainer: Any, rows: Sequence[Any], slots: Sequence[int], first_group: int) -> list[Trajectory]:
    """One episode per row through TRL's `_generate`; slot j is sample j % G of group `first_group + j // G`.

    An environment's `reset` gets the row's prompt, answer, id and tier and the entries of its `meta`. ConfigError for
    plain prompts, several kinds of environments, an environment that scores itself, and several
    processes.
    """
    if trainer.team.size > 1:  # its loop meets the other processes once per turn, and they may have no row left
        raise ConfigError(
            "TRL's tool loop runs in one process", where="tools", fix="use a task with tools, or scale=gpu"
        )
    prompts = [trainer.wrap_prompt(row.prompt) for row in rows]
    if isinstance(prompts[0], str):
        raise ConfigError("TRL's tools need chat prompts", where="tools", fix="use a chat model (model.chat=true)")
    environments = _environments(trainer, rows, prompts)
    tools = [[*trainer._standalone_tools, *(_methods(e) if e else [])] for e in environments]
    # What GRPOTrainer prepares before it generates.
    trainer._sync_tool_dicts = [{t.__name__: t for t in some if not inspect.iscoroutinefunction(t)} for some in tools]
    trainer._async_tool_dicts = [{t.__name__: t for t in some if inspect.iscoroutinefunction(t)} for some in tools]
    with trainer.services.counted("generation"):
        prompt_ids, completion_ids, mask, completions, *_ = trainer._generate(prompts)
    trainer.cost["generated_tokens"] += sum(map(sum, mask))
    ends, G = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}, trainer.num_generations
    return [
        Trajectory(
            row_id=row.id,
            group_id=first_group + slot // G,
            sample_id=slot % G,
            segments=[Segment(asked, ids, model_mask=own)],
            turns=_turns(own, messages),
            finish="stop" if ids[-1] in ends and own[-1] and not messages[-1].get("tool_calls") else "length",
            text=next((m.get("content") or "" for m in reversed(messages) if m["role"] == "assistant"), ""),
            row=row,
        )
        for row, slot, asked, ids, own, messages in zip(
            rows, slots, prompt_ids, completion_ids, mask, completions, strict=True
        )
    ]


def _environments(trainer: Any, rows: Sequence[Any], prompts: list) -> list[Any]:
    """One environment per row from TRL's pool, reset; what `reset` returns is added to the prompt. None without any."""
    factories = trainer.environment_factories
    if factories is None:
        return [None] * len(rows)
    if set(factories) != {None} or hasattr(trainer._environment_pool[None][0], "get_reward"):
        raise ConfigError(
            "One kind of environment is offered, and rewards are assay's own",
            where="environment_factory",
            got="several environments" if set(factories) != {None} else "an environment with get_reward",
            fix="give one class without get_reward, and a reward function",
        )
    pool = trainer._environment_pool[None]
    pool += [factories[None]() for _ in range(len(rows) - len(pool))]
    trainer._batch_environments = [None] * len(rows)
    for k, (row, environment) in enumerate(zip(rows, pool, strict=False)):
        known = {"prompt": row.prompt, "answer": row.answer, "id": row.id, "tier": row.tier}
        seen = environment.reset(**(row.meta | known))
        if seen:
            prompts[k] = [*prompts[k][:-1], {**prompts[k][-1], "content": prompts[k][-1]["content"] + seen}]
    return pool[: len(rows)]


def _methods(environment: Any) -> list[Any]:
    found = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    return [getattr(environment, name) for name, _ in found if name != "reset" and not name.startswith("_")]


def _turns(mask: list[int], messages: list[dict]) -> list[Turn]:
    """The runs of the model's tokens, each with the calls that it made and what came back."""
    spans, at = [], 0
    for own, run in groupby(mask):
        length = len(list(run))
        spans += [(at, at + length)] * own
        at += length
    turns: list[Turn] = []
    for message in messages:
        if message["role"] == "tool" and turns:
            told = str(message["content"])
            turns[-1].result = told if turns[-1].result is None else f"{turns[-1].result}\n{told}"
        elif message["role"] == "assistant" and len(turns) < len(spans):
            asked = [call["function"] for call in message.get("tool_calls") or []]
            calls = [{"tool": call["name"], "args": call["arguments"]} for call in asked]
            start, end = spans[len(turns)]
            turns.append(Turn(0, start, end, "call" if calls else "answer", calls))
    return turns
