"""From one item to dialogues: label, plan, retrieve, write, nine rules, judge. A stage that a model does yields what to
ask; without a model nothing is yielded and the same item, shape and seed give the same dialogue."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from methods.errors import ConfigError
from methods.toolforge import asks, judge, labels, writer
from methods.toolforge.asks import Talk, ask_until
from methods.toolforge.bundles import Search, pool_search
from methods.toolforge.checks import NAMES, check
from methods.toolforge.draft import Draft, checked_plan, draft, offer_tools
from methods.toolforge.gate import DualGate
from methods.toolforge.items import Item, Passage, Skip
from methods.toolforge.labels import Label, Rounds
from methods.toolforge.record import Record, Turn, assemble, shown_text, turn_text
from methods.toolforge.shapes import SHAPES, Shape
from methods.toolforge.text import distinct, words
from methods.toolforge.tools import LONGEST_NAME, Bank, Schema, unfit, variant_problem

Write = Callable[[Draft, random.Random], list[Turn]]
MODEL_STAGES = ("plan", "write", "judge")


@dataclass
class Recipe:
    """How dialogues are made. banks: by language. model: the stages that a model does (`plan` is label and plan);
    the others go by rule and template. release: the rules of the first release. gate: of hard negatives.
    search: passages for an item's pool (BM25 by default). tries: of a model's answer that cannot be read.

    Raises ConfigError for an unknown stage and for tries below 1.
    """

    banks: Mapping[str, Bank]
    model: Sequence[str] = ()
    release: bool = False
    gate: DualGate | None = None
    search: Callable[[Sequence[Passage]], Search] = pool_search
    write: Write = writer.write
    tries: int = 2
    seed: int = 0
    rules: Sequence[str] = field(default=NAMES)

    def __post_init__(self) -> None:
        if unknown := [stage for stage in self.model if stage not in MODEL_STAGES]:
            raise ConfigError("No such stage", where="model", got=unknown[0], expected=", ".join(MODEL_STAGES))
        if self.tries < 1:
            raise ConfigError("A model must be asked once at least", where="tries", got=self.tries)

    def language(self, item: Item) -> str:
        """The bank that suits an item's question: the Chinese one for a question in Chinese, if there are both."""
        chinese = any("\u4e00" <= character <= "\u9fff" for character in item.question)
        wanted = "zh" if chinese else "en"
        return wanted if wanted in self.banks else next(iter(self.banks))


@dataclass(frozen=True)
class Attempt:
    """One dialogue that was tried: kept, or rejected in a stage for a reason that is counted."""

    item: str
    shape: str
    record: Record | None
    scores: dict[str, int] = field(default_factory=dict)
    stage: str = ""
    reason: str = ""
    detail: str = ""

    @property
    def kept(self) -> bool:
        return not self.stage


def label_item(item: Item, recipe: Recipe) -> Talk[tuple[Label, Rounds | None]]:
    """The label, and the plan where it goes by rule. Raises Skip."""
    bank = recipe.banks[recipe.language(item)]
    if "plan" not in recipe.model:
        return labels.by_rule(item, bank)
    found = yield from ask_until(asks.label(item, bank), lambda text: asks.read_label(text, bank), recipe.tries)
    return found, None


def converse(item: Item, label: Label, rounds: Rounds | None, shape: Shape, recipe: Recipe) -> Talk[Attempt]:
    """One attempt at one dialogue. Never raises for what an item or a model does wrong."""
    try:
        return (yield from _converse(item, label, rounds, shape, recipe))
    except Skip as skip:
        return Attempt(item.id, shape.name, None, {}, skip.stage, skip.reason, skip.detail)


