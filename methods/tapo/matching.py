"""Reference groups among the calls of successful rollouts, and what failing calls are matched with (sheet 3.3, 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from methods.tapo.similarity import TOLERANCE, Calls, Floats, Ints

Bools = NDArray[np.bool_]


@dataclass
class Rollouts:
    """N rollouts: prompt, success or failure (a rollout without an outcome is neither), and advantage."""

    prompt_N: Ints
    success_N: Bools
    failure_N: Bools
    advantage_N: Floats

    @property
    def mixed_N(self) -> Bools:
        """Rollouts of a prompt that has successes and failures."""
        successes_P, failures_P = (np.bincount(self.prompt_N, who) for who in (self.success_N, self.failure_N))
        return ((successes_P > 0) & (failures_P > 0))[self.prompt_N]


@dataclass
class Match:
    """Per call u: has it a witness, and of its best reference group: similarity m, support s, reference advantage.

    Zero where no group with a positive reference advantage comes within the threshold.
    """

    witness_U: Bools
    similarity_U: Floats
    support_U: Floats
    reference_U: Floats


def match(calls: Calls, call_U: Ints, rollout_U: Ints, rollouts: Rollouts, theta: float) -> Match:
    """Matches the calls of failing rollouts with the reference groups of their prompt.

    Groups are the connected components of sim >= theta among the successes' calls of one prompt, so that their order
    does not matter. With T_g the successful rollouts that have a member in g:
        s_g = |T_g| / |S|,  Abar_g = mean of A_i over T_g
    The best group has the largest similarity of any member, then the larger support, then the larger Abar.
    """
    empty = np.zeros(len(call_U))
    out = Match(np.zeros(len(call_U), bool), empty, empty.copy(), empty.copy())
    known = np.flatnonzero(call_U >= 0)
    if not len(known):
        return out
    key = rollouts.prompt_N[rollout_U[known]] * len(calls) + call_U[known]
    nodes, node = np.unique(key, return_inverse=True)
    call_D, prompt_D = nodes % len(calls), nodes // len(calls)
    succeeds, fails = (who[rollout_U[known]] for who in (rollouts.success_N, rollouts.failure_N))
    reference_D, failing_D = np.zeros(len(nodes), bool), np.zeros(len(nodes), bool)
    reference_D[node[succeeds]] = True
    failing_D[node[fails]] = True
    i, j, sim = calls.pairs(call_D, prompt_D, reference_D, theta)

    inside = reference_D[i]
    graph = coo_matrix((np.ones(int(inside.sum())), (i[inside], j[inside])), shape=(len(nodes), len(nodes)))
    _, group_D = connected_components(graph, directed=False)
    support_D, advantage_D = _groups(group_D, node[succeeds], rollout_U[known][succeeds], rollouts)

    witnessed_D = np.zeros(len(nodes), bool)
    witnessed_D[i] = True
    best_D, similarity_D = np.full(len(nodes), -1), np.zeros(len(nodes))
    use = failing_D[i] & (advantage_D[j] > 0)
    i, j, sim = i[use], j[use], sim[use]
    order = np.lexsort((-advantage_D[j], -support_D[j], -sim, i))
    found, first = np.unique(i[order], return_index=True)
    best_D[found], similarity_D[found] = j[order][first], sim[order][first]

    at, best = known[fails], best_D[node[fails]]
    out.witness_U[at] = witnessed_D[node[fails]]
    out.similarity_U[at] = similarity_D[node[fails]]
    out.support_U[at] = np.where(best >= 0, support_D[best], 0.0)
    out.reference_U[at] = np.where(best >= 0, advantage_D[best], 0.0)
    return out


def _groups(group_D: Ints, node_R: Ints, rollout_R: Ints, rollouts: Rollouts) -> tuple[Floats, Floats]:
    """(D,) support and reference advantage of each entry's group, from the successes' calls R.

    A rollout counts once in a group however often it repeats the call.
    """
    total = len(rollouts.prompt_N)
    group, rollout = np.divmod(np.unique(group_D[node_R] * total + rollout_R), total)
    size = np.bincount(group, minlength=len(group_D))
    mean = np.bincount(group, rollouts.advantage_N[rollout], len(group_D)) / np.maximum(size, 1)
    successes_P = np.bincount(rollouts.prompt_N, rollouts.success_N)
    of_prompt = np.ones(len(group_D))
    of_prompt[group] = successes_P[rollouts.prompt_N[rollout]]
    return (size / of_prompt)[group_D], mean[group_D]


def at_least(value: Floats, least: float) -> Bools:
    return value >= least - TOLERANCE
