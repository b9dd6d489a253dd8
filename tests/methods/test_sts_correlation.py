"""Correlations of the score with measured changes: the sheet's numbers, refusals, and what must always hold."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.errors import DataError
from methods.sts.correlation import (
    change_note,
    correlate,
    extremes,
    fisher_interval,
    pearson,
    permutation_p,
    ranks,
    spearman,
)

CHANGES = [-0.12, -0.05, -0.03, 0.004, -0.01]
ICL = [0.95, 0.285, 0.105, 0.025, 0.07]
ACT = [1.4, 0.8, 0.25, 0.05, 0.35]
RELEASED = [0.62, 0.21, 0.0225, 0.0025, 0.0625]
# Table of the paper: signed change of accuracy of Qwen2.5-7B after SFT on LIMO, points.
QWEN = {
    "engineering": -9.80, "physics": -5.24, "chemistry": -6.36, "law": -0.19, "philosophy": -2.40, "other": -1.30,
    "health": -2.93, "economics": -2.61, "math": -2.89, "psychology": -0.37, "biology": 1.53, "history": 0.26,
    "business": -4.43, "computer science": -4.88,
}  # fmt: skip


def test_worked_correlations():
    found = correlate(ICL, CHANGES)
    assert found.r == pytest.approx(0.986059, abs=1e-6) and found.r2 == pytest.approx(0.972312, abs=1e-6)
    assert found.spearman == pytest.approx(1) and found.exact
    assert found.p == pytest.approx(1 / 120)
    expected = [0.953175, 0.989983, 0.992294, 0.987941, 0.987772]
    assert found.leave_one_out == pytest.approx(expected, abs=1e-6)
    assert found.range == pytest.approx((0.953175, 0.992294), abs=1e-6)
    assert any("weak evidence" in note for note in found.notes) and not found.reason
    assert correlate(ACT, CHANGES).r == pytest.approx(0.963370, abs=1e-6)
    assert correlate(RELEASED, CHANGES).r == pytest.approx(0.975258, abs=1e-6)
    assert pearson(ACT, CHANGES) == pytest.approx(-0.968131, abs=1e-6)  # the score does not know the sign


def test_the_papers_choice_of_domains_is_a_labelled_flag():
    names = list(QWEN)
    chosen = [names[i] for i in extremes(list(QWEN.values()))]
    assert chosen[:4] == ["engineering", "chemistry", "physics", "computer science"]
    assert chosen[4:] == ["other", "psychology", "history", "law"]
    scores = np.arange(14.0)
    every, some = (correlate(scores, list(QWEN.values()), extremes_only=k) for k in (None, 4))
    assert every.domains == 14 and not every.notes
    assert some.domains == 8 and any("chosen by the outcome" in note for note in some.notes)
    with pytest.raises(DataError, match="Too few"):
        extremes([1, 2, 3])


@pytest.mark.parametrize(
    ("scores", "changes", "reason"),
    [
        ([1.0], [0.1], "at least 3 domains, there is 1"),
        ([1.0, 2.0], [0.1, 0.2], "at least 3 domains, there are 2"),
        ([1.0, 1.0, 1.0], [0.1, 0.2, 0.3], "the score is the same"),
        ([1.0, 2.0, 3.0], [0.1, -0.1, 0.1], "the change is the same"),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], "the change is the same"),
    ],
)
def test_r_is_refused_with_the_reason(scores, changes, reason):
    found = correlate(scores, changes)
    assert math.isnan(found.r) and math.isnan(found.p) and reason in found.reason
    assert found.leave_one_out == () and all(map(math.isnan, found.range))


def test_a_rest_without_variance_has_no_r():
    found = correlate([1, 2, 3, 4], [0, 0, 0, 1])
    assert math.isnan(found.leave_one_out[3]) and not math.isnan(found.range[0])


def test_what_is_no_number_is_refused():
    for scores, changes in (([1, 2], [1]), ([1, 2, math.nan], [1, 2, 3]), ([1, 2, 3], [1, math.inf, 2])):
        with pytest.raises(DataError):
            correlate(scores, changes)


def test_fisher_interval():
    assert fisher_interval(0.5, 14) == pytest.approx((-0.0416, 0.8145), abs=1e-4)
    assert all(map(math.isnan, fisher_interval(0.5, 3))) and fisher_interval(1.0, 9) == (1.0, 1.0)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=6))
@settings(max_examples=60, deadline=None)
def test_against_scipy_and_counting(points):
    from scipy import stats

    x, y = np.array(points, float).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert math.isnan(pearson(x, y)) and math.isnan(spearman(x, y))
        return
    r = pearson(x, y)
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert ranks(x).tolist() == stats.rankdata(x).tolist()
    hits = [abs(pearson(x, y[list(order)])) >= abs(r) - 1e-9 for order in itertools.permutations(range(len(x)))]
    assert permutation_p(x, y) == (pytest.approx(np.mean(hits)), True)


def test_permutations_of_many_domains_are_drawn():
    x = np.arange(12.0)
    p, exact = permutation_p(x, x, np.random.default_rng(0))
    assert not exact and p == pytest.approx(1 / 100_001)
    y = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8.0])
    p, _ = permutation_p(x, y, np.random.default_rng(0))
    from scipy import stats

    assert p == pytest.approx(stats.pearsonr(x, y).pvalue, abs=0.03)


@given(st.floats(-100, 100).filter(lambda a: abs(a) > 1e-3), st.floats(-100, 100))
@settings(max_examples=30, deadline=None)
def test_scale_and_offset_do_not_matter(a, b):
    x, y = np.array([1.0, 4.0, 2.0, 8.0, 5.0]), np.array([2.0, 3.0, 1.0, 9.0, 4.0])
    assert pearson(a * x + b, y) == pytest.approx(math.copysign(1, a) * pearson(x, y), abs=1e-6)


def test_notes_on_a_change():
    assert change_note(0.5, 0.52, 400) == "no detectable change"
    assert change_note(0.5, 0.4, 400) == "" and change_note(1.0, 1.0, 400) == "no detectable change"
    assert "cannot drop" in change_note(0.01, 0.0, 100) and "cannot drop" in change_note(0.12, 0.1, 400, chance=0.1)
    assert change_note(0.0, 0.3, 400) != ""
