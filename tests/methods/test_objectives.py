"""Losses and advantages against the formulas of the sheets, written out in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import LossContext, Segment, Trajectory
from methods.numerics import discounted_returns, group_stats, trajectory_returns
from methods.objectives import policy_gradient as pg
from methods.objectives.credit import place_on_last_token
from methods.objectives.reinforce_pp import ReinforcePP

LENGTHS = (3, 1, 5, 2)
ACCUMULATION = 2
MAX_TOKENS = 7


def case(seed, row_constant=False):
    """A random micro-batch with masked tool tokens, off-policy by about 20 %."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(LENGTHS), max(LENGTHS)
    mask = torch.tensor([[1 if t < n else 0 for t in range(T)] for n in LENGTHS])
    mask[2, 1] = 0
    new = (-torch.rand(B, T, generator=g) * 2).requires_grad_()
    old = new.detach() + 0.4 * torch.randn(B, T, generator=g)
    adv = torch.randn(B, 1 if row_constant else T, generator=g).expand(B, T) * mask
    ref = old + 0.3 * torch.randn(B, T, generator=g)
    return LossContext(
        logps_BT=new,
        entropies_BT=torch.rand(B, T, generator=g),
        mask_BT=mask,
        adv_BT=adv.clone(),
        old_logps_BT=old,
        ref_logps_BT=ref,
        denominator_tokens=torch.tensor(20.0),
        accumulation=ACCUMULATION,
        max_completion_tokens=MAX_TOKENS,
    )


def tokens(lctx):
    for b in range(lctx.mask_BT.shape[0]):
        for t in range(lctx.mask_BT.shape[1]):
            if lctx.mask_BT[b, t]:
                yield b, t


def row_length(lctx, b):
    return int(lctx.mask_BT[b].sum())


def clip_term(r, a, low, high):
    return -min(r * a, min(max(r, 1 - low), 1 + high) * a)


def token_ratio(lctx, b, t):
    return math.exp(float(lctx.logps_BT[b, t] - lctx.old_logps_BT[b, t]))


def sequence_ratio(lctx, b):
    gaps = [float(lctx.logps_BT[b, t] - lctx.old_logps_BT[b, t]) for bb, t in tokens(lctx) if bb == b]
    return math.exp(sum(gaps) / len(gaps))


def over_rows(lctx, term):
    B = lctx.mask_BT.shape[0]
    return sum(term(b, t) / row_length(lctx, b) for b, t in tokens(lctx)) / B / ACCUMULATION


FORMULAS = {
    "grpo": lambda c: over_rows(c, lambda b, t: clip_term(token_ratio(c, b, t), float(c.adv_BT[b, t]), 0.2, 0.2)),
    "dr_grpo": lambda c: (
        sum(clip_term(token_ratio(c, b, t), float(c.adv_BT[b, t]), 0.2, 0.2) for b, t in tokens(c))
        / (len(LENGTHS) * MAX_TOKENS)
        / ACCUMULATION
    ),
    "bnpo": lambda c: (
        sum(clip_term(token_ratio(c, b, t), float(c.adv_BT[b, t]), 0.2, 0.2) for b, t in tokens(c))
        / int(c.mask_BT.sum())
        / ACCUMULATION
    ),
    "dapo": lambda c: (
        sum(clip_term(token_ratio(c, b, t), float(c.adv_BT[b, t]), 0.2, 0.28) for b, t in tokens(c)) / 20.0
    ),
    "cispo": lambda c: (
        sum(-min(token_ratio(c, b, t), 5.0) * float(c.adv_BT[b, t] * c.logps_BT[b, t]) for b, t in tokens(c)) / 20.0
    ),
    "gspo": lambda c: over_rows(c, lambda b, t: clip_term(sequence_ratio(c, b), float(c.adv_BT[b, 0]), 3e-4, 4e-4)),
    "gspo_token": lambda c: over_rows(
        c, lambda b, t: clip_term(sequence_ratio(c, b), float(c.adv_BT[b, t]), 3e-4, 4e-4)
    ),
    "sapo": lambda c: over_rows(c, lambda b, t: sapo_term(token_ratio(c, b, t), float(c.adv_BT[b, t]))),
}


