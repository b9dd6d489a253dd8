"""Stage 3, before a word is written: offered tools, retrieved passages and the plan of one dialogue."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from methods.toolforge.bundles import FEW, MANY, Search, bundles_of, retrieve
from methods.toolforge.gate import DualGate
from methods.toolforge.items import Item, Passage, Skip
from methods.toolforge.labels import Call, Label, Rounds
from methods.toolforge.shapes import Shape
from methods.toolforge.tools import Bank, Schema

DISTRACTORS = (3, 8)  # tools offered beside the labelled ones


@dataclass(frozen=True)
class Offer:
    """The tools of one dialogue: schemas in the order shown; labelled canonical tool -> its variant; the general
    variant where the shape falls back on it; the variants that are wrong here."""

    schemas: tuple[Schema, ...]
    mapping: dict[str, Schema]
    general: Schema | None
    wrong: tuple[Schema, ...]


@dataclass(frozen=True)
class Draft:
    """All that a writer is told. bundles: one per step of the shape; gold: passages used in each round."""

    item: Item
    label: Label
    shape: Shape
    rounds: Rounds
    offer: Offer
    bundles: list[list[Passage]]
    gold: list[list[Passage]]
    language: str = "en"

    def calls(self, round_number: int) -> tuple[Call, ...]:
        """The planned calls of a round, from 1."""
        return self.rounds[round_number - 1]


def offer_tools(label: Label, shape: Shape, bank: Bank, rng: random.Random) -> Offer:
    """One random variant per canonical tool: the labelled ones, 3 to 8 others, and for a fallback shape the general
    one, shuffled. Raises Skip for a labelled tool that the bank lacks and for the general tool as the label of a
    fallback shape."""
    drawn = bank.draw(rng)
    missing = [name for name in label.tools if name not in drawn]
    if missing or not label.tools:
        raise Skip("label", "a labelled tool is not in the bank", ", ".join(missing))
    if shape.fallback and bank.general in label.tools:
        raise Skip("label", "the label of a fallback shape is the general tool")
    if shape.fallback and bank.general not in drawn:
        raise Skip("label", "the bank has no general tool for a fallback shape")
    others = [name for name in drawn if name not in label.tools and name != bank.general]
    chosen = rng.sample(others, min(len(others), rng.randint(*DISTRACTORS)))
    general = drawn[bank.general] if shape.fallback else None
    schemas = [drawn[name] for name in (*label.tools, *chosen)] + ([general] if general else [])
    rng.shuffle(schemas)
    mapping = {name: drawn[name] for name in label.tools}
    return Offer(tuple(schemas), mapping, general, tuple(drawn[name] for name in chosen))


def draft(
    item: Item,
    label: Label,
    shape: Shape,
    rounds: Rounds,
    offer: Offer,
    rng: random.Random,
    search: Search,
    gate: DualGate | None = None,
    language: str = "en",
    hits: tuple[tuple[int, int], tuple[int, int]] = (FEW, MANY),
) -> Draft:
    """The draft of one dialogue. Raises Skip where shape and plan do not fit or there are too few distractors."""
    fits(shape, rounds)
    if any("tool" in step.mistake for step in shape.steps) and not offer.wrong:
        raise Skip("label", "no tool is left to be the wrong one")
    found, gold = retrieve(item, shape, rounds, search, rng, gate, hits)
    bundles = bundles_of(shape, found, gold, rng)
    return Draft(item, label, shape, rounds, offer, bundles, gold, language)


def fits(shape: Shape, rounds: Rounds) -> None:
    """Raises Skip unless the plan has the rounds and calls of the shape's family."""
    counts = [len(level) for level in rounds]
    several = max(counts, default=0) > 1
    if len(rounds) != (1 if shape.family in "AB" else 2) or several != (shape.family in "BD") or 0 in counts:
        raise Skip("plan", "plan does not fit the shape", f"{shape.name} with calls {counts}")


def checked_plan(rounds: Rounds, item: Item, mapping: Mapping[str, Schema]) -> Rounds:
    """A model's plan after the checks before the write step: every call a labelled tool with a query and all required
    parameters, every gold passage found in exactly one round, and one at least in each. Raises Skip."""
    found: list[int] = []
    by_variant = {schema["name"]: name for name, schema in mapping.items()}
    clean: list[tuple[Call, ...]] = []
    for level in rounds:
        calls = []
        for call in level:
            name = by_variant.get(call.tool, call.tool)
            if name not in mapping:
                raise Skip("plan", "a planned call names no labelled tool", call.tool)
            required = mapping[name]["parameters"]["required"]
            lacking = [key for key in required if key not in (call.arguments or {})]
            if not call.query.strip() or lacking:
                raise Skip("plan", "a planned call lacks a required parameter", ", ".join(lacking) or "query")
            calls.append(replace(call, tool=name))
        found += sorted({place for call in calls for place in call.passages})
        if not any(call.passages for call in calls):
            raise Skip("plan", "a planned round finds no passage")
        clean.append(tuple(calls))
    if sorted(found) != list(range(len(item.gold))):
        raise Skip("plan", "the plan does not give every gold passage to exactly one round", str(found))
    if set(by_variant.values()) != {call.tool for level in clean for call in level}:
        raise Skip("plan", "a labelled tool is not called")
    return tuple(clean)


def titles(passages: Sequence[Passage], most: int = 2) -> list[str]:
    """Titles of a result, each once, the first few."""
    return list(dict.fromkeys(passage.title for passage in passages))[:most]
