from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import stats

sizes = st.floats(0.01, 10)
signed = st.one_of(sizes, sizes.map(lambda x: -x))


def rng(seed=0):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- sign flip


def test_sign_flip_counts_all_patterns():
    # sums of (1, 2, 3) under all signs: 6 4 2 0 0 -2 -4 -6; at least 6 in size: 2 of 8
    assert stats.sign_flip([1, 2, 3]) == 2 / 8
    # (1, -2, 3) sums to 2: all but the two zeros reach it
    assert stats.sign_flip([1, -2, 3]) == 6 / 8
    assert stats.sign_flip([0.0, 0.0, 0.0, 0.0]) == 1
    assert stats.sign_flip([1e-17, 2e-17, 1e-17]) == 1  # what rounding leaves of equal numbers
    assert math.isnan(stats.sign_flip([])) and stats.sign_flip([math.nan, 1.0]) == 1


@given(st.lists(sizes, min_size=8, max_size=8))
@settings(max_examples=30, deadline=None)
def test_eight_differences_of_one_sign_give_two_in_256(values):
    assert stats.sign_flip(values) == 2 / 256 == stats.smallest_p(8)


@given(st.lists(signed, min_size=1, max_size=9), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_sign_flip_ignores_sign_order_and_scale(values, random):
    p = stats.sign_flip(values)
    shuffled = random.sample(values, len(values))
    assert p == stats.sign_flip([-v for v in values]) == stats.sign_flip([7 * v for v in shuffled])
    assert stats.smallest_p(len(values)) <= p <= 1


def test_monte_carlo_agrees_with_enumeration_and_never_says_zero():
    values = rng(3).normal(0.4, 1, size=12)
    exact = stats.sign_flip(values)
    sampled = stats.sign_flip(values, exact_up_to=0, draws=40_000, rng=rng())
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact / 40_000))
    assert sampled == stats.sign_flip(values, exact_up_to=0, draws=40_000, rng=rng())
    assert stats.sign_flip(np.ones(40), draws=999) == 1 / 1000


def test_the_switch_to_monte_carlo_is_above_sixteen():
    assert stats.sign_flip(np.ones(16)) == 2 / 2**16
    assert stats.sign_flip(np.ones(17), draws=999) == pytest.approx(1 / 1000)


# ---------------------------------------------------------------- Holm


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = stats.holm([0.02, math.nan, 0.6])
    assert adjusted[[0, 2]] == pytest.approx([0.04, 0.6]) and math.isnan(adjusted[1])
    assert len(stats.holm([])) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_helps(p):
    adjusted = stats.holm(p)
    assert all(a >= b or math.isclose(a, b) for a, b in zip(adjusted, p, strict=True)) and adjusted.max() <= 1
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


# ---------------------------------------------------------------- intervals


def test_t_interval_by_hand():
    # mean 3, sd sqrt(2.5), t(4) = 2.776445: half width 2.776445 * sqrt(2.5 / 5)
    found = stats.mean_interval([1, 2, 3, 4, 5, math.nan])
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - 1.963243, 3 + 1.963243), abs=1e-6)
    assert found.seeds == 5 and found.half == pytest.approx(1.963243, abs=1e-6)
    alone = stats.mean_interval([2.0])
    assert alone.mean == 2 and math.isnan(alone.low) and math.isnan(stats.mean_interval([]).mean)


def test_what_both_arms_share_cancels():
    shared = rng(1).normal(size=(6, 1)) + rng(2).normal(size=(1, 40))
    found = stats.paired_bootstrap(shared + 0.25, shared)
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.basis == "seeds and items" and (found.seeds, found.items) == (6, 40)
    with pytest.raises(ValueError, match="not paired"):
        stats.paired_bootstrap(np.zeros((2, 3)), np.zeros((3, 3)))


