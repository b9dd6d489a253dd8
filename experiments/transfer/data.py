"""What is scored: a source to be fine-tuned on, and domains, from tables, folders or the hub."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.passages import Example as Query
from experiments.tasks.base import columns_of, missing_column, plain, read_table, shuffled
from methods.errors import ConfigError, DataError, nearest

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Example:
    """One text. A plain text has an empty `prompt` and is all `answer`; `options` makes accuracy possible."""

    id: str
    domain: str
    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    right: int = -1

    @property
    def is_text(self) -> bool:
        return not self.prompt

    @property
    def asked(self) -> Query:
        """As what a prompt is built from."""
        return Query(self.answer) if self.is_text else Query(self.prompt, self.answer)


@dataclass
class Domains:
    """Rows of a table by domain.

    path: parquet, jsonl, jsonl.gz, csv, a folder of them, or a hub id. A table with `prompt_column` has questions
    (with `answer_column`), else its `text_column` is plain text. `options_column` makes multiple choice of it: options
    get letters, and `answer_column` is the right one's letter. `where` keeps rows by column. `only`: these domains.
    """

    path: str = ""
    domain_column: str = "domain"
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    text_column: str = "text"
    options_column: str | None = None
    subset: str | None = None
    split: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    only: list[str] | None = None

    def __post_init__(self) -> None:
        self.where, self.only = plain(self.where), plain(self.only)

    def read(self) -> dict[str, list[Example]]:
        """Examples by domain, in the file's order. DataError for an unreadable table, row or an empty domain."""
        records = read_table(
            self.path, self.split, (self.domain_column,), self.where, subset=self.subset, key="domains"
        )
        found: dict[str, list[Example]] = {}
        for place, example in enumerate(self.examples(records, self.path, "domains")):
            if example.domain in ("", "None"):
                raise DataError("The row has no domain", where=f"{self.path}, row {place + 1}")
            found.setdefault(example.domain, []).append(example)
        if self.only is None:
            return found
        for name in self.only:
            if name not in found:
                raise DataError(
                    f"The domain '{name}' is empty: no row has it",
                    where=f"{self.path}, column '{self.domain_column}'",
                    got=", ".join(sorted(found)[:20]),
                    fix=nearest(name, found) or "take it out of domains.only",
                )
        return {name: found[name] for name in self.only}

    def examples(self, records: Sequence[dict], source: str, key: str) -> list[Example]:
        """The records as examples; those without a text in them are refused by row. Columns as the class says."""
        columns = columns_of(records)
        asks = self.prompt_column in columns
        needed = [self.prompt_column, self.answer_column] if asks else [self.text_column]
        for column in [*needed, *([self.options_column] if self.options_column else [])]:
            if column not in columns:
                raise missing_column(column, columns, source, key)
        return [self._example(record, place, asks, source) for place, record in enumerate(records)]

    def _example(self, record: dict, place: int, asks: bool, source: str) -> Example:
        where = f"{source}, row {place + 1}"
        prompt = _text(record.get(self.prompt_column), where, self.prompt_column) if asks else ""
        answer = _text(record.get(self.answer_column if asks else self.text_column), where, "the text")
        options: tuple[str, ...] = ()
        right = -1
        if self.options_column:
            options = tuple(str(o) for o in record.get(self.options_column) or ())
            right = LETTERS.find(answer) if len(answer) == 1 else -1
            if not 0 <= right < len(options) <= len(LETTERS):
                raise DataError(
                    "The answer is no letter of an option", where=where, got=f"{answer!r} of {len(options)} options"
                )
            lettered = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
            prompt = f"{prompt}\n{lettered}\nAnswer with the letter of the right option."
        return Example(f"row {place + 1}", str(record.get(self.domain_column, "")), prompt, answer, options, right)


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"The row has no {column}", where=where, got=repr(value)[:60], expected="a text that is not empty"
        )
    return value


