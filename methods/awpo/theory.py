"""The bound behind AWPO (section 3 of arXiv 2512.19126, as its reviews give it), for a softmax policy over K actions.

pi_K probabilities, Z_a = e_a - pi the gradient of log pi(a), F = E[Z Z^T] = diag(pi) - pi pi^T, U = F^(-1/2) Z (on the
d = K - 1 directions that F has), A_K the advantage of each action, V = E[A^2], G = max |Z|, b_g the mean of Z A over B
actions drawn from pi. A fixed advantage serves as the reward of an objective J(theta) = E[A], whose gradient is E[Z A]:

    Lemma 3.2   E[J(theta + alpha b_g) - J(theta)] <= alpha (1 + alpha L / 2) |grad J|^2 + (alpha^2 L / 2) Var(b_g)
    Def.  3.3   rho(A) = |E[U A]| / sqrt(d V)
    Lemma 3.4   |grad J|^2 <= lambda_max(F) d rho(A)^2 V
    Lemma 3.5   Var(b_g) <= G^2 V / B
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bound:
    """Both sides of the lemmas: gradient and variance measured exactly, and what bounds them.

    rho is 0 where the advantage has no variance. step bounds the improvement of E[A] by one step (lemmas 3.2, 3.4 and
    3.5 put together, which is ours).
    """

    gradient: float  # |E[Z A]|^2
    signal: float  # lambda_max(F) d rho^2 V
    variance: float  # Var(b_g)
    noise: float  # G^2 V / B
    rho: float
    second: float  # V
    step: float


def bound(pi_K: np.ndarray, adv_K: np.ndarray, alpha: float, batch: int) -> Bound:
    """The lemmas at a policy with positive probabilities. L = 5/2 of the advantage's range (arXiv 2005.06392)."""
    score_KK = np.eye(len(pi_K)) - pi_K  # row a: Z_a
    fisher_KK = np.diag(pi_K) - np.outer(pi_K, pi_K)
    second, directions = float(pi_K @ adv_K**2), len(pi_K) - 1
    gradient_K = (pi_K * adv_K) @ score_KK
    squared = float(gradient_K @ gradient_K)
    aligned = float(gradient_K @ np.linalg.pinv(fisher_KK, hermitian=True) @ gradient_K)
    rho = np.sqrt(max(aligned, 0.0) / (directions * second)) if second > 0 and directions else 0.0
    signal = float(np.linalg.eigvalsh(fisher_KK)[-1]) * directions * rho**2 * second
    length_K = (score_KK**2).sum(1)
    variance = (float(pi_K @ (length_K * adv_K**2)) - squared) / batch
    noise = float(length_K.max()) * second / batch
    smooth = 2.5 * float(np.ptp(adv_K))
    step = alpha * (1 + alpha * smooth / 2) * signal + alpha**2 * smooth / 2 * noise
    return Bound(squared, signal, variance, noise, float(rho), second, step)


def improvement(pi_K: np.ndarray, adv_K: np.ndarray, reward_K: np.ndarray, alpha: float) -> float:
    """E[J(theta + alpha b_g) - J(theta)] for J = E[reward], exactly, over all pairs of actions (B = 2)."""
    score_KK = np.eye(len(pi_K)) - pi_K
    drawn_KK = score_KK * adv_K[:, None]
    mean_KKK = (drawn_KK[:, None] + drawn_KK[None]) / 2
    logits = np.log(pi_K) + alpha * mean_KKK
    moved = np.exp(logits - logits.max(-1, keepdims=True))
    moved /= moved.sum(-1, keepdims=True)
    return float(pi_K @ (moved @ reward_K) @ pi_K - pi_K @ reward_K)


def gated_advantage(
    pi_K: np.ndarray, outcome_K: np.ndarray, reasoning_K: np.ndarray, lam: float = 0.5, gated: bool = True
) -> np.ndarray:
    """AWPO's hyper-advantage of each action under the policy's own mean and deviation, without standardising and with
    difficulty weight 1: (1 - w) (r_out - mean) + w (r_mix - mean), so that its variance keeps its meaning.

    gated false: w = 1, the plain sum.
    """
    mixed_K = (1 - lam) * outcome_K + lam * reasoning_K
    centred = [r - pi_K @ r for r in (outcome_K, mixed_K)]
    sd_out, sd_mix = (float(np.sqrt(pi_K @ c**2)) for c in centred)
    solved = pi_K @ outcome_K >= 1 - 1e-6
    w = 1.0 if not gated else 0.0 if solved else sd_mix / (sd_out + sd_mix + 1e-6)
    return (1 - w) * centred[0] + w * centred[1]
