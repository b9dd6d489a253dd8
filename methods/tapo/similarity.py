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
from collections.abc import Iterator, Mapping
from itertools import count
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


def words(text: str) -> list[str]:
    """NFKC, lower case, punctuation to spaces, without a/an/the, CJK characters one by one."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return [w for w in text.lower().translate(_SEPARATORS).split() if w not in ARTICLES]


def text_features(value: Any) -> list[Any]:
    """The multiset of words as a set: the k-th repeat of a word is a feature of its own."""
    found = words(value) if isinstance(value, str) else []
    if len(set(found)) == len(found):
        return found
    repeats: defaultdict[str, Iterator[int]] = defaultdict(count)
    return [(word, next(repeats[word])) for word in found]


def id_features(value: Any) -> list[Any]:
    return [] if value is None or value == "" else [canonical(value)]


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)


def box_of(value: Any) -> tuple[float, ...] | None:
    """(x1, y1, x2, y2), or None if it is not four finite numbers that span an area."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in value):
        return None
    try:
        x1, y1, x2, y2 = box = tuple(map(float, value))
    except OverflowError:
        return None
    return box if all(map(math.isfinite, box)) and x2 > x1 and y2 > y1 else None


class Calls:
    """The different calls of a batch as numbers: `add` gives each its identity, `pairs` compares identities.

    schema: {tool: {field: text | id | box}}. Calls of the tools in `exclude` have no identity.
    """

    def __init__(self, schema: Mapping[str, Mapping[str, str]], exclude: frozenset[str] = frozenset()) -> None:
        self.schema, self.exclude = schema, exclude
        number = count()
        # Features of different tools and fields never meet.
        self._numbers: defaultdict[Any, defaultdict[Any, int]] = defaultdict(lambda: defaultdict(number.__next__))
        self._identity: dict[str, int] = {}  # of a call as written
        self._normalised: dict[Any, int] = {}
        self._sets: list[list[list[int]]] = []  # per identity and slot, the features of its text and id fields
        self._boxes: list[list[tuple[float, ...]]] = []

    def __len__(self) -> int:
        return len(self._sets)

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
        if not isinstance(call, dict) or call.get("tool") in self.exclude:
            return -1
        tool, args = call.get("tool"), call.get("args")
        fields = self.schema.get(tool) if isinstance(tool, str) else None
        sets, boxes = [], []
        if fields is None:
            sets.append(self._numbered((repr(tool), None), [canonical(args)]))
        for name, kind in (fields or {}).items():
            value = args.get(name) if isinstance(args, dict) else None
            if kind == "box":
                boxes.append(box_of(value))
            else:
                features = text_features(value) if kind == "text" else id_features(value)
                sets.append(self._numbered((tool, name), features))
        if not all(sets) or None in boxes:
            return -1
        # The first slot finds the candidates; boxes alone are candidates of each other.
        sets = sets or [self._numbered((tool, None), [""])]
        key = (tuple(frozenset(s) for s in sets), tuple(boxes))
        identity = self._normalised.setdefault(key, len(self._sets))
        if identity == len(self._sets):
            self._sets.append(sets)
            self._boxes.append(boxes)
        return identity

    def _numbered(self, field: Any, features: list[Any]) -> list[int]:
        numbers = self._numbers[field]
        return [numbers[f] for f in features]

    def pairs(self, call_D: Ints, prompt_D: Ints, reference_D: NDArray[np.bool_], least: float) -> Pairs:
        """All (i, j, sim) with sim(i, j) >= least > 0, j a reference and both of one prompt.

        Entries are identities and the prompts that they occur in. The cost is that of the pairs with a shared feature.
        """
        references = np.flatnonzero(reference_D)
        slots = max(map(len, self._sets), default=0)
        features = [self._features(slot, call_D, prompt_D) for slot in range(slots)]
        found = []
        for start in range(0, len(call_D) if len(references) else 0, ROWS):
            part = np.arange(start, min(start + ROWS, len(call_D)))
            i, j, sim = _dice(features[0], part, references)
            keep = sim >= least - TOLERANCE
            i, j, sim = i[keep], j[keep], sim[keep]
            for matrix in features[1:]:
                sim = np.minimum(sim, _dice_at(matrix, i, j))
            found.append((i, j, np.minimum(sim, self._overlap(call_D[i], call_D[j]))))
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        i, j, sim = (np.concatenate(column) for column in zip(*found, strict=True))
        keep = sim >= least - TOLERANCE
        return i[keep], j[keep], sim[keep]

    def _features(self, slot: int, call_D: Ints, prompt_D: Ints) -> csr_matrix:
        """(D, features of a prompt) 0/1 matrix; the product of two rows counts what they share."""
        sets = [s[slot] if slot < len(s) else [] for s in self._sets]
        length_C = np.fromiter(map(len, sets), np.int64, len(sets))
        flat = np.fromiter((f for s in sets for f in s), np.int64, int(length_C.sum()))
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
        most = max(map(len, self._boxes), default=0)
        least = np.full(len(call_i), np.inf)
        for slot in range(most):
            boxes_C4 = np.array([b[slot] if slot < len(b) else [np.nan] * 4 for b in self._boxes])
            has = ~np.isnan(boxes_C4[call_i, 0])
            least[has] = np.minimum(least[has], intersection_over_union(boxes_C4[call_i[has]], boxes_C4[call_j[has]]))
        return least


def _dice(matrix: csr_matrix, rows: Ints, references: Ints) -> Pairs:
    size_D = np.diff(matrix.indptr)
    shared = (matrix[rows] @ matrix[references].T).tocoo()
    i, j = rows[shared.row], references[shared.col]
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