def _converse(item: Item, label: Label, rounds: Rounds | None, shape: Shape, recipe: Recipe) -> Talk[Attempt]:
    language = recipe.language(item)
    rng = random.Random(f"{recipe.seed}/{item.id}/{shape.name}")
    offer = offer_tools(label, shape, recipe.banks[language], rng)
    if rounds is None:
        ask = asks.plan(item, label, offer.mapping)
        planned = yield from ask_until(ask, asks.read_plan, recipe.tries)
        rounds = checked_plan(planned, item, offer.mapping)
    made = draft(item, label, shape, rounds, offer, rng, recipe.search(item.pool), recipe.gate, language)
    if "write" in recipe.model:
        turns = yield from ask_until(asks.write(made), asks.read_turns, recipe.tries)
    else:
        turns = recipe.write(made, rng)
    record = assemble(
        item,
        shape,
        label,
        uuid=_uuid(item, shape, recipe.seed),
        turns=[turn if isinstance(turn, str) else turn_text(turn) for turn in turns],
        bundles=made.bundles,
        shown=[shown_text(bundle) for bundle in made.bundles],
        gold=made.gold,
        schemas=offer.schemas,
        mapping={name: schema["name"] for name, schema in offer.mapping.items()},
        language=language,
    )
    return (yield from verdict(record, item.id, shape, recipe))


def verdict(record: Record, name: str, shape: Shape, recipe: Recipe) -> Talk[Attempt]:
    """The rules, and if they all pass the judge: kept only with both."""
    scores = check(record, release=recipe.release)
    failed = [rule for rule in NAMES if not scores[rule] and rule in recipe.rules]
    if failed:
        return Attempt(name, shape.name, record, scores, "rules", failed[0], ", ".join(failed))
    passed, why = judge.by_rule(record, shape) if "judge" not in recipe.model else (False, "")
    if "judge" in recipe.model:
        try:
            passed = yield from ask_until(asks.judge(record), asks.read_score, 1)
        except Skip as skip:
            return Attempt(name, shape.name, record, scores, "judge", "no score", skip.detail or skip.reason)
    if not passed:
        return Attempt(name, shape.name, record, scores, "judge", "a turn is wrong and not repaired", why)
    return Attempt(name, shape.name, record, scores)


def _uuid(item: Item, shape: Shape, seed: int) -> str:
    text = json.dumps([seed, item.id, item.question, shape.name])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def mistakes_of(record: Record) -> list[int]:
    """Places of the messages of a record that hold a planted mistake."""
    return [2 + 2 * turn for turn in SHAPES[record[0]["case"]].mistakes]


def grow_by_model(
    canonical: Schema, gate: DualGate, count: int, attempts: int, language: str, seed: int
) -> Talk[tuple[list[Schema], dict[str, int]]]:
    """Variants of one tool from a model that sees those kept so far, and how often a candidate was rejected for what.
    Stops at `count` variants or `attempts` requests."""
    kept: list[Schema] = []
    rejected: dict[str, int] = {}
    for number in range(attempts):
        if len(kept) >= count:
            break
        text = yield asks.variant(canonical, kept, language, seed + number)
        try:
            candidate = asks.json_in(text or "")
            problem = "no usable schema" if variant_problem(candidate, canonical) else ""
        except ValueError:
            candidate, problem = {}, "no JSON"
        taken = {canonical["name"], *(schema["name"] for schema in kept)}
        problem = problem or unfit(candidate, kept, taken, gate)
        if problem:
            rejected[problem] = rejected.get(problem, 0) + 1
        else:
            kept.append({key: candidate[key] for key in ("name", "description", "parameters")})
    return kept, rejected


def without_clashes(tools: Mapping[str, Sequence[Schema]]) -> dict[str, list[Schema]]:
    """The variants with a number behind every name that an earlier tool has already."""
    taken: set[str] = set()
    found: dict[str, list[Schema]] = {}
    for canonical, variants in tools.items():
        found[canonical] = []
        for schema in variants:
            name, number = schema["name"], 2
            while name in taken:
                name, number = f"{schema['name'][: LONGEST_NAME - len(f'_{number}')]}_{number}", number + 1
            taken.add(name)
            found[canonical].append(schema | {"name": name})
    return found


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """Words, different words and distinct-2 over some texts."""
    found = [word for text in texts for word in words(text)]
    return {"words": float(len(found)), "vocabulary": float(len(set(found))), "distinct_2": distinct(texts)}
