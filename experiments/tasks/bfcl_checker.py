"""Whether calls agree with BFCL's accepted values, by the rules of its AST checker (Berkeley leaderboard, v4).

An accepted answer is `{function: {parameter: [accepted values]}}`, where `""` among the values means that the
parameter may be left out. Texts compare without case, blanks and the signs , . / - _ * ^; types must agree, but a whole
number serves as a float of Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.tasks.tool_parsing import Call, list_calls

PYTHON: dict[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict,
    "any": str,
}  # fmt: skip
JAVA: dict[str, type] = {
    "byte": int, "short": int, "integer": int, "long": int, "float": float, "double": float, "boolean": bool,
    "char": str, "String": str, "any": str, "Array": list, "ArrayList": list, "HashMap": dict,
}  # fmt: skip
JAVASCRIPT: dict[str, type] = {
    "String": str, "integer": int, "float": float, "Bigint": int, "Boolean": bool, "dict": dict, "array": list,
    "any": str,
}  # fmt: skip
TYPES = {"python": PYTHON, "java": JAVA, "javascript": JAVASCRIPT}
NESTED = {"python": ("array", "tuple"), "java": ("Array", "ArrayList"), "javascript": ("array",)}


def language_of(category: str) -> str:
    return category.rpartition("_")[2] if category in ("simple_java", "simple_javascript") else "python"


def right(category: str, calls: Sequence[Call] | None, functions: Sequence[Mapping], accepted: Sequence | None) -> bool:
    """Whether a response's calls (None: none could be read) are right in their category.

    irrelevance: no call. relevance: any call. Else as many calls as accepted answers; parallel ones in any order, each
    matched to the first answer, in the order of the answers, that it fits.
    """
    if "irrelevance" in category:
        return not calls
    if "relevance" in category:
        return bool(calls)
    if calls is None or accepted is None or len(calls) != len(accepted):
        return False
    free, language = list(calls), language_of(category)
    for answer in accepted:
        ((name, values),) = answer.items()
        function = next((f for f in functions if f["name"] == name), None)
        fits = (k for k, call in enumerate(free) if function and call_fits(call, function, values, language))
        found = next(fits, None)
        if found is None:
            return False
        free.pop(found)
    return True


def call_fits(call: Call, function: Mapping, accepted: Mapping[str, list], language: str = "python") -> bool:
    """Whether one call has the function's name, all required parameters, and an accepted value in each."""
    given, schema = call["parameters"], function["parameters"]
    if call["name"] != function["name"] or given is None:
        return False
    if any(name not in given for name in schema.get("required", ())):
        return False
    if any("" not in values for name, values in accepted.items() if name not in given):
        return False
    known = schema.get("properties", {})
    return all(
        name in known and name in accepted and value_fits(value, accepted[name], known[name], language)
        for name, value in given.items()
    )


def value_fits(value: Any, accepted: list, schema: Mapping, language: str = "python") -> bool:
    """Whether a value is one of those accepted for a parameter of this schema.

    Differs from BFCL: a Java or JavaScript value may also be typed JSON (BFCL takes its source text alone).
    """
    kind = schema.get("type", "any")
    expected = TYPES[language].get(kind, str)
    nested = _nested(schema, kind, language)
    if language != "python":
        value = _from_source(value, kind, schema, language)
    elif kind == "tuple" and isinstance(value, tuple):
        value = list(value)
    if expected is float and language == "python":
        value = _as_float(value)
    samples = [item for item in accepted if item != ""][:1]
    # Where the accepted values are of another type than the schema's, they name a variable.
    variable = any(type(sample) is not expected for sample in samples)
    if type(value) is not expected:
        if not any(type(value) is type(sample) for sample in samples):
            return False
        variable = True
    elif nested is not None and not _elements_fit(value, accepted, nested):
        return False
    if variable:
        return value in accepted
    if expected is dict:
        return any(item != "" and dict_fits(value, item) for item in accepted)
    if expected is list and nested is dict:
        return any(isinstance(item, list) and _dicts_fit(value, item) for item in accepted)
    if expected is str:
        return standard(value) in [standard(item) for item in accepted if isinstance(item, str)]
    if expected is list:
        lists = [item for item in accepted if isinstance(item, (list, str))]  # "" stands for an empty one too
        return [standard(v) for v in value] in [[standard(v) for v in item] for item in lists]
    return value in accepted


def _as_float(value: Any) -> Any:
    """A whole number as a float, unless it is larger than any; everything else unchanged."""
    try:
        return float(value) if type(value) is int else value
    except OverflowError:
        return value


