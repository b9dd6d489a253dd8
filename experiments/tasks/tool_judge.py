"""A programmatic judge of the thinking before a tool call: the five criteria of AWPO's rubric, by rules on the text.

It stands in for a language model where none is at hand. It sees the dialogue, the tools' names and the response, never
the ground truth, and answers on the same scale, {0, 0.1, .., 1}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from experiments.tasks.tool_parsing import Call, after_thinking, read_calls

WORDS = re.compile(r"\w+", re.UNICODE)
TOOL = re.compile(r"^\d+\. (?:Name: )?([^\n:]{1,100})", re.MULTILINE)
NO_TOOL = ("no tool", "directly", "without a tool", "not need", "none of the")
LACKING = ("missing", "lack", "not provide", "n't provide", "n't specif", "need to ask", "clarif")
SHORT = 3  # words shorter than this carry no content


def judge(prompt: str | Sequence[dict], response: str) -> float:
    """Mean of five grades in {0, 0.5, 1}; 0 for a response without thinking.

    request: the thinking takes up words of the last user turn, and every number in it occurs in the dialogue.
    tool: it names a listed tool that is called (half: such a tool is called).
    arguments: each argument's value stands in the thinking (half: in the dialogue, or there are no arguments).
    consistency: all tools called are listed and named, and no listed tool is named in vain.
    economy: at most a tenth (half: three tenths) of its word triples are repeats.

    Without a call of a listed tool the three in the middle are 0, unless the thinking gives a reason from the schema:
    it names a listed tool and says that none is needed or what is missing. Then tool is 1, arguments a half for what
    is missing, consistency a half. Rules can be talked round: the grade is no proof of good thinking.
    """
    thought = response.removeprefix("<think>").partition("</think>")[0] if "</think>" in response else ""
    if not WORDS.search(thought):
        return 0.0
    dialogue, last = _dialogue(prompt)
    tools = set(TOOL.findall(dialogue))
    calls = read_calls(after_thinking(response)) or []
    if any(call["name"] in tools for call in calls):
        tool, consistency = _tool(thought, calls, tools), _consistency(thought, calls, tools)
        of_calls = tool, _arguments(thought, dialogue, calls), consistency
    else:
        of_calls = _without_call(thought, tools)
    grades = (_request(thought, dialogue, last), *of_calls, _economy(thought))
    return round(sum(grades) / len(grades), 6)


def _dialogue(prompt: str | Sequence[dict]) -> tuple[str, str]:
    """(all of it, its last user turn); where the turns stand in one message, the part behind its last `<user>`."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    users = [str(m["content"]) for m in messages if m["role"] == "user"]
    return "\n".join(str(m["content"]) for m in messages), (users[-1] if users else "").rpartition("<user>")[2]


def _content(text: str) -> list[str]:
    return [word for word in WORDS.findall(text.lower()) if len(word) >= SHORT]


def _request(thought: str, dialogue: str, last: str) -> float:
    taken = set(_content(thought)) & set(_content(last))
    numbers = set(re.findall(r"\d+", thought)) <= set(re.findall(r"\d+", dialogue))
    return 0.5 * (len(taken) >= 2) + 0.5 * (numbers and bool(taken))


def _tool(thought: str, calls: Sequence[Call], tools: set[str]) -> float:
    return 1.0 if any(call["name"] in tools and call["name"] in thought for call in calls) else 0.5


def _arguments(thought: str, dialogue: str, calls: Sequence[Call]) -> float:
    values = [_text(value) for call in calls for value in (call["parameters"] or {}).values()]
    if values and all(value in thought for value in values):
        return 1.0
    return 0.5 if all(value in thought or value in dialogue for value in values) else 0.0


def _consistency(thought: str, calls: Sequence[Call], tools: set[str]) -> float:
    called = {call["name"] for call in calls}
    named = {name for name in tools if name in thought}
    return 0.5 * (called <= named) + 0.5 * (named <= called)


def _without_call(thought: str, tools: set[str]) -> tuple[float, float, float]:
    """Grades of tool, arguments and consistency."""
    told = thought.lower()
    lacks = any(phrase in told for phrase in LACKING)
    if not (lacks or any(phrase in told for phrase in NO_TOOL)) or not any(name in thought for name in tools):
        return 0.0, 0.0, 0.0
    return 1.0, 0.5 * lacks, 0.5


def _economy(thought: str) -> float:
    words = WORDS.findall(thought.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    repeated = 1 - len(set(triples)) / len(triples) if triples else 0.0
    return 1.0 if repeated <= 0.1 else 0.5 if repeated <= 0.3 else 0.0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
