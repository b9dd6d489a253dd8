"""Where a task's world and questions come from: a seed, a folder, the public release, or VitaBench's rows."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.tasks.local_life.generate import generated
from experiments.tasks.local_life.programs import Solver
from experiments.tasks.local_life.questions import Draws, Question, make_questions
from experiments.tasks.local_life.world import World
from methods.errors import ConfigError, DataError

if TYPE_CHECKING:
    from experiments.retrieval import Index


@dataclass
class Source:
    """A world with its questions. name: what it is, for reports. evaluation_only: every split has all questions and
    `train` none, because the set is public; otherwise splits are by city."""

    name: str
    world: World
    questions: list[Question]
    evaluation_only: bool = False
    by_seed: bool = False
    draws: Draws = field(default_factory=Draws)

    @cached_property
    def solver(self) -> Solver:
        return Solver(self.world)

    def of_split(self, split: str) -> list[Question]:
        """The questions of `train`, `eval` or `test`. A seed's world belongs to one split as a whole; in a folder the
        last city is the test's, the one before it the evaluation's, and training has the others.

        DataError where a split has none.
        """
        if self.by_seed or (self.evaluation_only and split != "train"):
            return self.questions
        cities = list(dict.fromkeys(question.city for question in self.questions))
        chosen = {"test": cities[-1:], "eval": cities[-2:-1], "train": cities[:-2]}[split]
        if self.evaluation_only or not chosen:
            raise DataError(
                f"There are no questions for the split '{split}'",
                where=self.name,
                got="a public evaluation set" if self.evaluation_only else f"{len(cities)} cities",
                expected="generated worlds"
                if self.evaluation_only
                else "at least three cities, which the splits share",
                fix='set task.path="" to generate worlds',
            )
        return [question for question in self.questions if question.city in chosen]


@functools.lru_cache(maxsize=4)
def of_seed(
    seed: int,
    size: int,
    questions: int,
    *,
    cities: int = 3,
    districts: int = 5,
    areas: int = 3,
    language: str = "en",
    hops: tuple[tuple[int, float], ...] = (),
) -> Source:
    """A generated world and its questions, findable by the default retriever (`index_of`). hops: (searches, weight)."""
    world = generated(seed, size, cities=cities, districts=districts, areas=areas, language=language)
    made, draws = make_questions(world, questions, seed, index_of(world).search, hops=dict(hops))
    return Source(world.source, world, made, by_seed=True, draws=draws)


def of_path(path: str, corpus: str | None = None) -> Source:
    """A folder that `data.save` wrote, LocalSearchBench's question file, or VitaBench's rows.

    corpus: the release's merchant file; None takes the merchants that its search paths name. What is malformed in it is
    kept and said on stderr. DataError for anything that cannot be used.
    """
    from experiments.tasks.local_life import data, release

    if data.is_world(Path(path).expanduser()):
        if corpus:
            raise ConfigError(
                "A world's folder has merchants of its own", where="task.corpus", got=corpus, fix="leave it out"
            )
        world, questions = data.load(path)
        return Source(world.source, world, questions)
    world, questions = release.read(path, corpus)
    if corpus:
        _say(corpus, "whose opening hours cannot be read (never open)", world.unreadable_hours)
        _say(corpus, "without coordinates (near nothing)", world.without_coordinates)
    return Source(world.source, world, questions, evaluation_only=True)


def _say(corpus: str, what: str, poi_ids: list[str]) -> None:
    if poi_ids:
        more = ", ..." if len(poi_ids) > 3 else ""
        print(f"{corpus}: kept {len(poi_ids)} merchants {what}: {', '.join(poi_ids[:3])}{more}", file=sys.stderr)


def index_of(world: World) -> Index:
    """The default retriever: BM25 over the merchants' documents, one index per city."""
    from experiments.retrieval import Passage, index_passages

    return index_passages(
        [Passage(poi, "", text, city) for city in world.cities for poi, text in world.documents(city)]
    )
