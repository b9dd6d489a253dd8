"""The sheet's checks that SRFT's mechanism works, on its worked example and on micro-batches of real steps.

Check 8 (token shifts) belongs to the analysis; the traces of check 1 over a whole run are in results/srft_addition.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import LossContext
from methods.objectives.policy_gradient import Grpo
from methods.srft import Srft, srft_terms

TERMS = ("demo_sft", "demo_rl", "self_pos", "self_neg")


def total(terms):
    return sum(terms[name] for name in TERMS)


def rows_of(kinds, logps, entropies, advantages):
    """A LossContext over rows of one length; kinds 2 demonstration, 1 and -1 rollout."""
    kinds, width = torch.tensor(kinds, dtype=torch.float64), logps.shape[1]
    tokens = {"demo": float((kinds == 2).sum() * width), "roll": float((kinds.abs() == 1).sum() * width)}
    extras = {f"srft_{name}_tokens": torch.full_like(kinds, value) for name, value in tokens.items()}
    return LossContext(
        logps_BT=logps,
        entropies_BT=entropies,
        mask_BT=torch.ones_like(logps),
        adv_BT=advantages,
        old_logps_BT=logps.detach(),
        ref_logps_BT=None,
        denominator_tokens=torch.tensor(float(logps.numel())),
        accumulation=1,
        max_completion_tokens=width,
        extras={"srft_kind": kinds, **extras},
    )


def as_released(lctx):
    """The first term with `exp(+H)`, the sign of the released code."""
    entropy = (lctx.entropies_BT.detach() * lctx.mask_BT).sum(1) / lctx.mask_BT.sum(1)
    logp = (lctx.logps_BT * lctx.mask_BT).sum(1)
    demo = lctx.extras["srft_kind"] == 2
    return -(0.5 * torch.exp(entropy) * logp)[demo].sum() / lctx.extras["srft_demo_tokens"][0]


@pytest.fixture
def captured(make_trainer):
    """captured(rewards of the slots, ...) -> every micro-batch of one real step, with its terms, and the trainer.

    The last of the four slots is the demonstration; `wrong(row)` says which demonstrations the verifier rejects.
    """

    def make(rewards=(1.0, 0.0, 1.0, 1.0), wrong=lambda row: False, steps=1, **keys):
        seen = []

        def reward(texts, rows):
            return [0.0 if wrong(rows[i]) and i % 4 == 3 else rewards[i % 4] for i in range(len(texts))]

        trainer = make_trainer([Srft()], reward=reward, max_steps=steps, max_completion_length=12, **keys)
        plain = trainer.stack.loss

        def spy(lctx):
            parameters = list(trainer.model.parameters())
            terms = srft_terms(lctx)
            losses = {name: terms[name] for name in TERMS} | {"released": as_released(lctx)}
            norms = {
                name: float(
                    torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters, retain_graph=True)]).norm()
                )
                for name, x in losses.items()
            }
            seen.append((lctx, terms, norms))
            return plain(lctx)

        trainer.stack.loss = spy
        trainer.train()
        return seen, trainer

    return make


# ---------------------------------------------------------------- 1: the weights


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 8))
def test_1_each_row_s_weights_follow_its_entropy(h):
    logps = torch.full((2, 3), -1.0, dtype=torch.float64)
    entropies = torch.full((2, 3), h, dtype=torch.float64)
    terms = srft_terms(rows_of([2, 1], logps, entropies, torch.ones_like(logps)))
    assert float(terms["w_sft"]) * math.exp(h) == pytest.approx(0.5, rel=1e-5)
    assert float(terms["w_rl"]) * math.exp(-h) == pytest.approx(0.1, rel=1e-5)
    assert float(terms["w_sft"] * terms["w_rl"]) == pytest.approx(0.05, rel=1e-5)


def test_1_numbers_of_the_sheet():
    for h, sft, rl in ((1.0, 0.183940, 0.271828), (0.2, 0.409365, 0.122140)):
        logps = torch.full((2, 3), -1.0, dtype=torch.float64)
        terms = srft_terms(rows_of([2, 1], logps, torch.full_like(logps, h), torch.ones_like(logps)))
        assert (float(terms["w_sft"]), float(terms["w_rl"])) == pytest.approx((sft, rl), abs=1e-6)


def test_fixed_weights_do_not_see_the_entropy():
    logps = torch.full((2, 3), -1.0, dtype=torch.float64)
    lctx = rows_of([2, 1], logps, torch.full_like(logps, 3.0), torch.ones_like(logps))
    terms = srft_terms(lctx, 0.1, 1.0, entropy_weights=False)
    assert (float(terms["w_sft"]), float(terms["w_rl"])) == (pytest.approx(0.1), 1.0)


def test_an_entropy_that_is_no_number_raises():
    logps = torch.full((2, 3), -1.0)
    with pytest.raises(RuntimeError, match="not a number"):
        srft_terms(rows_of([2, 1], logps, torch.full_like(logps, math.nan), torch.ones_like(logps)))


# ---------------------------------------------------------------- 2: stop-gradient


def example_loss(logits, weights=None):
    """The total of three rows as a function of their logits; `weights`: (w_sft, w_rl) per row frozen beforehand."""
    tokens = torch.tensor([[0, 1], [2, 3], [1, 1]])
    logp = torch.log_softmax(logits, -1)
    chosen, entropy = logp.gather(2, tokens.unsqueeze(2)).squeeze(2), -(logp.exp() * logp).sum(-1)
    advantages = torch.tensor([[0.9], [-0.4], [-0.5]], dtype=torch.float64).expand(3, 2)
    if weights is None:
        return total(srft_terms(rows_of([2, 1, -1], chosen, entropy, advantages)))
    demo = (-weights[0] * chosen[0] - chosen[0].exp() * advantages[0]).sum() / 2
    return demo + (-weights[1] * chosen[1]).sum() / 4 + chosen[2].sum() / 4


def weights_at(logits):
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1).mean(1)
    return 0.5 * torch.exp(-entropy[0]), 0.1 * torch.exp(entropy[1])


def finite_differences(function, logits, step=1e-5):
    gradient = torch.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        up, down = logits.clone(), logits.clone()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def test_2_no_gradient_passes_through_the_weights():
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(example_loss(logits), logits)
    frozen = tuple(float(w) for w in weights_at(logits.detach()))
    same = finite_differences(lambda x: example_loss(x, frozen), logits.detach())
    live = finite_differences(lambda x: example_loss(x, weights_at(x)), logits.detach())
    assert float((gradient - same).abs().max()) < 2e-8
    assert float((gradient - live).abs().max()) > 1e-2


# ---------------------------------------------------------------- 3: the sign of the exponent


def test_3_the_released_sign_gives_demonstrations_a_larger_share_of_the_gradient(captured):
    ((_, terms, norms),), _ = captured()
    rest = sum(norms[name] for name in TERMS[1:])
    assert float(terms["entropy_demo"]) > 0.1
    assert norms["released"] / (norms["released"] + rest) > 1.2 * norms["demo_sft"] / (norms["demo_sft"] + rest)


# ---------------------------------------------------------------- 4 and 5: groups without a spread


def test_4_where_all_rollouts_fail_grpo_has_no_gradient_and_srft_has_one(captured, make_trainer):
    failing = make_trainer([], Grpo(), reward=lambda texts, rows: [0.0] * len(texts), max_steps=1)
    failing.train()
    assert failing.state.log_history[0]["grad_norm"] == 0
    ((lctx, terms, _),), trainer = captured(rewards=(0.0, 0.0, 0.0, 1.0))
    assert trainer.state.log_history[0]["grad_norm"] > 0.1
    demo = lctx.extras["srft_kind"] == 2
    # One right row of four: (1 - 1/4) / 0.5 with the Bessel std.
    assert lctx.adv_BT[demo][:, 0].tolist() == pytest.approx([1.5] * 4, abs=1e-3)
    assert float(terms["self_pos"]) == 0 and float(terms["demo_sft"]) > 0 > float(terms["demo_rl"])
    assert trainer.stack.metrics()["srft/all_wrong"] == 1


def test_5_where_all_rows_are_right_the_second_term_is_exactly_zero(captured):
    ((lctx, terms, _),), trainer = captured(rewards=(1.0, 1.0, 1.0, 1.0))
    assert float(lctx.adv_BT.abs().max()) == 0 and float(terms["demo_rl"]) == 0
    assert float(terms["demo_sft"]) > 0 and float(terms["self_pos"]) > 0 and float(terms["self_neg"]) == 0
    assert trainer.stack.metrics()["srft/all_right"] == 1


# ---------------------------------------------------------------- 6: a term is its coefficient on its rows


def test_6_leaving_a_term_out_removes_its_coefficient_on_its_rows(captured):
    ((lctx, terms, _),), _ = captured()
    kind, mask = lctx.extras["srft_kind"], lctx.mask_BT.float()
    logps = lctx.logps_BT.detach()
    n_demo, n_roll = mask[kind == 2].sum(), mask[kind.abs() == 1].sum()
    entropy = ((lctx.entropies_BT.detach() * mask).sum(1) / mask.sum(1)).unsqueeze(1)
    coefficients = {
        "demo_sft": (2, -0.5 * torch.exp(-entropy) / n_demo),
        "demo_rl": (2, -lctx.adv_BT * logps.exp() / n_demo),
        "self_pos": (1, -0.1 * torch.exp(entropy) / n_roll),
        "self_neg": (-1, torch.ones_like(entropy) / n_roll),
    }
    (full,) = torch.autograd.grad(total(terms), lctx.logps_BT, retain_graph=True)
    for name, (wanted, coefficient) in coefficients.items():
        rest = total(terms) - terms[name]
        (without,) = torch.autograd.grad(rest, lctx.logps_BT, retain_graph=True)
        expected = coefficient * mask * (kind == wanted).unsqueeze(1)
        torch.testing.assert_close(full - without, expected, atol=1e-7, rtol=1e-4)
        assert float(expected.abs().max()) > 0


# ---------------------------------------------------------------- 7: poisoned demonstrations


def test_7_wrong_demonstrations_contribute_nothing_and_would_be_pushed_down(captured):
    wrong = {}

    def is_wrong(row):
        return wrong.setdefault(row.id, len(wrong) % 3 == 0)

    seen, trainer = captured(wrong=is_wrong, steps=3)
    rejected = [t for t in trainer.last_ctx.trajs if t.is_demo and wrong[t.row_id]]
    assert rejected and trainer.stack.metrics()["srft/demo_rejected"] == len(rejected)
    for lctx, terms, _ in seen:
        out = lctx.extras["srft_kind"] == 0
        (gradient,) = torch.autograd.grad(total(terms), lctx.logps_BT, retain_graph=True)
        assert out.any() and (gradient[out] == 0).all()
        assert (lctx.adv_BT[out] <= 0).all() and (lctx.extras["demo"][out] == 1).all()


# ---------------------------------------------------------------- 9: a plain reference on a real micro-batch


def reference(lctx):
    """The four terms in plain numpy, row by row and token by token."""
    logps, entropies = (x.detach().double().numpy() for x in (lctx.logps_BT, lctx.entropies_BT))
    mask, adv, kind = lctx.mask_BT.numpy(), lctx.adv_BT.double().numpy(), lctx.extras["srft_kind"].numpy()
    tokens = {2: 0, 1: 0}
    sums = dict.fromkeys(TERMS, 0.0)
    for b in range(len(kind)):
        valid = [t for t in range(mask.shape[1]) if mask[b, t]]
        if kind[b] == 0 or not valid:
            continue
        tokens[2 if kind[b] == 2 else 1] += len(valid)
        h = sum(entropies[b, t] for t in valid) / len(valid)
        for t in valid:
            if kind[b] == 2:
                sums["demo_sft"] -= 0.5 * math.exp(-h) * logps[b, t]
                sums["demo_rl"] -= math.exp(logps[b, t]) * adv[b, t]
            elif kind[b] == 1:
                sums["self_pos"] -= 0.1 * math.exp(h) * logps[b, t]
            else:
                sums["self_neg"] += logps[b, t]
    return {k: v / max(tokens[2] if k.startswith("demo") else tokens[1], 1) for k, v in sums.items()}


def test_9_all_four_terms_equal_the_plain_reference_on_a_real_step(captured):
    ((lctx, terms, _),), _ = captured()
    for name, value in reference(lctx).items():
        assert float(terms[name]) == pytest.approx(value, abs=1e-6), name


def test_micro_batches_add_up_to_the_whole(captured):
    """Denominators belong to the generation: the terms of four micro-batches sum to those of one."""
    parts, _ = captured(rows_per_device=4, seed=7)
    ((_, whole, _),), _ = captured(seed=7)
    for name in TERMS:
        assert sum(float(terms[name]) for _, terms, _ in parts) == pytest.approx(float(whole[name]), abs=1e-5)


def test_a_micro_batch_without_demonstrations_has_a_differentiable_zero():
    logps = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    terms = srft_terms(rows_of([1, -1], logps, torch.ones(2, 3).double(), torch.ones(2, 3).double()))
    (gradient,) = torch.autograd.grad(terms["demo_sft"] + terms["demo_rl"], logps)
    assert float(terms["demo_sft"]) == 0 == float(terms["demo_rl"]) and (gradient == 0).all()
