"""Stage 4, the judge by rule: turn by turn, is a planted mistake followed by a turn that names it?"""

from __future__ import annotations

from methods.toolforge.record import Record, calls_in, think_in
from methods.toolforge.shapes import SHAPES, Shape

MOST_WORDS = 200


def by_rule(record: Record, shape: Shape | None = None) -> tuple[bool, str]:
    """Whether every turn gets 1, and of the first that does not, why: its thought is missing or too long; a repairing
    thought does not name the wrong tool, or the tool or a parameter whose value was wrong.

    Differs from the paper: a model judges there; a rule cannot tell whether a thought is sensible.
    """
    shape = shape or SHAPES[record[0]["case"]]
    turns = [m["content"] for m in record[1]["messages"] if m["role"] == "assistant"]
    for i, turn in enumerate(turns):
        thought = think_in(turn)
        if not thought.strip():
            return False, f"turn {i}: no thought"
        if len(thought.split()) >= MOST_WORDS:
            return False, f"turn {i}: a thought of {MOST_WORDS} words or more"
    for i in shape.mistakes:
        if i + 1 >= len(turns):
            return False, f"turn {i}: the mistake is not followed by a turn"
        if not any(name in think_in(turns[i + 1]) for name in _faults(shape, i, turns)):
            return False, f"turn {i}: the next turn does not name the mistake"
    return True, ""


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
