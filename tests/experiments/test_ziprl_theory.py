"""The allocation study: what must hold for every draw, and what wrong estimates of relevance do."""

from __future__ import annotations

import pytest

from experiments.studies.ziprl_theory import ALLOCATIONS, ZiprlTheory
from methods.errors import ConfigError


@pytest.fixture(scope="module")
def frames():
    return {name: ZiprlTheory(allocation=name, draws=100).simulate(1) for name in ALLOCATIONS}


def test_water_filling_is_the_best_and_the_condition_suffices(frames):
    for name, frame in frames.items():
        assert not frame["broken"].any(), name
        assert (frame["score"] <= frame["best"] + 1e-9).all(), name
    best = frames["water_filling"]
    assert (best["score"] - best["best"]).abs().max() < 1e-9 and (best["score"] >= 0).all()
    assert (frames["uniform"]["score"].abs() < 1e-12).all()


def test_more_for_the_relevant_is_not_enough(frames):
    """Greedy loses where relevances are nearly equal although it gives the most to the most relevant."""
    by_tier = frames["greedy"].groupby("tier")["score"].mean()
    assert by_tier["flat"] < -0.3 < 0 < by_tier["sparse"]
    assert frames["levels"].groupby("tier")["score"].mean()["sparse"] > 0.2
    assert frames["proportional"]["condition"].all()  # r / (1 + c r) grows with r
    assert frames["levels"]["without"].any()  # the condition suffices, but is not necessary


def test_wrong_estimates_cost_and_other_documents_relevances_lose(frames):
    studies = ZiprlTheory(draws=100), ZiprlTheory(draws=100, noise=1.0), ZiprlTheory(draws=100, permuted=True)
    right, noisy, permuted = (float(s.simulate(1)["score"].to_numpy().mean()) for s in studies)
    assert permuted < 0 < right and noisy < right
    assert frames["levels"]["best"].tolist() == frames["greedy"]["best"].tolist()  # the same world for all arms


@pytest.mark.parametrize("bad", [{"allocation": "x"}, {"noise": -1}, {"budget": 0}, {"draws": 0}, {"documents": 0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError):
        ZiprlTheory(**bad)
