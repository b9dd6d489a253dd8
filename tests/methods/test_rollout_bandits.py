"""CBS against the worked numbers of its sheet, its degenerate cases, the buffer, and exact resume."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import Batch, ConfigError, Context, LossContext, Segment, Trajectory, assemble
from methods.controls import Flip, Shuffle
from methods.ha_dw import HaDw
from methods.objectives.policy_gradient import Dapo, Grpo, Gspo
from methods.rollout_bandits.buffer import Buffer
from methods.rollout_bandits.features import COLUMN, FEATURES, Scale, clip_ratio, context, facts_of
from methods.rollout_bandits.rollout_bandits import RolloutBandits, gain
from methods.rollout_bandits.scheduler import Scheduler
from methods.rollout_bandits.selection import best, best_of_groups
from methods.stack import Stack

# ---------------------------------------------------------------- the worked example (section 7 of the sheet)


def test_gains_of_the_worked_example():
    for (e, e_next), expected in {(0.9, 1.1): 0.04, (0.7, 1.1): 0.06, (1.1, 0.9): 0.08}.items():
        assert gain(0.40, 0.46, e, e_next, 0.1, 0.8) == pytest.approx(expected)
    assert gain(0.40, 0.46, 0.9, 1.1, 0.1, None) == pytest.approx(0.06)  # before the threshold is known


FACTS = {
    "reward": [1, 0, 0, 1],
    "advantage": [1, -1, -1, 1],
    "group_mean": [0.5] * 4,
    "group_std": [0.5] * 4,
    "length": [20, 64, 30, 10],
    "truncated": [0, 1, 0, 0],
    "entropy": [0.5, 2, 1, 0.25],
    "clip_ratio": [0.5, 0, 1 / 3, 0],
    "age": [0, 1, 2, 3],
    "usage": [0, 1, 0, 2],
}
CONTEXT = [
    [1, 0.333333, 0.5, 1, 0.3125, 0, 0.144270, 0.5, 0, 0],
    [0, -0.333333, 0.5, 1, 1, 1, 0.577078, 0, 0.333333, 0.25],
    [0, -0.333333, 0.5, 1, 0.468750, 0, 0.288539, 0.333333, 0.666667, 0],
    [1, 0.333333, 0.5, 1, 0.156250, 0, 0.072135, 0, 1, 0.5],
]
RATIOS = [[1, 1.3, 0.7, 1.1], [1, 1, 1, 1], [0.9, 1.1, 1.5], [1, 1]]
SCALE = Scale(max_tokens=64, vocab_size=32, rounds=4)


def example_facts():
    return torch.tensor([FACTS[name] for name in FEATURES], dtype=torch.float32).T


def example_batch():
    """The four rollouts; log-probs now and stored have the sheet's ratios, and a masked token far outside."""
    trajs = [
        Trajectory("r", 0, i, [Segment([1], [5] * (len(r) + 1), model_mask=[1] * len(r) + [0])])
        for i, r in enumerate(RATIOS)
    ]
    stored = torch.full((4, 5), -1.0)
    now = torch.zeros(4, 5)
    for i, ratios in enumerate(RATIOS):
        now[i, : len(ratios)] = stored[i, : len(ratios)] + torch.tensor(ratios).log()
    return assemble(trajs, 0), now, stored


def test_features_of_the_worked_example():
    batch, now, stored = example_batch()
    assert clip_ratio(now, stored, batch).tolist() == pytest.approx(FACTS["clip_ratio"], abs=1e-6)
    torch.testing.assert_close(context(example_facts(), SCALE), torch.tensor(CONTEXT), atol=1e-6, rtol=0)


def example_scheduler(**keys):
    scheduler = Scheduler(10, hidden=(4,), **keys)
    i, j = torch.meshgrid(torch.arange(10.0), torch.arange(4.0), indexing="ij")
    parts = [(0.3 * torch.sin(1 + i + 2 * j)).T, 0.05 * torch.cos(j[0]), 0.5 * torch.cos(0.5 + j[0]), torch.zeros(1)]
    with torch.no_grad():
        scheduler.theta.copy_(torch.cat([p.flatten() for p in parts]))
    return scheduler


def test_scores_and_choice_of_the_worked_example():
    scheduler = example_scheduler(exploration="none", warmup=0)
    scheduler.begin(np.random.default_rng(0))
    scores = scheduler.scores(context(example_facts(), SCALE))
    assert scores.tolist() == pytest.approx([0.018267, -0.112007, -0.161935, -0.166852], abs=1e-6)
    assert best_of_groups(scores, torch.zeros(4), 0.5).tolist() == [0, 1]


