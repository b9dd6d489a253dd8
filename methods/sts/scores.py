"""The score: which latents demonstrations shift, and how strongly a domain's text excites them (arXiv 2603.02908).

Shapes: T tokens, s latents, D the selected latents. h are SAE features of the base model; base = without
demonstrations, context = with them, on the same tokens. E is the mean over tokens.

    delta_j = E (h_j(base) - h_j(context))^2                             step 1, on the source's queries     (1)
    D_N     = the N latents of largest delta, ties to the lower index, delta > 0 only                         (2)
    STS_act = E sum_{j in D_N} h_j                                       step 2, on a domain's text          (3)
    STS_ICL = E sum_{j in D_N} (h_j(context) - h_j(base))^2              with the domain's demonstrations    (4)

They predict the size of the change that training on the source makes in a domain, never its sign.

The authors' code computes something else, kept as the preset `release`: E mean_{j in D} h_j^2 (`released`), with
D from rows that are not aligned, so that delta tends to Var_base + Var_context + (mean difference)^2 (`unaligned_s`).

Differs from the paper: the norm of one latent is read as a squared difference; the tokens of E are those of the query.
`suppressed` is ours and not STS: D = top N of max(0, mean(h_base - h_context))^2, score = E sum_{j in D} h_j / rms_j.

Degenerate: no latent shifts -> DataError, never an arbitrary D; fewer than N shift -> those, with a `note`; a latent
silent in every domain adds 0 to `suppressed`; cosine with a zero vector is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from methods.errors import ConfigError, DataError

_ROWS = 64  # rows that are squared at once: they stay in the processor's cache


class FeatureSums:
    """Running float64 sums of features over tokens: what steps 1 and 2 need of a text, a domain or a corpus.

    `latents` restricts them to some columns (then `act` and its like take positions among those); None keeps all s.
    T x s is never kept.
    """

    def __init__(self, latents: Sequence[int] | None = None) -> None:
        self.latents = None if latents is None else list(latents)
        self.tokens = 0
        self.sum_s: Tensor | None = None
        self.squares_s: Tensor | None = None

    def add(self, h_Ts: Tensor) -> FeatureSums:
        """Count the features (T, s) of T more tokens."""
        h_Ts = h_Ts if self.latents is None else h_Ts[:, self.latents]
        if self.sum_s is None or self.squares_s is None:
            self.sum_s = torch.zeros(h_Ts.shape[1], dtype=torch.float64, device=h_Ts.device)
            self.squares_s = torch.zeros_like(self.sum_s)
        self.tokens += len(h_Ts)
        for part_Ts in h_Ts.split(_ROWS):
            wide_Ts = part_Ts.double()  # before squaring: a variance is the small difference of two such sums
            self.sum_s += wide_Ts.sum(0)
            self.squares_s += wide_Ts.square().sum(0)
        return self

    def merge(self, other: FeatureSums) -> FeatureSums:
        """Count what `other` counted as well."""
        if other.sum_s is None or other.squares_s is None:
            return self
        if self.sum_s is None or self.squares_s is None:
            self.sum_s, self.squares_s = torch.zeros_like(other.sum_s), torch.zeros_like(other.squares_s)
        self.tokens += other.tokens
        self.sum_s += other.sum_s
        self.squares_s += other.squares_s
        return self

    @property
    def mean_s(self) -> Tensor:
        """E h_j. DataError without tokens."""
        return self._of(self.sum_s)

    @property
    def mean_square_s(self) -> Tensor:
        """E h_j^2. DataError without tokens."""
        return self._of(self.squares_s)

    @property
    def variance_s(self) -> Tensor:
        """Variance over the tokens, divided by their number."""
        return (self.mean_square_s - self.mean_s.square()).clamp(min=0)

    @property
    def rms_s(self) -> Tensor:
        """sqrt(E h_j^2)."""
        return self.mean_square_s.sqrt()

    def _of(self, total_s: Tensor | None) -> Tensor:
        if total_s is None or not self.tokens:
            raise DataError("There are no tokens to average over", expected="at least one text with tokens")
        return total_s / self.tokens


class PairSums:
    """Running float64 sums over tokens that were read twice, without (base) and with demonstrations (context)."""

    def __init__(self, latents: Sequence[int] | None = None) -> None:
        self.latents = None if latents is None else list(latents)
        self.base, self.context, self.difference = FeatureSums(latents), FeatureSums(latents), FeatureSums(latents)

    @property
    def tokens(self) -> int:
        """The number of tokens counted."""
        return self.base.tokens

    def add(self, base_Ts: Tensor, context_Ts: Tensor) -> PairSums:
        """Count T tokens; row t of both is the same token. DataError for different lengths."""
        if base_Ts.shape != context_Ts.shape:
            raise DataError(
                "The features without and with demonstrations are not those of the same tokens",
                got=f"{tuple(base_Ts.shape)} without, {tuple(context_Ts.shape)} with",
                expected="equal shapes",
            )
        self.base.add(base_Ts)
        self.context.add(context_Ts)
        self.difference.add(base_Ts - context_Ts)
        return self

    def merge(self, other: PairSums) -> PairSums:
        """Count what `other` counted as well."""
        self.base.merge(other.base)
        self.context.merge(other.context)
        self.difference.merge(other.difference)
        return self

    @property
    def delta_s(self) -> Tensor:
        """E (h_j(base) - h_j(context))^2, equation 1."""
        return self.difference.mean_square_s

    @property
    def unaligned_s(self) -> Tensor:
        """Var_base + Var_context + (mean difference)^2: what (1) tends to where the rows are unrelated tokens."""
        return self.base.variance_s + self.context.variance_s + (self.base.mean_s - self.context.mean_s).square()

    @property
    def suppressed_s(self) -> Tensor:
        """max(0, mean(h_base - h_context))^2: how far demonstrations switch a latent off (ours)."""
        return self.difference.mean_s.clamp(min=0).square()


@dataclass(frozen=True)
class Selection:
    """D_N: indices by falling shift, their shifts, and the share of the whole shift that they hold.

    `asked` is the N that was asked for; `note` says so where fewer latents shift.
    """

    latents: list[int]
    shifts: list[float]
    concentration: float
    asked: int
    note: str = ""


def shift(base_Ts: Tensor, context_Ts: Tensor) -> Tensor:
    """(s,) delta of equation 1 for features of the same T tokens. DataError for different lengths or no tokens."""
    return PairSums().add(base_Ts, context_Ts).delta_s


def select(delta_s: Tensor, n: int) -> Selection:
    """The N latents of largest delta, equation 2. DataError if none shifts or delta is not finite."""
    if n < 1:
        raise ConfigError("At least one latent has to be selected", got=n, expected="a whole number from 1")
    if not bool(torch.isfinite(delta_s).all()):
        raise DataError("The shift of the features is not finite", got="NaN or infinity", expected="finite features")
    shifted = int((delta_s > 0).sum())
    if not shifted:
        raise DataError(
            "The context does not change the features: no latent shifts, so there is nothing to select",
            expected="demonstrations that come before the query, and a layer that can see them",
            fix="check that the demonstrations differ from the query and that the SAE belongs to this layer",
        )
    latents = torch.argsort(delta_s, descending=True, stable=True)[: min(n, shifted)].tolist()
    note = f"{n} latents were asked for, only {shifted} shift" if shifted < n else ""
    return Selection(latents, delta_s[latents].tolist(), concentration(delta_s, latents), n, note)


def count_for_share(delta_s: Tensor, share: float = 0.25) -> int:
    """The smallest N whose latents hold at least `share` of the shift: 100 latents held 25 % in the paper."""
    ordered_s = delta_s.double().sort(descending=True).values.cumsum(0)
    enough_s = ordered_s >= share * ordered_s[-1] * (1 - 1e-12)
    return int(enough_s.double().argmax()) + 1


def concentration(delta_s: Tensor, latents: Sequence[int]) -> float:
    """Share of the whole shift that `latents` hold; NaN if nothing shifts."""
    total = float(delta_s.double().sum())
    return float(delta_s[list(latents)].double().sum()) / total if total > 0 else math.nan


def overlap(first: Sequence[int], second: Sequence[int]) -> float:
    """Shared latents / N, N the larger of the two numbers. Chance level: N / s."""
    n = max(len(set(first)), len(set(second)))
    return len(set(first) & set(second)) / n if n else math.nan


def sts_act(sums: FeatureSums, latents: Sequence[int]) -> float:
    """STS_act of a domain, equation 3."""
    return float(sums.mean_s[list(latents)].sum())


def sts_act_squared(sums: FeatureSums, latents: Sequence[int]) -> float:
    """E sum_{j in D} h_j^2: equation 3 with squares, the released code's score times N."""
    return float(sums.mean_square_s[list(latents)].sum())


