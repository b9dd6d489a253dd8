"""A world of preference pairs whose causes are known: eight kinds of rules, two required, three styles of each answer.

A case has one rule of each kind; its instruction names the two required ones. A right answer keeps both, a wrong one
breaks one or both; every other rule is a coin flip for each answer. Words of an answer are letters and digits; fillers
and decorations belong to its style and no rule counts them, so what is right does not depend on the style.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.seeds import derive

LETTERS, DIGITS = "abcdefghij", "0123456789"
FILLER, DECORATION = "~", "*"
STYLES = ("plain", "padded", "decorated")
SHORTEST, LONGEST = 8, 24
LIMITS = (12, 16)  # of the rule that bounds the length
PARTS = ("has ", "lacks ", "starts ", "ends ", "count ", "no repeats", "digits sorted", "length<=", "; ")
SYMBOLS = (*LETTERS, *DIGITS, FILLER, DECORATION, "=", *PARTS)


@dataclass(frozen=True)
class Rule:
    """One property of an answer. kind: a name of `KINDS`; letter and number where that kind has them."""

    kind: str
    letter: str = ""
    number: int = 0

    @property
    def text(self) -> str:
        """`has a`, `lacks b`, `starts c`, `ends d`, `count e=2`, `no repeats`, `digits sorted`, `length<=12`."""
        head = {"no_repeats": "no repeats", "sorted": "digits sorted", "length": f"length<={self.number}"}
        return head.get(self.kind) or f"{self.kind} {self.letter}" + (f"={self.number}" if self.number else "")

    def holds(self, answer: str) -> bool:
        """Whether an answer, in any style, keeps the rule. An empty answer starts and ends with nothing."""
        return KINDS[self.kind](words(answer), self)


def words(answer: str) -> str:
    """What rules look at: the answer without fillers and decorations."""
    return answer.translate({ord(FILLER): None, ord(DECORATION): None})


def _sorted(text: str, rule: Rule) -> bool:
    digits = [c for c in text if c in DIGITS]
    return digits == sorted(digits)


KINDS = {
    "has": lambda text, rule: rule.letter in text,
    "lacks": lambda text, rule: rule.letter not in text,
    "starts": lambda text, rule: text.startswith(rule.letter),
    "ends": lambda text, rule: text.endswith(rule.letter),
    "count": lambda text, rule: text.count(rule.letter) == rule.number,
    "no_repeats": lambda text, rule: all(a != b for a, b in itertools.pairwise(text)),
    "sorted": _sorted,
    "length": lambda text, rule: len(text) <= rule.number,
}


@dataclass(frozen=True)
class Case:
    """One instruction with the rules behind it, of which `required` (two places in `rules`) are in its text."""

    id: str
    rules: tuple[Rule, ...]
    required: tuple[int, int]
    seed: int

    @property
    def instruction(self) -> str:
        return "; ".join(self.rules[k].text for k in self.required)

    def answers(self, right: bool, name: str | int = 0) -> tuple[str, str, str]:
        """A new right or wrong answer in the three `STYLES`; the same `name` gives the same answer."""
        rng = random.Random(derive(self.seed, "answer", int(right), name))
        keeps = [rng.random() < 0.5 for _ in self.rules]
        broken = set() if right else set(rng.sample(self.required, rng.choice((1, 2))))
        for k in self.required:
            keeps[k] = k not in broken
        return styled(content(self.rules, keeps, rng), rng)

    def meta(self) -> dict[str, Any]:
        """The rules as JSON values, the required ones named by place."""
        return {"rules": [rule.text for rule in self.rules], "required": list(self.required)}


def case(seed: int, name: str) -> Case:
    """The case called `name` in the world of `seed`: five different letters for its rules, and two required ones."""
    own = derive(seed, "case", name)
    rng = random.Random(own)
    has, lacks, starts, ends, count = rng.sample(LETTERS, 5)
    rules = (
        Rule("has", has),
        Rule("lacks", lacks),
        Rule("starts", starts),
        Rule("ends", ends),
        Rule("count", count, rng.choice((1, 2))),
        Rule("no_repeats"),
        Rule("sorted"),
        Rule("length", number=rng.randint(*LIMITS)),
    )
    one, two = sorted(rng.sample(range(len(rules)), 2))
    return Case(name, rules, (one, two), own)


def content(rules: Sequence[Rule], keeps: Sequence[bool], rng: random.Random) -> str:
    """An answer of 8 to 24 words that keeps exactly the rules marked in `keeps` (in the order of `KINDS`)."""
    while True:
        found = _draw(rules, keeps, rng)
        if [rule.holds(found) for rule in rules] == list(keeps):
            return found


def _draw(rules: Sequence[Rule], keeps: Sequence[bool], rng: random.Random) -> str:
    """One draft that most often keeps what it should."""
    has, lacks, starts, ends, count = (rule.letter for rule in rules[:5])
    limit = rules[7].number
    free = [c for c in LETTERS if c not in (has, lacks, count)]
    size = rng.randint(SHORTEST, limit) if keeps[7] else rng.randint(limit + 1, LONGEST)
    other = [n for n in range(4) if n != rules[4].number]
    inner = [has] * keeps[0] + [lacks] * (not keeps[1])
    inner += [count] * (rules[4].number if keeps[4] else rng.choice(other))
    inner += [] if keeps[5] else [rng.choice(free) * 2]
    digits = sorted(rng.sample(DIGITS, rng.randint(2, 3)))
    if not keeps[6]:
        digits.reverse()
    size = max(size, len("".join(inner)) + len(digits) + 2)
    inner += rng.choices(free, k=size - 2 - len("".join(inner)) - len(digits))
    rng.shuffle(inner)
    # Digits go in one by one, in their order; the unit of two equal letters stays whole.
    for place, digit in zip(
        sorted(rng.choices(range(len(inner) + 1), k=len(digits)), reverse=True), digits[::-1], strict=True
    ):
        inner.insert(place, digit)
    first = starts if keeps[2] else rng.choice([c for c in free if c != starts])
    last = ends if keeps[3] else rng.choice([c for c in free if c != ends])
    return first + "".join(inner) + last


def styled(text: str, rng: random.Random) -> tuple[str, str, str]:
    """The three styles of one text: as it is, with 6 to 12 fillers, and with 6 to 12 decorations on top of these."""
    padded = _mixed(text, FILLER, rng)
    return text, padded, _mixed(padded, DECORATION, rng)


def _mixed(text: str, mark: str, rng: random.Random) -> str:
    marks = rng.randint(6, 12)
    places = sorted(rng.choices(range(len(text) + 1), k=marks), reverse=True)
    letters = list(text)
    for place in places:
        letters.insert(place, mark)
    return "".join(letters)
