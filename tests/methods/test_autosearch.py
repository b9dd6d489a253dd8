"""AutoSearch against the worked cases of its sheet, and its self-answers on real episodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.autosearch.autosearch import AutoSearch, SearchDepth, matches, not_repeated
from methods.autosearch.forced_depth import ForcedDepth
from methods.autosearch.penalty import SearchPenalty
from methods.autosearch.probes import observed
from methods.autosearch.rewards import (
    Searched,
    bag,
    base_rewards,
    effective,
    gains,
    paper_sum,
    released_code,
    repeats,
    similarity,
    without_efficiency,
)
from methods.base import Segment, Trajectory, Turn
from methods.errors import ConfigError

F1 = {"paris": 1.0, "city of paris": 0.5, "lyon": 0.0}
CASES = {
    "A": ([1, 1], ["paris"], 1, [1.2, 1.275], [1.2, 1.1], 1),
    "B": ([1, 1, 1, 1], ["paris", "lyon", "paris"], 1, [1.2, -0.05, -0.05, -0.05], [1.2, -0.025, -0.025, 1.1], 1),
    "C": ([1, 1, 1], ["lyon", "paris"], 1, [0.1, 1.1, 1.175], [0.1, 1.1, 1.1], 2),
    "D": ([1, 1, 1], ["city of paris", "lyon"], 0, [0.5375, 0.0375, 0.1125], [0.5375, 0.0375, 0.1], -1),
    "E": ([1], [], 1, [1.1], [1.1], -1),
    "F": ([1, 0, 1], ["lyon", "paris"], 1, [0.1, 0.975, 1.175], [0.1, 1.05, 1.1], 2),
    "G": ([1, 0], ["lyon"], 0, [0.0375, -0.5], [0.0375, -0.5], -1),
    "H": ([1, 1, 1], ["paris", "lyon"], 0, [1.0375, -0.05, -0.05], [1.2, -0.025, 0.1], 1),
}


def searched(valid, answers, final):
    return Searched([bool(v) for v in valid], [a == "paris" for a in answers], [F1[a] for a in answers], float(final))


@pytest.mark.parametrize("case", CASES)
def test_worked_cases(case):
    valid, answers, final, code, paper, depth = CASES[case]
    s = searched(valid, answers, final)
    assert released_code(s) == pytest.approx(code) and paper_sum(s) == pytest.approx(paper) and s.depth == depth


def test_worked_group_advantages():
    from methods.numerics import STD_EPS

    for variant, expected in (
        (released_code, [0.908408, -0.654740, 0.798714, -1.052382]),
        (paper_sum, [0.520437, 0.458295, 0.520437, -1.499170]),
    ):
        totals = torch.tensor([sum(variant(searched(*CASES[c][:3]))) for c in "ABCD"], dtype=torch.double)
        adv = (totals - totals.mean()) / (totals.std() + STD_EPS)
        torch.testing.assert_close(adv, torch.tensor(expected, dtype=torch.double), atol=1e-6, rtol=0)


def test_efficiency_peaks_at_the_sufficient_depth():
    for depth in (1, 2, 3):
        s = Searched([True] * 6, [t == depth for t in range(1, 6)], [0.0] * 5, 0.0)
        steps = [r - 0.025 for r in paper_sum(s)[:5]]
        totals = [sum(steps[:t]) for t in range(1, 6)]
        assert max(range(5), key=totals.__getitem__) == depth - 1
        assert totals[depth - 1] == pytest.approx(0.2 - 0.025 * depth)
    assert [effective(t) for t in (1, 2, 3, 4)] == pytest.approx([0.175, 0.075, 0.041667, 0.025], abs=1e-6)
    assert effective(20) == 0.0


def test_repeated_queries():
    three = ["france capital city", "population of spain", "capital of france"]
    assert similarity([bag(q) for q in three]) == pytest.approx([0.597969, 0.273450], abs=1e-6)
    assert repeats(three) == [False] * 3
    assert repeats(["the capital of france", "Capital of France?"]) == [False, True]
    assert repeats(["", "x", ""]) == [False, True, True]  # nothing to compare with counts as a repeat


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(0, 1), max_size=5), st.booleans())
def test_properties(f1, final):
    assert sum(gains(f1)) == pytest.approx(max(f1, default=0.0))
    right = [x == 1.0 for x in f1]
    s = Searched([True] * (len(f1) + 1), right, f1, float(final))
    assert len(released_code(s)) == len(paper_sum(s)) == len(f1) + 1


@given(st.integers(1, 4))
def test_one_search_too_many_lowers_the_total_of_the_code(depth):
    def total(n):
        right = [t >= depth for t in range(1, n + 1)]
        return sum(released_code(Searched([True] * (n + 1), right, [float(r) for r in right], 1.0)))

    assert total(depth) > total(depth + 1) > total(depth + 2)


# ---------------------------------------------------------------- trajectories

# Tokens: 1 a search, 2 a result, 3 the right entity, 4 another one, 9 the end.
WORDS = {1: "<s>e1</s>", 2: "<r>e2t0</r>", 3: "=e3", 4: "=e4", 7: "<s>e5</s>", 9: ""}


class Words:
    def decode(self, ids, skip_special_tokens=True):
        return "".join(WORDS[i] for i in ids)

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [] if not text else [8]}


def episode(searches, answer, cut=False):
    ids, turns, mask = [], [], []
    for s in searches:
        turns.append(
            Turn(0, len(ids), len(ids) + 1, "call", [{"tool": "search", "args": {"entity": WORDS[s]}}], "e2t0")
        )
        ids, mask = [*ids, s, 2], [*mask, 1, 0]
    if not cut:
        turns.append(Turn(0, len(ids), len(ids) + 2, "answer"))
        ids, mask = [*ids, answer, 9], [*mask, 1, 1]
    return Trajectory("r", 0, 0, [Segment([5], ids, model_mask=mask)], turns, rewards={"task": float(answer == 3)})


def context(fake_context, trajs, said):
    """`said`: what each probe answers, in order."""
    ctx = fake_context(trajs)
    ctx.services.tokenizer = Words()
    asked = []

    def generate(requests, stream):
        asked.extend(requests)
        return [[SimpleNamespace(text=text, finish="stop")] for text in said[: len(requests)]]

    ctx.services.generate = generate
    ctx.services.score = lambda texts, rows: [float(t == "=e3") for t in texts]
    ctx.services.measure = lambda texts, rows: [{} for _ in texts]
    return ctx, asked


def world(**keys):
    return AutoSearch(search_form=r"<s>e\d+</s>", answer_form=r"=e\d+", forced="=", **keys)


def test_rewards_sit_on_the_last_token_of_each_turn(fake_context):
    trajs = [episode([1, 7], 3), episode([1], 4), episode([], 3)]
    ctx, asked = context(fake_context, trajs, ["e3", "e4", "e4"])
    rewards_ST = world().token_rewards(trajs, ctx)
    # Right after the first search, wrongly afterwards: what follows is no over-search by the code (t_c = n - 1 ...).
    assert asked[0]["prompt_ids"] == [5, 1, 2, 8] and asked[1]["prompt_ids"] == [5, 1, 2, 7, 2, 8]
    assert rewards_ST[0].nonzero().flatten().tolist() == [0, 2, 5]
    assert rewards_ST[0, [0, 2, 5]].tolist() == pytest.approx([1.2, -0.05, -0.05])
    assert rewards_ST[1, [0, 3]].tolist() == pytest.approx([0.0375, 0.1125])
    assert rewards_ST[2, 1].item() == pytest.approx(1.1)
    paper = world(variant="paper_sum")
    ctx, _ = context(fake_context, trajs, ["e3", "e4", "e4"])
    assert paper.token_rewards(trajs, ctx)[0, [0, 2, 5]].tolist() == pytest.approx([1.2, -0.025, 1.1])


def test_a_repeated_search_is_not_valid(fake_context):
    trajs = [episode([1, 1], 3)]
    ctx, _ = context(fake_context, trajs, ["e4", "e3"])
    assert world().token_rewards(trajs, ctx)[0, [0, 2, 5]].tolist() == pytest.approx([0.1, 0.975, 1.175])
    assert not_repeated(trajs[0]) == [True, False, True]


def test_cut_after_a_search(fake_context):
    trajs = [episode([1], 4, cut=True)]
    trajs[0].rewards["task"] = 0.0
    ctx, _ = context(fake_context, trajs, ["e4"])
    assert observed(trajs[0]) == [0]
    assert world().token_rewards(trajs, ctx)[0].tolist() == pytest.approx([-0.5, 0.0])


def test_a_failed_probe_is_an_empty_answer(fake_context):
    trajs = [episode([1], 3)]
    ctx, _ = context(fake_context, trajs, [])
    ctx.services.generate = lambda requests, stream: [[SimpleNamespace(text="", finish="error")] for _ in requests]
    said = []
    ctx.services.score = lambda texts, rows: said.extend(texts) or [0.0] * len(texts)
    world().token_rewards(trajs, ctx)
    assert said == [""]


def test_measures(fake_context):
    """The sheet's four samples: depths 1, 3, 2, 0 give OSR 25 % and waste 1/6."""
    trajs = [episode([1], 3), episode([1, 7, 1], 3), episode([1, 7], 4), episode([], 4)]
    ctx, _ = context(fake_context, trajs, ["e3", "e3", "e4", "e3", "e4", "e4"])
    columns = SearchDepth(forced="=").eval_metrics(trajs, ctx)
    assert sum(columns["over_search"]) / 4 == 0.25
    assert sum(columns["waste_share"]) / 4 == pytest.approx(1 / 6)
    assert columns["sufficient_depth"][:2] == [1.0, 1.0] and math.isnan(columns["sufficient_depth"][2])


