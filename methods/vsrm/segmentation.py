"""Where the thinking of a response lies, and where its steps begin (rules of the VSRM release)."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

OPEN, CLOSE = "<think>", "</think>"
_THREE_CASES = ("wait", "but", "alternatively", "however", "hmm")
_TWO_CASES = (
    "let me double-check",
    "but wait",
    "hold on",
    "looking back",
    "seems solid",
    "similarly",
    "that's correct, but",
    "that seems right",
    "wait, but",
)
CUES = (
    *(form for word in _THREE_CASES for form in (word, word.capitalize(), word.upper())),
    "So",
    *(form for phrase in _TWO_CASES for form in (phrase, phrase[0].upper() + phrase[1:])),
)
_SENTENCE_END = re.compile(r"[.!?\n]")


@dataclass(frozen=True)
class Thinking:
    """The thinking text[start:end]; `closed` says whether the closing tag was written."""

    start: int
    end: int
    closed: bool


@dataclass(frozen=True)
class Step:
    """A split point: the step begins at character `at`, in token `token`, and was opened by `cue`."""

    at: int
    cue: str
    token: int


@dataclass(frozen=True)
class Trace:
    """The segmented thinking of one response. `begin:end` are its tokens; a state's prompt ends before a token."""

    steps: tuple[Step, ...]
    begin: int
    end: int
    closed: bool

    @property
    def cuts(self) -> list[int]:
        """Number of response tokens in each of the K + 1 states."""
        return [*(step.token for step in self.steps), self.end]


def find_thinking(text: str) -> Thinking:
    """Between `<think>` and the first `</think>`.

    Without an opening tag before it (it stands in the prompt) from the first character; without a closing one to the
    last.
    """
    closed = text.find(CLOSE)
    end = len(text) if closed < 0 else closed
    opened = text.find(OPEN, 0, end)
    return Thinking(0 if opened < 0 else opened + len(OPEN), end, closed >= 0)


def cue_pattern(cues: Sequence[str], word_boundary: bool) -> re.Pattern[str]:
    """Matches any cue, the longest first; with `word_boundary` not inside a longer word."""
    words = "|".join(re.escape(cue) for cue in sorted(cues, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)" if word_boundary else words)


def split_points(
    text: str, thinking: Thinking, pattern: re.Pattern[str], first_gap: int, gap: int
) -> list[tuple[int, str]]:
    """(character, cue) of each split point, ascending.

    A cue at character c is skipped (1) within `first_gap` characters of the start of the thinking, (2) within `gap`
    characters of the previous split point. The split point is the character after the nearest `.`, `!`, `?` or line
    break before c, or c if the thinking has none. Points that fall together count once.
    """
    ends = [m.end() for m in _SENTENCE_END.finditer(text, thinking.start, thinking.end)]
    points: dict[int, str] = {}
    previous = None
    for match in pattern.finditer(text, thinking.start, thinking.end):
        c = match.start()
        if c - thinking.start < first_gap or (previous is not None and c - previous < gap):
            continue
        before = bisect_right(ends, c)
        previous = ends[before - 1] if before else c
        points.setdefault(previous, match.group())
    return list(points.items())


class Pieces:
    """The text that each token id adds, decoded once per id.

    Each is decoded behind another token, because some tokenizers drop the blank of a first one. A text is the
    concatenation of its pieces, so that offsets are exact by construction and nothing is tokenised again.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, {}
        self.anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
        self.skip = len(self._decode(self.anchor))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        for token in set(ids) - self.known.keys():
            self.known[token] = self._decode([*self.anchor, token])[self.skip :]
        return [self.known[token] for token in ids]


def segment(pieces: Sequence[str], pattern: re.Pattern[str], first_gap: int, gap: int) -> Trace:
    """The steps of a response given as the texts of its tokens, in characters and in tokens."""
    text = "".join(pieces)
    thinking = find_thinking(text)
    ends = list(accumulate(map(len, pieces)))
    points = split_points(text, thinking, pattern, first_gap, gap)
    # The first token that ends behind a character is the one that holds it: tokens without text are passed over.
    steps = tuple(Step(at, cue, bisect_right(ends, at)) for at, cue in points)
    end = bisect_right(ends, thinking.end) if thinking.closed else bisect_left(ends, thinking.end) + bool(text)
    return Trace(steps, bisect_right(ends, thinking.start), end, thinking.closed)
