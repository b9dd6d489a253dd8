"""Q_com, the quality of one compressed document ("zip"): length, level, information and completeness."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from methods.errors import ConfigError, check_range

PARTS = ("ratio", "level", "info", "sem", "com")
NOTHING: dict[str, float] = dict.fromkeys(PARTS, 0.0)
NAMES = ("ultra-coarse", "coarse", "medium", "fine", "ultra-fine")
INTERVALS = ((0.0, 0.10), (0.10, 0.25), (0.25, 0.45), (0.45, 0.70), (0.70, 1.0))
WEIGHTS = (0.3, 0.1, 0.4, 0.2)
RATIO_SOFTNESS, DENSITY_SOFTNESS = 0.10, 0.25
KEYWORDS = 10
STOPS = """a an the of in on at to for from by with and or but is are was were be been it its this that these those as
into than then he she they his her their there which who whom whose what when where how"""
STOP_WORDS = frozenset(STOPS.split())
# What is known of a document: the rollouts of a group often see the same ones.
cached = functools.lru_cache(maxsize=512)


@dataclass(frozen=True, eq=False)  # known by identity: a hash of all its numbers takes as long as a look-up saves
class Scale:
    """The five levels, each with the interval of length / source length that it permits, and the weights of Q_com.

    Q_com = w_ratio Q_ratio + w_level Q_level + w_info Q_info + w_sem Q_sem. ConfigError for intervals that are not five
    growing ones in [0, 1], or weights that are not four numbers >= 0 with sum 1.
    """

    intervals: tuple[tuple[float, float], ...] = INTERVALS
    weights: tuple[float, ...] = WEIGHTS

    def __post_init__(self) -> None:
        flat = [x for pair in self.intervals for x in pair]
        for bound in flat:
            check_range("method.ziprl.intervals", bound, 0.0, 1.0)
        for pair in self.intervals:
            check_range("method.ziprl.intervals", pair[-1], 0.0, above=True)
        if [len(pair) for pair in self.intervals] != [2] * 5 or flat != sorted(flat):
            raise ConfigError(
                "the levels of compression need five growing intervals",
                where="method.ziprl.intervals",
                got=self.intervals,
                expected="pairs [lowest, highest] of length / source length between 0 and 1, shortest level first",
            )
        for weight in self.weights:
            check_range("method.ziprl.weights", weight, 0.0)
        if len(self.weights) != 4 or abs(sum(self.weights) - 1) > 1e-6:
            raise ConfigError(
                "the quality of a compression is a weighted mean of four parts",
                where="method.ziprl.weights",
                got=self.weights,
                expected="weights of ratio, level, info and sem whose sum is 1",
            )

    @classmethod
    def read(cls, intervals: Any, weights: Any) -> Scale:
        """From settings; ConfigError for what is no list of numbers, too."""
        try:
            return cls(tuple((float(low), float(high)) for low, high in intervals), tuple(map(float, weights)))
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                "the settings of the compression levels cannot be read",
                where="method.ziprl.intervals, method.ziprl.weights",
                got=f"{intervals}, {weights}",
                expected="five pairs of numbers, and four numbers",
            ) from error

    @property
    def top(self) -> int:
        return len(self.intervals)

    def interval(self, level: int) -> tuple[float, float]:
        return self.intervals[level - 1]

    def fit(self, share: float, level: int, source: int) -> float:
        """Q_ratio = exp(-gap(share, [lo, max(hi, 4 / source)]) / 0.10); `source` is the length of the document."""
        lo, hi = self.interval(level)
        return math.exp(-gap(share, lo, max(hi, 4 / source)) / RATIO_SOFTNESS)

    def shorter(self, length: int, level: int) -> int:
        """The length that a zip of `level` keeps when it is cut down one level."""
        return max(1, math.floor(length * self.interval(level - 1)[1] / self.interval(level)[1]))

    def combine(self, ratio: float, level: float, info: float, sem: float) -> dict[str, float]:
        a, b, c, d = self.weights
        com = a * ratio + b * level + c * info + d * sem
        return {"ratio": ratio, "level": level, "info": info, "sem": sem, "com": com}


def gap(x: float, low: float, high: float) -> float:
    """Distance of x from the interval."""
    return max(low - x, 0.0, x - high)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def content(text: str) -> list[str]:
    """Words that are no stop words."""
    return [w for w in words(text) if w not in STOP_WORDS]


@cached
def size(text: str) -> tuple[int, int]:
    """Words and sentences."""
    return len(words(text)), len(sentences(text))


@cached
def relevance(document: str, question: str) -> float | None:
    """Share of the question's distinct content words found in the document; None for a question without any."""
    asked = set(content(question))
    return len(asked & set(words(document))) / len(asked) if asked else None


