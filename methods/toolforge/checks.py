"""Stage 4, the nine rules: each gives 0 or 1, and a dialogue passes only with nine ones.

    1 roles        2 format       3 not_empty    4 answer     5 passages
    6 retries      7 references   8 tools        9 schema

The strict reading is the default. `release=True` is the first release: a bad final turn passes rule 2, rule 5
compares ASCII letters and digits only and does not see text beside the items, rule 6 is never active for C8 and D8 and
takes a retry without any change, rule 7 always passes, rule 9 takes a query that is no text. A record that cannot be
read fails the rules that read it; no rule ever raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from methods.toolforge.record import Record, answer_in, beside_items, calls_in, shown_in
from methods.toolforge.shapes import SHAPES, Shape
from methods.toolforge.text import folded

NAMES = ("roles", "format", "not_empty", "answer", "passages", "retries", "references", "tools", "schema")
_INSIDE = r"(?:(?!</?(?:think|tool_call|answer)>).)+"  # text that opens or closes no block
_THINK, _CALL = rf"<think>{_INSIDE}</think>\n", rf"<tool_call>{_INSIDE}</tool_call>"
_CALLING = re.compile(rf"{_THINK}{_CALL}(?:\s*{_CALL})*\s*", re.DOTALL)
_FINAL = re.compile(rf"{_THINK}<answer>{_INSIDE}</answer>\s*", re.DOTALL)


def check(record: Record, *, release: bool = False, shape: Shape | None = None) -> dict[str, int]:
    """The nine scores by name, in order. `shape` None: the one of the 29 that the record names."""
    return {name: _safely(rule, record, shape, release) for name, rule in zip(NAMES, _RULES, strict=True)}


def digits(scores: dict[str, int]) -> str:
    """The scores as nine digits, such as 111011111."""
    return "".join(str(scores[name]) for name in NAMES)


def _safely(rule: Callable[[Record, Shape, bool], bool], record: Record, shape: Shape | None, release: bool) -> int:
    try:
        return int(rule(record, shape or SHAPES[record[0]["case"]], release))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return 0


def _messages(record: Record, *roles: str) -> list[str]:
    return [m["content"] for m in record[1]["messages"] if m["role"] in roles]


def _calls(text: str) -> list[dict[str, Any]]:
    """The calls of a turn; ValueError where one cannot be read."""
    found = calls_in(text)
    if None in found:
        raise ValueError("a call cannot be read")
    return [call for call in found if call is not None]


def _roles(record: Record, shape: Shape, release: bool) -> bool:
    return tuple(m["role"] for m in record[1]["messages"]) == shape.roles


def _format(record: Record, shape: Shape, release: bool) -> bool:
    *calling, last = _messages(record, "assistant")
    return all(map(_CALLING.fullmatch, calling)) and (release or _FINAL.fullmatch(last) is not None)


def _not_empty(record: Record, shape: Shape, release: bool) -> bool:
    return all(text.strip() for text in _messages(record, "system", "user", "tool"))


def _answer(record: Record, shape: Shape, release: bool) -> bool:
    said = answer_in(_messages(record, "assistant")[-1])
    return said is not None and said.strip().lower() == record[2]["answer"].strip().lower()


def _passages(record: Record, shape: Shape, release: bool) -> bool:
    shown, bundles = _messages(record, "tool"), record[2]["rags"]

    def same(text: str, bundle: list[dict[str, str]]) -> bool:
        if not release and beside_items(text):
            return False
        items = shown_in(text)
        wanted = {(folded(p["title"], release), folded(p["content"], release)) for p in bundle}
        return len(items) == len(bundle) and {(folded(t, release), folded(c, release)) for t, c in items} == wanted

    return len(shown) == len(bundles) and all(map(same, shown, bundles))


def _retries(record: Record, shape: Shape, release: bool) -> bool:
    window = shape.retry_window(release)
    if window is None:
        return True
    turns = _messages(record, "assistant")[:-1]
    schemas = {schema["name"]: schema for schema in record[5]["argument_tool_bank"]}
    for i in range(window[0], window[1], 2):
        first, second = _calls(turns[i]), _calls(turns[i + 1])
        if not first or [c["name"] for c in first] != [c["name"] for c in second]:
            return False
        changed = [
            (call["name"], key)
            for call, again in zip(first, second, strict=True)
            for key in {*call["arguments"], *again["arguments"]}
            if call["arguments"].get(key) != again["arguments"].get(key)
        ]
        if any(key not in schemas[name]["parameters"]["required"] for name, key in changed):
            return False
        if not (changed or release):
            return False
    return True


def _references(record: Record, shape: Shape, release: bool) -> bool:
    if release:
        return True
    used = {(p["title"], p["content"]) for turn in record[4]["argument_all_reference"] for p in turn["data"]}
    item = record[6]
    articles: dict[str, list[list[str]]] = {}
    for title, sentences in item["context"]:
        articles.setdefault(title, []).append(sentences)
    # Articles may share a title: a pair counts if any of them has that sentence at that place.
    options = [
        {(title, sentences[place]) for sentences in articles[title] if 0 <= place < len(sentences)}
        for title, place in item["supporting_facts"]
    ]
    return all(used & pairs for pairs in options) and used <= set().union(*options)


def _tools(record: Record, shape: Shape, release: bool) -> bool:
    called = list(dict.fromkeys(c["name"] for text in _messages(record, "assistant") for c in calls_in(text) if c))
    labelled = [m["diversity"] for m in record[2]["good_tool_mapping"]]
    if shape.policy == "exact":
        return called == labelled
    return set(labelled) <= set(called) if shape.policy == "extra" else called[0] in labelled


def _schema(record: Record, shape: Shape, release: bool) -> bool:
    schemas = {schema["name"]: schema["parameters"] for schema in record[5]["argument_tool_bank"]}
    for text in _messages(record, "assistant"):
        for call in _calls(text):
            offered = schemas[call["name"]]
            if not set(offered["required"]) <= set(call["arguments"]) <= set(offered["properties"]):
                return False
            if not (release or isinstance(call["arguments"].get("query"), str)):
                return False
    return True


_RULES = (_roles, _format, _not_empty, _answer, _passages, _retries, _references, _tools, _schema)
