"""The closed forms of the bias against the sheet's table and against enumeration of all groups."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.ha_dw_bias import baseline_bias, expected_gradient, live_probability, overestimated

TABLE = {
    2: [0.450000, 0.400000, 0.250000, 0.100000, 0.0, -0.250000, -0.400000],
    4: [0.219526, 0.190576, 0.112069, 0.043182, 0.0, -0.112069, -0.190576],
    8: [0.098553, 0.075583, 0.027800, 0.006438, 0.0, -0.027800, -0.075583],
    16: [0.039306, 0.022745, 0.002531, 0.000113, 0.0, -0.002531, -0.022745],
}


@pytest.mark.parametrize("G", TABLE)
def test_table_of_the_sheet(G):
    found = [baseline_bias(p, G) for p in (0.05, 0.1, 0.25, 0.4, 0.5, 0.75, 0.9)]
    assert found == pytest.approx(TABLE[G], abs=1e-6)


@given(st.floats(0.02, 0.98), st.integers(2, 8))
def test_closed_form_is_the_enumeration(p, G):
    weight = mean = above = 0.0
    for group in product((0, 1), repeat=G):
        if 0 < sum(group) < G:
            q = p ** sum(group) * (1 - p) ** (G - sum(group))
            weight += q
            mean += q * sum(group) / G
            above += q * (sum(group) / G > p + 1e-12)
    assert live_probability(p, G) == pytest.approx(weight, abs=1e-9)
    assert baseline_bias(p, G) == pytest.approx(mean / weight - p, abs=1e-9)
    assert overestimated(p, G) == pytest.approx(above / weight, abs=1e-6)


@given(st.floats(0.01, 0.99), st.integers(2, 32))
def test_odd_about_one_half_and_bounded(p, G):
    assert baseline_bias(p, G) == pytest.approx(-baseline_bias(1 - p, G), abs=1e-9)
    assert abs(baseline_bias(p, G)) <= 1 / G + 1e-12 or G == 2


def test_limits():
    assert baseline_bias(0.0, 8) == 1 / 8 and baseline_bias(1.0, 8) == -1 / 8
    assert baseline_bias(1e-9, 8) == pytest.approx(1 / 8, abs=1e-6)
    with pytest.raises(ValueError):
        baseline_bias(1.1, 8)


@pytest.mark.parametrize(
    "p, ratio",
    [(0.05, 1.369987), (0.1, 1.294246), (0.25, 1.121616), (0.5, 1.011780), (0.75, 1.121616), (0.9, 1.294246)],
)
def test_expected_gradient_of_the_sheet(p, ratio):
    assert expected_gradient(p, 8, 0.5) / (7 / 8 * p * (1 - p)) == pytest.approx(ratio, abs=1e-6)


def test_corollaries():
    """Averages over p: hard prompts are over-estimated more often than not (2 <= G <= 8)."""
    import numpy as np

    def average(G, high):
        cuts = [0.0, *(k / G for k in range(1, G) if k / G < high), high]
        parts = []
        for a, b in pairwise(cuts):
            x = np.linspace(a, b, 2001)[1:-1]
            parts.append(np.mean([overestimated(p, G) for p in x]) * (b - a))
        return sum(parts) / high

    assert average(8, 0.25) == pytest.approx(0.781130, abs=2e-3)
    assert average(8, 0.5) == pytest.approx(0.640945, abs=2e-3)
    assert average(4, 0.5) == pytest.approx(0.776966, abs=2e-3)