def test_label_and_losses_of_the_worked_example():
    shared, mean = example_scheduler(loss="shared_label"), example_scheduler(loss="set_mean")
    for value in (-0.02, 0.01, 0.04):
        shared.gains += 1
        gap = value - shared.mean
        shared.mean += gap / shared.gains
        shared.square += gap * (value - shared.mean)
    y = shared.label(0.04)
    assert y == pytest.approx(1.224745, abs=1e-6)
    kept, sizes, labels = context(example_facts(), SCALE)[:2], torch.tensor([2]), torch.tensor([y])
    a, b = shared.loss(kept, sizes, labels), mean.loss(kept, sizes, labels)
    assert a.item() == pytest.approx(1.621247, abs=1e-6) and b.item() == pytest.approx(1.617004, abs=1e-6)
    assert (a - b).item() == pytest.approx(shared.predict(kept).var(correction=0).item(), abs=1e-6)
    a.backward()
    with torch.no_grad():
        shared.theta -= 0.1 * shared.theta.grad
    assert shared.loss(kept, sizes, labels).item() == pytest.approx(0.745133, abs=1e-6)


def test_the_objective_corrects_with_the_stored_log_probs():
    batch, now, stored = example_batch()
    adv_ST = torch.tensor([1.0, -1, -1, 1]).unsqueeze(1) * batch.model_mask_ST
    lctx = LossContext(now, now, batch.model_mask_ST, adv_ST, stored, None, torch.tensor(13.0), 1, 64)
    value = -Grpo().token_loss(torch.exp(now - stored), lctx) * batch.model_mask_ST
    found = value.sum(1) / batch.model_mask_ST.sum(1)
    assert found.tolist() == pytest.approx([1.0, -1.0, -1.166667, 1.0], abs=1e-6)


def small_batch(count, born=0):
    trajs = [
        Trajectory(f"r{i}", i // 2, i % 2, [Segment([1, 2], [3 + i, 4 + born])], finish="stop", text=f"t{born}.{i}")
        for i in range(count)
    ]
    batch = assemble(trajs, 0)
    batch.old_logps_ST = torch.arange(count * 2.0).view(count, 2) - 100 * born
    return batch


def test_buffer_of_the_worked_example():
    buffer = Buffer(2)
    buffer.push(small_batch(3, 1), torch.zeros(3, 10), 1)
    buffer.push(small_batch(2, 2), torch.zeros(2, 10), 2)
    chosen = best(torch.tensor([0.1, 0.9, 0.3, 0.5, 0.5]), 3)
    assert chosen.tolist() == [1, 3, 4]
    buffer.use(chosen)
    assert buffer.facts(2)[:, COLUMN["age"]].tolist() == [1, 1, 1, 0, 0]
    assert buffer.facts(2)[:, COLUMN["usage"]].tolist() == [0, 1, 0, 1, 1]
    buffer.push(small_batch(1, 3), torch.zeros(1, 10), 3)
    assert buffer.facts(3)[:, COLUMN["usage"]].tolist() == [1, 1, 0]
    assert [t.text for t in buffer.take(torch.arange(3)).trajs] == ["t2.0", "t2.1", "t3.0"]


# ---------------------------------------------------------------- choosing


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0.01, 1), st.data())
def test_each_group_keeps_its_share_and_its_best(sizes, share, data):
    group = torch.tensor([g for g, n in enumerate(sizes) for _ in range(n)])
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(group), max_size=len(group)))).float()
    kept = best_of_groups(scores, group, share).tolist()
    assert kept == sorted(set(kept))
    for g, n in enumerate(sizes):
        members = [i for i in range(len(group)) if group[i] == g]
        k = max(1, math.ceil(share * n - 1e-9))
        # Equal scores: the lower index first.
        expected = sorted(members, key=lambda i: (-scores[i], i))[:k]
        assert [i for i in kept if i in members] == sorted(expected)


def test_shares_that_are_not_exact_in_binary():
    group = torch.zeros(10, dtype=torch.long)
    for share, count in ((0.7, 7), (0.3, 3), (0.1, 1), (0.01, 1), (1.0, 10), (0.71, 8)):
        assert len(best_of_groups(torch.zeros(10), group, share)) == count


@given(st.lists(st.integers(0, 3), max_size=9), st.integers(0, 12))
def test_best_takes_all_when_there_are_fewer(scores, count):
    found = best(torch.tensor(scores).float(), count).tolist()
    assert found == sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_buffer_is_first_in_first_out(limit, counts):
    buffer = Buffer(limit)
    for now, count in enumerate(counts):
        buffer.push(small_batch(count, now), torch.zeros(count, 10), now)
        held = list(range(max(0, now - limit + 1), now + 1))
        assert len(buffer) == sum(counts[t] for t in held)
        texts = [t.text for t in buffer.take(torch.arange(len(buffer))).trajs]
        assert texts == [f"t{t}.{i}" for t in held for i in range(counts[t])]
    ages = buffer.facts(len(counts) - 1)[:, COLUMN["age"]]
    assert ages.tolist() == [float(len(counts) - 1 - t) for t in held for _ in range(counts[t])]


