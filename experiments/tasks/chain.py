"""Chain arithmetic with a thinking block that goes on after the answer: a small model of overthinking."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from experiments.tasks import scorers
from experiments.tasks.arithmetic import SYMBOLS as ARITHMETIC
from experiments.tasks.arithmetic import Arithmetic, demonstration
from experiments.tasks.base import Row
from methods.errors import ConfigError

STEP, WAIT = "\nstep ", "\nwait "
BEGIN, ANSWER, END = "<think>", "</think>\\boxed{", "}"
# A blank before each operation: two tokens, as many as a step and its value, so that both keep a constant distance.
SYMBOLS = (*ARITHMETIC, " ", BEGIN, STEP, WAIT, "</think>", "\\boxed{", END)


@dataclass
class Chain(Arithmetic):
    r"""`3 +4 -2=<think>` -> `\nstep 7\nstep 5\nwait 5</think>\boxed{5}`: one step per operation, then re-checks.

    A demonstration re-checks 0 to `max_rechecks` times, each count equally often. A re-check writes a value and goes on
    from it: a right one becomes one of the nine others with `corruption`, a wrong one is mended with `repair`. So
    re-checks do harm, nothing or good, as these two say. The last value is the answer.
    Prompts, tiers, splits and `demo_noise` (of the steps) are those of `Arithmetic`.
    """

    name: str = "chain"
    symbols: tuple[str, ...] | None = SYMBOLS
    steps: dict[str, int] = field(default_factory=lambda: {"easy": 2, "medium": 3, "hard": 4})
    demo_noise: float = 0.0
    eval_rows: int = 192
    max_rechecks: int = 4
    corruption: float = 0.25
    repair: float = 0.1
    instructions: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        prompt, completion = self.max_prompt_tokens, self.max_completion_tokens
        super().__post_init__()
        longest = max(self.steps.values())
        self.max_prompt_tokens = prompt or 2 * longest + 3
        # Two tokens per step and re-check, then the closing tag, the box of three, the end; and room to overrun.
        self.max_completion_tokens = completion or 2 * (longest + self.max_rechecks) + 8
        for key in ("corruption", "repair"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError("Not a probability", where=f"task.{key}", got=getattr(self, key), expected="0 to 1")
        if self.max_rechecks < 0:
            raise ConfigError(
                "A number of re-checks", where="task.max_rechecks", got=self.max_rechecks, expected=">= 0"
            )

    def _row(self, prompt: str, tier: str, occurrence: int, split: str, rng: random.Random) -> Row:
        row = super()._row(prompt, tier, occurrence, "eval", rng)  # its own demonstrations are bare digits
        demo = self._demo(prompt, int(row.answer), rng) if split == "train" else None
        return Row(row.id, re.sub(r"(?=[+*-])", " ", prompt) + BEGIN, row.answer, tier, demo, meta=row.meta)

    def _demo(self, prompt: str, answer: int, rng: random.Random) -> str:
        steps = demonstration(prompt, rng, self.demo_noise)
        value, rechecks = steps[-1], []
        for _ in range(rng.randint(0, self.max_rechecks)):
            if value == answer:
                value = (value + rng.randrange(1, 10)) % 10 if rng.random() < self.corruption else value
            elif rng.random() < self.repair:
                value = answer
            rechecks.append(value)
        thought = "".join(f"{STEP}{v}" for v in steps) + "".join(f"{WAIT}{v}" for v in rechecks)
        return f"{thought}{ANSWER}{value}{END}"

    def score(self, text: str, row: Row) -> float:
        """1 if the last boxed value behind the thinking is the answer."""
        return float(scorers.boxed(scorers.final_text(text)) == row.answer)

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        """`rechecks`: how often the thinking re-checks."""
        return {"rechecks": float(text.count(WAIT))}
