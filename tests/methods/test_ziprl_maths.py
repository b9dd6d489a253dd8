"""ZipRL's maths: quality of a compression, hindsight response replay, the loss over rows, and the allocation theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import LossContext
from methods.errors import ConfigError
from methods.numerics import group_stats
from methods.objectives.policy_gradient import Grpo
from methods.ziprl.allocation import follows_margins, utility, water_filling
from methods.ziprl.credit import corrections, on_tokens, row_weights
from methods.ziprl.quality import PARTS, Scale, asked_level, keywords, quality, relevance

NAN = math.nan
DOCUMENT = (
    "Marie Curie was born in Warsaw in 1867. She moved to Paris to study physics at the Sorbonne. In 1903 she shared"
    " the Nobel Prize in Physics with Pierre Curie. The weather in Paris is mild. In 1911 she won the Nobel Prize in"
    " Chemistry."
)
QUESTION = "In which year did Marie Curie win the Nobel Prize in Chemistry?"


# ---- Q_com ----
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Marie Curie moved to Paris to study physics. In 1911 she won the Nobel Prize.",
            (1, 0.875, 0.9, 1, 0.9475),
        ),
        ("The weather in Paris is (mild", (0.311403, 0.784365, 0.166667, 0.5, 0.338524)),
    ],
)
def test_worked_example_of_the_quality(text, expected):
    got = quality(DOCUMENT, text, 3, QUESTION)
    assert [got[p] for p in PARTS] == pytest.approx(expected, abs=5e-7)


def test_short_documents_and_coarse_levels_by_hand():
    """hi' = max(hi, 4 / n(d)) and max(hi, 1 / s(d)) let any zip of a short document keep a sentence; the targets of
    cover and retain shrink with hi."""
    got = quality("Rain fell.", "Rain fell.", 1)
    assert [got[p] for p in PARTS] == pytest.approx((1, 1, 1, 0.75, 0.95))
    ten = "Alpha one. Beta two. Gamma three. Delta four. Omega five."
    got = quality(ten, "Alpha.", 1)  # one of ten words and of five sentences: hi' = 0.4 and 0.2
    assert [got[p] for p in PARTS] == pytest.approx((1, 1, 1, 0.75, 0.95))
    got = quality(ten, "Alpha.", 3)  # m = ceil(0.45 x 10) = 5, retain = 1 / 4.5
    level = math.exp(-(0.25 - 0.2) / 0.25)
    assert [got[p] for p in PARTS[:3]] == pytest.approx((math.exp(-1.5), level, 0.5 / 5 + 0.5 / 4.5))


def test_worked_example_of_relevance_and_keywords():
    assert relevance(DOCUMENT, QUESTION) == 0.625 and asked_level(0.625) == 4
    assert keywords(DOCUMENT, QUESTION)[:5] == ["curie", "nobel", "prize", "marie", "chemistry"]
    assert [asked_level(rho) for rho in (0, 0.19, 0.2, 0.6, 1.0)] == [1, 1, 2, 4, 5]


@given(st.text(max_size=120), st.text(max_size=80), st.integers(-1, 7), st.text(max_size=40))
@settings(deadline=None, max_examples=80)
def test_every_part_lies_between_0_and_1(document, text, level, question):
    got = quality(document, text, level, question)
    assert set(got) == set(PARTS) and all(0 <= v <= 1 for v in got.values())


@pytest.mark.parametrize(
    ("document", "text", "level"), [("", "a b", 3), ("a b", "", 3), ("a b", "a", 0), ("a", "a", 6)]
)
def test_nothing_to_judge_gives_0(document, text, level):
    assert set(quality(document, text, level, "a").values()) == {0.0}


def test_every_level_can_be_perfect_in_ratio_and_none_favours_length():
    document = " ".join(f"w{i}" for i in range(100)) + "."
    for level, (low, high) in enumerate(Scale().intervals, start=1):
        kept = " ".join(f"w{i}" for i in range(round(50 * (low + high)))) + "."
        assert quality(document, kept, level)["ratio"] == 1.0
    long = quality(document, document, 1)
    assert long["ratio"] < 0.001 and long["com"] < quality(document, document, 5)["com"]


@pytest.mark.parametrize(
    "bad", [{"weights": (0.5, 0.5)}, {"weights": (1, 1, 1, 1)}, {"intervals": ((0, 1),)}, {"weights": (NAN, 1, 0, 0)}]
)
def test_scales_that_cannot_be_right_are_refused(bad):
    with pytest.raises(ConfigError):
        Scale(**bad)


# ---- hindsight response replay ----
QUALITIES = [[0.8, 0.6, 0.7, NAN], [NAN, 0.2, 0.9, NAN], [0.5, NAN, NAN, NAN], [0.4, 0.4, 0.4, 0.8]]
CORRECTED = [[0.1, -0.1, 0, 0], [0, -0.35, 0.35, 0], [0, 0, 0, 0], [-0.1, -0.1, -0.1, 0.3]]
TRAJ_M = torch.arange(4).repeat_interleave(4)
ADVANTAGES = [
    [1.325310, 1.285310, 1.305310, 1.305310],
    [-0.783186, -0.853186, -0.713186, -0.783186],
    [0.261062] * 4,
    [-0.803186, -0.803186, -0.803186, -0.723186],
]


def turn_advantages(rewards):
    mean, std = group_stats(torch.tensor(rewards), torch.zeros(4))
    adv_N = (torch.tensor(rewards) - mean) / (std + 1e-4)
    return adv_N[TRAJ_M] + 0.2 * corrections(torch.tensor(QUALITIES).flatten(), TRAJ_M)


def test_worked_example_of_hindsight_response_replay():
    correction_M = corrections(torch.tensor(QUALITIES).flatten(), TRAJ_M)
    torch.testing.assert_close(correction_M.view(4, 4), torch.tensor(CORRECTED))
    torch.testing.assert_close(
        turn_advantages([1.0, 0, 0.5, 0]).view(4, 4), torch.tensor(ADVANTAGES), atol=1e-6, rtol=0
    )


def test_a_group_with_equal_rewards_is_alive():
    turns = turn_advantages([0.0, 0, 0, 0]).view(4, 4)
    torch.testing.assert_close(turns[3], torch.tensor([-0.02, -0.02, -0.02, 0.06]))
    torch.testing.assert_close(turns[1], torch.tensor([0, -0.07, 0.07, 0]))
    assert not turns[2].any()


def test_worked_example_on_tokens():
    turn_ST = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, 2, 3]])
    got = on_tokens(torch.tensor(ADVANTAGES[0]), torch.tensor([0]), torch.tensor([0]), turn_ST)
    a, b, c = 1.325310, 1.285310, 1.305310
    torch.testing.assert_close(got, torch.tensor([[0, a, a, 0, b, b, b, 0, c, c]]))


turns_of = st.lists(st.lists(st.one_of(st.just(NAN), st.floats(0, 1)), min_size=1, max_size=6), min_size=1, max_size=5)


@given(turns_of, st.floats(-3, 3))
@settings(deadline=None, max_examples=80)
def test_corrections_sum_to_0_and_ignore_a_constant(qualities, shift):
    traj_M = torch.tensor([i for i, q in enumerate(qualities) for _ in q])
    q_M = torch.tensor([x for q in qualities for x in q], dtype=torch.float64)
    got_M = corrections(q_M, traj_M)
    sums_N = torch.zeros(len(qualities), dtype=torch.float64).index_add(0, traj_M, got_M)
    assert sums_N.abs().max() < 1e-9 and not got_M[q_M.isnan()].any() and torch.isfinite(got_M).all()
    torch.testing.assert_close(corrections(q_M + shift, traj_M), got_M)
    for i, q in enumerate(qualities):
        if sum(not math.isnan(x) for x in q) <= 1:
            assert not got_M[traj_M == i].any()


def test_nothing_at_all_has_no_correction():
    assert corrections(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    empty = on_tokens(torch.zeros(0), torch.zeros(1, dtype=torch.long), torch.tensor([0]), torch.full((1, 3), -1))
    assert empty.tolist() == [[0, 0, 0]]


def test_rows_weigh_1_over_the_live_turns_of_their_trajectory():
    mask_ST = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]])
    assert row_weights(torch.tensor([0, 0, 0, 1]), mask_ST).tolist() == [0.5, 0.5, 0, 1]


def test_worked_example_of_the_loss():
    gaps = torch.tensor([[0, 0.1], [0.3, 0], [-0.5, 0.2]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    adv_B = torch.tensor([ADVANTAGES[0][0], ADVANTAGES[0][1], ADVANTAGES[1][1]])
    weight = row_weights(torch.tensor([0, 0, 1]), mask)
    assert weight.tolist() == [0.5, 0.5, 1]
    lctx = LossContext(
        logps_BT=gaps - 1,
        entropies_BT=torch.zeros(3, 2),
        mask_BT=mask,
        adv_BT=adv_B.unsqueeze(1) * mask,
        old_logps_BT=torch.full((3, 2), -1.0),
        ref_logps_BT=None,
        denominator_tokens=mask.sum(),
        accumulation=1,
        max_completion_tokens=2,
        row_weight_B=weight / weight.sum(),
    )
    assert Grpo().loss(lctx).item() == pytest.approx(-0.303185, abs=1e-6)


# ---- allocation ----
def test_worked_example_of_the_allocation():
    r = np.array([0.9, 0.5, 0.1])
    best = water_filling(r, 3)
    np.testing.assert_allclose(best, [2.214286, 0.785714, 0], atol=1e-6)
    assert utility(r, best) == pytest.approx(1.340754, abs=1e-6)
    assert utility(r, np.ones(3)) == pytest.approx(1.039721, abs=1e-6)
    middle = np.array([1.5, 1, 0.5])
    assert follows_margins(r, middle) and utility(r, middle) == pytest.approx(1.211782, abs=1e-6)


def test_the_order_of_relevance_alone_is_not_enough_and_the_condition_not_necessary():
    r, b = np.array([1, 0.99]), np.array([3.0, 0])
    assert utility(r, b) == pytest.approx(1.386294, abs=1e-6) and not follows_margins(r, b)
    assert utility(r, np.array([1.5, 1.5])) == pytest.approx(1.823418, abs=1e-6)
    r, b = np.array([0.9, 0.5, 0.1]), np.array([3.0, 0, 0])
    assert utility(r, b) == pytest.approx(1.247665, abs=1e-6) and not follows_margins(r, b)


relevances = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(np.array)


@given(relevances, st.floats(0, 20), st.integers(0, 2**31))
@settings(deadline=None, max_examples=120)
def test_water_filling_spends_the_budget_and_no_division_beats_it(r, budget, seed):
    best = water_filling(r, budget)
    assert (best >= 0).all() and best.sum() == pytest.approx(budget, abs=1e-7)
    other = budget * np.random.default_rng(seed).dirichlet(np.ones(len(r)))
    assert utility(r, best) >= utility(r, other) - 1e-9
    if follows_margins(r, other):
        assert utility(r, other) >= utility(r, np.full(len(r), budget / len(r))) - 1e-9


@pytest.mark.parametrize(("r", "budget"), [([], 1), ([-1, 1], 1), ([1], -1)])
def test_water_filling_refuses_the_impossible(r, budget):
    with pytest.raises(ValueError, match="water-filling"):
        water_filling(np.array(r), budget)


# ---- the mechanism without a language model ----
def tabular(kind: str, seed: int, steps: int = 300, group: int = 8, turns: int = 6) -> float:
    """Mean quality of a softmax policy (5 bins of relevance -> 5 levels) after training; reward 1 if all are right."""
    rng = np.random.default_rng(seed)
    logits, every = np.zeros((5, 5)), np.arange(5)
    for _ in range(steps):
        bins = rng.integers(0, 5, (group, turns))
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        levels = (p[bins].cumsum(-1) < rng.random((group, turns, 1))).sum(-1).clip(max=4)
        q = 1 - np.abs(levels - bins) / 4
        reward = torch.tensor((levels == bins).all(1), dtype=torch.float64)
        mean, std = group_stats(reward, torch.zeros(group))
        adv = ((reward - mean) / (std + 1e-4))[:, None].repeat(1, turns)
        if kind != "grpo":
            given = rng.permuted(q, axis=1) if kind == "shuffled" else q
            traj_M = torch.arange(group).repeat_interleave(turns)
            adv = adv + 0.2 * corrections(torch.tensor(given).flatten(), traj_M).view(group, turns)
        gradient = np.zeros_like(logits)
        score = (levels[..., None] == every) - p[bins]
        np.add.at(gradient, bins, adv.numpy()[..., None] * score)
        logits += 0.5 * gradient / group
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float((p * (1 - np.abs(every[:, None] - every) / 4)).sum(1).mean())


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("grpo", 0.6, 0.62), ("hrr", 0.997, 1.0), ("shuffled", 0.595, 0.605)]
)
def test_hindsight_replay_learns_where_the_outcome_alone_says_nothing(kind, low, high):
    got = np.mean([tabular(kind, seed) for seed in range(5)])
    assert low <= got <= high, got