def sapo_term(r, a):
    tau = 1.0 if a > 0 else 1.05
    return -a * 4 / tau / (1 + math.exp(-tau * (r - 1)))


MEMBERS = {c.name: c for c in vars(pg).values() if isinstance(c, type) and getattr(c, "name", "") in FORMULAS}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_is_the_formula(name, seed):
    lctx = case(seed, row_constant=name == "gspo")
    assert MEMBERS[name]().loss(lctx).item() == pytest.approx(FORMULAS[name](lctx), rel=1e-5)


def gradient(objective, lctx):
    return torch.autograd.grad(objective.loss(lctx), lctx.logps_BT)[0]


def test_gspo_token_routes_credit_and_gspo_does_not():
    """The pitfall of the sheet: with unequal advantages in a row plain GSPO gives every token the same gradient."""
    wide = dict(epsilon_low=10.0, epsilon_high=10.0)
    lctx = case(0)
    token = gradient(pg.GspoToken(**wide), lctx)
    for b, t in tokens(lctx):
        expected = -sequence_ratio(lctx, b) * float(lctx.adv_BT[b, t]) / row_length(lctx, b) / 4 / ACCUMULATION
        assert float(token[b, t]) == pytest.approx(expected, rel=1e-4, abs=1e-8)
    plain = gradient(pg.Gspo(**wide), lctx)
    row = plain[2][lctx.mask_BT[2].bool()]
    torch.testing.assert_close(row, row[:1].expand_as(row))


def test_gspo_token_equals_gspo_for_equal_advantages():
    lctx = case(1, row_constant=True)
    torch.testing.assert_close(gradient(pg.GspoToken(), lctx), gradient(pg.Gspo(), lctx))


def test_sapo_gradient_weight():
    lctx = case(2)
    found = gradient(pg.Sapo(), lctx)
    for b, t in tokens(lctx):
        a, r = float(lctx.adv_BT[b, t]), token_ratio(lctx, b, t)
        tau = 1.0 if a > 0 else 1.05
        q = 1 / (1 + math.exp(-tau * (r - 1)))
        assert float(found[b, t]) == pytest.approx(
            -4 * q * (1 - q) * r * a / row_length(lctx, b) / 8, rel=1e-4, abs=1e-7
        )


def test_masked_tokens_have_no_gradient():
    for objective in (c() for c in MEMBERS.values()):
        lctx = case(3, row_constant=objective.name == "gspo")
        lctx.adv_BT = lctx.adv_BT + (1 - lctx.mask_BT)  # even if something wrote there
        assert (gradient(objective, lctx)[lctx.mask_BT == 0] == 0).all(), objective.name


def test_kl_term():
    lctx = case(4)
    bare, with_kl = pg.Grpo().loss(lctx), pg.Grpo(beta=0.5).loss(lctx)
    term = 0.0
    for b, t in tokens(lctx):
        gap = float(lctx.ref_logps_BT[b, t] - lctx.logps_BT[b, t])
        term += (math.exp(gap) - gap - 1) * token_ratio(lctx, b, t) / row_length(lctx, b) / 4 / ACCUMULATION
    assert float(with_kl - bare) == pytest.approx(0.5 * term, rel=1e-4)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "sapo"])
def test_row_weights_of_equal_rows_change_nothing(name):
    lctx = case(5)
    plain = MEMBERS[name]().loss(lctx)
    lctx.row_weight_B = torch.full((4,), 0.25)
    torch.testing.assert_close(MEMBERS[name]().loss(lctx), plain)


# ---------------------------------------------------------------- advantages


