"""Judges without a model: what any judge must be compared with, and what a benchmark gives away for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from experiments.judging.pairs import Form, Question, Verdict
from experiments.seeds import derive
from methods.errors import ConfigError

Scores = Sequence[float]
RULES: dict[str, Callable[[Question], Scores]] = {
    "longer": lambda question: [len(text) for text in question.responses],
    "shorter": lambda question: [-len(text) for text in question.responses],
    "oracle": lambda question: question.grades,
}
CONTROLS = ("always_first", "random", *RULES)


@dataclass
class ControlJudge:
    """rule: always_first (slot A whatever it says), random (any slot; scores where all responses are shown at once),
    longer and shorter (characters; equal lengths tie), oracle (the grades themselves). Each is a function of the
    question and `seed` alone: batches and the order of calls change nothing.
    """

    rule: str = "oracle"
    seed: int = 0
    form: Form = "pairs"

    def __post_init__(self) -> None:
        for key, known in (("rule", CONTROLS), ("form", get_args(Form))):
            if (got := getattr(self, key)) not in known:
                raise ConfigError(
                    f"There is no such {key}", where=f"judge.by.{key}", got=got, expected=", ".join(known)
                )

    @property
    def name(self) -> str:
        return self.rule

    def judge(self, questions: Sequence[Question]) -> Iterator[Verdict]:
        for question in questions:
            if self.rule in RULES:
                yield Verdict.of_scores(question, RULES[self.rule](question))
            elif self.rule == "always_first":
                yield Verdict(question, 0)
            elif self.form == "all":
                rng = np.random.default_rng(derive(self.seed, "random judge", *question.item.key))
                scores = rng.random(
                    len(question.slots)
                )  # by response, not by slot: what is shown where changes nothing
                yield Verdict.of_scores(question, [float(scores[k]) for k in question.slots])
            else:
                place = "/".join(map(str, question.slots))
                draw = derive(self.seed, "random judge", *question.item.key, place)
                yield Verdict(question, draw % len(question.slots))
