"""The diagnosis of one answer, its checks, and the contrast of two: what separates the answers, as numbers.

Symbols: Gamma^c, Gamma^r profiles of the chosen and the rejected answer, p penalties, Delta their difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from methods.cdrrm.parsing import Rejected, listed, parse_json, text_of

STATUSES = ("pass", "fail", "partial", "not_applicable")
DIMENSIONS = (
    "instruction following",
    "content coverage",
    "factual accuracy",
    "format compliance",
    "logical consistency",
    "safety",
    "conciseness (only if the instruction asks for it)",
    "completeness",
)
TAU = 0.5  # least |Delta| of a discriminative dimension


@dataclass(frozen=True)
class Finding:
    """One criterion as one answer meets it. severity: 0 to 3, of a failure."""

    criterion: str
    status: str
    severity: int
    claim: str
    evidence: str
    anchor: str

    @property
    def penalty(self) -> float:
        return penalty(self.status, self.severity)


@dataclass(frozen=True)
class Profile:
    """The diagnosis of one answer; the other answer was not shown."""

    criteria: tuple[str, ...]
    findings: tuple[Finding, ...]

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Raises Rejected with its reason: no JSON, no findings, a finding that lacks what it needs.

        A fail or partial needs evidence and a severity (0 for any other, whatever is written); every finding a
        criterion, a claim and an instruction anchor.
        Any other key (label, pair_id, instruction_id, what a teacher adds) is left behind here: nothing that a later
        prompt sees can name the better answer.
        """
        record = parse_json(text)
        found = listed(record, "findings", "profile")
        if not found:
            raise Rejected("profile without findings")
        criteria = record.get("criteria_candidates") or []
        if not isinstance(criteria, list):
            raise Rejected("profile without a list of criteria_candidates")
        return cls(tuple(str(c) for c in criteria), tuple(map(_finding, found)))

    def redacted(self) -> dict[str, Any]:
        """What synthesis is shown of this profile, as JSON with stable keys."""
        return {
            "criteria_candidates": list(self.criteria),
            "findings": [
                {
                    "criterion": f.criterion,
                    "status": f.status,
                    "severity": f.severity,
                    "claim": f.claim,
                    "evidence": f.evidence,
                    "instruction_anchor": f.anchor,
                }
                for f in self.findings
            ],
        }

    def penalties(self) -> dict[str, float]:
        """Penalty by criterion (case and spaces aside); of one that is named twice, the greater."""
        found: dict[str, float] = {}
        for f in self.findings:
            key = " ".join(f.criterion.lower().split())
            found[key] = float(np.fmax(found.get(key, np.nan), f.penalty))
        return found


def _finding(record: dict[str, Any]) -> Finding:
    status = str(record.get("status", "")).strip().lower()
    if status not in STATUSES:
        raise Rejected("finding with an unknown status")
    failed = status in ("fail", "partial")
    severity = record.get("severity") if failed else 0
    if isinstance(severity, bool) or not isinstance(severity, (int, float)) or severity not in (0, 1, 2, 3):
        raise Rejected("finding with a severity other than 0 to 3")
    evidence = text_of(record, "evidence", f"{status} finding") if failed else str(record.get("evidence") or "")
    return Finding(
        text_of(record, "criterion", "finding"),
        status,
        int(severity),
        text_of(record, "claim", "finding"),
        evidence,
        text_of(record, "instruction_anchor", "finding"),
    )


def penalty(status: str, severity: float) -> float:
    """p: pass 0; partial 0.5 + severity / 6; fail 1 + severity / 3; not_applicable NaN."""
    return {"pass": 0.0, "partial": 0.5 + severity / 6, "fail": 1 + severity / 3, "not_applicable": float("nan")}[
        status
    ]


def contrast(chosen_K: Sequence[float], rejected_K: Sequence[float]) -> np.ndarray:
    """Delta_k = p_k(rejected) - p_k(chosen); positive favours the chosen. NaN on a side gives 0."""
    return np.nan_to_num(np.asarray(rejected_K, float) - np.asarray(chosen_K, float), nan=0.0)


def discriminative(delta_K: Sequence[float], tau: float = TAU) -> list[int]:
    """Dimensions with |Delta_k| >= tau, strongest first; equals in their order."""
    size_K = np.abs(np.asarray(delta_K, float))
    return [int(k) for k in np.argsort(-size_K, kind="stable") if size_K[k] >= tau]


def same_diagnosis(one: Profile, other: Profile) -> bool:
    """Whether both profiles name the same criteria and Delta is 0 on all of them: no rubric can come of it."""
    p, q = one.penalties(), other.penalties()
    return p.keys() == q.keys() and not np.any(contrast(list(p.values()), [q[key] for key in p]))
