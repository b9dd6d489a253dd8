"""What a method plug-in sees: the hooks, the two contexts, and the legend of tensor shapes.

Shapes (suffixes of names): P prompt tokens, T completion tokens (longest of the batch), N trajectories,
S training rows (segments, in trajectory order), B rows of one micro-batch, G rollouts of one prompt,
K named rewards. `adv_ST` is one float32 tensor, 0 outside `model_mask_ST`.

Clock: hooks down to `select` run once per generation, `token_advantages` to `loss` once per micro-batch,
`after_step` once per optimiser step. In evaluation only `prepare_rows`, `rollout` and `eval_metrics` run, with
`ctx.mode == "eval"`, and a method's state must not change there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from methods.batch import Batch, Segment, Trajectory, Turn, assemble
from methods.errors import AssayError, ConfigError, DataError, RecordError, RunError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "AssayError",
    "Batch",
    "ConfigError",
    "Context",
    "DataError",
    "LossContext",
    "Method",
    "RecordError",
    "RunError",
    "Segment",
    "Services",
    "Trajectory",
    "Turn",
    "assemble",
]


class Services(Protocol):
    """What the bench lends to methods. Every call here is counted and timed apart from the hook that makes it."""

    tokenizer: Any
    limits: Any
    cost: dict[str, int]

    def encode(self, prompts: Sequence[Any]) -> list[list[int]]: ...
    def generate(self, requests: Sequence[Any], stream: str) -> list[list[Any]]: ...
    def score(self, texts: Sequence[str], rows: Sequence[Any]) -> list[float]: ...
    def measure(self, texts: Sequence[str], rows: Sequence[Any]) -> list[dict[str, float]]: ...
    def embed(self, texts: Sequence[str]) -> Tensor: ...
    def judge(self, requests: Sequence[Any]) -> list[list[Any]]: ...
    def forward(self, trajs: list[Trajectory], what: Sequence[str]) -> dict[str, Tensor]: ...
    def env(self, row: Any) -> Any: ...
    def call(self, jobs: Sequence[tuple[Any, dict[str, Any]]]) -> list[str]: ...
    def gather(self, x: Tensor) -> Tensor: ...
    def divided_rows(self, count: int, work: Callable[[slice], Tensor]) -> Tensor: ...
    def counted(self, kind: str) -> AbstractContextManager: ...
    def rng(self, name: str) -> np.random.Generator: ...
    def train_rows(self, count: int, name: str) -> list[Any]: ...


@dataclass
class Context:
    """One generation. Lives from `prepare_rows` to `select`; `after_step` sees the latest one.

    rows: N entries, G consecutive copies of each prompt. `reward_names`, `reward_roles`, `reward_weights` are
    aligned. `rewards_all` holds every draw of the generation by reward name, those that dynamic sampling dropped
    included; without dynamic sampling it equals `rewards`. `temperature` and `top_p` are those of rollouts, for a
    method that writes its own; `first_group` is, in `rollout`, the group of the first row (processes count on).

    On several processes a hook sees the whole generation on each of them, and must do the same there: what it keeps is
    the same everywhere and saved once. Services divide the work. Only `rollout` gets the rows of its own process, and
    the hooks of a micro-batch its rows.
    """

    mode: str  # train | eval
    step: int  # optimiser steps done
    round: int  # generations done
    group_size: int
    services: Services
    temperature: float = 1.0
    top_p: float = 1.0
    first_group: int = 0
    rows: list[Any] = field(default_factory=list)
    trajs: list[Trajectory] = field(default_factory=list)
    reward_names: list[str] = field(default_factory=list)
    reward_roles: list[str] = field(default_factory=list)
    reward_weights: list[float] = field(default_factory=list)
    rewards_all: dict[str, Tensor] = field(default_factory=dict)
    batch: Batch | None = None
    token_rewards_ST: Tensor | None = None
    logs: dict[str, float] = field(default_factory=dict)
    signal_fn: Callable[..., Tensor] | None = None

    # services under the names that methods use
    def encode(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Ids of prompts (text or messages) as the model meets them when it generates."""
        return self.services.encode(prompts)

    def generate(self, requests: Sequence[Any], stream: str) -> list[list[Any]]:
        """Samples with own settings and an own random stream; the global stream is untouched.

        A request is a dict: one of `prompt_ids`, `prompt`, `messages`; and `n`, `max_tokens`, `temperature`, `top_p`,
        `stop`, `seed` (None: from `stream`). Gives n results per request, with `text`, `ids`, `finish`.
        """
        return self.services.generate(requests, stream)

    def score(self, texts: Sequence[str], rows: Sequence[Any]) -> list[float]:
        """The task's verifier."""
        return self.services.score(texts, rows)

    def measure(self, texts: Sequence[str], rows: Sequence[Any]) -> list[dict[str, float]]:
        """The task's further named values of each text."""
        return self.services.measure(texts, rows)

    def embed(self, texts: Sequence[str]) -> Tensor:
        return self.services.embed(texts)

    def judge(self, requests: Sequence[Any]) -> list[list[Any]]:
        return self.services.judge(requests)

    def forward(self, trajs: list[Trajectory], what: Sequence[str]) -> dict[str, Tensor]:
        """No-grad forward under today's policy: logps, entropies, ref_logps as (S, T), hidden as (S, T, D)."""
        return self.services.forward(trajs, what)

    def env(self, row: Any) -> Any:
        return self.services.env(row)

    def call(self, jobs: Sequence[tuple[Any, dict[str, Any]]]) -> list[str]:
        """The result of each (environment, {"tool", "args"}); whatever a tool does wrong is a text `error: ...`."""
        return self.services.call(jobs)

    def gather(self, x: Tensor) -> Tensor:
        """Concatenates over processes along the first dimension; x itself outside `rollout`, where all have all."""
        return self.services.gather(x)

    def rng(self, name: str) -> np.random.Generator:
        """A generator derived from run seed, name and round (in `rollout` also the process): needs no saved state."""
        return self.services.rng(f"{name}/{self.round}")

    def train_rows(self, count: int, name: str) -> list[Any]:
        """`count` training rows, the same at every call with this name: a fixed probe needs no saved state."""
        return self.services.train_rows(count, name)

    @property
    def tokenizer(self) -> Any:
        return self.services.tokenizer

    @property
    def limits(self) -> Any:
        return self.services.limits

    def log(self, name: str, value: float) -> None:
        self.logs[name] = float(value)

    # rewards by name or role, never by position
    def reward(self, name: str) -> Tensor:
        """(N,) values of one named reward; NaN where it does not apply."""
        return torch.tensor([t.rewards.get(name, float("nan")) for t in self.trajs], dtype=torch.float32)

    def add_reward(self, name: str, role: str = "aux", weight: float = 0.0) -> None:
        """Declares a named reward (a `rewards` hook that fills `traj.rewards[name]` calls this; repeats are fine)."""
        if name not in self.reward_names:
            self.reward_names.append(name)
            self.reward_roles.append(role)
            self.reward_weights.append(weight)

    def reward_name(self, role: str) -> str:
        """The one reward with this role. ConfigError if none or several carry it."""
        names = [n for n, r in zip(self.reward_names, self.reward_roles, strict=True) if r == role]
        if len(names) != 1:
            raise ConfigError(
                f"a method asks for the reward with role '{role}'",
                where="reward",
                got=f"{len(names)} rewards with that role ({', '.join(names) or 'none'})",
                expected="exactly one",
                fix=f"give one entry of `reward` the role {role}",
            )
        return names[0]

    def total_reward(self) -> Tensor:
        """(N,) weighted sum of the named rewards; NaN where no reward applies."""
        columns = [self.reward(n) for n in self.reward_names]
        rewards_NK = torch.stack(columns, dim=1)
        weights_K = torch.tensor(self.reward_weights, dtype=torch.float32)
        total_N = (rewards_NK * weights_K.unsqueeze(0)).nansum(dim=1)
        total_N[torch.isnan(rewards_NK).all(dim=1)] = torch.nan
        return total_N

    @property
    def group_N(self) -> Tensor:
        return torch.tensor([t.group_id for t in self.trajs], dtype=torch.long)

    def signal(self, method: Method, name: str, x: Tensor, within: Tensor | None = None) -> Tensor:
        """Passes a method's decisive quantity; the identity unless a control of the stack targets it.

        `within` (same leading shape as x) names the set inside which a control may permute.
        """
        return x if self.signal_fn is None else self.signal_fn(self, f"{method.name}.{name}", x, within)