def test_shuffled_self_answers_move_the_reward(fake_context):
    from methods.controls import Shuffle
    from methods.objectives.policy_gradient import Grpo
    from methods.stack import Stack

    trajs = [episode([1, 7, 1], 3) for _ in range(8)]
    ctx, _ = context(fake_context, trajs, ["e3", "e4", "e4"] * 8)
    method = world()
    plain = method.token_rewards(trajs, ctx)
    ctx, _ = context(fake_context, trajs, ["e3", "e4", "e4"] * 8)
    stack = Stack([method, Shuffle(target="autosearch.self_answers")], Grpo())
    ctx.signal_fn = stack.signal
    assert not torch.equal(method.token_rewards(trajs, ctx), plain)


def test_forms():
    assert matches(AutoSearch.search_form, " <think>a</think>\n<search>b</search> ")
    assert not matches(AutoSearch.search_form, "<search>b</search>")
    assert not matches(AutoSearch.answer_form, "<think>a</think> x <answer>b</answer>")


def test_unknown_variant():
    with pytest.raises(ConfigError, match="variant"):
        AutoSearch(variant="sum")


# ---------------------------------------------------------------- ablations, baselines and the forced depth


def test_without_efficiency_nothing_is_overwritten():
    """Case B: the over-searching but right rollout keeps its outcome; both variants come to base + quality."""
    s = searched(*CASES["B"][:3])
    assert without_efficiency(s) == pytest.approx([1.025, 0.025, 0.025, 1.1])
    assert base_rewards(s) == pytest.approx([0.025, 0.025, 0.025, 1.1])


