"""Mathematics with answers in LaTeX: MATH and sets of the same form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.tasks.table import TableTask


@dataclass
class Math(TableTask):
    r"""Reads a question and an answer, or a worked solution whose last `\boxed{}` is the answer; scored by math-verify.

    The tier is the column `level` where there is one (`5` and `Level 5` both give `level 5`). Rows with choices
    (MMLU-STEM, AQuA) are scored by letter.
    """

    name: str = "math"
    max_completion_tokens: int = 1024
    path: str = "DigitalLearningGmbH/MATH-lighteval"
    scorer: str = "math_verify"

    def tier_of(self, value: Any, record: dict) -> str:
        return "all" if value is None else "level " + str(value).lower().removeprefix("level").strip()