@dataclass
class LossContext:
    """One micro-batch inside the loss. `logps_BT` and `entropies_BT` carry the graph; everything else is detached.

    `denominator_tokens` is the number of trained tokens of the whole generation over all processes, rescaled to
    one accumulation window; `accumulation` is the number of micro-batches per optimiser step (1 in evaluation);
    `row_weight_B` are weights whose sum over an accumulation window is `accumulation` (None: mean over rows).
    """

    logps_BT: Tensor
    entropies_BT: Tensor
    mask_BT: Tensor
    adv_BT: Tensor
    old_logps_BT: Tensor
    ref_logps_BT: Tensor | None
    denominator_tokens: Tensor
    accumulation: int
    max_completion_tokens: int
    extras: dict[str, Tensor] = field(default_factory=dict)
    row_weight_B: Tensor | None = None
    ids_BL: Tensor | None = None  # prompt and completion, L = P + T
    attention_BL: Tensor | None = None
    clip_range: tuple[Any, Any] | None = None
    hidden_BTD: Tensor | None = None
    updates: float = 1.0  # parts of a generation: optimiser updates (of each pass) x processes, whose mean is taken
    share: float = 1.0  # this chunk's part of the micro-batch's rows, for means that have no batch-wide denominator
    log: Callable[[str, Any], None] = lambda name, value: None

    @property
    def detached(self) -> LossContext:
        """The same view with log-probs and entropies cut from the graph (what `token_advantages` sees)."""
        from dataclasses import replace

        hidden = None if self.hidden_BTD is None else self.hidden_BTD.detach()
        return replace(
            self, logps_BT=self.logps_BT.detach(), entropies_BT=self.entropies_BT.detach(), hidden_BTD=hidden
        )


