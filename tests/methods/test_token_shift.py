"""The numbers of SRFT's analysis: the sheet's worked example, degenerate cases, and what must always hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.token_shift import gini, learning_tax, pearson, shift, trajectory

LENGTHS = np.array([4, 3, 2, 4, 3, 4, 4, 3])
PATH = np.array([(2.0, 3.0, 3.5), (2.6, 2.0, 2.4), (2.4, 1.9, 2.5), (2.2, 1.7, 2.6)])


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def worked():
    """dp, entropy, KL of the sheet's 27 valid tokens; the tuned policy is the same logits times 1.3."""
    b, t, v = np.ogrid[:8, :4, :5]
    logits = 1.5 * np.sin(1.7 * b + 0.9 * t * (v + 1) + 0.4 * v)
    token = (3 * b + 2 * t) % 5
    mask = np.arange(4)[None, :] < LENGTHS[:, None]
    base, new = log_softmax(logits), log_softmax(1.3 * logits)
    p, q = (np.take_along_axis(np.exp(x), token, 2)[..., 0][mask] for x in (base, new))
    entropy = -(np.exp(base) * base).sum(-1)[mask]
    return q - p, entropy, (np.exp(base) * (base - new)).sum(-1)[mask]


def test_worked_token_shift(worked):
    found = shift(*worked, thresholds=(0.05,))
    expected = {"changed/0.05": 0.185185, "mean": 0.029383, "rose": 0.407407, "gini": 0.428868}
    assert found == pytest.approx(expected | {"correlation": -0.302665, "kl": found["kl"]}, abs=5e-7)
    assert found["kl"] > 0 and len(worked[0]) == 27


def test_worked_trajectory():
    found = trajectory(PATH)
    assert (found.net, found.path, found.straightness) == pytest.approx((1.593738, 2.148071, 0.741939), abs=5e-7)
    assert found.turning == pytest.approx((-0.331056, 0.952579), abs=5e-7)
    assert learning_tax(PATH[0], PATH[1], PATH[3]) == found.tax[0] == pytest.approx(0.062257, abs=5e-7)
    assert found.distance[0] == 0 and found.distance[-1] == found.net and len(found.tax) == 2


def test_without_tokens_nothing_is_known():
    nothing = np.zeros(0)
    assert all(math.isnan(value) for value in shift(nothing, nothing, nothing).values())
    never = shift(np.ones(3), np.ones(3), np.ones(3), weight_N=np.zeros(3))
    assert all(math.isnan(value) for value in never.values()) and math.isnan(gini(nothing))


def test_identical_policies():
    found = shift(np.zeros(4), np.array([0.1, 0.2, 0.3, 0.4]), np.zeros(4))
    assert math.isnan(found.pop("correlation")) and set(found.values()) == {0.0}


def test_constant_values():
    found = shift(np.full(4, -0.2), np.array([0.1, 0.2, 0.3, 0.4]), np.full(4, 0.5))
    assert math.isnan(found["correlation"]) and found["gini"] == pytest.approx(0) and found["rose"] == 0
    assert (found["changed/0.1"], found["changed/0.5"]) == (1, 0)
    assert math.isnan(pearson(np.array([0.1, 0.3]), np.array([2.0, 2.0])))


def test_two_points_and_no_movement():
    straight = trajectory(PATH[:2])
    assert straight.straightness == pytest.approx(1) and straight.turning == straight.tax == ()
    still = trajectory(np.array([PATH[0], PATH[0], PATH[1]]))
    assert math.isnan(still.turning[0]) and math.isnan(still.tax[0]) and still.straightness == pytest.approx(1)
    assert math.isnan(trajectory(np.array([PATH[0], PATH[0]])).straightness)
    with pytest.raises(ValueError, match="two points"):
        trajectory(PATH[:1])


def test_learning_tax_of_plain_cases():
    base, first = np.zeros(2), np.array([2.0, 0.0])
    assert learning_tax(base, first, base) == 1  # all taken back
    assert learning_tax(base, first, np.array([2.0, 5.0])) == 0  # sideways
    assert learning_tax(base, first, np.array([4.0, 0.0])) == -1  # as far again


SIZES = st.lists(st.floats(0, 1), min_size=1, max_size=20)


@given(SIZES, st.randoms(use_true_random=False))
def test_weights_are_repetitions(sizes, random):
    weight = np.array([random.randrange(4) for _ in sizes])
    weight[0] += 1
    dp = np.array([size * random.choice([-1, 1]) for size in sizes])
    entropy = np.array([random.random() for _ in sizes])
    weighted = shift(dp, entropy, np.abs(dp), weight_N=weight)
    repeated = shift(*(np.repeat(x, weight) for x in (dp, entropy, np.abs(dp))))
    for name, value in repeated.items():
        if name != "correlation" or np.ptp(np.repeat(np.abs(dp), weight)) > 1e-6:
            assert weighted[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


@given(SIZES)
def test_gini_is_between_even_and_on_one(sizes):
    n = len(sizes)
    assert -1e-9 <= gini(np.array(sizes)) <= 1 - 1 / n + 1e-9
    assert gini(np.array([0.0] * (n - 1) + [1.0])) == pytest.approx(1 - 1 / n)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=6))
def test_a_path_is_never_shorter_than_its_ends_are_apart(points):
    found = trajectory(np.array(points))
    assert found.net <= found.path + 1e-9
    assert all(math.isnan(c) or -1 - 1e-9 <= c <= 1 + 1e-9 for c in found.turning)