def standard(value: Any) -> Any:
    """A text without case, blanks, the signs , . / - _ * ^, and with one kind of quotation mark; others unchanged."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value


def dict_fits(value: Mapping, accepted: Any) -> bool:
    """Whether each key holds one of its accepted values and no key is missing that may not be left out."""
    if not isinstance(accepted, dict):
        return False
    held = all(
        key in accepted and standard(item) in [standard(other) for other in accepted[key]]
        for key, item in value.items()
    )
    return held and all(key in value or "" in items for key, items in accepted.items())


def _dicts_fit(value: list, accepted: list) -> bool:
    pairs = zip(value, accepted, strict=False)
    return len(value) == len(accepted) and all(isinstance(v, dict) and dict_fits(v, a) for v, a in pairs)


def _nested(schema: Mapping, kind: str, language: str) -> type | None:
    """The type of a list's elements, None where there is none."""
    items = schema.get("items")
    if kind not in NESTED[language] or not isinstance(items, Mapping):
        return None
    return TYPES[language].get(str(items.get("type")), str)


def _elements_fit(value: list, accepted: list, nested: type) -> bool:
    """Whether all elements have the schema's type, or that of the elements of one accepted list."""
    for item in accepted:
        if not isinstance(item, list):
            return True
        kinds = {nested, *(type(element) for element in [e for e in item if e != ""][:1])}
        if all(type(v) in kinds for v in value):
            return True
    return False


# ---------------------------------------------------------------- values in the source text of Java and JavaScript


def _from_source(value: Any, kind: str, schema: Mapping, language: str) -> Any:
    """The value that a source text stands for; the text itself where it is not of the parameter's type."""
    inner = schema.get("items", {}).get("type") if isinstance(schema.get("items"), Mapping) else None
    if kind == "any":
        return value if isinstance(value, str) else json.dumps(value)
    if not isinstance(value, str):
        return value
    return _java(value, kind, inner) if language == "java" else _javascript(value.strip(), kind, inner)


NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
JAVA_NUMBERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "byte": (r"(-?\d+)", int), "short": (r"(-?\d+)", int), "integer": (r"(-?\d+)", int), "long": (r"(-?\d+)[lL]", int),
    "float": (rf"({NUMBER})[fF]", float), "double": (rf"({NUMBER})", float),
    "boolean": (r"(true|false)", lambda word: word == "true"),
}  # fmt: skip


def _java(text: str, kind: str, inner: str | None) -> Any:
    if kind in JAVA_NUMBERS:
        pattern, make = JAVA_NUMBERS[kind]
        found = re.fullmatch(pattern, text)
        return make(found[1]) if found and len(text) < 400 else text
    if kind == "HashMap":
        if not re.match(r"\s*new\s+HashMap\s*<", text):
            return text
        return {key: _java_plain(item.strip()) for key, item in re.findall(r'put\("([^"]*)",\s*([^()]*)\)', text)}
    if kind in ("Array", "ArrayList"):
        return _java_list(text, kind, inner)
    return text


def _java_list(text: str, kind: str, inner: str | None) -> Any:
    if kind == "Array":
        found = re.search(r"new\s+\w+\s*\[\]\s*\{([^{}]*)\}", text)
        parts = found[1].split(",") if found else None
    elif re.match(r"\s*new\s+ArrayList\s*<", text):
        found = re.search(r"asList\(([^()]*)\)", text)
        parts = found[1].split(",") if found else re.findall(r"add\(([^()]*)\)", text)
    else:
        parts = None
    if parts is None:
        return text
    parts = [part.strip() for part in parts if part.strip()]
    if inner in ("String", "char", None):
        return [_java_plain(part) for part in parts]
    return [_java(part, inner, None) for part in parts]


def _java_plain(text: str) -> Any:
    """A literal whose type is not known."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    for kind in ("boolean", "integer", "long", "double", "float"):
        if not isinstance(value := _java(text, kind, None), str):
            return value
    return text


def _javascript(text: str, kind: str, inner: str | None) -> Any:
    if kind == "String":
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
    if kind == "Boolean":
        return text == "true" if text in ("true", "false") else text
    if kind in ("integer", "Bigint", "float"):
        pattern = {"integer": r"(-?\d+)", "Bigint": r"(-?\d+)n", "float": r"(-?\d+(?:\.\d+)?)"}[kind]
        found = re.fullmatch(pattern, text)
        return (float if kind == "float" else int)(found[1]) if found and len(text) < 400 else text
    if kind not in ("dict", "array"):
        return text
    if made := re.fullmatch(r"new\s+Array\((.*)\)", text, re.DOTALL):
        text = f"[{made[1]}]"
    value = _literal(text)
    return value if isinstance(value, dict if kind == "dict" else list) else text


def _literal(text: str) -> Any:
    """An object or array literal: JSON, or with single quotes, bare keys and bare names; the text if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    quoted = re.sub(r"([{,]\s*)([A-Za-z_]\w*)(\s*:)", r'\1"\2"\3', text)
    words = re.sub(r"\btrue\b", "True", re.sub(r"\bfalse\b", "False", quoted))
    calls = list_calls(f"f(x={words})")
    return text if not calls or calls[0]["parameters"] is None else calls[0]["parameters"].get("x", text)
