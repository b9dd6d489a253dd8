"""What a teacher or judge wrote, read strictly: JSON objects, verdict lines, and reasons where nothing can be read."""

from __future__ import annotations

import json
import re
from typing import Any

from methods.errors import nearest

THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
MARKER = re.compile(r"final\s+judge?ment", re.IGNORECASE)
WINNER = re.compile(r"(?i:winner)[^\w\n]*(?i:response)[^\w\n]+([AB])[^\w\n]*$", re.MULTILINE)
SAID = re.compile(r"(?i:winner)[^\w\n]*(?i:response)[^\w\n]+([AB])\b")


class Rejected(ValueError):
    """A profile or rubric that is not used; `reason` is what it is counted under, never a silent default."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def without_thinking(text: str) -> str:
    """`text` without thinking blocks; one that is not closed goes to the end. A stray `</think>` ends one as well."""
    return THINKING.sub("", text).rpartition("</think>")[2]


def parse_json(text: str) -> dict[str, Any]:
    """The JSON object in `text`: the whole text, else a fenced block, else from the first `{` to the last `}`.

    A thinking block is left out first, unless only the text with it can be read: a value may quote `<think>`.
    Raises Rejected: "not JSON", or "no JSON object" for JSON of another kind.
    """
    other = False
    tries = [text]
    for part in (without_thinking(text), text):
        tries += [part, *FENCED.findall(part), part[part.find("{") : part.rfind("}") + 1]]
    for candidate in filter(None, tries):
        try:
            found = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
        other = True
    raise Rejected("no JSON object" if other else "not JSON")


def winner(text: str) -> int | None:
    """The slot (0 = A, 1 = B) of the last `Winner: Response X` that ends a line behind the final-judgment marker.

    Without a marker the whole text counts. None where there is no such line, or where it names both: unparsable.
    Differs from the released code, which takes the first match anywhere, so that the analysis can decide.
    """
    text = without_thinking(text)
    marker = MARKER.search(text)
    found = list(WINNER.finditer(text, marker.end() if marker else 0))
    if not found:
        return None
    start = text.rfind("\n", 0, found[-1].start()) + 1
    named = set(SAID.findall(text[start : found[-1].end()]))
    return None if len(named) > 1 else "AB".index(found[-1][1])


def text_of(record: dict, key: str, what: str) -> str:
    """The non-empty text under `key`. Raises Rejected."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        hint = nearest(key, record) if key not in record else ""
        raise Rejected(f"{what} without {key}", hint)
    return value.strip()


def listed(record: dict, key: str, what: str) -> list[dict]:
    """The objects in the list under `key`. Raises Rejected for anything else."""
    value = record.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise Rejected(f"{what} without a list of {key}")
    return value
