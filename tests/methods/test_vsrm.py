"""VSRM against the worked example of its sheet, its degenerate cases, and what its formulas promise."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import Context, Segment, Trajectory, assemble
from methods.controls import Flip, Shuffle
from methods.errors import ConfigError
from methods.ha_dw import HaDw
from methods.numerics import trajectory_returns
from methods.objectives.policy_gradient import Grpo
from methods.objectives.reinforce_pp import ReinforcePP
from methods.stack import Stack
from methods.vsrm import segmentation as seg
from methods.vsrm.overthinking import Overthinking
from methods.vsrm.states import closing_ids, ineffective_share, post_solution_share
from methods.vsrm.vsrm import Vsrm, stepwise_rewards

TEXT = (
    "<think>We need 3+4. Three plus four is seven. But check the carry. It is fine. Wait, maybe it is eight. No. "
    "So the answer is seven. Hmm ok.</think>\\boxed{7}"
)


class Tokenizer:
    """One token per blank with its word; ids are given on the way; id 0 is the end and has no text."""

    unk_token_id = None

    def __init__(self):
        self.words = [""]

    def __call__(self, text, add_special_tokens=False):
        found = re.findall(r"</think>|\s?[^\s<]+|<think>|\s|<", text)
        self.words += [w for w in dict.fromkeys(found) if w not in self.words]
        return {"input_ids": [self.words.index(w) for w in found]}

    def decode(self, ids, **_):
        return "".join(self.words[i] for i in ids)


class Services:
    """Answers state prompts with what `answer(prompt ids)` says."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.asked, self.calls = tokenizer, answer, [], 0

    def generate(self, requests, stream):
        self.calls += 1
        self.asked += requests
        return [
            [SimpleNamespace(text=text, ids=[1, 2], finish="error" if text is None else "stop") for text in texts]
            for texts in map(self.answer, requests)
        ]

    def score(self, texts, rows):
        if "boom" in texts:
            raise RuntimeError("the verifier does not like this")
        return [math.nan if text == "nan" else float(text == row) for text, row in zip(texts, rows, strict=True)]

    def gather(self, x):
        return x

    def rng(self, name):
        return np.random.default_rng(3)


def context(texts, outcome, answer=None, tokenizer=None, methods=(), ends=True, **keys):
    """A context over single responses given as texts; `answer(request)` gives the texts of a state's continuations."""
    tokenizer = tokenizer or Tokenizer()
    trajs = []
    for i, (text, reward) in enumerate(zip(texts, outcome, strict=True)):
        ids = tokenizer(text)["input_ids"] + [0] * ends
        trajs.append(Trajectory(f"row{i}", i, 0, [Segment([1, 1], ids)], rewards={"outcome": reward}, row="yes"))
    ctx = Context("train", 0, 0, 1, services=Services(tokenizer, answer or (lambda request: [])), **keys)
    ctx.trajs, ctx.batch = trajs, assemble(trajs, 0)
    ctx.add_reward("outcome", "outcome", 1.0)
    ctx.signal_fn = Stack(list(methods), ReinforcePP(), check=False).signal
    return ctx


def tiny(**keys):
    return Vsrm(**({"cues": ("wait",), "first_gap": 0, "gap": 0, "samples": 5} | keys))


def shares(*right):
    """Continuations that make the states of one trajectory right `right[j]` times out of five, in order."""
    queue = list(right)
    return lambda request: ["yes"] * (k := queue.pop(0)) + ["no"] * (request["n"] - k)


# ---- the worked example


@pytest.mark.parametrize(
    ("accuracy", "lookahead", "rewards"),
    [
        ([0.2, 0.2, 0.2, 0.6, 0.6, 0.4, 0.4, 0.4], 4, [0.196, 0.28, 0.4, -0.14, -0.2, 0, 0]),
        ([0, 0, 0, 0, 0, 0, 1], 4, [0, 0.2401, 0.343, 0.49, 0.7, 1]),
        ([1, 1, 1], 4, [0, 0]),
        ([0, 0, 1], 0, [0, 1]),
        ([0.2, 0.2, 0.6, 0.4], 4, [0.28, 0.4, -0.2]),
    ],
)
def test_stepwise_rewards_of_the_worked_example(accuracy, lookahead, rewards):
    got = stepwise_rewards(accuracy, len(rewards), gamma=0.7, lookahead=lookahead, tol=1e-5)
    assert got == pytest.approx(rewards, abs=1e-12)


