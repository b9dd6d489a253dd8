"""Chain arithmetic modulo 10: small enough for a 0.08 M parameter model, hard enough to have difficulty tiers."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, bucket, shuffled
from methods.errors import ConfigError

START = range(10)
OPERAND = range(1, 10)
FACTOR = (3, 7, 9)  # invertible modulo 10, so that no step forgets an error made before it
PER_STEP = 2 * len(OPERAND) + len(FACTOR)
HELD_OUT = {"eval": 0, "test": 1}  # buckets of ten that train prompts never come from
# An operation with its operand is one token: then step i of an answer and operation i of the prompt are a constant
# distance apart, which a model of two layers learns in seconds (with single characters it stays near chance).
SYMBOLS = tuple("0123456789+-*=") + tuple(f"{o}{d}" for o in "+-" for d in OPERAND) + tuple(f"*{d}" for d in FACTOR)
SHARED_BELOW = 1000  # a tier with fewer prompts than this is not split


@dataclass
class Arithmetic(Task):
    """`7+5-3=` -> `29`: from left to right, each running total modulo 10, one digit per operation; the last digit
    is the answer.

    `steps` gives the operations per tier, easy first; `mixture` the weights of the tiers in `train`. `demo_noise` is
    the chance per step that a demonstration writes a wrong digit, which the later steps carry on; see `pass_rate`.
    Tiers with fewer than 1000 prompts (one operation: 210) share prompts between splits; in the others `train`,
    `eval` and `test` are disjoint for all seeds. `eval` and `test` have `eval_rows` distinct prompts in equal parts.
    With `instructions` the prompt explains the task in words, for chat models. Raises ConfigError for settings that
    cannot be met.
    """

    name: str = "arithmetic"
    symbols: tuple[str, ...] | None = SYMBOLS
    max_prompt_tokens: int = 0
    max_completion_tokens: int = 0
    tiers: tuple[str, ...] = field(default=(), init=False)
    steps: dict[str, int] = field(default_factory=lambda: {"easy": 1, "medium": 3, "hard": 8})
    mixture: dict[str, float] = field(default_factory=lambda: {"easy": 1, "medium": 1, "hard": 1})
    demo_noise: float = 0.2
    train_rows: int = 12000
    eval_rows: int = 384
    instructions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tiers = tuple(self.steps)
        self._check()
        longest = max(self.steps.values())
        self.max_prompt_tokens = self.max_prompt_tokens or (200 if self.instructions else 2 * longest + 4)
        self.max_completion_tokens = self.max_completion_tokens or (256 if self.instructions else longest + 2)

    def _check(self) -> None:
        where = "task.steps"
        if not self.steps or any(not isinstance(k, int) or k < 1 for k in self.steps.values()):
            raise ConfigError("Each tier needs a whole number of operations >= 1", where=where, got=self.steps)
        if set(self.mixture) != set(self.steps) or min(self.mixture.values()) < 0 or not sum(self.mixture.values()):
            raise ConfigError(
                "The mixture needs a weight >= 0 for each tier and one above 0",
                where="task.mixture",
                got=self.mixture,
                expected="the tiers " + ", ".join(self.steps),
            )
        if not 0 <= self.demo_noise <= 1:
            raise ConfigError("Not a probability", where="task.demo_noise", got=self.demo_noise, expected="0 to 1")
        for tier, steps in self.steps.items():
            space = prompts(steps) if shared(steps) else prompts(steps) // 20  # half of the expected held-out tenth
            if self.eval_rows // len(self.steps) > space:
                raise ConfigError(
                    f"Tier '{tier}' has too few prompts for its share of the evaluation",
                    where="task.eval_rows",
                    got=self.eval_rows,
                    expected=f"at most {space * len(self.steps)}",
                    fix="ask for fewer rows",
                )

    def rows(self, split: str, seed: int) -> list[Row]:
        if split not in ("train", *HELD_OUT):
            raise ConfigError("Unknown split", where="task", got=split, expected="train, eval or test")
        rng = random.Random(derive(seed, "arithmetic", split))
        rows: list[Row] = []
        seen: dict[str, int] = {}
        for tier, count in self._counts(split).items():
            for _ in range(count):
                prompt = self._prompt(rng, self.steps[tier], split, seen)
                seen[prompt] = seen.get(prompt, 0) + 1
                rows.append(self._row(prompt, tier, seen[prompt], split, rng))
        return shuffled(rows, seed, "arithmetic", split)

    def _counts(self, split: str) -> dict[str, int]:
        if split != "train":
            return {tier: self.eval_rows // len(self.tiers) for tier in self.tiers}
        total, edges = sum(self.mixture.values()), [0]
        for k in range(len(self.tiers)):
            edges.append(round(self.train_rows * sum(self.mixture[t] for t in self.tiers[: k + 1]) / total))
        return {tier: edges[k + 1] - edges[k] for k, tier in enumerate(self.tiers)}

    def _prompt(self, rng: random.Random, steps: int, split: str, seen: dict[str, int]) -> str:
        while True:
            prompt = expression(rng, steps)
            if split != "train" and prompt in seen:
                continue
            part = bucket(prompt, 10)
            if shared(steps) or (part not in HELD_OUT.values() if split == "train" else part == HELD_OUT[split]):
                return prompt

    def _row(self, prompt: str, tier: str, occurrence: int, split: str, rng: random.Random) -> Row:
        totals = running_totals(prompt)
        written = "".join(map(str, totals))
        demo = None
        if split == "train":
            demo = "".join(map(str, demonstration(prompt, rng, self.demo_noise)))
        if self.instructions:
            demo = None if demo is None else f"{', '.join(demo)}\nAnswer: {demo[-1]}"
        return Row(
            id=f"{tier}/{prompt}" + (f"~{occurrence}" if occurrence > 1 else ""),
            prompt=INSTRUCTIONS.format(prompt.rstrip("=")) if self.instructions else prompt,
            answer=written[-1],
            tier=tier,
            demo=demo,
            meta={"totals": written},
        )

    def score(self, text: str, row: Row) -> float:
        """1 if the text is digits and ends in the right one; with `instructions`, if its last whole number is right."""
        text = text.strip()
        if self.instructions:
            found = re.findall(r"(?<![\d.])-?\d+(?!\.?\d)", text)
            return float(bool(found) and found[-1] == row.answer)
        return float(digits(text) and text[-1] == row.answer)

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        """`exact_format`: digits only, one per operation. `steps_right`: share of the running totals that are right,
        by position. Nothing with `instructions`."""
        if self.instructions:
            return {}
        text, totals = text.strip(), row.meta["totals"]
        right = sum(a == b for a, b in zip(text, totals, strict=False))
        return {
            "exact_format": float(digits(text) and len(text) == len(totals)),
            "steps_right": right / len(totals),
        }


INSTRUCTIONS = (
    "Compute {} from left to right, ignoring the usual order of operations. After each operation keep the remainder "
    "modulo 10 (so 12 becomes 2 and -3 becomes 7). Write the running total after each operation, separated by "
    "commas, then on the last line `Answer: ` and the last digit."
)


def digits(text: str) -> bool:
    """Whether `text` is one or more of the ten ASCII digits and nothing else."""
    return text.isascii() and text.isdigit()


def prompts(steps: int) -> int:
    """How many different prompts have this many operations."""
    return len(START) * PER_STEP**steps


def shared(steps: int) -> bool:
    """Whether the prompts of this length are too few to be split between train and eval."""
    return prompts(steps) < SHARED_BELOW


def expression(rng: random.Random, steps: int) -> str:
    """A random prompt: each operation is +, - or * with equal chance."""
    parts = [str(rng.choice(START))]
    for _ in range(steps):
        operator = rng.choice("+-*")
        parts.append(operator + str(rng.choice(FACTOR if operator == "*" else OPERAND)))
    return "".join(parts) + "="


def apply(total: int, operator: str, operand: int) -> int:
    """One step, modulo 10."""
    return (total + operand if operator == "+" else total - operand if operator == "-" else total * operand) % 10


def operations(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """`7+5-3=` -> (7, [("+", 5), ("-", 3)])."""
    start, *rest = prompt.rstrip("=")
    return int(start), [(o, int(d)) for o, d in zip(rest[::2], rest[1::2], strict=True)]


def running_totals(prompt: str) -> list[int]:
    """The totals after each operation, modulo 10."""
    total, todo = operations(prompt)
    return [total := apply(total, *step) for step in todo]


def demonstration(prompt: str, rng: random.Random, noise: float) -> list[int]:
    """Running totals where each step, with probability `noise`, writes one of the nine other digits and goes on
    from it."""
    total, todo = operations(prompt)
    written = []
    for step in todo:
        total = apply(total, *step)
        if rng.random() < noise:
            total = (total + rng.randrange(1, 10)) % 10
        written.append(total)
    return written


def pass_rate(steps: int, noise: float) -> float:
    """The chance that a noisy chain ends right: 1/10 + 9/10 (1 - 10/9 noise)^steps.

    A step that is right stays right with 1 - noise; a wrong one is put right by one of the nine slips with noise/9,
    since every operation is a bijection of the digits. With noise .2: .8, .52 and .22 for 1, 3 and 8 steps.
    """
    return 0.1 + 0.9 * (1 - 10 * noise / 9) ** steps