def test_what_comes_out_of_the_buffer_is_what_went_in():
    trajs = [
        Trajectory("a", 0, 0, [Segment([1, 2, 3], [4, 5]), Segment([9], [6, 7, 8], model_mask=[1, 0, 1])], text="x"),
        Trajectory("b", 0, 1, [Segment([1], [4])], finish="length", rewards={"task": 1.0, "aux": math.nan}),
    ]
    batch = assemble(trajs, 0)
    batch.adv_ST = torch.randn(3, 3) * batch.model_mask_ST
    batch.old_logps_ST = torch.randn(3, 3)
    batch.extras = {"flag": torch.tensor([1.0, 2.0, 3.0]), "wide": torch.randn(3, 3)}
    buffer = Buffer(3)
    buffer.push(batch, facts_of(with_entropy(batch), torch.tensor([0.0, 1.0])), 4)
    buffer.push(with_old(assemble(trajs[1:], 0), batch, 1), torch.zeros(1, 10), 5)
    out = buffer.take(torch.tensor([0, 1, 2]))
    for name, x in batch.tensors().items():
        if name not in ("turn_ST", "entropies_ST", "group_S"):
            assert torch.equal(out.tensors()[name][:3], x) and out.tensors()[name].dtype == x.dtype, name
    assert out.traj_S.tolist() == [0, 0, 1, 2]
    assert [[s.completion_ids for s in t.segments] for t in out.trajs] == [[[4, 5], [6, 7, 8]], [[4]], [[4]]]
    assert out.trajs[0].segments[1].model_mask == [1, 0, 1] and out.trajs[0].segments[0].prompt_ids == [1, 2, 3]
    assert out.trajs[1].finish == "length" and out.trajs[1].rewards["task"] == 1.0
    assert len({t.group_id for t in out.trajs}) == 2  # one group in each of the two rounds
    assert out.group_S.tolist() == [out.trajs[i].group_id for i in out.traj_S]


def with_entropy(batch):
    batch.entropies_ST = torch.zeros_like(batch.adv_ST)
    return batch


def with_old(batch, like, rows):
    batch.old_logps_ST = torch.zeros_like(batch.adv_ST)
    batch.extras = {"flag": torch.zeros(rows), "wide": torch.zeros_like(batch.adv_ST)}
    return batch


# ---------------------------------------------------------------- rounds without a trainer


class Rounds:
    """Plays rounds of `select` with chosen rewards; entropies, log-probs and advantages are made up but fixed."""

    def __init__(self, method, group=4, **services):
        self.method, self.stack, self.group, self.round = method, Stack([method], Grpo()), group, 0
        self.limits = SimpleNamespace(max_completion_tokens=8, vocab_size=20, scale_rewards="group")
        self.services = SimpleNamespace(limits=self.limits, gather=lambda x: x, forward=self.forward, **services)
        self.services.rng = lambda name: np.random.default_rng(list(name.encode()))
        self.forwarded = []

    def forward(self, trajs, what):
        self.forwarded.append(len(trajs))
        shape = assemble(trajs, 0).adv_ST.shape
        return {"logps": torch.full(shape, -2.0), "entropies": torch.full(shape, 0.7)}

    def play(self, rewards, entropy=0.5, finish=None, lengths=None):
        trajs = [
            Trajectory(
                f"r{i}", i // self.group, i % self.group,
                [Segment([1, 2], [3] * (lengths[i] if lengths else 1 + i % 3))],
                rewards={"task": r}, text=f"{self.round}.{i}", finish=finish[i] if finish else "stop",
            )
            for i, r in enumerate(rewards)
        ]  # fmt: skip
        ctx = Context("train", self.round, self.round, self.group, self.services, trajs=trajs)
        ctx.add_reward("task", "outcome", 1.0)
        ctx.signal_fn = self.stack.signal
        ctx.batch = assemble(trajs, 0)
        ctx.batch.entropies_ST = torch.full_like(ctx.batch.adv_ST, entropy)
        ctx.batch.old_logps_ST = torch.full_like(ctx.batch.adv_ST, -1.0)
        ctx.batch.adv_ST = self.stack.advantages(ctx)
        self.round += 1
        return ctx.batch, self.stack.select(ctx.batch, ctx)


