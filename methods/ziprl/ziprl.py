"""ZipRL: adaptive multi-turn context compression with hindsight response replay (arXiv 2605.28069)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.base import Context, Method, Trajectory
from methods.errors import ConfigError, check_range
from methods.ziprl import measures
from methods.ziprl.credit import corrections, on_tokens, row_weights
from methods.ziprl.forms import Form, TextForm
from methods.ziprl.loop import Episode, Loop
from methods.ziprl.quality import INTERVALS, WEIGHTS, Scale

COMPRESSIONS = ("adaptive", "uniform", "none")


@dataclass
class ZipRl(Method):
    """ZipRL: contexts compressed turn by turn, and credit moved to the turns that compressed well.

    Rollout: a turn's prompt is the question, the memory and the documents that the last action brought. The model
    writes one zip per document, at one of five levels by its relevance, and one action. Only zips stay; documents are
    seen once. Each turn is a training row of its own, with weight 1/T_i. Advantage of all tokens of a turn (i, j):

        A^(i,j) = A_i + w (Q^(i,j) - mean_j Q^(i,j))    where the turn has a quality, else A_i

    A_i is the objective's group-relative advantage over trajectories, Q^(i,j) the mean Q_com of the turn's zips
    (methods/ziprl/quality.py). The correction sums to 0 over a trajectory and is alive in groups with equal rewards;
    w = 0 is the objective alone. The qualities pass the controls as `qualities`, sets are trajectories.

    compression: adaptive; uniform: all zips at `level`; none: zips ignored, raw documents kept while they fit.
    max_turns: then one more call asks for the answer. A turn writes at most the completion budget of the run. Where the
    task's prompt ends in the assistant's words (`task.prefill`) turns are made to begin: TextForm says how.

    Differs from the paper: the functions in Q_com, the intervals of the levels and the weight 1/T_i are chosen here
    (not public); zips and action come from one generation, memory is append-only and cut at `max_prompt_tokens`. On
    objectives that average over all tokens (dapo, cispo, bnpo) 1/T_i has no effect.
    Degenerate: a task without tools is one answer, without corrections; a turn without documents, and a NaN, is no
    quality; a document without a readable zip counts 0; one quality in a trajectory corrects nothing; a turn with
    nothing written is no row; after two turns without an action the episode ends without an answer; errors of tools
    become remarks in memory.
    """

    w: float = 0.2
    max_turns: int = 20
    max_prompt_tokens: int = 4096
    compression: str = "adaptive"
    level: int = 3
    weights: tuple[float, ...] = WEIGHTS
    intervals: tuple[tuple[float, float], ...] = INTERVALS
    last: dict[str, float] = field(default_factory=dict, init=False)

    name = "ziprl"
    needs = frozenset({"group_baseline"})
    signals = ("qualities",)
    keeps_dead_groups = True

    def __post_init__(self) -> None:
        check_range("method.ziprl.w", self.w, 0.0)
        check_range("method.ziprl.max_turns", self.max_turns, 1)
        check_range("method.ziprl.max_prompt_tokens", self.max_prompt_tokens, 1)
        check_range("method.ziprl.level", self.level, 1, 5)
        if self.compression not in COMPRESSIONS:
            raise ConfigError(
                "unknown kind of compression",
                where="method.ziprl.compression",
                got=self.compression,
                expected=", ".join(COMPRESSIONS),
            )
        self.scale = Scale.read(self.intervals, self.weights)

    def rollout(self, rows: list[Any], ctx: Context, default) -> list[Trajectory]:
        envs = [ctx.env(row) for row in rows]
        if any(env is None for env in envs):
            return default(rows)
        episodes = [Episode(row, env.tools, self._form(row, env)) for row, env in zip(rows, envs, strict=True)]
        Loop(self.max_turns, self.max_prompt_tokens, self.compression, self.level).run(episodes, ctx)
        G = ctx.group_size
        trajs = [e.trajectory(ctx.first_group + k // G, k % G) for k, e in enumerate(episodes)]
        if ctx.mode == "train":
            self.last = measures.of_batch(trajs)
        return trajs

    def _form(self, row: Any, env: Any) -> Form:
        own = getattr(env, "form", None)
        if own is not None:
            return own(self.scale)
        chat = isinstance(row.prompt, list) and row.prompt[-1]["role"] == "assistant"
        prefill = row.prompt[-1]["content"] if chat else ""
        return TextForm(row.meta.get("question", row.prompt), env.tools, self.scale, prefill)

    def advantages(self, adv_ST: Tensor, ctx: Context) -> Tensor:
        batch = ctx.batch
        assert batch is not None
        device = adv_ST.device
        count_N = torch.tensor([len(t.turns) for t in ctx.trajs])
        traj_M = torch.repeat_interleave(torch.arange(len(ctx.trajs)), count_N)
        quality_M = torch.tensor([t.scores.get(measures.QUALITY, torch.nan) for traj in ctx.trajs for t in traj.turns])
        known_M = ~torch.isnan(quality_M)
        if known_M.any():
            quality_M[known_M] = ctx.signal(self, "qualities", quality_M[known_M], within=traj_M[known_M])
        extra_M = self.w * corrections(quality_M, traj_M)
        first_N = count_N.cumsum(0) - count_N
        extra_ST = on_tokens(extra_M.to(device), first_N.to(device), batch.traj_S, batch.turn_ST) * batch.model_mask_ST
        self.last["zero_variance_alive"] = _alive(adv_ST, extra_ST, batch.group_S)
        if batch.rows > len(ctx.trajs):
            batch.row_weight_S = row_weights(batch.traj_S, batch.model_mask_ST)
        return adv_ST + extra_ST

    def metrics(self) -> dict[str, float]:
        return {name: value for name, value in self.last.items() if not math.isnan(value)}

    def eval_metrics(self, trajs: list[Trajectory], ctx: Context) -> dict[str, list[float]]:
        return measures.of_trajectories(trajs)


def _alive(adv_ST: Tensor, extra_ST: Tensor, group_S: Tensor) -> float:
    """Share of the groups without outcome signal in which a correction is not 0; NaN where all have one.

    Equal numbers differ from their mean by a rounding error of about 1e-8, which is no signal.
    """
    _, place_S = torch.unique(group_S, return_inverse=True)
    n = int(place_S.max()) + 1
    zeros = torch.zeros(n, device=adv_ST.device)
    outcome, moved = (zeros.index_add(0, place_S, (x.abs() > 1e-6).float().sum(1)) > 0 for x in (adv_ST, extra_ST))
    return float((moved & ~outcome).sum() / (~outcome).sum()) if not outcome.all() else float("nan")
