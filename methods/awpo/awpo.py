"""AWPO: how much of an advantage may come from a judge of the thinking, group by group (arXiv 2512.19126)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.awpo import gate, judge
from methods.base import Context, LossContext, Method, RunError, Trajectory
from methods.errors import ConfigError, check_range

EPS = "awpo_eps"  # the clip radius on its way to the loss


@dataclass
class Awpo(Method):
    """AWPO: outcome and reasoning rewards kept apart, mixed per group as far as the group's variances allow.

    Per group of rollouts, r_out the outcome and r_rea the reasoning reward, both in [0, 1]:
        r_mix = (1 - lam) r_out + lam r_rea,   A_out, A_mix = their deviations / (standard deviation + 1e-4)
        w = sd_mix / (sd_out + sd_mix + 1e-6);   0 in a solved group (mean outcome 1)
        d = d_prio if tau_low <= mean outcome <= tau_high else d_base
        A = d ((1 - w) A_out + w A_mix)   on every token of the rollout
        eps = eps_max - (eps_max - eps_min) * mean of w over the generation, on both sides of the clip

    r_out is the reward with the role `outcome`. r_rea is the reward called `reasoning` of the reward list; where there
    is none, with `judge: task` the task's own measure of that name, with `judge: engine` the grades of a language model
    (methods/awpo/judge.py; configured by `+engine@judge=openai judge.url=...`). `gated: false` sets w = 1 wherever the
    judge has spoken, an ablation. Signals for controls: `awpo.reasoning` (N,), `awpo.gate` (P,).

    Differs from the paper: its formulas are not public beyond the roles of the three mechanisms and the bound of
    methods/awpo/theory.py, so that gate, difficulty weight, mixture, radius, rubric and all numbers are our choice.
    Degenerate: equal outcomes that are not solved leave the reasoning alone (w near 1); a solved group, equal rewards
    of both kinds, or fewer than two scorable rollouts give 0; a missing judgement closes its group's gate; a rollout
    without outcome has advantage 0. RunError for a reward outside [0, 1]. Nothing is kept between generations.
    """

    reasoning: str = "reasoning"
    judge: str = "task"  # task | engine
    lam: float = 0.5
    gated: bool = True
    tau_low: float = 0.2
    tau_high: float = 0.8
    d_base: float = 1.0
    d_prio: float = 1.5
    eps_min: float = 0.1
    eps_max: float = 0.2
    last: dict[str, float] = field(default_factory=dict, init=False)
    warned: bool = field(default=False, init=False)

    name = "awpo"
    needs = frozenset({"group_baseline"})
    signals = ("reasoning", "gate")
    keeps_dead_groups = True
    # The radius is one of a token's ratio; sequence-level clips are a thousand times narrower.
    objectives = ("grpo", "dapo", "bnpo", "dr_grpo")

    def __post_init__(self) -> None:
        if self.judge not in ("task", "engine"):
            raise ConfigError("unknown judge", where="method.awpo.judge", got=self.judge, expected="task or engine")
        if not self.reasoning:
            raise ConfigError("the reasoning reward needs a name", where="method.awpo.reasoning", expected="a name")
        for key in ("lam", "tau_low", "tau_high", "eps_min", "eps_max"):
            check_range(f"method.awpo.{key}", getattr(self, key), 0.0, 1.0)
        check_range("method.awpo.d_base", self.d_base, 0.0)
        check_range("method.awpo.d_prio", self.d_prio, 0.0)
        for low, high in (("tau_low", "tau_high"), ("eps_min", "eps_max")):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(
                    f"{low} is above {high}",
                    where=f"method.awpo.{low}",
                    got=f"{getattr(self, low)} and {getattr(self, high)}",
                    expected=f"{low} <= {high}",
                )

    # ---- the reasoning reward ----
    def rewards(self, trajs: list[Trajectory], ctx: Context) -> None:
        if self.reasoning in ctx.reward_names and self.judge == "task":
            return
        if self.judge == "engine":
            values = self._asked(trajs, ctx)
        else:
            measured = ctx.measure([t.text for t in trajs], [t.row for t in trajs])
            values = [m.get(self.reasoning, math.nan) for m in measured]
        self._warn_once(values)
        ctx.add_reward(self.reasoning)
        for t, value in zip(trajs, values, strict=True):
            t.rewards[self.reasoning] = value

    def _warn_once(self, values: list[float]) -> None:
        """Says what the first generation without any judgement means."""
        if self.warned or not all(map(math.isnan, values)):
            return
        self.warned = True
        if self.judge == "engine":
            what = f"AWPO's judge gave none of {len(values)} answers in the form that is asked for"
            fix = f"look at what it answers; its thinking, too, must fit in {judge.MAX_TOKENS} tokens"
        else:
            what = f"AWPO found no reward and no task measure called '{self.reasoning}'"
            fix = "choose a task that judges, or method.awpo.judge=engine"
        closed = "every gate stays closed and only the difficulty weight acts"
        warnings.warn(f"{what}: {closed} ({fix})", stacklevel=3)

    def _asked(self, trajs: list[Trajectory], ctx: Context) -> list[float]:
        """The grades of a language model; NaN where it failed, was cut off or did not answer in the form."""
        asked: list[Any] = [judge.request(getattr(t.row, "prompt", ""), t.text) for t in trajs]
        answers = [results[0] for results in ctx.judge(asked)]
        grades = [judge.grade(a.text) if a.finish == "stop" else None for a in answers]
        return [math.nan if g is None else g for g in grades]

    # ---- advantages and clip ----
    def base_advantages(self, ctx: Context) -> Tensor:
        batch = ctx.batch
        assert batch is not None
        outcome_N, reasoning_N = ctx.reward(ctx.reward_name("outcome")), ctx.reward(self.reasoning)
        _check_unit(outcome_N, ctx.reward_name("outcome"))
        _check_unit(reasoning_N, self.reasoning)
        reasoning_N = ctx.signal(self, "reasoning", reasoning_N, ctx.group_N)
        terms = gate.group_terms(outcome_N, reasoning_N, ctx.group_N, self.lam)
        opened_P = gate.gate(terms) if self.gated else (terms.judged_P & ~terms.mean_P.isnan()).double()
        gate_P = ctx.signal(self, "gate", opened_P)
        difficulty_P = gate.difficulty(terms.mean_P, self.tau_low, self.tau_high, self.d_base, self.d_prio)
        eps = gate.radius(float(ctx.gather(gate_P).mean()), self.eps_min, self.eps_max)
        device = batch.adv_ST.device
        batch.extras[EPS] = torch.full((batch.rows,), eps, device=device)
        adv_N = gate.advantages(terms, gate_P, difficulty_P).float()
        self._note(terms, gate_P, difficulty_P, eps, reasoning_N, adv_N)
        return adv_N.to(device)[batch.traj_S].unsqueeze(1) * batch.model_mask_ST

    def clip_range(self, lctx: LossContext) -> tuple[Any, Any]:
        eps_B1 = lctx.extras[EPS].unsqueeze(1)
        return eps_B1, eps_B1

    # ---- records ----
    def _note(self, terms: gate.GroupTerms, gate_P, difficulty_P, eps: float, reasoning_N, adv_N: Tensor) -> None:
        scorable = terms.scorable_N.sum().clamp(min=1)
        live_P = torch.zeros_like(gate_P).index_add_(0, terms.index_N, adv_N.abs().double())
        self.last = {
            "gate": float(gate_P.mean()),
            "gate_open": float((gate_P > 0.9).double().mean()),
            "live": float((live_P > 0).double().mean()),
            "solved": float((terms.mean_P >= gate.SOLVED).double().mean()),
            "difficulty": float(difficulty_P.mean()),
            "eps": eps,
            "sd_out": float(terms.sd_out_P.mean()),
            "sd_mix": float(terms.sd_mix_P.mean()),
            "judge_missing": float((terms.scorable_N & torch.isnan(reasoning_N)).sum() / scorable),
        }

    def metrics(self) -> dict[str, float]:
        return dict(self.last)


def _check_unit(reward_N: Tensor, name: str) -> None:
    """RunError for a reward outside [0, 1]: both standard deviations of the gate must be on one scale."""
    known = reward_N[~torch.isnan(reward_N)]
    if known.numel() and not (known.min() >= -1e-6 and known.max() <= 1 + 1e-6):
        raise RunError(
            f"AWPO compares the reward '{name}' with another on one scale",
            where="method.awpo",
            got=f"values from {float(known.min()):g} to {float(known.max()):g}",
            expected="values in [0, 1]",
            fix="scale the reward to [0, 1]; nothing is clipped silently",
        )