@dataclass(frozen=True)
class Data:
    """The source's examples and those of every other domain, each in its own seeded order."""

    source: str
    source_examples: list[Example]
    domains: dict[str, list[Example]]

    @property
    def digest(self) -> str:
        """Of every text, so that parts of an interrupted scoring are not taken for those of other data."""
        texts = [[e.domain, e.prompt, e.answer] for e in self.source_examples]
        texts += [[name, e.prompt, e.answer] for name, examples in self.domains.items() for e in examples]
        return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()

    def texts(self, characters: int | None = None) -> list[str]:
        """All texts, of each domain those up to `characters`, in an order that neither seed nor source changes.

        So runs with other seeds or another source among the same domains share one SAE. The order is that of hashes.
        """
        found = []
        for _, examples in sorted({**self.domains, self.source: self.source_examples}.items()):
            texts = {f"{e.prompt}\n{e.answer}" if e.prompt else e.answer for e in examples}
            left = math.inf if characters is None else characters
            for text in sorted(texts, key=lambda t: hashlib.blake2b(t.encode("utf-8", "surrogatepass")).digest()):
                if left > 0:
                    found.append(text)
                    left -= len(text)
        return found


def read(domains: Domains, source: Any, piece: int, seed: int) -> Data:
    """Read source and domains, plain texts in pieces of `piece` characters.

    `source.domain` names one of the domains (and takes it out of them); of a list, the seed takes one: seed k the
    entry k modulo the length. `source.path` is a table with columns of its own (`source.prompt_column` and so on).
    DataError for a source or domains that cannot be read, ConfigError for a source that is not named once.
    """
    if (source.domain is None) == (source.path is None):
        raise ConfigError(
            "The source is one of the domains or a file of its own",
            where="source",
            got=f"domain={source.domain}, path={source.path}",
            fix="give source.domain=NAME or source.path=FILE",
        )
    by_domain = domains.read()
    if source.domain is not None:
        name = chosen(plain(source.domain), by_domain, seed)
        examples = by_domain.pop(name)
    else:
        name, columns = str(source.path), ("prompt_column", "answer_column", "text_column")
        table = Domains(name, **{column: source[column] for column in columns})
        examples = table.examples(read_table(name, key="source"), name, "source")
    if not by_domain:
        raise DataError("There is no domain to score", where=domains.path, expected="at least one beside the source")
    ordered = {n: shuffled(cut(e, piece), seed, "transfer", n) for n, e in by_domain.items()}
    return Data(name, shuffled(cut(examples, piece), seed, "transfer", name), ordered)


def chosen(wanted: str | list[str], by_domain: Mapping[str, Any], seed: int) -> str:
    """The source domain of this seed. ConfigError if one of those that are named is no domain, or none is named."""
    names = wanted if isinstance(wanted, list) else [wanted]
    for name in names or [""]:
        if name not in by_domain:
            raise ConfigError(
                "The source is none of the domains",
                where="source.domain",
                got=name,
                expected=", ".join(by_domain),
                fix=nearest(str(name), by_domain) or "choose one of these, or give source.path=FILE",
            )
    return str(names[seed % len(names)])


def refuse_too_few(examples: Sequence[Example], demos: int) -> None:
    """DataError unless there is a text that is none of the first `demos`, which are its demonstrations."""
    first = [e.asked for e in examples[:demos]]
    if all(e.asked in first for e in examples[demos:]):
        raise DataError(
            "There are too few texts: the first ones are demonstrations for the others",
            where=f"domain {examples[0].domain}" if examples else "",
            got=f"{len(examples)} texts",
            expected=f"more than {demos} different ones",
            fix="give more texts, or lower score.demos or score.source_demos",
        )


def cut(examples: Sequence[Example], characters: int) -> list[Example]:
    """Plain texts in pieces of at most `characters`, cut at blanks where there are any; questions as they are.

    A piece keeps its text's id with a number behind it. Pieces below a fifth of the length are left out, unless they
    are a whole text.
    """
    found = []
    for example in examples:
        parts = _pieces(example.answer, characters) if example.is_text else [example.answer]
        kept = [part for part in parts if len(parts) == 1 or len(part) >= characters / 5]
        for k, part in enumerate(kept):
            name = f"{example.id}, piece {k + 1}" if len(parts) > 1 else example.id
            found.append(replace(example, id=name, answer=part))
    return found


def _pieces(text: str, size: int) -> list[str]:
    pieces, at = [], 0
    while len(text) - at > size:
        blank = max(text.rfind(blank, at, at + size) for blank in " \n")
        end = blank + 1 if blank > at else at + size
        pieces.append(text[at:end])
        at = end
    return [piece for piece in [*pieces, text[at:]] if piece.strip()]
