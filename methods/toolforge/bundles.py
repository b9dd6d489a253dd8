"""Stage 3, the results: which passages each tool message shows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from methods.toolforge.gate import DualGate
from methods.toolforge.items import Item, Passage, Skip
from methods.toolforge.labels import Rounds
from methods.toolforge.shapes import Shape
from methods.toolforge.text import Bm25

Search = Callable[[str, int], list[Passage]]
"""Passages of an item's distractor pool for a query, best first; none that has nothing in common with it."""

FEW, MANY = (5, 10), (15, 30)  # hits of a call; of a call that fails three times
SPARE = 5  # hits asked for beyond those, in place of what the gate drops


def pool_search(pool: Sequence[Passage]) -> Search:
    """BM25 over title and content; at most as many hits as the pool has, none with score 0."""
    index = Bm25([f"{passage.title} {passage.content}" for passage in pool])
    return lambda query, k: [pool[i] for i in index.top(query, k)]


def thirds(hits: Sequence[Passage]) -> dict[str, list[Passage]]:
    """x, y, z: with t = floor(len/3) the worst part hits[2t:], the middle hits[t:2t] and the best third hits[:t]."""
    t = len(hits) // 3
    return {"x": list(hits[2 * t :]), "y": list(hits[t : 2 * t]), "z": list(hits[:t])}


def merged(*lists: Sequence[Passage]) -> list[Passage]:
    """The passages of several lists, each content once."""
    return list({passage.content: passage for part in lists for passage in part}.values())


def bundles_of(
    shape: Shape, hits: Sequence[Sequence[Passage]], gold: Sequence[Sequence[Passage]], rng: random.Random
) -> list[list[Passage]]:
    """One bundle per step, from hits (best first) and gold passages of each round:

        g  hits + gold, or after a ladder its best third + gold;  b  hits;  x y z  `thirds` of the hits

    each without repeated contents and shuffled. Raises Skip where a step would have nothing to show or the ladder
    fewer than three hits.
    """
    found = []
    for step in shape.steps:
        parts = thirds(hits[step.round - 1])
        if step.kind == "g":
            ladder = any(s.kind == "x" and s.round == step.round for s in shape.steps)
            shown = merged(gold[step.round - 1], parts["z"] if ladder else hits[step.round - 1])
        else:
            shown = merged(hits[step.round - 1] if step.kind == "b" else parts[step.kind])
        if not shown:
            raise Skip("retrieve", "too few distractors for the shape")
        rng.shuffle(shown)
        found.append(shown)
    return found


def retrieve(
    item: Item,
    shape: Shape,
    rounds: Rounds,
    search: Search,
    rng: random.Random,
    gate: DualGate | None = None,
    hits: tuple[tuple[int, int], tuple[int, int]] = (FEW, MANY),
) -> tuple[list[list[Passage]], list[list[Passage]]]:
    """Hits and gold passages of each round, pooled over its calls, best first. k is drawn from `hits[0]`, or `hits[1]`
    for the round with a ladder. `gate` keeps a hit that is near in meaning to the gold passages of its round and no
    copy of them in wording. D2 finds the gold passages of both hops in its one round."""
    pooled, gold = [], []
    for number, calls in enumerate(rounds[: shape.rounds], start=1):
        served = calls if shape.rounds == len(rounds) else [call for level in rounds for call in level]
        support = merged([item.gold[i] for call in served for i in call.passages])
        ladder = any(step.kind == "x" and step.round == number for step in shape.steps)
        ranked = []
        for call in calls:
            k = rng.randint(*hits[ladder])
            near = [hit for hit in search(call.query, k + SPARE) if passes(hit, support, gate)]
            ranked.append(near[:k])
        # In turns, so that the thirds of a ladder hold the best, middle and worst of every call.
        depth = max(map(len, ranked), default=0)
        pooled.append(merged([part[i] for i in range(depth) for part in ranked if i < len(part)]))
        gold.append(support)
    return pooled, gold


def passes(hit: Passage, support: Sequence[Passage], gate: DualGate | None) -> bool:
    """Whether a hit is a hard negative by the gate (always without one)."""
    return gate is None or gate.accepts(hit.content, [passage.content for passage in support])
