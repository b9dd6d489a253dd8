"""Group statistics of outcome and reasoning reward, and what AWPO makes of them: gate, difficulty weight, clip radius.

P groups, N rollouts in any order. All in float64; a group whose values are all equal has deviations of exactly 0.
The paper's own formulas are not public: the forms of gate, weight and radius here are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STD_NORM = 1e-4  # added to a standard deviation that divides, as in TRL
STD_GATE = 1e-6
BAND = 1e-6
SOLVED = 1 - 1e-6


@dataclass(frozen=True)
class GroupTerms:
    """Statistics of P groups and the two standardised advantages of their N rollouts.

    index_N: the group of each rollout. mean_P, sd_out_P: mean and Bessel standard deviation of the outcome over the
    scorable rollouts (NaN and 0 where there is none). sd_mix_P: that of the mixed reward. judged_P: every scorable
    rollout of the group has a reasoning reward; elsewhere sd_mix_P and adv_mix_N are 0. scorable_N: has an outcome.
    """

    index_N: Tensor
    scorable_N: Tensor
    mean_P: Tensor
    sd_out_P: Tensor
    sd_mix_P: Tensor
    judged_P: Tensor
    adv_out_N: Tensor
    adv_mix_N: Tensor


def group_terms(outcome_N: Tensor, reasoning_N: Tensor, group_N: Tensor, lam: float) -> GroupTerms:
    """A_out = (r_out - mu_out) / (sd_out + 1e-4) and the same of r_mix = (1 - lam) r_out + lam r_rea, per group.

    NaN is a missing value: a rollout without outcome is out of all statistics and has advantages 0; a group in which a
    scorable rollout lacks its reasoning reward has no mixed statistics (a missing judgement is never a 0).
    """
    groups, index_N = torch.unique(group_N, return_inverse=True)
    outcome_N, reasoning_N = outcome_N.double(), reasoning_N.double()
    scorable_N = ~torch.isnan(outcome_N)
    lacking_N = scorable_N & torch.isnan(reasoning_N)
    lacking_P = torch.zeros(len(groups), dtype=torch.long).index_add_(0, index_N, lacking_N.long())
    judged_N = scorable_N & (lacking_P == 0)[index_N]
    mixed_N = (1 - lam) * outcome_N + lam * reasoning_N
    mean_P, sd_out_P, deviation_N = _spread(outcome_N, scorable_N, index_N, len(groups))
    _, sd_mix_P, mixed_deviation_N = _spread(mixed_N, judged_N, index_N, len(groups))
    return GroupTerms(
        index_N,
        scorable_N,
        mean_P,
        sd_out_P,
        sd_mix_P,
        lacking_P == 0,
        deviation_N / (sd_out_P + STD_NORM)[index_N],
        mixed_deviation_N / (sd_mix_P + STD_NORM)[index_N],
    )


def _spread(values_N: Tensor, member_N: Tensor, index_N: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean_P, sd_P, deviation_N) over the members of each group; no member: mean NaN, the others 0."""
    inside_N = torch.where(member_N, values_N, 0.0)
    count_P = torch.zeros(groups, dtype=torch.float64).index_add_(0, index_N, member_N.double())
    mean_P = torch.zeros(groups, dtype=torch.float64).index_add_(0, index_N, inside_N) / count_P
    infinite = torch.full((groups,), torch.inf, dtype=torch.float64)
    high_P = (-infinite).scatter_reduce(0, index_N, torch.where(member_N, values_N, -torch.inf), "amax")
    low_P = infinite.scatter_reduce(0, index_N, torch.where(member_N, values_N, torch.inf), "amin")
    # The mean of equal numbers may differ from them by a rounding error, which 1e-4 would blow up to a signal.
    varies_N = member_N & (high_P > low_P)[index_N]
    deviation_N = torch.where(varies_N, values_N - mean_P[index_N], 0.0)
    square_P = torch.zeros(groups, dtype=torch.float64).index_add_(0, index_N, deviation_N**2)
    return mean_P, torch.sqrt(square_P / (count_P - 1).clamp(min=1.0)), deviation_N


def gate(terms: GroupTerms) -> Tensor:
    """(P,) w = sd_mix / (sd_out + sd_mix + 1e-6) in [0, 1); 0 for a solved group and where a judgement is missing.

    Near 1 where outcomes are all equal and not solved; 1/2 where the judge repeats the outcome; it falls where the
    judge contradicts the outcome, because the mixture then loses variance.
    """
    w_P = terms.sd_mix_P / (terms.sd_out_P + terms.sd_mix_P + STD_GATE)
    return torch.where(terms.judged_P & (terms.mean_P < SOLVED), w_P, 0.0)


def difficulty(mean_P: Tensor, tau_low: float, tau_high: float, d_base: float, d_prio: float) -> Tensor:
    """(P,) d_prio where tau_low <= mean outcome <= tau_high, else d_base. Both ends with the rounding of float32."""
    inside_P = (mean_P >= tau_low - BAND) & (mean_P <= tau_high + BAND)
    return torch.where(inside_P, d_prio, d_base).double()


def advantages(terms: GroupTerms, gate_P: Tensor, difficulty_P: Tensor) -> Tensor:
    """(N,) A = d ((1 - w) A_out + w A_mix); 0 for a rollout without outcome."""
    w_N = gate_P[terms.index_N]
    hyper_N = (1 - w_N) * terms.adv_out_N + w_N * terms.adv_mix_N
    return difficulty_P[terms.index_N] * hyper_N


def radius(mean_gate: float, eps_min: float, eps_max: float) -> float:
    """eps = eps_max - (eps_max - eps_min) w_bar: the more of the advantage is the judge's, the smaller the step."""
    return eps_max - (eps_max - eps_min) * mean_gate
