"""CDRRM in the constraint world: a generator writes the rules that separate two answers, a frozen judge follows them.

The teacher's rubrics are filtered before the generator is trained on them; beside it a direct judge is trained on the
winner and a reward model on the answers, on the same pairs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from experiments.judging.pairs import TIE
from experiments.judging.teacher import Teacher, read, recovered, spell, verdict
from experiments.judging.world import Case, case
from experiments.seeds import derive
from experiments.tasks.base import Row
from experiments.tasks.constraint_world import (
    ASK,
    FIRST,
    SECOND,
    SYMBOLS,
    ConstraintWorld,
    level,
    training_styles,
)
from methods.errors import ConfigError, DataError, check_range

RUBRIC = "\nrubric: "
PASSES = {"none": 0, "one": 1, "both": 2}
CHOICES = {
    "target": ("rubric", "winner", "pair"),
    "filter": tuple(PASSES),
    "labels": ("true", "random"),
    "slots": ("shuffled", "chosen_first"),
    "judged_by": ("own", "other", "all"),
}


@dataclass
class ConstraintRubrics(ConstraintWorld):
    """`has a; ends b\\nA: ...\\nB: ...\\nrubric: ` -> `ends b`, judged by what a judge that follows the rules picks.

    target: `rubric` trains the generator, `winner` the direct judge (`A` or `B`), `pair` a reward model: the prompt is
    the instruction alone, `chosen` and `rejected` stand in `Row.meta`, and a text is one of the two answers. corrupt:
    share of the teacher's rules that are drawn anew from the case's eight (1 of 8 draws gives the same one). filter:
    how often the judge must recover the label from a rubric (none, one order, both). slip: share of the judge's
    readings in the filter that name a random slot. labels: `random` ones reach the filter, the winner and the pair,
    and nothing else. slots: in training pairs A is a coin flip, or always the chosen answer, which is what the
    released scripts do. judged_by: in the evaluation the answers are judged by their own rubric, by the one that the
    generator writes for the next case, or by all eight rules (one step, without a diagnosis).
    train_rows counts pairs before the filter. Every case is evaluated in both orders, the rubric written anew.
    Degenerate: a text that is no rubric, and a tie, earn 1/2 (`invalid`, `tie`); a winner that is no letter earns 0.
    Differs from the paper: rules in the world's own words in place of JSON; the frozen judge is a program.
    """

    name: str = "constraint_rubrics"
    symbols: tuple[str, ...] | None = (*SYMBOLS, RUBRIC)
    max_prompt_tokens: int = 128
    max_completion_tokens: int = 16
    eval_rows: int = 360
    target: str = "rubric"
    corrupt: float = 0.25
    filter: str = "both"
    slip: float = 0.05
    labels: str = "true"
    slots: str = "shuffled"
    judged_by: str = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ConfigError(
                    "Unknown value", where=f"task.{key}", got=getattr(self, key), expected=", ".join(known)
                )
        if self.judged_by != "own" and self.target != "rubric":
            raise ConfigError(
                "Only a rubric can be another's", where="task.judged_by", got=self.judged_by,
                fix=f"task.target={self.target} has task.judged_by=own",
            )  # fmt: skip
        for key in ("corrupt", "slip"):
            check_range(f"task.{key}", getattr(self, key), 0.0, 1.0)
        if self.eval_rows % 9:
            raise ConfigError(
                "The nine pairs of styles need equal shares", where="task.eval_rows", got=self.eval_rows,
                expected="a multiple of 9",
            )  # fmt: skip

    def rows(self, split: str, seed: int) -> list[Row]:
        if split == "train":
            drawn = [self._pair(case(seed, f"train-{k}")) for k in range(self.train_rows)]
            rows = [row for row in drawn if row is not None]
            if not rows:
                raise DataError("The filter kept no rubric", where="task.filter", got=f"{self.train_rows} pairs",
                                fix="give more train_rows")  # fmt: skip
            return rows
        plain = super().rows(split, seed)
        shown = plain[1:] + plain[:1] if self.judged_by == "other" else plain
        return [
            self._asked(row, other, turned, split)
            for row, other in zip(plain, shown, strict=True)
            for turned in (False, True)
        ]

    def _asked(self, row: Row, other: Row, turned: bool, split: str) -> Row:
        """A case of the direct judge's in one order. `other` is the case whose rubric is asked for."""
        gold = row.answer if not turned else "AB"["BA".index(row.answer)]
        texts = [other.meta["chosen"], other.meta["rejected"]]
        shown = texts if (other.answer == "A") != turned else texts[::-1]
        instruction = "; ".join(other.meta["rules"][k] for k in other.meta["required"])
        return replace(
            row, id=f"{row.id}{'/swapped' if turned else ''}", prompt=self._prompt(instruction, *shown), answer=gold
        )

    def _prompt(self, instruction: str, a: str, b: str) -> str:
        if self.target == "pair":
            return instruction
        return f"{instruction}{FIRST}{a}{SECOND}{b}{RUBRIC if self.target == 'rubric' else ASK}"

    def _pair(self, found: Case) -> Row | None:
        """One training row; None where the teacher has no rubric or the filter refuses it."""
        right, wrong, rng = found.answers(True), found.answers(False), random.Random(derive(found.seed, "row"))
        i, j = training_styles(right, wrong, rng.random() < self.longer, rng)
        gold = rng.randrange(2) if self.slots == "shuffled" else 0
        a, b = (right[i], wrong[j]) if gold == 0 else (wrong[j], right[i])
        label = gold if self.labels == "true" else rng.randrange(2)
        row = Row(found.id, self._prompt(found.instruction, a, b), "AB"[gold], level(i, j))
        if self.target == "winner":
            return replace(row, demo="AB"[label])
        if self.target == "pair":
            chosen, rejected = (a, b) if label == 0 else (b, a)
            return replace(row, demo=chosen, meta={"chosen": chosen, "rejected": rejected})
        rules = Teacher(corrupt=self.corrupt).rubric(found, a, b, random.Random(derive(found.seed, "teacher")))
        judge = random.Random(derive(found.seed, "filter"))
        kept = rules and recovered(rules, a, b, label, self.slip, PASSES[self.filter], judge)
        return replace(row, demo=spell(rules)) if kept else None

    def picked(self, text: str, row: Row) -> int | None:
        """Slot 0 or 1, TIE, or None for a text that is neither a rubric nor a letter."""
        if self.target == "winner":
            return {"A": 0, "B": 1}.get(text.strip())
        a, b = (row.meta[key] for key in (("chosen", "rejected") if row.answer == "A" else ("rejected", "chosen")))
        if self.target == "pair":
            return {a: 0, b: 1}.get(text)
        rules = read("; ".join(row.meta["rules"]) if self.judged_by == "all" else text)
        return None if rules is None else verdict(rules, a, b)

    def score(self, text: str, row: Row) -> float:
        """1 right, 0 wrong, 1/2 where a rubric decides nothing."""
        slot = self.picked(text, row)
        if slot in (None, TIE):
            return 0.5 if self.target == "rubric" else 0.0
        return float("AB"[slot] == row.answer)

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        """The means of gap and slot_gap are accuracy easy minus hard, and chosen in A minus chosen in B."""
        score, slot = self.score(text, row), self.picked(text, row)
        rules = read(text) or () if self.target == "rubric" else ()
        return {
            "gap": score * {"easy": 3.0, "hard": -3.0}.get(row.tier, 0.0),
            "slot_gap": score * (2.0 if row.answer == "A" else -2.0),
            "rules": 8.0 if self.judged_by == "all" else float(len(rules)),
            "invalid": float(slot is None),
            "tie": float(slot == TIE),
        }
