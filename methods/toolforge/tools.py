"""The virtual tool bank: canonical tools, their variants by template or by a model, and what a schema must be.

A variant asks for the same as its canonical tool under another name, with reworded description, renamed and new
fields. A variant from the template takes its words from `domains`; one from a model is asked for with the kept ones
in view. Both pass the dual gate.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from methods.errors import ConfigError, DataError
from methods.toolforge.domains import DOMAINS, GENERAL, Domain
from methods.toolforge.gate import DualGate

Schema = dict[str, Any]
LANGUAGES = ("en", "zh")
MOST_FIELDS = 10
LONGEST_NAME = 64
_NAME = re.compile(rf"[A-Za-z_][\w.-]{{0,{LONGEST_NAME - 1}}}")
_ENDINGS = ("search", "lookup", "finder", "query", "retriever", "explorer", "guide", "index", "reference", "inspector")
_OPENINGS = {
    "en": (
        "Looks up {noun}: {examples}.",
        "Answers questions about {noun}, for example {examples}.",
        "A search service for {noun}. Covers {examples}.",
        "Retrieves passages that deal with {noun} ({examples}).",
        "Finds what is known about {noun}, such as {examples}.",
        "Reference desk for {noun}; returns text on {examples}.",
        "Use it for anything on {noun}, be it {examples}.",
    ),
    "zh": (
        "查询{noun}的工具，包括{examples}。",
        "回答有关{noun}的问题，例如{examples}。",
        "面向{noun}的检索服务，涵盖{examples}。",
        "检索与{noun}相关的段落（{examples}）。",
        "查找关于{noun}的已知信息，如{examples}。",
        "{noun}资料台，返回{examples}方面的文本。",
        "凡涉及{noun}的内容，如{examples}，均可使用。",
    ),
}
_QUERY = {
    "en": ("The question to look up.", "What to search for, in plain words.", "Text of the query."),
    "zh": ("需要查询的具体问题。", "用自然语言描述要查找的内容。", "查询文本。"),
}
# Fields that any tool may have: name -> (type, English, Chinese)
_COMMON: dict[str, tuple[str, str, str]] = {
    "keywords": ("array", "Important words of the query.", "查询中的关键词。"),
    "aliases": ("array", "Other names of the same thing.", "同一事物的其他名称。"),
    "time_range": ("string", "Period that the answer lies in.", "答案所在的时间范围。"),
    "answer_language": ("string", "Language of the passages.", "返回段落的语言。"),
    "max_results": ("string", "How many passages to return.", "返回段落的数量。"),
    "exclude": ("array", "Words that must not occur.", "需要排除的词。"),
    "intent": ("string", "What the result is needed for.", "查询的意图。"),
    "context_hint": ("string", "What is known already.", "已知信息。"),
    "filters": ("object", "Further restrictions, name and value.", "其他限制条件。"),
}


@dataclass
class Bank:
    """Variants by canonical tool. Raises DataError for a schema that is none and for names that clash."""

    tools: dict[str, list[Schema]]
    general: str = GENERAL
    owner: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.owner = {}
        for canonical, variants in self.tools.items():
            for schema in variants:
                if problem := schema_problem(schema):
                    raise DataError("A virtual tool is no usable schema", where=canonical, got=problem)
                name = schema["name"]
                if name in self.owner:
                    raise DataError(
                        f"Two virtual tools have the name '{name}'",
                        where=f"{self.owner[name]} and {canonical}",
                        expected="names that are different over the whole bank",
                        fix="rename one of them",
                    )
                self.owner[name] = canonical
        empty = [name for name, variants in self.tools.items() if not variants]
        if empty or len(self.tools) < 2:
            what = f"the tool '{empty[0]}' has no variant" if empty else f"{len(self.tools)} tools"
            raise DataError("The tool bank is too small", got=what, expected="two tools with a variant each, or more")

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], general: str = GENERAL) -> Bank:
        """A bank from rows `{"virtual_tool": canonical name, "tool": schema}`. Raises DataError."""
        tools: dict[str, list[Schema]] = {}
        for number, row in enumerate(rows, start=1):
            schema = row.get("tool")
            with contextlib.suppress(ValueError, RecursionError):
                schema = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(row.get("virtual_tool"), str) or not isinstance(schema, dict):
                raise DataError(
                    "A row of the tool bank cannot be read",
                    where=f"row {number}",
                    got=f"columns {', '.join(map(str, row))}",
                    expected='{"virtual_tool": "name of the canonical tool", "tool": {"name": ..., "parameters": ...}}',
                )
            tools.setdefault(row["virtual_tool"], []).append(schema)
        return cls(tools, general)

    def draw(self, rng: random.Random) -> dict[str, Schema]:
        """One random variant from each canonical tool."""
        return {canonical: rng.choice(variants) for canonical, variants in self.tools.items()}


def schema_problem(schema: Any) -> str:
    """What is wrong with a tool's schema, or an empty text: a name, a description, `query` required, at most ten
    fields, every required field declared."""
    if not isinstance(schema, Mapping) or not isinstance(schema.get("parameters"), Mapping):
        return "no name, description and parameters"
    name, properties = schema.get("name"), schema["parameters"].get("properties")
    required = schema["parameters"].get("required")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"the name {name!r}"
    if not isinstance(schema.get("description"), str) or not schema["description"].strip():
        return f"'{name}' has no description"
    if not isinstance(properties, Mapping) or not all(isinstance(p, Mapping) for p in properties.values()):
        return f"'{name}' has no properties"
    if not isinstance(required, Sequence) or isinstance(required, str) or "query" not in required:
        return f"'{name}' does not require a query"
    if unknown := [key for key in required if not isinstance(key, str) or key not in properties]:
        return f"'{name}' requires {unknown[0]!r}, which is none of its properties"
    return (
        f"'{name}' has {len(properties)} properties, more than {MOST_FIELDS}" if len(properties) > MOST_FIELDS else ""
    )


def variant_problem(schema: Any, canonical: Schema) -> str:
    """What is wrong with a variant of a canonical tool, or an empty text: a usable schema with 1 to 4 required
    parameters beside `query`, and 1 to 5 fields more than the tool has (others may be renamed)."""
    if problem := schema_problem(schema):
        return problem
    further = len(set(schema["parameters"]["required"])) - 1
    new = len(schema["parameters"]["properties"]) - len(canonical["parameters"]["properties"])
    if not 1 <= further <= 4:
        return f"{further} required parameters beside query, not 1 to 4"
    return "" if 1 <= new <= 5 else f"{new} new parameters, not 1 to 5"


def described(schema: Schema) -> str:
    """The text that the dual gate compares."""
    return f"{schema['name']}: {schema['description']}"


def canonical_tool(domain: Domain, language: str) -> Schema:
    """The canonical tool of a domain."""
    at = LANGUAGES.index(language)
    text = _OPENINGS[language][0].format(noun=domain.noun[language], examples=domain.examples[language])
    return _schema(domain.name, text, language, {k: ("string", v[at]) for k, v in domain.fields.items()}, ["query"])


def _schema(name: str, text: str, language: str, fields: Mapping[str, tuple[str, str]], required: list[str]) -> Schema:
    query = {"query": {"type": "string", "description": _QUERY[language][len(name) % 3]}}
    return {
        "name": name,
        "description": text,
        "parameters": {
            "type": "object",
            "properties": query | {key: _property(*kind) for key, kind in fields.items()},
            "required": required,
        },
    }


def _property(kind: str, text: str) -> dict[str, Any]:
    more = {"items": {"type": "string"}} if kind == "array" else {}
    return {"type": kind, **more, "description": text}


def template_candidates(domain: Domain, language: str, rng: random.Random) -> Iterable[Schema]:
    """Candidates without a model, in a random order: stems and endings of names, openings of descriptions, 1 to 4
    further required parameters, fields of the domain and common ones, some renamed."""
    if language not in LANGUAGES:
        raise ConfigError("Unknown language of tools", got=language, expected=" or ".join(LANGUAGES))
    at, names = LANGUAGES.index(language), [f"{s}_{e}" for s in domain.stems for e in _ENDINGS]
    for name in rng.sample(names, len(names)):
        opening = rng.choice(_OPENINGS[language])
        examples = re.split(", |、", domain.examples[language])
        joined = ("、" if language == "zh" else ", ").join(rng.sample(examples, len(examples)))
        fields = {_renamed(k, rng): ("string", v[at]) for k, v in domain.fields.items()}
        for key in rng.sample(list(_COMMON), rng.randint(1, 5)):
            kind, english, chinese = _COMMON[key]
            fields[key] = (kind, (english, chinese)[at])
        keys = rng.sample(list(fields), len(fields))
        required = ["query", *rng.sample(keys, rng.randint(1, min(4, len(keys))))]
        text = opening.format(noun=domain.noun[language], examples=joined)
        yield _schema(f"{name}_zh" if at else name, text, language, {k: fields[k] for k in keys}, required)


def _renamed(key: str, rng: random.Random) -> str:
    return rng.choice((key, key, f"target_{key}", f"{key}_hint"))


def unfit(candidate: Schema, kept: Sequence[Schema], taken: Iterable[str], gate: DualGate) -> str:
    """Why a candidate with a usable schema is no further variant, or an empty text."""
    if candidate["name"] in taken:
        return "a name in use"
    return gate.judge(described(candidate), [described(schema) for schema in kept]).reason


def grow(
    candidates: Iterable[Schema],
    gate: DualGate,
    count: int,
    *,
    attempts: int,
    taken: set[str],
) -> list[Schema]:
    """Variants from a stream of candidates, until `count` are kept or `attempts` are used up. `taken` are the names in
    use, and grows."""
    kept: list[Schema] = []
    for number, candidate in enumerate(candidates):
        if len(kept) >= count or number >= attempts:
            break
        if not schema_problem(candidate) and not unfit(candidate, kept, taken, gate):
            kept.append(candidate)
            taken.add(candidate["name"])
    return kept


def template_bank(language: str, variants: int, gate: DualGate, seed: int, attempts: int = 10) -> Bank:
    """The bank of all domains by template: `variants` a tool at most, from at most `attempts` candidates each."""
    taken: set[str] = set()
    tools = {
        name: grow(
            template_candidates(domain, language, random.Random(f"{seed}/{language}/{name}")),
            gate,
            variants,
            attempts=attempts * variants,
            taken=taken,
        )
        for name, domain in DOMAINS.items()
    }
    return Bank(tools)
