"""What `assay judge judge.step=filter` wrote, as a task: rubrics for the generator, judgments for the judge."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.tasks.base import Row, Task, bucket, read_table, shuffled
from methods.cdrrm.parsing import Rejected, winner
from methods.cdrrm.rubric import Rubric
from methods.errors import DataError, check_range


@dataclass
class JudgeRows(Task):
    """Chat messages whose last turn is the demonstration; `path` is generator_sft.jsonl or judge_sft.jsonl.

    A share `eval_fraction` of the prompts, by a hash of their text, is held out. Score: for a judgment 1 if it names
    the demonstration's winner, for a rubric 1 if it is valid. Raises DataError for a row that is no conversation.
    """

    name: str = "judge_rows"
    path: str = ""
    eval_fraction: float = 0.05
    max_prompt_tokens: int = 25000
    max_completion_tokens: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("task.eval_fraction", self.eval_fraction, 0.0, 1.0)

    def rows(self, split: str, seed: int) -> list[Row]:
        records = read_table(self.path, columns=("messages",))
        rows = [self._row(record["messages"], f"{self.path}, row {k}") for k, record in enumerate(records, start=1)]
        kept = [
            row for row in rows if (bucket(str(row.prompt), 10_000) < 10_000 * self.eval_fraction) != (split == "train")
        ]
        if not kept:
            raise DataError(f"No row is left for the split '{split}'", where=self.path, got=f"{len(rows)} rows in all",
                            fix=f"change task.eval_fraction={self.eval_fraction}")  # fmt: skip
        return shuffled(kept, seed, "judge_rows", split)

    def _row(self, messages: list[dict], where: str) -> Row:
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
        )
        if not good or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(
                "The row is no conversation that ends with the assistant", where=where, got=repr(messages)[:100]
            )
        said = messages[-1]["content"]
        return Row(f"{bucket(str(messages), 2**64):016x}", messages[:-1], winner(said), demo=said)

    def score(self, text: str, row: Row) -> float:
        if row.answer is not None:
            return float(winner(text) == row.answer)
        try:
            Rubric.parse(text)
        except Rejected:
            return 0.0
        return 1.0
