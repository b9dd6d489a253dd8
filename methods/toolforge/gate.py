"""The dual gate: near in meaning, far in wording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from methods.errors import check_range
from methods.toolforge.text import cosine, lexical_vector, similarity

Embed = Callable[[str], Sequence[float]]


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate passes, its two similarities (means over the kept), and why not."""

    accepted: bool
    cos: float = 0.0
    text: float = 0.0
    reason: str = ""


@dataclass
class DualGate:
    """A candidate T~ against the kept set S (equation of section 3.1):

        J = 1{|S| < 2} or (Agg_cos(T~, S) > theta_c and Agg_text(T~, S) < theta_b)

    with Agg the mean over S of the cosine of embeddings and of the normalised BM25 similarity of the texts.

    Differs from the paper: the normaliser of the text similarity (score of the candidate against itself) is our
    choice, and a candidate is also rejected when its *largest* text similarity exceeds `theta_max`, because a mean
    hides a copy of one among many kept texts; None takes that rule away. `embed` None: hashed trigrams, for which
    theta_c = 0.7 of the paper (bge-m3) would be too high.
    Degenerate: with fewer than `free` kept texts (2), and with none, every candidate passes; an embedding of norm 0 has
    cosine 0.
    Raises ConfigError for thresholds outside their range.
    """

    theta_c: float = 0.7
    theta_b: float = 0.6
    theta_max: float | None = 0.9
    embed: Embed | None = None
    free: int = 2

    def __post_init__(self) -> None:
        check_range("theta_c", self.theta_c, -1.0, 1.0)
        check_range("theta_b", self.theta_b, 0.0, 1.0)
        if self.theta_max is not None:
            check_range("theta_max", self.theta_max, 0.0, 1.0)

    def judge(self, candidate: str, kept: Sequence[str]) -> Verdict:
        """The verdict on a candidate text, embedded here."""
        if len(kept) < max(self.free, 1):
            return Verdict(True)
        embed = self.embed or lexical_vector
        return self.judge_vectors(candidate, embed(candidate), kept, [embed(text) for text in kept])

    def accepts(self, candidate: str, kept: Sequence[str]) -> bool:
        """`judge` in one bit; theta_c = -1 takes any meaning, so nothing is embedded then."""
        if self.theta_c > -1.0 or len(kept) < max(self.free, 1):
            return self.judge(candidate, kept).accepted
        return not self._wording(similarity(candidate, kept))

    def judge_vectors(
        self, candidate: str, vector: Sequence[float], kept: Sequence[str], vectors: Sequence[Sequence[float]]
    ) -> Verdict:
        """The verdict where the embeddings are known."""
        if len(kept) < max(self.free, 1):
            return Verdict(True)
        cos = sum(cosine(vector, other) for other in vectors) / len(vectors)
        found = similarity(candidate, kept)
        reason = self._wording(found) if cos > self.theta_c else "meaning too far"
        return Verdict(not reason, cos, sum(found) / len(found), reason)

    def _wording(self, found: Sequence[float]) -> str:
        """What is wrong with a candidate's similarities in wording to the kept texts, or an empty text."""
        if not sum(found) / len(found) < self.theta_b:
            return "wording too near"
        return "a copy of a kept one" if self.theta_max is not None and max(found) > self.theta_max else ""
