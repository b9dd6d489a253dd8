"""PPO against the sheet's worked numbers, plain loops, and tensors captured from a real step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import LossContext, Segment, Trajectory
from methods.numerics import generalised_advantages, next_values
from methods.objectives.ppo import Critic, Ppo, clipped_value_loss

LENGTHS = (11, 6, 12)
T = 12


def worked(fake_context, lam=1.0, beta=0.0):
    """The worked example of VSRM's sheet: rewards on tokens of three rows, values 0.1 (t + 1) / 12."""
    trajs = [
        Trajectory(str(i), i, 0, [Segment([1], list(range(2, 2 + n)))], rewards={"task": 0.0})
        for i, n in enumerate(LENGTHS)
    ]
    ctx = fake_context(trajs)
    rewards_ST = torch.zeros(3, T)
    for t, r in ((2, 0.28), (5, 0.4), (8, -0.2), (10, 1.0)):
        rewards_ST[0, t] = r
    rewards_ST[2, 4], rewards_ST[2, 11] = -0.8, -10.0
    ctx.token_rewards_ST = rewards_ST
    objective = Ppo(lam=lam, beta=beta)
    values_ST = (0.1 * (torch.arange(T) + 1) / 12).expand(3, T) * ctx.batch.model_mask_ST
    objective.old_values = lambda ctx: values_ST
    return objective, ctx, values_ST


def test_worked_advantages_and_value_targets(fake_context):
    objective, ctx, _ = worked(fake_context)
    adv_ST = objective.advantages(ctx)
    at = [0, 2, 5, 8, 10]
    expected = [
        [0.962442, 0.959452, 0.904748, 0.828520, 0.861402],
        [0.696989, 0.694000, 0.689516, 0, 0],
        [-1.240099, -1.243089, -1.104085, -1.108569, -1.111558],
    ]
    torch.testing.assert_close(adv_ST[:, at], torch.tensor(expected), atol=2e-6, rtol=0)
    returns_ST = ctx.batch.extras["returns"]
    row = [1.48] * 3 + [1.2] * 3 + [0.8] * 3 + [1.0] * 2 + [0.0]
    torch.testing.assert_close(returns_ST[0], torch.tensor(row), atol=1e-5, rtol=0)
    torch.testing.assert_close(returns_ST[2], torch.tensor([-10.8] * 5 + [-10.0] * 7), atol=1e-5, rtol=0)


def test_worked_advantages_with_lambda(fake_context):
    objective, ctx, _ = worked(fake_context, lam=0.95)
    adv_ST = objective.advantages(ctx)
    expected = [
        [0.921125, 0.942738, 0.904825, 0.828552, 0.890913],
        [0.682674, 0.678526, 0.671449, 0, 0],
        [-0.765477, -0.926073, -1.007229, -1.294733, -1.512506],
    ]
    torch.testing.assert_close(adv_ST[:, [0, 2, 5, 8, 10]], torch.tensor(expected), atol=2e-6, rtol=0)


def test_worked_policy_and_value_loss(fake_context):
    objective, ctx, values_ST = worked(fake_context)
    adv_ST = objective.advantages(ctx)
    mask_ST = ctx.batch.model_mask_ST
    drift = 0.5 * torch.sin(12.0 * torch.arange(3).unsqueeze(1) + torch.arange(T))
    lctx = context(drift, mask_ST, adv_ST)
    ratio = torch.exp(objective.log_ratio(lctx))
    policy = (objective.token_loss(ratio, lctx) * mask_ST).sum() / mask_ST.sum()
    assert float(policy) == pytest.approx(0.063287, abs=1e-6)
    value = clipped_value_loss(values_ST + 0.3, values_ST, ctx.batch.extras["returns"], 0.5)
    assert float((value * mask_ST).sum() / mask_ST.sum()) == pytest.approx(23.802600, abs=1e-4)


