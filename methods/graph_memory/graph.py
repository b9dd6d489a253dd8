"""The three-layer memory: questions, canonical paths, strategies, and the weighted edges between them.

Sizes: Q stored questions, D embedding, J paths, M strategies, E edges, B new questions. The paper writes edge masks A
and weights W as matrices; here both are lists of edges, so that what is not an edge has no weight to learn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from methods.errors import DataError
from methods.graph_memory.machine import Path
from methods.graph_memory.relevance import Floats, Ints, nearest_of, unit

LEAST_WEIGHT, MOST_WEIGHT = 0.01, 5.0  # at 0 an edge would cut the other edge of its path off from any gradient
ROWS = 64  # questions compared with the store at a time, which bounds the memory
KINDS = ("contrast", "speculative", "planted")


@dataclass
class Strategy:
    """A short advice. Evidence is questions: `support` for it, `contradictions` where what it avoids won."""

    text: str
    kind: str = "contrast"
    support: int = 0
    contradictions: int = 0
    born: int = 0

    @property
    def observations(self) -> int:
        return self.support + self.contradictions

    @property
    def confidence(self) -> float:
        """support / (support + contradictions); 1 without evidence."""
        return self.support / self.observations if self.observations else 1.0


@dataclass
class Edges:
    """Edges sorted by (source, target), each once. `count_E2`: the successes and failures that they stand for."""

    source_E: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    target_E: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    weight_E: Floats = field(default_factory=lambda: np.zeros(0))
    count_E2: Ints = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def __len__(self) -> int:
        return len(self.source_E)

    def kept(self, keep_E: NDArray[np.bool_]) -> Edges:
        return Edges(self.source_E[keep_E], self.target_E[keep_E], self.weight_E[keep_E], self.count_E2[keep_E])


def joined(parts: Sequence[Edges], mean: bool = False) -> Edges:
    """The edges of all parts; counts add up, an edge of several parts keeps the first weight, or takes their mean."""
    source, target = (np.concatenate([getattr(p, name) for p in parts]) for name in ("source_E", "target_E"))
    weight = np.concatenate([p.weight_E for p in parts])
    order = np.lexsort((target, source))  # stable: an earlier part comes first
    source, target, weight = source[order], target[order], weight[order]
    new = np.ones(len(source), bool)
    new[1:] = (source[1:] != source[:-1]) | (target[1:] != target[:-1])
    group = np.cumsum(new) - 1
    count = np.zeros((int(new.sum()), 2), np.int64)
    np.add.at(count, group, np.concatenate([p.count_E2 for p in parts])[order])
    if mean:
        return Edges(source[new], target[new], np.bincount(group, weight) / np.bincount(group), count)
    return Edges(source[new], target[new], weight[new], count)


@dataclass
class Activation:
    """What a batch of new questions wakes.

    N neighbours, in order of the new question, then of the stored one; L edges of the neighbours to paths, by their
    place in `to_paths`, each with its row and the similarity of its neighbour.
    """

    row_N: Ints
    question_N: Ints
    similarity_N: Floats
    edge_L: Ints
    row_L: Ints
    similarity_L: Floats
    hop_BJ: Floats
    relevance_BM: Floats


@dataclass
class Memory:
    """The stored layers. Embeddings are unit vectors, or zero. DataError for parts that do not fit together."""

    questions: list[str] = field(default_factory=list)
    embedding_QD: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    paths: list[Path] = field(default_factory=list)
    strategies: list[Strategy] = field(default_factory=list)
    to_paths: Edges = field(default_factory=Edges)  # questions -> paths
    to_strategies: Edges = field(default_factory=Edges)  # paths -> strategies

    def __post_init__(self) -> None:
        self.index_of = {text: i for i, text in enumerate(self.questions)}
        self._path_of = {path: i for i, path in enumerate(self.paths)}
        self._strategy_of = {normalised(s.text): i for i, s in enumerate(self.strategies)}
        self.embedding_QD = np.asfortranarray(self.embedding_QD)  # retrieval reads columns
        self.check()

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self.questions), len(self.paths), len(self.strategies)

    def check(self) -> None:
        """DataError for a dangling edge, a repeated node, a weight outside its range, or rows that do not match."""
        Q, J, M = self.sizes
        self._check_values()
        for name, edges, rows, columns in (
            ("question -> path", self.to_paths, Q, J),
            ("path -> strategy", self.to_strategies, J, M),
        ):
            ends = ((edges.source_E, rows), (edges.target_E, columns))
            dangling = [int(i) for ids, size in ends for i in ids[(ids < 0) | (ids >= size)]]
            if dangling:
                raise _bad(f"an edge {name} leads to a node that does not exist", f"node {dangling[0]}")
            inside = (edges.weight_E >= LEAST_WEIGHT) & (edges.weight_E <= MOST_WEIGHT)
            if not inside.all():
                expected = f"{LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
                raise _bad(f"an edge {name} has an impossible weight", edges.weight_E[~inside][0], expected)
            if not len(edges) == len(edges.target_E) == len(edges.weight_E) == len(edges.count_E2):
                raise _bad(f"the columns of the edges {name} differ in length", len(edges))
            steps = np.diff(edges.source_E * max(columns, 1) + edges.target_E)
            if (steps <= 0).any():
                raise _bad(f"the edges {name} are not in order, or one is there twice", int(np.argmax(steps <= 0)))
        layers = (("question", Q, self.index_of), ("path", J, self._path_of), ("strategy", M, self._strategy_of))
        for name, size, known in layers:
            if size != len(known):
                raise _bad(f"a {name} is there twice", f"{size - len(known)} repeats")
        if len(self.embedding_QD) != Q:
            raise _bad("questions and embeddings differ in number", f"{Q} and {len(self.embedding_QD)}")

    def _check_values(self) -> None:
        """DataError for values of another type or shape than those that are declared above."""
        texts = [*self.questions, *(state for path in self.paths for state in path), *(s.text for s in self.strategies)]
        for text in texts:
            if not isinstance(text, str):
                raise _bad("a question, a state or a strategy is no text", text)
        for s in self.strategies:
            counts = (s.support, s.contradictions, s.born)
            if s.kind not in KINDS or any(not isinstance(n, int) or n < 0 for n in counts):
                raise _bad("a strategy has an impossible kind or count", f"{s.kind} {counts}", ", ".join(KINDS))
        if self.embedding_QD.dtype.kind != "f" or self.embedding_QD.ndim != 2:
            raise _bad("embeddings are rows of floats", f"{self.embedding_QD.dtype} {self.embedding_QD.shape}")
        if not np.isfinite(self.embedding_QD).all():
            raise _bad("an embedding is not finite", "NaN or infinity")
        columns = {"source_E": ("i", ()), "target_E": ("i", ()), "weight_E": ("f", ()), "count_E2": ("i", (2,))}
        for edges in (self.to_paths, self.to_strategies):
            for name, (kind, rest) in columns.items():
                x = getattr(edges, name)
                if x.dtype.kind != kind or not x.ndim or x.shape[1:] != rest:
                    raise _bad(f"{name} of its edges has an impossible type or shape", f"{x.dtype} {x.shape}")
            if (edges.count_E2 < 0).any():
                raise _bad("an edge stands for fewer than no rollouts", int(edges.count_E2.min()))

    # ---- growing ----
    def add_questions(self, texts: Sequence[str], embedding_BD: Floats, outcomes: Sequence[Counter]) -> None:
        """Questions with `outcomes[b][path, success]` rollouts; a known question's counts add up, its weights stay."""
        self.refuse_other_width(embedding_BD)
        rows: list[tuple[int, int, bool, int]] = []
        fresh = []
        for b, (text, found) in enumerate(zip(texts, outcomes, strict=True)):
            if text not in self.index_of:
                self.index_of[text] = len(self.questions)
                self.questions.append(text)
                fresh.append(b)
            rows += [(self.index_of[text], self.path(p), won, n) for (p, won), n in found.items()]
        if fresh:
            stored_QD = self.embedding_QD if self.embedding_QD.size else np.zeros_like(embedding_BD[:0])
            self.embedding_QD = np.asfortranarray(np.concatenate([stored_QD, unit(embedding_BD[fresh])]))
        self.to_paths = joined([self.to_paths, _edges(rows, 1.0)])

    def outcomes(self, text: str) -> Counter:
        """How often each (path, success) was met on a stored question, older paths first."""
        edges, question = self.to_paths, self.index_of[text]
        mine = slice(*(int(np.searchsorted(edges.source_E, question, side)) for side in ("left", "right")))
        found: Counter = Counter()
        for path, counts in zip(edges.target_E[mine], edges.count_E2[mine], strict=True):
            found |= {(self.paths[path], won): int(n) for won, n in zip((True, False), counts, strict=True) if n}
        return found

    def path(self, states: Path) -> int:
        if states not in self._path_of:
            self._path_of[states] = len(self.paths)
            self.paths.append(states)
        return self._path_of[states]

    def find(self, text: str) -> Strategy | None:
        k = self._strategy_of.get(normalised(text))
        return None if k is None else self.strategies[k]

    def add_strategy(self, text: str, kind: str, evidence: Sequence[tuple[int, bool]], born: int) -> None:
        """One more question of support, with edges from the paths of `evidence` (path, success).

        Equal text is the same strategy. A speculative one becomes `contrast` with its first contrast; a new edge of a
        strategy that is still speculative weighs 0.5.
        """
        known = self.find(text)
        if known is None:
            known = Strategy(text, kind, born=born)
            self._strategy_of[normalised(text)] = len(self.strategies)
            self.strategies.append(known)
        elif kind == "contrast" and known.kind == "speculative":
            known.kind = kind
        k = self._strategy_of[normalised(text)]
        known.support += kind != "planted"
        rows = [(path, k, won, int(kind != "planted")) for path, won in evidence]
        self.to_strategies = joined([self.to_strategies, _edges(rows, 0.5 if known.kind == "speculative" else 1.0)])

    def keep_strategies(self, keep_M: NDArray[np.bool_]) -> None:
        """Drops the other strategies with their edges."""
        number_M = np.cumsum(keep_M) - 1
        edges = self.to_strategies.kept(keep_M[self.to_strategies.target_E])
        self.to_strategies = replace(edges, target_E=number_M[edges.target_E])
        self.strategies = [s for s, keep in zip(self.strategies, keep_M, strict=True) if keep]
        self._strategy_of = {normalised(s.text): i for i, s in enumerate(self.strategies)}

    # ---- retrieval ----
    def activate(self, embedding_BD: Floats, neighbours: int) -> Activation:
        """rho = (A_tm * W_tm)^T (A_qt * W_qt)^T s per new question, s the cosines of its nearest stored ones.

        s is clipped to [0, 1]: a negative similarity would flip the credit. Equal similarities: the older question.
        """
        B, J = len(embedding_BD), len(self.paths)
        row_N, question_N, similarity_N = self.neighbours(embedding_BD, neighbours)
        qt = self.to_paths
        first_N, last_N = (np.searchsorted(qt.source_E, question_N, side) for side in ("left", "right"))
        size_N = last_N - first_N
        # All edges of all neighbours in one list: the start of each neighbour's edges, counted on from there.
        edge_L = np.repeat(first_N - (np.cumsum(size_N) - size_N), size_N) + np.arange(size_N.sum())
        row_L, similarity_L = np.repeat(row_N, size_N), np.repeat(similarity_N, size_N)
        carried_L = similarity_L * qt.weight_E[edge_L]
        hop_BJ = np.bincount(row_L * J + qt.target_E[edge_L], carried_L, B * J).reshape(B, J).astype(float)
        relevance_BM = hop_BJ @ self.strategy_weights()
        return Activation(row_N, question_N, similarity_N, edge_L, row_L, similarity_L, hop_BJ, relevance_BM)

    def neighbours(self, embedding_BD: Floats, count: int) -> tuple[Ints, Ints, Floats]:
        """(N,) rows, stored questions and cosines in (0, 1] of the `count` nearest stored questions of each row."""
        self.refuse_other_width(embedding_BD)
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
        for start in range(0, len(embedding_BD) if self.questions else 0, ROWS):
            part_BD, stored_DQ = unit(embedding_BD[start : start + ROWS]), self.embedding_QD.T
            used = np.flatnonzero(part_BD.any(axis=0))
            if 2 * len(used) < part_BD.shape[1]:  # hashed words of short questions: most columns add nothing
                part_BD, stored_DQ = part_BD[:, used], stored_DQ[used]
            part_BD = part_BD.astype(stored_DQ.dtype)
            # Of the products at hand this one, on one thread, is the fastest for few rows and many columns.
            similarity_BQ = (torch.from_numpy(part_BD) @ torch.from_numpy(stored_DQ)).numpy()
            row, column = nearest_of(similarity_BQ, count)
            found.append((row + start, column, np.minimum(similarity_BQ[row, column], 1.0)))
        row_N, question_N, similarity_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return row_N, question_N, similarity_N

    def strategy_weights(self) -> Floats:
        """(J, M) weights from paths to strategies, 0 where there is no edge."""
        tm, weight_JM = self.to_strategies, np.zeros((len(self.paths), len(self.strategies)))
        weight_JM[tm.source_E, tm.target_E] = tm.weight_E
        return weight_JM

    def mean_weights(self) -> Floats:
        """(M,) mean weight of the edges that lead to each strategy; 0 for one without edges."""
        tm, M = self.to_strategies, len(self.strategies)
        return np.bincount(tm.target_E, tm.weight_E, M) / np.maximum(np.bincount(tm.target_E, minlength=M), 1)

    def refuse_other_width(self, embedding_BD: Floats) -> None:
        mine, theirs = self.embedding_QD.shape[1], embedding_BD.shape[1]
        if self.questions and mine != theirs:
            raise _bad("its embeddings were made by another encoder", f"{theirs} numbers each", f"{mine}")

    # ---- learning ----
    def gradients(self, woken: Activation, slope_BM: Floats) -> tuple[Floats, Floats]:
        """Of the loss, from `slope_BM` = dL/drho, on the weights of both kinds of edges, summed over questions.

        dL/dw_tm(j,l) = h_j dL/drho_l with h = (A_qt * W_qt)^T s,  dL/dw_qt(i,j) = s_i sum_l w_tm(j,l) dL/drho_l.
        """
        qt, tm = self.to_paths, self.to_strategies
        to_strategies_E = (woken.hop_BJ.T @ slope_BM)[tm.source_E, tm.target_E]
        back_BJ = slope_BM @ self.strategy_weights().T
        slope_L = woken.similarity_L * back_BJ[woken.row_L, qt.target_E[woken.edge_L]]
        return np.bincount(woken.edge_L, slope_L, len(qt)).astype(float), to_strategies_E

    def step(self, gradients: tuple[Floats, Floats], learning_rate: float) -> None:
        """w <- clip(w - eta dL/dw)."""
        for edges, gradient_E in zip((self.to_paths, self.to_strategies), gradients, strict=True):
            edges.weight_E = np.clip(edges.weight_E - learning_rate * gradient_E, LEAST_WEIGHT, MOST_WEIGHT)


