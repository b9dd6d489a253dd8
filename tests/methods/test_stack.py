"""Composition: order, refusals before anything runs, controls as stack entries, state."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.base import Context, Method
from methods.controls import Flip, Random, Scale, Shuffle
from methods.errors import AssayError, ConfigError, RunError
from methods.ha_dw import HaDw
from methods.objectives.policy_gradient import Cispo, Dapo, Grpo, Gspo, GspoToken, Sapo
from methods.objectives.reinforce_pp import ReinforcePP
from methods.stack import Stack


class Roller(Method):
    def __init__(self, name):
        self.name = name

    def rollout(self, rows, ctx, default):
        return default(rows)


class TokenCredit(Method):
    name = "turns"
    token_credit = True


class Clipper(Method):
    name = "clipper"

    def clip_range(self, lctx):
        return 0.1, 0.1


class Keeper(Method):
    name = "keeper"
    keeps_dead_groups = True


class Hungry(Method):
    name = "hungry"
    needs = frozenset({"old_logp"})


class WantsReference(Method):
    name = "wants"
    needs = frozenset({"ref_logps"})


class LossOwner(Method):
    name = "loss_owner"

    def loss(self, lctx):
        return lctx.logps_BT.sum()


class Picky(Method):
    name = "picky"
    objectives = ("grpo",)


REFUSED = {
    "two owners of one hook": ([Roller("a"), Roller("b")], Grpo(), "`rollout`.*a and b"),
    "the same name twice": ([HaDw(), HaDw()], Grpo(), "twice"),
    "group baseline missing": ([HaDw()], ReinforcePP(), "objective=grpo"),
    "token credit on a sequence ratio": ([TokenCredit()], Gspo(), "objective=gspo_token"),
    "clip range on cispo": ([Clipper()], Cispo(), "does not clip"),
    "clip range on sapo": ([Clipper()], Sapo(), "does not clip"),
    "an unknown need": ([Hungry()], Grpo(), "did you mean 'old_logps'"),
    "a reference that is not loaded": ([WantsReference()], Grpo(), "objective.beta"),
    "a clip range that the loss owner ignores": ([Clipper(), LossOwner()], Grpo(), "would not see it"),
    "another objective": ([Picky()], Dapo(), "objective=grpo"),
    "dynamic sampling against a keeper": ([Keeper()], Dapo(dynamic_sampling=True), "dynamic_sampling=false"),
    "a control without its method": ([Flip("ha_dw.direction")], Grpo(), "targets a signal"),
    "a misspelt target": ([HaDw(), Flip("ha_dw.directon")], Grpo(), "did you mean 'ha_dw.direction'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    methods, objective, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        Stack(methods, objective)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "methods, objective",
    [([TokenCredit()], GspoToken()), ([Clipper()], Dapo()), ([HaDw()], Gspo()), ([HaDw(), Keeper()], Dapo())],
)
def test_allowed(methods, objective):
    assert Stack(methods, objective).methods == methods


def test_needs_are_joined():
    class A(Method):
        name = "a"
        needs = frozenset({"old_logps"})

    class B(Method):
        name = "b"
        needs = frozenset({"entropies"})

    assert Stack([A(), B()], Grpo(beta=0.1)).needs == {"old_logps", "entropies", "ref_logps"}


def test_a_hook_that_forgets_to_return_is_named():
    class Forgets(Method):
        name = "forgets"

        def prepare_rows(self, rows, ctx):
            return None

    with pytest.raises(ConfigError, match=r"prepare_rows.*forgets"):
        Stack([Forgets()], Grpo()).prepare_rows([1], None)


@pytest.mark.parametrize("hook", ["rollout", "eval_metrics", "metrics"])
def test_other_hooks_that_forget_to_return_are_named(hook):
    forgets = type("Forgets", (Method,), {"name": "forgets", hook: lambda *a: None})
    call = {"rollout": lambda s: s.rollout([], None, list), "eval_metrics": lambda s: s.eval_metrics([], None)}
    with pytest.raises(ConfigError, match=f"{hook}.*forgets.*None"):
        call.get(hook, lambda s: s.metrics())(Stack([forgets()], Grpo()))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda adv: adv * float("nan"), "not finite.*`advantages` of broken, step 2.*6 of 6"),
        (lambda adv: adv[:, 0], r"changed shape.*of broken.*\(2,\).*\(2, 3\)"),
        (lambda adv: adv.numpy(), "no tensor.*of broken.*ndarray"),
    ],
)
def test_advantages_that_cannot_be_right_name_their_hook(change, said):
    broken = type("Broken", (Method,), {"name": "broken", "advantages": lambda self, adv, ctx: change(adv)})
    ctx = SimpleNamespace(step=2, batch=SimpleNamespace(adv_ST=torch.zeros(2, 3), group_S=torch.zeros(2)))
    stack = Stack([broken()], SimpleNamespace(advantages=lambda ctx: torch.ones(2, 3), ratio_level="token"), False)
    with pytest.raises(AssayError, match=said):
        stack.advantages(ctx)


@pytest.mark.parametrize("value, said", [(math.inf, "cannot be used"), ("a", "cannot be used"), (math.nan, "every")])
def test_rewards_that_cannot_be_trained_on_name_their_hook(value, said):
    def rewards(self, trajs, ctx):
        for t in trajs:
            t.rewards["task"] = value

    broken = type("Broken", (Method,), {"name": "broken", "rewards": rewards})
    trajs = [SimpleNamespace(rewards={"task": 1.0}) for _ in range(2)]
    with pytest.raises(RunError, match=f"{said}.*`rewards` of broken, step 4"):
        Stack([broken()], Grpo()).rewards(trajs, SimpleNamespace(step=4))


def test_metrics_become_plain_numbers():
    class Measures(Method):
        name = "m"
        value = torch.tensor(0.5)

        def metrics(self):
            return {"x": self.value, "n": 3}

    method = Measures()
    assert Stack([method], Grpo()).metrics() == {"m/x": 0.5, "m/n": 3}
    method.value = "half"
    with pytest.raises(ConfigError, match=r"`metrics` of m.*half"):
        Stack([method], Grpo()).metrics()


def test_eval_metrics_give_one_number_per_trajectory():
    short = type("Short", (Method,), {"name": "short", "eval_metrics": lambda self, trajs, ctx: {"x": [1.0]}})
    with pytest.raises(ConfigError, match=r"`eval_metrics` of short.*x.*1 numbers.*list of 2"):
        Stack([short()], Grpo()).eval_metrics([1, 2], None)


def test_an_extra_loss_is_one_number():
    vector = type("Vector", (Method,), {"name": "vector", "extra_loss": lambda self, lctx: torch.ones(3)})
    stack = Stack([vector()], SimpleNamespace(loss=lambda lctx: torch.zeros(())), check=False)
    with pytest.raises(ConfigError, match=r"`extra_loss` of vector.*\(3,\)"):
        stack.loss(SimpleNamespace(share=1.0, accumulation=1))


def test_time_in_services_is_not_charged_to_the_method():
    class Slow(Method):
        name = "slow"

        def advantages(self, adv_ST, ctx):
            stack.service_seconds += 100.0
            return adv_ST

    stack = Stack([Slow()], Grpo())
    stack._chain("advantages", torch.zeros(1), None)
    assert stack.take_seconds()["slow"] < 0
    assert stack.take_seconds() == {"slow": 0.0}


# ---------------------------------------------------------------- controls


def context(seed=0, round_=0):
    import numpy as np

    class Services:
        @staticmethod
        def rng(name):
            import zlib

            return np.random.default_rng([seed, zlib.crc32(name.encode())])

    return Context("train", 0, round_, 4, services=Services())


ids = st.lists(st.integers(0, 3), min_size=1, max_size=20)


@given(ids)
def test_shuffle_permutes_inside_each_set(groups):
    group_N = torch.tensor(groups)
    x = torch.arange(len(groups), dtype=torch.float32)
    out = Shuffle("advantages").change(x, group_N, context())
    for g in set(groups):
        assert sorted(out[group_N == g].tolist()) == sorted(x[group_N == g].tolist())


def test_shuffle_moves_something_and_is_seeded():
    x, group_N = torch.arange(64.0), torch.arange(64) // 8
    first, again, later = (Shuffle("advantages").change(x, group_N, context(0, r)) for r in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, x) and not torch.equal(first, later)


def test_moved_credit_lies_on_the_receivers_own_tokens():
    """Rows of 1, 3 and 2 tokens: nothing on padding, no token without its row's credit."""
    from methods.base import Segment, Trajectory, assemble

    trajs = [Trajectory(f"r{i}", 0, i, [Segment([1], [5] * n)]) for i, n in enumerate((1, 3, 2))]
    ctx = context()
    ctx.batch = assemble(trajs, 0)
    mask = ctx.batch.model_mask_ST
    x = torch.tensor([[1.0], [2.0], [3.0]]) * mask
    for control in (Shuffle("advantages"), Random("advantages")):
        out = control.change(x, ctx.batch.group_S, ctx)
        assert (out[mask == 0] == 0).all()
        for row, on in zip(out, mask.bool(), strict=True):
            assert row[on].unique().numel() == 1 and row[on][0] in (1.0, 2.0, 3.0)


