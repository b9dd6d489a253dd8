"""The scheduler of rollout bandits on rollouts whose worth is known: does it find the harmful ones from set gains?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from methods.rollout_bandits.features import FEATURES, Scale, context
from methods.rollout_bandits.scheduler import Scheduler
from methods.rollout_bandits.selection import best_of_groups

if TYPE_CHECKING:
    import pandas as pd

GROUPS, GROUP, SHARE = 16, 8, 0.5
GUESSED, HARM, WORTH = 0.35, -1.0, 0.5  # share of guessed rollouts, their value, the value of the others
PER_VALUE = 0.02  # gain of a kept set of mean value 1
SCALE = Scale(max_tokens=64, vocab_size=32, rounds=1)
STAGE = 70  # rounds of the first and of the last stage


@dataclass
class BanditSynthetic:
    """Rounds of 16 groups of 8: 35 % of the rollouts are guessed (reward 1, value -1, on average of higher entropy and
    more often truncated), the others are worth +.5 and right half of the time. Half of each group is kept, and

        gain = 0.02 x mean value of the kept + N(0, noise)

    is all the scheduler hears. No model takes part: `simulate(seed)` is the whole study. Columns, one row per round
    (tiers `first`, `middle`, `last`: 70, 60 and 70 rounds): score = share of harmful rollouts among the kept; regret
    = mean value of the best possible choice minus that of the kept; floor = share of harmful ones in the best choice.
    """

    policy: str = "scheduler"  # scheduler | random
    loss: str = "set_mean"
    exploration: str = "ts"
    noise: float = 0.005
    shuffled: bool = False
    rounds: int = 200

    def simulate(self, seed: int) -> pd.DataFrame:
        import pandas as pd

        # The world has a stream of its own, so that all arms of a seed see the same rounds.
        world, rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
        scheduler = Scheduler(len(FEATURES), loss=self.loss, exploration=self.exploration, seed=seed)
        change = (lambda y: y[torch.from_numpy(rng.permutation(len(y)))]) if self.shuffled else None
        table = []
        for t in range(self.rounds):
            x_NF, value_N, group_N = self._round(world)
            scheduler.begin(rng)
            scores_N = scheduler.scores(x_NF) if self.policy == "scheduler" else torch.from_numpy(rng.random(len(x_NF)))
            kept, ideal = (best_of_groups(s, group_N, SHARE) for s in (scores_N, value_N))
            gain = PER_VALUE * float(value_N[kept].mean()) + float(world.normal(0, self.noise))
            if self.policy == "scheduler":
                scheduler.learn(x_NF[kept], x_NF[kept].mean(0) - x_NF.mean(0), gain, change)
            table.append(
                {
                    "item_id": f"round{t}",
                    "score": float((value_N[kept] < 0).float().mean()),
                    "tier": "first" if t < STAGE else "last" if t >= self.rounds - STAGE else "middle",
                    "length": 0.0,
                    "regret": float(value_N[ideal].mean() - value_N[kept].mean()),
                    "floor": float((value_N[ideal] < 0).float().mean()),
                }
            )
        return pd.DataFrame(table)

    def _round(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Features, values and groups of one round's rollouts."""
        shape = (GROUPS, GROUP)
        guessed = rng.random(shape) < GUESSED
        reward = np.where(guessed, 1.0, rng.random(shape) < 0.5)
        mean, std = reward.mean(1, keepdims=True), reward.std(1, keepdims=True)
        facts = {
            "reward": reward,
            "advantage": (reward - mean) / (std + 1e-4),
            "group_mean": np.broadcast_to(mean, shape),
            "group_std": np.broadcast_to(std, shape),
            "length": rng.uniform(10, 64, shape),
            "truncated": rng.random(shape) < np.where(guessed, 0.4, 0.1),
            "entropy": rng.normal(np.where(guessed, 1.5, 0.8), 0.3).clip(min=0),
        }
        nothing = np.zeros(shape)
        facts_NF = np.stack([facts.get(name, nothing).ravel() for name in FEATURES], axis=1)
        value_N = torch.from_numpy(np.where(guessed, HARM, WORTH).ravel())
        group_N = torch.arange(GROUPS).repeat_interleave(GROUP)
        return context(torch.from_numpy(facts_NF).float(), SCALE), value_N, group_N