def test_first_round_has_nothing_to_learn_from():
    method = RolloutBandits()
    _, chosen = Rounds(method).play([1, 0, 0, 1, 0, 0, 0, 1])
    assert len(chosen.trajs) == 4 and "gain" not in method.last and method.scheduler.gains == 0
    assert [t.group_id for t in chosen.trajs] == [0, 0, 1, 1]


def test_the_gain_comes_one_round_late_and_the_scheduler_learns_from_it():
    method = RolloutBandits(warmup=1)
    rounds = Rounds(method)
    rounds.play([1, 0, 0, 0], entropy=0.4)
    before = method.scheduler.theta.clone()
    rounds.play([1, 1, 0, 0], entropy=0.6)
    assert method.last["gain"] == pytest.approx(0.25) and method.last["label"] == 0  # one gain has no spread
    assert method.entropy_floor == pytest.approx(0.6)  # E at the end of the warm-up
    rounds.play([1, 1, 1, 0], entropy=0.9)
    assert method.last["gain"] == pytest.approx(0.25)  # E_t was not above the floor
    rounds.play([1, 1, 1, 0], entropy=1.4)
    assert method.last["gain"] == pytest.approx(-0.1 * 0.5, abs=1e-6)
    assert method.scheduler.gains == 3 and not torch.equal(method.scheduler.theta, before)
    assert method.last["error/mean"] == pytest.approx(method.last["label"] ** 2)


def test_all_gains_equal_do_not_blow_up():
    method = RolloutBandits(warmup=0)
    rounds = Rounds(method)
    for _ in range(5):
        rounds.play([1, 0, 0, 1])
    assert method.last["label"] == 0 and torch.isfinite(method.scheduler.theta).all()


@pytest.mark.parametrize("rewards", [[1, 1, 1, 1], [0, 0, 0, 0]])
def test_all_groups_dead_counts_in_v_and_teaches_nothing(rewards):
    method = RolloutBandits(warmup=0)
    rounds = Rounds(method)
    rounds.play(rewards)
    _, chosen = rounds.play([1, 0, 1, 0])
    assert method.last["skipped"] == 1 and method.scheduler.gains == 0 and method.scheduler.pool == []
    assert method.last["gain"] == pytest.approx(0.5 - rewards[0]) and len(chosen.trajs) == 2
    assert method.scheduler.A_FF.trace() == pytest.approx(0.1)  # nothing was learnt, so exploration does not shrink


def test_equal_scores_keep_the_lower_index():
    method = RolloutBandits(exploration="none", warmup=0, features=["group_mean"])
    _, chosen = Rounds(method).play([1, 0, 0, 1])
    assert [t.sample_id for t in chosen.trajs] == [0, 1]


def test_nan_reward_is_left_out_of_v_and_never_chosen():
    method = RolloutBandits()
    _, chosen = Rounds(method).play([math.nan, 1, 0, math.nan, math.nan, math.nan, math.nan, math.nan])
    assert [t.sample_id for t in chosen.trajs] == [1, 2] and method.last["value"] == 0.5
    assert method.last["nonfinite"] > 0 and torch.isfinite(method.pending["kept"]).all()


def test_a_flipped_score_does_not_choose_what_cannot_be_scored():
    method = RolloutBandits()
    rounds = Rounds(method)
    rounds.stack = Stack([method, Flip("rollout_bandits.scores")], Grpo())
    _, chosen = rounds.play([math.nan, 1, 0, math.nan])
    assert [t.sample_id for t in chosen.trajs] == [1, 2]


def test_nan_and_infinite_features_become_finite():
    facts = example_facts()
    facts[0, COLUMN["entropy"]], facts[1, COLUMN["entropy"]] = math.inf, -math.inf
    facts[2, COLUMN["entropy"]] = math.nan
    assert context(facts, SCALE)[:3, COLUMN["entropy"]].tolist() == [1, -1, 0]


def test_an_empty_rollout_has_length_and_clip_ratio_zero():
    trajs = [Trajectory("r", 0, i, [Segment([1], [5, 6], model_mask=[i, i])], rewards={}) for i in range(2)]
    batch = with_entropy(assemble(trajs, 0))
    assert facts_of(batch, torch.tensor([0.0, 1.0]))[0, COLUMN["length"]] == 0
    assert clip_ratio(torch.ones(2, 2), -torch.ones(2, 2), batch).tolist() == [0, 1]


