"""Demonstrations in the groups of a generation: what SRFT, naive SFT + RL and LUFFY share."""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.base import Batch, Context, Method, Segment, Trajectory
from methods.errors import ConfigError, DataError

THINK = "<think>\n"


@dataclass
class Demonstrations(Method):
    """Base of methods that train on demonstrations beside rollouts of the same prompts.

    The last `n_demo` slots of each group hold the row's demonstrations (`Row.demo`, or the list in
    `Row.meta["demos"]`), closed by eos; only the other slots are generated. `lctx.extras["demo"]` is 1 on their rows.
    A prompt that ends in `<think>\\n` takes this opening off its demonstration. Before the first generation every
    training row's demonstrations are read once: DataError for one that is no text or that the tokenizer does not
    give back (up to Unicode's composed form), and if no row has any.
    Degenerate: a row without a demonstration, or with one longer than the completion limit, keeps a group of rollouts.
    """

    n_demo: int = 1
    counts: dict[str, float] = field(default_factory=dict, init=False)
    checked: bool = field(default=False, init=False)

    objectives = ("grpo",)
    needs = frozenset({"group_baseline"})
    keeps_dead_groups = True

    def __post_init__(self) -> None:
        if self.n_demo < 1:
            raise ConfigError(
                "a method of demonstrations needs a slot for them", where=f"method.{self.name}.n_demo", got=self.n_demo
            )

    def rollout(self, rows: list[Any], ctx: Context, default) -> list[Trajectory]:
        if ctx.mode == "eval":
            return default(rows)
        G = ctx.group_size
        if self.n_demo >= G:
            raise ConfigError(
                "no slot is left for rollouts",
                where=f"method.{self.name}.n_demo",
                got=f"{self.n_demo} demonstrations in groups of {G}",
                expected=f"at most {G - 1}",
                fix="raise trainer.rollouts_per_prompt",
            )
        if not self.checked:
            check_rows(ctx.train_rows(sys.maxsize, "demonstrations"), ctx.tokenizer, self.name)
            self.checked = True
        texts = {
            start + G - 1 - k: text
            for start in range(0, len(rows), G)
            for k, text in enumerate(demonstrations(rows[start])[: self.n_demo])
        }
        demos = {slot: (encode(ctx.tokenizer, [text])[0], text) for slot, text in texts.items()}
        demos = {slot: demo for slot, demo in demos.items() if len(demo[0]) <= ctx.limits.max_completion_tokens}
        free = [slot for slot in range(len(rows)) if slot not in demos]
        drawn = dict(zip(free, default([rows[slot] for slot in free], slots=free), strict=True))
        self.counts = {"demos": len(demos), "demo_too_long": len(texts) - len(demos)}
        trajs = []
        for slot, row in enumerate(rows):
            if slot in demos:
                ids, text = demos[slot]
                sibling = drawn[slot // G * G]  # slot 0 of a group is always a rollout
                trajs.append(demonstrated(row, sibling, slot % G, ids, text, ctx.tokenizer))
            else:
                trajs.append(drawn[slot])
        return trajs

    def select(self, batch: Batch, ctx: Context) -> Batch:
        """Flags the demonstrations' rows and logs what the rollouts alone achieved."""
        demo_N = torch.tensor([t.is_demo for t in batch.trajs])
        batch.extras["demo"] = demo_N.to(batch.adv_ST.device)[batch.traj_S].float()
        reward_N = ctx.reward(ctx.reward_name("outcome")).where(~demo_N, torch.nan)
        best: dict[int, list[float]] = {}
        for group, value in zip(ctx.group_N.tolist(), reward_N.tolist(), strict=True):
            if value == value:
                best.setdefault(group, []).append(value)
        groups = max(len(best), 1)
        self.counts |= {
            "rollout_reward": float(torch.nanmean(reward_N)),
            "all_wrong": sum(max(v) <= 0.5 for v in best.values()) / groups,
            "all_right": sum(min(v) > 0.5 for v in best.values()) / groups,
        }
        return batch

    def metrics(self) -> dict[str, float]:
        return {k: float(v) for k, v in self.counts.items()}


def demonstrations(row: Any) -> list[str]:
    """A row's demonstrations: `meta["demos"]`, else its `demo`, else none. DataError for anything but texts."""
    several = (getattr(row, "meta", None) or {}).get("demos")
    found = several or ([row.demo] if getattr(row, "demo", None) else [])
    if not isinstance(found, (list, tuple)) or not all(isinstance(text, str) and text for text in found):
        raise DataError(
            "a demonstration is a text", where=f"row '{row.id}'", got=repr(found)[:100], expected="a text, or a list"
        )
    return list(found)


def check_rows(rows: list[Any], tokenizer: Any, name: str) -> None:
    """DataError if no row has a demonstration, or a demonstration does not survive the tokenizer."""
    pairs = [(row, text) for row in rows for text in demonstrations(row)]
    if not pairs:
        raise DataError(
            f"{name} trains on demonstrations and no training row has one",
            where="task",
            got=f"{len(rows)} rows",
            fix="name their column, as in task.demo_column=demo, or choose a task that gives demonstrations",
        )
    for (row, text), ids in zip(pairs, encode(tokenizer, [text for _, text in pairs]), strict=True):
        back = tokenizer.decode(ids[:-1], skip_special_tokens=False)
        if unicodedata.normalize("NFC", back) != unicodedata.normalize("NFC", text):
            raise DataError(
                "the tokenizer does not give a demonstration back, so other tokens would be trained than were shown",
                where=f"row '{row.id}'",
                got=repr(back)[:100],
                expected=repr(text)[:100],
                fix="choose a model whose vocabulary knows these symbols, or leave the row out",
            )


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text and eos."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def demonstrated(row: Any, sibling: Trajectory, sample_id: int, ids: list[int], text: str, tokenizer: Any):
    """The demonstration as a trajectory of its sibling's group, on the very prompt tokens that rollouts see."""
    prompt_ids = sibling.segments[0].prompt_ids
    if text.startswith(THINK) and tokenizer.decode(prompt_ids[-8:]).endswith(THINK):
        text = text.removeprefix(THINK)
        ids = encode(tokenizer, [text])[0]
    return Trajectory(row.id, sibling.group_id, sample_id, [Segment(prompt_ids, ids)], is_demo=True, text=text, row=row)


def tokens_of(batch: Batch, mine_S: Tensor, ctx: Context) -> Tensor:
    """(S,) the trained tokens of the rows `mine_S` over the whole generation and all processes, on every row."""
    total = ctx.gather((batch.model_mask_ST.sum(1) * mine_S).sum().reshape(1).float()).sum()
    return total.expand(batch.rows).clone()