def released(sums: FeatureSums, latents: Sequence[int]) -> float:
    """The released code's score: the mean over tokens and over D of h_j^2."""
    return float(sums.mean_square_s[list(latents)].mean())


def sts_icl(pair: PairSums, latents: Sequence[int]) -> float:
    """STS_ICL of a domain, equation 4."""
    return float(pair.delta_s[list(latents)].sum())


def sts_sup(sums: FeatureSums, latents: Sequence[int], rms_s: Tensor) -> float:
    """The suppressed-latent score (ours): E sum_{j in D} h_j / rms_j, rms over all domains (`pooled(...).rms_s`).

    Degenerate: a latent silent in every domain adds 0.
    """
    chosen = list(latents)
    mean_D, rms_D = sums.mean_s[chosen], rms_s[chosen]
    return float(torch.where(rms_D > 0, mean_D / rms_D, 0.0).sum())


def pooled(parts: Iterable[FeatureSums]) -> FeatureSums:
    """The sums of all parts together, every token with the same weight."""
    total = FeatureSums()
    for part in parts:
        total.merge(part)
    return total


def cosine(first_s: Tensor, second_s: Tensor) -> float:
    """Cosine of two mean feature vectors, a baseline; NaN where one of them is zero."""
    first, second = first_s.double(), second_s.double()
    length = float(first.norm() * second.norm())
    return float(first @ second) / length if length > 0 else math.nan


def mixture(scores: Sequence[float], budget: int) -> list[int]:
    """Extra examples per domain, n_c = budget * score_c / sum of scores (section 5), largest remainder, ties first.

    They sum to `budget`. DataError for a score that is negative or not finite, or if all are 0.
    """
    if isinstance(budget, bool) or int(budget) != budget or budget < 0:
        raise ConfigError("A budget of examples is a whole number", got=budget, expected="0 or more")
    wrong = [score for score in scores if not (math.isfinite(score) and score >= 0)]
    exact = [] if wrong else [Fraction(score) for score in scores]  # so that equal remainders are equal
    total = sum(exact)
    if not total:
        raise DataError(
            "A budget cannot be shared by these scores",
            got=f"score {wrong[0]}" if wrong else "no score above 0",
            expected="finite scores of 0 or more, at least one above 0",
        )
    shares = [budget * score / total for score in exact]
    counts = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda c: (counts[c] - shares[c], c))
    for c in order[: int(budget) - sum(counts)]:
        counts[c] += 1
    return counts
