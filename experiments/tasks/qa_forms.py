"""The forms in which sets of questions write gold answers, gold passages and difficulty."""

from __future__ import annotations

import json
import re
from typing import Any

COLUMNS = {
    "prompt": ("question", "Question", "query", "Prompt", "problem", "prompt"),
    # The first that a table has is looked at first; a record's other answer columns and aliases are further golds.
    "answer": ("answer", "Answer", "golden_answers", "answers", "possible_answers"),
    "split": ("split", "src_split"),
    "id": ("id", "_id", "question_id", "query_id"),
    "tier": ("tier", "level"),
}
ALIASES = ("answer_aliases", "aliases")
Gold = tuple[str, str]
"""(title, text) of a passage that the question was made from."""


def golds(value: Any) -> list[str]:
    """The gold texts in a cell: a text, a list (also as JSON text: PopQA), SQuAD's `{"text": [...]}`, TriviaQA's
    `{"value": ..., "aliases": [...]}`; without repetitions and empty texts."""
    value = parsed(value)
    if isinstance(value, dict):
        value = [value.get(key) for key in ("value", "text", "aliases")]
    if isinstance(value, (list, tuple)):
        return list(dict.fromkeys(gold for item in value for gold in golds(item)))
    text = "" if value is None else str(value).strip()
    return [text] if text else []


def all_golds(record: dict, columns: tuple[str, ...]) -> list[str]:
    """The golds of several cells of a record, in the order of the columns."""
    return golds([record.get(column) for column in (*columns, *ALIASES)])


def unanswerable(record: dict) -> bool:
    """Whether a record says of itself that it has no answer (MuSiQue, SQuAD 2.0)."""
    if record.get("answerable") is False or record.get("is_impossible") is True:
        return True
    given = [record[column] for column in COLUMNS["answer"] if column in record]
    return any(isinstance(parsed(v), (list, dict)) for v in given) and not golds(given)


def tier(record: dict) -> str:
    """`2hop` (MuSiQue), else the type of the question (HotpotQA, 2Wiki, Frames), else the set's name, else `all`."""
    steps = parsed(record.get("decomposition") or record.get("question_decomposition"))
    if isinstance(steps, list):
        return f"{len(steps)}hop"
    name = re.match(r"(\d)hop", str(record.get("id") or record.get("_id") or ""))
    if name:
        return name[0]
    kind = record.get("type") or record.get("reasoning_types") or record.get("dataset")
    return "all" if not kind else "several types" if "|" in str(kind) else str(kind)


def gold_ids(record: dict) -> list[str]:
    """Ids of gold passages that a record gives itself: `documents`, or BrowseComp-Plus' evidence (else gold) ones."""
    for column in ("documents", "evidence_docs", "gold_docs"):
        items = parsed(record.get(column))
        if isinstance(items, list) and items:
            return [str(item["docid"] if isinstance(item, dict) else item) for item in items]
    return []


def gold_passages(record: dict) -> list[Gold]:
    """The passages that a record marks as its gold ones: `golden_context`; among MuSiQue's `paragraphs` and the
    `context` of HotpotQA and 2Wiki the supporting ones; SQuAD's single `context`. Empty where none is marked."""
    context = parsed(record.get("golden_context"))
    if isinstance(context, list):
        return [paragraph(item)[:2] for item in context]
    context = parsed(record.get("paragraphs") or record.get("context"))
    if isinstance(context, str):
        return [(str(record.get("title") or ""), context)]
    facts = parsed(record.get("supporting_facts")) or []
    titles = set(facts.get("title", []) if isinstance(facts, dict) else [fact[0] for fact in facts])
    if isinstance(context, dict):  # the hub's columns of lists
        context = list(zip(context.get("title", []), context.get("sentences", []), strict=False))
    found = [paragraph(item) for item in context or []]
    return [(title, text) for title, text, marked in found if (title in titles if marked is None else marked)]


def paragraph(item: Any) -> tuple[str, str, bool | None]:
    """(title, text, whether it is marked as supporting; None: unknown) of one paragraph of a context."""
    if isinstance(item, str):
        raise TypeError("a paragraph is a text without a title")
    if not isinstance(item, dict):
        title, body = item
        return str(title), _text(body), None
    body = item.get("sentences") or item.get("paragraph_text") or item.get("text") or ""
    return str(item.get("title") or ""), _text(body), item.get("is_supporting")


def _text(body: Any) -> str:
    # Some sets keep the blank between sentences, some do not; passages are compared with single blanks.
    return body if isinstance(body, str) else " ".join(body)


def parsed(value: Any) -> Any:
    """The value, or what it holds if it is a list or object written as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
