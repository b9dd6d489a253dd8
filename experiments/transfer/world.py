"""Fourteen rules over two digits, most with hidden variants: a language in which demonstrations decide the rule.

One example is `OP a b = y z ;`; a document is a start token and five examples of one domain under one variant:
`plain` (the rule itself), `plus5` (answer digits + 5 mod 10) or `reversed` (answer digits swapped). Without
demonstrations the plain rule is the likeliest. Loss on answer digits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BOS, EQUALS, END = "<s>", "=", ";"
DIGITS = tuple("0123456789")
PLAIN, PLUS5, REVERSED = range(3)
EXAMPLES = 5
"""Examples that a document holds, and that the model has seen in a row."""
ANSWER = slice(4, 6)
"""Where the answer digits of `OP a b = y z ;` are."""
COMPARED = slice(0, 6)
"""The tokens of a query over which features are compared and averaged; start and `;` are not among them."""


def _smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.minimum(a, b)


def _larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(a, b)


# name: (the rule, share of documents under `plus5`, under `reversed`)
DOMAINS: dict[str, tuple[Any, float, float]] = {
    "copy": (lambda a, b: (a, b), 0.30, 0.05),
    "swap": (lambda a, b: (b, a), 0.02, 0.25),
    "plus1": (lambda a, b: (a + 1, b + 1), 0.25, 0.02),
    "minus1": (lambda a, b: (a - 1, b - 1), 0.02, 0.20),
    "plus3": (lambda a, b: (a + 3, b + 3), 0.10, 0.10),
    "complement": (lambda a, b: (9 - a, 9 - b), 0.20, 0.0),
    "sort_up": (lambda a, b: (_smaller(a, b), _larger(a, b)), 0.0, 0.20),
    "sort_down": (lambda a, b: (_larger(a, b), _smaller(a, b)), 0.05, 0.10),
    "max": (lambda a, b: (_larger(a, b), _larger(a, b)), 0.25, 0.0),
    "min": (lambda a, b: (_smaller(a, b), _smaller(a, b)), 0.0, 0.0),
    "first": (lambda a, b: (a, a), 0.15, 0.05),
    "second": (lambda a, b: (b, b), 0.02, 0.10),
    "minus3": (lambda a, b: (a - 3, b - 3), 0.10, 0.0),
    "double": (lambda a, b: (2 * a, 2 * b), 0.05, 0.15),
}
NAMES = tuple(DOMAINS)
SOURCES = tuple(name for name, (_, plus5, _) in DOMAINS.items() if plus5 >= 0.10)
SYMBOLS = (*DIGITS, BOS, EQUALS, END, *(f"[{name}]" for name in NAMES))


@dataclass(frozen=True)
class Language:
    """Token ids of the language under a tokenizer that knows `SYMBOLS`."""

    digit_D: np.ndarray
    operator: dict[str, int]
    bos: int
    equals: int
    end: int

    @classmethod
    def of(cls, tokenizer: Any) -> Language:
        def id_of(symbol: str) -> int:
            return int(tokenizer.convert_tokens_to_ids(symbol))

        digits = np.array([id_of(d) for d in DIGITS])
        return cls(digits, {n: id_of(f"[{n}]") for n in NAMES}, id_of(BOS), id_of(EQUALS), id_of(END))

    def examples(self, domain: str, a_N: np.ndarray, b_N: np.ndarray, variant: int | np.ndarray = PLAIN) -> np.ndarray:
        """(N, 7) ids of `OP a b = y z ;`; `variant` is one of 0, 1, 2, or one for each example."""
        y_N2 = answers(domain, a_N, b_N, variant)
        columns = [np.full(len(a_N), self.operator[domain]), self.digit_D[a_N], self.digit_D[b_N]]
        columns += [np.full(len(a_N), self.equals), self.digit_D[y_N2[:, 0]], self.digit_D[y_N2[:, 1]]]
        return np.stack([*columns, np.full(len(a_N), self.end)], axis=1)

    def documents(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, 36) ids of documents of the pre-training mixture: domains alike often, variants by exposure."""
        which = rng.integers(len(NAMES), size=count)
        u = rng.random(count)
        found = np.empty((count, 1 + 7 * EXAMPLES), dtype=np.int64)
        found[:, 0] = self.bos
        for k, (name, (_, plus5, reversed_)) in enumerate(DOMAINS.items()):
            at = np.flatnonzero(which == k)
            variant = np.where(u[at] < plus5, PLUS5, np.where(u[at] < plus5 + reversed_, REVERSED, PLAIN))
            a, b = rng.integers(10, size=(2, len(at) * EXAMPLES))
            rows = self.examples(name, a, b, np.repeat(variant, EXAMPLES))
            found[at, 1:] = rows.reshape(len(at), 7 * EXAMPLES)
        return found

    def queries(self, examples_N7: np.ndarray, demos_M7: Sequence[np.ndarray] | np.ndarray = ()) -> np.ndarray:
        """(N, 1 + 7 M + 7) ids: start, the demonstrations, then one example."""
        head = np.concatenate([[self.bos], *np.asarray(demos_M7, dtype=np.int64).reshape(-1, 7)])
        return np.concatenate([np.repeat(head[None], len(examples_N7), 0), examples_N7], axis=1)


def answers(domain: str, a_N: np.ndarray, b_N: np.ndarray, variant: int | np.ndarray = PLAIN) -> np.ndarray:
    """(N, 2) answer digits."""
    y = np.stack(DOMAINS[domain][0](a_N, b_N), axis=1) % 10
    variant = np.broadcast_to(np.asarray(variant), len(y))[:, None]
    return np.where(variant == PLUS5, (y + 5) % 10, np.where(variant == REVERSED, y[:, ::-1], y))


def all_pairs() -> tuple[np.ndarray, np.ndarray]:
    """The hundred questions of a domain."""
    a, b = np.divmod(np.arange(100), 10)
    return a, b