def test_shuffled_magnitude_is_a_real_control(fake_context):
    from methods.base import Segment, Trajectory

    trajs = [
        Trajectory(f"r{g}", g, i, [Segment([1], [5])], rewards={"task": float(i < right)})
        for g, right in enumerate([1, 2, 4, 6, 7])
        for i in range(8)
    ]

    def weighted(controls):
        ctx = fake_context(trajs)
        stack = Stack([HaDw(anchor="fixed"), *controls], Grpo())
        ctx.signal_fn = stack.signal
        return stack.advantages(ctx)

    assert not torch.equal(weighted([]), weighted([Shuffle("ha_dw.magnitude")]))


def test_random_draws_from_the_batch():
    x = torch.arange(50.0)
    out = Random("advantages").change(x, None, context())
    assert set(out.tolist()) <= set(x.tolist()) and not torch.equal(out, x)


def test_controls_reach_only_their_target():
    method = HaDw()
    stack = Stack([method, Flip("ha_dw.direction"), Scale("ha_dw.magnitude", 2.0)], Grpo())
    x, ctx = torch.ones(3), context()
    assert torch.equal(stack.signal(ctx, "ha_dw.direction", x, None), -x)
    assert torch.equal(stack.signal(ctx, "ha_dw.magnitude", x, None), 2 * x)
    assert torch.equal(stack.signal(ctx, "advantages", x, None), x)


def test_state_round_trip_by_name():
    first, second = Stack([HaDw()], Grpo()), Stack([HaDw()], Grpo())
    first.methods[0].update(0.3)
    second.load_state_dict(first.state_dict())
    assert second.methods[0].beliefs == [0.3]
