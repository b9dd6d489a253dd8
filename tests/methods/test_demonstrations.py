"""Demonstrations in groups: which are taken, which are refused, and the two baselines that train on them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments.tokenizers import tiny_tokenizer
from methods.base import LossContext, Segment, Trajectory
from methods.demonstrations import check_rows, demonstrated, demonstrations, encode
from methods.errors import ConfigError, DataError
from methods.luffy import Luffy
from methods.objectives.policy_gradient import Dapo, Grpo
from methods.sft_rl import SftRl
from methods.srft import Srft
from methods.stack import Stack

METHODS = (Srft, SftRl, Luffy)


def row(demo=None, **meta):
    return SimpleNamespace(id="r1", prompt="1+1=", demo=demo, meta=meta)


# ---------------------------------------------------------------- what counts as a demonstration


def test_a_row_has_none_one_or_several():
    assert demonstrations(row()) == [] == demonstrations(row(""))
    assert demonstrations(row("a")) == ["a"]
    assert demonstrations(row("a", demos=["b", "c"])) == ["b", "c"]


@pytest.mark.parametrize("bad", [row(7), row(demos=["a", 3]), row(demos="text"), row(demos=["a", ""])])
def test_anything_but_texts_is_refused(bad):
    with pytest.raises(DataError, match=r"a demonstration is a text.*'r1'"):
        demonstrations(bad)


def test_what_the_tokenizer_cannot_give_back_is_refused_before_training():
    tokenizer = tiny_tokenizer(tuple("0123456789+="))
    check_rows([row("12"), row()], tokenizer, "srft")
    with pytest.raises(DataError, match=r"'r1'.*1<unk>2"):
        check_rows([row("12"), row("1é2")], tokenizer, "srft")


def test_no_demonstration_at_all_is_refused():
    with pytest.raises(DataError, match=r"srft trains on demonstrations.*task\.demo_column"):
        check_rows([row(), row("")], tiny_tokenizer(), "srft")


@pytest.mark.parametrize("method", METHODS)
def test_refused_at_the_first_rollout(method, make_trainer):
    trainer = make_trainer([method()], max_completion_length=12)
    trainer.rows = [replace(r, demo="7é") for r in trainer.rows]
    with pytest.raises(DataError, match="does not give a demonstration back"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_prompt_that_opens_the_thinking_takes_the_opening_off_the_demonstration():
    tokenizer = tiny_tokenizer()
    for prompt, text, expected in (
        ("q<think>\n", "<think>\na", "a"),
        ("q", "<think>\na", "<think>\na"),
        ("q<think>\n", "a", "a"),
    ):
        prompt_ids = tokenizer(prompt)["input_ids"]
        sibling = Trajectory("r1", 3, 0, [Segment(prompt_ids, [1])])
        made = demonstrated(row(text), sibling, 2, encode(tokenizer, [text])[0], text, tokenizer)
        ids = made.segments[0].completion_ids
        assert made.text == expected == tokenizer.decode(ids[:-1]) and ids[-1] == tokenizer.eos_token_id
        assert made.segments[0].prompt_ids == prompt_ids and (made.group_id, made.sample_id) == (3, 2)


# ---------------------------------------------------------------- in the trainer


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_sees_no_demonstration(method, fake_context):
    ctx = fake_context([Trajectory("r", 0, 0, [Segment([1], [2])], rewards={"task": 0.0})])
    ctx.mode = "eval"
    assert method().rollout([row("12")], ctx, lambda rows: "default") == "default"


@pytest.mark.parametrize("method", METHODS)
def test_no_slot_left_and_no_slot_wanted(method, make_trainer):
    with pytest.raises(ConfigError, match=r"at most 3.*rollouts_per_prompt"):
        make_trainer([method(n_demo=4)]).train()
    with pytest.raises(ConfigError, match=rf"method\.{method.name}\.n_demo"):
        method(n_demo=0)


@pytest.mark.parametrize("method", METHODS)
def test_rows_without_a_demonstration_keep_a_group_of_rollouts(method, make_trainer):
    trainer = make_trainer([method()], max_steps=1, max_completion_length=12)
    trainer.rows = [replace(r, demo=r.demo if i % 2 else None) for i, r in enumerate(trainer.rows)]
    trainer.train()
    for group in range(4):
        trajs = trainer.last_ctx.trajs[4 * group : 4 * group + 4]
        assert [t.is_demo for t in trajs] == [False, False, False, trajs[0].row.demo is not None]
    assert trainer.stack.metrics()[f"{method.name}/demos"] == sum(t.is_demo for t in trainer.last_ctx.trajs)


@pytest.mark.parametrize("method", METHODS)
def test_two_demonstrations_per_group(method, make_trainer):
    trainer = make_trainer([method(n_demo=2)], max_steps=1, max_completion_length=12)
    trainer.rows = [replace(r, meta={**r.meta, "demos": [r.demo, "1"]}) for r in trainer.rows]
    trainer.train()
    assert [t.is_demo for t in trainer.last_ctx.trajs] == [False, False, True, True] * 4
    assert {t.text for t in trainer.last_ctx.trajs[2::4]} == {"1"}


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_does_not_depend_on_accumulation(method, make_trainer):
    def norm(rows_per_device):
        trainer = make_trainer([method()], max_steps=1, max_completion_length=12, rows_per_device=rows_per_device)
        trainer.train()
        return trainer.state.log_history[0]["grad_norm"]

    assert [norm(n) for n in (8, 4)] == pytest.approx([norm(16)] * 2, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_refused_on_other_objectives_and_with_a_kl_term_that_would_not_be_seen(method):
    with pytest.raises(ConfigError, match="choose objective=grpo"):
        Stack([method()], Dapo())
    if method is SftRl:
        Stack([method()], Grpo(beta=0.1))
    else:
        with pytest.raises(ConfigError, match=r"owns the loss.*objective\.beta"):
            Stack([method()], Grpo(beta=0.1))
    with pytest.raises(ConfigError, match="two methods own the hook `rollout`"):
        Stack([Srft(), SftRl()], Grpo())


# ---------------------------------------------------------------- the losses against plain references


def captured(make_trainer, method, objective=None, rewards=(1.0, 0.0, 1.0, 1.0), **keys):
    """The stack's loss of one real micro-batch, with everything it was computed from."""
    found = []

    def reward(texts, rows):
        return [rewards[i % 4] for i in range(len(texts))]

    trainer = make_trainer([method], objective, reward=reward, max_steps=1, max_completion_length=12, **keys)
    plain = trainer.stack.loss

    def spy(lctx):
        loss = plain(lctx)
        found.append((loss, lctx, torch.autograd.grad(loss, lctx.logps_BT, retain_graph=True)[0]))
        return loss

    trainer.stack.loss = spy
    trainer.train()
    return (*found[0], trainer)