def test_the_ablation_reaches_the_rewards(fake_context):
    trajs = [episode([1, 7, 1], 3)]
    totals = {}
    for keys in ({}, {"efficiency": False}):
        ctx, _ = context(fake_context, trajs, ["e3", "e4", "e4"])
        totals[str(keys)] = world(**keys).token_rewards(trajs, ctx).sum().item()
    # The third search repeats the first one's query, so that its base reward is negative.
    assert list(totals.values()) == pytest.approx([1.05, 2.125], abs=1e-6)


def test_a_search_has_its_price(fake_context):
    trajs = [episode([1, 7], 3), episode([1], 4), episode([], 3)]
    ctx = fake_context(trajs)
    SearchPenalty(0.25).rewards(trajs, ctx)
    assert ctx.total_reward().tolist() == pytest.approx([0.5, -0.25, 1.0])
    with pytest.raises(ConfigError, match="penalty"):
        SearchPenalty(-0.1)


@pytest.fixture(scope="module")
def small_world():
    from experiments.tasks.search_world import SearchWorld

    return SearchWorld(train_rows=64, eval_rows=24)


@pytest.fixture(scope="module")
def searcher(small_world, tmp_path_factory):
    import os

    from experiments.models import Tiny, WarmStart

    os.environ.setdefault("ASSAY_CACHE", str(tmp_path_factory.mktemp("cache")))
    return Tiny(init_std=0.05, warm_start=WarmStart(steps=60, learning_rate=1e-2)).load(small_world, 0)


