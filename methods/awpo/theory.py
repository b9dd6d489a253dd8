"""The bound behind AWPO (section 3 of arXiv 2512.19126, as its reviews give it), for a log-linear policy of K actions.

phi_KD are the actions' features, pi_K their probabilities, Z_a = phi_a - E[phi] the gradient of log pi(a),
F = E[Z Z^T], U = F^(-1/2) Z on the d directions that F has, A_K the advantage of each action, V = E[A^2], G = max |Z|,
b_g the mean of Z A over B actions drawn from pi. A fixed advantage serves as the reward of an objective
J(theta) = E[A], whose gradient is E[Z A]:

    Lemma 3.2   E[J(theta + alpha b_g) - J(theta)] <= alpha (1 + alpha L / 2) |grad J|^2 + (alpha^2 L / 2) Var(b_g)
    Def.  3.3   rho(A) = |E[U A]| / sqrt(d V)
    Lemma 3.4   |grad J|^2 <= lambda_max(F) d rho(A)^2 V
    Lemma 3.5   Var(b_g) <= G^2 V / B

L = range(A) diam(phi)^2 / 4, because the Hessian is E[(A - c)(Z Z^T - F)] for any c and no covariance of phi exceeds
diam^2 / 4. Degenerate: with one feature per action rho is 1 / sqrt(d) for every advantage; alignment then says nothing.
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


def bound(phi_KD: np.ndarray, pi_K: np.ndarray, adv_K: np.ndarray, alpha: float, batch: int) -> Bound:
    """The lemmas at a policy with positive probabilities."""
    score_KD = phi_KD - pi_K @ phi_KD
    fisher_DD = (pi_K[:, None] * score_KD).T @ score_KD
    spectrum_D, axes_DD = np.linalg.eigh(fisher_DD)
    held_D = spectrum_D > 1e-12 * spectrum_D[-1]
    second, directions = float(pi_K @ adv_K**2), int(held_D.sum())
    gradient_D = (pi_K * adv_K) @ score_KD
    squared = float(gradient_D @ gradient_D)
    along_D = (gradient_D @ axes_DD)[held_D]
    aligned = float(along_D @ (along_D / spectrum_D[held_D]))
    rho = float(np.sqrt(aligned / (directions * second))) if second > 0 and directions else 0.0
    signal = float(spectrum_D[-1]) * directions * rho**2 * second
    length_K = (score_KD**2).sum(1)
    variance = (float(pi_K @ (length_K * adv_K**2)) - squared) / batch
    noise = float(length_K.max()) * second / batch
    diameter = ((phi_KD[:, None] - phi_KD[None]) ** 2).sum(-1).max()
    smooth = float(np.ptp(adv_K) * diameter) / 4
    step = alpha * (1 + alpha * smooth / 2) * signal + alpha**2 * smooth / 2 * noise
    return Bound(squared, signal, variance, noise, rho, second, step)


def improvement(phi_KD: np.ndarray, pi_K: np.ndarray, adv_K: np.ndarray, reward_K: np.ndarray, alpha: float) -> float:
    """E[J(theta + alpha b_g) - J(theta)] for J = E[reward], exactly, over all pairs of actions (B = 2)."""
    drawn_KD = (phi_KD - pi_K @ phi_KD) * adv_K[:, None]
    mean_KKD = (drawn_KD[:, None] + drawn_KD[None]) / 2
    logits_KKK = np.log(pi_K) + alpha * mean_KKD @ phi_KD.T
    moved_KKK = np.exp(logits_KKK - logits_KKK.max(-1, keepdims=True))
    moved_KKK /= moved_KKK.sum(-1, keepdims=True)
    return float(pi_K @ (moved_KKK @ reward_K) @ pi_K - pi_K @ reward_K)


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