def _edges(rows: Sequence[tuple[int, int, bool, int]], weight: float) -> Edges:
    """From (source, target, success, count)."""
    source, target, won, count = (np.array([r[k] for r in rows], np.int64) for k in range(4))
    return Edges(source, target, np.full(len(rows), weight), np.stack([count * won, count * (1 - won)], axis=1))


def normalised(text: str) -> str:
    """Strategies with the same words are one."""
    return " ".join(text.lower().split()).rstrip(".")


def state_of(memory: Memory) -> dict[str, Any]:
    """The memory as tensors and JSON values."""

    def tensors(edges: Edges) -> dict[str, Tensor]:
        return {name: torch.from_numpy(values.copy()) for name, values in vars(edges).items()}

    return {
        "questions": list(memory.questions),
        "embedding_QD": torch.from_numpy(memory.embedding_QD.copy()),
        "paths": [list(path) for path in memory.paths],
        "strategies": [vars(s).copy() for s in memory.strategies],
        "to_paths": tensors(memory.to_paths),
        "to_strategies": tensors(memory.to_strategies),
    }


def memory_of(state: Mapping[str, Any]) -> Memory:
    """The memory that `state_of` described. DataError if it is damaged."""
    return Memory(
        list(state["questions"]),
        state["embedding_QD"].numpy(),
        [tuple(path) for path in state["paths"]],
        [Strategy(**s) for s in state["strategies"]],
        *(Edges(**{n: x.numpy() for n, x in state[name].items()}) for name in ("to_paths", "to_strategies")),
    )


def _bad(what: str, got: object, expected: str = "") -> DataError:
    return DataError(f"The memory is damaged: {what}", where="graph memory", got=got, expected=expected)
