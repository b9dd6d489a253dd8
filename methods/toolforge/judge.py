"""Stage 4, the judge by rule: turn by turn, is a planted mistake followed by a turn that names it?"""

from __future__ import annotations

import re
from collections.abc import Callable

from methods.toolforge.record import Record, calls_in, shown_in, think_in
from methods.toolforge.shapes import SHAPES, Shape
from methods.toolforge.text import words

MOST_WORDS = 200  # every Chinese character counts as one
# A thought without any of these finds no fault.
_FAULT = re.compile(
    r"wrong|mistak|error|fault|incorrect|miss|fail|instead|too (?:little|few)|insufficient|\bnot?\b|n't\b|nothing"
    r"|错|误|不|没|未|无",
    re.IGNORECASE,
)
# What a thought says is absent, up to the end of its clause.
_ABSENT = re.compile(
    r"(?:(?:\bnot|n't) (?:mention|give|name|contain|cover|say|hold)|\bnothing (?:\w+ ){0,2}(?:of|on|about)"
    r"|\bno mention of|没有(?:提到|说到|给出|提及))(.*?)(?:[.;:]\s|[.;:]?$|[。；：])",
    re.IGNORECASE,
)


def by_rule(record: Record, shape: Shape | None = None) -> tuple[bool, str]:
    """Whether every turn gets 1, and of the first that does not, why: its thought is missing or too long; a repairing
    thought does not name the wrong tool, or the tool or a parameter whose value was wrong, finds no fault at all, or
    calls absent what the result holds word for word.

    Differs from the paper: a model judges there; a rule cannot tell whether a thought is sensible.
    """
    shape = shape or SHAPES[record[0]["case"]]
    turns = [m["content"] for m in record[1]["messages"] if m["role"] == "assistant"]
    for i, turn in enumerate(turns):
        thought = think_in(turn)
        if not thought.strip():
            return False, f"turn {i}: no thought"
        if len(words(thought)) >= MOST_WORDS:
            return False, f"turn {i}: a thought of {MOST_WORDS} words or more"
    results = [m["content"] for m in record[1]["messages"] if m["role"] == "tool"]
    for i in shape.mistakes:
        if i + 1 >= len(turns) or i >= len(results):
            return False, f"turn {i}: the mistake is not followed by a turn"
        thought = think_in(turns[i + 1])
        if not any(name in thought for name in _faults(shape, i, turns)) or not _FAULT.search(thought):
            return False, f"turn {i}: the next turn does not name the mistake"
        if any(map(_holder(results[i]), _called_absent(thought))):
            return False, f"turn {i}: the next turn calls absent what the result holds"
    return True, ""


def _called_absent(thought: str) -> list[str]:
    return [part for said in _ABSENT.findall(thought) for part in re.split(r",|，|、|\band\b|\bor\b|和", said)]


def _holder(result: str) -> Callable[[str], bool]:
    """Whether a result holds some words, in this order, in one title or passage."""
    held = [f" {' '.join(words(text))} " for item in shown_in(result) for text in item]
    return lambda said: bool(words(said)) and any(f" {' '.join(words(said))} " in text for text in held)


def _faults(shape: Shape, i: int, turns: list[str]) -> set[str]:
    """Names of which a thought must hold one to have named the mistake of turn i."""
    wrong, right = ([call for call in calls_in(turns[k]) if call] for k in (i, i + 1))
    if "tool" in shape.steps[i].mistake:
        return {call["name"] for call in wrong} - {call["name"] for call in right}
    if shape.steps[i].mistake == "insufficient":
        return {call["name"] for call in wrong}
    return {
        key
        for call, again in zip(wrong, right, strict=False)
        for key in call["arguments"]
        if call["arguments"][key] != again["arguments"].get(key)
    }
