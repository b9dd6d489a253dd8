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
    commonest failing one, as a speculative strategy. Successes only: nothing. Empty paths are not stored.
    """
    counted = [Counter((path, won) for path, won in found if path) for found in outcomes]
    memory.add_questions(texts, embedding_BD, counted)
    for found, embedding_D in zip(counted, embedding_BD, strict=True):
        if not any(not won for _, won in found):
            continue
        success = _commonest(found, True)
        kind = "contrast" if success else "speculative"
        success = success or _similar_success(memory, embedding_D, neighbours)
        failure = _commonest(found, False, other_than=success)
        if success and failure:
            _learn(memory, success, failure, kind, born, write)


def _learn(memory: Memory, success: Path, failure: Path, kind: str, born: int, write: Writer) -> None:
    text, opposite = write(success, failure), write(failure, success)
    if text is None:
        return
    memory.add_strategy(text, kind, [(memory.path(success), True), (memory.path(failure), False)], born)
    if opposite is not None and (refuted := memory.find(opposite)) is not None:
        refuted.contradictions += 1


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
