"""API-Bank (arXiv 2304.08244), levels 1 to 3, in ToolRL's form: a dialogue, and the one call that comes next."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from experiments.tasks.base import Row
from experiments.tasks.tool_judge import judge
from experiments.tasks.tool_parsing import Call, read_calls
from experiments.tasks.tool_rewards import outcome_reward
from experiments.tasks.tool_table import ToolTable, text_of
from methods.errors import DataError


@dataclass
class ApiBank(ToolTable):
    """Rows with `system`, `user`, `answer` (a list of calls, or one call by itself) and `level`.

    A response scores 1 if its calls, in any of the usual forms, are those of the answer: the same names and parameters,
    values equal as parsed JSON, order free. Tiers are the levels: 1 the tools are given, 2 they are found by a search
    tool, 3 several calls are planned.
    """

    name: str = "api_bank"
    tiers: tuple[str, ...] = ("level 1", "level 2", "level 3")
    max_completion_tokens: int = 512
    eval_fraction: float = 1.0

    def messages(self, record: dict, prompt: Any) -> list[dict]:
        system = {"role": "system", "content": text_of(record["system"], "system text")}
        return [system, {"role": "user", "content": text_of(prompt, "user text")}]

    def answer_of(self, value: Any, record: dict) -> list[Call]:
        value = json.loads(value) if isinstance(value, str) else value
        calls = [value] if isinstance(value, dict) else value
        good = isinstance(calls, list) and calls and all(map(_is_call, calls))
        if not good:
            raise DataError(
                "The answer holds no calls",
                got=repr(value)[:100],
                expected='[{"name": ..., "parameters": {...}}]',
            )
        return [{"name": call["name"], "parameters": call["parameters"]} for call in calls]

    def tier_of(self, value: Any, record: dict) -> str:
        return f"level {value}"

    def score(self, text: str, row: Row) -> float:
        return float(_same(read_calls(self.whole(text)), row.answer))

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        """format, reward (R_out), names, keys, values by `outcome_reward`; reasoning (the programmatic judge)."""
        out = outcome_reward(self.whole(text), ground_truth(row.answer))
        shares = {"names": out.names, "keys": out.keys, "values": out.values}
        return {"format": out.fmt, "reward": out.total} | shares | {"reasoning": judge(row.prompt, self.whole(text))}


def ground_truth(calls: list[Call]) -> str:
    """Calls in the form against which `outcome_reward` compares."""
    lines = "\n".join(json.dumps(call, ensure_ascii=False) for call in calls)
    return f"<think> I should call the tool. </think>\n<tool_call>\n{lines}\n</tool_call>"


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("parameters"), dict)


def _same(said: list[Call] | None, due: list[Call]) -> bool:
    """Equal as multisets; calls are few, so they are crossed off one by one."""
    if said is None or len(said) != len(due):
        return False
    left = list(said)
    for call in due:
        if call not in left:
            return False
        left.remove(call)
    return True
