"""What the tables of tool calls share: chats with tools in the prompt, any of several columns, a prefill."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

from experiments.tasks.base import Row, bucket
from experiments.tasks.table import TableTask
from methods.errors import DataError


@dataclass
class ToolTable(TableTask):
    """Rows whose prompt is a chat with tools; members say how a record becomes messages, an answer and a tier.

    Rows of the tiers take turns, so that the first n rows cover all of them. `prefill` begins the assistant's answer
    and is put before the completion again when that is scored.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "prompt": ("user", "prompt", "question"),
        "answer": ("ground_truth", "output", "answer", "reward_model"),
        "split": ("split",),
        "id": ("id",),
        "tier": ("level", "category"),
    }

    max_prompt_tokens: int = 2048
    max_completion_tokens: int = 1024
    choices_column: str | None = None
    scorer: str = "exact"

    def messages(self, record: dict, prompt: Any) -> list[dict]:
        """The chat of a record; `prompt` is its prompt column."""
        raise NotImplementedError

    def rows(self, split: str, seed: int) -> list[Row]:
        """As `TableTask.rows`, with the tiers in turns. Raises DataError and ConfigError."""
        by_tier: dict[str, list[Row]] = defaultdict(list)
        for row in super().rows(split, seed):
            by_tier[row.tier].append(row)
        turns = zip_longest(*(by_tier[tier] for tier in self.tiers))
        return [row for turn in turns for row in turn if row is not None]

    def whole(self, text: str) -> str:
        """The response as the model wrote it, its prefilled beginning included."""
        return self.prefill + text

    def _row(self, record: dict, columns: dict[str, str | None], split: str, where: str) -> Row:
        cells = {what: None if column is None else record.get(column) for what, column in columns.items()}
        try:
            messages = self.messages(record, cells["prompt"])
            answer = self.answer_of(cells["answer"], record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, DataError):
                raise DataError(
                    error.what, where=where, got=error.got, expected=error.expected, fix=error.fix
                ) from error
            raise DataError(
                "The row has another form than this task reads",
                where=where,
                got=f"{type(error).__name__}: {error}"[:200],
                fix=f"choose the task that the data are of, or {self.config_key}.prompt_column= and answer_column=",
            ) from error
        begun = [{"role": "assistant", "content": self.prefill}] if self.prefill else []
        name = str(cells["id"]) if cells["id"] is not None else f"{bucket(str(record), 2**64):016x}"
        demo = self.demo_of(None, record) if split == "train" else None
        if demo is not None:
            demo = demo.removeprefix(self.prefill)
        return Row(name, [*messages, *begun], answer, self.tier_of(cells["tier"], record), demo)


def text_of(value: Any, what: str) -> str:
    """`value` if it is a text that is not empty. Raises DataError naming `what`."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"The {what} is no text, or empty", got=repr(value)[:100], expected="a text")
    return value