@pytest.mark.parametrize("word_boundary", [True, False])
def test_segmentation_of_the_worked_example(word_boundary):
    pattern = seg.cue_pattern(seg.CUES, word_boundary)
    points = seg.split_points(TEXT, seg.find_thinking(TEXT), pattern, 20, 25)
    assert [p for p, _ in points] == [45, 78, 107, 131]
    assert [cue for _, cue in points] == ["But", "Wait", "So", "Hmm"]
    trace = seg.segment(re.findall(r" ?[^ ]+", TEXT), pattern, 20, 25)
    assert [step.token for step in trace.steps] == [8, 15, 21, 26]


TOKENS = 12
SPLITS = {0: ([2, 5, 8], [0.2, 0.2, 0.6, 0.4]), 1: ([], None), 2: ([4], [0.8, 0.0])}


@pytest.fixture
def worked():
    """Three rows of 11, 6 and 12 tokens; `wait` at the split tokens, the last row not closed."""
    tokenizer = Tokenizer()
    texts = []
    for row, length in enumerate((11, 6, 12)):
        words = [f"w{t}" for t in range(length)]
        for t in SPLITS[row][0]:
            words[t] = "wait"
        texts.append(" ".join(words))
    ctx = context(texts, [1.0, 0.0, -10.0], shares(1, 1, 3, 2, 4, 0), tokenizer, ends=False)
    return tiny(), ctx


def test_token_rewards_of_the_worked_example(worked):
    method, ctx = worked
    rho = method.token_rewards(ctx.trajs, ctx)
    expected = torch.zeros(3, TOKENS)
    for t, value in ((2, 0.28), (5, 0.4), (8, -0.2), (10, 1.0)):
        expected[0, t] = value
    expected[2, 4], expected[2, 11] = -0.8, -10.0
    torch.testing.assert_close(rho, expected)


def test_whitened_returns_of_the_worked_example(worked):
    method, ctx = worked
    ctx.token_rewards_ST = method.token_rewards(ctx.trajs, ctx)
    adv = ReinforcePP().advantages(ctx)
    row0 = [0.956270] * 3 + [0.906005] * 3 + [0.834198] * 3 + [0.870102] * 2 + [0.0]
    row1 = [0.690584] * 6 + [0.0] * 6
    row2 = [-1.248202] * 5 + [-1.104588] * 7
    torch.testing.assert_close(adv, torch.tensor([row0, row1, row2]), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("k", "chance"), [(1, 0.25), (4, 0.728022)])
def test_pass_at_k_of_the_worked_example(k, chance):
    from experiments.stats import pass_at_k

    assert float(pass_at_k(np.array([16]), np.array([4]), k)[0]) == pytest.approx(chance, abs=1e-6)


# ---- what the formulas promise


def plain_rewards(accuracy, gamma, lookahead, tol):
    """The definition, written out."""
    gains = [b - a for a, b in pairwise(accuracy)]
    out = []
    for j, gain in enumerate(gains):
        q = next((q for q in range(len(gains) - j) if abs(gains[j + q]) >= tol), None)
        out.append(gain if q == 0 else 0.0 if q is None or q > lookahead else gamma**q * gains[j + q])
    return out


levels = st.lists(st.integers(0, 3).map(lambda n: n / 3), min_size=2, max_size=14)


@given(levels, st.integers(0, 5))
def test_stepwise_rewards_equal_their_definition(accuracy, lookahead):
    got = stepwise_rewards(accuracy, len(accuracy) - 1, 0.7, lookahead, 1e-5)
    assert got == pytest.approx(plain_rewards(accuracy, 0.7, lookahead, 1e-5))


@given(levels)
def test_without_look_ahead_the_rewards_telescope(accuracy):
    rewards = stepwise_rewards(accuracy, len(accuracy) - 1, lookahead=0)
    assert sum(rewards) == pytest.approx(accuracy[-1] - accuracy[0], abs=1e-4)


@pytest.mark.parametrize(("filler", "total"), list(enumerate([1, 1.7, 2.19, 2.533, 2.7731, 2.7731])))
def test_look_ahead_pays_for_filler_before_a_gain(filler, total):
    assert sum(stepwise_rewards([0.0] * (filler + 1) + [1.0], filler + 1)) == pytest.approx(total)


