"""The bias of the group baseline that HA-DW sets out from (arXiv 2601.08521, section 3): exact values.

r_i ~ Bernoulli(p), p_hat = mean of G rewards, S = the group is neither all right nor all wrong. Without the
condition S the gradient of GRPO keeps its direction; read HA-DW as a difficulty-dependent reweighting that a
conditional bias motivates.

Differs from the paper: the sentence after its Eq. 32 has the sign of E[p_hat | S] - p the wrong way round.
"""

from __future__ import annotations

from math import comb, floor


def live_probability(p: float, G: int) -> float:
    """P(S) = 1 - (1-p)^G - p^G."""
    return 1 - (1 - p) ** G - p**G


def baseline_bias(p: float, G: int) -> float:
    """E[p_hat | S] - p = p(1-p) [(1-p)^(G-1) - p^(G-1)] / P(S): how much the baseline is too high.

    Positive for hard prompts (p < 1/2), negative for easy ones, 0 at 1/2; limits 1/G and -1/G at p = 0 and 1.
    ValueError outside [0, 1] or for G < 2.
    """
    if not 0 <= p <= 1 or G < 2:
        raise ValueError(f"need 0 <= p <= 1 and G >= 2, got p={p}, G={G}")
    if p in (0.0, 1.0):
        return (1 - 2 * p) / G
    return p * (1 - p) * ((1 - p) ** (G - 1) - p ** (G - 1)) / live_probability(p, G)


def overestimated(p: float, G: int, margin: float = 0.0) -> float:
    """P(p_hat > p + margin | S): how often a live group's baseline is too high by more than `margin` (Theorem 2)."""
    first = floor(G * (p + margin) + 1e-12) + 1
    return sum(comb(G, k) * p**k * (1 - p) ** (G - k) for k in range(max(first, 1), G)) / live_probability(p, G)


def expected_gradient(p: float, G: int, belief: float, lambda_scale: float = 1.0) -> float:
    """E[(1/G) sum Phi A_hat (r - p)] of a one-logit policy under HA-DW without std division.

    GRPO's value is ((G-1)/G) p(1-p); with lambda 1 the ratio to it says how HA-DW redistributes effort.
    """
    from math import exp

    total = 0.0
    for k in range(1, G):
        p_hat = k / G
        right = lambda_scale * exp(-(p_hat - belief))  # A > 0: exp(-(+1) diff)
        wrong = lambda_scale * exp(p_hat - belief)
        inner = k * right * (1 - p_hat) * (1 - p) + (G - k) * wrong * (-p_hat) * (-p)
        total += comb(G, k) * p**k * (1 - p) ** (G - k) * inner / G
    return total
