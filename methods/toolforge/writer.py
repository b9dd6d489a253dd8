"""The template writer: fills the flow of a shape from slots, without a model and with nothing left to chance but `rng`.

A planted mistake fits the result that follows it (its query names what that result is about) and its thought does not
know of it; the turn after it says how the result misses the need (words of the question that do not occur in it), names
the wrong tool or field, and corrects it. A result may hold other sentences of a gold article, so none of this is said
in the titles of those.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from methods.toolforge.draft import Draft, titles
from methods.toolforge.items import Passage, Skip
from methods.toolforge.labels import Call, keywords
from methods.toolforge.record import Turn
from methods.toolforge.shapes import Step
from methods.toolforge.text import words
from methods.toolforge.tools import Schema

QUOTED = 25  # words of a passage that a thought repeats

_SAY = {
    "en": {
        "plan": (
            "To answer this I first need {topics}. {tools} should know, so I ask for that.",
            "The question turns on {topics}. The fitting choice among the tools is {tools}.",
            "I start with {topics}; {tools} covers this.",
            "What I lack is {topics}. I look it up with {tools}.",
        ),
        "next": (
            "The result says: {fact} With that I can go on to {topics}, using {tools}.",
            "From the passages: {fact} What is left is {topics}; {tools} is the tool for it.",
            "{fact} That settles the first part. Next I need {topics} and call {tools}.",
        ),
        "wrong_arguments": (
            "These passages are about {seen} and do not give {missing}. The tool is right, but the parameter query of"
            " {tools} was wrong; I correct query so that it asks for {topics}.",
            "The result deals with {seen} and does not give {missing}. The fault is the value of query. I keep {tools}"
            " and rewrite query.",
        ),
        "wrong_tool": (
            "The result deals with {seen} and does not give {missing}. {wrong} was the wrong tool for this; {tools} is"
            " the one that covers {topics}.",
            "{wrong} returned passages on {seen}, which do not give {missing}. Calling {wrong} was a mistake, so I"
            " change to {tools}.",
        ),
        "insufficient": (
            "The tool {wrong} and its query fit, yet the passages on {seen} still do not give {missing}. The"
            " specialised tools find too little, so I fall back on {tools}.",
        ),
        "answer": (
            "The passages say: {fact} That is enough to answer the question: {answer}.",
            "Now I have all I need. {fact} So the answer is {answer}.",
            "{fact} From this the answer follows: {answer}.",
        ),
        "and": " and ",
        "need": "what I need",
        "other": "other matters",
        "always": "any time",
    },
    "zh": {
        "plan": (
            "要回答这个问题，我先需要{topics}。{tools}应当能查到，因此先查询它。",
            "问题的关键是{topics}。在这些工具中，{tools}最合适。",
        ),
        "next": (
            "结果表明：{fact}据此可以继续查询{topics}，使用{tools}。",
            "{fact}第一部分已经清楚。接下来需要{topics}，调用{tools}。",
        ),
        "wrong_arguments": (
            "这些段落讲的是{seen}，没有给出{missing}。工具没有选错，但{tools}的参数 query 写错了，"
            "我改正 query，改为查询{topics}。",
        ),
        "wrong_tool": ("结果涉及{seen}，没有给出{missing}。{wrong}选错了；应当使用{tools}查询{topics}。",),
        "insufficient": ("工具{wrong}和查询都合适，但关于{seen}的段落仍没有给出{missing}。因此改用{tools}。",),
        "answer": ("段落写道：{fact}这足以回答问题：{answer}。", "现在信息齐全。{fact}所以答案是{answer}。"),
        "and": "和",
        "need": "我需要的内容",
        "other": "其他内容",
        "always": "不限",
    },
}
_REPAIR = {
    "arguments": "wrong_arguments",
    "one_arguments": "wrong_arguments",
    "tool": "wrong_tool",
    "one_tool": "wrong_tool",
    "insufficient": "insufficient",
}


def write(draft: Draft, rng: random.Random) -> list[Turn]:
    """The assistant turns of a draft: one per step of its shape, then the answer. Raises Skip where a result has no
    title that a wrong query could ask for."""
    turns: list[Turn] = []
    planned = {n: [_planned(draft, call) for call in draft.calls(n)] for n in range(1, draft.shape.rounds + 1)}
    for i, step in enumerate(draft.shape.steps):
        calls = _calls(draft, step, planned[step.round], draft.bundles[i], rng)
        turns.append({"think": _thought(draft, i, calls, turns, rng), "calls": calls})
    say = _SAY[draft.language]
    think = rng.choice(say["answer"]).format(fact=_fact(draft, draft.shape.steps[-1]), answer=draft.item.answer)
    return [*turns, {"think": think, "answer": draft.item.answer}]


# ---------------------------------------------------------------- calls


def _planned(draft: Draft, call: Call) -> dict[str, Any]:
    schema = draft.offer.mapping[call.tool]
    arguments = dict(call.arguments) if call.arguments else fill(schema, call.query, call.topic, draft)
    return {"name": schema["name"], "arguments": arguments}


def _calls(
    draft: Draft, step: Step, planned: list[dict[str, Any]], shown: Sequence[Any], rng: random.Random
) -> list[dict[str, Any]]:
    """The calls of one step: as planned, or with its mistake in the first call or in all of them."""
    if step.mistake == "general":
        general, topic = draft.offer.general, _topics(draft, step)
        assert general is not None
        return [{"name": general["name"], "arguments": fill(general, draft.item.question, topic, draft)}]
    if step.mistake in ("", "insufficient"):
        return planned
    wrong = "tool" in step.mistake
    found = []
    for i, call in enumerate(planned):
        if i and step.mistake.startswith("one_"):
            found.append(call)
        elif wrong:
            schema = rng.choice(draft.offer.wrong)
            query = call["arguments"]["query"]
            found.append({"name": schema["name"], "arguments": fill(schema, query, _topics(draft, step), draft)})
        else:
            query = _wrong_query(draft, shown, call["arguments"]["query"])
            found.append({"name": call["name"], "arguments": call["arguments"] | {"query": query}})
    return found


def _wrong_query(draft: Draft, shown: Sequence[Passage], right: str) -> str:
    """A query that would bring the passages shown: it asks for one that the right query does not ask for."""
    other = next((title for title in _others(draft, shown) if {*words(title)} - {*words(right)}), None)
    if other is None:
        raise Skip("write", "the result has no title for a wrong query")
    return " ".join([other, *keywords(draft.item.question, "", "", 3)])


def _others(draft: Draft, shown: Sequence[Passage]) -> list[str]:
    """Titles of a result that no gold passage has."""
    gold = {passage.title for passage in draft.item.gold}
    return titles([passage for passage in shown if passage.title not in gold], len(shown))


def fill(schema: Schema, query: str, topic: str, draft: Draft) -> dict[str, Any]:
    """Arguments for all required parameters of a schema: the query, and for the others what their names ask for."""
    year = re.search(r"\b(1\d{3}|20\d{2})s?\b", draft.item.question)
    period = year[0] if year else _SAY[draft.language]["always"]
    asked = keywords(draft.item.question, "", topic, 4)
    found: dict[str, Any] = {}
    for key in schema["parameters"]["required"]:
        kind = schema["parameters"]["properties"][key].get("type")
        if key == "query":
            found[key] = query
        elif kind == "array":
            found[key] = [topic, *asked[:2]]
        elif kind == "object":
            found[key] = {"topic": topic}
        elif kind in ("integer", "number"):
            found[key] = 10
        elif kind == "boolean":
            found[key] = True
        elif re.search("time|date|year|period|era|season|term|fresh|recent", key):
            found[key] = period
        elif "language" in key:
            found[key] = {"en": "English", "zh": "中文"}[draft.language]
        elif re.search("max|count|limit|num", key):
            found[key] = "10"
        else:
            found[key] = " ".join(asked[:3]) if re.search("intent|hint|type|detail|category", key) and asked else topic
    return found


# ---------------------------------------------------------------- thoughts


def _thought(draft: Draft, i: int, calls: list[dict[str, Any]], turns: list[Turn], rng: random.Random) -> str:
    """The thought of turn i: a plan, the next hop, or what was wrong with the turn before."""
    say, steps = _SAY[draft.language], draft.shape.steps
    names = say["and"].join(dict.fromkeys(call["name"] for call in calls))
    before = steps[i - 1] if i else None
    slots = {"topics": _topics(draft, steps[i]), "tools": names}
    if before is None:
        return rng.choice(say["plan"]).format(**slots)
    if before.works:
        return rng.choice(say["next"]).format(fact=_fact(draft, before), **slots)
    kept = {call["name"] for call in calls}
    wrong = [
        call["name"] for call in turns[i - 1]["calls"] if before.mistake == "insufficient" or call["name"] not in kept
    ]
    shown = draft.bundles[i - 1]
    seen = say["and"].join(_others(draft, shown)[:2]) or say["other"]
    slots |= {"seen": seen, "missing": _missing(draft, shown), "wrong": say["and"].join(dict.fromkeys(wrong))}
    return rng.choice(say[_REPAIR[before.mistake]]).format(**slots)


def _missing(draft: Draft, shown: Sequence[Passage]) -> str:
    """Words of the question that a result does not hold; where it holds them all, just what is needed."""
    held = {word for passage in shown for word in words(f"{passage.title} {passage.content}")}
    found = [word for word in keywords(draft.item.question, most=99) if word not in held and len(word) > 1]
    return ", ".join(found[:3]) or _SAY[draft.language]["need"]


def _topics(draft: Draft, step: Step) -> str:
    return _SAY[draft.language]["and"].join(dict.fromkeys(call.topic for call in draft.calls(step.round)))


def _fact(draft: Draft, step: Step) -> str:
    """What the gold passages of a step's round say, in a few words: those around the answer where one has it."""
    passages, answer = draft.gold[step.round - 1], draft.item.answer
    passage = next((p for p in passages if answer in p.content), passages[-1])
    if len(passage.content.split()) < QUOTED // 5:  # a language without blanks between words, or a very short text
        at = max(passage.content.find(answer) - QUOTED, 0)
        return passage.content[at : at + 4 * QUOTED]
    before = len(passage.content[: max(passage.content.find(answer), 0)].split())
    start = max(0, min(before - QUOTED // 2, len(passage.content.split()) - QUOTED))
    said = passage.content.split()[start : start + QUOTED]
    cut = start + QUOTED < len(passage.content.split())
    return ("... " if start else "") + " ".join(said) + (" ..." if cut else "")