def test_harmless_repetition_costs_nothing():
    assert stepwise_rewards([0.0, 1.0, 1.0, 1.0, 1.0], 4) == [1.0, 0.0, 0.0, 0.0]


words = st.lists(st.sampled_from(["a", "b.", "wait", "waiting", "but", "c\n", "é", "So"]), max_size=40)


@settings(max_examples=60)
@given(words, st.integers(0, 12), st.integers(0, 12), st.booleans())
def test_segmentation_holds_to_its_rules(parts, first, gap, closed):
    text = " ".join(parts) + ("</think>x" if closed else "")
    trace = seg.segment(re.findall(r"\s?\S+|\s", text), seg.cue_pattern(["wait", "So"], True), first, gap)
    points = [step.at for step in trace.steps]
    assert points == sorted(set(points)) and all(p <= len(text) for p in points)
    assert trace.closed == closed and trace.cuts == sorted(trace.cuts)
    for point, step in zip(points, trace.steps, strict=True):
        assert step.cue in ("wait", "So")
        before = text[:point].rstrip(" ")
        assert not before or before[-1] in ".\n!?" or text[point:].startswith(step.cue)


# ---- segmentation, the cases beside the example


@pytest.mark.parametrize(
    ("first_gap", "gap", "points"),
    [(0, 0, [3, 10, 18, 24]), (4, 0, [3, 10, 18, 24]), (5, 0, [10, 18, 24]), (0, 8, [3, 10, 18]), (0, 9, [3, 18])],
)
def test_cues_too_near_to_the_start_or_to_the_last_step_are_skipped(first_gap, gap, points):
    text = "aa. But b. Wait c. So d. Hmm"
    found = seg.split_points(text, seg.find_thinking(text), seg.cue_pattern(seg.CUES, True), first_gap, gap)
    assert [at for at, _ in found] == points


def test_a_cue_inside_a_longer_word_counts_only_without_word_boundary():
    text = "x. The attribute. Solve it. But no."
    found = {b: seg.split_points(text, seg.find_thinking(text), seg.cue_pattern(seg.CUES, b), 0, 0) for b in (0, 1)}
    assert [cue for _, cue in found[1]] == ["But"] and [cue for _, cue in found[0]] == ["but", "So", "But"]


def test_the_longest_cue_wins_and_points_that_fall_together_count_once():
    text = "One. But wait, so hmm, wait. Two"
    points = seg.split_points(text, seg.find_thinking(text), seg.cue_pattern(seg.CUES, True), 0, 0)
    assert points == [(4, "But wait")]


def test_without_a_sentence_end_the_split_point_is_the_cue():
    assert seg.split_points("abc wait", seg.find_thinking("abc wait"), seg.cue_pattern(["wait"], True), 0, 0) == [
        (4, "wait")
    ]


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("<think>a</think>b", seg.Thinking(7, 8, True)),
        ("a</think>b", seg.Thinking(0, 1, True)),  # the opening tag stands in the prompt
        ("<think>a", seg.Thinking(7, 8, False)),
        ("", seg.Thinking(0, 0, False)),
        ("</think>a<think>b", seg.Thinking(0, 0, True)),
    ],
)
def test_where_the_thinking_lies(text, span):
    assert seg.find_thinking(text) == span


def test_offsets_are_those_of_the_generated_ids():
    """An odd cut of the words, tokens without text and bytes that only spell a character together do not shift it."""
    pieces = ["One", ".", "", " \ufffd", "\ufffd wa", "it,", " two", "</thi", "nk>", "x"]
    trace = seg.segment(pieces, seg.cue_pattern(["wait"], True), 0, 0)
    assert [(step.at, step.token) for step in trace.steps] == [(4, 3)] and trace.end == 7


def test_pieces_keep_the_blank_that_a_first_token_loses():
    class Stripping(Tokenizer):
        def decode(self, ids, **_):
            return super().decode(ids).lstrip()

    tokenizer = Stripping()
    ids = tokenizer("one wait two")["input_ids"]
    pieces = seg.Pieces(tokenizer)
    assert "".join(pieces(ids)) == "one wait two" and pieces(ids)[1] == " wait"


# ---- states


