"""Dividing a budget of tokens by relevance: when it beats an equal share, and what wrong estimates cost (ZipRL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from methods.errors import ConfigError, check_range
from methods.ziprl.allocation import follows_margins, utility, water_filling
from methods.ziprl.quality import INTERVALS, asked_level

if TYPE_CHECKING:
    import pandas as pd

LEVEL_SHARE = np.array([(low + high) / 2 for low, high in INTERVALS])


def uniform(r: np.ndarray, budget: float) -> np.ndarray:
    return np.full(len(r), budget / len(r))


def proportional(r: np.ndarray, budget: float) -> np.ndarray:
    return budget * r / r.sum()


def greedy(r: np.ndarray, budget: float) -> np.ndarray:
    """Everything to the most relevant document."""
    return np.where(np.arange(len(r)) == r.argmax(), budget, 0.0)


def levels(r: np.ndarray, budget: float) -> np.ndarray:
    """As the five levels would: the middle of the interval of each document's level, scaled to the budget."""
    share = LEVEL_SHARE[[asked_level(min(1.0, rho)) - 1 for rho in r]]
    return budget * share / share.sum()


ALLOCATIONS = {f.__name__: f for f in (uniform, water_filling, proportional, greedy, levels)}


@dataclass
class ZiprlTheory:
    """U(b) = sum r_i log(1 + b_i) of an allocation, against the equal share of the same budget; no model takes part.

    Relevances are drawn per tier: `flat` (.4 to .6), `mixed` (0 to 1), `sparse` (one of 1, the others up to .2). The
    allocation sees each multiplied by exp(N(0, noise)), or with `permuted` those of other documents.
    Columns: score = U(b) / U(uniform) - 1; condition = whether r_i / (1 + b_i) and b_i are ordered alike (at the true
    relevances), which suffices for score >= 0; broken = it holds and the score is below 0 (never, if the proof is
    right); without = the score is above 0 and it does not hold; best = score of the best allocation.
    """

    allocation: str = "levels"  # uniform | water_filling | proportional | greedy | levels
    noise: float = 0.0
    permuted: bool = False
    documents: int = 8
    budget: float = 8.0
    draws: int = 300

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise ConfigError(
                "unknown allocation", where="study.allocation", got=self.allocation, expected=", ".join(ALLOCATIONS)
            )
        check_range("study.noise", self.noise, 0.0)
        check_range("study.documents", self.documents, 1)
        check_range("study.budget", self.budget, 0.0, above=True)
        check_range("study.draws", self.draws, 1)

    def simulate(self, seed: int) -> pd.DataFrame:
        import pandas as pd

        # The world has a stream of its own, so that all arms of a seed see the same documents.
        world, rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
        table = [self._draw(k, tier, world, rng) for k in range(self.draws) for tier in ("flat", "mixed", "sparse")]
        return pd.DataFrame(table)

    def _draw(self, k: int, tier: str, world: np.random.Generator, rng: np.random.Generator) -> dict:
        r = _relevances(tier, self.documents, world)
        seen = r * np.exp(world.normal(0, 1, len(r)) * self.noise)
        b = ALLOCATIONS[self.allocation](rng.permutation(seen) if self.permuted else seen, self.budget)
        equal = utility(r, uniform(r, self.budget))
        gain = utility(r, b) / equal - 1
        holds = follows_margins(r, b)
        return {
            "item_id": f"{tier}{k}",
            "score": gain,
            "tier": tier,
            "length": 0.0,
            "condition": float(holds),
            "broken": float(holds and gain < -1e-9),
            "without": float(gain > 1e-9 and not holds),
            "best": utility(r, water_filling(r, self.budget)) / equal - 1,
        }


def _relevances(tier: str, n: int, world: np.random.Generator) -> np.ndarray:
    if tier == "sparse":
        return np.where(np.arange(n) == world.integers(n), 1.0, world.uniform(0, 0.2, n))
    return world.uniform(0.4, 0.6, n) if tier == "flat" else world.uniform(0, 1, n)
