"""The hook of TAPO: transfers credit from successful rollouts to equivalent calls of failing ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from methods.base import Batch, Context, Method
from methods.errors import ConfigError, check_range, nearest
from methods.tapo.matching import Rollouts, at_least, match
from methods.tapo.record import Actions, actions_of, refuse_overlaps, rollout_means
from methods.tapo.similarity import KINDS, Calls, Floats
from methods.tapo.statistics import counts, rates, useful

SCHEMA = {"search": {"query": "text"}, "image_search": {"image": "id"}, "zoom": {"image": "id", "bbox": "box"}}


@dataclass
class Tapo(Method):
    """TAPO: raises the negative advantage of failing tool calls that a successful sibling made too, at most to zero.

    Tools that only acquire information give the same information for the same call, so an equivalent call in a
    success is a witness. Per prompt, S the successful rollouts (outcome above 1/2), u a call of a failing rollout:
        reference groups g: connected components of sim >= theta among the calls of S
        s_g = |T_g| / |S|,  Abar_g = mean of A_i over T_g          T_g: successes with a member in g
        m(u) = max over g, v in g of sim(u, v),  g* = argmax,  a(u) = m(u) s_{g*}
        D(u) = [m >= theta] [a >= alpha_min] a(u) Abar_{g*}
        A'(u) = min(0, A_j + beta D(u))                            on the tokens of the turn that makes the call
    Groups with Abar <= 0 are dropped. Everything else keeps its advantage. `schema` names the fields of each tool and
    their kinds (similarity.py); calls of `exclude_tools` (stochastic ones) match nothing. Ablations: `support` false
    takes s_g = 1, `clip` false drops the minimum.

    Signal `transfer`: D(u) of the failing calls; shuffled within a prompt it is the control with random call
    identities: as much is transferred, to the wrong calls. Where a row's generator knows the useful calls
    (`row.meta["useful_calls"]`), `precision` is the share of corrected calls that are among them and `useful` the share
    of all failing calls of mixed groups.

    Differs from the paper, which leaves them open: similarity measures, components, the product a, what alpha_min
    bounds, theta and alpha_min; scope is one prompt. A turn with several calls gets the mean of their D.
    Degenerate: no success, no failure, no tool calls, beta = 0 or theta > 1 leave the advantages as they are, bit for
    bit (a first generation without calls is said in a warning). Unparsable calls, missing fields, empty queries and
    boxes without area match nothing. A NaN outcome is neither success nor failure. A repeated call is corrected each
    time and supports once. DataError for overlapping turns.
    """

    theta: float = 0.8
    alpha_min: float = 0.3
    beta: float = 0.8
    support: bool = True
    clip: bool = True
    exclude_tools: Sequence[str] = ()
    schema: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: SCHEMA)
    last: dict[str, float] = field(default_factory=dict, init=False)
    seen: bool = field(default=False, init=False)  # a first generation, whose lack of calls is worth a warning

    name = "tapo"
    needs = frozenset({"group_baseline"})
    signals = ("transfer",)
    token_credit = True

    def __post_init__(self) -> None:
        check_range("method.tapo.theta", self.theta, 0.0, above=True)
        check_range("method.tapo.alpha_min", self.alpha_min, 0.0)
        check_range("method.tapo.beta", self.beta, 0.0)
        if isinstance(self.exclude_tools, str):
            raise ConfigError(
                "exclude_tools is a list of names",
                where="method.tapo.exclude_tools",
                got=self.exclude_tools,
                fix=f"write [{self.exclude_tools}]",
            )
        self.schema = {tool: dict(fields) for tool, fields in self.schema.items()}
        for tool, fields in self.schema.items():
            if not fields or (odd := [k for k in fields.values() if k not in KINDS]):
                raise ConfigError(
                    "a tool's fields each have a kind",
                    where=f"method.tapo.schema.{tool}",
                    got=fields,
                    expected=" | ".join(KINDS),
                    fix=nearest(str(odd[0]), KINDS) if fields else "name at least one field, or drop the tool",
                )

    def advantages(self, adv_ST: Tensor, ctx: Context) -> Tensor:
        batch = ctx.batch
        assert batch is not None
        refuse_overlaps(ctx.trajs, batch)
        outcome_N = ctx.reward(ctx.reward_name("outcome")).numpy()
        _, prompt_N = np.unique(ctx.group_N.numpy(), return_inverse=True)
        rollouts = Rollouts(prompt_N, outcome_N > 0.5, outcome_N <= 0.5, rollout_means(adv_ST, batch))
        calls = Calls(self.schema, self.exclude_tools)
        actions = actions_of(ctx.trajs, calls, rollouts.mixed_N)
        self._warn_once(len(ctx.trajs), len(actions.call_U))
        found = match(calls, actions.call_U, actions.rollout_U, rollouts, self.theta)

        confidence_U = found.similarity_U * (found.support_U if self.support else 1.0)
        gate_U = (found.similarity_U > 0) & at_least(confidence_U, self.alpha_min)
        transfer_U = self._passed(gate_U * confidence_U * found.reference_U, actions, rollouts, ctx)
        transfer_NK = actions.count_NK(transfer_U) / np.maximum(actions.count_NK(), 1)

        n = counts(rollouts, actions, found, gate_U, transfer_NK, self.beta) | useful(rollouts, actions, transfer_U)
        sums = torch.tensor([list(n.values())], dtype=torch.float64)
        self.last = rates(dict(zip(n, ctx.gather(sums).sum(0).tolist(), strict=True)))
        return self.corrected(adv_ST, transfer_NK, batch) if transfer_NK.any() else adv_ST

    def _warn_once(self, rollouts: int, calls: int) -> None:
        """Says what a first generation without a tool call means."""
        if not self.seen and not calls:
            what = f"TAPO saw no tool call in the first {rollouts} rollouts: while there is none it changes nothing"
            warnings.warn(f"{what} (choose a task with tools that the model calls)", stacklevel=3)
        self.seen = True

    def _passed(self, transfer_U: Floats, actions: Actions, rollouts: Rollouts, ctx: Context) -> Floats:
        """The transfers after the signal, which sees the readable calls of failing rollouts in mixed groups."""
        seen = np.flatnonzero(actions.parsable_U & (rollouts.failure_N & rollouts.mixed_N)[actions.rollout_U])
        if len(seen):
            within = torch.from_numpy(rollouts.prompt_N[actions.rollout_U[seen]])
            transfer_U[seen] = ctx.signal(self, "transfer", torch.from_numpy(transfer_U[seen]), within).numpy()
        return transfer_U

    def corrected(self, adv_ST: Tensor, transfer_NK: Floats, batch: Batch) -> Tensor:
        """min(0, A + beta D) (without the minimum if not `clip`) on the tokens with A < 0 of turns that get a D."""
        gain_NK = torch.from_numpy(self.beta * transfer_NK).to(adv_ST)
        gain_ST = gain_NK[batch.traj_S.unsqueeze(1), batch.turn_ST.clamp(min=0)]
        change_ST = (batch.turn_ST >= 0) & (gain_ST != 0) & (adv_ST < 0)
        raised_ST = adv_ST + gain_ST
        return torch.where(change_ST, raised_ST.clamp(max=0.0) if self.clip else raised_ST, adv_ST)

    def metrics(self) -> dict[str, float]:
        return dict(self.last)
