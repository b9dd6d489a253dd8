"""Numbers that no run can use are refused before it starts, NaN among them."""

from __future__ import annotations

import math

import pytest

from methods.autosearch.autosearch import AutoSearch, SearchDepth
from methods.errors import ConfigError, check_range
from methods.objectives.policy_gradient import Grpo
from methods.objectives.ppo import Ppo
from methods.objectives.reinforce_pp import ReinforcePP
from methods.srft import Srft
from methods.tapo.method import Tapo
from methods.vsrm.vsrm import Vsrm


def test_check_range():
    for value in (0.0, 0.5, 1.0):
        check_range("k", value, 0.0, 1.0)
    check_range("k", 1e-9, 0.0, above=True)
    for value in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="at least 0 and at most 1"):
            check_range("k", value, 0.0, 1.0)
    for value in (0.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="above 0"):
            check_range("k", value, 0.0, above=True)


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (Grpo, "beta", math.nan),
        (Grpo, "epsilon_low", -0.1),
        (Grpo, "epsilon_high", math.nan),
        (ReinforcePP, "gamma", 1.5),
        (Ppo, "gamma", -0.1),
        (Ppo, "lam", 2.0),
        (Ppo, "dual_clip", 1.0),
        (Ppo, "value_clip", -1.0),
        (Ppo, "critic_learning_rate", math.nan),
        (Ppo, "epsilon_low", math.nan),
        (Vsrm, "gamma", math.nan),
        (Vsrm, "lookahead", -1),
        (Vsrm, "samples", 0),
        (Tapo, "theta", math.nan),
        (Tapo, "beta", -1.0),
        (Srft, "sft_coefficient", math.nan),
        (AutoSearch, "probe_tokens", 0),
        (AutoSearch, "search_form", "("),
        (SearchDepth, "probe_tokens", 0),
    ],
)
def test_settings_out_of_range(cls, key, value):
    with pytest.raises(ConfigError) as refused:
        cls(**{key: value})
    assert refused.value.where.endswith(f".{key}")