def test_one_seed_resamples_items_and_one_item_resamples_seeds():
    values = rng(4).normal(size=50)
    by_item = stats.bootstrap(values[None, :])
    assert by_item.basis == "items"
    # 50 values: close to mean +- 1.96 sd / sqrt(50)
    assert by_item.half == pytest.approx(1.96 * values.std() / math.sqrt(50), rel=0.1)
    by_seed = stats.bootstrap(values)
    assert by_seed.basis == "seeds" and by_seed.half == pytest.approx(by_item.half, rel=0.1)
    none = stats.bootstrap([[0.5]])
    assert none.mean == 0.5 and math.isnan(none.low) and none.basis == ""


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_interval_shrinks_with_more_seeds_and_items(seed):
    values = rng(seed).normal(size=(64, 200))
    wide = stats.bootstrap(values[:6, :20], draws=500).half
    assert stats.bootstrap(values[:, :20], draws=500).half < wide
    assert stats.bootstrap(values, draws=500).half < wide / 2


@pytest.mark.parametrize("n", [3, 8])
def test_few_seeds_are_covered_as_promised(n):
    """A plain percentile interval covers 75 % at 3 seeds and 87 % at 8."""
    draw = rng(0)
    samples = draw.normal(size=(400, n))
    intervals = [stats.bootstrap(x, draws=400, rng=rng(i)) for i, x in enumerate(samples)]
    assert 0.92 <= np.mean([found.low <= 0 <= found.high for found in intervals]) <= 0.98


def test_variation_between_items_counts_even_if_seeds_agree():
    same = np.tile(rng(5).normal(size=(1, 30)), (8, 1))
    found = stats.bootstrap(same)
    assert found.half == pytest.approx(1.96 * same[0].std() / math.sqrt(30), rel=0.15)


def test_missing_items_leave_the_mean_of_seed_means():
    values = np.array([[1.0, math.nan, 3.0], [5.0, 7.0, math.nan]])
    assert stats.bootstrap(values).mean == pytest.approx((2 + 6) / 2)
    gone = stats.bootstrap(np.vstack([values, np.full((1, 3), math.nan)]))
    assert gone.seeds == 2 and gone.mean == pytest.approx(4)
    assert math.isnan(stats.bootstrap(np.full((2, 2), math.nan)).mean)


def test_the_same_generator_gives_the_same_interval():
    values = rng(6).normal(size=(5, 20))
    assert stats.bootstrap(values, rng=rng(9)) == stats.bootstrap(values, rng=rng(9))
    assert stats.bootstrap(values, rng=rng(9)) != stats.bootstrap(values, rng=rng(10))
    assert stats.bootstrap(values) == stats.bootstrap(values)


def test_item_intervals_are_clustered():
    means = rng(7).random(40)
    scores, items = np.repeat(means, 16), np.repeat([f"i{k}" for k in range(40)], 16)
    clustered = stats.item_interval(scores, items)
    assert clustered.mean == pytest.approx(means.mean()) and clustered.items == 40
    # sixteen identical samples per item carry no more information than one
    assert clustered.half == pytest.approx(stats.item_interval(means, np.arange(40)).half, rel=0.1)
    assert stats.item_interval([1, 0, 0], ["a", "a", "b"]).mean == pytest.approx(0.25)
    with pytest.raises(ValueError, match="2 scores but 1 item ids"):
        stats.item_interval([1, 2], ["a"])


# ---------------------------------------------------------------- power