def evaluated(small_world, searcher, methods):
    from experiments import hooked
    from experiments.engines.base import Request, encode
    from experiments.engines.transformers import TransformersEngine
    from experiments.services import Services
    from methods.base import Context
    from methods.objectives.base import Objective
    from methods.stack import Stack

    engine = TransformersEngine(searcher.model, searcher.tokenizer)
    limits = SimpleNamespace(max_completion_tokens=small_world.max_completion_tokens)
    stack = Stack(methods, Objective(), check=False)
    services = Services(engine, small_world, 0, limits, searcher.tokenizer)
    ctx = Context("eval", 0, 0, 2, services=services, signal_fn=stack.signal)
    how = hooked.Sampling(2, 1.0, 1.0, small_world.max_completion_tokens, 3)
    rows = small_world.rows("eval", 0)[:8]
    ids = lambda prompt: encode(searcher.tokenizer, Request(prompt=prompt), False)  # noqa: E731
    return hooked.rollouts(stack, ctx, engine, rows, how, ids)


@pytest.mark.parametrize("depth", [0, 2, 4])
def test_a_forced_depth_is_exact(small_world, searcher, depth):
    free, _ = evaluated(small_world, searcher, [])
    forced, columns = evaluated(small_world, searcher, [forced_world(depth), SearchDepth("=", 2)])
    assert {len(observed(t)) for t in free} != {depth}
    assert columns["searches"] == [float(depth)] * len(forced) and len(columns["over_search"]) == len(forced)
    for before, now in zip(free, forced, strict=True):
        ids, mask = now.segments[0].completion_ids, now.segments[0].model_mask
        assert now.text.startswith("=") and len(ids) == len(mask)
        text = searcher.tokenizer.decode(ids, skip_special_tokens=True)
        turns = [searcher.tokenizer.decode(ids[t.start : t.end], skip_special_tokens=True) for t in now.turns]
        assert text == "".join(
            part + (f"<r>{t.result}</r>" if t.result is not None else "")
            for part, t in zip(turns, now.turns, strict=True)
        )
        shared = now.turns[-1].start if len(observed(before)) >= depth else before.turns[-1].start
        assert ids[:shared] == before.segments[0].completion_ids[:shared]
        model = [k for t in now.turns for k in range(t.start, t.end)]
        assert [k for k, own in enumerate(mask) if own] == model


def forced_world(depth):
    return ForcedDepth(depth, "<s>", "</s>", r"<s>(?P<entity>e\d+)</s>", "<r>{}</r>", "=", turn_tokens=3)


def test_a_forced_depth_with_a_form_that_cannot_be():
    for keys in ({"depth": -1}, {"result": "none"}, {"search_form": "("}):
        with pytest.raises(ConfigError):
            ForcedDepth(**keys)


@dataclass
class Ignored(AutoSearch):
    """Asks for every self-answer and drops the rewards."""

    def token_rewards(self, trajs, ctx):
        super().token_rewards(trajs, ctx)
        assert self.last["depth"] > 0
        return ctx.token_rewards_ST


def test_probes_leave_no_trace(small_world, searcher, make_trainer):
    """Training with self-answers that are generated and ignored equals training without them, bit for bit."""

    def exact(texts, rows):
        return [small_world.score(text, row) for text, row in zip(texts, rows, strict=True)]

    weights = []
    for methods in ([], [Ignored(forced="=", probe_tokens=2)]):
        most = small_world.max_completion_tokens
        trainer = make_trainer(methods, task=small_world, loaded=searcher, reward=exact, max_completion_length=most)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)
