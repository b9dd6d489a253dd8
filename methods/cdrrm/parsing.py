"""What a teacher or judge wrote, read strictly: JSON objects, verdict lines, and reasons where nothing can be read."""

from __future__ import annotations

import json
import re
from typing import Any

from methods.errors import nearest

THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
MARKER = re.compile(r"final\s+judge?ment", re.IGNORECASE)
# A line that begins with `Winner`, whatever decorates it, and a colon or `Response`; behind it what it says.
LINE = re.compile(r"^(?:_|[^\w\n])*(?i:winner)(?:(?:_|[^\w\n])*:|(?=(?:_|[^\w\n])*(?i:response)\b))(.*)$", re.MULTILINE)
NAMED = re.compile(r"(?:_|\W)*(?i:response)[\W_]+([AB])(?!_*[^\W_])")
ALSO = re.compile(r"[^\w/|&]*(?:[/|&]|(?i:or|and)\b)\W*(?:(?i:winner)\W*)?(?:(?i:response)\W*)?([AB])\b")
# A line that begins with `Rating:`, whatever decorates it; a number on it, and out of how many.
RATED = re.compile(r"^(?:_|[^\w\n])*(?i:rating)(?:_|[^\w\n])*?:[\s*_\[(]*(.*)$", re.MULTILINE)
NUMBER = re.compile(r"(\d+(?:\.\d+)?)(?:\s*(?:/|(?i:out\s+of))\s*(\d+))?(?![\w/-])")
SCALE = 10


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

    A thinking block is left out first; a value may quote `<think>`, but what stands in a block, closed or not, is no
    answer. Raises Rejected: "not JSON", or "no JSON object" for JSON of another kind.
    """
    other = False
    said, first = without_thinking(text), text.find("{")
    tries = [text, said, *FENCED.findall(said), said[said.find("{") : said.rfind("}") + 1]]
    if text.rfind("<think>", 0, first) <= text.rfind("</think>", 0, first):  # the first brace is in no block
        tries.append(text[first : text.rfind("}") + 1])
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
    """The slot (0 = A, 1 = B) that the last line `Winner: Response X` behind the final-judgment marker names.

    The line begins with these words, decorated or not, and may go on; one inside a line is a quotation. Without a
    marker the whole text counts. None where there is no such line, or where the last one names no slot or joins both
    (`A or B`): unparsable, and no earlier line decides.
    Differs from the released code, which takes the first match anywhere, so that the analysis can decide.
    """
    text = without_thinking(text)
    marker = MARKER.search(text)
    lines = LINE.findall(text[marker.end() :] if marker else text)
    named = NAMED.match(lines[-1]) if lines else None
    if named is None:
        return None
    also = ALSO.match(lines[-1], named.end())
    return None if also and also[1] != named[1] else "AB".index(named[1])


def rating(text: str) -> float | None:
    """The number from 1 to 10 on the last line `Rating: N`, of `8/10` or `8 out of 10` the 8; else None.

    A thinking block is left out. A text that is nothing but the number counts as such a line; where the last line
    gives no number of that scale, no earlier one decides.
    Differs from RewardBench 2's own parser (`last_integer`), which reads 10 in `8/10`.
    """
    said = without_thinking(text).strip()
    lines = RATED.findall(said)
    found = NUMBER.match(lines[-1]) if lines else NUMBER.fullmatch(said)
    if found is None or int(found[2] or SCALE) != SCALE or not 1 <= float(found[1]) <= SCALE:
        return None
    return float(found[1])


def last_integer(text: str) -> float | None:
    """The integer that a text ends with, if it is 1 to 10: how RewardBench 2 reads ratings, for comparison with it."""
    found = re.search(r"(\d+)\s*$", text)
    return float(found[1]) if found and len(found[1]) <= 2 and 1 <= int(found[1]) <= SCALE else None


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
