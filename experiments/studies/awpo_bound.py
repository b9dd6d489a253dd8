"""What one step can gain: the bound behind AWPO against exact improvements, for judges of three kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from methods.awpo.theory import bound, gated_advantage, improvement
from methods.errors import ConfigError, check_range

if TYPE_CHECKING:
    import pandas as pd

ADVANTAGES = ("outcome", "sum", "awpo")
JUDGES = ("aligned", "noise", "adversarial")
TIERS = {"dead": (1e-4, 0.01), "hard": (0.02, 0.15), "medium": (0.3, 0.7), "solved": (0.97, 0.999)}


@dataclass
class AwpoBound:
    """One step of size alpha from two drawn actions of a log-linear policy over `actions`; no model takes part.

    Actions have `features` standard normal features. One action is right (outcome 1, others 0). Tiers by its
    probability: dead (1e-4 to .01), hard (to .15), medium (.3 to .7), solved (from .97). The judge gives the right
    action 1 and others up to .6 (aligned), anything to all (noise), or 0 to the right one and 1 to the others
    (adversarial).
    Columns: score = exact expected gain in the chance of the right action; surrogate = that in E[A]; bound = the bound
    on it; rho and second = alignment and second moment of the advantage; broken = a lemma or the bound fails (never).
    """

    advantage: str = "awpo"  # outcome | sum | awpo
    judge: str = "aligned"  # aligned | noise | adversarial
    actions: int = 10
    features: int = 4
    alpha: float = 0.1
    draws: int = 40

    def __post_init__(self) -> None:
        for key, known in (("advantage", ADVANTAGES), ("judge", JUDGES)):
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"unknown {key}", where=f"study.{key}", got=getattr(self, key), expected=", ".join(known)
                )
        check_range("study.actions", self.actions, 2, 64)
        check_range("study.features", self.features, 1, 64)
        check_range("study.alpha", self.alpha, 0.0, above=True)
        check_range("study.draws", self.draws, 1)

    def simulate(self, seed: int) -> pd.DataFrame:
        import pandas as pd

        # The world has a stream of its own, so that all arms of a seed see the same policies and judges.
        rng = np.random.default_rng(seed)
        return pd.DataFrame([self._draw(k, tier, rng) for k in range(self.draws) for tier in TIERS])

    def _draw(self, k: int, tier: str, rng: np.random.Generator) -> dict:
        chance, others = rng.uniform(*TIERS[tier]), rng.dirichlet(np.full(self.actions - 1, 2.0))
        noise, phi_KD = rng.uniform(0, 1, self.actions), rng.standard_normal((self.actions, self.features))
        pi_K = np.concatenate([[chance], (1 - chance) * np.maximum(others, 1e-9)])
        pi_K /= pi_K.sum()
        outcome_K = np.eye(self.actions)[0]
        reasoning_K = {
            "aligned": np.where(outcome_K > 0, 1.0, 0.6 * noise),
            "noise": noise,
            "adversarial": 1 - outcome_K,
        }[self.judge]
        if self.advantage == "outcome":
            adv_K = outcome_K - pi_K @ outcome_K
        else:
            adv_K = gated_advantage(pi_K, outcome_K, reasoning_K, gated=self.advantage == "awpo")
        found = bound(phi_KD, pi_K, adv_K, self.alpha, batch=2)
        surrogate = improvement(phi_KD, pi_K, adv_K, adv_K, self.alpha)
        pairs = (found.gradient, found.signal), (found.variance, found.noise), (surrogate, found.step)
        return {
            "item_id": f"{tier}{k}",
            "score": improvement(phi_KD, pi_K, adv_K, outcome_K, self.alpha),
            "tier": tier,
            "length": 0.0,
            "surrogate": surrogate,
            "bound": found.step,
            "rho": found.rho,
            "second": found.second,
            "broken": float(any(left > right + 1e-12 for left, right in pairs)),
        }
