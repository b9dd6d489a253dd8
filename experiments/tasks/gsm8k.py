"""GSM8K: grade-school word problems (Cobbe et al. 2021)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from experiments.tasks.table import TableTask


@dataclass
class Gsm8k(TableTask):
    """Reads `question` and `answer` (a worked solution ending in `#### final`), from the hub or a local table.

    Thousands commas are taken out of the answer. The demonstration is the solution without its `<<48/2=24>>` notes,
    the tier the number of these notes: easy up to 2, medium 3 and 4, hard from 5.
    """

    name: str = "gsm8k"
    max_completion_tokens: int = 512
    tiers: tuple[str, ...] = ("easy", "medium", "hard")
    path: str = "openai/gsm8k"
    subset: str | None = "main"
    scorer: str = "number"

    def answer_of(self, value: Any, record: dict) -> Any:
        return str(value).rpartition("####")[2].replace(",", "").strip() if value is not None else None

    def tier_of(self, value: Any, record: dict) -> str:
        notes = str(record.get("answer", "")).count("<<")
        return "easy" if notes <= 2 else "medium" if notes <= 4 else "hard"

    def demo_of(self, value: str | None, record: dict) -> str | None:
        solution = str(record.get("answer", ""))
        return re.sub(r"<<.*?>>", "", solution) if "####" in solution else None
