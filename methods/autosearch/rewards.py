"""Rewards of turns: from what was well formed and what the self-answers were worth to one number per turn."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SEARCH_GOOD = 0.025  # and its negative for a badly formed or repeated search
ANSWER_GOOD, ANSWER_BAD = 0.1, -0.5
KEEP_GOING = 0.0125
OVER_SEARCH = -0.05
SIMILAR = 0.8


@dataclass(frozen=True)
class Searched:
    """What the rewards of one trajectory depend on.

    valid: for each of the L turns whether it is well formed and no repeat. right, f1: for each of the n self-answers
    (n <= L - 1: the last turn is judged as the answer) whether it equals a gold answer, and its F1. final: the outcome
    of the answer. `first_right` are the self-answers that equal the first gold, where the released code looks; None
    takes `right`.
    """

    valid: Sequence[bool]
    right: Sequence[bool]
    f1: Sequence[float]
    final: float
    first_right: Sequence[bool] | None = None

    @property
    def depth(self) -> int:
        """t_c = min { t : self-answer t is right }, counted from 1; -1 if there is none (Eq. 6)."""
        return next((t for t, ok in enumerate(self.right, start=1) if ok), -1)


def base_rewards(s: Searched) -> list[float]:
    """Format of every turn, and the outcome on the last one."""
    L = len(s.valid)
    rewards = [SEARCH_GOOD if ok else -SEARCH_GOOD for ok in s.valid[: L - 1]]
    return [*rewards, (ANSWER_GOOD if s.valid[-1] else ANSWER_BAD) + s.final]


def gains(f1: Sequence[float]) -> list[float]:
    """max(0, F1_t - best F1 before t), the best before the first being 0: what each search added."""
    best, out = 0.0, []
    for value in f1:
        out.append(max(0.0, value - best))
        best = max(best, value)
    return out


def effective(depth: int) -> float:
    """Reward of each of `depth` searches that were needed: 0.5 (0.4 / depth - 0.05), not below 0."""
    return max(0.0, 0.5 * (0.4 / depth - 0.05))


def without_efficiency(s: Searched) -> list[float]:
    """r_t = base + quality: no efficiency term, and nothing overwritten."""
    rewards = base_rewards(s)
    for t, gain in enumerate(gains(s.f1)):
        rewards[t] += gain
    return rewards


def paper_sum(s: Searched) -> list[float]:
    """r_t = base + efficiency + quality, as the paper's summaries give it.

    Efficiency of search t: effective(t_c) up to t_c, -0.05 after it, +0.0125 if no self-answer was right.
    """
    rewards, depth = without_efficiency(s), s.depth
    for t in range(1, len(s.f1) + 1):
        rewards[t - 1] += KEEP_GOING if depth < 0 else effective(depth) if t <= depth else OVER_SEARCH
    return rewards


def released_code(s: Searched) -> list[float]:
    """The rewards of the authors' program: turns after a self-answer that was right too early are overwritten."""
    L, n = len(s.valid), len(s.f1)
    rewards = base_rewards(s)
    right = s.right if s.first_right is None else s.first_right
    early = next((t for t, ok in enumerate(right) if ok and t < n - 1), None)
    for t, gain in enumerate(gains(s.f1)[: n if early is None else early + 1]):
        rewards[t] += gain
    if n and s.final <= 0.5:
        for t in range(L):
            rewards[t] += KEEP_GOING if s.valid[t] else 0.0
    elif n and early is not None:
        for t in range(early + 1):
            if not s.valid[t]:
                break
            rewards[t] += effective(early + 1)
    elif n:
        for t in range(L):
            rewards[t] += effective(L - 1) if s.valid[t] else 0.0
    if early is not None:
        rewards[early + 1 :] = [OVER_SEARCH] * (L - early - 1)
    return rewards


VARIANTS = {"code": released_code, "paper_sum": paper_sum}


# ---------------------------------------------------------------- repeated queries


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    plain = re.sub(r"[^\w\s]", "", text.lower())
    return [w for w in plain.split() if w not in ("a", "an", "the")]


def repeats(queries: Sequence[str]) -> list[bool]:
    """Whether each query is a repeat: TF-IDF cosine above 0.8 with an earlier one of the trajectory.

    The vectoriser is fitted on those few queries: raw counts of words of two or more characters, idf = ln((1 + N) /
    (1 + df)) + 1, L2 norm. With something before it, an empty query or an empty vocabulary counts as a repeat.
    """
    bags = [bag(q) for q in queries]
    return [k > 0 and _most_similar(bags[: k + 1]) > SIMILAR for k in range(len(bags))]


def bag(query: str) -> Counter[str]:
    """Counts of the words that the vectoriser sees."""
    return Counter(w for w in words(query) if len(w) >= 2)


def similarity(bags: Sequence[Counter[str]]) -> list[float]:
    """Cosine of the last query with each earlier one, in the TF-IDF fitted on all of them."""
    N = len(bags)
    idf = {w: math.log((1 + N) / (1 + sum(w in b for b in bags))) + 1 for b in bags for w in b}
    vectors = [{w: n * idf[w] for w, n in b.items()} for b in bags]
    norms = [math.sqrt(sum(x * x for x in v.values())) for v in vectors]
    last = vectors[-1]
    return [
        sum(x * last.get(w, 0.0) for w, x in v.items()) / (norm * norms[-1]) if norm and norms[-1] else 0.0
        for v, norm in zip(vectors[:-1], norms[:-1], strict=True)
    ]


def _most_similar(bags: Sequence[Counter[str]]) -> float:
    *earlier, last = bags
    if not last:
        return math.inf
    if all(last.keys().isdisjoint(b) for b in earlier):  # the usual case, and most of the time
        return 0.0
    return max(similarity(bags))
