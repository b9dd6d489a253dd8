"""Which rules a rubric needs: pruning, coverage, and the probe that masks rules.

D_jp = v_j(chosen of pair p) - v_j(rejected of pair p) in {-1, 0, 1}: (J, P), rule j on pair p.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

import numpy as np

JACCARD = 0.6  # from here on two rules say the same


def jaccard(one: str, other: str) -> float:
    """Shared over all words, case aside. Degenerate: 1 for two texts without words."""
    a, b = (set(re.findall(r"\w+", text.lower())) for text in (one, other))
    return len(a & b) / len(a | b) if a | b else 1.0


def prune(D_JP: np.ndarray, texts: Sequence[str], threshold: float = JACCARD) -> list[int]:
    """Rules with a mean of D above 0; of near-duplicates the more discriminative, of equals the first. In order."""
    mean_J = np.asarray(D_JP, float).mean(axis=1)
    kept: list[int] = []
    for j in map(int, np.argsort(-mean_J, kind="stable")):
        if mean_J[j] > 0 and all(jaccard(texts[j], texts[k]) < threshold for k in kept):
            kept.append(j)
    return sorted(kept)


def cover(D_JP: np.ndarray, candidates: Sequence[int]) -> list[int]:
    """Greedy cover: add the rule that decides (D = 1) most pairs that are not decided yet; stop at no gain."""
    wins_JP = np.asarray(D_JP) > 0
    open_P = np.ones(wins_JP.shape[1], bool)
    chosen: list[int] = []
    left = list(candidates)
    while left:
        gains = [int((wins_JP[j] & open_P).sum()) for j in left]
        if max(gains) == 0:
            break
        best = left.pop(int(np.argmax(gains)))
        chosen.append(best)
        open_P &= ~wins_JP[best]
    return chosen


def mask_accuracy(D_JP: np.ndarray, k: int) -> float:
    """Accuracy after masking k rules, averaged over all choices of k: 1 if the rest prefers the chosen, ties 1/2.

    A curve that stays flat as k grows means redundant rules. All (J over k) choices are counted, none is drawn.
    """
    D_JP = np.asarray(D_JP, float)
    total_P = D_JP.sum(axis=0)
    masked = [total_P - D_JP[list(out)].sum(axis=0) for out in combinations(range(len(D_JP)), k)]
    return float(np.mean((np.sign(masked) + 1) / 2))
