"""Graph memory: the worked example of its sheet, properties, degenerate cases, and what the hooks do in real steps."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import Segment, Trajectory, Turn
from methods.errors import DataError
from methods.graph_memory.graph import Edges, Memory, Strategy, joined, memory_of, state_of
from methods.graph_memory.induction import absorb, merge, plant, prune
from methods.graph_memory.machine import (
    ANALYSIS,
    ANSWER,
    INVALID,
    PLAN,
    STATES,
    TOOL,
    canonical_path,
    events,
    strategy,
)
from methods.graph_memory.relevance import (
    best,
    candidate_probabilities,
    expected_slope,
    nearest_of,
    sampled_slope,
    unit,
)

NEW = np.array([[0.8, 0.6]])


def edges(pairs, weights):
    source, target = np.array(pairs, np.int64).reshape(-1, 2).T
    return Edges(source, target, np.array(weights, float), np.zeros((len(pairs), 2), np.int64))


def dense(edges, rows, columns):
    """(rows, columns) weights, 0 where there is no edge."""
    weights = np.zeros((rows, columns))
    weights[edges.source_E, edges.target_E] = edges.weight_E
    return weights


@pytest.fixture
def memory():
    """q1 -> t1, t2; q2 -> t2; q3 -> t3; t1 -> m1; t2 -> m1, m2; t3 -> m3; all weights 1 but t2 -> m2."""
    return Memory(
        ["q1", "q2", "q3"],
        np.array([[1, 0], [0.6, 0.8], [0, 1]]),
        [(PLAN,), (TOOL,), (ANSWER,)],
        [Strategy("m1"), Strategy("m2"), Strategy("m3")],
        edges([(0, 0), (0, 1), (1, 1), (2, 2)], [1, 1, 1, 1]),
        edges([(0, 0), (1, 0), (1, 1), (2, 2)], [1, 1, 0.5, 1]),
    )


# ---- the worked example


def test_relevance_and_probabilities(memory):
    woken = memory.activate(NEW, 2)
    assert woken.question_N.tolist() == [0, 1] and woken.similarity_N == pytest.approx([0.8, 0.96])
    assert woken.hop_BJ == pytest.approx(np.array([[0.8, 1.76, 0]]))
    assert woken.relevance_BM == pytest.approx(np.array([[2.56, 0.88, 0]]))
    assert candidate_probabilities(woken.relevance_BM)[0] == pytest.approx([0.842905, 0.157095, 0], abs=1e-6)
    assert best(woken.relevance_BM[0], 3).tolist() == [0, 1]  # m3 is not reached


def test_the_linear_form_is_not_the_logistic_one(memory):
    """With the logistic function in both hops the unreachable m3 would outrank m2."""
    A_qt, A_tm = dense(memory.to_paths, 3, 3), dense(memory.to_strategies, 3, 3)
    hop = 1 / (1 + np.exp(-(np.array([0.8, 0.96, 0]) @ A_qt)))
    assert 1 / (1 + np.exp(-(hop @ A_tm))) == pytest.approx([0.823927, 0.605063, 0.622459], abs=1e-6)


def test_a_sampled_update(memory):
    woken = memory.activate(NEW, 2)
    p = candidate_probabilities(woken.relevance_BM)
    assert -0.75 * math.log(p[0, 1]) == pytest.approx(1.388176, abs=1e-6)
    to_paths, to_strategies = memory.gradients(woken, sampled_slope(p, np.array([1]), np.array([0.75])))
    assert to_paths == pytest.approx([0.505743, 0.252871, 0.303446, 0], abs=1e-6)
    assert to_strategies == pytest.approx([0.505743, 1.112634, -1.112634, 0], abs=1e-6)
    memory.step((to_paths, to_strategies), 0.1)
    assert memory.to_paths.weight_E == pytest.approx([0.949426, 0.974713, 0.969655, 1], abs=1e-6)
    assert memory.to_strategies.weight_E == pytest.approx([0.949426, 0.888737, 0.611263, 1], abs=1e-6)
    again = memory.activate(NEW, 2).relevance_BM
    assert again[0] == pytest.approx([2.241435, 1.045651, 0], abs=1e-6)
    assert candidate_probabilities(again)[0] == pytest.approx([0.767774, 0.232226, 0], abs=1e-6)
    assert best(again[0], 3).tolist() == [0, 1]


def test_the_expected_update(memory):
    woken, gap = memory.activate(NEW, 2), np.array([[0.2, 0.75, 0.0]])
    p = candidate_probabilities(woken.relevance_BM)
    assert float((p * gap).sum()) == pytest.approx(0.286403, abs=1e-6)
    _, to_strategies = memory.gradients(woken, expected_slope(p, gap))
    assert to_strategies == pytest.approx([0.058263, 0.128179, -0.128179, 0], abs=1e-6)


T, R = "tool_call", "tool_result"


@pytest.mark.parametrize(
    ("seen", "path"),
    [
        (["think", T, R, "think", T, R, "think", "answer"], (PLAN, TOOL, ANALYSIS, TOOL, ANALYSIS, ANSWER)),
        (["think", "think", "answer"], (PLAN, ANSWER)),
        (["think", T, "answer"], (PLAN, TOOL, INVALID)),
        (["think", *[T, R] * 6, "answer"], (PLAN, *(TOOL, ANALYSIS) * 3, ANSWER)),
        ([], ()),
        (["dance", "answer"], (INVALID, ANSWER)),
        (["answer", "answer", T], (ANSWER, INVALID, TOOL)),
        ([T, T, R], (TOOL, INVALID, ANALYSIS)),
        ([T, "think", R], (TOOL, INVALID, ANALYSIS)),  # without a result there is nothing to analyse
    ],
)
def test_canonical_paths(seen, path):
    assert canonical_path(seen) == path


def test_the_strategy_of_the_worked_example():
    success, failure = (PLAN, TOOL, ANALYSIS, TOOL, ANALYSIS, ANSWER), (PLAN, ANSWER)
    text = "After StrategyPlanning prefer ToolExecution over AnswerGeneration."
    assert strategy(success, failure) == text
    assert strategy((), (PLAN,)) == "After Start prefer End over StrategyPlanning."
    assert strategy(success, success) is None


# ---- properties


@given(st.lists(st.sampled_from(["think", *STATES, "odd"]), max_size=30))
def test_paths_are_short_and_never_repeat(seen):
    path = canonical_path(seen)
    assert bool(path) == bool(seen)
    assert all(a != b for a, b in pairwise(path))
    assert path.count(TOOL) <= 3 and set(path) <= {PLAN, ANALYSIS, TOOL, ANSWER, INVALID}


def random_memory(rng, questions=7, paths=4, strategies=5):
    def some(rows, columns):
        pairs = np.argwhere(rng.random((rows, columns)) < 0.6)
        return edges(pairs, rng.uniform(0.1, 2, len(pairs)))

    return Memory(
        [f"q{i}" for i in range(questions)],
        unit(rng.normal(size=(questions, 3))),
        [(f"s{i}",) for i in range(paths)],
        [Strategy(f"m{i}") for i in range(strategies)],
        some(questions, paths),
        some(paths, strategies),
    )


def dense_relevance(memory, embedding_B3, k):
    """The matrix form of section 3.3, written out."""
    Q, J, M = memory.sizes
    s = np.clip(unit(embedding_B3) @ memory.embedding_QD.T, 0, 1)
    for row in s:
        row[np.argsort(-row, kind="stable")[k:]] = 0
    return s @ dense(memory.to_paths, Q, J) @ dense(memory.to_strategies, J, M)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_gradients_match_finite_differences(seed):
    rng = np.random.default_rng(seed)
    memory, new, tau = random_memory(rng), rng.normal(size=(2, 3)), rng.uniform(0.5, 2)
    woken = memory.activate(new, 3)
    assert woken.relevance_BM == pytest.approx(dense_relevance(memory, new, 3))
    p = candidate_probabilities(woken.relevance_BM, tau)
    chosen, gap = p.argmax(1), rng.normal(size=2)
    reached = p.sum(1) > 0
    slope = np.where(reached[:, None], sampled_slope(p, chosen, gap, tau), 0)
    assert slope.sum(1) == pytest.approx(np.zeros(2), abs=1e-12)

    def loss():
        q = candidate_probabilities(memory.activate(new, 3).relevance_BM, tau)
        return -sum(gap[b] * math.log(q[b, chosen[b]]) for b in range(2) if reached[b])

    for part, gradient in zip((memory.to_paths, memory.to_strategies), memory.gradients(woken, slope), strict=True):
        for e in range(len(part)):
            kept, values = part.weight_E[e], []
            for shift in (1e-5, -1e-5):
                part.weight_E[e] = kept + shift
                values.append(loss())
            part.weight_E[e] = kept
            assert gradient[e] == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-7)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_mean_of_sampled_gradients_is_the_expected_one(seed):
    rng = np.random.default_rng(seed)
    memory, gap = random_memory(rng), rng.normal(size=(1, 5))
    woken = memory.activate(rng.normal(size=(1, 3)), 3)
    p = candidate_probabilities(woken.relevance_BM)
    mean = sum(p[0, k] * sampled_slope(p, np.array([k]), gap[:, k]) for k in range(5))
    assert mean == pytest.approx(expected_slope(p, gap))


@given(st.integers(0, 12), st.integers(0, 4), st.integers(1, 6), st.randoms())
def test_neighbours_are_those_of_a_stable_sort(Q, B, k, random):
    similarity = np.array([random.choice([-0.5, 0.0, 0.25, 0.5, 0.5, 1.0]) for _ in range(B * Q)]).reshape(B, Q)
    wanted = []
    for b, row in enumerate(similarity):
        wanted += sorted((b, int(i)) for i in np.argsort(-row, kind="stable")[:k] if row[i] > 0)
    assert list(zip(*(x.tolist() for x in nearest_of(similarity, k)), strict=True)) == wanted


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_merging(seed):
    rng = np.random.default_rng(seed)
    a, b = random_memory(rng), random_memory(rng, questions=4, paths=5)
    assert state_equal(merge(a, Memory()), a) and state_equal(merge(Memory(), a), a)
    twice = merge(a, a)
    assert twice.sizes == a.sizes and np.array_equal(twice.to_paths.weight_E, a.to_paths.weight_E)
    both = merge(a, b)
    assert both.questions == [*a.questions] and len(both.paths) == 5
    for q, t in zip(both.to_paths.source_E, both.to_paths.target_E, strict=True):
        found = [w for m in (a, b) if (w := dense(m.to_paths, 7, 5)[q, t])]
        e = np.flatnonzero((both.to_paths.source_E == q) & (both.to_paths.target_E == t))[0]
        assert both.to_paths.weight_E[e] == pytest.approx(np.mean(found))


def state_equal(a, b):
    a, b = state_of(a), state_of(b)

    def same(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
        return bool(np.array_equal(x, y)) if hasattr(x, "numpy") else x == y

    return same(a, b)


def test_the_state_is_the_memory(memory):
    assert state_equal(memory_of(state_of(memory)), memory)


# ---- degenerate cases


def test_an_empty_memory_answers_nothing():
    woken = Memory().activate(NEW, 5)
    assert woken.relevance_BM.shape == (1, 0)
    assert candidate_probabilities(woken.relevance_BM).shape == (1, 0) and best(woken.relevance_BM[0], 3).size == 0


def test_dissimilar_and_zero_vectors_wake_nothing(memory):
    for vector in ([[-1.0, -1.0]], [[0.0, 0.0]]):
        woken = memory.activate(np.array(vector), 5)
        assert not woken.relevance_BM.any() and not candidate_probabilities(woken.relevance_BM).any()


def test_no_gap_and_a_single_candidate_change_nothing(memory):
    woken = memory.activate(NEW, 2)
    p = candidate_probabilities(woken.relevance_BM)
    assert not sampled_slope(p, np.array([1]), np.array([0.0])).any()
    assert not sampled_slope(np.array([[0.0, 1.0]]), np.array([1]), np.array([3.0])).any()


def test_large_relevance_does_not_overflow():
    assert candidate_probabilities(np.array([[2000.0, 1000.0, 0.0]]))[0].tolist() == [1.0, 0.0, 0.0]


def test_weights_stay_in_their_range(memory):
    woken = memory.activate(NEW, 2)
    p = candidate_probabilities(woken.relevance_BM)
    memory.step(memory.gradients(woken, sampled_slope(p, np.array([1]), np.array([0.75]))), 1e6)
    assert memory.to_strategies.weight_E.tolist() == [0.01, 0.01, 5.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.to_strategies, "target_E", np.array([0, 0, 1, 7])), "leads to a node that does not exist"),
        (lambda m: setattr(m.to_paths, "source_E", np.array([-1, 0, 1, 2])), "leads to a node that does not exist"),
        (lambda m: setattr(m.to_paths, "weight_E", np.array([1, 1, math.nan, 1])), "impossible weight"),
        (lambda m: setattr(m.to_paths, "target_E", np.array([1, 1, 1, 2])), "there twice"),
        (lambda m: m.questions.append("q1"), "a question is there twice"),
        (lambda m: setattr(m, "embedding_QD", np.zeros((2, 2))), "differ in number"),
        (lambda m: setattr(m, "embedding_QD", np.full((3, 2), np.inf)), "not finite"),
        (lambda m: setattr(m, "embedding_QD", np.zeros(3)), "rows of floats"),
        (lambda m: setattr(m.to_paths, "source_E", np.array([0.0, 0, 1, 2])), "source_E.*impossible type or shape"),
        (lambda m: setattr(m.to_strategies, "count_E2", np.zeros(4, int)), "count_E2.*impossible type or shape"),
        (lambda m: setattr(m.to_strategies, "count_E2", np.full((4, 2), -1)), "fewer than no rollouts"),
        (lambda m: m.paths.append(("x", 3)), "is no text"),
        (lambda m: setattr(m.strategies[0], "support", "many"), "impossible kind or count"),
        (lambda m: setattr(m.strategies[0], "kind", "odd"), "impossible kind or count"),
    ],
)
def test_a_damaged_memory_is_refused(memory, change, message):
    change(memory)
    with pytest.raises(DataError, match=message):
        memory_of(state_of(memory))


def test_another_encoder_is_refused(memory):
    with pytest.raises(DataError, match="another encoder"):
        memory.activate(np.ones((1, 3)), 2)


# ---- growing

DIRECT, ONCE = (ANSWER,), (TOOL, ANALYSIS, ANSWER)
ASK = "After Start prefer ToolExecution over AnswerGeneration."
TELL = "After Start prefer AnswerGeneration over ToolExecution."


def grown(*questions, memory=None, **keys):
    """Absorbs (text, vector, outcomes) one after the other."""
    memory = memory or Memory()
    for text, vector, outcomes in questions:
        absorb(memory, [text], np.array([vector], float), [outcomes], born=0, neighbours=2, **keys)
    return memory


def test_a_success_and_a_failure_are_contrasted():
    m = grown(("a", (1, 0), [(ONCE, True), (DIRECT, False), (DIRECT, False)]))
    (one,) = m.strategies
    assert (one.text, one.kind, one.support, one.confidence) == (ASK, "contrast", 1, 1.0)
    assert m.to_paths.count_E2.tolist() == [[1, 0], [0, 2]] and m.to_paths.weight_E.tolist() == [1, 1]
    assert m.to_strategies.source_E.tolist() == [0, 1] and m.to_strategies.weight_E.tolist() == [1, 1]


def test_failures_alone_borrow_a_similar_success():
    m = grown(("a", (1, 0), [(ONCE, True)]), ("b", (1, 1), [(DIRECT, False)]), ("far", (0, -1), [(DIRECT, False)]))
    (one,) = m.strategies
    assert (one.text, one.kind, one.support) == (ASK, "speculative", 1)
    assert m.to_strategies.weight_E.tolist() == [0.5, 0.5]
    grown(("c", (1, 0), [(ONCE, True), (DIRECT, False)]), memory=m)
    assert (one.kind, one.support) == ("contrast", 2)


def test_what_teaches_nothing():
    assert not grown(("a", (1, 0), [(ONCE, True)] * 2)).strategies  # successes only
    assert not grown(("a", (1, 0), [(ONCE, False)])).strategies  # no similar success
    assert not grown(("a", (1, 0), [(ONCE, True), (ONCE, False)])).strategies  # equal paths
    assert not grown(("a", (1, 0), [((), False)])).paths  # empty traces are not stored


def test_a_repeated_question_is_one_node():
    m = grown(("a", (1, 0), [(ONCE, True)]), ("a", (1, 0), [(ONCE, True), (DIRECT, True)]))
    assert m.questions == ["a"] and m.to_paths.count_E2.tolist() == [[2, 0], [1, 0]]


def test_a_question_met_again_is_contrasted_with_all_its_rollouts():
    m = grown(("a", (1, 0), [(ONCE, True)]), ("a", (1, 0), [(DIRECT, False)]))
    (one,) = m.strategies
    assert (one.text, one.kind, one.support) == (ASK, "contrast", 1) and m.to_strategies.weight_E.tolist() == [1, 1]


def test_a_win_of_the_avoided_path_contradicts_whether_or_not_the_other_was_tried():
    won = [(ONCE, True), (DIRECT, False)]
    m = grown(("w", (1, 0), won), ("easy", (1, 0), [(DIRECT, True)]), ("sure", (1, 0), [(ONCE, True)]))
    (ask,) = m.strategies
    assert (ask.support, ask.contradictions) == (1, 1)
    grown(("both", (1, 0), [*won, (DIRECT, True)]), memory=m)  # supports it, so it is no evidence against it
    assert (ask.support, ask.contradictions) == (2, 1)


def test_evidence_against_a_strategy_and_pruning():
    won, lost = [(ONCE, True), (DIRECT, False)], [(DIRECT, True), (ONCE, False)]
    m = grown(*[(f"w{i}", (1, 0), won) for i in range(2)], *[(f"l{i}", (1, 0), lost) for i in range(5)])
    ask, tell = m.strategies
    assert (ask.text, ask.support, ask.contradictions) == (ASK, 2, 5)
    assert tell.confidence == 1.0  # `ask` won before `tell` existed
    plant(m, ["Be polite."])
    prune(m, most=10)
    assert [s.text for s in m.strategies] == [TELL, "Be polite."] and sorted(m.to_strategies.target_E) == [0, 0, 1, 1]
    prune(m, most=1)
    assert [s.text for s in m.strategies] == [TELL]
    m.check()


def test_little_evidence_drops_no_strategy():
    won, lost = [(ONCE, True), (DIRECT, False)], [(DIRECT, True), (ONCE, False)]
    m = grown(("w", (1, 0), won), *[(f"l{i}", (1, 0), lost) for i in range(3)])
    assert (m.strategies[0].text, m.strategies[0].confidence, m.strategies[0].observations) == (ASK, 0.25, 4)
    prune(m, most=10)
    assert [s.text for s in m.strategies] == [ASK, TELL]
    grown(("l3", (1, 0), lost), memory=m)
    prune(m, most=10)
    assert [s.text for s in m.strategies] == [TELL]


def test_planting_twice_hangs_once_on_every_path():
    m = grown(("a", (1, 0), [(ONCE, True), (DIRECT, False)]))
    plant(m, ["Be polite."])
    plant(m, ["be polite"])
    assert len(m.to_strategies) == 4 and m.find("Be  polite.").confidence == 1.0


def test_joined_edges_keep_the_first_weight_and_add_counts():
    one, two = edges([(0, 1)], [3.0]), edges([(0, 1), (0, 0)], [1.0, 2.0])
    one.count_E2[:], two.count_E2[:] = 1, 2
    both = joined([one, two])
    assert both.weight_E.tolist() == [2.0, 3.0] and both.count_E2.tolist() == [[2, 2], [3, 3]]


def test_events_of_a_rollout():
    turns = [Turn(0, 0, 1, "call", [{}], "r"), Turn(0, 1, 2, "call", [None]), Turn(0, 2, 3, "invalid"), Turn(0, 3, 4)]
    traj = Trajectory("a", 0, 0, [Segment([0], [1, 2, 3, 4])], turns)
    texts = ["<think>x", "", "", ""]
    assert events(traj, texts) == ["think", T, R, T, "invalid", "answer"]
    traj.finish = "length"
    assert events(traj, texts)[-1] == "invalid"
    begun = ["x</think>", "", "", ""]  # the template opened the block in the prompt
    assert events(traj, begun)[:2] == ["think", T]


def test_counters_of_outcomes_may_be_empty():
    m = Memory()
    m.add_questions(["a"], np.ones((1, 2)), [Counter()])
    assert m.sizes == (1, 0, 0) and not m.activate(np.ones((1, 2)), 1).relevance_BM.size


# ---- does it learn? (section 9 without a transformer)

GAPS = {"useless": 0.0, "harmful": -0.3, "right": 0.6}
OFF_FAMILY = -0.05


def learned(seed, change, updates=400):
    """Mean true gap of the first strategy on held-out questions, after `updates` with gaps changed by `change`."""
    rng = np.random.default_rng(seed)
    families = np.arange(60) % 3
    paths = [(f"{f}{kind}",) for f in range(3) for kind in ("won", "lost")]
    names = [f"{f} {kind}" for f in range(3) for kind in GAPS]
    memory = Memory(
        [f"q{i}" for i in range(60)],
        unit(np.eye(3)[families] + 0.3 * rng.normal(size=(60, 3))),
        paths,
        [Strategy(name) for name in names],
        edges([(i, 2 * f + k) for i, f in enumerate(families) for k in range(2)], np.ones(120)),
        edges([(j, 3 * (j // 2) + k) for j in range(6) for k in range(3)], np.ones(18)),
    )

    def gaps(family):
        return np.array([gap if f == family else OFF_FAMILY for f in range(3) for gap in GAPS.values()])

    for _ in range(updates):
        family = rng.integers(3)
        woken = memory.activate((np.eye(3)[family] + 0.3 * rng.normal(size=3))[None], 5)
        p = candidate_probabilities(woken.relevance_BM)
        k = rng.choice(9, p=p[0])
        gap = change(gaps(family), k, rng, p[0]) + 0.2 * rng.normal()
        memory.step(memory.gradients(woken, sampled_slope(p, np.array([k]), np.array([gap]))), 0.05)
    held_out = rng.integers(3, size=150)
    woken = memory.activate(np.eye(3)[held_out] + 0.3 * rng.normal(size=(150, 3)), 5)
    return np.mean([gaps(f)[best(row, 1)[0]] for f, row in zip(held_out, woken.relevance_BM, strict=True)])


def test_weights_learn_which_strategy_helps_and_controls_do_not():
    means = {
        "trained": np.mean([learned(s, lambda g, k, rng, p: g[k]) for s in range(3)]),
        "flipped": np.mean([learned(s, lambda g, k, rng, p: -g[k]) for s in range(3)]),
        "shuffled": np.mean([learned(s, lambda g, k, rng, p: g[rng.choice(9, p=p)]) for s in range(3)]),
        "frozen": np.mean([learned(s, lambda g, k, rng, p: g[k], updates=0) for s in range(3)]),
    }
    assert means["trained"] > 0.5 and means["flipped"] < -0.2, means
    assert abs(means["frozen"]) < 0.1 and abs(means["shuffled"]) < 0.25, means


def test_columns_that_no_question_uses_change_nothing():
    """Sparse questions are compared on their own columns only; a dense one beside them on all."""
    rng = np.random.default_rng(0)
    stored, sparse = rng.normal(size=(40, 32)).astype(np.float32), np.zeros((3, 32), np.float32)
    sparse[:, 5:12] = rng.normal(size=(3, 7))
    m = Memory([f"q{i}" for i in range(40)], stored / np.linalg.norm(stored, axis=1, keepdims=True))
    alone, beside = m.neighbours(sparse, 4), m.neighbours(np.concatenate([sparse, stored[:1]]), 4)
    for a, b in zip(alone, beside, strict=True):
        assert a == pytest.approx(b[: len(a)], abs=1e-6) and len(a) == 12