def trajs(rewards, group=2):
    return [Trajectory(f"r{i}", i // group, i % group, [Segment([1], [2] * (1 + i % 3))], rewards={"task": r})
            for i, r in enumerate(rewards)]  # fmt: skip


def test_group_advantages_by_scaling(fake_context):
    ctx = fake_context(trajs([1.0, 0.0, 3.0, 3.0]))
    std = math.sqrt(0.5)
    assert pg.Grpo().group_advantages(ctx).tolist() == pytest.approx([0.5 / (std + 1e-4), -0.5 / (std + 1e-4), 0, 0])
    assert pg.DrGrpo().group_advantages(ctx).tolist() == pytest.approx([0.5, -0.5, 0, 0])
    batch_std = torch.tensor([1.0, 0, 3, 3]).std().item()
    assert pg.Grpo(scale_rewards="batch").group_advantages(ctx)[0].item() == pytest.approx(0.5 / (batch_std + 1e-4))


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5, width=32)), min_size=1, max_size=20))
def test_group_stats_equal_numpy(pairs):
    import numpy as np

    group = torch.tensor([g for g, _ in pairs])
    values = torch.tensor([v for _, v in pairs])
    mean, std = group_stats(values, group)
    for g in {g for g, _ in pairs}:
        member = values[group == g].numpy()
        assert float(mean[group == g][0]) == pytest.approx(member.mean(), abs=1e-4)
        spread = member.std(ddof=1) if len(member) > 1 else 0.0
        assert float(std[group == g][0]) == pytest.approx(np.float64(spread), abs=1e-3)


def test_reward_sits_on_the_last_model_token_of_the_last_row(fake_context):
    t = [Trajectory("a", 0, 0, [Segment([1], [2, 3]), Segment([1], [4, 5, 6], model_mask=[1, 1, 0])])]
    ctx = fake_context(t)
    placed = place_on_last_token(torch.tensor([2.0]), ctx.batch)
    assert placed.tolist() == [[0, 0, 0], [0, 2.0, 0]]


@settings(max_examples=30)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=6), st.sampled_from([1.0, 0.9]))
def test_discounted_returns_by_recursion(rewards, gamma):
    found = discounted_returns(torch.tensor([rewards]), torch.ones(1, len(rewards)), gamma)[0].tolist()
    running, expected = 0.0, []
    for r in reversed(rewards):
        running = r + gamma * running
        expected.append(running)
    assert found == pytest.approx(expected[::-1], abs=1e-5)


def test_returns_pass_over_tool_tokens():
    found = discounted_returns(torch.tensor([[1.0, 9.0, 1.0]]), torch.tensor([[1, 0, 1]]), 0.5)
    assert found.tolist() == [[1.5, 0.0, 1.0]]


def test_returns_run_on_over_the_rows_of_a_trajectory():
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    found = trajectory_returns(rewards, mask, torch.tensor([0, 0, 1]), 0.5)
    assert found.tolist() == [[0.125, 0.25], [0.5, 1.0], [2.0, 0.0]]


def test_reinforce_pp_is_whitened_over_all_tokens(fake_context):
    ctx = fake_context(trajs([1.0, 0.0, 0.0, 1.0]))
    adv = ReinforcePP().advantages(ctx)
    values = adv[ctx.batch.model_mask_ST.bool()]
    assert float(values.mean()) == pytest.approx(0, abs=1e-6) and float(values.var()) == pytest.approx(1, rel=1e-4)
    assert (adv[0][ctx.batch.model_mask_ST[0].bool()] > 0).all()


def test_reinforce_pp_with_kl_in_the_reward(fake_context):
    ctx = fake_context(trajs([1.0, 0.0]))
    b = ctx.batch
    b.old_logps_ST, b.ref_logps_ST = torch.full_like(b.adv_ST, -1.0), torch.full_like(b.adv_ST, -1.5)
    mask = b.model_mask_ST.bool()
    rewards = place_on_last_token(torch.tensor([1.0, 0.0]), b) - 0.1 * 0.5 * b.model_mask_ST
    returns = discounted_returns(rewards, b.model_mask_ST)
    expected = (returns[mask] - returns[mask].mean()) / (returns[mask].var() + 1e-8).sqrt()
    torch.testing.assert_close(ReinforcePP(beta=0.1).advantages(ctx)[mask], expected)


def test_equal_returns_give_no_signal(fake_context):
    t = [Trajectory(f"r{i}", 0, i, [Segment([1], [2, 3])], rewards={"task": 1.0}) for i in range(4)]
    assert (ReinforcePP().advantages(fake_context(t)) == 0).all()
