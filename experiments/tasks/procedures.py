"""Families of questions whose right procedure differs, and strategies that a small model knows how to follow."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, bucket, shuffled
from experiments.tools import Tools, ToolText
from methods.errors import ConfigError
from methods.graph_memory.machine import ANALYSIS, ANSWER, END, INVALID, START, TOOL

FAMILIES = {"direct": 0, "once": 1, "thrice": 3}  # calls of the right procedure
ROOTS = {"direct": "bal", "once": "dor", "thrice": "kim"}
SEEN, NEW = "aeio", "uy"  # endings of a family's words; questions with new words keep the root
NEW_TIER = "_new"
DIGITS = tuple("0123456789")
KINDS = ("look", "check")
FORM = ToolText(
    call=r"<use (?P<kind>look|check)>(?P<item>\d)</use>",
    opening="<use ",
    tool="use",
    stop=("</use>",),
    result="<r>{}</r>",
)
MAX_CALLS = 4
HELD_OUT = {0: "eval", 1: "test"}  # of ten buckets; a question belongs to one split for all seeds


def advice(after: str, prefer: str, avoid: str) -> str:
    """As `methods.graph_memory.machine.strategy` writes it."""
    return f"After {after} prefer {prefer} over {avoid}."


TELL, ASK = advice(START, ANSWER, TOOL), advice(START, TOOL, ANSWER)
STOP, GO_ON = advice(ANALYSIS, ANSWER, TOOL), advice(ANALYSIS, TOOL, ANSWER)
USELESS = ("Be polite.", "Write neatly.")
GUESS, NEVER_STOP = "Guess.", "Never stop."
FOLLOWED = (TELL, ASK, STOP, GO_ON, *USELESS, GUESS, NEVER_STOP)
# Also those that odd rollouts may teach, so that each is one token; the model has never met them.
STRATEGIES = tuple(
    dict.fromkeys(
        [
            *FOLLOWED,
            *(
                advice(after, *pair)
                for after in (START, TOOL, ANALYSIS, ANSWER, INVALID)
                for pair in permutations((TOOL, ANALYSIS, ANSWER, INVALID, END), 2)
            ),
        ]
    )
)
WORDS = tuple(f"{root}{ending} " for root in ROOTS.values() for ending in SEEN + NEW)
SYMBOLS = (*DIGITS, *WORDS, "=", "<use look>", "<use check>", "</use>", "<r>", "</r>", "\n", "error", *STRATEGIES)


@dataclass
class Procedures(Task):
    """`bala balo dore bali 3=`: four words, `own_words` of them from the family's own, and a digit.

    Family `direct`: the digit is the answer. `once`: what `<use look>3</use>` gives. `thrice`: look, check what was
    given, look again. The tables behind the tools are made anew for each question, and each procedure's answer differs.
    Tiers `*_new` have words that no training question has, on the family's root; they are in `eval` and `test` only.

    Warm-start demonstrations choose a procedure regardless of the family, each equally often, unless strategies stand
    before the question: `obey` of them follow the first that speaks of the beginning (answer, or ask) and the first
    that speaks of what to do after a result (stop, or go on). `Guess.` gives any digit, `Never stop.` asks until the
    calls are used up; the polite ones change nothing.
    """

    name: str = "procedures"
    symbols: tuple[str, ...] | None = field(default=SYMBOLS, init=False)
    max_prompt_tokens: int = 16
    max_completion_tokens: int = 32
    tiers: tuple[str, ...] = field(default=(*FAMILIES, *(f + NEW_TIER for f in FAMILIES)), init=False)
    own_words: float = 0.7
    obey: float = 0.85
    train_rows: int = 3000
    demos: int = 12000
    eval_rows: int = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("own_words", "obey"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError("Not a probability", where=f"task.{key}", got=getattr(self, key), expected="0 to 1")

    @property
    def tools(self) -> Tools:
        return Tools(FORM, max_calls=MAX_CALLS, max_turn_tokens=4, max_result_tokens=1)

    # ---- rows ----
    def rows(self, split: str, seed: int) -> list[Row]:
        if split not in ("train", "eval", "test"):
            raise ConfigError("Unknown split", where="task", got=split, expected="train, eval or test")
        rng = random.Random(derive(seed, "procedures", split))
        tiers, count = (tuple(FAMILIES), self.train_rows) if split == "train" else (self.tiers, self.eval_rows)
        rows, seen = [], set()
        for tier in tiers:
            for i in range(round(count / len(tiers))):
                row = self._row(f"{tier}/{split}-{i}", tier, split, rng)
                while row.prompt in seen:
                    row = self._row(row.id, tier, split, rng)
                seen.add(row.prompt)
                rows.append(row)
        return shuffled(rows, seed, "procedures", split)

    def _row(self, name: str, tier: str, split: str, rng: random.Random) -> Row:
        family = tier.removesuffix(NEW_TIER)
        prompt = ""
        while not prompt or HELD_OUT.get(bucket(prompt, 10), "train") != split:
            prompt = self._prompt(family, SEEN if family == tier else NEW, rng)
        start = prompt[-2]
        first, second, third = rng.sample([d for d in DIGITS if d != start], 3)
        look = {d: rng.choice(DIGITS) for d in DIGITS} | {start: first, second: third}
        check = {d: rng.choice(DIGITS) for d in DIGITS} | {first: second}
        answer = {0: start, 1: first, 3: third}[FAMILIES[family]]
        return Row(name, prompt, answer, tier, meta={"start": start, "look": look, "check": check})

    def _prompt(self, family: str, endings: str, rng: random.Random) -> str:
        def word() -> str:
            root = ROOTS[family] if rng.random() < self.own_words else rng.choice(list(ROOTS.values()))
            return f"{root}{rng.choice(endings)} "

        return "".join(word() for _ in range(4)) + rng.choice(DIGITS) + "="

    def warm_rows(self, seed: int) -> list[Row]:
        """Demonstrations with no to three strategies before the question, whatever the family."""
        rng, rows = random.Random(derive(seed, "procedures", "demos")), []
        for i in range(self.demos):
            tier = rng.choice(self.tiers)
            row = self._row(f"demo-{i}", tier, "train", rng)
            told = rng.sample(FOLLOWED, rng.choice((0, 1, 2, 3)))
            row.meta["segments"] = self._demonstration(row, told if rng.random() < self.obey else [], rng)
            rows.append(
                Row(row.id, "".join(f"{text}\n" for text in told) + str(row.prompt), row.answer, tier, meta=row.meta)
            )
        return rows

    def _demonstration(self, row: Row, told: Sequence[str], rng: random.Random) -> list[list]:
        calls = calls_of(told, rng)
        segments: list[list] = []
        world, here = World(row), row.meta["start"]
        for k in range(calls):
            kind = KINDS[k % 2]
            given = world.use(kind, here)
            segments += [[f"<use {kind}>{here}</use>", True], [f"<r>{given}</r>", False]]
            here = given
        if calls < MAX_CALLS:
            segments.append([f"={rng.choice(DIGITS) if GUESS in told and not calls else here}", True])
        return segments

    # ---- episodes ----
    def environment(self, row: Row) -> World:
        return World(row)

    def score(self, text: str, row: Row) -> float:
        """1 if the last turn is `=` and the answer."""
        return float(text.strip() == f"={row.answer}")

    def episode_metrics(self, traj, row: Row) -> dict[str, float]:
        """calls: tool calls carried out. procedure: whether they are as many as the family's procedure has."""
        calls = sum(t.result is not None for t in traj.turns)
        return {"calls": float(calls), "procedure": float(calls == FAMILIES[row.tier.removesuffix(NEW_TIER)])}


def calls_of(told: Sequence[str], rng: random.Random) -> int:
    """How many calls an obedient agent makes; without a word on the matter each procedure is equally likely."""
    extreme = next((text for text in told if text in (GUESS, NEVER_STOP)), None)
    if extreme is not None:
        return 0 if extreme == GUESS else MAX_CALLS
    begin = next((text for text in told if text in (TELL, ASK)), None)
    if begin == TELL or (begin is None and rng.random() < 1 / 3):
        return 0
    then = next((text for text in told if text in (STOP, GO_ON)), None)
    return 1 if then == STOP or (then is None and rng.random() < 1 / 2) else 3


class World:
    """One episode's tables."""

    def __init__(self, row: Row) -> None:
        self.tables = {kind: row.meta[kind] for kind in KINDS}
        self.tools: Mapping[str, Callable[..., str]] = {"use": self.use}

    def use(self, kind: str, item: str) -> str:
        return self.tables[kind][item]