def test_naive_sum_is_sft_plus_grpo_on_the_rollouts(make_trainer):
    loss, lctx, gradient, trainer = captured(make_trainer, SftRl())
    demo = lctx.extras["demo"].bool()
    mask, logps = lctx.mask_BT.float(), lctx.logps_BT.detach()
    # TRL shuffles the rows of a generation; rewards 1, 0, 1 of the rollouts give these advantages in each group.
    up, down = (1 - 2 / 3) / (3**-0.5 + 1e-4), (0 - 2 / 3) / (3**-0.5 + 1e-4)
    advantages = lctx.adv_BT[~demo][:, 0]
    assert sorted(advantages.tolist()) == pytest.approx([down] * 4 + [up] * 8, abs=1e-5)
    nll = -(logps * mask)[demo].sum() / mask[demo].sum()
    expected = torch.zeros_like(logps)
    expected[demo] = -mask[demo] / mask[demo].sum()
    expected[~demo] = -(advantages.unsqueeze(1) * mask[~demo]) / mask[~demo].sum(1, keepdim=True) / 12
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert float(loss.detach()) == pytest.approx(float(nll - advantages.mean()), abs=1e-5)
    assert [t.rewards["task"] for t in trainer.last_ctx.trajs if not t.is_demo] == [1.0, 0.0, 1.0] * 4


def test_luffy_is_grpo_on_rollouts_and_shaped_on_demonstrations(make_trainer):
    loss, lctx, gradient, _ = captured(make_trainer, Luffy(), Grpo(scale_rewards="none"), rewards=(1.0, 0.0, 0.0, 1.0))
    demo = lctx.extras["demo"].bool()
    mask, logps = lctx.mask_BT.float(), lctx.logps_BT.detach()
    assert set(lctx.adv_BT[demo][:, 0].tolist()) == {0.5}  # 1 - 1/2 over the mixed group, not divided
    pi = logps.exp()
    coefficient = torch.where(demo.unsqueeze(1), 0.1 * pi / (pi + 0.1) ** 2, torch.ones(()))
    torch.testing.assert_close(gradient, -coefficient * lctx.adv_BT * mask / mask.sum(), atol=1e-6, rtol=1e-4)
    value = torch.where(demo.unsqueeze(1), pi / (pi + 0.1), torch.ones(()))
    assert float(loss.detach()) == pytest.approx(float(-(value * lctx.adv_BT * mask).sum() / mask.sum()), abs=1e-5)


def test_luffy_does_not_clip_demonstrations_and_clips_rollouts():
    logps = torch.tensor([[-0.1], [-0.1]], requires_grad=True)
    lctx = LossContext(
        logps_BT=logps,
        entropies_BT=torch.zeros(2, 1),
        mask_BT=torch.ones(2, 1),
        adv_BT=torch.ones(2, 1),
        old_logps_BT=torch.full((2, 1), -1.0),  # both ratios are far above 1.2
        ref_logps_BT=None,
        denominator_tokens=torch.tensor(2.0),
        accumulation=1,
        max_completion_tokens=1,
        extras={"demo": torch.tensor([0.0, 1.0])},
    )
    (gradient,) = torch.autograd.grad(Luffy().loss(lctx), logps)
    assert gradient[0] == 0 and gradient[1] < 0


def test_all_advantages_zero_leave_luffy_without_a_gradient_and_the_naive_sum_with_sft(make_trainer):
    _, _, gradient, _ = captured(make_trainer, Luffy(), rewards=(1.0, 1.0, 1.0, 1.0))
    assert (gradient == 0).all()
    _, lctx, gradient, _ = captured(make_trainer, SftRl(), rewards=(0.0, 0.0, 0.0, 1.0))
    demo = lctx.extras["demo"].bool()
    assert (gradient[~demo] == 0).all() and (gradient[demo][:, 0] < 0).all()