class Method:
    """A plug-in: overrides the one or two hooks that it needs; everything here is a no-op.

    Class attributes: `needs` (old_logps, entropies, ref_logps, hidden, group_baseline), `signals` (names passed to
    ctx.signal), `token_credit` (its advantages differ inside a row), `keeps_dead_groups` (it gives groups
    with equal rewards a signal), `objectives` (the only ones it runs on; empty = any).
    """

    name: str = ""
    needs: frozenset[str] = frozenset()
    signals: tuple[str, ...] = ()
    token_credit: bool = False
    keeps_dead_groups: bool = False
    objectives: tuple[str, ...] = ()

    def prepare_rows(self, rows: list[Any], ctx: Context) -> list[Any]:
        """Chooses or rewrites prompts before generation; the count may not change (chain)."""
        return rows

    def rollout(self, rows: list[Any], ctx: Context, default: Callable[..., list[Trajectory]]):
        """Agent loops, demonstrations, compression; returns trajectories (one owner).

        `default(rows)` generates once per row. `default(some, slots=[...])` fills those slots only (slot j is sample
        j % G of group j // G), so that a demonstration in another slot costs no generation.
        """
        return default(rows)

    def rewards(self, trajs: list[Trajectory], ctx: Context) -> None:
        """Adds or reshapes named rewards in place (chain)."""

    def token_rewards(self, trajs: list[Trajectory], ctx: Context) -> Tensor | None:
        """(S, T) rewards on tokens; whoever supplies them places the outcome reward too (chain)."""
        return ctx.token_rewards_ST

    def base_advantages(self, ctx: Context) -> Tensor:
        """Creates advantages (S, T); the objective does it if no method does (one owner)."""
        raise AssertionError("base_advantages is called only where a method overrides it")

    def advantages(self, adv_ST: Tensor, ctx: Context) -> Tensor:
        """Transforms advantages (chain)."""
        return adv_ST

    def select(self, batch: Batch, ctx: Context) -> Batch:
        """Drops, replaces or adds whole trajectories, last of all (chain)."""
        return batch

    def token_advantages(self, adv_BT: Tensor, lctx: LossContext) -> Tensor:
        """Late transform that sees detached log-probs and entropies of this very forward (chain)."""
        return adv_BT

    def clip_range(self, lctx: LossContext) -> tuple[Any, Any] | None:
        """(low, high) clip distances, scalars or (B, 1) (one owner)."""
        return None

    def extra_loss(self, lctx: LossContext) -> Tensor | None:
        """A term added to the loss, in units of one optimiser step; the layer divides by accumulation (sum)."""
        return None

    def loss(self, lctx: LossContext) -> Tensor:
        """The whole loss, in place of the objective's (one owner)."""
        raise AssertionError("loss is called only where a method overrides it")

    def after_step(self, ctx: Context) -> None:
        """Schedulers, buffers, own optimisers (chain)."""

    def eval_metrics(self, trajs: list[Trajectory], ctx: Context) -> dict[str, list[float]]:
        """Named value per trajectory at evaluation."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and JSON values, saved beside each checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def inherit(self, state: dict[str, Any]) -> None:
        """Before training: the state that this method had in the run of `model.init`. Most begin anew."""

    def metrics(self) -> dict[str, float]:
        """Values logged as `<method>/<key>` once per generation."""
        return {}
