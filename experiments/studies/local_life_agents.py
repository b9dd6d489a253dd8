"""What each skill is worth on generated local-life questions: scripted agents that lack one of them."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.seeds import derive
from experiments.tasks.local_life import metrics
from experiments.tasks.local_life.agents import AGENTS, Attempt
from experiments.tasks.local_life.playground import Playground, Visit
from experiments.tasks.local_life.sources import Source, of_seed
from methods.errors import ConfigError, nearest

if TYPE_CHECKING:
    import pandas as pd

FIRST_SEED = 1000  # of the worlds: none that a task's splits use


@dataclass
class LocalLifeAgents:
    """The agent `agent` (`tasks.local_life.agents`) with `calls` searches on a world and questions made anew per seed.

    hops: weights of the questions that need 3, 4 and 5 searches. Columns, one row per question: score = correctness
    (the ids in order, each retrieved), slot_share, calls; tiers are the searches needed. No model takes part.
    """

    agent: str = "reference"
    calls: int = 5
    size: int = 6000
    questions: int = 150
    hops: Sequence[float] = (0.6, 0.3, 0.1)
    language: str = "en"

    def simulate(self, seed: int) -> pd.DataFrame:
        import pandas as pd

        if self.agent not in AGENTS:
            raise ConfigError(
                f"Unknown agent '{self.agent}'", where="study.agent", expected=", ".join(AGENTS),
                fix=nearest(self.agent, AGENTS) or "choose one",
            )  # fmt: skip
        if len(self.hops) != 3 or min(self.hops) < 0 or not sum(self.hops):
            raise ConfigError(
                "Not three weights", where="study.hops", got=list(self.hops), expected="such as [6, 3, 1]"
            )
        mix = tuple(zip((3, 4, 5), map(float, self.hops), strict=True))
        source, playground = _world(FIRST_SEED + seed, self.size, self.questions, self.language, mix)
        table = []
        for question in source.questions:
            visit = Visit(playground, question.city)
            rng = random.Random(derive(seed, "local_life_agents", question.id))
            answer = AGENTS[self.agent](Attempt(question, source.solver, visit, self.calls, rng))
            gold = question.gold or ()
            table.append(
                {
                    "item_id": question.id,
                    "score": metrics.correctness(answer, gold, metrics.retrieved(visit.calls)),
                    "tier": str(question.hops),
                    "length": 0.0,
                    "slot_share": metrics.slot_share(answer, gold),
                    "calls": float(len(visit.calls)),
                }
            )
        return pd.DataFrame(table)


@functools.lru_cache(maxsize=16)  # all arms of an experiment look at the same worlds
def _world(seed: int, size: int, questions: int, language: str, hops: tuple) -> tuple[Source, Playground]:
    source = of_seed(seed, size, questions, language=language, hops=hops)
    return source, Playground(source.world)
