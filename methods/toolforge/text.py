"""Words, BM25 over a handful of texts, and measures of wording."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import mul

K1, B = 1.5, 0.75
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


# The passages of an item come by again and again: in searches, gates, rules and the judge. A few hundred items' worth.
_remembered = functools.lru_cache(maxsize=4096)


def words(text: str) -> list[str]:
    """Lower-case words; every Chinese, Japanese or Korean character is a word."""
    return list(_words(text))


@_remembered
def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


@_remembered
def _counted(text: str) -> Counter[str]:
    """How often each word occurs; for reading only."""
    return Counter(_words(text))


class Bm25:
    """BM25 scores of a query against a few texts, without an index on disk.

        score(q, d) = sum over the words t of q of idf(t) tf / (tf + k1 (1 - b + b |d| / mean |d|))
        idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5)),  k1 = 1.5, b = 0.75

    Degenerate: no texts, or a query without known words, scores 0 everywhere.
    """

    def __init__(self, texts: Sequence[str], split: Callable[[str], list[str]] = words) -> None:
        self.split = split
        self.counts = [_counted(text) if split is words else Counter(split(text)) for text in texts]
        self.saturation = _saturation(self.counts)

    def scores(self, query: str) -> list[float]:
        n, found = len(self.counts), [0.0] * len(self.counts)
        for word in self.split(query):
            hits = [(i, tf) for i, counts in enumerate(self.counts) if (tf := counts.get(word))]
            if hits:
                idf = _idf(n, len(hits))
                for i, tf in hits:
                    found[i] += idf * tf / (tf + self.saturation[i])
        return found

    def top(self, query: str, k: int) -> list[int]:
        """At most k places with a score above 0, best first, equal ones in their order."""
        scores = self.scores(query)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        return [i for i in order[: max(k, 0)] if scores[i] > 0]


def _saturation(counts: Sequence[Counter[str]]) -> list[float]:
    """k1 (1 - b + b |d| / mean |d|) of each text."""
    lengths = [sum(found.values()) for found in counts]
    mean = sum(lengths) / len(lengths) if any(lengths) else 1.0
    return [K1 * (1 - B + B * length / mean) for length in lengths]


def _idf(n: int, df: int) -> float:
    return math.log(1 + (n - df + 0.5) / (df + 0.5))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine of two vectors; 0 where one of them has norm 0. ValueError for vectors of different length."""
    if len(a) != len(b):
        raise ValueError(f"vectors of {len(a)} and {len(b)} numbers")
    norm = math.sqrt(sum(map(mul, a, a))) * math.sqrt(sum(map(mul, b, b)))
    return sum(map(mul, a, b)) / norm if norm else 0.0


def similarity(candidate: str, kept: Sequence[str]) -> list[float]:
    """Wording in common with each kept text, in [0, 1]: BM25(candidate, kept text) / BM25(candidate, itself) in the
    collection of the kept texts and the candidate, clipped. A text without words has 0 in common with anything."""
    *others, own = counts = [_counted(text) for text in (*kept, candidate)]
    *saturation, own_saturation = _saturation(counts)
    shared = {word for other in others for word in own.keys() & other.keys()}
    rare = _idf(len(counts), 1)
    scores, total = [0.0] * len(others), 0.0
    for word in _words(candidate):
        tf = own[word]
        if word not in shared:
            total += rare * tf / (tf + own_saturation)
            continue
        hits = [(i, other[word]) for i, other in enumerate(others) if word in other]
        idf = _idf(len(counts), len(hits) + 1)
        total += idf * tf / (tf + own_saturation)
        for i, found in hits:
            scores[i] += idf * found / (found + saturation[i])
    return [min(1.0, score / total) if total else 0.0 for score in scores]


@functools.lru_cache(maxsize=4096)
def lexical_vector(text: str, size: int = 256) -> tuple[float, ...]:
    """Counts of hashed character trigrams: a stand-in for an embedding where no model is given. It sees spelling, not
    meaning, so thresholds for it are not those of a sentence encoder."""
    padded, vector = f"  {' '.join(words(text))} ", [0.0] * size
    for gram in map("".join, zip(padded, padded[1:], padded[2:], strict=False)):
        vector[int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=4).digest(), "big") % size] += 1.0
    return tuple(vector)


@_remembered
def folded(text: str, ascii_only: bool = False) -> str:
    """Letters and digits alone, lower case. `ascii_only` as in the first release: any other letter is dropped."""
    if ascii_only:
        return re.sub(r"[^a-z0-9]", "", text.lower())
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).lower())


def distinct(texts: Iterable[str], n: int = 2) -> float:
    """distinct-n: different n-grams of words over all of them; 0 where there are none."""
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(found: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
