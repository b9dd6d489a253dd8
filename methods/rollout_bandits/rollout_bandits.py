"""CBS: contextual rollout bandits, an online scheduler of which rollouts are trained on (arXiv 2602.08499)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.base import Batch, Context, Method
from methods.errors import ConfigError
from methods.rollout_bandits.buffer import Buffer
from methods.rollout_bandits.features import COLUMN, FEATURES, Scale, clip_ratio, context, facts_of, token_mean
from methods.rollout_bandits.scheduler import EXPLORATIONS, LOSSES, Scheduler
from methods.rollout_bandits.selection import POLICIES, best, best_of_groups, fixed_rule

CHOICES = {
    "mode": ("intra", "global", "both"),
    "policy": POLICIES,
    "regression": LOSSES,
    "exploration": EXPLORATIONS,
    "gain_source": ("rollout", "probe"),
}


@dataclass
class RolloutBandits(Method):
    """CBS: a bandit that learns online which rollouts to train on, inside each group and from a buffer of past rounds.

    A rollout is an arm with ten features (`features.py`). The reward of round t's choice arrives one round late
    (section 3.2):
        gain_t = V_{t+1} - V_t - w_e [E_t > e_min] (E_{t+1} - E_t)
    V is the mean outcome reward and E the mean token entropy of the round's whole batch, before any choice. The
    scheduler (`scheduler.py`) regresses the standardised gain on the features of the kept set.
    mode `intra`: the best max(1, ceil(keep_share G)) of each group. `global`: the best N of a FIFO buffer of the
    last `buffer_rounds` rounds, N = rollouts of one round; a reused rollout keeps its advantage and its behaviour
    log-probs, and the objective's clipped ratio corrects it. `both`: survivors of `intra` enter the buffer. Equal
    scores: lower index first (older rounds first).
    `refresh_max`: how many old candidates per round, best first by their stored features, have entropy and clip
    ratio computed again under the current policy. `gain_source: probe` measures V on `probe_prompts` fixed training
    prompts with common random numbers (counted as generated tokens), which removes the batch's own noise.
    `policy` other than `scheduler` is a fixed rule in the same code: random, |advantage|, truncated ones last.

    Differs from the paper, whose equations beyond the gain, the two problems and the kind of features are not
    public: features 1-3 and all scalings, network, labels, loss, exploration, pool, keep_share, buffer_rounds,
    w_e = 0.1, e_min = E at the end of the warm-up and no entropy term before are our choice.
    Degenerate: first round: nothing to learn from; a kept set of zero advantages teaches nothing, its gain is
    dropped (the optimiser still steps, with gradient 0); NaN reward: left out of V and never chosen; K above the
    buffer's size: all of it; `keep_share=1`, and `global` with one round, give back the batch untouched.
    """

    mode: str = "intra"
    policy: str = "scheduler"
    keep_share: float = 0.5
    buffer_rounds: int = 4
    refresh_max: int = 256
    features: Sequence[str] = tuple(FEATURES)
    hidden: Sequence[int] = (32,)
    learning_rate: float = 5e-3
    regression: str = "set_mean"
    exploration: str = "ts"
    warmup: int = 20
    entropy_weight: float = 0.1
    gain_source: str = "rollout"
    probe_prompts: int = 32
    scheduler: Scheduler | None = field(default=None, init=False)
    pending: dict[str, Any] = field(default_factory=dict, init=False)
    entropy_floor: float | None = field(default=None, init=False)
    last: dict[str, float] = field(default_factory=dict, init=False)

    name = "rollout_bandits"
    signals = ("labels", "scores")

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise _wrong(key, getattr(self, key), " or ".join(choices))
        if not 0 < self.keep_share <= 1:
            raise _wrong("keep_share", self.keep_share, "above 0 and at most 1")
        for key, least in (("buffer_rounds", 1), ("refresh_max", 0), ("warmup", 0), ("probe_prompts", 1)):
            if getattr(self, key) < least:
                raise _wrong(key, getattr(self, key), f"at least {least}")
        if not self.features or set(self.features) - set(FEATURES):
            raise _wrong("features", list(self.features), "names among " + ", ".join(FEATURES))
        self.reuses = self.mode != "intra" and self.buffer_rounds > 1
        self.needs = frozenset({"entropies", "old_logps"} if self.reuses else {"entropies"})
        self.buffer = Buffer(self.buffer_rounds)

    # ---- one round ----
    def select(self, batch: Batch, ctx: Context) -> Batch:
        if any(t.is_demo for t in batch.trajs):
            raise ConfigError(
                "rollout bandits choose among rollouts, and a group holds a demonstration",
                where="method",
                fix="drop the method that places demonstrations",
            )
        outcome = ctx.reward_name("outcome")
        reward_N = _rewards(batch, outcome)
        facts_NF = facts_of(batch, reward_N)
        # V counts what was drawn, the groups that dynamic sampling dropped included.
        value = float(torch.nanmean(ctx.rewards_all.get(outcome, reward_N)))
        entropy = float(facts_NF[:, COLUMN["entropy"]].mean())
        if self.policy == "scheduler":
            value = self._probe(ctx) if self.gain_source == "probe" else value
            self._absorb(value, entropy, ctx)
        self.last |= {"value": value, "entropy": entropy, "nonfinite": float((~torch.isfinite(facts_NF)).sum())}

        selectable_N = ~torch.isnan(reward_N)
        survivors_K = selectable_N.nonzero().squeeze(1)
        if self.mode != "global" and self.keep_share < 1:
            group_N = torch.tensor([t.group_id for t in batch.trajs])
            scores_N = ctx.signal(self, "scores", self._scores(facts_NF, ctx), group_N)
            survivors_K = best_of_groups(scores_N.masked_fill(~selectable_N, -math.inf), group_N, self.keep_share)
        elif not self.reuses:
            survivors_K = torch.arange(len(reward_N))
        if self.reuses:
            return self._from_buffer(batch, survivors_K, facts_NF, ctx)
        chosen = batch if len(survivors_K) == len(batch.trajs) else batch.take(survivors_K.tolist())
        self._decided(facts_NF, survivors_K, chosen, ctx)
        return chosen

    def _from_buffer(self, batch: Batch, survivors_K: Tensor, facts_NF: Tensor, ctx: Context) -> Batch:
        """Pushes this round's survivors and chooses as many rollouts as a round has from all that the buffer holds."""
        fresh = batch if len(survivors_K) == len(batch.trajs) else batch.take(survivors_K.tolist())
        self.buffer.push(fresh, facts_NF[survivors_K], ctx.round)
        facts_MF = self._refreshed(len(survivors_K), ctx)
        scores_M = ctx.signal(self, "scores", self._scores(facts_MF, ctx))
        chosen_K = best(scores_M, len(batch.trajs))
        chosen = self.buffer.take(chosen_K, batch.adv_ST.device)
        self.buffer.use(chosen_K)
        ages_M = facts_MF[:, COLUMN["age"]]
        self.last |= {"buffered": len(facts_MF), "age/kept": float(ages_M[chosen_K].mean())}
        self.last |= {"age/buffer": float(ages_M.mean())}
        self._decided(facts_MF, chosen_K, chosen, ctx)
        return chosen

    def _refreshed(self, fresh: int, ctx: Context) -> Tensor:
        """Facts of all candidates; the most promising old ones are seen by today's policy first."""
        facts_MF = self.buffer.facts(ctx.round)
        old = len(facts_MF) - fresh
        count = min(self.refresh_max, old) if self.policy == "scheduler" else 0
        self.last["refreshed"] = count
        if count == 0:
            return facts_MF
        chosen_K = best(self._scores(facts_MF, ctx)[:old], count)
        stored = self.buffer.take(chosen_K)
        assert stored.old_logps_ST is not None
        now = {k: v.cpu() for k, v in ctx.forward(stored.trajs, ("logps", "entropies")).items()}
        share_K = clip_ratio(now["logps"], stored.old_logps_ST, stored)
        self.buffer.refresh(chosen_K, {"entropy": token_mean(now["entropies"], stored), "clip_ratio": share_K})
        return self.buffer.facts(ctx.round)

    def _scores(self, facts_NF: Tensor, ctx: Context) -> Tensor:
        """(N,) scores of candidates by the scheduler or by a fixed rule."""
        if self.policy == "scheduler":
            return self._bandit(ctx).scores(self._context(facts_NF, ctx))
        return fixed_rule(self.policy, facts_NF, ctx.rng("rollout_bandits/policy"))

    def _context(self, facts_NF: Tensor, ctx: Context) -> Tensor:
        scale = Scale(ctx.limits.max_completion_tokens, ctx.limits.vocab_size, self.buffer_rounds)
        return context(facts_NF, scale, self.features)

    # ---- learning from the gain ----
    def _bandit(self, ctx: Context) -> Scheduler:
        if self.scheduler is None:
            seed = int(ctx.rng("rollout_bandits/weights").integers(2**31))
            shape = (len(self.features), self.hidden, self.learning_rate)
            self.scheduler = Scheduler(*shape, self.regression, self.exploration, self.warmup, seed)
        return self.scheduler

    def _absorb(self, value: float, entropy: float, ctx: Context) -> None:
        """Pays the decision of the last round, then begins this one."""
        bandit, p = self._bandit(ctx), self.pending
        if p:
            pay = gain(p["value"], value, p["entropy"], entropy, self.entropy_weight, self.entropy_floor)
            self.last |= {"gain": pay, "skipped": float(not p["useful"])}
            if p["useful"] and math.isfinite(pay):
                bandit.learn(p["kept"], p["contrast"], pay, lambda y: ctx.signal(self, "labels", y))
                label = bandit.label(pay)
                self.last |= {"label": label}
                if not bandit.warming_up:
                    self.last |= {"predicted": p["predicted"], "error/mean": label**2}
                    self.last |= {"error/predicted": (label - p["predicted"]) ** 2}
        bandit.begin(ctx.rng("rollout_bandits/explore"))
        if bandit.rounds == self.warmup + 1:
            self.entropy_floor = entropy

    def _decided(self, facts_NF: Tensor, chosen_K: Tensor, chosen: Batch, ctx: Context) -> None:
        """Keeps what the gain will be explained by, and logs what was chosen."""
        self.last["kept"] = len(chosen.trajs)
        for name in ctx.reward_names:  # also those that are only recorded: the scheduler never sees them
            if math.isfinite(mean := float(torch.nanmean(_rewards(chosen, name)))):
                self.last[f"kept/{name}"] = mean
        if self.policy == "scheduler":
            x_NF = self._context(facts_NF, ctx)
            kept_KF = x_NF[chosen_K]
            self.pending = {
                "kept": kept_KF,
                "contrast": kept_KF.mean(0) - x_NF.mean(0),
                "predicted": float(self._bandit(ctx).predict(kept_KF).detach().mean()),
                "useful": bool((chosen.adv_ST != 0).any()),
                "value": self.last["value"],
                "entropy": self.last["entropy"],
            }

    def _probe(self, ctx: Context) -> float:
        """V on fixed prompts, sampled with the same random numbers every round."""
        rows = ctx.train_rows(self.probe_prompts, "bandit_probe")
        how = {"n": 1, "max_tokens": ctx.limits.max_completion_tokens, "temperature": 1.0, "top_p": 1.0}
        asked = [
            {"prompt" if isinstance(row.prompt, str) else "messages": row.prompt, "seed": i, **how}
            for i, row in enumerate(rows)
        ]
        texts = [results[0].text for results in ctx.generate(asked, "bandit_probe")]
        return sum(ctx.score(texts, rows)) / len(rows)

    # ---- records and state ----
    def metrics(self) -> dict[str, float]:
        return dict(self.last)

    def state_dict(self) -> dict[str, Any]:
        return {
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "pending": dict(self.pending),
            "entropy_floor": self.entropy_floor,
            "last": dict(self.last),
            "buffer": self.buffer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["scheduler"] is not None:
            self.scheduler = Scheduler(
                len(self.features), self.hidden, self.learning_rate, self.regression, self.exploration, self.warmup
            )
            self.scheduler.load_state_dict(state["scheduler"])
        self.pending, self.last = dict(state["pending"]), dict(state["last"])
        self.entropy_floor = state["entropy_floor"]
        self.buffer.load_state_dict(state["buffer"])


def gain(v: float, v_next: float, e: float, e_next: float, weight: float, floor: float | None) -> float:
    """V_{t+1} - V_t - w_e [E_t > e_min] (E_{t+1} - E_t); no entropy term while e_min is not known (None)."""
    penalty = weight * (e_next - e) if floor is not None and e > floor else 0.0
    return v_next - v - penalty


def _rewards(batch: Batch, name: str) -> Tensor:
    """(N,) one named reward of the batch's trajectories."""
    return torch.tensor([t.rewards.get(name, math.nan) for t in batch.trajs], dtype=torch.float32)


def _wrong(key: str, got: object, expected: str) -> ConfigError:
    return ConfigError("a setting is wrong", where=f"method.rollout_bandits.{key}", got=got, expected=expected)