def test_facts_of_fresh_rollouts():
    method = Rounds(RolloutBandits())
    batch, _ = method.play([1, 0, 0, 0], entropy=0.3, finish=["stop", "length", "stop", "stop"], lengths=[1, 8, 3, 2])
    facts = facts_of(batch, torch.tensor([1.0, 0, 0, 0]))
    assert facts[:, COLUMN["length"]].tolist() == [1, 8, 3, 2]
    assert facts[:, COLUMN["truncated"]].tolist() == [0, 1, 0, 0]
    assert facts[0, COLUMN["group_std"]] == pytest.approx(math.sqrt(3) / 4)  # population
    assert facts[:, COLUMN["entropy"]].tolist() == pytest.approx([0.3] * 4)
    torch.testing.assert_close(facts[:, COLUMN["advantage"]], batch.adv_ST[:, 0])
    assert (facts[:, [COLUMN[n] for n in ("clip_ratio", "age", "usage")]] == 0).all()


def test_switched_off_features_are_not_seen():
    method = RolloutBandits(features=["reward", "age"])
    Rounds(method).play([1, 0, 0, 1])
    assert method.pending["kept"].shape == (2, 2)


def test_fixed_rules():
    finish = ["length", "length", "length", "stop"]
    _, chosen = Rounds(RolloutBandits(policy="no_truncated", keep_share=0.25)).play([1, 0, 0, 1], finish=finish)
    assert [t.sample_id for t in chosen.trajs] == [3]
    _, chosen = Rounds(RolloutBandits(policy="advantage", keep_share=0.25)).play([0, 0, 1, 0])
    assert [t.sample_id for t in chosen.trajs] == [2]
    method = RolloutBandits(policy="random")
    rounds = Rounds(method)
    picks = [tuple(t.sample_id for t in rounds.play([1, 0, 0, 1])[1].trajs) for _ in range(20)]
    assert len(set(picks)) > 2 and method.scheduler is None and method.pending == {}


def test_probe_takes_the_place_of_the_batch_and_costs_generation():
    rows = [SimpleNamespace(prompt=f"p{i}") for i in range(6)]
    calls = []

    def generate(requests, stream):
        calls.append(requests)
        return [[SimpleNamespace(text=r["prompt"])] for r in requests]

    services = {"train_rows": lambda count, name: rows[:count], "generate": generate}
    method = RolloutBandits(gain_source="probe", probe_prompts=4)
    rounds = Rounds(method, score=lambda texts, rows: [float(len(calls) > 1)] * len(texts), **services)
    rounds.play([1, 1, 0, 0])
    rounds.play([0, 0, 0, 1])
    assert method.last["value"] == 1 and method.last["gain"] == 1  # not the batches' .5 and .25
    assert calls[0] == calls[1] and [r["seed"] for r in calls[0]] == [0, 1, 2, 3]  # common random numbers


# ---------------------------------------------------------------- rounds with the buffer


def test_global_mode_reuses_rollouts_with_their_log_probs_and_advantages():
    method = RolloutBandits(mode="global", buffer_rounds=2, warmup=0)
    rounds = Rounds(method)
    batch, chosen = rounds.play([1, 0, 0, 1])
    assert len(chosen.trajs) == 4 and rounds.forwarded == []  # K = the buffer: all of it
    adv_of = {t.text: float(batch.adv_ST[i, 0]) for i, t in enumerate(batch.trajs)}
    batch, chosen = rounds.play([0, 0, 0, 1])
    adv_of |= {t.text: float(batch.adv_ST[i, 0]) for i, t in enumerate(batch.trajs)}
    assert len(chosen.trajs) == 4 and len(method.buffer) == 8 and rounds.forwarded == [4]
    assert [float(a) for a in chosen.adv_ST[:, 0]] == [adv_of[t.text] for t in chosen.trajs]
    assert (chosen.old_logps_ST == -1).all()
    facts = method.buffer.facts(1)
    # Refreshed by the policy of today: exp(-2 - -1) lies outside the clip range, and the entropy is another.
    assert (facts[:4, COLUMN["clip_ratio"]] == 1).all() and (facts[4:, COLUMN["clip_ratio"]] == 0).all()
    assert facts[:4, COLUMN["entropy"]].tolist() == pytest.approx([0.7] * 4)
    rounds.play([0, 1, 0, 1])
    assert len(method.buffer) == 8 and method.last["age/buffer"] == 0.5


@pytest.mark.parametrize("refresh_max, forwarded", [(0, []), (3, [3, 3]), (100, [4, 8])])
def test_refresh_is_bounded(refresh_max, forwarded):
    method = RolloutBandits(mode="global", buffer_rounds=3, refresh_max=refresh_max)
    rounds = Rounds(method)
    for _ in range(3):
        rounds.play([1, 0, 0, 1])
    assert rounds.forwarded == forwarded and method.last["refreshed"] == (forwarded or [0])[-1]


