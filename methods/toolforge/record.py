"""Stage 3, the record: dialogue text, the list of seven parts, and reading both again.

[0] case, uuid   [1] messages   [2] rags, answer, reasoning, good_tool_mapping   [3] argument_check
[4] argument_all_reference   [5] argument_tool_bank   [6] the labelled source item
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from methods.toolforge.items import Item, Passage
from methods.toolforge.labels import Label
from methods.toolforge.shapes import Shape
from methods.toolforge.tools import Schema

Record = list[dict[str, Any]]
Turn = dict[str, Any]
"""An assistant turn before it is text: `{"think": .., "calls": [..]}` or `{"think": .., "answer": ..}`."""

NO_CHECK = "Don't need to check"
INSTRUCTIONS = {
    "en": """\
You answer questions with the help of tools. Each of your turns does one of three things: it plans and calls tools, it \
reads a result and calls further tools, or it reads a result and answers.
Think first, inside <think> and </think>, in fewer than 200 words. Then either write one or more calls, each as
<tool_call>{"name": "...", "arguments": {...}}</tool_call>
or give the answer, and nothing but the answer, inside <answer> and </answer>.
Before you end a turn, check that the call is the one your thought speaks of, that the steps follow from each other, \
and that the answer follows from what the tools returned. A result may miss what you need: then say what is wrong with \
the call, and correct it.""",
    "zh": """\
你借助工具回答问题。每一轮只做三件事之一：规划并调用工具；阅读结果后继续调用工具；阅读结果后作答。
先在 <think> 与 </think> 之间思考，不超过两百字。随后要么写出一个或多个调用，每个形如
<tool_call>{"name": "...", "arguments": {...}}</tool_call>
要么在 <answer> 与 </answer> 之间只写出答案。
结束一轮之前请检查：调用与思考一致，各步前后连贯，答案来自工具返回的内容。若结果没有所需信息，请指出调用错在哪里并改正。""",
}
ASK = {"en": "Answer this question: {}", "zh": "请回答这个问题：{}"}
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SHOWN = re.compile(r"^\*\*\d+\*\*\ntitle: (.*)\ncontent: (.*)$", re.MULTILINE)


# ---------------------------------------------------------------- text


def system_text(schemas: Sequence[Schema], language: str = "en") -> str:
    """The instructions, then the offered schemas, one a line, inside `<tools>`."""
    listed = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
    return f"{INSTRUCTIONS[language]}\n\n<tools>\n{listed}\n</tools>"


def turn_text(turn: Turn) -> str:
    """An assistant turn: the think block, a line break, and the calls or the answer."""
    head = f"<think>{turn.get('think', '')}</think>\n"
    if "answer" in turn:
        return f"{head}<answer>{turn['answer']}</answer>"
    calls = (json.dumps(call, ensure_ascii=False) for call in turn.get("calls", []))
    return head + "\n".join(f"<tool_call>{call}</tool_call>" for call in calls)


def shown_text(passages: Sequence[Passage]) -> str:
    """A tool message: its passages as numbered items."""
    items = (f"**{i}**\ntitle: {p.title}\ncontent: {p.content}" for i, p in enumerate(passages, start=1))
    return "\n".join(items)


# ---------------------------------------------------------------- reading


def shown_in(text: str) -> list[tuple[str, str]]:
    """(title, content) of every item of a tool message."""
    return _SHOWN.findall(text)


def beside_items(text: str) -> str:
    """What a tool message says that is no item."""
    return _SHOWN.sub("", text).strip()


def calls_in(text: str) -> list[dict[str, Any] | None]:
    """The calls of an assistant turn in order; None for one that cannot be read or is no JSON (NaN, an infinity)."""
    found: list[dict[str, Any] | None] = []
    for written in _CALL.findall(text):
        try:
            call = json.loads(written)
            json.dumps(call, allow_nan=False)
        except (ValueError, RecursionError):
            call = None
        good = isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
        found.append(call if good else None)
    return found


def answer_in(text: str) -> str | None:
    """The text of the last answer block, or None."""
    found = _ANSWER.findall(text)
    return found[-1] if found else None


def think_in(text: str) -> str:
    """The text of the first think block, or nothing."""
    found = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    return found[1] if found else ""


# ---------------------------------------------------------------- the list of seven


def assemble(
    item: Item,
    shape: Shape,
    label: Label,
    *,
    uuid: str,
    turns: Sequence[str],
    bundles: Sequence[Sequence[Passage]],
    shown: Sequence[str],
    gold: Sequence[Sequence[Passage]],
    schemas: Sequence[Schema],
    mapping: Mapping[str, str],
    language: str = "en",
) -> Record:
    """The record of one dialogue from its assistant turns and tool messages, in turns as far as they reach.

    mapping: labelled canonical tool -> offered variant, in order of use. gold: the passages used in each round.
    """
    messages = [
        {"role": "system", "content": system_text(schemas, language)},
        {"role": "user", "content": ASK[language].format(item.question)},
    ]
    for i, turn in enumerate(turns):
        messages.append({"role": "assistant", "content": turn})
        if i < len(turns) - 1 and i < len(shown):
            messages.append({"role": "tool", "content": shown[i]})
    by_name = {schema["name"]: schema for schema in schemas}
    window = shape.window
    edited: Any = NO_CHECK
    if window is not None:
        edited = [
            {
                "assistant_index": i,
                "objects": [c | {"tool_definition": by_name.get(c["name"])} for c in calls_in(turns[i]) if c],
            }
            for i in range(window[0], window[1] + 1)
            if i < len(turns)
        ]
    works = [i for i, step in enumerate(shape.steps) if step.works]
    used = [{"turn": i, "data": [p.as_json() for p in part]} for i, part in zip(works, gold, strict=True)]
    labelled = {
        "reasoning": label.reasoning,
        "tool_select": f"[{','.join(label.tools)}]",
        "route_select": f"[{label.route}]",
    }
    return [
        {"case": shape.name, "uuid": uuid},
        {"messages": messages},
        {
            "rags": [[p.as_json() for p in bundle] for bundle in bundles],
            "answer": item.answer,
            "reasoning": label.reasoning,
            "good_tool_mapping": [{"original_tool": o, "diversity": v} for o, v in mapping.items()],
        },
        {"argument_check": edited},
        {"argument_all_reference": used},
        {"argument_tool_bank": list(schemas)},
        item.source() | labelled,
    ]
