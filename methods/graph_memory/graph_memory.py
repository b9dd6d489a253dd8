"""Trainable graph memory: strategies from rollouts, weighted by the reward gap they cause (arXiv 2511.07800)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from methods.base import Batch, Context, Method
from methods.errors import ConfigError, check_range
from methods.graph_memory.graph import Activation, Memory, memory_of, state_of
from methods.graph_memory.induction import absorb, plant, prune
from methods.graph_memory.machine import canonical_path, events
from methods.graph_memory.prompts import before, question_of, reward_gap
from methods.graph_memory.relevance import best, candidate_probabilities, sampled_slope

TEACHER = "graph_weights"  # the objective under which the memory is made; under any other it is used


@dataclass
class GraphMemory(Method):
    """Strategies learned from success and failure stand before each question, chosen by a memory with trained weights.

    The memory has questions i, canonical paths j (`machine.py`) and strategies k, edges i-j and j-k (`graph.py`).
    Relevance to a question q, s_i its cosine similarity to the nearest stored questions, and the chance of being tried:
        rho_k = sum_ij s_i w_ij w_jk,   p_k = exp(rho_k / tau) / sum_l exp(rho_l / tau)      over k with rho_k > 0
    Under `objective=graph_weights` the policy stays as it is and the memory is made, on questions of its own:
    1. the rollouts of `memory_questions` questions become paths and, by their contrasts, strategies (`induction.py`);
    2. on `weight_questions` others, again and again, half of each group gets one strategy k ~ p, half none:
           dR = mean reward with - without,   L = - dR log p_k,   w <- clip(w - learning_rate dL/dw, 0.01, 5)
       summed over the questions of a generation.
    Under any other objective, and in evaluation, the `shown` most relevant strategies stand before the question, the
    best first, the same for its whole group, and the weights rest. A training question that the memory was made on is
    replaced by another one. `model.init` hands the memory of an earlier run on; `memory` begins with one from a file.
    `planted` strategies are hung on every path when the memory is built.

    Signals: `gap` (dR of each question), `relevance` (one row per strategy: shuffled, the strategies shown are random).
    Differs from the paper, which leaves them open: state machine, strategies written by a template, initial weights,
    clipping, learning rate, rollouts per side (half a group), clipped cosines, confidence and discard rules.
    Degenerate: an empty memory, no similar question, or `shown=0`: the bare question. One candidate, or dR = 0: no
    update. NaN rewards are left out; a side without any gives dR = 0. ConfigError for an evaluation question that is in
    the memory.
    """

    memory: Any = None
    memory_questions: int = 32
    weight_questions: int = 256
    neighbours: int = 5
    shown: int = 3
    temperature: float = 1.0
    learning_rate: float = 0.05
    max_strategies: int = 64
    planted: Sequence[str] = ()
    store: Memory = field(default_factory=Memory, init=False)
    earlier: list[str] = field(default_factory=list, init=False)  # ids of the questions that earlier runs made it on
    used: list[str] = field(default_factory=list, init=False)  # and this run
    last: dict[str, float] = field(default_factory=dict, init=False)
    _tried: tuple[Activation, np.ndarray, np.ndarray] | None = field(default=None, init=False)

    name = "graph_memory"
    signals = ("gap", "relevance")

    def __post_init__(self) -> None:
        for key, least in (("memory_questions", 0), ("weight_questions", 1), ("neighbours", 1), ("shown", 0)):
            check_range(f"method.graph_memory.{key}", getattr(self, key), least)
        check_range("method.graph_memory.max_strategies", self.max_strategies, 1)
        check_range("method.graph_memory.temperature", self.temperature, 0.0, above=True)
        check_range("method.graph_memory.learning_rate", self.learning_rate, 0.0)
        if isinstance(self.planted, str) or not all(isinstance(text, str) for text in self.planted):
            raise ConfigError("planted is a list of texts", where="method.graph_memory.planted", got=self.planted)
        if self.memory is not None:
            if not isinstance(self.memory, Memory):
                how = "{_target_: experiments.memory_file.load, path: FILE}"
                raise ConfigError("no memory", where="method.graph_memory.memory", got=self.memory, expected=how)
            self.store = self.memory

    # ---- prompts ----
    def prepare_rows(self, rows: list[Any], ctx: Context) -> list[Any]:
        groups = rows[:: ctx.group_size]
        if ctx.mode == "train" and ctx.limits.objective == TEACHER:
            return self._with_and_without(self._own_questions(len(groups), ctx), ctx)
        if ctx.mode == "train":
            groups = self._unused(groups, ctx)
        else:
            self._refuse_leaks(groups)
        if self.shown and self.store.strategies:
            activation = self.store.activate(_embedded(groups, ctx), self.neighbours)
            texts = [s.text for s in self.store.strategies]
            shown = [best(row_M, self.shown) for row_M in self._signalled(activation.relevance_BM, ctx)]
            groups = [before(row, "\n".join(texts[k] for k in ks)) for row, ks in zip(groups, shown, strict=True)]
        return [row for row in groups for _ in range(ctx.group_size)]

    def _signalled(self, relevance_BM: np.ndarray, ctx: Context) -> np.ndarray:
        passed = ctx.signal(self, "relevance", torch.from_numpy(relevance_BM.T.copy()))
        return passed.numpy().T

    def _refuse_leaks(self, rows: Sequence[Any]) -> None:
        for row in rows:
            if question_of(row) in self.store.index_of:
                raise ConfigError(
                    "an evaluation question is in the memory",
                    where=f"row {row.id}",
                    got=question_of(row)[:80],
                    expected="disjoint questions for the memory and for evaluation",
                    fix="evaluate on another split, or make the memory on other rows",
                )

    def _unused(self, rows: list[Any], ctx: Context) -> list[Any]:
        """`rows` with those that the memory was made on replaced by others."""
        used = {*self.earlier, *self.used}
        if not any(row.id in used for row in rows):
            return rows
        free = [row for row in _order(ctx) if row.id not in used]
        if not free:
            raise _too_few(0, 1)
        start = ctx.round * len(rows)
        return [free[(start + i) % len(free)] if row.id in used else row for i, row in enumerate(rows)]

    # ---- making the memory ----
    def _own_questions(self, count: int, ctx: Context) -> list[Any]:
        """This generation's questions: those of the first stage once, then those of the second, over and over."""
        earlier, first = set(self.earlier), self.memory_questions
        wanted = first + self.weight_questions
        order = [row for row in _order(ctx, wanted + len(earlier)) if row.id not in earlier][:wanted]
        if len(order) < first + count:
            raise _too_few(len(order), first + count)
        rounds = -(-first // count)
        building = ctx.round < rounds
        pool = order[:first] if building else order[first:]
        self.used = [row.id for row in (pool if building else order)]
        start = (ctx.round - (0 if building else rounds)) * count
        return [pool[(start + i) % len(pool)] for i in range(count)]

    def _building(self, count: int, ctx: Context) -> bool:
        return ctx.round * count < self.memory_questions

    def _with_and_without(self, rows: list[Any], ctx: Context) -> list[Any]:
        """The group of each question: as it is, and from the second stage on its latter half with one strategy."""
        G, self._tried = ctx.group_size, None
        if G < 2:
            raise ConfigError(
                "a strategy is tried on one part of a group and left out of the other",
                where="trainer.rollouts_per_prompt",
                got=G,
                expected="at least 2",
            )
        texts = [""] * len(rows)
        if not self._building(len(rows), ctx) and self.store.strategies:
            activation = self.store.activate(_embedded(rows, ctx), self.neighbours)
            p_BM = candidate_probabilities(activation.relevance_BM, self.temperature)
            up_to_BM = np.cumsum(p_BM, axis=1)
            drawn_B1 = ctx.rng("graph_memory/candidates").random((len(rows), 1)) * up_to_BM[:, -1:]
            chosen_B = np.minimum((up_to_BM <= drawn_B1).sum(1), p_BM.shape[1] - 1)
            self._tried = activation, p_BM, chosen_B
            texts = [self.store.strategies[k].text if p_BM[b, k] else "" for b, k in enumerate(chosen_B)]
        told = [before(row, text) for row, text in zip(rows, texts, strict=True)]
        return [told[b] if slot >= G // 2 else row for b, row in enumerate(rows) for slot in range(G)]

    def select(self, batch: Batch, ctx: Context) -> Batch:
        """Learns from the generation under `graph_weights`, and leaves one rollout, fully masked, for the step."""
        if ctx.limits.objective != TEACHER:
            return batch
        if self._tried is not None:
            self._weigh(ctx, *self._tried)
        elif self._building(len(ctx.trajs) // ctx.group_size, ctx):
            self._build(ctx)
        self._note()
        left = batch.take([ctx.group_size - 1])
        left.model_mask_ST = torch.zeros_like(left.model_mask_ST)
        return left

    def _build(self, ctx: Context) -> None:
        reward_N = ctx.reward(ctx.reward_name("outcome"))
        found: list[list] = [[] for _ in range(len(ctx.trajs) // ctx.group_size)]
        for i, (traj, reward) in enumerate(zip(ctx.trajs, reward_N.tolist(), strict=True)):
            if reward == reward:  # an unscored rollout is neither success nor failure
                ids = [traj.segments[t.segment].completion_ids[t.start : t.end] for t in traj.turns]
                texts = ctx.tokenizer.batch_decode(ids)
                found[i // ctx.group_size].append((canonical_path(events(traj, texts)), reward > 0.5))
        rows = ctx.rows[:: ctx.group_size]
        texts = [question_of(row) for row in rows]
        absorb(self.store, texts, _embedded(rows, ctx), found, born=ctx.step, neighbours=self.neighbours)
        plant(self.store, self.planted)
        prune(self.store, self.max_strategies)

    def _weigh(self, ctx: Context, activation: Activation, p_BM: np.ndarray, chosen_B: np.ndarray) -> None:
        reward_BG = ctx.reward(ctx.reward_name("outcome")).view(len(chosen_B), ctx.group_size)
        gap_B = ctx.signal(self, "gap", reward_gap(reward_BG)).double().numpy()
        slope_BM = sampled_slope(p_BM, chosen_B, gap_B, self.temperature)
        p_B = p_BM[np.arange(len(chosen_B)), chosen_B]
        slope_BM[p_B == 0] = 0.0  # nothing was reached, so nothing was tried
        self.store.step(self.store.gradients(activation, slope_BM), self.learning_rate)
        tried_B = p_B > 0
        loss_B = -gap_B[tried_B] * np.log(p_B[tried_B])
        self.last |= {"gap": float(gap_B[tried_B].mean()), "loss": float(loss_B.mean())} if tried_B.any() else {}
        self.last["tried"] = float(tried_B.mean())
        self.last |= {"p/chosen": float(p_B.mean()), "candidates": float((p_BM > 0).sum(1).mean())}

    # ---- records and state ----
    def _note(self) -> None:
        questions, paths, strategies = self.store.sizes
        self.last = {name: x for name, x in self.last.items() if not name.startswith("weight/")}
        self.last |= {"questions": questions, "paths": paths, "strategies": strategies}
        weight_M = self.store.mean_weights()
        self.last |= {f"weight/{s.text}": float(w) for s, w in zip(self.store.strategies, weight_M, strict=True)}

    def metrics(self) -> dict[str, float]:
        return dict(self.last)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": state_of(self.store), "earlier": self.earlier, "used": self.used, "last": dict(self.last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.store, self.last = memory_of(state["memory"]), dict(state["last"])
        self.earlier, self.used = list(state["earlier"]), list(state["used"])

    def inherit(self, state: dict[str, Any]) -> None:
        if self.memory is None:
            self.store, self.earlier = memory_of(state["memory"]), [*state["earlier"], *state["used"]]


def _embedded(rows: Sequence[Any], ctx: Context) -> np.ndarray:
    return ctx.embed([question_of(row) for row in rows]).numpy()


def _order(ctx: Context, most: int = 2**62) -> list[Any]:
    """The first training rows in a fixed order."""
    return ctx.train_rows(most, "graph_memory")


def _too_few(got: int, need: int) -> ConfigError:
    return ConfigError(
        "the task has too few training questions beside those of the memory",
        where="method.graph_memory.memory_questions, weight_questions",
        got=f"{got} questions",
        expected=f"at least {need}",
        fix="lower them, or give more training rows",
    )