def test_usage_counts_choices():
    method = RolloutBandits(mode="global", buffer_rounds=3)
    rounds = Rounds(method)
    for _ in range(3):
        rounds.play([1, 0, 0, 1])
    assert float(method.buffer.facts(2)[:, COLUMN["usage"]].sum()) == 12


def test_both_modes_only_survivors_enter_the_buffer():
    method = RolloutBandits(mode="both", buffer_rounds=2, keep_share=0.5)
    rounds = Rounds(method)
    _, first = rounds.play([1, 0, 0, 1])
    assert len(method.buffer) == 2 and len(first.trajs) == 2  # K above the buffer's size: all of it
    _, second = rounds.play([1, 0, 0, 1])
    assert len(method.buffer) == 4 and len(second.trajs) == 4


def test_an_empty_buffer_says_so():
    buffer = Buffer(2)
    assert len(buffer) == 0 and buffer.facts(0).shape == (0, 10)
    assert best(torch.zeros(0), 4).tolist() == []
    with pytest.raises(ValueError, match="nothing was chosen"):
        buffer.take(torch.zeros(0, dtype=torch.long))


def test_a_buffer_without_selectable_rollouts_of_this_round():
    method = RolloutBandits(mode="global", buffer_rounds=3)
    rounds = Rounds(method)
    rounds.play([1, 0, 0, 1])
    _, chosen = rounds.play([math.nan, math.nan, 0, math.nan])
    assert len(method.buffer) == 5 and len(chosen.trajs) == 4


def test_demonstrations_are_refused():
    rounds = Rounds(RolloutBandits())
    batch, _ = rounds.play([1, 0, 0, 1])
    batch.trajs[0].is_demo = True
    with pytest.raises(ConfigError, match="demonstration"):
        rounds.method.select(batch, Context("train", 0, 0, 4, rounds.services))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"mode": "inter"}, "method.rollout_bandits.mode"),
        ({"policy": "greedy"}, "scheduler or random"),
        ({"keep_share": 0.0}, "above 0 and at most 1"),
        ({"keep_share": 1.5}, "above 0 and at most 1"),
        ({"buffer_rounds": 0}, "at least 1"),
        ({"features": ["reward", "lenght"]}, "names among"),
        ({"features": []}, "names among"),
    ],
)
def test_wrong_settings_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        RolloutBandits(**keys)


# ---------------------------------------------------------------- the scheduler


def test_needs_follow_the_mode():
    assert RolloutBandits().needs == {"entropies"}
    assert RolloutBandits(mode="global", buffer_rounds=1).needs == {"entropies"}
    assert RolloutBandits(mode="both").needs == {"entropies", "old_logps"}


def test_thompson_draw_is_shared_and_has_the_covariance_of_the_closed_form():
    scheduler = Scheduler(3, warmup=10**6)
    contrast = torch.tensor([1.0, 2.0, 0.0])
    for _ in range(50):
        scheduler.learn(torch.zeros(2, 3), contrast, 0.0)
    draws = []
    for i in range(4000):
        scheduler.begin(np.random.default_rng(i))
        draws.append(scheduler.scores(torch.eye(3)) - scheduler.scores(torch.eye(3)).mean())
        x = torch.randn(5, 3)
        u = scheduler.scores(x)
        # One w for all candidates: u is linear in x.
        torch.testing.assert_close(u, (x - x.mean(0)) @ scheduler._w_F)
    A = 0.01 * torch.eye(3) + 50 * torch.outer(contrast, contrast)
    C = torch.eye(3) - 1 / 3
    expected = C @ (0.1**2 * torch.linalg.inv(A.double()).float()) @ C
    torch.testing.assert_close(torch.stack(draws).T.cov(), expected, atol=0.04, rtol=0.05)


def test_exploration_kinds():
    x = torch.randn(6, 3)
    for kind in ("none", "gumbel"):
        scheduler = Scheduler(3, exploration=kind, warmup=1)
        scheduler.begin(np.random.default_rng(0))
        warm = scheduler.scores(x)
        assert ((warm >= 0) & (warm < 1)).all()  # random: the network is not asked
        scheduler.begin(np.random.default_rng(0))
        gap = scheduler.scores(x) - scheduler.predict(x)
        assert bool((gap == 0).all()) == (kind == "none")