def test_states_are_ids_of_prompt_prefix_and_closing_tag_in_one_call():
    ctx = context(["a b. wait c. wait d</think>yes", "no cue</think>yes"], [1.0, 1.0], shares(0, 5, 5))
    method = tiny()
    rho = method.token_rewards(ctx.trajs, ctx)
    services = ctx.services
    ids, close = ctx.trajs[0].segments[0].completion_ids, closing_ids(services.tokenizer)
    assert services.calls == 1
    assert [r["prompt_ids"] for r in services.asked] == [[1, 1, *ids[:cut], *close] for cut in (2, 4, 6)]
    assert {(r["n"], r["max_tokens"], r["temperature"], r["top_p"]) for r in services.asked} == {(5, 768, 0.6, 0.95)}
    assert rho[0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1] and rho[1].nonzero().tolist() == [[4]]
    assert method.metrics()["cue/wait"] == 0.5


def test_an_unclosed_thinking_is_closed_at_its_end_without_the_end_token():
    ctx = context(["a. wait b"], [-10.0], shares(0, 5))
    rho = tiny().token_rewards(ctx.trajs, ctx)
    ids = ctx.trajs[0].segments[0].completion_ids
    assert ctx.services.asked[-1]["prompt_ids"] == [1, 1, *ids[:-1], *closing_ids(ctx.tokenizer)]
    assert rho[0].tolist() == [0, 1, 0, -10]


def test_reward_at_the_end_of_the_step():
    ctx = context(["a. wait b. wait c</think>yes"], [1.0], shares(0, 5, 2))
    rho = tiny(reward_at="end").token_rewards(ctx.trajs, ctx)
    torch.testing.assert_close(rho[0], torch.tensor([0, 0, 1, 0, -0.6, 0, 0, 1.0]))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=6), st.sampled_from([0.0, 1.0]))
def test_what_each_place_of_the_reward_credits(right, outcome):
    """Returns of a token: the decision to open step j, a token inside it, the tokens behind the thinking."""
    text = "a" + " wait b" * (len(right) - 1) + "</think>yes"
    accuracy = [n / 5 for n in right]
    for place in ("start", "end"):
        ctx = context([text], [outcome], shares(*right))
        rho = tiny(lookahead=0, reward_at=place).token_rewards(ctx.trajs, ctx)
        returns = trajectory_returns(rho, ctx.batch.model_mask_ST, ctx.batch.traj_S)[0].tolist()
        final = outcome + accuracy[-1]
        opened = [final - a for a in accuracy[:-1]]
        inside = [final - a for a in (accuracy[1:] if place == "start" else accuracy[:-1])]
        assert returns[1:-3:2] == pytest.approx(opened, abs=1e-5)
        assert returns[2:-3:2] == pytest.approx(inside, abs=1e-5)
        assert returns[-3:] == [outcome] * 3


# ---- degenerate cases


def test_no_step_needs_no_state():
    ctx = context(["short</think>yes"], [1.0])
    method = tiny()
    assert method.token_rewards(ctx.trajs, ctx)[0].tolist() == [0, 0, 0, 1] and ctx.services.calls == 0
    assert method.metrics()["with_steps"] == 0.0


@pytest.mark.parametrize("right", [0, 5])
def test_equal_accuracies_give_no_step_reward(right):
    ctx = context(["a. wait b. wait c</think>yes"], [0.5], shares(right, right, right))
    assert tiny().token_rewards(ctx.trajs, ctx)[0].nonzero().tolist() == [[7]]


def test_a_wrong_number_of_accuracies_is_an_error():
    with pytest.raises(ValueError, match="3 steps need 4"):
        stepwise_rewards([0.0, 1.0], 3)


def test_the_outcome_wins_on_the_last_token():
    ctx = context(["a. wait"], [0.25], shares(0, 5), ends=False)
    assert tiny().token_rewards(ctx.trajs, ctx)[0].tolist() == [0, 0.25]


def test_a_split_token_that_is_not_the_model_s_is_dropped_and_counted():
    ctx = context(["a. wait b</think>yes"], [1.0], shares(0, 5))
    ctx.batch.model_mask_ST[0, 1] = 0
    method = tiny()
    assert method.token_rewards(ctx.trajs, ctx)[0].nonzero().tolist() == [[5]]
    assert method.metrics()["dropped"] == 1.0


def test_a_completion_without_a_thinking_block():
    ctx = context(["yes", "\\boxed{7}", ""], [-10.0, -10.0, -10.0])
    method = tiny()
    rho = method.token_rewards(ctx.trajs, ctx)
    assert rho.sum(1).tolist() == [-10, -10, -10] and rho[2, 0] == -10
    assert method.metrics()["unclosed"] == method.metrics()["penalised"] == 1.0


