"""Tool calls as models write them: tags with JSON lines, OpenAI's `tool_calls`, BFCL's lists, read and never run.

Every reader gives a list of calls `{"name": str, "parameters": dict}` (`parameters` is None where a line has none that
is an object), or None where the text is not of its form. All take time linear in the text.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

Call = dict[str, Any]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
LONGEST = 1024  # bits of an integer in Python's syntax; JSON's reader has a limit of its own
UNREADABLE = (ValueError, RecursionError, MemoryError)  # a SyntaxError is a ValueError's cousin: see `list_calls`


def after_thinking(text: str) -> str:
    """What follows the first `</think>`; the whole text without one. Thinking may mention the tags of a call."""
    return text.partition("</think>")[2] if "</think>" in text else text


def line_calls(text: str) -> list[Call] | None:
    """The form of ToolRL: after the thinking, the first `<tool_call>` block with one JSON object per line.

    None if either tag is missing, a line is no JSON object, or an object has no `name` that is a text. A closing tag
    that stands before the opening one leaves the block open to the end, as in ToolRL.
    """
    rest = after_thinking(text)
    if OPEN not in rest or CLOSE not in rest:
        return None
    block = rest.partition(OPEN)[2].partition(CLOSE)[0]
    return _named((_json(line) for line in block.strip().split("\n")), ("parameters",))


def tag_calls(text: str) -> list[Call] | None:
    """The form of Qwen and Hermes: after the thinking, any number of `<tool_call>` blocks with one JSON object (or one
    per line) each, `arguments` or `parameters`. None if any block cannot be read or there is none."""
    blocks = after_thinking(text).split(OPEN)[1:]
    if not blocks or any(CLOSE not in block for block in blocks):
        return None
    values: list[Any] = []
    for block in blocks:
        inner = block.partition(CLOSE)[0].strip()
        whole = _json(inner)
        values += [whole] if whole is not None else [_json(line) for line in inner.split("\n")]
    return _named(values)


def openai_calls(value: Any) -> list[Call] | None:
    """OpenAI's form, as JSON text or already parsed: a message with `tool_calls`, or that list itself.

    An entry is `{"type": "function", "function": {"name": ..., "arguments": "<JSON text>"}}`.
    """
    value = _json(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        value = value.get("tool_calls")
    if not isinstance(value, list):
        return None
    functions = [entry.get("function") if isinstance(entry, dict) else None for entry in value]
    if not all(isinstance(function, dict) for function in functions):
        return None
    return _named({**f, "arguments": _arguments(f.get("arguments"))} for f in functions if f is not None)


def list_calls(text: str) -> list[Call] | None:
    """BFCL's form: `[f(a=1), g.h(b="x")]` in Python's syntax, or `[{"f": {"a": 1}}]`; the brackets may be missing.

    Arguments without a name are left out, names that are no constants become texts (`f(mode=fast)`), sums and products
    of numbers are worked out; nothing is evaluated beyond that.
    """
    text = _unfenced(text)
    if not text:
        return None
    if not text.startswith("["):
        text = f"[{text}]"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # a backslash in a model's text
            body = ast.parse(text, mode="eval").body
        items = [_element(item) for item in body.elts] if isinstance(body, ast.List) else [None]
    except (*UNREADABLE, SyntaxError):
        return None
    return [item for item in items if item is not None] if None not in items else None


def read_calls(text: str) -> list[Call] | None:
    """The calls in a response of any of these forms; None where none can be read, [] for an empty list of calls."""
    if OPEN in after_thinking(text):
        return tag_calls(text)
    answer = _unfenced(after_thinking(text))
    value = _json(answer)
    if isinstance(value, (dict, list)):
        return _json_calls(value)
    return list_calls(answer)


def _json_calls(value: Any) -> list[Call] | None:
    """Parsed JSON in one of the three usual shapes."""
    if (found := openai_calls(value)) is not None:
        return found
    items = value if isinstance(value, list) else [value]
    if all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items):
        return _named(items)
    one_key = all(isinstance(item, dict) and len(item) == 1 for item in items)
    return [_keyed(item) for item in items] if one_key and all(map(_holds_object, items)) else None


def _holds_object(item: dict) -> bool:
    return isinstance(next(iter(item.values())), dict)


def _keyed(item: dict) -> Call:
    ((name, parameters),) = item.items()
    return {"name": name, "parameters": parameters}


def _named(values: Iterable[Any], keys: Sequence[str] = ("parameters", "arguments")) -> list[Call] | None:
    """Calls of JSON values, parameters under the first of `keys`; None if one of them is no object with a name."""
    calls = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        parameters = next((value[key] for key in keys if key in value), None)
        calls.append({"name": value["name"], "parameters": parameters if isinstance(parameters, dict) else None})
    return calls


def _arguments(value: Any) -> Any:
    return _json(value) if isinstance(value, str) else value


def _json(text: str) -> Any:
    """The JSON value that the whole text is; None if it is none (a bare `null` too: no call is that)."""
    try:
        return json.loads(text)
    except UNREADABLE:
        return None


def _unfenced(text: str) -> str:
    """Without the code fence, or the backticks, around it."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and len(text) >= 6:
        first, line, rest = text[3:-3].partition("\n")
        text = rest if line and first.strip().isalnum() else text[3:-3]
    return text.strip().strip("`").strip()


# ---------------------------------------------------------------- Python's syntax


def _element(node: ast.expr) -> Call | None:
    if isinstance(node, ast.Call):
        name = _dotted(node.func)
        return None if name is None else {"name": name, "parameters": _keywords(node)}
    value = _value(node) if isinstance(node, ast.Dict) else None
    if isinstance(value, dict) and len(value) == 1 and _holds_object(value):
        return _keyed(value)
    return None


def _dotted(node: ast.expr) -> str | None:
    """`a.b.c`; None for anything but names."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else None


def _keywords(node: ast.Call) -> dict[str, Any]:
    return {item.arg: _value(item.value) for item in node.keywords if item.arg is not None}


def _value(node: ast.expr) -> Any:
    """A constant, a container of such, a number worked out; the source text of anything else."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (bool, str))):
        return node.value
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {str(_value(k)): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Call) and node.keywords and (name := _dotted(node.func)):
        return {name: _keywords(node)}
    number = _number(node)
    return ast.unparse(node) if number is None else number


def _number(node: ast.expr) -> int | float | None:
    """A number, its negative, or + - * / of such; None otherwise (powers would let a short text take all memory), and
    for an integer beyond LONGEST, which could neither become a float nor be written out."""
    number = _worked_out(node)
    return None if isinstance(number, int) and number.bit_length() > LONGEST else number


def _worked_out(node: ast.expr) -> int | float | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        inner = _number(node.operand)
        return None if inner is None else -inner if isinstance(node.op, ast.USub) else inner
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _number(node.left), _number(node.right)
    if left is None or right is None:
        return None
    try:
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        return left / right if isinstance(node.op, ast.Div) else None
    except ArithmeticError:
        return None
