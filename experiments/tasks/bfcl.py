"""BFCL v4, the Berkeley function-calling leaderboard: its categories of one turn, by its AST checker."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from experiments.tasks import bfcl_checker
from experiments.tasks.base import Row
from experiments.tasks.tool_parsing import read_calls
from experiments.tasks.tool_table import ToolTable
from methods.errors import DataError

CATEGORIES = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple", "irrelevance",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance",
)  # fmt: skip
STATEFUL = ("multi_turn", "memory", "web_search", "format_sensitivity")
UPSTREAM = re.compile(r"BFCL_v\d+_(\w+)\.json")
INSTRUCTIONS = """\
You can call functions. Decide which of them, if any, answer the question, and with which arguments.
Write nothing but a list of calls in this form:
[name(argument=value, other=value), name_of_another(argument=value)]
If no function fits, or an argument that is required is missing, say so in a sentence without a call.

The functions, in JSON:
"""


@dataclass
class Bfcl(ToolTable):
    """Rows with `id`, `category`, `question` (turns of messages), `function` and `ground_truth` (accepted values), or
    upstream's folder `bfcl_eval/data` with its `possible_answer/`.

    A response scores 1 if its calls are right in their category (`experiments.tasks.bfcl_checker`); the tiers are the
    categories. Stateful categories (multi_turn and others whose tools act on a world) need the package bfcl-eval, which
    pins numpy 1.26 and does not install beside the rest: they are left out, and the table names them.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = ToolTable.usual | {"prompt": ("question",), "tier": ("category",)}

    name: str = "bfcl"
    tiers: tuple[str, ...] = CATEGORIES
    max_prompt_tokens: int = 4096
    max_completion_tokens: int = 512
    eval_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._left_out: dict[str, int] = {}

    @property
    def left_out(self) -> dict[str, int]:
        return self._left_out

    def messages(self, record: dict, prompt: Any) -> list[dict]:
        (turn,) = prompt  # of one turn
        functions = json.dumps(record["function"], ensure_ascii=False)
        told = [{"role": str(m["role"]), "content": str(m["content"])} for m in turn]
        own = "\n\n".join(m["content"] for m in told if m["role"] == "system")
        system = INSTRUCTIONS + functions + (f"\n\n{own}" if own else "")
        return [{"role": "system", "content": system}, *(m for m in told if m["role"] != "system")]

    def answer_of(self, value: Any, record: dict) -> dict[str, Any]:
        """What the checker needs; the accepted values are null where any call, or none, is right."""
        category, functions = str(record["category"]), record["function"]
        _check(category, functions, value)
        return {"category": category, "functions": functions, "accepted": value}

    def score(self, text: str, row: Row) -> float:
        gold = row.answer
        calls = read_calls(self.whole(text))
        return float(bfcl_checker.right(gold["category"], calls, gold["functions"], gold["accepted"]))

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        """called: whether any call could be read."""
        return {"called": float(bool(read_calls(self.whole(text))))}

    def _records(self, split: str) -> tuple[list[tuple[int, dict]], str]:
        folder = Path(self.path).expanduser()
        if (folder / "possible_answer").is_dir():
            records, source = list(enumerate(upstream(folder))), str(folder)
        else:
            records, source = super()._records(split)
        kept, gone = [], Counter()
        for place, record in records:
            category = str(record.get("category"))
            if category.startswith(STATEFUL):
                gone[category] += 1
            else:
                kept.append((place, record))
        self._left_out = dict(sorted(gone.items()))
        if not kept:
            raise DataError("No row is of a category with one turn", where=source, expected=", ".join(CATEGORIES))
        return kept, source


def upstream(folder: Path) -> list[dict]:
    """The rows of BFCL's own folder, answers joined by id; files of other benchmarks are passed over."""
    rows: list[dict] = []
    for file in sorted(folder.glob("BFCL_v*.json")):
        named = UPSTREAM.fullmatch(file.name)
        answers = folder / "possible_answer" / file.name
        gold = {r["id"]: r.get("ground_truth") for r in _lines(answers)} if answers.is_file() else {}
        if named:
            rows += [{"ground_truth": gold.get(r.get("id")), **r, "category": named[1]} for r in _lines(file)]
    if not rows:
        raise DataError("The folder holds no file of BFCL", where=str(folder), expected="BFCL_v4_<category>.json")
    return rows


def _lines(file: Path) -> list[dict]:
    """Upstream's files are JSON lines under the name .json. Raises DataError naming file and line."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise DataError("The line is not JSON", where=f"{file}:{number}", got=str(error)) from error
        if row is not None:
            if not isinstance(row, dict) or "id" not in row:
                raise DataError("The line is no object with an id", where=f"{file}:{number}", got=line[:80])
            rows.append(row)
    return rows


def _check(category: str, functions: Any, accepted: Any) -> None:
    """Raises DataError for what the checker could not read."""
    if category not in CATEGORIES:
        raise DataError("Unknown category", got=category, expected=", ".join(CATEGORIES))
    good = isinstance(functions, list) and all(
        isinstance(f, dict) and isinstance(f.get("name"), str) and isinstance(f.get("parameters"), dict)
        for f in functions
    )
    if not good:
        raise DataError("`function` is no list of functions with name and parameters", got=repr(functions)[:100])
    due = "relevance" not in category
    if due and not (isinstance(accepted, list) and accepted and all(_is_answer(a) for a in accepted)):
        raise DataError(
            "The accepted values cannot be read",
            got=repr(accepted)[:100],
            expected="[{function: {parameter: [accepted values]}}]",
        )


def _is_answer(value: Any) -> bool:
    one = isinstance(value, dict) and len(value) == 1 and next(iter(value.values()))
    return one == {} or (isinstance(one, dict) and all(isinstance(v, list) for v in one.values()))
