"""The ordered stack of methods: who is called when, what each needs, and which combinations are refused."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from methods.base import Batch, Context, LossContext, Method, Trajectory
from methods.controls import Control
from methods.errors import ConfigError, RunError, nearest
from methods.objectives.base import Objective

NEEDS = frozenset({"old_logps", "entropies", "ref_logps", "hidden", "group_baseline"})
OWNED_HOOKS = ("rollout", "base_advantages", "clip_range", "loss")
# The base advantages pass through these names so that controls work without any method.
LAYER_SIGNALS = ("advantages",)


def overrides(method: Method, hook: str) -> bool:
    return getattr(type(method), hook) is not getattr(Method, hook)


class Stack:
    """Methods in the written order over one objective. Raises ConfigError for a combination that cannot be right.

    `check=False` skips the refusals, for evaluation, where nothing is trained.
    """

    def __init__(self, methods: Sequence[Method], objective: Objective, check: bool = True) -> None:
        self.methods, self.objective = list(methods), objective
        self.controls = [m for m in self.methods if isinstance(m, Control)]
        self.seconds: dict[str, float] = defaultdict(float)
        self.service_seconds = 0.0  # the bench adds what services spent, so that hooks are not charged for it
        self._callers = {
            hook: [m for m in self.methods if overrides(m, hook)] for hook in vars(Method) if hook[0] != "_"
        }
        if check:
            self.check()

    # ---- composition ----
    def owner(self, hook: str) -> Method | None:
        return self._callers[hook][0] if self._callers[hook] else None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(self.objective.needs, *(m.needs for m in self.methods))

    def check(self) -> None:
        names = [m.name for m in self.methods]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"the stack names '{name}' twice", where="method", got=names, fix="name it once")
        for hook in OWNED_HOOKS:
            owners = [m.name for m in self._callers[hook]]
            if len(owners) > 1:
                raise ConfigError(
                    f"two methods own the hook `{hook}`",
                    where="method",
                    got=" and ".join(owners),
                    expected="one owner, because their results cannot be merged",
                    fix=f"drop {' or '.join(owners)} from the stack",
                )
        self._check_purpose()
        for method in self.methods:
            self._check_needs(method)
            self._check_pair(method)
        loss, clip = self.owner("loss"), self.owner("clip_range")
        if loss and clip and loss is not clip:
            raise ConfigError(
                f"{clip.name} sets the clip range and {loss.name} owns the loss, which would not see it",
                where="method",
                got=f"{clip.name} and {loss.name}",
                fix="drop one of them",
            )
        if loss and self.objective.beta and "ref_logps" not in loss.needs:
            raise ConfigError(
                f"{loss.name} owns the loss, which has no KL term",
                where="objective.beta",
                got=self.objective.beta,
                fix="set objective.beta=0",
            )
        self._check_controls()
        if self.objective.dynamic_sampling and (keepers := [m.name for m in self.methods if m.keeps_dead_groups]):
            raise ConfigError(
                f"{keepers[0]} gives groups with equal rewards a signal, dynamic sampling throws them away",
                where="objective.dynamic_sampling",
                got=True,
                fix="set objective.dynamic_sampling=false",
            )

    def _check_purpose(self) -> None:
        """An objective that serves certain methods is refused without them, and with others, which want to train."""
        wanted = self.objective.methods
        found = [m.name for m in self.methods if not isinstance(m, Control)]
        if wanted and tuple(found) != wanted:
            raise ConfigError(
                f"the objective {self.objective.name} serves {' and '.join(wanted)} alone",
                where="method",
                got=", ".join(found) or "an empty stack",
                expected=", ".join(wanted),
                fix=f"choose objective=grpo, or method=[{','.join(wanted)}]",
            )

    def _check_needs(self, method: Method) -> None:
        if unknown := sorted(method.needs - NEEDS):
            raise ConfigError(
                f"{method.name} needs what nothing provides",
                where=f"{type(method).__name__}.needs",
                got=", ".join(unknown),
                expected=", ".join(sorted(NEEDS)),
                fix=nearest(unknown[0], NEEDS),
            )
        if "ref_logps" in method.needs and not self.objective.beta:
            raise ConfigError(
                f"{method.name} needs the log-probs of the start model, which is not loaded",
                where="objective.beta",
                got=0.0,
                fix="set objective.beta above 0",
            )

    def _check_pair(self, method: Method) -> None:
        o, m = self.objective, method
        if m.objectives and o.name not in m.objectives:
            raise ConfigError(
                f"{m.name} does not run on objective {o.name}",
                where="objective",
                got=o.name,
                expected=" or ".join(m.objectives),
                fix=f"choose objective={m.objectives[0]}",
            )
        if "group_baseline" in m.needs and not o.group_baseline:
            raise ConfigError(
                f"{m.name} corrects the group baseline and {o.name} has none",
                where="objective",
                got=o.name,
                expected="an objective with a group baseline",
                fix="choose objective=grpo",
            )
        if m.token_credit and o.ratio_level == "sequence":
            raise ConfigError(
                f"{m.name} gives the tokens of a row different credit; a sequence-level ratio would give every"
                " token of the row the same gradient",
                where="objective",
                got=o.name,
                expected="a token-level ratio",
                fix="choose objective=gspo_token",
            )
        if overrides(m, "clip_range") and not o.clips:
            raise ConfigError(
                f"{m.name} sets the clip range and {o.name} does not clip",
                where="objective",
                got=o.name,
                fix="choose objective=grpo, gspo_token or dapo",
            )

    def _check_controls(self) -> None:
        known = [f"{m.name}.{s}" for m in self.methods for s in m.signals] + list(LAYER_SIGNALS)
        for control in self.controls:
            if control.target not in known:
                raise ConfigError(
                    f"the control '{control.name}' targets a signal that nothing in this stack passes",
                    where=f"method.{control.name}.target",
                    got=control.target,
                    expected="one of " + ", ".join(known),
                    fix=nearest(str(control.target), known) or "name one of these",
                )

    # ---- calls ----
    @contextmanager
    def timed(self, method: Method):
        start, service = time.perf_counter(), self.service_seconds
        try:
            yield
        finally:
            self.seconds[method.name] += time.perf_counter() - start - (self.service_seconds - service)

    def _chain(self, hook: str, value: Any, ctx: Any, check: Callable[..., None] | None = None) -> Any:
        for method in self._callers[hook]:
            with self.timed(method):
                value = getattr(method, hook)(value, ctx)
            _returned(method, hook, value)
            if check is not None:
                check(method, hook, value, ctx)
        return value

    def signal(self, ctx: Context, name: str, x: Tensor, within: Tensor | None) -> Tensor:
        for control in self.controls:
            if control.target == name:
                x = control.change(x, within, ctx)
        return x

    def prepare_rows(self, rows: list[Any], ctx: Context) -> list[Any]:
        out = self._chain("prepare_rows", rows, ctx)
        if len(out) != len(rows):
            raise ConfigError("prepare_rows changed the number of rows", got=len(out), expected=str(len(rows)))
        return out

    def rollout(self, rows: list[Any], ctx: Context, default: Callable[..., list[Trajectory]]):
        owner = self.owner("rollout")
        if owner is None:
            return default(rows)
        with self.timed(owner):
            trajs = owner.rollout(rows, ctx, default)
        return _returned(owner, "rollout", trajs)

    def rewards(self, trajs: list[Trajectory], ctx: Context) -> None:
        for method in self._callers["rewards"]:
            with self.timed(method):
                method.rewards(trajs, ctx)
            _check_rewards(method, trajs, ctx)

    def token_rewards(self, trajs: list[Trajectory], ctx: Context) -> None:
        for method in self._callers["token_rewards"]:
            with self.timed(method):
                ctx.token_rewards_ST = method.token_rewards(trajs, ctx)

    def advantages(self, ctx: Context) -> Tensor:
        owner = self.owner("base_advantages")
        if owner is None:
            adv_ST = self.objective.advantages(ctx)
        else:
            with self.timed(owner):
                adv_ST = owner.base_advantages(ctx)
            _check_advantages(owner, "base_advantages", adv_ST, ctx)
        assert ctx.batch is not None
        adv_ST = self.signal(ctx, "advantages", adv_ST, ctx.batch.group_S)
        adv_ST = self._chain("advantages", adv_ST, ctx, _check_advantages)
        if self.methods and self.objective.ratio_level == "sequence":
            self._check_constant(adv_ST, ctx.batch.model_mask_ST, "advantages")
        return adv_ST

    def _check_constant(self, adv: Tensor, mask: Tensor, hook: str) -> None:
        first = adv.gather(1, mask.argmax(1, keepdim=True))
        if bool(((adv != first) & mask.bool()).any()):
            raise ConfigError(
                f"advantages differ inside a row after `{hook}`, and {self.objective.name} has one ratio per row",
                where="objective",
                got=self.objective.name,
                fix="choose objective=gspo_token",
            )

    def select(self, batch: Batch, ctx: Context) -> Batch:
        return self._chain("select", batch, ctx)

    def loss(self, lctx: LossContext) -> Tensor:
        """The loss of one micro-batch, divided by the accumulation of its step."""
        if self._callers["token_advantages"]:
            seen = lctx.detached
            lctx.adv_BT = self._chain("token_advantages", lctx.adv_BT, seen).detach()
            if self.objective.ratio_level == "sequence":
                self._check_constant(lctx.adv_BT, lctx.mask_BT, "token_advantages")
        if owner := self.owner("clip_range"):
            with self.timed(owner):
                lctx.clip_range = owner.clip_range(lctx)
        owner = self.owner("loss")
        if owner is None:
            loss = self.objective.loss(lctx)
        else:
            with self.timed(owner):
                loss = owner.loss(lctx)
        for method in self._callers["extra_loss"]:
            with self.timed(method):
                term = method.extra_loss(lctx)
            if isinstance(term, Tensor) and term.dim():
                what, got = f"the hook `extra_loss` of {method.name} gives one number", tuple(term.shape)
                raise ConfigError(what, got=got, fix="take the sum or the mean")
            if term is not None:
                loss = loss + term * (lctx.share / lctx.accumulation)
        return loss

    def after_step(self, ctx: Context) -> None:
        for method in self._callers["after_step"]:
            with self.timed(method):
                method.after_step(ctx)

    def eval_metrics(self, trajs: list[Trajectory], ctx: Context) -> dict[str, list[float]]:
        columns: dict[str, list[float]] = {}
        for method in self._callers["eval_metrics"]:
            for name, column in _returned(method, "eval_metrics", method.eval_metrics(trajs, ctx)).items():
                count = len(column) if hasattr(column, "__len__") else None
                if count != len(trajs):
                    raise ConfigError(
                        f"the hook `eval_metrics` of {method.name} gives one number per trajectory",
                        where=name,
                        got=repr(column)[:80] if count is None else f"{count} numbers",
                        expected=f"a list of {len(trajs)}",
                    )
                columns[name] = list(column)
        return columns

    def metrics(self) -> dict[str, float]:
        """Every method's own values as plain numbers; ConfigError for anything else."""
        found = {}
        for method in self._callers["metrics"]:
            for name, value in _returned(method, "metrics", method.metrics()).items():
                value = value.tolist() if hasattr(value, "tolist") else value
                if value is not None and not isinstance(value, (int, float)):
                    what = f"the hook `metrics` of {method.name} gives numbers"
                    raise ConfigError(what, where=name, got=repr(value)[:80])
                found[f"{method.name}/{name}"] = value
        return found

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in each method since the last call, services excluded."""
        taken = {m.name: self.seconds.get(m.name, 0.0) for m in self.methods}
        self.seconds.clear()
        return taken

    # ---- state ----
    def state_dict(self) -> dict[str, Any]:
        return {"objective": self.objective.state_dict(), "methods": {m.name: m.state_dict() for m in self.methods}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        for method in self.methods:
            method.load_state_dict(state["methods"][method.name])

    def inherit(self, states: dict[str, Any]) -> None:
        """Hands each method what it left in an earlier run."""
        for method in self.methods:
            if method.name in states:
                method.inherit(states[method.name])


# ---- what a hook may return ----
def _returned(method: Method, hook: str, value: Any) -> Any:
    if value is None:
        fix = "return the value it got" if hook not in ("metrics", "eval_metrics") else "return {} for none"
        raise ConfigError(f"the hook `{hook}` of {method.name} returned None", fix=fix)
    return value


def _check_advantages(method: Method, hook: str, adv_ST: Any, ctx: Context) -> None:
    """ConfigError for anything but a tensor of the batch's shape, RunError for one with NaN or infinities."""
    assert ctx.batch is not None
    where, expected = f"the hook `{hook}` of {method.name}", tuple(ctx.batch.adv_ST.shape)
    if not isinstance(adv_ST, Tensor):
        raise ConfigError("advantages are no tensor", where=where, got=type(adv_ST).__name__, expected=str(expected))
    if tuple(adv_ST.shape) != expected:
        raise ConfigError("advantages changed shape", where=where, got=tuple(adv_ST.shape), expected=str(expected))
    if not bool(torch.isfinite(adv_ST).all()):
        bad = int((~torch.isfinite(adv_ST)).sum())
        raise RunError(
            "advantages are not finite",
            where=f"{where}, step {ctx.step}",
            got=f"{bad} of {adv_ST.numel()} are NaN or infinite",
            fix="look for a division by 0, such as the deviation of a group with equal rewards",
        )


def _check_rewards(method: Method, trajs: Sequence[Trajectory], ctx: Context) -> None:
    """RunError for a reward that is no number or infinite, and where none is left: nothing could be learned."""
    where, left = f"the hook `rewards` of {method.name}, step {ctx.step}", False
    for t in trajs:
        for name, value in t.rewards.items():
            number = value if isinstance(value, (int, float)) else _as_number(value)
            if number is None or number in (float("inf"), -float("inf")):
                expected = "a finite number, or NaN where it does not apply"
                raise RunError(f"the reward '{name}' cannot be used", where=where, got=repr(value), expected=expected)
            left = left or number == number  # not NaN
    if not left and any(t.rewards for t in trajs):
        raise RunError("every reward of the batch is NaN", where=where, expected="at least one rollout with a reward")


def _as_number(value: Any) -> float | None:
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
