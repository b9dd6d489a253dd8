"""TAPO against the worked example of its sheet, its degenerate cases, and a plain reference of the whole correction."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import Context, DataError, LossContext, Method, Segment, Trajectory, Turn, assemble
from methods.controls import Flip, Random, Scale, Shuffle
from methods.errors import ConfigError
from methods.objectives.policy_gradient import Grpo, Gspo, GspoToken, Sapo
from methods.objectives.ppo import Ppo
from methods.stack import Stack
from methods.tapo.matching import Rollouts, match
from methods.tapo.method import SCHEMA, Tapo
from methods.tapo.record import actions_of
from methods.tapo.similarity import Calls, words

EPS = 1e-6


def text(query):
    return {"tool": "search", "args": {"query": query}}


def image(name):
    return {"tool": "image_search", "args": {"image": name}}


def zoom(name, box):
    return {"tool": "zoom", "args": {"image": name, "bbox": box}}


# ---------------------------------------------------------------- batches


def rollout(group, sample, calls, outcome, length=None, **rewards):
    """One call, or a list of calls, per turn; turn k has the tokens 1 + 3k and 2 + 3k, the rest belongs to none."""
    turns = [Turn(0, 1 + 3 * k, 3 + 3 * k, "call", c if isinstance(c, list) else [c]) for k, c in enumerate(calls)]
    segment = Segment([1], [5] * (length or 2 + 3 * len(calls)))
    return Trajectory(f"q{group}", group, sample, [segment], turns, rewards={"task": float(outcome), **rewards})


def group_of(calls, outcomes, group=0):
    return [rollout(group, i, c, r) for i, (c, r) in enumerate(zip(calls, outcomes, strict=True))]


def context(trajs, names=("task",), weights=(1.0,)):
    """As the fixture `fake_context`, for use under hypothesis."""
    services = SimpleNamespace(gather=lambda x: x, rng=lambda name: np.random.default_rng(len(name)))
    ctx = Context("train", 0, 0, 0, services, trajs=trajs)
    ctx.reward_names, ctx.reward_weights = list(names), list(weights)
    ctx.reward_roles = ["outcome", *["aux"] * (len(names) - 1)]
    ctx.batch = assemble(trajs, 0)
    return ctx


def advantages(methods, trajs, objective=None, **keys):
    ctx = context(trajs, **keys)
    stack = Stack(methods, objective or Grpo())
    ctx.signal_fn = stack.signal
    return stack.advantages(ctx)


def of_turn(adv_ST, i, k):
    """The advantage of a turn; all its tokens have the same."""
    values = adv_ST[i, 1 + 3 * k : 3 + 3 * k]
    assert values[0] == values[1]
    return float(values[0])


CALLS = [
    [text("eiffel tower height meters"), text("Eiffel Tower architect")],
    [text("height of the Eiffel tower in meters"), image("img0")],
    [image("img0"), zoom("img0", [10, 10, 50, 50])],
    [text("Eiffel tower height in meters")],
    [image("img0"), text("paris weather")],
    [zoom("img0", [12, 10, 50, 50])],
    [],
    [text("eiffel tower architect"), text(""), None],
]
REWARDS = [1, 1, 1, 0, 0, 0, 0, 0]
DENSE = {"names": ("task", "dense"), "weights": (1.0, 1.0)}
EXAMPLE = {"theta": 0.8, "alpha_min": 0.32, "beta": 0.8}


def similarity(u, v, schema=SCHEMA):
    calls = Calls(schema)
    identities = np.array([calls.add(u), calls.add(v)])
    if (identities < 0).any():
        return 0.0
    i, j, sim = calls.pairs(identities, np.zeros(2, int), np.array([False, True]), 1e-6)
    found = dict(zip(zip(i.tolist(), j.tolist(), strict=True), sim.tolist(), strict=True))
    return found.get((0, 1), 0.0)


# ---------------------------------------------------------------- the worked example


def test_similarities_of_the_worked_example():
    assert similarity(CALLS[0][0], CALLS[1][0]) == pytest.approx(0.8, abs=EPS)
    assert similarity(CALLS[3][0], CALLS[0][0]) == pytest.approx(0.888889, abs=EPS)
    assert similarity(CALLS[3][0], CALLS[1][0]) == pytest.approx(0.909091, abs=EPS)
    assert similarity(CALLS[5][0], CALLS[2][1]) == pytest.approx(0.95, abs=EPS)


def test_matches_of_the_worked_example():
    outcome = np.array(REWARDS)
    adv_N = np.array([1.207381] * 3 + [-0.724429] * 5)
    rollouts = Rollouts(np.zeros(8, int), outcome > 0.5, outcome <= 0.5, adv_N)
    calls = Calls(SCHEMA)
    actions = actions_of(group_of(CALLS, REWARDS), calls, rollouts.mixed_N)
    found = match(calls, actions.call_U, actions.rollout_U, rollouts, 0.8)
    steps = list(zip(actions.rollout_U.tolist(), actions.turn_U.tolist(), strict=True))
    table = {  # match, confidence, reference advantage
        (3, 0): (0.909091, 0.606061, 1.207381),
        (4, 0): (1.0, 0.666667, 1.207381),
        (4, 1): (0, 0, 0),
        (5, 0): (0.95, 0.316667, 1.207381),
        (7, 0): (1.0, 0.333333, 1.207381),
        (7, 1): (0, 0, 0),
        (7, 2): (0, 0, 0),
    }
    for step, (m, a, reference) in table.items():
        u = steps.index(step)
        got = found.similarity_U[u], found.similarity_U[u] * found.support_U[u], found.reference_U[u]
        assert got == pytest.approx((m, a, reference), abs=EPS), step
        assert found.witness_U[u] == (m > 0)


def test_advantages_of_the_worked_example():
    method = Tapo(**EXAMPLE)
    adv_ST = advantages([method], group_of(CALLS, REWARDS))
    for i in range(3):
        assert adv_ST[i][: 2 + 3 * len(CALLS[i])].tolist() == pytest.approx([1.207381] * (2 + 3 * len(CALLS[i])))
    table = {(3, 0): -0.139032, (4, 0): -0.080492, (4, 1): -0.724429, (5, 0): -0.724429}
    table |= {(7, 0): -0.402460, (7, 1): -0.724429, (7, 2): -0.724429}
    for (i, k), expected in table.items():
        assert of_turn(adv_ST, i, k) == pytest.approx(expected, abs=EPS), (i, k)
    assert adv_ST[6, :2].tolist() == pytest.approx([-0.724429] * 2, abs=EPS)
    gained = [0.585397, 0.643937, 0.321968]  # beta D
    assert method.last["mean_transfer"] == pytest.approx(sum(gained) / 3 / 0.8, abs=EPS)
    assert method.last["mean_match"] == pytest.approx((0.909091 + 1 + 1) / 3, abs=EPS)
    assert method.last["mean_support"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3, abs=EPS)
    assert method.last["frac_steps_corrected"] == pytest.approx(3 / 7)
    assert method.last["frac_clipped_to_zero"] == 0


def test_token_broadcast_of_the_worked_example():
    trajs = group_of(CALLS, REWARDS)
    trajs[4].segments[0].completion_ids = [5] * 10
    trajs[4].turns[0].start, trajs[4].turns[0].end = 1, 3
    trajs[4].turns[1] = Turn(0, 5, 8, "call", [image("img0")])
    row = advantages([Tapo(**EXAMPLE)], trajs)[4, :10].tolist()
    assert [row[t] for t in (1, 2, 5, 6, 7)] == pytest.approx([-0.080492] * 5, abs=EPS)
    assert [row[t] for t in (0, 3, 4, 8, 9)] == pytest.approx([-0.724429] * 5, abs=EPS)


def test_clip_case_of_the_worked_example():
    method = Tapo(**EXAMPLE)
    adv_ST = advantages([method], group_of([[image("x")], [image("x")], *[[]] * 6], [1, *[0] * 7]))
    assert of_turn(adv_ST, 0, 0) == pytest.approx(2.474174, abs=EPS)
    assert float(adv_ST[1, 0]) == pytest.approx(-0.353453, abs=EPS)
    assert method.last["mean_transfer"] * 0.8 == pytest.approx(1.979339, abs=EPS)  # unclipped: +1.625886
    assert of_turn(adv_ST, 1, 0) == 0
    assert method.last["frac_clipped_to_zero"] == 1


def test_ablations_of_the_worked_example():
    """Without the minimum the corrected advantage changes sign; without support rare calls pass the gate too."""
    clip_case = group_of([[image("x")], [image("x")], *[[]] * 6], [1, *[0] * 7])
    assert of_turn(advantages([Tapo(**EXAMPLE, clip=False)], clip_case), 1, 0) == pytest.approx(1.625886, abs=EPS)
    adv_ST = advantages([Tapo(**EXAMPLE, support=False, clip=False)], group_of(CALLS, REWARDS))
    for (i, k), m in {(3, 0): 10 / 11, (4, 0): 1.0, (5, 0): 0.95, (7, 0): 1.0}.items():
        assert of_turn(adv_ST, i, k) == pytest.approx(-0.724429 + 0.8 * m * 1.207381, abs=EPS)
    assert of_turn(advantages([Tapo(**EXAMPLE, support=False)], group_of(CALLS, REWARDS)), 5, 0) == 0


def test_precision_is_the_share_of_useful_calls_among_the_corrected():
    """Of the six failing calls of the example that can be read four are useful here; two of the three corrected are."""
    trajs = group_of(CALLS, REWARDS)
    for t in trajs:
        t.row = SimpleNamespace(meta={"useful_calls": [image("img0"), CALLS[3][0], text("paris weather"), text("")]})
    method = Tapo(**EXAMPLE)
    advantages([method], trajs)
    assert (method.last["precision"], method.last["useful"]) == pytest.approx((2 / 3, 4 / 6))
    advantages([method], group_of(CALLS, REWARDS))  # nobody knows
    assert math.isnan(method.last["precision"]) and math.isnan(method.last["useful"])


def test_rates_of_the_worked_example():
    method = Tapo(**EXAMPLE)
    advantages([method], group_of(CALLS, REWARDS) + group_of([[image("q")], []], [0, 0], group=1))
    expected = {"rho_traj": 4 / 7, "rho_action": 4 / 7, "rho_traj_mixed": 0.8, "rho_action_mixed": 4 / 6}
    expected |= {"rho_traj_tool_users": 4 / 5}
    assert {k: method.metrics()[k] for k in expected} == pytest.approx(expected)


# ---------------------------------------------------------------- the three base losses


PI_OLD = [[0.5, 0.4, 0.3, 0.2], [0.6, 0.5, 0.4, 0.3]]
PI = [[0.55, 0.38, 0.42, 0.21], [0.63, 0.45, 0.41, 0.30]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0]]
A = [[0.707036] * 4, [-0.707036, -0.1, -0.1, -0.707036]]


def loss_case():
    return LossContext(
        logps_BT=torch.tensor(PI, dtype=torch.float64).log().requires_grad_(),
        entropies_BT=torch.zeros(2, 4),
        mask_BT=torch.tensor(MASK),
        adv_BT=torch.tensor(A, dtype=torch.float64),
        old_logps_BT=torch.tensor(PI_OLD, dtype=torch.float64).log(),
        ref_logps_BT=None,
        denominator_tokens=torch.tensor(7.0),
        accumulation=1,
        max_completion_tokens=4,
    )


@pytest.mark.parametrize(
    ("objective", "value", "gradient"),
    [
        (Grpo(), -0.224217, [0.123731, 0.015000, 0.017083, 0]),
        (GspoToken(epsilon_low=0.2, epsilon_high=0.2), -0.243993, [0.116594, 0.016491, 0.016491, 0]),
        (Sapo(), -0.458164, [0.123646, 0.014959, 0.017080, 0]),
    ],
    ids=["grpo", "gspo_token", "sapo"],
)
def test_losses_of_the_worked_example(objective, value, gradient):
    lctx = loss_case()
    loss = objective.loss(lctx)
    assert loss.item() == pytest.approx(value, abs=EPS)
    assert torch.autograd.grad(loss, lctx.logps_BT)[0][1].tolist() == pytest.approx(gradient, abs=EPS)


def test_plain_gspo_ratio_times_token_advantages_routes_nothing():
    """The pitfall of the sheet: same value, one gradient for the row; so the stack refuses it."""
    lctx = loss_case()
    ratio_B1 = Gspo().log_ratio(lctx).exp()
    assert ratio_B1.flatten().tolist() == pytest.approx([1.113290, 0.989430], abs=EPS)
    clipped = torch.clamp(ratio_B1, 0.8, 1.2)
    each = -torch.min(ratio_B1 * lctx.adv_BT, clipped * lctx.adv_BT) * lctx.mask_BT
    loss = (each.sum(1) / lctx.mask_BT.sum(1)).mean()
    assert loss.item() == pytest.approx(-0.243993, abs=EPS)
    gradient = torch.autograd.grad(loss, lctx.logps_BT)[0][1].tolist()
    assert gradient == pytest.approx([0.049858, 0.049858, 0.049858, 0], abs=EPS)
    with pytest.raises(ConfigError, match="choose objective=gspo_token"):
        Stack([Tapo()], Gspo())


@pytest.mark.parametrize("objective", [Grpo(), GspoToken(), Sapo()], ids=lambda o: o.name)
def test_gradients_on_fresh_rollouts_are_those_of_the_token_advantages(objective):
    """At r = 1 the three losses have the gradient -A / (G |o|); a token corrected to 0 has none."""
    adv_ST = advantages([Tapo(**EXAMPLE)], group_of(CALLS, REWARDS))
    mask_ST = context(group_of(CALLS, REWARDS)).batch.model_mask_ST
    logps = torch.full(adv_ST.shape, -1.0, requires_grad=True)
    zeros = torch.zeros_like(adv_ST)
    lctx = LossContext(logps, zeros, mask_ST, adv_ST, logps.detach(), None, mask_ST.sum(), 1, 11)
    gradient = torch.autograd.grad(objective.loss(lctx), logps)[0]
    torch.testing.assert_close(gradient, -adv_ST / 8 / mask_ST.sum(1, keepdim=True))


# ---------------------------------------------------------------- similarity and schema


def test_words_are_normalised():
    assert words("The  Eiffel-Tower, an ＡＢＣ café's height?") == ["eiffel", "tower", "abc", "café", "s", "height"]
    assert words("A don't") == words("don\u2019t") == ["don", "t"]
    assert words("東京 tower") == ["東", "京", "tower"] and words("東京タワー")[:2] == ["東", "京"]
    assert words("c++ vs c") == ["c++", "vs", "c"]  # symbols are no punctuation
    assert words("?! the a") == [] and words("हिन्दी गीत") == ["हिन्दी", "गीत"]


def test_ascii_and_other_texts_take_the_same_normalisation():
    ascii_text = "".join(map(chr, range(128)))
    assert words(ascii_text) == [w for w in words(ascii_text + " é") if w != "é"]


def test_dice_counts_repeats():
    # {x, x, y} and {x, y, y}: two in common of three each.
    assert similarity(text("x x y"), text("y x y")) == pytest.approx(2 / 3)
    assert similarity(text("x x"), text("x")) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "call",
    [
        None,
        "search: x",
        {},
        {"tool": "search"},
        {"tool": "search", "args": None},
        {"tool": ["search"], "args": {"query": "x"}},
        {"tool": "search", "args": {"q": "x"}},
        text(""),
        text("?? the"),
        text(None),
        text(["x"]),
        image(None),
        image(""),
        zoom("i", None),
        zoom(None, [0, 0, 1, 1]),
        zoom("i", [0, 0, 1]),
        zoom("i", [0, 0, 0, 1]),
        zoom("i", [5, 0, 1, 1]),
        zoom("i", [0, 0, math.nan, 1]),
        zoom("i", [0, 0, math.inf, 1]),
        zoom("i", ["0", 0, 1, 1]),
        zoom("i", [0, 0, True, 1]),
        zoom("i", [0, 0, 10**400, 1]),
    ],
)
def test_what_matches_nothing_not_even_itself(call):
    assert similarity(call, call) == 0
    adv_ST = advantages([Tapo()], group_of([[call], [call]], [1, 0]))
    assert (adv_ST[1, :5] == adv_ST[1, 0]).all()


def test_images_and_regions_of_recorded_calls():
    """As a vision-language agent writes them: identifiers, indices or content hashes, and boxes in pixels."""
    recorded = [json.loads(line) for line in RECORDED.splitlines()]
    search_a, search_b, index, near, far, other_image, moved = recorded
    assert similarity(search_a, search_a) == 1 and similarity(search_a, search_b) == 0
    assert similarity(index, index) == 1 and similarity(index, image("0")) == 0
    assert similarity(near, moved) == pytest.approx(90 * 100 / (2 * 100 * 100 - 90 * 100))
    assert similarity(near, far) == 0  # no overlap
    assert similarity(near, other_image) == 0  # same box, other image
    adv_ST = advantages([Tapo()], group_of([[near], [moved], [far], [other_image]], [1, 0, 0, 0]))
    changed = [of_turn(adv_ST, i, 0) > float(adv_ST[i, 0]) for i in (1, 2, 3)]
    assert changed == [True, False, False]


RECORDED = """\
{"tool": "image_search", "args": {"image": "sha256:0a41"}}
{"tool": "image_search", "args": {"image": "sha256:77fe"}}
{"tool": "image_search", "args": {"image": 0}}
{"tool": "zoom", "args": {"image": "img0", "bbox": [100, 100, 200, 200]}}
{"tool": "zoom", "args": {"image": "img0", "bbox": [300, 300, 400, 400]}}
{"tool": "zoom", "args": {"image": "img1", "bbox": [100, 100, 200, 200]}}
{"tool": "zoom", "args": {"bbox": [110.0, 100.0, 210.0, 200.0], "image": "img0"}}"""


def test_unknown_tools_match_on_equal_arguments():
    call = {"tool": "lookup", "args": {"key": "k", "page": 1}}
    assert similarity(call, {"tool": "lookup", "args": {"page": 1, "key": "k"}}) == 1
    assert similarity(call, {"tool": "lookup", "args": {"key": "K", "page": 1}}) == 0
    assert similarity(call, {"tool": "other", "args": call["args"]}) == 0
    assert similarity({"tool": "search", "args": {}}, {"tool": "search", "args": {}}, {}) == 1


def test_a_schema_with_several_fields_takes_their_minimum():
    schema = {"find": {"query": "text", "site": "id", "title": "text"}, "crop": {"outer": "box", "inner": "box"}}
    schema |= {"search": {"query": "text"}}

    def find(query, site, title):
        return {"tool": "find", "args": {"query": query, "site": site, "title": title}}

    def crop(outer, inner):
        return {"tool": "crop", "args": {"outer": outer, "inner": inner}}

    call = find("a b c d", "x", "e f")
    assert similarity(call, find("b c d", "x", "e f"), schema) == 1  # `a` is an article
    assert similarity(call, find("b c d q", "x", "e f"), schema) == pytest.approx(6 / 7)
    assert similarity(call, find("b c d q", "x", "e g"), schema) == pytest.approx(0.5)
    assert similarity(call, find("b c d", "y", "e f"), schema) == 0
    assert similarity(find("x", "1", "y"), find("y", "1", "x"), schema) == 0  # fields do not mix
    unit, half = [0, 0, 2, 1], [0, 0, 1, 1]
    assert similarity(crop(unit, unit), crop(unit, half), schema) == pytest.approx(0.5)
    assert similarity(crop(unit, unit), crop(half, half), schema) == pytest.approx(0.5)
    assert similarity(text("b c"), text("b c"), schema) == 1


def test_excluded_tools_match_nothing_but_count():
    trajs = group_of([[image("x")], [image("x")], [text("y")]], [1, 0, 0])
    method = Tapo(exclude_tools=["image_search"])
    base = advantages([], trajs)
    assert torch.equal(advantages([method], trajs), base)
    assert method.last["rho_action"] == 0
    assert not torch.equal(advantages([Tapo()], trajs), base)


@pytest.mark.parametrize(
    ("keys", "words_"),
    [
        ({"theta": 0.0}, r"tapo\.theta\. Got: 0\.0"),
        ({"beta": -0.1}, r"tapo\.beta\. Got: -0\.1"),
        ({"alpha_min": -1.0}, r"tapo\.alpha_min\. Got: -1"),
        ({"schema": {"search": {"query": "txt"}}}, "did you mean 'text'"),
        ({"schema": {"search": {}}}, "name at least one field"),
        ({"exclude_tools": "search"}, r"write \[search\]"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(keys, words_):
    with pytest.raises(ConfigError, match=words_):
        Tapo(**keys)


def test_an_objective_without_a_group_baseline_is_refused():
    with pytest.raises(ConfigError, match="choose objective=grpo"):
        Stack([Tapo()], Ppo())


# ---------------------------------------------------------------- degenerate cases


def unchanged(trajs, method=None, **keys):
    method = method or Tapo()
    return torch.equal(advantages([method], trajs, **keys), advantages([], trajs, **keys))


SHARED = [[image("x")], [image("x")], [image("x"), text("y")], []]


@pytest.mark.parametrize("outcomes", [[0] * 4, [1] * 4], ids=["all_fail", "all_succeed"])
def test_equal_rewards_change_nothing(outcomes):
    trajs = group_of(SHARED, outcomes)
    assert unchanged(trajs) and not advantages([Tapo()], trajs).any()


def test_no_success_changes_nothing():
    trajs = group_of(SHARED, [0, 0.2, 0.3, 0.5])
    assert unchanged(trajs)


def test_without_tool_calls_nothing_changes_and_the_rates_count_it():
    method = Tapo()
    trajs = group_of([[], [], []], [1, 0, 0])
    with pytest.warns(UserWarning, match="saw no tool call in the first 3 rollouts") as said:
        assert unchanged(trajs, method) and unchanged(trajs, method)
    assert len(said) == 1
    assert method.last["rho_traj"] == 0 and math.isnan(method.last["rho_traj_tool_users"])
    for t in trajs:
        t.turns = [Turn(0, 0, 2, "answer")]
    assert unchanged(trajs)
    assert unchanged([rollout(0, 0, [image("x")], 0)])  # G = 1: A = 0


def test_a_failing_rollout_with_a_positive_advantage_keeps_it():
    trajs = group_of(SHARED, [1, 0, 0, 0])
    for t, dense in zip(trajs, (0.0, 3.0, 0.0, 0.0), strict=True):
        t.rewards["dense"] = dense
    base, adv_ST = advantages([], trajs, **DENSE), advantages([Tapo(alpha_min=0.0)], trajs, **DENSE)
    assert base[1, 0] > 0 and torch.equal(adv_ST[1], base[1])


def test_a_success_with_a_negative_advantage_counts_and_groups_without_gain_are_dropped():
    trajs = group_of([[image("x"), image("z")], [image("x")], [image("x"), image("z")], []], [1, 1, 0, 0])
    for t, dense in zip(trajs, (-0.8, 3.0, 0.0, 0.0), strict=True):
        t.rewards["dense"] = dense
    base, adv_ST = advantages([], trajs, **DENSE), advantages([Tapo(beta=0.1)], trajs, **DENSE)
    low, high, fails = base[:3, 0].tolist()
    assert low < 0 < high and fails < 0
    assert of_turn(adv_ST, 2, 0) == pytest.approx(fails + 0.1 * (low + high) / 2)
    assert of_turn(adv_ST, 2, 1) == fails  # z: only the success with A < 0 made it


def test_nan_outcomes_are_neither_success_nor_failure():
    trajs = group_of([[image("x")], [image("x")], [image("x")], [image("y")]], [math.nan, 0, 0, 1])
    method = Tapo()
    assert unchanged(trajs, method)  # the only x besides failures is in a rollout without a reward
    assert method.last["rho_action"] == 0
    trajs[2].rewards["task"] = 1.0
    adv_ST = advantages([method], trajs)
    assert not adv_ST[0].any() and of_turn(adv_ST, 1, 0) > float(adv_ST[1, 0])
    assert method.last["rho_traj"] == 1


def test_one_success_supports_all_its_calls():
    adv_ST = advantages([Tapo()], group_of([[image("x"), text("junk")], [text("junk")], []], [1, 0, 0]))
    assert of_turn(adv_ST, 1, 0) == 0


@pytest.mark.parametrize("keys", [{"beta": 0.0}, {"theta": 1.01}, {"alpha_min": 1.5}])
def test_switched_off_it_is_the_base_bit_for_bit(keys):
    assert unchanged(group_of(CALLS, REWARDS), Tapo(**keys))


def test_a_repeated_call_is_corrected_each_time_and_supports_once():
    calls = [[image("x"), image("x"), image("x")], [text("other")], [image("x"), image("x")], []]
    adv_ST = advantages([Tapo()], group_of(calls, [1, 1, 0, 0]))
    base = float(adv_ST[3, 0])
    assert of_turn(adv_ST, 2, 0) == of_turn(adv_ST, 2, 1) == pytest.approx(base + 0.8 * 0.5 * -base)


def test_a_turn_with_several_calls_gets_the_mean_of_their_transfers():
    calls = [[image("x")], [[image("x"), text("junk"), None, text("q")]], [image("x")], [image("y")]]
    method = Tapo(beta=0.4)
    adv_ST = advantages([method], group_of(calls, [1, 0, 0, 0]))
    full, shared, base = of_turn(adv_ST, 2, 0), of_turn(adv_ST, 1, 0), float(adv_ST[3, 0])
    assert full == 0 and shared == pytest.approx(base + 0.4 * float(adv_ST[0, 0]) / 4)
    assert method.last["rho_action"] == pytest.approx(2 / 5)  # the unreadable call does not count


def test_a_turn_without_tokens_is_skipped():
    trajs = group_of([[image("x")], [image("x")], [image("x")]], [1, 0, 0])
    trajs[1].turns[0].end = trajs[1].turns[0].start
    method = Tapo()
    adv_ST = advantages([method], trajs)
    assert (adv_ST[1, :5] == adv_ST[1, 0]).all() and of_turn(adv_ST, 2, 0) == 0
    assert method.last["frac_steps_corrected"] == 1


def test_overlapping_turns_are_an_error():
    trajs = group_of([[image("x"), image("y")], [], []], [1, 0, 0])
    trajs[0].turns[1].start -= 2
    with pytest.raises(DataError, match=r"overlap.*row q0, sample 0.*1:3 of segment 0, 2:6 of segment 0"):
        advantages([Tapo()], trajs)


def test_tool_text_and_other_segments_keep_their_advantage():
    trajs = group_of([[image("x")], [image("x")], []], [1, 0, 0])
    trajs[1].segments = [Segment([1], [5] * 4), Segment([1], [5] * 6, model_mask=[1, 1, 1, 0, 0, 1])]
    trajs[1].turns = [Turn(1, 1, 3, "call", [image("x")])]
    adv_ST = advantages([Tapo()], trajs)
    base = float(adv_ST[1, 0])
    assert base < 0 and adv_ST[1, :4].tolist() == [base] * 4
    assert adv_ST[2, :6].tolist() == [base, 0, 0, 0, 0, base]


def test_witnesses_come_from_the_own_prompt_only():
    trajs = group_of([[image("x")], []], [1, 0]) + group_of([[image("y")], [image("x")]], [1, 0], group=1)
    assert unchanged(trajs)


def test_chains_join_a_reference_group():
    """Components: u ~ v ~ w are one group of support 1 although u and w are less alike than theta."""
    u, v, w = text("b c d e f"), text("b c d e g"), text("b c d h g")
    trajs = group_of([[u], [v], [w], [u], []], [1, 1, 1, 0, 0])
    assert similarity(u, v) == similarity(v, w) == 0.8 > similarity(u, w)
    adv_ST = advantages([Tapo()], trajs)
    assert of_turn(adv_ST, 3, 0) == pytest.approx(min(0, float(adv_ST[4, 0] + 0.8 * adv_ST[0, 0])))


@pytest.mark.parametrize(("rare", "confidence"), [("0 2 3 4 5 6 7 8 9 10", 0.9 / 3), ("0 0 3 4 5 6 7 8 9 10", 1.6 / 3)])
def test_the_best_match_decides_and_support_breaks_ties(rare, confidence):
    """A frequent call is alike by 0.8, a rare one by 0.9 (it wins) or 0.8 (it loses); they are no group."""
    frequent = text("1 2 3 4 5 6 7 8 x y")
    adv_ST = advantages(
        [Tapo(alpha_min=0.3, beta=0.5)],
        group_of([[text(rare)], [frequent], [frequent], [text("1 2 3 4 5 6 7 8 9 10")], []], [1, 1, 1, 0, 0]),
    )
    assert of_turn(adv_ST, 3, 0) == pytest.approx(float(adv_ST[4, 0] + 0.5 * confidence * adv_ST[0, 0]))


# ---------------------------------------------------------------- a plain reference of the whole correction


def plain_similarity(u, v):
    if u is None or v is None or u["tool"] != v["tool"]:
        return 0.0
    a, b = u["args"], v["args"]
    if u["tool"] == "search":
        a, b = (
            Counter(w for w in re.findall(r"\w+", x["query"].lower()) if w not in ("a", "an", "the")) for x in (a, b)
        )
        return 2 * sum((a & b).values()) / (sum(a.values()) + sum(b.values())) if a and b else 0.0
    if u["tool"] == "image_search":
        return float(a["image"] == b["image"] != "")
    if u["tool"] == "zoom":
        (a1, a2, a3, a4), (b1, b2, b3, b4) = a["bbox"], b["bbox"]
        if a["image"] != b["image"] or min(a3 - a1, a4 - a2, b3 - b1, b4 - b2) <= 0:
            return 0.0
        both = max(min(a3, b3) - max(a1, b1), 0) * max(min(a4, b4) - max(a2, b2), 0)
        return both / ((a3 - a1) * (a4 - a2) + (b3 - b1) * (b4 - b2) - both)
    return float(a == b)


def plain_group(trajs, base_N, theta, alpha_min, beta):
    """{(rollout, turn): A'} and the number of failing calls with a witness, for the rollouts of one prompt."""
    outcome = [t.rewards["task"] for t in trajs]
    S, F = [i for i, r in enumerate(outcome) if r > 0.5], [i for i, r in enumerate(outcome) if r <= 0.5]
    members = [(i, c) for i in S for turn in trajs[i].turns for c in turn.calls if plain_similarity(c, c) > 0]
    label = list(range(len(members)))
    for a in range(len(members)):
        for b in range(a):
            if plain_similarity(members[a][1], members[b][1]) >= theta - 1e-9:
                old, new = label[a], label[b]
                label = [new if x == old else x for x in label]
    groups = []
    for g in set(label):
        inside = [m for m, x in zip(members, label, strict=True) if x == g]
        T = {i for i, _ in inside}
        groups.append((len(T) / len(S), sum(base_N[i] for i in T) / len(T), [c for _, c in inside]))
    new, witnessed = {}, 0
    for j in F:
        for k, turn in enumerate(trajs[j].turns):
            total = 0.0
            for u in turn.calls:
                every = [plain_similarity(u, v) for _, _, vs in groups for v in vs]
                witnessed += max(every, default=0) >= theta - 1e-9
                found = [(max(plain_similarity(u, v) for v in vs), s, abar) for s, abar, vs in groups if abar > 0]
                m, s, abar = max(found, default=(0, 0, 0))
                if m >= theta - 1e-9 and m * s >= alpha_min - 1e-9:
                    total += m * s * abar
            if base_N[j] < 0:
                new[j, k] = min(0.0, base_N[j] + beta * total / len(turn.calls))
    return new, witnessed


QUERIES = ["b c d e f", "b c d e g", "f e d c b", "B, c d the e f!", "b c d h g", "b b c", "b c", "z", "", "the"]
BOXES = [[0, 0, 10, 10], [0, 0, 10, 9], [1, 0, 11, 10], [5, 5, 15, 15], [3, 3, 3, 9]]
a_call = st.one_of(
    st.sampled_from(QUERIES).map(text),
    st.sampled_from(["i", "j", ""]).map(image),
    st.tuples(st.sampled_from(["i", "j"]), st.sampled_from(BOXES)).map(lambda x: zoom(*x)),
    st.sampled_from([0, 1]).map(lambda n: {"tool": "unknown", "args": {"n": n}}),
    st.none(),
)
a_turn = st.one_of(a_call, st.lists(a_call, min_size=2, max_size=3))
a_rollout = st.tuples(st.lists(a_turn, max_size=4), st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0, math.nan]))
a_batch = st.lists(st.lists(a_rollout, min_size=1, max_size=7), min_size=1, max_size=3)
a_setting = st.tuples(
    st.sampled_from([0.4, 0.8, 1.0]), st.sampled_from([0.0, 0.3, 0.5]), st.sampled_from([0.3, 0.8, 2])
)


