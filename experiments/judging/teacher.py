"""CDRRM in the constraint world: a program as teacher, its contrast of two answers, and rules as a frozen judge.

The teacher is blind to the label: it diagnoses each answer on its own, with mistakes, and what it wrote is filtered by
whether the judge recovers the label from it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.judging.pairs import TIE
from experiments.judging.world import Case, Rule
from methods.cdrrm.profiles import contrast, discriminative, penalty
from methods.cdrrm.rubric import decide

WRITTEN = re.compile(
    r"(?P<kind>has|lacks|starts|ends) (?P<letter>[a-j])|(?P<count>count) (?P<of>[a-j])=(?P<n>[1-9])"
    r"|(?P<no_repeats>no repeats)|(?P<sorted>digits sorted)|(?P<length>length)<=(?P<most>\d\d?)"
)
GAP = "; "


@dataclass(frozen=True)
class Teacher:
    """status: share of findings that are wrong. relevance: share of properties whose being asked for is misread, for
    each answer on its own. corrupt: share of the rules that are replaced by a property of the case drawn at random,
    which is the same one again in 1 of 8 draws.
    """

    status: float = 0.1
    relevance: float = 0.1
    corrupt: float = 0.0

    def profile(self, case: Case, answer: str, rng: random.Random) -> list[float]:
        """Penalty of each property: pass 0, fail 5/3 (severity 2), NaN where it seems not to be asked for."""
        found = []
        for k, rule in enumerate(case.rules):
            asked = (k in case.required) != (rng.random() < self.relevance)
            kept = rule.holds(answer) != (rng.random() < self.status)
            found.append(penalty("not_applicable" if not asked else "pass" if kept else "fail", 2))
        return found

    def rubric(self, case: Case, a: str, b: str, rng: random.Random) -> list[Rule]:
        """The rules that separate the two diagnoses, strongest first; empty where none does: no rubric."""
        one, other = self.profile(case, a, rng), self.profile(case, b, rng)
        return [
            rng.choice(case.rules) if rng.random() < self.corrupt else case.rules[k]
            for k in discriminative(contrast(one, other).tolist())
        ]


def verdict(rules: Sequence[Rule], a: str, b: str) -> int:
    """What a judge that follows `rules` exactly says of two answers: slot 0, slot 1, or TIE; TIE without rules."""
    if not rules:
        return TIE
    return decide(*([float(rule.holds(answer)) for rule in rules] for answer in (a, b)))


def recovered(rules: Sequence[Rule], a: str, b: str, gold: int, slip: float, passes: int, rng: random.Random) -> bool:
    """Whether a judge that names a random slot in the share `slip` finds the label in all of `passes` readings.

    A tie is settled by a coin: the judge's prompt allows none.
    """
    for _ in range(passes):
        said = verdict(rules, a, b)
        if said == TIE or rng.random() < slip:
            said = rng.randrange(2)
        if said != gold:
            return False
    return True


def spell(rules: Sequence[Rule]) -> str:
    return GAP.join(rule.text for rule in rules)


def read(text: str) -> list[Rule] | None:
    """The rules of a written rubric; None where it is none: an unknown rule, or nothing at all."""
    rules = []
    for part in text.split(GAP):
        found = WRITTEN.fullmatch(part.strip())
        if found is None:
            return None
        kind = next(found[k] for k in ("kind", "count", "no_repeats", "sorted", "length") if found[k])
        kind = {"no repeats": "no_repeats", "digits sorted": "sorted"}.get(kind, kind)
        rules.append(Rule(kind, found["letter"] or found["of"] or "", int(found["n"] or found["most"] or 0)))
    return rules


def discrimination(rules: Sequence[Rule], chosen: Sequence[str], rejected: Sequence[str]) -> np.ndarray:
    """D_jp = v_j(chosen of pair p) - v_j(rejected): (J, P)."""
    return np.array([[int(r.holds(c)) - int(r.holds(w)) for c, w in zip(chosen, rejected, strict=True)] for r in rules])