def test_learning_moves_the_prediction_to_the_labels():
    torch.manual_seed(0)
    scheduler = Scheduler(2)
    good, bad = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0, 1.0]] * 4)
    for i in range(150):
        scheduler.learn(good if i % 2 else bad, torch.zeros(2), 0.01 if i % 2 else -0.01)
    assert scheduler.predict(good).mean() > 0.9 and scheduler.predict(bad).mean() < -0.9
    assert len(scheduler.pool) == 64


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    rounds = Rounds(RolloutBandits(mode="global", warmup=0))
    for _ in range(3):
        rounds.play([1, 0, 0, 1])
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("target", ["rollout_bandits.labels", "rollout_bandits.scores"])
def test_controls_reach_labels_and_scores(target):
    plain, changed = RolloutBandits(warmup=0), RolloutBandits(warmup=0)
    rounds = Rounds(plain), Rounds(changed)
    rounds[1].stack = Stack([changed, Flip(target)], Grpo())
    kept = []
    for rewards in ([1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]):
        kept.append([[t.sample_id for t in r.play(rewards)[1].trajs] for r in rounds])
    if target.endswith("scores"):
        assert kept[0][0] != kept[0][1]
    else:
        assert kept[0][0] == kept[0][1]
        assert not torch.equal(plain.scheduler.theta, changed.scheduler.theta)


def test_shuffled_labels_keep_their_values():
    seen = []
    method = RolloutBandits(warmup=0)
    rounds = Rounds(method)
    rounds.stack = Stack([method, Shuffle("rollout_bandits.labels")], Grpo())
    learn = Scheduler.learn

    def spy(self, kept, contrast, gain, change=None):
        learn(self, kept, contrast, gain, lambda y: seen.append((y, change(y))) or seen[-1][1])

    Scheduler.learn = spy
    try:
        for k in range(8):
            rounds.play([1, 0, 0, float(k % 3 == 0)])
    finally:
        Scheduler.learn = learn
    assert all(torch.equal(a.sort().values, b.sort().values) for a, b in seen)
    assert any(not torch.equal(a, b) for a, b in seen)


# ---------------------------------------------------------------- in the trainer


def weights(trainer):
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(
    "keys",
    [
        {"keep_share": 1.0},
        {"mode": "global", "buffer_rounds": 1},
        {"mode": "both", "buffer_rounds": 1, "keep_share": 1.0},
    ],
    ids=["p = 1", "L = 1", "both"],
)
@pytest.mark.parametrize("objective", [Grpo, Dapo, Gspo])
def test_choosing_all_is_the_base_method_bit_for_bit(keys, objective, make_trainer):
    base, bandit = make_trainer([], objective(), max_steps=3), None
    expected = weights(base)
    bandit = make_trainer([RolloutBandits(warmup=1, **keys)], objective(), max_steps=3)
    assert torch.equal(weights(bandit), expected)
    for mine, theirs in zip(bandit.state.log_history, base.state.log_history, strict=True):
        assert all(mine[k] == v for k, v in theirs.items() if k in ("loss", "grad_norm", "reward", "advantage/abs"))


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("objective", [Grpo, Gspo, Dapo])
def test_stacks_with_ha_dw_in_both_orders(order, objective, make_trainer):
    stack = [RolloutBandits(mode="global", buffer_rounds=2, warmup=1), HaDw()]
    trainer = make_trainer(stack[::-1] if order else stack, objective(), max_steps=3)
    assert torch.isfinite(weights(trainer)).all()
    logs = [h for h in trainer.state.log_history if "loss" in h]
    assert logs[-1]["rollout_bandits/buffered"] == 32 and logs[-1]["ha_dw/posterior"] >= 0
    assert logs[-1]["cost/generated_tokens"] > 0 and logs[-1]["rollout_bandits/refreshed"] == 16


