"""Short working, then an answer out of four: the verifier sees only the answer, so that a guess can be right."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from experiments.seeds import derive
from experiments.tasks.arithmetic import SYMBOLS, demonstration, digits, expression, prompts, running_totals
from experiments.tasks.base import Row, Task, bucket, shuffled
from methods.errors import ConfigError

LETTERS = "ABCD"
HELD_OUT = {"eval": 0, "test": 1}  # buckets of ten that train prompts never come from


@dataclass
class Choice(Task):
    """`7+5-3*3=` -> `297D`: from left to right, the running totals modulo 10, then the letter of the last one (total
    modulo 4: A for 0, 4, 8 and so on).

    Score: whether the last character is the right letter. `metrics`: `working` = every total is right, `both` =
    working and letter are right, `lucky` = the letter is right and the working is not. In a share `guess` of the
    demonstrations the working is random digits and the letter one of four; in the others each step goes wrong with
    probability `demo_noise` and the rest follows from it. Splits are disjoint for all seeds. Raises ConfigError for
    settings that cannot be met.
    """

    name: str = "choice"
    symbols: tuple[str, ...] | None = (*SYMBOLS, *LETTERS)
    max_prompt_tokens: int = 0
    max_completion_tokens: int = 0
    tiers: tuple[str, ...] = field(default=("all",), init=False)
    steps: int = 4
    demo_noise: float = 0.1
    guess: float = 0.35
    train_rows: int = 8000
    eval_rows: int = 384

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("demo_noise", "guess"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError("Not a probability", where=f"task.{key}", got=getattr(self, key), expected="0 to 1")
        space = prompts(self.steps) // 20 if self.steps > 0 else 0  # half of the expected held-out tenth
        if self.eval_rows > space:
            raise ConfigError(
                "There are too few prompts for the evaluation",
                where="task.steps",
                got=f"{self.steps} operations, {self.eval_rows} evaluation rows",
                expected=f"at most {space} evaluation rows",
                fix="ask for more operations or fewer rows",
            )
        self.max_prompt_tokens = self.max_prompt_tokens or self.steps + 2
        self.max_completion_tokens = self.max_completion_tokens or self.steps + 3

    def rows(self, split: str, seed: int) -> list[Row]:
        if split not in ("train", *HELD_OUT):
            raise ConfigError("Unknown split", where="task", got=split, expected="train, eval or test")
        rng = random.Random(derive(seed, "choice", split))
        rows: list[Row] = []
        seen: dict[str, int] = {}
        while len(rows) < (self.train_rows if split == "train" else self.eval_rows):
            prompt = expression(rng, self.steps)
            part = bucket(prompt, 10)
            held_out = part in HELD_OUT.values() if split == "train" else part != HELD_OUT[split] or prompt in seen
            if not held_out:
                seen[prompt] = seen.get(prompt, 0) + 1
                rows.append(self._row(prompt, seen[prompt], rng if split == "train" else None))
        return shuffled(rows, seed, "choice", split)

    def _row(self, prompt: str, occurrence: int, rng: random.Random | None) -> Row:
        totals = running_totals(prompt)
        return Row(
            id=prompt + (f"~{occurrence}" if occurrence > 1 else ""),
            prompt=prompt,
            answer=letter(totals[-1]),
            demo=self._demo(prompt, rng) if rng else None,
            meta={"totals": "".join(map(str, totals))},
        )

    def _demo(self, prompt: str, rng: random.Random) -> str:
        if rng.random() < self.guess:
            return "".join(str(rng.randrange(10)) for _ in range(self.steps)) + rng.choice(LETTERS)
        written = demonstration(prompt, rng, self.demo_noise)
        return "".join(map(str, written)) + letter(written[-1])

    def score(self, text: str, row: Row) -> float:
        """1 if the last character is the right letter, whatever stands before it."""
        return float(text.strip()[-1:] == row.answer)

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        text = text.strip()
        right, working = self.score(text, row), float(digits(text[:-1]) and text[:-1] == row.meta["totals"])
        return {"both": right * working, "lucky": right * (1 - working), "working": working}


def letter(total: int) -> str:
    """The answer that a last total stands for."""
    return LETTERS[total % 4]