def test_a_verifier_that_raises_scores_zero_and_is_counted():
    answers = iter([["boom", "yes", "nan", "no", "yes"], ["yes"] * 5])
    ctx = context(["a. wait b</think>yes"], [1.0], lambda request: next(answers))
    method = tiny()
    assert method.token_rewards(ctx.trajs, ctx)[0, 1] == pytest.approx(0.6)
    assert method.metrics()["verifier_errors"] == 2.0


def test_a_state_that_cannot_be_continued_leaves_its_trajectory_out():
    answers = iter([["yes"] * 5, [None] * 5, ["no"] * 5, ["yes"] * 5])
    ctx = context(["a. wait b</think>yes", "a. wait b</think>yes"], [1.0, 0.0], lambda request: next(answers))
    method = tiny()
    rho = method.token_rewards(ctx.trajs, ctx)
    assert rho[0].nonzero().tolist() == [[5]] and rho[1, 1] == 1.0
    assert method.metrics()["unmeasured"] == 1.0


def test_an_unscorable_trajectory_gets_no_advantage():
    ctx = context(["a. wait b</think>yes", "x</think>yes"], [math.nan, 1.0], shares(0, 5))
    ctx.token_rewards_ST = tiny().token_rewards(ctx.trajs, ctx)
    assert (ReinforcePP().advantages(ctx)[0] == 0).all()


def test_equal_returns_are_whitened_to_zero():
    ctx = context(["x</think>yes"] * 2, [1.0, 1.0])
    ctx.token_rewards_ST = tiny().token_rewards(ctx.trajs, ctx)
    assert (ReinforcePP().advantages(ctx) == 0).all()


def test_one_sample_per_state_is_allowed():
    answers = iter([["no"], ["yes"]])
    ctx = context(["a. wait b</think>yes"], [1.0], lambda request: next(answers))
    assert tiny(samples=1).token_rewards(ctx.trajs, ctx)[0, 1] == 1.0


def test_two_steps_in_one_token_add_up():
    tokenizer = Tokenizer()
    tokenizer.words += ["a.", "wait. wait", "</think>", "yes"]
    ctx = context([""], [1.0], shares(0, 2, 5), tokenizer)
    ctx.trajs[0].segments[0].completion_ids = [1, 2, 3, 4, 0]
    ctx.batch = assemble(ctx.trajs, 0)
    assert tiny().token_rewards(ctx.trajs, ctx)[0, 1] == pytest.approx(1.0)


@pytest.mark.parametrize("setting", [{"cues": ()}, {"cues": ("",)}, {"samples": 0}, {"gap": -1}, {"reward_at": "mid"}])
def test_settings_that_cannot_be_right_are_refused(setting):
    with pytest.raises(ConfigError, match=r"method\.vsrm"):
        tiny(**setting)


def test_a_vocabulary_without_the_closing_tag_is_refused(random_model):
    with pytest.raises(ConfigError, match="closes a thinking block"):
        closing_ids(random_model.tokenizer)


def test_refused_where_there_is_a_group_baseline():
    with pytest.raises(ConfigError, match="objective=reinforce_pp"):
        Stack([Vsrm()], Grpo())
    with pytest.raises(ConfigError, match="has none"):
        Stack([Vsrm(), HaDw()], ReinforcePP())


# ---- controls


def test_shuffle_permutes_inside_a_trajectory():
    control = Shuffle("vsrm.step_rewards")
    texts = ["a. wait b. wait c. wait d</think>yes"] * 2
    ctx = context(texts, [0.0, 0.0], shares(0, 1, 3, 5, 0, 0, 0, 5), methods=[control])
    control_free = context(texts, [0.0, 0.0], shares(0, 1, 3, 5, 0, 0, 0, 5))
    mixed, plain = (tiny().token_rewards(c.trajs, c) for c in (ctx, control_free))
    assert not torch.equal(mixed, plain)
    torch.testing.assert_close(mixed.sort(1).values, plain.sort(1).values)


def test_flip_negates_the_step_rewards_only():
    ctx = context(["a. wait b</think>yes"], [1.0], shares(0, 5), methods=[Flip("vsrm.step_rewards")])
    assert tiny().token_rewards(ctx.trajs, ctx)[0].tolist() == [0, -1, 0, 0, 0, 1]


# ---- measures of overthinking