def context(logps, mask, adv, old=None, **more):
    return LossContext(
        logps_BT=logps,
        entropies_BT=torch.zeros_like(logps),
        mask_BT=mask,
        adv_BT=adv,
        old_logps_BT=torch.zeros_like(logps) if old is None else old,
        ref_logps_BT=None,
        denominator_tokens=mask.sum().float(),
        accumulation=1,
        max_completion_tokens=T,
        **more,
    )


def test_dual_clip():
    one = torch.ones(1, 1)
    lctx = context(2 * one, one, -one)
    assert float(Ppo().token_loss(torch.exp(lctx.logps_BT), lctx)) == pytest.approx(3.0)
    assert float(Ppo(dual_clip=100.0).token_loss(torch.exp(lctx.logps_BT), lctx)) == pytest.approx(math.exp(2))


def test_kl_in_the_reward(fake_context):
    _, ctx, _ = worked(fake_context, beta=0.01)
    mask_ST = ctx.batch.model_mask_ST
    ctx.batch.old_logps_ST, ctx.batch.ref_logps_ST = -1.0 * mask_ST, -1.5 * mask_ST
    from methods.objectives.credit import rewards_on_tokens

    rewards_ST, _ = rewards_on_tokens(ctx, 0.01)
    torch.testing.assert_close(rewards_ST[0, :3], torch.tensor([-0.005, -0.005, 0.275]))


def test_value_clipping_takes_the_larger_error():
    old, target = torch.tensor(0.0), torch.tensor(1.0)
    # A value that ran past the clip range towards the target is judged where the range ends.
    assert float(clipped_value_loss(torch.tensor(0.9), old, target, 0.5)) == pytest.approx(0.5 * 0.25)
    assert float(clipped_value_loss(torch.tensor(0.2), old, target, 0.5)) == pytest.approx(0.5 * 0.64)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.9, 0.5]), st.sampled_from([1.0, 0.95, 0.0]))
def test_gae_by_recursion_over_the_tokens_of_a_trajectory(seed, gamma, lam):
    g = torch.Generator().manual_seed(seed)
    traj_S = torch.tensor([0, 0, 1, 2, 2, 2])
    mask_ST = (torch.rand(6, 5, generator=g) < 0.7).long()
    rewards_ST = torch.randn(6, 5, generator=g, dtype=torch.double) * mask_ST
    values_ST = torch.randn(6, 5, generator=g, dtype=torch.double) * mask_ST
    found = generalised_advantages(rewards_ST, values_ST, mask_ST, traj_S, gamma, lam)
    for traj in range(3):
        cells = [(s, t) for s in range(6) for t in range(5) if traj_S[s] == traj and mask_ST[s, t]]
        running, value = 0.0, 0.0
        for s, t in reversed(cells):
            delta = float(rewards_ST[s, t]) + gamma * value - float(values_ST[s, t])
            running, value = delta + gamma * lam * running, float(values_ST[s, t])
            assert float(found[s, t]) == pytest.approx(running, abs=1e-9)
    assert bool((found[mask_ST == 0] == 0).all())


def test_next_value_ends_with_the_trajectory():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    assert next_values(values, mask, torch.tensor([0, 1])).tolist() == [[3, 0, 0], [0, 6, 0]]
    assert next_values(values, mask, torch.tensor([0, 0])).tolist() == [[3, 0, 5], [0, 6, 0]]


def test_critic_starts_at_zero_and_leaves_the_policy_alone(random_model):
    critic = Critic(random_model.model)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert critic(ids, torch.ones_like(ids), 2).tolist() == [[0.0, 0.0]]
    mine = {p.data_ptr() for p in critic.parameters()}
    assert not mine & {p.data_ptr() for p in random_model.model.parameters()}


def test_critic_reads_the_state_before_the_token(random_model):
    critic = Critic(random_model.model)
    torch.nn.init.normal_(critic.head.weight)
    a, b = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    assert torch.equal(critic(a, torch.ones_like(a), 1), critic(b, torch.ones_like(b), 1))
    c = torch.tensor([[5, 6, 9, 8]])
    assert not torch.equal(critic(a, torch.ones_like(a), 1), critic(c, torch.ones_like(c), 1))


