"""Similarity of tool calls by kind of parameter, over all calls of a batch at once.

    sim(u, v) = min over the fields of the tool of the field's similarity; 0 between different tools
    text  multiset Dice of normalised tokens, 2 |A n B| / (|A| + |B|)
    id    1 if equal, else 0
    box   intersection over union of (x1, y1, x2, y2)

A tool that the schema does not know has one field: the canonical JSON of all its arguments, compared as an id.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

KINDS = ("text", "id", "box")
TOLERANCE = 1e-9  # Dice values such as 0.8 sit exactly on a threshold
ROWS = 2048  # calls compared at a time, which bounds the memory of a product
ARTICLES = frozenset({"a", "an", "the"})
# Written without spaces: kana, Han ideographs with their extensions and compatibility forms.
UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Pairs = tuple[Ints, Ints, Floats]
Box = tuple[float, float, float, float]
NO_BOX = (math.nan, math.nan, math.nan, math.nan)
Field = tuple[str, str, defaultdict[Any, int]]  # name, kind, number of each feature


class _Separators(dict):
    """For str.translate, filled as characters appear: punctuation is a space, an unspaced character its own word."""

    def __missing__(self, code: int) -> str | int:
        character = chr(code)
        if unicodedata.category(character)[0] == "P":
            new: str | int = " "
        else:
            new = f" {character} " if any(low <= code <= high for low, high in UNSPACED) else code
        self[code] = new
        return new


_SEPARATORS = _Separators()
_ASCII = "".join(map(chr, range(128))).lower().translate(_SEPARATORS).encode().ljust(256)


def words(text: str) -> list[str]:
    """NFKC, lower case, punctuation to spaces, without a/an/the, CJK characters one by one."""
    if text.isascii():  # most queries are, and a table of bytes is the faster one
        text = text.encode().translate(_ASCII).decode()
    else:
        text = unicodedata.normalize("NFKC", text).lower().translate(_SEPARATORS)
    return [w for w in text.split() if w not in ARTICLES]


def text_features(value: Any) -> list[Any]:
    """The multiset of words as a set: the k-th repeat of a word is a feature of its own."""
    found = words(value) if isinstance(value, str) else []
    if len(set(found)) == len(found):
        return found
    repeats: defaultdict[str, Iterator[int]] = defaultdict(count)
    return [(word, k) if (k := next(repeats[word])) else word for word in found]


def id_features(value: Any) -> list[Any]:
    return [] if value is None or value == "" else [canonical(value)]


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)


FEATURES: dict[str, Callable[[Any], list[Any]]] = {
    "text": text_features,
    "id": id_features,
    "everything": id_features,
    "nothing": lambda value: [""],
}


def box_of(value: Any) -> list[Box]:
    """[(x1, y1, x2, y2)], or nothing if the value is not four finite numbers that span an area."""
    if not isinstance(value, (list, tuple)) or len(value) != 4 or not all(type(x) in (int, float) for x in value):
        return []
    try:
        x1, y1, x2, y2 = map(float, value)
    except OverflowError:
        return []
    return [(x1, y1, x2, y2)] if all(map(math.isfinite, (x1, y1, x2, y2))) and x2 > x1 and y2 > y1 else []


class Calls:
    """The different calls of a batch as numbers: `add` gives each its identity, `pairs` compares identities.

    schema: {tool: {field: text | id | box}}. Calls of the tools in `exclude` match nothing.
    """

    def __init__(self, schema: Mapping[str, Mapping[str, str]], exclude: Sequence[str] = ()) -> None:
        number = count()

        def field(name: str, kind: str) -> Field:
            # Each field numbers its own features, so that those of different fields and tools never meet.
            return name, kind, defaultdict(number.__next__)

        self._fields = defaultdict(lambda: [field("", "everything")])
        for tool, kinds in schema.items():
            # The first text or id field finds the candidates; boxes alone are candidates of each other.
            boxes_alone = all(kind == "box" for kind in kinds.values())
            self._fields[tool] = [field("", "nothing")] * boxes_alone + [field(*item) for item in kinds.items()]
        self._fields |= {tool: [] for tool in exclude}
        kinds = [list(fields.values()) for fields in schema.values()]
        sets = max((len(k) - k.count("box") for k in kinds), default=0) or 1
        boxes = max((k.count("box") for k in kinds), default=0)
        self._identity: dict[str, int] = {}  # of a call as written
        self._normalised: dict[tuple, int] = {}
        # Per slot, one entry per identity: how many features its text and id fields have, these features, its boxes.
        self._lengths: list[list[int]] = [[] for _ in range(sets)]
        self._flat: list[list[int]] = [[] for _ in range(sets)]
        self._boxes: list[list[Box]] = [[] for _ in range(boxes)]

    def __len__(self) -> int:
        return len(self._lengths[0])

    def add(self, call: Any) -> int:
        """The identity of a call, equal for calls that are equal once normalised; -1 if it can match nothing.

        That is an unparsable call, one of an excluded tool, and one with a field that is missing, empty or no region.
        """
        written = repr(call)
        known = self._identity.get(written)
        if known is None:
            known = self._identity[written] = self._add(call)
        return known

    def _add(self, call: Any) -> int:
        args = call.get("args") if isinstance(call, dict) else None
        if not isinstance(args, dict) or not isinstance(call.get("tool"), str):
            return -1
        sets: list[list[int]] = []
        boxes: list[Box] = []
        fields = self._fields[call["tool"]]
        for name, kind, numbers in fields:
            if kind == "box":
                boxes += box_of(args.get(name))
            elif features := FEATURES[kind](args if kind == "everything" else args.get(name)):
                sets.append([numbers[f] for f in features])
        if not fields or len(sets) + len(boxes) < len(fields):
            return -1
        key = (*sorted(chain(*sets)), *boxes)
        identity = self._normalised.setdefault(key, len(self))
        if identity == len(self):
            for slot, lengths in enumerate(self._lengths):
                numbers = sets[slot] if slot < len(sets) else []
                lengths.append(len(numbers))
                self._flat[slot] += numbers
            for slot, column in enumerate(self._boxes):
                column.append(boxes[slot] if slot < len(boxes) else NO_BOX)
        return identity

    def pairs(self, call_D: Ints, prompt_D: Ints, reference_D: NDArray[np.bool_], least: float) -> Pairs:
        """All (i, j, sim) with sim(i, j) >= least > 0, j a reference and both of one prompt.

        Entries are identities and the prompts that they occur in. The cost is that of the pairs with a shared feature.
        """
        references = np.flatnonzero(reference_D)
        features = [self._features(slot, call_D, prompt_D) for slot in range(len(self._flat))]
        found = []
        for start in range(0, len(call_D) if len(references) else 0, ROWS):
            i, j, sim = _dice(features[0], start, references)
            keep = sim >= least - TOLERANCE
            i, j, sim = i[keep], j[keep], sim[keep]
            for matrix in features[1:]:
                sim = np.minimum(sim, _dice_at(matrix, i, j))
            found.append((i, j, np.minimum(sim, self._overlap(call_D[i], call_D[j]))))
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        i, j, sim = (np.concatenate(column) for column in zip(*found, strict=True))
        keep = (sim > 0) & (sim >= least - TOLERANCE)
        return i[keep], j[keep], sim[keep]

    def _features(self, slot: int, call_D: Ints, prompt_D: Ints) -> csr_matrix:
        """(D, features of a prompt) 0/1 matrix; the product of two rows counts what they share."""
        length_C, flat = np.array(self._lengths[slot], np.int64), np.array(self._flat[slot], np.int64)
        ends_D = np.cumsum(length_C[call_D])
        pointer = np.concatenate([[0], ends_D])
        first_C = np.cumsum(length_C) - length_C
        within = np.arange(pointer[-1]) - np.repeat(pointer[:-1], length_C[call_D])
        feature = flat[np.repeat(first_C[call_D], length_C[call_D]) + within]
        key = np.repeat(prompt_D, length_C[call_D]) * (int(flat.max(initial=0)) + 1) + feature
        columns, column = np.unique(key, return_inverse=True)
        return csr_matrix((np.ones(len(column)), column, pointer), shape=(len(call_D), len(columns)))

    def _overlap(self, call_i: Ints, call_j: Ints) -> Floats:
        """(pairs,) least IoU over the box fields; infinite for a tool without any, so that it binds nothing."""
        least = np.full(len(call_i), np.inf)
        for column in self._boxes:
            boxes_C4 = np.array(column)
            has = ~np.isnan(boxes_C4[call_i, 0])
            least[has] = np.minimum(least[has], intersection_over_union(boxes_C4[call_i[has]], boxes_C4[call_j[has]]))
        return least


def _dice(matrix: csr_matrix, start: int, references: Ints) -> Pairs:
    """Dice of ROWS rows from `start` with the references that share a feature."""
    size_D = np.diff(matrix.indptr)
    shared = (matrix[start : start + ROWS] @ matrix[references].T).tocoo()
    i, j = start + shared.row, references[shared.col]
    return i, j, 2 * shared.data / (size_D[i] + size_D[j])


def _dice_at(matrix: csr_matrix, i: Ints, j: Ints) -> Floats:
    """Dice of given pairs; infinite where the tool has no such field."""
    both = np.asarray(matrix[i].multiply(matrix[j]).sum(axis=1)).reshape(-1)
    size = np.diff(matrix.indptr)[i] + np.diff(matrix.indptr)[j]
    return np.where(size == 0, np.inf, 2 * both / np.maximum(size, 1))


def intersection_over_union(a_P4: Floats, b_P4: Floats) -> Floats:
    """(P,) of boxes with a positive area each; 0 where an area overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        side = np.minimum(a_P4[:, 2:], b_P4[:, 2:]) - np.maximum(a_P4[:, :2], b_P4[:, :2])
        both = np.prod(np.maximum(side, 0), axis=1)
        areas = np.prod(a_P4[:, 2:] - a_P4[:, :2], axis=1) + np.prod(b_P4[:, 2:] - b_P4[:, :2], axis=1)
        return np.nan_to_num(both / (areas - both), nan=0.0, posinf=0.0, neginf=0.0)
