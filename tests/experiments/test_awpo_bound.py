"""The bound behind AWPO: identities, inequalities on random policies, gradients by finite differences, the study."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.studies.awpo_bound import TIERS, AwpoBound
from methods.awpo.theory import bound, gated_advantage, improvement
from methods.errors import ConfigError


def world(seed: int, actions: int = 6, features: int = 3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((actions, features)), rng.dirichlet(np.ones(actions)) * 0.99 + 0.01 / actions, rng


def moved(phi, pi, delta):
    p = pi * np.exp(phi @ delta)
    return p / p.sum()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(1, 6), st.sampled_from([0.01, 0.1, 1.0]))
def test_no_side_of_a_lemma_is_crossed(seed, actions, features, alpha):
    phi, pi, rng = world(seed, actions, features)
    adv = rng.standard_normal(actions)
    found = bound(phi, pi, adv, alpha, batch=2)
    slack = 1e-9 * (1 + abs(found.step))
    assert found.gradient <= found.signal + slack and found.variance <= found.noise + slack
    assert 0 <= found.rho <= 1 + 1e-9
    assert improvement(phi, pi, adv, adv, alpha) <= found.step + slack


def test_gradient_and_variance_against_plain_sums():
    phi, pi, rng = world(3)
    adv = rng.standard_normal(6)
    found = bound(phi, pi, adv, 0.1, batch=2)
    base, step = pi @ adv, 1e-5
    numeric = [(moved(phi, pi, step * e) @ adv - base) / step for e in np.eye(3)]
    assert found.gradient == pytest.approx(np.dot(numeric, numeric), rel=1e-3)
    score = phi - pi @ phi
    pairs = [(pi[i] * pi[j], (score[i] * adv[i] + score[j] * adv[j]) / 2) for i in range(6) for j in range(6)]
    mean = sum(p * b for p, b in pairs)
    assert found.variance == pytest.approx(sum(p * (b - mean) @ (b - mean) for p, b in pairs))
    gain = sum(p * (moved(phi, pi, 0.1 * b) @ adv - base) for p, b in pairs)
    assert improvement(phi, pi, adv, adv, 0.1) == pytest.approx(gain)


def test_a_free_logit_per_action_makes_every_advantage_equally_aligned():
    _, pi, rng = world(1)
    for _ in range(3):
        adv = rng.standard_normal(6)
        found = bound(np.eye(6), pi, adv - pi @ adv, 0.1, batch=2)
        assert found.rho == pytest.approx(1 / np.sqrt(5))


def test_without_variance_nothing_improves():
    phi, pi, _ = world(2)
    found = bound(phi, pi, np.zeros(6), 0.1, batch=2)
    assert found.step == found.rho == found.second == 0
    assert improvement(phi, pi, np.zeros(6), pi, 0.1) == pytest.approx(0, abs=1e-15)


def test_gate_of_a_policy():
    pi = np.array([0.25, 0.25, 0.25, 0.25])
    outcome = np.array([1.0, 0, 0, 0])
    centred = outcome - 0.25
    assert np.allclose(gated_advantage(pi, outcome, 1 - outcome), centred)  # adversarial: the gate is shut
    assert np.allclose(gated_advantage(pi, outcome, 1 - outcome, gated=False), 0)  # the sum is left with nothing
    assert np.allclose(gated_advantage(pi, outcome, outcome), centred)
    judged = np.array([0, 1.0, 0, 0])
    dead = gated_advantage(pi, np.zeros(4), judged)
    assert np.allclose(dead, 0.5 * (judged - 0.25), atol=1e-5)  # outcome without variance: the judge alone
    assert np.allclose(gated_advantage(pi, np.ones(4), judged), 0)  # solved


def test_study_keeps_its_bound_and_pairs_its_worlds():
    frames = {a: AwpoBound(advantage=a, draws=5).simulate(0) for a in ("outcome", "sum", "awpo")}
    assert all(len(f) == 20 and set(f["tier"]) == set(TIERS) and f["broken"].sum() == 0 for f in frames.values())
    assert AwpoBound(draws=5).simulate(0).equals(frames["awpo"])
    assert not AwpoBound(draws=5).simulate(1).equals(frames["awpo"])
    opposed = AwpoBound(advantage="awpo", judge="adversarial", draws=5).simulate(0)
    assert np.allclose(opposed["score"], frames["outcome"]["score"])


@pytest.mark.parametrize("keys", [{"advantage": "x"}, {"judge": "x"}, {"actions": 1}, {"alpha": 0.0}, {"draws": 0}])
def test_settings_that_cannot_be_right(keys):
    with pytest.raises(ConfigError, match=r"study\."):
        AwpoBound(**keys)
