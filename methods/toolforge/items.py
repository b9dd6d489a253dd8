"""Source items: a question, its gold passages, its answer, and the passages that only distract."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from methods.toolforge.text import folded

YES_NO = {"yes", "no", "是", "否", "不是"}
# Words with which the dialogues are marked; a passage that holds one could open or close a block of its own.
_MARKUP = re.compile(r"</?(?:think|tool_call|tool_response|answer|tools)>|<\|")


class Skip(Exception):
    """An item or attempt that cannot be used: the stage that said so, and the reason, which is counted."""

    def __init__(self, stage: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage, self.reason, self.detail = stage, reason, detail


@dataclass(frozen=True)
class Passage:
    """One sentence, the unit of retrieval (or a paragraph where a set has no sentences)."""

    title: str
    content: str

    def as_json(self) -> dict[str, str]:
        return {"title": self.title, "content": self.content}


@dataclass(frozen=True)
class Hop:
    """One step of a given decomposition: its question (`#1` stands for the answer of step 1), answer, gold places."""

    question: str
    answer: str
    gold: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A triple with its distractor pool; no content occurs twice in gold and pool together."""

    id: str
    question: str
    answer: str
    kind: str
    gold: tuple[Passage, ...]
    pool: tuple[Passage, ...]
    hops: tuple[Hop, ...] = ()

    def source(self) -> dict[str, Any]:
        """The item in HotpotQA's schema: gold passages first, each a sentence of an article of its title."""
        context: dict[str, list[str]] = {}
        facts = []
        for passage in (*self.gold, *self.pool):
            sentences = context.setdefault(passage.title, [])
            if len(facts) < len(self.gold):
                facts.append([passage.title, len(sentences)])
            sentences.append(passage.content)
        return {
            "_id": self.id,
            "type": self.kind,
            "question": self.question,
            "answer": self.answer,
            "context": [[title, sentences] for title, sentences in context.items()],
            "supporting_facts": facts,
        }


def read_item(record: Mapping[str, Any], name: str = "") -> Item:
    """The item in a record of HotpotQA, 2WikiMultihopQA or MuSiQue (as published, from the hub, or with
    `golden_context`). `name` is its id where the record has none. Raises Skip with a reason that can be counted, and
    nothing else, whatever the record holds."""
    try:
        return _item(record, name)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise Skip("item", "the row cannot be read", f"{type(error).__name__}: {error}"[:200]) from None


def _item(record: Mapping[str, Any], name: str) -> Item:
    question, answer = _line(record.get("question")), _line(_answer(record.get("answer")))
    if not question or not answer:
        raise Skip("item", "no question" if not question else "no answer")
    gold, pool, places = _context(record)
    if not gold:
        raise Skip("item", "no context" if not pool else "no supporting passage found in the context")
    texts = [question, answer, *(p.title for p in (*gold, *pool)), *(p.content for p in (*gold, *pool))]
    if any(_MARKUP.search(text) for text in texts):
        raise Skip("item", "text holds the dialogue's own markup")
    kind = _line(record.get("type"))
    aliases = _parsed(record.get("answer_aliases")) or ()
    aliases = [answer, *map(_line, [aliases] if isinstance(aliases, str) else aliases)]
    if not (answer.lower().rstrip(".") in YES_NO or "comparison" in kind or _mentions(gold, aliases)):
        raise Skip("item", "answer not in context")
    identity = _line(record.get("_id")) or _line(record.get("id")) or name
    return Item(identity, question, answer, kind, tuple(gold), tuple(pool), _hops(record, places))


def _mentions(gold: Sequence[Passage], answers: Sequence[str]) -> bool:
    text = folded(" ".join(f"{p.title} {p.content}" for p in gold))
    return any(folded(answer) and folded(answer) in text for answer in answers)


def _line(value: Any) -> str:
    """A cell as one line of text; a lone surrogate, which JSON can hold, is no text."""
    text = "" if value is None else " ".join(str(value).split())
    return text.encode("utf-8", "replace").decode()