def batch_of(groups, dense=None):
    trajs = [t for g, members in enumerate(groups) for t in group_of(*zip(*members, strict=True), group=g)]
    for i, t in enumerate(trajs):
        t.rewards["dense"] = 0.0 if dense is None or math.isnan(t.rewards["task"]) else float(dense[i % len(dense)])
    return trajs


@settings(max_examples=150, deadline=None)
@given(a_batch, a_setting, st.one_of(st.none(), st.lists(st.sampled_from([-2.0, 0.0, 1.0]), min_size=1, max_size=5)))
def test_the_whole_correction_is_the_plain_reference(groups, setting, dense):
    trajs = batch_of(groups, dense)
    theta, alpha_min, beta = setting
    base_ST = advantages([], trajs, **DENSE)
    method = Tapo(theta, alpha_min, beta)
    adv_ST = advantages([method], trajs, **DENSE)
    expected, witnessed, start = base_ST.clone(), 0, 0
    for members in groups:
        own = trajs[start : start + len(members)]
        new, found = plain_group(own, base_ST[start : start + len(members), 0].tolist(), theta, alpha_min, beta)
        for (i, k), value in new.items():
            expected[start + i, 1 + 3 * k : 3 + 3 * k] = value
        witnessed, start = witnessed + found, start + len(members)
    torch.testing.assert_close(adv_ST, expected, rtol=1e-5, atol=1e-6)
    readable = sum(c is not None for t in trajs if t.rewards["task"] <= 0.5 for turn in t.turns for c in turn.calls)
    if readable:
        assert method.last["rho_action"] == pytest.approx(witnessed / readable)


