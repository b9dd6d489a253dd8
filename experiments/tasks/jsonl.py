"""A user's own file of prompts and answers."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.tasks.table import TableTask


@dataclass
class Jsonl(TableTask):
    """Rows of `path` (jsonl, jsonl.gz, csv or parquet) with a choice of scorer; prompts are used as they are."""

    name: str = "jsonl"
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    scorer: str = "exact"
    suffix: str | None = ""
