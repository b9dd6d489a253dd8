"""ToolRL's training data (a mix of ToolACE, Hammer and xLAM): dialogues that ask for tool calls or a response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.tasks.base import Row
from experiments.tasks.tool_judge import judge
from experiments.tasks.tool_rewards import Outcome, outcome_reward, read_reference
from experiments.tasks.tool_table import ToolTable, text_of


@dataclass
class Rlla(ToolTable):
    """Rows with `system`, `user` and `ground_truth` (or `output`, of the supervised rows, which then also is the
    demonstration); upstream's `prompt` (messages) and `reward_model.ground_truth` are read too.

    The score is the outcome reward of `outcome_reward`, scaled to [0, 1]; the tiers are what is due: call, response,
    both. A ground truth whose thinking quotes a call tag does not score 1 itself: the format counts each tag once in
    the whole text (7 of 200 supervised rows, none of the others).
    """

    name: str = "rlla"
    tiers: tuple[str, ...] = ("call", "response", "both")
    tier_column: str | None = None

    def messages(self, record: dict, prompt: Any) -> list[dict]:
        if not isinstance(prompt, str):
            return [{"role": str(m["role"]), "content": text_of(m["content"], "message")} for m in prompt]
        system = [{"role": "system", "content": text_of(record["system"], "system text")}] if "system" in record else []
        return [*system, {"role": "user", "content": text_of(prompt, "user text")}]

    def answer_of(self, value: Any, record: dict) -> str:
        gold = text_of(value["ground_truth"] if isinstance(value, dict) else value, "ground truth")
        read_reference(gold)
        return gold

    def tier_of(self, value: Any, record: dict) -> str:
        gold = next(record[c] for c in self.usual["answer"] if record.get(c) is not None)
        due = read_reference(gold["ground_truth"] if isinstance(gold, dict) else gold)
        return "response" if due.calls is None else "both" if due.response else "call"

    def demo_of(self, value: str | None, record: dict) -> str | None:
        return record.get("output")

    def score(self, text: str, row: Row) -> float:
        return self._outcome(text, row.answer).norm

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        """format, reward (R_out), names, keys, values (shares matched), exact (all calls right, or none said and none
        due, in the right format), reasoning (the programmatic judge)."""
        out = self._outcome(text, row.answer)
        exact = float(out.norm >= 1 - 1e-9)
        shares = {"names": out.names, "keys": out.keys, "values": out.values}
        told = {"format": out.fmt, "reward": out.total, "exact": exact}
        return told | shares | {"reasoning": judge(row.prompt, self.whole(text))}

    def _outcome(self, text: str, gold: str) -> Outcome:
        return outcome_reward(self.whole(text), gold)
