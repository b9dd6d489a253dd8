"""Lookup or guess: the right call rarely succeeds at first, because the step after it has still to be learned."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, shuffled
from experiments.tools import Tools, ToolText
from methods.errors import ConfigError

TYPES, QUERIES, TRANSFORMS, VALUES, KEYS, NAMES = 8, 8, 10, 10, 20, 10
FORM = ToolText(call=r"<s>(?P<query>q\d+)</s>", opening="<s>", tool="search", stop=("</s>",), result="<r>{}</r>")
SYMBOLS = (
    *(f"{letter}{i}" for letter, n in zip("tkqvfa", (TYPES, KEYS, QUERIES, VALUES, TRANSFORMS, NAMES), strict=True)
      for i in range(n)),
    "<s>", "</s>", "<r>", "</r>", "?", "=", "error",
)  # fmt: skip


@dataclass
class Lookup(Task):
    """`t3k7a5?`: a question of type t3 about the key k7. `<s>q3</s>` gives `<r>v4</r>`, the record's value; `=v4f2`
    answers with the transformation f2 of it. Or `a5` answers from memory, by the remark in the prompt.

    Of `queries` queries one retrieves the record, the others retrieve other values. Which one, and which of
    `transforms` transformations is right, depends on the type alone, of which there are `types`. memory: chance that
    the remark is right (0: no remark, no such answer). luck: chance that an answer worked out from another value is
    accepted; it depends on question and answer, so that the same answer always gets the same score.

    Demonstrations, for the warm start: the right query with `demo_right`, the remark with `demo_memory`, else one of
    the other queries; the transformation is any, whatever the type.
    """

    name: str = "lookup"
    symbols: tuple[str, ...] | None = SYMBOLS
    max_prompt_tokens: int = 4
    max_completion_tokens: int = 12
    tiers: tuple[str, ...] = field(default=("all",), init=False)
    types: int = 4
    queries: int = 5
    transforms: int = 4
    memory: float = 0.35
    luck: float = 0.1
    demo_right: float = 0.35
    demo_memory: float = 0.05
    train_rows: int = 6000
    eval_rows: int = 384

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, most in (("types", TYPES), ("queries", QUERIES), ("transforms", TRANSFORMS)):
            value, least = getattr(self, key), 1 if key == "types" else 2
            if not isinstance(value, int) or not least <= value <= most:
                raise ConfigError("Out of range", where=f"task.{key}", got=value, expected=f"{least} to {most}")
        for key in ("memory", "luck", "demo_right", "demo_memory"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError("Not a probability", where=f"task.{key}", got=getattr(self, key), expected="0 to 1")
        if self.demo_right + self.demo_memory > 1:
            raise ConfigError(
                "The demonstrations' shares exceed 1",
                where="task.demo_right",
                got=f"demo_right={self.demo_right}, demo_memory={self.demo_memory}",
            )
        if self.demo_memory and not self.memory:
            raise ConfigError(
                "Demonstrations use a remark that no prompt has",
                where="task.demo_memory",
                got=f"demo_memory={self.demo_memory}, memory=0",
                fix="set task.demo_memory=0, or task.memory above 0",
            )

    @property
    def tools(self) -> Tools:
        return Tools(FORM, max_calls=1, max_turn_tokens=5, max_result_tokens=1)

    # ---- rows ----
    def rows(self, split: str, seed: int) -> list[Row]:
        if split not in ("train", "eval", "test"):
            raise ConfigError("Unknown split", where="task", got=split, expected="train, eval or test")
        rng = random.Random(derive(seed, "lookup", split))
        count = self.train_rows if split == "train" else self.eval_rows
        rows = [self._row(f"{split}-{i}", i % self.types, split, rng) for i in range(count)]
        return shuffled(rows, seed, "lookup", split)

    def _row(self, name: str, kind: int, split: str, rng: random.Random) -> Row:
        query = kind % self.queries
        value = rng.randrange(VALUES)
        others = [v for v in range(VALUES) if v != value]
        records = [f"v{value if q == query else rng.choice(others)}" for q in range(self.queries)]
        transform = (7 * kind + 3) % self.transforms
        remark = f"a{rng.randrange(NAMES)}" if self.memory else ""
        meta: dict[str, Any] = {
            "records": {f"q{q}": record for q, record in enumerate(records)},
            "useful_calls": [{"tool": "search", "args": {"query": f"q{query}"}}],
            "remark": remark,
            "remark_right": rng.random() < self.memory,
            "luck": rng.randrange(2**31),
        }
        row = Row(name, f"t{kind}k{rng.randrange(KEYS)}{remark}?", f"v{value}f{transform}", meta=meta)
        if split == "train":
            meta["segments"] = self._demonstration(row, query, rng)
        return row

    def _demonstration(self, row: Row, right: int, rng: random.Random) -> list[list]:
        draw = rng.random()
        if draw < self.demo_memory:
            return [[row.meta["remark"], True]]
        wrong = [q for q in range(self.queries) if q != right]
        query = f"q{right if draw < self.demo_memory + self.demo_right else rng.choice(wrong)}"
        value = row.meta["records"][query]
        asked, answer = f"<s>{query}</s>", f"={value}f{rng.randrange(self.transforms)}"
        return [[asked, True], [f"<r>{value}</r>", False], [answer, True]]

    # ---- episodes ----
    def environment(self, row: Row) -> Records:
        return Records(row)

    def score(self, text: str, row: Row) -> float:
        """1 for the right transformation of the right value, for the remark where it is right, and by luck."""
        text = text.strip()
        if text == f"={row.answer}":
            return 1.0
        if text and text == row.meta["remark"]:
            return float(row.meta["remark_right"])
        worked = re.fullmatch(r"=(v\d+)f\d+", text)
        if worked is None or row.answer.startswith(worked[1] + "f"):
            return 0.0
        return float(random.Random(derive(row.meta["luck"], text)).random() < self.luck)

    def episode_metrics(self, traj: Any, row: Row) -> dict[str, float]:
        """Shares: tool = made a call that can be read, right_call = made the one that retrieves the record,
        from_memory = answered by the remark."""
        calls = [call for turn in traj.turns for call in turn.calls if call]
        return {
            "tool": float(bool(calls)),
            "right_call": float(row.meta["useful_calls"][0] in calls),
            "from_memory": float(bool(self.memory) and traj.text.strip() == row.meta["remark"]),
        }


class Records:
    """One episode's tool: a query on the question's key."""

    def __init__(self, row: Row) -> None:
        self.records = row.meta["records"]
        self.tools: Mapping[str, Callable[..., str]] = {"search": self.search}

    def search(self, query: str) -> str:
        if query not in self.records:
            raise LookupError(f"there is no {query}")
        return self.records[query]