def test_half_of_each_group_is_trained_on(make_trainer):
    trainer = make_trainer([RolloutBandits()], max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rollout_bandits/kept"] == 8 and log["cost/trained_tokens"] < log["cost/generated_tokens"]


def test_loss_of_a_reused_batch_is_the_clipped_objective(make_trainer):
    """A real step with rollouts of three rounds: the loss against plain loops over its captured tensors."""
    captured = []

    class Spy(Grpo):
        def loss(self, lctx):
            value = super().loss(lctx)
            captured.append((value.detach(), lctx))
            return value

    trainer = make_trainer([RolloutBandits(mode="global", buffer_rounds=3)], Spy(), max_steps=3, learning_rate=3e-2)
    trainer.train()
    value, lctx = captured[-1]
    total, off_policy = 0.0, 0
    for row in range(lctx.mask_BT.shape[0]):
        terms = []
        for t in range(lctx.mask_BT.shape[1]):
            if lctx.mask_BT[row, t]:
                ratio = math.exp(lctx.logps_BT[row, t].item() - float(lctx.old_logps_BT[row, t]))
                off_policy += abs(ratio - 1) > 0.01
                a = float(lctx.adv_BT[row, t])
                terms.append(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
        total += float(lctx.row_weight_B[row]) * sum(terms) / len(terms)
    assert off_policy > 10
    assert float(value) == pytest.approx(total, abs=1e-5)
    assert float(lctx.row_weight_B.sum()) == pytest.approx(1)


def test_stored_log_probs_are_those_of_the_policy_that_sampled(make_trainer):
    trainer = make_trainer([RolloutBandits(mode="global", buffer_rounds=2)], max_steps=1)
    generated = []
    select = trainer.stack.select

    def spy(batch, ctx):
        generated.append((batch, trainer.score_tokens(batch)[0]))
        return select(batch, ctx)

    trainer.stack.select = spy
    trainer.train()
    batch, logps = generated[0]
    held = trainer.stack.methods[0].buffer.take(torch.arange(len(batch.trajs)))
    width = held.old_logps_ST.shape[1]
    assert torch.equal(held.old_logps_ST, logps[:, :width])


def resumable(make_trainer, folder, **keys):
    method = RolloutBandits(mode="both", buffer_rounds=3, warmup=1, keep_share=0.75)
    return make_trainer([method], folder=folder, max_steps=6, save_strategy="steps", save_steps=3, **keys)


def test_state_survives_a_checkpoint_in_mid_buffer(make_trainer, tmp_path):
    """The run goes on from step 3 as if it had not been cut: weights, buffer, scheduler and logs."""
    from experiments import checkpoints

    whole = resumable(make_trainer, tmp_path / "whole")
    saved = {}

    def keep(args, state, control, **kw):
        if state.global_step == 3:
            checkpoints.write_state(tmp_path, whole.state_dict())
            saved["buffer"] = len(whole.stack.methods[0].buffer)

    from transformers import TrainerCallback

    whole.add_callback(type("Keep", (TrainerCallback,), {"on_step_end": lambda self, *a, **k: keep(*a, **k)})())
    expected = weights(whole)
    assert 0 < saved["buffer"] <= 36 and whole.stack.methods[0].scheduler.gains >= 1
    again = resumable(make_trainer, tmp_path / "again")
    again.load_state_dict(checkpoints.read_state(tmp_path))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(torch.cat([p.detach().flatten() for p in again.model.parameters()]), expected)
    drop = ("time/", "train_", "step_time", "epoch")
    logs = [
        [{k: v for k, v in h.items() if not k.startswith(drop)} for h in t.state.log_history if h["step"] > 3]
        for t in (whole, again)
    ]
    assert logs[0][:3] == logs[1][:3] and "rollout_bandits/gain" in logs[0][0]


WORDS = ["name=bandits", "scale=cpu", "model.warm_start=null", "model.init_std=0.2", "task.train_rows=64"]
WORDS += ["trainer.prompts_per_step=4", "trainer.rollouts_per_prompt=4", "trainer.max_steps=12", "trainer.save_every=2"]
WORDS += ["eval.every=6", "eval.items=6", "eval.samples=2", "eval.kl_probe=4", "method=[rollout_bandits]"]
BANDIT = {"mode": "both", "keep_share": 0.75, "buffer_rounds": 3, "warmup": 3, "gain_source": "probe", "refresh_max": 9}
WORDS += [f"method.rollout_bandits.{k}={v}" for k, v in BANDIT.items()]


def start(folder, cache):
    line = [str(Path(sys.executable).with_name("assay")), "train", *WORDS, f"results_dir={folder}"]
    env = os.environ | {"ASSAY_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def record(folder):
    (metrics,) = Path(folder).rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    run = metrics.parent
    return kept, (run / "samples.jsonl").read_text(), (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_kill_9_and_resume(tmp_path):
    for name, kills in (("whole", ()), ("cut", (4, 9))):
        for step in kills:
            process, deadline = start(tmp_path / name, tmp_path / "cache"), time.time() + 200
            logs = f"{name}/raw/*/*/seed*/metrics.jsonl"  # checkpoints come and go: they are not walked
            while not [p for p in tmp_path.glob(logs) if len(p.read_bytes().splitlines()) >= step]:
                assert process.poll() is None and time.time() < deadline, process.communicate()[1]
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not list((tmp_path / name).rglob("summary.json"))
        process = start(tmp_path / name, tmp_path / "cache")
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        assert not kills or "going on from step" in err
    whole, cut = record(tmp_path / "whole"), record(tmp_path / "cut")
    assert whole == cut and whole[0][-1]["rollout_bandits/buffered"] == 36


def test_batches_of_the_buffer_are_batches():
    buffer = Buffer(1)
    buffer.push(small_batch(4), torch.zeros(4, 10), 0)
    assert isinstance(buffer.take(torch.tensor([1, 3])), Batch)