def test_shares_of_overthinking():
    trace = seg.Trace(tuple(seg.Step(t, "wait", t) for t in (2, 5, 8)), 0, 10, True)
    assert ineffective_share([0.2, 0.8, 0.8, 0.4]) == pytest.approx(2 / 3)
    assert math.isnan(ineffective_share([1.0]))
    assert post_solution_share([0.2, 0.8, 0.8, 0.4], trace) == pytest.approx(0.5)
    assert post_solution_share([0.2, 0.2, 0.2, 1.0], trace) == post_solution_share([0.0] * 4, trace) == 0.0


def test_overthinking_measures_the_first_sample_of_the_first_items():
    texts = ["a. wait b</think>yes", "a. wait b</think>yes", "none</think>yes", "a. wait b</think>yes"]
    ctx = context(texts, [1.0] * 4, shares(5, 5))
    ctx.mode, ctx.trajs[1].sample_id = "eval", 1
    method = Overthinking(cues=("wait",), first_gap=0, gap=0, items=2)
    columns = method.eval_metrics(ctx.trajs, ctx)
    nan = float("nan")
    assert columns["ineffective_steps"] == pytest.approx([1.0, nan, nan, nan], nan_ok=True)
    assert columns["post_solution"] == pytest.approx([2 / 3, nan, 0.0, nan], nan_ok=True)
    assert method.state_dict() == {}


def test_overthinking_needs_token_ids():
    ctx = context(["a</think>yes"], [1.0])
    ctx.trajs[0].segments[0].prompt_ids = []
    with pytest.raises(ConfigError, match="engine=transformers"):
        Overthinking().eval_metrics(ctx.trajs, ctx)


# ---- a real step


def test_token_rewards_of_a_real_step_equal_a_plain_reference(tmp_path):
    """Prompts, cuts, accuracies and places written out from what the trainer sampled; samples by the same stream."""
    from hydra.utils import instantiate

    from experiments.bench import configuration, our_trainer

    words = ["task=chain", "reward=thinking", "objective=reinforce_pp", "method=[vsrm_chain]", "eval.every=0"]
    words += ["model.warm_start=null", "model.init_std=0.2", "trainer.max_steps=1", "trainer.save_every=0"]
    cfg = configuration(*words, "trainer.prompts_per_step=32", "trainer.rollouts_per_prompt=4")
    task = instantiate(cfg.task)
    task.score = lambda text, row: float("1" in text)  # one that an untrained model sometimes meets
    loaded = instantiate(cfg.model).load(task, 0)
    method = instantiate(cfg.method.vsrm)
    trainer = our_trainer(cfg, loaded, task, [method], tmp_path)
    asked, real = [], trainer.services.generate

    def spy(requests, stream):
        asked.append((requests, real(requests, stream)))
        return asked[-1][1]

    trainer.services.generate = spy
    trainer.train()
    ((requests, results),) = asked
    ctx, tokenizer, at, seen = trainer.last_ctx, loaded.tokenizer, 0, 0
    expected, rewards = torch.zeros_like(ctx.token_rewards_ST), []
    for row, traj in enumerate(ctx.trajs):
        ids = traj.segments[0].completion_ids
        tokens = [tokenizer.decode([i], skip_special_tokens=True) for i in ids]
        close = tokens.index("</think>") if "</think>" in tokens else None
        body = tokens[:close]
        opened = body.index("<think>") + 1 if "<think>" in body else 0
        cuts = [t for t, piece in enumerate(body) if t >= opened and piece in ("\nstep ", "\nwait ")]
        if cuts:
            full = len(body) - (close is None and tokens[-1] == "")
            for cut in [*cuts, full]:
                tag = tokenizer("</think>")["input_ids"]
                assert requests[at]["prompt_ids"] == [*traj.segments[0].prompt_ids, *ids[:cut], *tag]
                at += 1
            part = results[seen : (seen := at)]
            accuracy = [sum(task.score(r.text, traj.row) for r in answers) / 5 for answers in part]
            for t, r in zip(cuts, plain_rewards(accuracy, 0.7, 4, 1e-5), strict=True):
                expected[row, t] += r
                rewards.append(r)
        expected[row, len(ids) - 1] = traj.rewards["outcome"]
    assert at == len(requests) > 20 and min(rewards) < 0 < max(rewards)
    torch.testing.assert_close(ctx.token_rewards_ST, expected)
