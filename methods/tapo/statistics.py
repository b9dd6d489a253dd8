"""How much credit is misassigned in a batch, and how much of it was corrected (sheet 3.1 and 4)."""

from __future__ import annotations

import math

import numpy as np

from methods.tapo.matching import Bools, Match, Rollouts
from methods.tapo.record import Actions
from methods.tapo.similarity import Floats


def counts(
    rollouts: Rollouts, actions: Actions, found: Match, gate_U: Bools, transfer_NK: Floats, beta: float
) -> dict[str, float]:
    """Sums that add up over processes; `rates` divides them.

    An action is a readable call of a failing rollout. A step is a turn of a failing rollout that makes calls and has
    tokens; it is corrected if it gets a transfer and its rollout's advantage is negative.
    """
    fails_N, mixed_N = rollouts.failure_N, rollouts.mixed_N
    action_U = actions.parsable_U & fails_N[actions.rollout_U]
    size = len(fails_N)
    step_NK = actions.count_NK(actions.spanned_U) * fails_N[:, None] > 0
    corrected_NK = step_NK & (transfer_NK != 0) & (rollouts.advantage_N < 0)[:, None]
    zero_NK = corrected_NK & (rollouts.advantage_N[:, None] + beta * transfer_NK >= 0)
    entries = {
        "rollouts": fails_N,
        "rollouts_mixed": fails_N & mixed_N,
        "rollouts_users": np.bincount(actions.rollout_U[action_U], minlength=size) > 0,
        "rollouts_witnessed": np.bincount(actions.rollout_U, found.witness_U, size) > 0,
        "actions": action_U,
        "actions_mixed": action_U & mixed_N[actions.rollout_U],
        "actions_witnessed": found.witness_U,
        "gated": gate_U,
        "match": found.similarity_U[gate_U],
        "support": found.support_U[gate_U],
        "steps": step_NK,
        "corrected": corrected_NK,
        "zero": zero_NK,
        "transfer": transfer_NK[corrected_NK],
    }
    return {name: float(np.sum(values)) for name, values in entries.items()}


def useful(rollouts: Rollouts, actions: Actions, transfer_U: Floats) -> dict[str, float]:
    """How many failing calls are useful ones: of those corrected, and of all in mixed groups that could be."""
    failing_U = (
        (rollouts.failure_N & rollouts.mixed_N)[actions.rollout_U] & actions.parsable_U & (actions.useful_U >= 0)
    )
    corrected_U = failing_U & (transfer_U != 0) & (rollouts.advantage_N < 0)[actions.rollout_U]
    sets = {"known": failing_U, "corrected_known": corrected_U}
    sums = {name: float(who_U.sum()) for name, who_U in sets.items()}
    return sums | {f"{name}_useful": float(actions.useful_U[who_U].sum()) for name, who_U in sets.items()}


def rates(n: dict[str, float]) -> dict[str, float]:
    """What is logged; NaN where nothing is counted."""
    shares = {
        "rho_traj": ("rollouts_witnessed", "rollouts"),
        "rho_traj_mixed": ("rollouts_witnessed", "rollouts_mixed"),
        "rho_traj_tool_users": ("rollouts_witnessed", "rollouts_users"),
        "rho_action": ("actions_witnessed", "actions"),
        "rho_action_mixed": ("actions_witnessed", "actions_mixed"),
        "frac_steps_corrected": ("corrected", "steps"),
        "mean_transfer": ("transfer", "corrected"),
        "frac_clipped_to_zero": ("zero", "corrected"),
        "mean_match": ("match", "gated"),
        "mean_support": ("support", "gated"),
        "precision": ("corrected_known_useful", "corrected_known"),
        "useful": ("known_useful", "known"),
    }
    return {name: n[part] / n[whole] if n[whole] else math.nan for name, (part, whole) in shares.items()}
