"""SRFT against the worked example of its sheet, its degenerate cases, and in the trainer."""

from __future__ import annotations

import math

import pytest
import torch

from methods.base import LossContext, Segment, Trajectory
from methods.objectives.policy_gradient import Grpo
from methods.srft import Srft, srft_terms
from methods.stack import Stack

LENGTHS = [4, 3, 2, 4, 3, 4, 4, 3]
REWARDS = [1.0, 0, 0, 1, 0, 0, 0, 1]
DEMOS = (3, 7)


def example(rewards=REWARDS, demos=DEMOS):
    """logits[b,t,v] = 1.5 sin(1.7 b + 0.9 t (v+1) + 0.4 v), tokens (3b + 2t) mod 5, two groups of four."""
    b, t, v = torch.arange(8.0).view(8, 1, 1), torch.arange(4.0).view(1, 4, 1), torch.arange(5.0).view(1, 1, 5)
    logits = (1.5 * torch.sin(1.7 * b + 0.9 * t * (v + 1) + 0.4 * v)).double().requires_grad_()
    tokens = ((3 * torch.arange(8).view(8, 1) + 2 * torch.arange(4)) % 5).unsqueeze(2)
    logps = torch.log_softmax(logits, -1)
    trajs = [
        Trajectory(
            f"r{i // 4}", i // 4, i % 4, [Segment([1], [9] * n)], rewards={"task": rewards[i]}, is_demo=i in demos
        )
        for i, n in enumerate(LENGTHS)
    ]
    return trajs, logps.gather(2, tokens).squeeze(2), -(logps.exp() * logps).sum(-1), logits


@pytest.fixture
def terms(fake_context):
    """terms(rewards, demos) -> (the terms, A of each row, log-probs, logits)."""

    def make(rewards=REWARDS, demos=DEMOS, **coefficients):
        trajs, logps, entropies, logits = example(rewards, demos)
        ctx = fake_context(trajs)
        method = Srft()
        stack = Stack([method], Grpo())
        ctx.batch.adv_ST = stack.advantages(ctx)
        batch = stack.select(ctx.batch, ctx)
        lctx = LossContext(
            logps_BT=logps,
            entropies_BT=entropies,
            mask_BT=batch.model_mask_ST,
            adv_BT=batch.adv_ST.double(),
            old_logps_BT=logps.detach(),
            ref_logps_BT=None,
            denominator_tokens=torch.tensor(27.0),
            accumulation=1,
            max_completion_tokens=4,
            extras=batch.extras,
        )
        return srft_terms(lctx, **coefficients), batch.adv_ST[:, 0].tolist(), logps, logits, method

    return make


def total(t):
    return t["demo_sft"] + t["demo_rl"] + t["self_pos"] + t["self_neg"]


def test_worked_example(terms):
    t, adv, *_ = terms()
    expected = [0.865875, -0.865875, -0.865875, 0.865875, -0.499900, -0.499900, -0.499900, 1.499700]
    assert adv == pytest.approx(expected, abs=1e-6)
    assert float(t["demo_sft"]) == pytest.approx(0.208275, abs=1e-6)
    assert float(t["demo_rl"]) == pytest.approx(-0.310646, abs=1e-6)
    assert float(t["self_pos"]) == pytest.approx(0.219331, abs=1e-6)
    assert float(t["self_neg"]) == pytest.approx(-1.439016, abs=1e-6)
    assert float(total(t)) == pytest.approx(-1.322057, abs=1e-6)
    assert float(t["w_rl"]) == pytest.approx(0.378376, abs=1e-6)
    assert float(t["w_sft"]) == pytest.approx((0.136403 + 0.142763) / 2, abs=1e-6)


def test_coefficients_on_log_probs(terms):
    t, _, logps, _, _ = terms()
    (c,) = torch.autograd.grad(total(t), logps, retain_graph=True)
    assert c[3].tolist() == pytest.approx([-0.075848, -0.074986, -0.067594, -0.059963], abs=1e-6)
    assert c[0].tolist() == pytest.approx([-0.018919] * 4, abs=1e-6)
    assert c[1].tolist() == pytest.approx([0.05, 0.05, 0.05, 0], abs=1e-6)
    assert c[7].tolist() == pytest.approx([-0.038963, -0.027951, -0.104470, 0], abs=1e-6)