def _answer(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value


def _context(record: Mapping[str, Any]) -> tuple[list[Passage], list[Passage], dict[int, list[int]]]:
    """Gold passages, distractors, and which gold passages paragraph i of the context gave."""
    paragraphs = _paragraphs(record)
    facts = _facts(record.get("supporting_facts"))
    wanted = _wanted(paragraphs, facts) if facts else None
    given = [(_line(p.get("title")), _line(p.get("text"))) for p in _golden(record)]
    gold: dict[str, Passage] = {}
    rest: dict[str, Passage] = {}
    places: dict[int, list[int]] = {}
    numbers: dict[str, int] = {}  # of the gold passages, in their order
    for i, (title, sentences, marked) in enumerate(paragraphs):
        if wanted is None and marked is None and given:  # only the golden context says what supports
            sentences = [" ".join(sentences)]
            marked = (title, sentences[0]) in given
        for k, sentence in enumerate(sentences):
            if not sentence:
                continue
            support = (i, k) in wanted if wanted is not None else bool(marked)
            (gold if support else rest).setdefault(sentence, Passage(title, sentence))
            if support:
                places.setdefault(i, []).append(numbers.setdefault(sentence, len(numbers)))
    if not gold:
        gold = {text: Passage(title, text) for title, text in given if text}
    return list(gold.values()), [p for text, p in rest.items() if text not in gold], places


def _golden(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = _parsed(record.get("golden_context")) or []
    return [p for p in found if isinstance(p, Mapping)] if isinstance(found, list) else []


def _paragraphs(record: Mapping[str, Any]) -> list[tuple[str, list[str], bool | None]]:
    """(title, sentences, whether it is marked as supporting; None: not said)."""
    context = _parsed(record.get("context") or record.get("paragraphs") or [])
    if isinstance(context, Mapping):  # the hub's columns of lists
        context = list(zip(context["title"], context.get("sentences", context.get("content")), strict=True))
    found = []
    for part in context:
        if isinstance(part, Mapping):
            body = part.get("sentences") or part.get("paragraph_text") or part.get("text") or ""
            title, marked = part.get("title"), part.get("is_supporting")
        else:
            (title, body), marked = part, None
        sentences = [body] if isinstance(body, str) else list(body)
        found.append((_line(title), [_line(sentence) for sentence in sentences], marked))
    return found


def _facts(value: Any) -> list[tuple[str, int]]:
    value = _parsed(value) or []
    if isinstance(value, Mapping):
        return list(zip(map(_line, value["title"]), map(int, value["sent_id"]), strict=True))
    return [(_line(title), int(place)) for title, place in value]


def _wanted(paragraphs: Sequence[tuple[str, list[str], Any]], facts: Sequence[tuple[str, int]]) -> set[tuple[int, int]]:
    """(paragraph, sentence) of every supporting fact. Skip where one is not in the context."""
    found = set()
    for title, place in facts:
        at = [i for i, (name, sentences, _) in enumerate(paragraphs) if name == title and 0 <= place < len(sentences)]
        if not at:
            raise Skip("item", "a supporting fact is not in the context", f"{title!r}, sentence {place}")
        found.add((at[0], place))
    return found


def _hops(record: Mapping[str, Any], places: Mapping[int, Sequence[int]]) -> tuple[Hop, ...]:
    """MuSiQue's decomposition, if every step names a gold paragraph of the context."""
    steps = _parsed(record.get("decomposition") or record.get("question_decomposition")) or []
    found = []
    for step in steps if isinstance(steps, list) else []:
        at: Any = step.get("paragraph_support_idx") if isinstance(step, Mapping) else None
        gold = places.get(at)
        if not gold:
            return ()
        found.append(Hop(_line(step.get("question")), _line(step.get("answer")), tuple(gold)))
    covered = {place for hop in found for place in hop.gold}
    everything = {place for some in places.values() for place in some}
    return tuple(found) if covered == everything else ()


def _parsed(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
