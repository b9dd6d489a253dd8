"""Invented names: every index has one of its own, all of eight letters (four Chinese characters)."""

from __future__ import annotations

import numpy as np

from experiments.seeds import derive

_CONSONANTS, _VOWELS = "bdfghjklmnprtvwz", "aiou"
SYLLABLES = tuple(c + v for c in _CONSONANTS for v in _VOWELS)
# One character per syllable; none of them stands in a word of the catalogue or of the templates.
CHARACTERS = tuple(
    "柏璞芙嘉翰珂岚蔓妮玥芮彤薇婉卓泽玺钰烨煜熠昊骏麒麟鹏鸿雁鹤鸾莺鹭蕙芷荀菡萱蔚苓藜芸榆桐梓楠槿樱榕杉桦檀琅瑾玖瑶琪琼瑛珊霖溪沁洛绮"
)
BITS = 24  # four syllables of six bits
CITY_BITS = 18  # names that one city has
PLACES = 1 << 12  # the first of them are of places, events and chains


class Namer:
    """Names of a world: index -> name is one to one, so that no name occurs twice and, all being of one length, none
    begins with another. A city's names depend on nothing but the seed and the city's number."""

    def __init__(self, seed: int, language: str) -> None:
        self.keys = [derive(seed, "local_life", "names", i) % (1 << BITS) | 1 for i in range(3)]
        self.parts = CHARACTERS if language == "zh" else SYLLABLES
        self.zh = language == "zh"

    def city(self, number: int) -> str:
        return self._names(np.array([number << CITY_BITS]))[0]

    def place(self, city: int, number: int) -> str:
        """Name of the place, event or chain `number` (from 1) of a city."""
        return self._names(np.array([(city << CITY_BITS) + number]))[0]

    def merchants(self, city: int, count: int) -> list[str]:
        return self._names((city << CITY_BITS) + PLACES + np.arange(count))

    def _names(self, index: np.ndarray) -> list[str]:
        mask, x = (1 << BITS) - 1, index.astype(np.int64) ^ self.keys[0]
        for key in self.keys:  # xor-shift and odd factors: a permutation of 24 bits
            x = ((x ^ (x >> 11)) * key) & mask
        x ^= x >> 13
        parts = np.array(self.parts)[np.stack([(x >> shift) & 63 for shift in (18, 12, 6, 0)])]
        names = ["".join(name) for name in parts.T.tolist()]
        return names if self.zh else [name.capitalize() for name in names]