def test_losses_of_a_real_step_equal_plain_loops(make_trainer):
    """Policy and value loss of a captured second pass, off policy, against loops over tokens."""
    seen = []

    class Capture(Ppo):
        def loss(self, lctx):
            total = super().loss(lctx)
            with torch.no_grad():
                values = self.critic(lctx.ids_BL, lctx.attention_BL, lctx.mask_BT.shape[1])
            seen.append((lctx, values, float(total.detach())))
            return total

    trainer = make_trainer([], Capture(value_clip=0.05), iterations=2, max_steps=4, learning_rate=1e-2)
    trainer.train()
    assert any(float((c.logps_BT - c.old_logps_BT).abs().max()) > 0.01 for c, *_ in seen)
    for c, values, total in seen:
        policy = value = 0.0
        for b, t in c.mask_BT.nonzero().tolist():
            x, a = math.exp(float(c.logps_BT[b, t] - c.old_logps_BT[b, t])), float(c.adv_BT[b, t])
            one = max(-a * x, -a * min(max(x, 0.8), 1.2))
            policy += min(one, -3.0 * a) if a < 0 else one
            v, old, ret = (float(y[b, t]) for y in (values, c.extras["old_values"], c.extras["returns"]))
            near = min(max(v, old - 0.05), old + 0.05)
            value += 0.5 * max((v - ret) ** 2, (near - ret) ** 2)
        assert total == pytest.approx((policy + value) / float(c.denominator_tokens), rel=1e-4, abs=1e-6)


def test_the_critic_learns_a_constant_reward(make_trainer):
    trainer = make_trainer(
        [], Ppo(critic_learning_rate=1e-2), reward=lambda texts, rows: [0.7] * len(texts), max_steps=40
    )
    trainer.train()
    ctx = trainer.last_ctx
    values = ctx.batch.extras["old_values"][ctx.batch.model_mask_ST.bool()]
    assert abs(float(values.mean()) - 0.7) < 0.1
    returns = ctx.batch.extras["returns"][ctx.batch.model_mask_ST.bool()]
    torch.testing.assert_close(returns, torch.full_like(returns, 0.7))


def test_unscorable_trajectories_neither_train_the_policy_nor_the_critic(fake_context):
    objective, ctx, values_ST = worked(fake_context)
    ctx.token_rewards_ST = None
    ctx.trajs[1].rewards["task"] = math.nan
    ctx.trajs[0].rewards["task"] = 1.0
    adv_ST = objective.advantages(ctx)
    assert adv_ST[1].abs().sum() == 0 and adv_ST[0, :11].abs().min() > 0
    assert torch.equal(ctx.batch.extras["returns"][1], values_ST[1])


def test_equal_rewards_before_the_critic_has_learned_give_no_signal(fake_context):
    objective, ctx, values_ST = worked(fake_context)
    objective.old_values = lambda ctx: torch.zeros_like(values_ST)
    ctx.token_rewards_ST = torch.zeros(3, T)
    assert objective.advantages(ctx).abs().sum() == 0


def test_critic_and_optimiser_survive_a_checkpoint(make_trainer, tmp_path):
    """Four steps in one go equal two, a checkpoint, and two more: weights, critic and losses."""
    whole = make_trainer([], Ppo(), max_steps=4, save_strategy="steps", save_steps=2, folder=tmp_path / "a")
    states = {}

    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kw):
            import copy

            states[state.global_step] = copy.deepcopy(whole.state_dict())

    whole.add_callback(Keep())
    whole.train()
    again = make_trainer([], Ppo(), max_steps=4, save_strategy="steps", save_steps=2, folder=tmp_path / "b")
    again.load_state_dict(states[2])
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    a, b = whole.state_dict()["modules"], again.state_dict()["modules"]
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_refusals():
    from methods.errors import ConfigError
    from methods.ha_dw import HaDw
    from methods.srft import Srft
    from methods.stack import Stack

    for method in (HaDw(), Srft()):
        with pytest.raises(ConfigError) as refused:
            Stack([method], Ppo())
        assert "ppo" in str(refused.value) and refused.value.fix == "choose objective=grpo"