def test_no_gradient_through_the_weights(terms):
    """The gradient on the logits is that of the frozen coefficients."""
    t, _, logps, logits, _ = terms()
    (full,) = torch.autograd.grad(total(t), logits, retain_graph=True)
    (c,) = torch.autograd.grad(total(t), logps, retain_graph=True)
    (frozen,) = torch.autograd.grad((c.detach() * logps).sum(), logits)
    torch.testing.assert_close(full, frozen)


@pytest.mark.parametrize(
    "left_out, expected", [(("demo_sft",), -1.530331), (("demo_rl",), -1.011410)], ids=["no demo SFT", "no demo RL"]
)
def test_variants_of_the_sheet(left_out, expected, terms):
    t, *_ = terms()
    rest = total(t) - sum(t[name] for name in left_out)
    assert float(rest) == pytest.approx(expected, abs=1e-6)


def test_without_demonstrations_terms_one_and_two_are_exactly_zero(terms):
    t, *_ = terms(demos=())
    assert float(t["demo_sft"]) == 0 and float(t["demo_rl"]) == 0 and math.isfinite(float(total(t)))


def test_equal_rewards_leave_terms_one_three_and_four(terms):
    t, adv, *_ = terms(rewards=[1.0] * 8)
    assert adv == [0.0] * 8 and float(t["demo_rl"]) == 0 and float(t["self_neg"]) == 0
    assert float(t["demo_sft"]) > 0 and float(t["self_pos"]) > 0


def test_a_rejected_demonstration_is_dropped_and_counted(terms):
    t, _, logps, _, method = terms(rewards=[1.0, 0, 0, 0, 0, 0, 0, 1])
    (c,) = torch.autograd.grad(total(t), logps)
    assert (c[3] == 0).all() and (c[7][:3] != 0).all()
    assert method.metrics()["demo_rejected"] == 1


def test_nan_reward_leaves_the_self_terms(terms):
    t, adv, logps, _, _ = terms(rewards=[1.0, math.nan, 0, 1, 0, 0, 0, 1])
    (c,) = torch.autograd.grad(total(t), logps)
    assert (c[1] == 0).all() and adv[1] == 0 and math.isfinite(float(total(t)))


# ---------------------------------------------------------------- in the trainer


def train(make_trainer, **keys):
    trainer = make_trainer([Srft()], Grpo(), max_steps=1, max_completion_length=12, **keys)
    trainer.train()
    return trainer


def test_demonstrations_take_the_last_slot_and_cost_no_generation(make_trainer):
    trainer = train(make_trainer)
    trajs = trainer.last_ctx.trajs
    assert [t.is_demo for t in trajs] == [False, False, False, True] * 4
    for t in trajs:
        if t.is_demo:
            ids = t.segments[0].completion_ids
            assert t.text == t.row.demo and trainer._tokenizer.decode(ids[:-1]) == t.row.demo
            assert ids[-1] == trainer._tokenizer.eos_token_id
            assert t.segments[0].prompt_ids == trainer.tokenize([t.row.prompt])[0]
    assert trainer.cost["generated_tokens"] == sum(t.length for t in trajs if not t.is_demo)


def test_gradient_does_not_depend_on_accumulation(make_trainer):
    norms = [train(make_trainer, rows_per_device=n).state.log_history[0]["grad_norm"] for n in (16, 8, 4)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_too_long_a_demonstration_leaves_a_group_of_rollouts(make_trainer):
    trainer = make_trainer([Srft()], Grpo(), max_steps=1, max_completion_length=3)
    trainer.train()
    method = trainer.stack.methods[0]
    assert method.metrics()["demo_too_long"] > 0
    assert len(trainer.last_ctx.trajs) == 16
    assert all(t.length <= 3 for t in trainer.last_ctx.trajs)
