"""Rubrics: their schema, what a judge is shown of them, and the decision that they imply.

Symbols: t_j(y) in {0, 1} whether answer y passes the test of hard rule j, v_j(y) its worth; A and B the two answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from methods.cdrrm.parsing import Rejected, listed, parse_json, text_of

TYPES = ("must", "forbid")
TIE = -1


@dataclass(frozen=True)
class Rule:
    """A hard rule that can be checked on one answer alone."""

    rule_id: str
    type: str
    criterion: str
    test: str
    rationale: str = ""


@dataclass(frozen=True)
class Principle:
    principle_id: str
    description: str
    rationale: str = ""


@dataclass(frozen=True)
class Rubric:
    """At least one hard rule, and principles for what no rule separates."""

    rules: tuple[Rule, ...]
    principles: tuple[Principle, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Rubric:
        """The rubric that a model wrote. Raises Rejected with its reason.

        Keys beside the schema (`derived_from`, `pair_consistency_check`) are the teacher's own notes and are dropped.
        """
        return cls.from_json(parse_json(text))

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Rubric:
        rules = tuple(map(_rule, listed(record, "hard_rules", "rubric")))
        if not rules:
            raise Rejected("rubric without a hard rule")
        principles = listed(record, "principles", "rubric") if record.get("principles") else []
        return cls(rules, tuple(map(_principle, principles)))

    def to_json(self) -> dict[str, Any]:
        rules, principles = ([asdict(entry) for entry in part] for part in (self.rules, self.principles))
        return {"hard_rules": rules, "principles": principles}

    def dumps(self) -> str:
        """The target text of the rubric generator."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False)

    def render(self) -> str:
        """What the judge reads: criteria and descriptions only, numbered; tests and rationales stay behind."""
        rules = [f"{k}. {rule.criterion}" for k, rule in enumerate(self.rules, start=1)]
        principles = [f"{k}. {entry.description}" for k, entry in enumerate(self.principles, start=1)] or ["None"]
        return "\n".join(["Evaluation Rubric", "Hard Rules:", *rules, "", "Principles:", *principles])


def _rule(record: dict[str, Any]) -> Rule:
    kind = str(record.get("type", "")).strip().lower()
    if kind not in TYPES:
        raise Rejected("hard rule of a type other than must or forbid")
    criterion, test = (text_of(record, key, "hard rule") for key in ("criterion", "test"))
    return Rule(_id(record, "rule_id", "hard rule"), kind, criterion, test, str(record.get("rationale") or ""))


def _principle(record: dict[str, Any]) -> Principle:
    description = text_of(record, "description", "principle")
    return Principle(_id(record, "principle_id", "principle"), description, str(record.get("rationale") or ""))


def _id(record: dict[str, Any], key: str, what: str) -> str:
    value = record.get(key)  # teachers number their rules as often as they name them
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_of(record, key, what)


def rule_values(types: Sequence[str], passed: Sequence[float]) -> np.ndarray:
    """v_j = t_j for `must`, 1 - t_j for `forbid`."""
    t = np.asarray(passed, float)
    return np.where([kind == "forbid" for kind in types], 1 - t, t) if len(t) else t


def decide(
    values_a: Sequence[float],
    values_b: Sequence[float],
    principles_a: Sequence[float] = (),
    principles_b: Sequence[float] = (),
) -> int:
    """0 (A), 1 (B) or TIE: the higher mean of v_j; only if equal, of the principle grades; if still equal, a tie.

    A stand-in for the judge prompt that can be computed. A side without entries has mean 0.
    """
    for one, other in ((values_a, values_b), (principles_a, principles_b)):
        gap = (float(np.mean(one)) if len(one) else 0.0) - (float(np.mean(other)) if len(other) else 0.0)
        if abs(gap) > 1e-12:
            return 0 if gap > 0 else 1
    return TIE
