"""How the memory grows: rollouts become paths, contrasts of paths become strategies, weak strategies go (sheet 3.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from methods.graph_memory.graph import KINDS, Edges, Memory, Strategy, joined, normalised
from methods.graph_memory.machine import Path, strategy
from methods.graph_memory.relevance import Floats, Ints, nearest_of, unit

LEAST_CONFIDENCE, LEAST_OBSERVATIONS = 0.3, 5

Outcome = tuple[Path, bool]
Writer = Callable[[Path, Path], str | None]


def absorb(
    memory: Memory,
    texts: Sequence[str],
    embedding_BD: Floats,
    outcomes: Sequence[Sequence[Outcome]],
    *,
    born: int,
    neighbours: int,
    write: Writer = strategy,
) -> None:
    """Stores questions with the paths of their rollouts, and what their contrasts teach.

    A success and a failure: the commonest successful path against the commonest other failing one. Failures only:
    the commonest successful path of the `neighbours` most similar stored questions that have one, against the
    commonest failing one, as a speculative strategy. Successes only: no strategy. Empty paths are not stored. A
    question that is met again counts with all its rollouts.

    A question where a path won that a strategy avoids contradicts it once, unless it supports it: one that the strategy
    was contrasted with, or the successful side of the opposite contrast.
    """
    counted = [Counter((path, won) for path, won in found if path) for found in outcomes]
    memory.add_questions(texts, embedding_BD, counted)
    for text, embedding_D in zip(texts, embedding_BD, strict=True):
        found = memory.outcomes(text)
        success = _commonest(found, True)
        kind = "contrast" if success else "speculative"
        won = {path for path, success in found if success}
        supported = refuted = None
        if any(not success for _, success in found):
            success = success or _similar_success(memory, embedding_D, neighbours)
            failure = _commonest(found, False, other_than=success)
            if success and failure:
                supported, refuted = write(success, failure), write(failure, success)
                if supported is not None:
                    evidence = [(memory.path(success), True), (memory.path(failure), False)]
                    memory.add_strategy(supported, kind, evidence, born)
        _contradict(memory, won, supported, refuted)


def _contradict(memory: Memory, won: set[Path], supported: str | None, refuted: str | None) -> None:
    edges = memory.to_strategies
    avoided_E = (edges.count_E2[:, 1] > 0) & np.isin(edges.source_E, [memory.path(path) for path in won])
    against = [memory.strategies[k] for k in np.unique(edges.target_E[avoided_E])]
    opposite, spared = memory.find(refuted or ""), memory.find(supported or "")
    if opposite is not None and opposite not in against:
        against.append(opposite)
    for known in against:
        known.contradictions += known is not spared


def plant(memory: Memory, texts: Sequence[str]) -> None:
    """Hangs strategies that nobody learned on every path."""
    paths = [(path, True) for path in range(len(memory.paths))]
    for text in texts:
        memory.add_strategy(text, "planted", paths, born=0)


def prune(memory: Memory, most: int) -> None:
    """Drops strategies that evidence refutes, then the least confident ones, younger first, beyond `most`."""
    keep_M = np.array(
        [s.confidence >= LEAST_CONFIDENCE or s.observations < LEAST_OBSERVATIONS for s in memory.strategies], bool
    )
    confident = sorted(np.flatnonzero(keep_M).tolist(), key=lambda k: (-memory.strategies[k].confidence, k))
    keep_M[confident[most:]] = False
    if not keep_M.all():
        memory.keep_strategies(keep_M)


def merge(first: Memory, second: Memory) -> Memory:
    """Both memories as one: equal nodes are one, evidence adds up, the weights of common edges are averaged.

    DataError for embeddings of different encoders.
    """
    if first.questions:
        first.refuse_other_width(second.embedding_QD if second.questions else first.embedding_QD)
    both = (first, second)
    question, path, one = ({} for _ in range(3))
    for memory in both:
        for number, nodes in ((question, memory.questions), (path, memory.paths)):
            for node in nodes:
                number.setdefault(node, len(number))
        for s in memory.strategies:
            one[normalised(s.text)] = _united(one[normalised(s.text)], s) if normalised(s.text) in one else replace(s)
    strategy_of = {text: i for i, text in enumerate(one)}
    new = [text not in first.index_of for text in second.questions]
    stored = [m.embedding_QD[keep] for m, keep in ((first, slice(None)), (second, new)) if m.questions]
    numbers = [
        (
            np.array([question[q] for q in memory.questions], np.int64),
            np.array([path[p] for p in memory.paths], np.int64),
            np.array([strategy_of[normalised(s.text)] for s in memory.strategies], np.int64),
        )
        for memory in both
    ]
    return Memory(
        list(question),
        np.concatenate(stored) if stored else first.embedding_QD,
        list(path),
        list(one.values()),
        joined([_renumbered(m.to_paths, q, p) for m, (q, p, _) in zip(both, numbers, strict=True)], mean=True),
        joined([_renumbered(m.to_strategies, p, s) for m, (_, p, s) in zip(both, numbers, strict=True)], mean=True),
    )


def _united(a: Strategy, b: Strategy) -> Strategy:
    kind = min(a.kind, b.kind, key=KINDS.index)
    return Strategy(a.text, kind, a.support + b.support, a.contradictions + b.contradictions, min(a.born, b.born))


def _renumbered(edges: Edges, source: Ints, target: Ints) -> Edges:
    return replace(edges, source_E=source[edges.source_E], target_E=target[edges.target_E])


def _commonest(found: Counter, won: bool, other_than: Path | None = None) -> Path | None:
    """The path that most rollouts took; of equally common ones the first."""
    counts = {path: n for (path, success), n in found.items() if success == won and path != other_than}
    return max(counts, key=counts.__getitem__, default=None)


def _similar_success(memory: Memory, embedding_D: Floats, neighbours: int) -> Path | None:
    edges = memory.to_paths
    won_E = edges.count_E2[:, 0] > 0
    known = np.unique(edges.source_E[won_E])
    similarity = unit(embedding_D[None]) @ memory.embedding_QD[known].T
    near_E = won_E & np.isin(edges.source_E, known[nearest_of(similarity, neighbours)[1]])
    counts = np.bincount(edges.target_E[near_E], edges.count_E2[near_E, 0])
    return memory.paths[int(counts.argmax())] if len(counts) else None