@pytest.mark.parametrize(("effect", "n"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_the_published_ones(effect, n):
    """The sample sizes of the paired t test at level .05 and power .8 that G*Power prints."""
    assert stats.seeds_needed(effect, 1.0) == n == stats.seeds_needed(-2 * effect, 2.0)
    assert stats.power(effect, 1.0, n) >= 0.8 > stats.power(effect, 1.0, n - 1)


def test_power_agrees_with_the_noncentral_t():
    from scipy.stats import nct, t

    for effect, n in ((0.5, 8), (1.0, 5), (0.2, 30)):
        c, d = t.ppf(0.975, n - 1), effect * math.sqrt(n)
        assert stats.power(effect, 1.0, n) == pytest.approx(nct.sf(c, n - 1, d) + nct.cdf(-c, n - 1, d), abs=1e-4)
    assert stats.power(0.0, 1.0, 8) == pytest.approx(0.05, abs=1e-4)


@given(st.integers(2, 40), st.floats(0.01, 5))
@settings(max_examples=20, deadline=None)
def test_the_detectable_effect_is_seen_with_the_target_power(n, sd):
    effect = stats.detectable(sd, n)
    assert stats.power(effect, sd, n) == pytest.approx(0.8, abs=1e-6)
    assert stats.detectable(sd, n, 0.9) > effect > stats.detectable(sd, n + 1)


def test_power_at_the_edges():
    assert math.isnan(stats.detectable(1.0, 1)) and stats.detectable(0.0, 8) == 0
    assert stats.seeds_needed(0.0, 1.0) == math.inf and math.isnan(stats.seeds_needed(1.0, math.nan))
    assert stats.seeds_needed(1.0, 0.0) == 2


# ---------------------------------------------------------------- pass@k and curves


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
@settings(max_examples=80, deadline=None)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case):
    n, c, k = case
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert stats.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_takes_arrays_and_refuses_the_impossible():
    assert stats.pass_at_k([4, 4, 4], [0, 1, 4], 2) == pytest.approx([0, 0.5, 1])
    assert stats.pass_at_k(1000, 1, 1000) == 1 and stats.pass_at_k(5, [[1], [2]], 1).shape == (2, 1)
    with pytest.raises(ValueError, match="pass@3"):
        stats.pass_at_k([4, 2], [1, 1], 3)
    with pytest.raises(ValueError, match="between 0 and"):
        stats.pass_at_k(4, 5, 1)


def test_areas_by_hand():
    x, y = [0, 2, 6], [1.0, 3.0, 5.0]
    # trapezoids 2 * 2 and 4 * 4, over a range of 6
    assert stats.area(x, y) == pytest.approx(20 / 6)
    # up to 4: 2 * 2 and 2 * 3.5, over 4
    assert stats.area(x, y, 4) == pytest.approx(11 / 4)
    assert stats.area_weights(x, 4, start=2) @ y == pytest.approx(3.5)
    assert stats.area(x, [y, [2, 2, 2]]) == pytest.approx([20 / 6, 2])
    assert stats.area([3], [0.7]) == pytest.approx(0.7)
    assert stats.point_weights(x, 4) @ y == pytest.approx(4)
    assert stats.point_weights(x, 99) @ y == 5 and stats.point_weights(x, -1) @ y == 1


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(-5, 5)), min_size=2, max_size=8), st.floats(0.05, 1))
@settings(max_examples=50)
def test_the_weights_are_the_trapezoid_rule(points, share):
    x = np.cumsum([step for step, _ in points])
    y = np.array([height for _, height in points])
    end = x[0] + share * (x[-1] - x[0])
    grid = np.union1d(x[x < end], [end])
    expected = np.trapezoid(np.interp(grid, x, y), grid) / (end - x[0])
    assert stats.area(x, y, end) == pytest.approx(expected, abs=1e-9)
    assert stats.area_weights(x, end).sum() == pytest.approx(1)


def test_no_torch_is_imported():
    modules = "sys, experiments.stats, experiments.records, experiments.report, cli.report"
    code = f"import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------- any statistic over clusters


def test_the_cluster_bootstrap_draws_whole_clusters():
    values, clusters = np.array([0.0, 0.0, 0.0, 1.0, 1.0]), np.array(["a", "a", "a", "b", "b"])
    seen = set()

    def statistic(weight_N):
        seen.add(tuple(weight_N))
        return [weight_N @ values / weight_N.sum(), math.nan]

    mean, unknown = stats.cluster_bootstrap(statistic, clusters, draws=200)
    assert mean.mean == 0.4 and (mean.low, mean.high, mean.basis) == (0.0, 1.0, "items")
    assert seen == {(1, 1, 1, 1, 1), (2, 2, 2, 0, 0), (0, 0, 0, 2, 2)}
    assert math.isnan(unknown.low) and math.isnan(unknown.high)


def test_the_cluster_bootstrap_of_a_mean_is_the_bootstrap_of_items():
    values = np.random.default_rng(0).normal(size=40)
    (found,) = stats.cluster_bootstrap(lambda w: [w @ values / w.sum()], np.arange(40), draws=4000)
    plain = stats.item_interval(values, np.arange(40))
    assert (found.mean, found.low, found.high) == pytest.approx((plain.mean, plain.low, plain.high), abs=0.02)


def test_one_cluster_has_no_interval():
    (found,) = stats.cluster_bootstrap(lambda w: [w.sum()], np.zeros(3))
    assert found.mean == 3 and math.isnan(found.low)
