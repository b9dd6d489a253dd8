"""Questions with and without demonstrations in front, as tokens of which only the question's and its answer's count.

A chat model sees: user x_1, assistant y_1, ..., user x, generation prompt, answer y (teacher-forced, if there is one);
another model the same texts with line breaks between them. Every text is tokenised as a piece of its own, so that the
counted tokens have the same ids with and without demonstrations, wherever a tokenizer would merge across a border.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.capture import Passage, context_length, start_ids
from methods.errors import ConfigError, DataError

if TYPE_CHECKING:
    from experiments.weights import LoadedModel

MOST_SKIPPED = 0.2  # share of the queries of a job that may be too long for their demonstrations
_SLOT = "AssaySlot{}X"  # letters and digits only: no template escapes or trims it


@dataclass(frozen=True)
class Example:
    """A question with its answer; a plain text is a question with none."""

    question: str
    answer: str = ""


class Prompter:
    """Builds passages for a model. `chat` None follows the model; `context` None is the model's own, in tokens."""

    def __init__(self, loaded: LoadedModel, chat: bool | None = None, context: int | None = None) -> None:
        self.tokenizer = loaded.tokenizer
        self.chat = loaded.chat if chat is None else chat
        self.context = context or context_length(loaded.model)
        self._start = [] if self.chat else start_ids(self.tokenizer)

    def passage(self, query: Example, demonstrations: Sequence[Example] = ()) -> Passage:
        """The query behind its demonstrations; question and answer count. DataError if both are empty."""
        if not (query.question or query.answer):
            raise DataError("A text is empty", expected="at least one character")
        pieces = self._chat(query, demonstrations) if self.chat else _plain(query, demonstrations)
        encoded = self.tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
        ids, spans = list(self._start), []
        for (_, counted), part in zip(pieces, encoded, strict=True):
            if counted and part:
                spans.append((len(ids), len(ids) + len(part)))
            ids += part
        return Passage(ids, spans)

    def _chat(self, query: Example, demonstrations: Sequence[Example]) -> list[tuple[str, bool]]:
        texts = [text for d in demonstrations for text in (d.question, d.answer)] + [query.question]
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": _SLOT.format(i)} for i in range(len(texts))
        ]  # one user message and one answer after the other
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        parts = re.split("|".join(_SLOT.format(i) for i in range(len(texts))), rendered)
        if len(parts) != len(texts) + 1:
            raise ConfigError(
                "The chat template does not show every message once, so the tokens of a question cannot be told",
                got=f"{len(parts) - 1} places for {len(texts)} messages",
                fix="give plain prompts (chat=false)",
            )
        pieces = [(parts[0], False)]
        for i, text in enumerate(texts):
            pieces += [(text, i == len(texts) - 1), (parts[i + 1], False)]
        return [*pieces, (query.answer, True)]

    def pair(self, query: Example, demonstrations: Sequence[Example]) -> tuple[Passage, Passage] | None:
        """(without, with demonstrations). Where the context is too short demonstrations are dropped from the left;
        None if none is left."""
        left = list(demonstrations)
        while left:
            context = self.passage(query, left)
            if not self.context or len(context.ids) <= self.context:
                return self.passage(query), context
            left.pop(0)
        return None


def _plain(query: Example, demonstrations: Sequence[Example]) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    for d in demonstrations:
        pieces += [(f"{d.question}\n{d.answer}" if d.answer else d.question, False), ("\n\n", False)]
    return [*pieces, (query.question, True), ("\n" if query.answer else "", False), (query.answer, True)]
