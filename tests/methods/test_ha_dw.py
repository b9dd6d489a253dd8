"""HA-DW against the worked example of its sheet, its mechanism checks, and the closed form of the bias."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import RunError, Segment, Trajectory
from methods.controls import Flip, Scale
from methods.ha_dw import HaDw
from methods.objectives.policy_gradient import DrGrpo, Grpo
from methods.stack import Stack


def rollouts(counts, group=8):
    """One group per entry; `counts[g]` correct rollouts first. Completions have different lengths."""
    return [
        Trajectory(f"row{g}", g, i, [Segment([1], [5] * (1 + i % 3))], rewards={"task": float(i < right)})
        for g, right in enumerate(counts)
        for i in range(group)
    ]


def weigh(method, ctx, objective=None):
    stack = Stack([method], objective or DrGrpo())
    ctx.signal_fn = stack.signal
    return stack.advantages(ctx)


@pytest.fixture
def example(fake_context):
    """Group a: one of 8 correct, group b: seven of 8; beliefs (.30, .36, .45)."""
    method = HaDw(window=3, eta=2.0, eta_min=0.0)
    method.beliefs = [0.30, 0.36, 0.45]
    return method, fake_context(rollouts([1, 7]))


def test_anchor_of_the_worked_example(example):
    method, ctx = example
    weigh(method, ctx)
    assert method.last["prior"] == pytest.approx(0.45)
    assert method.last["accuracy"] == pytest.approx(0.5)
    assert method.last["sigma"] == pytest.approx(0.061644, abs=1e-6)
    assert method.last["eta"] == pytest.approx(0.123288, abs=1e-6)
    assert method.beliefs[-1] == pytest.approx(0.456164, abs=1e-6)


def test_hard_anchor_of_the_worked_example():
    method = HaDw(anchor="hard", window=3)
    for accuracy in (0.2, 0.4, 0.3, 0.6):
        posterior = method.update(accuracy)
    assert posterior == pytest.approx(0.433333, abs=1e-6)


def test_weighted_advantages_of_the_worked_example(example):
    method, ctx = example
    adv_ST = weigh(method, ctx)
    first = adv_ST[:, 0].tolist()
    assert first[0] == pytest.approx(1.574335, abs=1e-6)
    assert first[1] == pytest.approx(-0.117411, abs=1e-6)
    assert first[8] == pytest.approx(0.106238, abs=1e-6)
    assert first[15] == pytest.approx(-1.739909, abs=1e-6)
    assert sum(first[:8]) == pytest.approx(0.752460, abs=1e-5)
    assert sum(first[8:]) == pytest.approx(-0.996246, abs=1e-5)
    assert sum(map(abs, first[:8])) == pytest.approx(2.396210, abs=1e-5)
    assert sum(map(abs, first[8:])) == pytest.approx(2.483572, abs=1e-5)
    assert method.last["phi/hard_correct"] == pytest.approx(1.799240, abs=1e-6)
    assert method.last["phi/hard_wrong"] == pytest.approx(0.939286, abs=1e-6)
    assert method.last["phi/easy_correct"] == pytest.approx(0.849901, abs=1e-6)
    assert method.last["phi/easy_wrong"] == pytest.approx(1.988468, abs=1e-6)


def test_with_group_scaling(example):
    method, ctx = example
    first = weigh(method, ctx, Grpo())[:, 0].tolist()
    assert [first[0], first[1], first[8], first[15]] == pytest.approx(
        [4.451632, -0.331994, 0.300400, -4.919815], abs=1e-5
    )


def test_constant_history_freezes_without_a_floor_and_moves_with_it():
    frozen, moving = (HaDw(window=3, eta=2.0, eta_min=floor) for floor in (0.0, 0.02))
    for method in (frozen, moving):
        method.beliefs = [0.4, 0.4, 0.4]
        method.update(0.9)
    assert frozen.beliefs[-1] == pytest.approx(0.4)
    assert moving.beliefs[-1] == pytest.approx(0.41)


def test_quadrants_lie_on_the_right_side_of_lambda(fake_context):  # check (b)
    method = HaDw(lambda_scale=1.3)
    method.beliefs = [0.5] * 10
    weigh(method, fake_context(rollouts([1, 2, 6, 7])))
    phi = method.last
    assert phi["phi/hard_correct"] > 1.3 > phi["phi/hard_wrong"]
    assert phi["phi/easy_wrong"] > 1.3 > phi["phi/easy_correct"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.floats(0, 1), st.floats(0.1, 3))
def test_net_sum_follows_the_sinh_formula(counts, belief, scale):  # check (c)
    from methods.base import Context, assemble

    trajs = rollouts(counts)
    ctx = Context("train", 0, 0, 8, services=_Alone(), trajs=trajs)
    ctx.reward_names, ctx.reward_roles, ctx.reward_weights = ["task"], ["outcome"], [1.0]
    ctx.batch = assemble(trajs, 0)
    first = weigh(HaDw(anchor="fixed", fixed_anchor=belief, lambda_scale=scale), ctx)[:, 0]
    for g, right in enumerate(counts):
        p = right / 8
        expected = -2 * scale * 8 * p * (1 - p) * math.sinh(p - belief)
        assert float(first[8 * g : 8 * g + 8].sum()) == pytest.approx(expected, abs=1e-5 * scale)
        mass = 2 * scale * 8 * p * (1 - p) * math.cosh(p - belief)
        assert float(first[8 * g : 8 * g + 8].abs().sum()) == pytest.approx(mass, rel=1e-5)


class _Alone:
    """Services of one process."""

    from types import SimpleNamespace

    limits = SimpleNamespace(scale_rewards="none")

    @staticmethod
    def gather(x):
        return x


def test_anchor_tracks_a_sigmoid():  # check (d)
    import numpy as np

    rng = np.random.default_rng(0)
    truth = 0.2 + 0.6 / (1 + np.exp(-(np.arange(300) - 150) / 25))
    method, errors = HaDw(), []
    for y in truth:
        observed = float(np.clip(y + rng.normal(0, 0.03), 0, 1))
        errors.append(method.prior(observed) - y)
        method.update(observed)
    assert np.sqrt(np.mean(np.square(errors))) < 0.05


def test_no_magnitude_and_unit_lambda_is_grpo_bit_for_bit(fake_context):  # check (e)
    ctx = fake_context(rollouts([1, 7, 4]))
    plain = Stack([], Grpo()).advantages(ctx)
    stack = Stack([HaDw(lambda_scale=1.0), Scale("ha_dw.magnitude", 0.0)], Grpo())
    ctx.signal_fn = stack.signal
    assert torch.equal(stack.advantages(ctx), plain)


def test_state_round_trip(fake_context):  # check (f), without a checkpoint on disk
    first, second = HaDw(), HaDw()
    for right in range(1, 8):
        weigh(first, fake_context(rollouts([right])))
    second.load_state_dict(first.state_dict())
    assert second.prior(0.1) == first.prior(0.1)
    assert second.update(0.3) == first.update(0.3)


def test_flipped_direction_swaps_the_quadrants(fake_context):
    ctx = fake_context(rollouts([1, 7]))
    method = HaDw(anchor="fixed")
    stack = Stack([method, Flip("ha_dw.direction")], DrGrpo())
    ctx.signal_fn = stack.signal
    flipped = stack.advantages(ctx)
    straight = weigh(HaDw(anchor="fixed"), ctx)
    lam = method.lambda_scale
    plain = Stack([], DrGrpo()).advantages(ctx)
    live = plain != 0
    torch.testing.assert_close((flipped * straight)[live], (lam * plain)[live] ** 2)
    assert not torch.allclose(flipped, straight)


def test_degenerate_groups_stay_zero_but_count(fake_context):
    method = HaDw()
    adv_ST = weigh(method, fake_context(rollouts([0, 8, 8, 4])))
    assert torch.equal(adv_ST[:24], torch.zeros_like(adv_ST[:24]))
    assert method.last["accuracy"] == pytest.approx(20 / 32)


def test_accuracy_equal_to_the_belief_is_neutral(fake_context):
    ctx = fake_context(rollouts([4]))
    plain = Stack([], DrGrpo()).advantages(ctx)
    torch.testing.assert_close(weigh(HaDw(anchor="fixed", fixed_anchor=0.5), ctx), 1.3 * plain)


def test_nan_rewards_are_left_out(fake_context):
    trajs = rollouts([2, 6])
    trajs[0].rewards["task"] = math.nan
    for t in trajs[8:]:
        t.rewards["task"] = math.nan
    method = HaDw()
    adv_ST = weigh(method, fake_context(trajs))
    assert method.last["accuracy"] == pytest.approx(1 / 7)
    assert torch.isfinite(adv_ST).all() and (adv_ST[0] == 0).all() and (adv_ST[8:] == 0).all()


def test_rewards_outside_the_unit_interval_are_refused(fake_context):
    trajs = rollouts([2])
    trajs[0].rewards["task"] = 2.0
    with pytest.raises(RunError, match=r"0 to 2"):
        weigh(HaDw(), fake_context(trajs))


def test_accuracy_uses_every_draw(fake_context):
    ctx = fake_context(rollouts([4]))
    ctx.rewards_all = {"task": torch.tensor([0.0] * 30 + [1.0] * 10)}
    method = HaDw()
    weigh(method, ctx)
    assert method.last["accuracy"] == pytest.approx(0.25)


def test_official_code_reads_the_posterior(fake_context):
    method = HaDw(anchor="hard", use_posterior=True, lambda_scale=1.0)
    method.accuracies = [0.0] * 9
    method.beliefs = [0.0]
    adv = weigh(method, fake_context(rollouts([4])))  # posterior = 0.05, so the group is easy by 0.45
    assert float(adv[0, 0]) == pytest.approx(0.5 * math.exp(-0.45), rel=1e-5)


def test_official_code_does_nothing_without_std(fake_context):
    ctx = fake_context(rollouts([1]))
    ctx.services.limits.scale_rewards = "none"
    adv = weigh(HaDw(only_with_std=True), ctx)
    assert torch.equal(adv, Stack([], DrGrpo()).advantages(ctx))
