"""Two-digit addition with a carry scratch: experts show only sums without a carry, the test asks all of them."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, bucket, shuffled
from methods.errors import ConfigError

SYMBOLS = tuple("0123456789+=,:?")
NUMBERS = range(10, 100)
TIERS = ("no_carry", "carry")  # in the units
HELD_OUT = {"eval": 0, "test": 1}  # buckets of ten that no training or warm-start prompt comes from
SCRATCH = re.compile(r"\d\+\d=\d+,\d\+\d\+\d=\d+:\d+")


@dataclass
class Addition(Task):
    """`58+67?` -> `8+7=15,5+6+1=12:125`: the units, the tens with the carry, and after the last colon the answer.

    `train` has `demo_rows` rows on `demo_problems` different problems without a carry in the units, each with the
    expert's trace as its demonstration, and `train_rows` on as many problems of all kinds without one: imitation
    cannot cover what the test asks. `eval` and `test` are random problems of all kinds that no training prompt of any
    seed comes from; their tiers are `no_carry` and `carry`.
    The start policy is no expert: its warm start (`warm_rows`) sees all kinds of problems, a share `direct` of them
    answered at once (`:125`), of which `direct_wrong` wrongly, the others with a scratch of which `scratch_wrong` goes
    wrong in one digit and on from there. Raises ConfigError for settings that cannot be met.
    """

    name: str = "addition"
    symbols: tuple[str, ...] | None = SYMBOLS
    max_prompt_tokens: int = 6
    max_completion_tokens: int = 24
    tiers: tuple[str, ...] = TIERS
    demo_problems: int = 64
    demo_rows: int = 300
    train_rows: int = 300
    eval_rows: int = 192
    warm_start_rows: int = 6000
    direct: float = 0.75
    direct_wrong: float = 0.6
    scratch_wrong: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("direct", "direct_wrong", "scratch_wrong"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError("Not a share", where=f"task.{key}", got=getattr(self, key), expected="0 to 1")
        # Of 8100 problems eight tenths are for training, and half of these have no carry.
        for key, most in (("demo_problems", 2000), ("train_rows", 5000), ("eval_rows", 600)):
            if not 0 <= getattr(self, key) <= most:
                raise ConfigError(
                    "There are not so many problems",
                    where=f"task.{key}",
                    got=getattr(self, key),
                    expected=f"0 to {most}",
                )

    def rows(self, split: str, seed: int) -> list[Row]:
        rng = random.Random(derive(seed, "addition", split))
        if split in HELD_OUT:
            return [self._row(p) for p in problems(rng, self.eval_rows, split)]
        if split != "train":
            raise ConfigError("Unknown split", where="task", got=split, expected="train, eval or test")
        shown = problems(rng, self.demo_problems, split, only="no_carry")
        demos = [
            self._row(shown[k % len(shown)], k // len(shown), demo=True) for k in range(self.demo_rows * bool(shown))
        ]
        others = [p for p in problems(rng, self.train_rows + len(shown), split) if p not in shown]
        return shuffled([*demos, *map(self._row, others[: self.train_rows])], seed, "addition", split)

    def warm_rows(self, seed: int) -> list[Row]:
        rng = random.Random(derive(seed, "addition", "warm"))
        pool = [p for p in everything() if bucket(p, 10) not in HELD_OUT.values()]
        rows = []
        for k in range(self.warm_start_rows):
            problem = rng.choice(pool)
            row = self._row(problem, k)
            rows.append(Row(**{**vars(row), "demo": self._amateur(problem, rng)}))
        return rows

    def _row(self, problem: str, copy: int = 0, demo: bool = False) -> Row:
        a, b = operands(problem)
        return Row(
            id=problem + (f"~{copy + 1}" if copy else ""),
            prompt=problem,
            answer=str(a + b),
            tier=tier(problem),
            demo=trace(problem) if demo else None,
        )

    def _amateur(self, problem: str, rng: random.Random) -> str:
        a, b = operands(problem)
        if rng.random() < self.direct:
            return f":{a + b if rng.random() >= self.direct_wrong else other(a + b, rng)}"
        slips = [0, 0]
        if rng.random() < self.scratch_wrong:
            slips[rng.randrange(2)] = rng.choice([-2, -1, 1, 2])
        return trace(problem, *slips)

    def score(self, text: str, row: Row) -> float:
        """1 if the number after the last colon is the sum, written without leading zeros."""
        return float(text.rpartition(":")[2].strip() == row.answer and ":" in text)

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        """`scratch`: whether the answer is worked out in the expert's form, rightly or not."""
        return {"scratch": float(SCRATCH.fullmatch(text.strip()) is not None)}


def everything() -> list[str]:
    return [f"{a}+{b}?" for a in NUMBERS for b in NUMBERS]


def problems(rng: random.Random, count: int, split: str, only: str = "") -> list[str]:
    """`count` different problems of a split, of the tier `only` if it is named."""
    part = HELD_OUT.get(split)
    pool = [p for p in everything() if (bucket(p, 10) == part if part is not None else bucket(p, 10) > 1)]
    return rng.sample([p for p in pool if only in ("", tier(p))], count)


def operands(problem: str) -> tuple[int, int]:
    a, _, b = problem.rstrip("?").partition("+")
    return int(a), int(b)


def tier(problem: str) -> str:
    a, b = operands(problem)
    return TIERS[a % 10 + b % 10 >= 10]


def trace(problem: str, units_slip: int = 0, tens_slip: int = 0) -> str:
    """The worked sum; a slip is added to the result of the units or of the tens and carried on."""
    a, b = operands(problem)
    units = max(a % 10 + b % 10 + units_slip, 0)
    tens = max(a // 10 + b // 10 + units // 10 + tens_slip, 0)
    return f"{a % 10}+{b % 10}={units},{a // 10}+{b // 10}+{units // 10}={tens}:{10 * tens + units % 10}"


def other(total: int, rng: random.Random) -> int:
    """A wrong sum near the right one: off by up to two in the units, the tens, or both."""
    while (wrong := total + rng.choice([-20, -10, 0, 10, 20]) + rng.choice([-2, -1, 0, 1, 2])) == total or wrong < 0:
        pass
    return wrong