@settings(max_examples=80, deadline=None)
@given(a_batch, a_setting, st.randoms(use_true_random=False))
def test_properties(groups, setting, random):
    trajs = batch_of(groups)
    base_ST, adv_ST = advantages([], trajs), advantages([Tapo(*setting)], trajs)
    assert torch.isfinite(adv_ST).all()
    negative = base_ST < 0
    assert (adv_ST[negative] >= base_ST[negative]).all() and (adv_ST[negative] <= 0).all()
    assert torch.equal(adv_ST[~negative], base_ST[~negative])  # successes among them
    for off in ({"beta": 0.0}, {"theta": 1.01}):
        assert unchanged(trajs, Tapo(**off))
    order = list(range(len(trajs)))
    random.shuffle(order)
    shuffled = advantages([Tapo(*setting)], [trajs[i] for i in order])
    torch.testing.assert_close(shuffled, adv_ST[order], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the control, the stack, the trainer


def lookup_world(seed, prompts=200, group=8, queries=5):
    """Each prompt has one useful query: with it a rollout succeeds in three of ten cases, else hardly ever."""
    draw = np.random.default_rng(seed)
    trajs = []
    for g in range(prompts):
        asked = draw.integers(0, queries, size=group)
        succeeds = draw.random(group) < np.where(asked == 0, 0.3, 0.02)
        trajs += group_of([[image(f"{q}")] for q in asked.tolist()], succeeds, group=g)
    return trajs


def corrected(methods, trajs):
    """How many corrected calls are useful, how many there are, and per prompt."""
    base_ST, adv_ST = advantages([], trajs), advantages(methods, trajs)
    rows = (adv_ST != base_ST).any(1).nonzero().flatten().tolist()
    useful = sum(trajs[i].turns[0].calls[0]["args"]["image"] == "0" for i in rows)
    return useful, len(rows), Counter(trajs[i].group_id for i in rows)


def test_the_control_corrects_as_much_on_the_wrong_calls():
    """Sheet 9, check 3: corrected calls are useful far more often than under random identities."""
    trajs = lookup_world(0)
    useful, total, per_prompt = corrected([Tapo()], trajs)
    random_useful, random_total, random_per_prompt = corrected([Tapo(), Shuffle("tapo.transfer")], trajs)
    assert total == random_total > 60 and per_prompt == random_per_prompt
    assert useful > 0.6 * total and random_useful < 0.35 * total


@pytest.mark.parametrize("control", [Flip, Random, Scale])
def test_other_controls_run_on_the_transfer(control):
    trajs = group_of(CALLS, REWARDS)
    entry = control("tapo.transfer", 0.0) if control is Scale else control("tapo.transfer")
    adv_ST, base_ST = advantages([Tapo(), entry], trajs), advantages([], trajs)
    assert torch.isfinite(adv_ST).all() and (adv_ST[:3] == base_ST[:3]).all() and (adv_ST[3:] <= 0).all()
    if control is Scale:
        assert torch.equal(adv_ST, base_ST)
    if control is Flip:
        assert of_turn(adv_ST, 4, 0) == pytest.approx(2 * -0.724429 + 0.080492, abs=EPS)


class Recorded(Method):
    """Writes two turns with calls and an outcome into each rollout, so that a task without tools has some."""

    name = "recorded"

    def rewards(self, trajs, ctx):
        for t in trajs:
            half = max(len(t.segments[0].completion_ids) // 2, 1)
            calls = [[image(t.sample_id % 2)], [text(f"query {t.sample_id % 3}")]]
            spans = ((0, half), (half, len(t.segments[0].completion_ids)))
            t.turns = [Turn(0, a, b, "call", c) for (a, b), c in zip(spans, calls, strict=True)]
            t.rewards["task"] = float(t.sample_id == (t.group_id + ctx.round) % 4)


def weights(trainer):
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("objective", [Grpo, GspoToken, Sapo], ids=lambda o: o.name)
def test_training_with_it(objective, make_trainer):
    """beta = 0 is the base run bit for bit; with beta it is another run, and the rates are logged every step."""
    keys = {"updates_per_generation": 2, "rows_per_device": 8}
    base = weights(make_trainer([Recorded()], objective(), **keys))
    assert torch.equal(base, weights(make_trainer([Recorded(), Tapo(beta=0.0)], objective(), **keys)))
    trainer = make_trainer([Recorded(), Tapo()], objective(), **keys)
    assert not torch.equal(base, weights(trainer))
    logs = [h for h in trainer.state.log_history if "loss" in h]
    assert logs[-1]["tapo/rho_traj"] > 0 and logs[-1]["tapo/mean_transfer"] > 0
    assert {f"tapo/{k}" for k in trainer.stack.methods[1].last} <= set(logs[-1])


class Seen(Method):
    """Keeps the groups and the advantages of each generation."""

    name = "seen"

    def __init__(self):
        self.groups, self.advantages_ = [], []

    def advantages(self, adv_ST, ctx):
        self.groups.append(Counter(t.group_id for t in ctx.trajs))
        self.advantages_.append(adv_ST)
        return adv_ST


@pytest.mark.parametrize(
    "keys",
    [
        {"rows_per_device": 4},
        {"rows_per_device": 2, "updates_per_generation": 2},
        {"rows_per_device": 8, "iterations": 2},
    ],
)
def test_groups_are_whole_however_a_generation_is_cut(keys, make_trainer):
    """Accumulation, mini-batches and repeated passes come after the hook: it sees every rollout of every prompt."""
    seen, whole = Seen(), Seen()
    make_trainer([Recorded(), Tapo(), whole]).train()
    make_trainer([Recorded(), Tapo(), seen], **keys).train()
    assert all(set(groups.values()) == {4} for groups in seen.groups)
    if "updates_per_generation" not in keys:  # the same rollouts, cut otherwise
        assert torch.equal(seen.advantages_[0], whole.advantages_[0])


# ---------------------------------------------------------------- size


def test_blocks_of_calls_give_what_one_product_gives(monkeypatch):
    trajs = group_of(CALLS, REWARDS) + group_of([*reversed(CALLS)], [0, 1, 0, 0, 1, 0, 0, 1], group=1)
    whole = advantages([Tapo(**EXAMPLE)], trajs)
    monkeypatch.setattr("methods.tapo.similarity.ROWS", 2)
    assert torch.equal(advantages([Tapo(**EXAMPLE)], trajs), whole)


@pytest.mark.parametrize("shared", ["none", "a word"])
def test_one_prompt_of_1024_rollouts_with_8_calls_each(shared):
    """8192 different calls in one group: work is done by sparse products in blocks, not in Python."""
    word = "" if shared == "none" else "what "
    calls = [[text(f"{word}k{i} m{i} n{i} c{k} d{k}") for k in range(8)] for i in range(1024)]
    trajs = group_of(calls, [float(i % 4 == 0) for i in range(1024)])
    started = time.process_time()
    advantages([Tapo()], trajs)
    assert time.process_time() - started < 20