def asked_level(rho: float, top: int = 5) -> int:
    """l*(rho) = 1 + min(4, floor(5 rho))."""
    return 1 + min(top - 1, math.floor(top * rho + 1e-9))


def agreement(level: int, asked: int, top: int = 5) -> float:
    """1 - |l - l*| / 4."""
    return 1 - abs(level - asked) / (top - 1)


def keywords(document: str, question: str) -> list[str]:
    """Distinct content words: those of the question first, then frequent ones, then early ones."""
    found = content(document)
    count, asked = Counter(found), set(content(question))
    # sorted() is stable, and a Counter keeps the order of first positions.
    return sorted(count, key=lambda w: (w not in asked, -count[w]))


@cached
def _ranked(document: str, question: str) -> tuple[str, ...]:
    return tuple(keywords(document, question))


def quality(document: str, text: str, level: int, question: str = "", scale: Scale | None = None) -> dict[str, float]:
    """Q_com and its parts, each in [0, 1], for the zip `text` of `document` at `level`.

    With r = n(c)/n(d) in words, [lo, hi] the interval of the level, V content words, rho the relevance:
        ratio = exp(-gap(r, [lo, max(hi, 4/n(d))]) / 0.10)
        level = (density + 1 - |l - l*(rho)| / 4) / 2
                with density = exp(-gap(min(1, s(c)/s(d)), [lo, max(hi, 1/s(d))]) / 0.25), s() counting sentences
        info  = (cover + min(1, |V(d) & V(c)| / (|V(d)| hi))) / 2
                with cover = share of the top m = ceil(hi min(10, |V(d)|)) keywords that occur in c
        sem   = mean of: ends a sentence; brackets and quotes balanced; share of sentences of >= 3 words; share of
                distinct 3-grams

    Differs from the paper: the functions are chosen here, only their purpose and weights are public.
    Degenerate: an empty document or zip, or a level outside 1..5, gives 0 for everything; a question without content
    words leaves the density alone as the level part; a document of stop words only has lost no information.
    """
    scale = scale or Scale()
    (source, n), kept = size(document), words(text)
    if not source or not kept or not 1 <= level <= scale.top:
        return dict(NOTHING)
    lo, hi = scale.interval(level)
    ratio = scale.fit(len(kept) / source, level, source)
    density = math.exp(-gap(min(1.0, len(sentences(text)) / n), lo, max(hi, 1 / n)) / DENSITY_SOFTNESS)
    rho = relevance(document, question)
    fit = density if rho is None else 0.5 * density + 0.5 * agreement(level, asked_level(rho, scale.top), scale.top)
    return scale.combine(ratio, fit, _information(document, kept, hi, question), _completeness(text))


def _information(document: str, kept: list[str], hi: float, question: str) -> float:
    ranked = _ranked(document, question)
    if not ranked:
        return 1.0
    held = set(kept)
    m = max(1, math.ceil(hi * min(KEYWORDS, len(ranked)) - 1e-9))
    cover = sum(w in held for w in ranked[:m]) / min(m, len(ranked))
    return 0.5 * cover + 0.5 * min(1.0, len(held.intersection(ranked)) / (len(ranked) * hi))


def _completeness(text: str) -> float:
    found, parts = words(text), sentences(text)
    grams = list(zip(found, found[1:], found[2:], strict=False))
    balanced = all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}")) and text.count('"') % 2 == 0
    return (
        float(text.rstrip().endswith((".", "!", "?")))
        + float(balanced)
        + sum(len(words(s)) >= 3 for s in parts) / len(parts)
        + (len(set(grams)) / len(grams) if grams else 1.0)
    ) / 4
