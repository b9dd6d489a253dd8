"""What a compressed context looks like: its prompt, the way zips and actions are written, and how zips are judged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from methods.ziprl.quality import NAMES, Scale, quality, relevance, words


class Document(NamedTuple):
    """A raw text that a tool brought; it is shown in one prompt only."""

    id: str
    text: str


class Zip(NamedTuple):
    """What the model kept of a document, at the level that it chose."""

    id: str
    level: int
    text: str


class Entry(NamedTuple):
    """One earlier turn in memory: the action that brought its documents, and their zips."""

    action: str
    zips: tuple[Zip, ...] = ()


class Written(NamedTuple):
    """A turn as it was read: zips in order, and (tool, argument), None where there is no action."""

    zips: Sequence[Zip]
    action: tuple[str, str] | None


class Form(Protocol):
    """The language of one episode. A task's environment may bring its own as `form(scale)`."""

    def ask(
        self, memory: Sequence[Entry], documents: Sequence[Document], level: int | None, last: bool
    ) -> tuple[str, str]:
        """The prompt, and the text that its completion is made to begin with.

        level: the only one allowed (None: free). last: the answer is wanted now.
        """
        ...

    def parse(self, text: str) -> Written: ...

    def documents(self, result: str, first: int) -> list[Document]:
        """A tool's result as documents, named from number `first` on."""
        ...

    def quality(self, document: Document, zipped: Zip) -> Mapping[str, float]:
        """ratio, level, info, sem, com, and relevance (NaN where it is unknown)."""
        ...

    def coarser(self, zipped: Zip) -> Zip:
        """Cut down one level (not below 1)."""
        ...

    def cut(self, document: Document) -> Document:
        """Half of a document that is too long to be shown; the same one where nothing can go."""
        ...

    def length(self, text: str) -> int: ...

    def answer(self, argument: str) -> str:
        """The argument of `finish` as the text that the task scores."""
        ...


KEEP = (
    "off-topic: one clause that says what it is and that it does not help",
    "weakly related: its topic and any entity of the question",
    "related, without the answer: entities, relations and dates that touch the question",
    "holds a part of the answer: all facts on what is asked, with their qualifiers",
    "holds the answer or the link to it: nearly word for word",
)
ASK = """\
Answer a question by looking things up, turn by turn. Only the memory below stays from one turn to the next: documents \
are shown once, so what you do not write down about them is lost. In each turn write

1. for every document a compressed version, <zip doc="ID" level="L">text</zip>. Judge first how relevant it is to the \
question, then choose the level by that:
{levels}
2. then exactly one action: {actions}, or <tool>finish(answer in a few words)</tool> when you know the answer.

For example, on the way to the birthday of the author of Emma:
<zip doc="d1" level="{near}">Emma is a novel by Jane Austen, published in 1815.</zip>
<zip doc="d2" level="{far}">A film company; it does not help.</zip>
<tool>{first}(Jane Austen date of birth)</tool>

Question: {question}

Memory:
{memory}

Documents:
{documents}
"""
LAST = "\nThere are no more turns. Answer now from memory: <tool>finish(answer in a few words)</tool>\n"
ZIP = re.compile(r'<zip doc="(?P<doc>[^"]*)" level="(?P<level>[^"]*)">(?P<text>.*?)</zip>', re.DOTALL)
TOOL = re.compile(r"<tool>\s*(?P<tool>\w+)\((?P<argument>.*?)\)\s*</tool>", re.DOTALL)


@dataclass
class TextForm:
    """English instructions, zips and actions in tags. A numbered result (`1. ...` lines) is one document per item.

    opening: words with which a turn is made to begin, for a model that does not act by itself, such as `<tool>search(`;
    a turn that sees documents then begins with the tag of the first zip.
    """

    question: str
    tools: Mapping[str, Any]
    scale: Scale
    opening: str = ""

    def ask(
        self, memory: Sequence[Entry], documents: Sequence[Document], level: int | None, last: bool
    ) -> tuple[str, str]:
        text = ASK.format(
            levels="\n".join(self._level(k) for k in (range(1, self.scale.top + 1) if level is None else [level])),
            near=level or self.scale.top,
            far=level or 1,
            first=next(iter(self.tools), "finish"),
            actions=" or ".join(f"<tool>{name}(...)</tool>" for name in self.tools),
            question=self.question,
            memory="\n".join(map(self._entry, memory)) or "(nothing yet)",
            documents="\n".join(f'<document id="{d.id}">{d.text}</document>' for d in documents) or "(none)",
        )
        if last:
            return text + LAST, "<tool>finish(" if self.opening else ""
        first = f'<zip doc="{documents[0].id}" level="' if documents else self.opening
        return text, first if self.opening else ""

    def _level(self, level: int) -> str:
        low, high = self.scale.interval(level)
        return f"   level {level} ({NAMES[level - 1]}, {low:.0%} to {high:.0%} of its length), {KEEP[level - 1]}"

    @staticmethod
    def _entry(entry: Entry) -> str:
        return "\n".join([f"- {entry.action}", *(f"  {z.id}: {z.text}" for z in entry.zips if z.text)])

    def parse(self, text: str) -> Written:
        zips = []
        for found in ZIP.finditer(text):
            level = found["level"].strip()
            zips.append(
                Zip(found["doc"], int(level) if re.fullmatch("[0-9]{1,3}", level) else 0, found["text"].strip())
            )
        action = TOOL.search(ZIP.sub("", text))  # a page may talk of tools
        return Written(zips, (action["tool"], action["argument"].strip()) if action else None)

    def documents(self, result: str, first: int) -> list[Document]:
        parts, number = [""], 1
        for line in result.splitlines(keepends=True):
            # Only 1. 2. 3. in a row from the first line on number items: a text may hold lists and years of its own.
            if line.startswith(f"{number}. ") and (number > 1 or not parts[-1].strip()):
                parts.append(line.removeprefix(f"{number}. "))
                number += 1
            else:
                parts[-1] += line
        return [Document(f"d{first + k}", text) for k, text in enumerate(filter(None, map(str.strip, parts)))]

    def quality(self, document: Document, zipped: Zip) -> dict[str, float]:
        rho = relevance(document.text, self.question)
        judged = quality(document.text, zipped.text, zipped.level, self.question, self.scale)
        return judged | {"relevance": float("nan") if rho is None else rho}

    def coarser(self, zipped: Zip) -> Zip:
        if zipped.level <= 1:
            return zipped
        parts = zipped.text.split()
        kept = parts[: self.scale.shorter(len(parts), zipped.level)]
        return zipped._replace(level=zipped.level - 1, text=" ".join(kept))

    def cut(self, document: Document) -> Document:
        half = len(document.text) // 2
        return document._replace(text=document.text[:half]) if half else document

    def length(self, text: str) -> int:
        return len(words(text))

    def answer(self, argument: str) -> str:
        return f"<answer>{argument}</answer>"
