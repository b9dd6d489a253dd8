"""VSRM: verifiable stepwise rewards against overthinking (arXiv 2508.10293)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Context, Trajectory
from methods.errors import ConfigError, check_range
from methods.vsrm.segmentation import Trace
from methods.vsrm.states import StateAccuracy, ineffective_share, post_solution_share


@dataclass
class Vsrm(StateAccuracy):
    """VSRM: each thinking step is rewarded by what it does to the accuracy of the intermediate state.

    The thinking is cut at cue words into steps 0..K. A_j is the share of right answers among `samples` that the policy
    gives when its thinking is closed before step j (A_{K+1}: after the whole thinking). With D_j = A_{j+1} - A_j:
        r_j = D_j                        if |D_j| >= tol
        r_j = gamma^q D_{j+q}            else, q >= 1 the distance to the next step with |D| >= tol, if q <= lookahead
        r_j = 0                          else
    Token rewards: r_j on the first token of step j (`reward_at: end`: on its last), and on the last token of the
    response the weighted sum of the named rewards R, in place of what falls there. REINFORCE++ or PPO does the rest.

    What each place credits (undiscounted, lookahead 0): the decision to open step j returns R + A_{K+1} - A_j with
    both. The step's other tokens return the same with `end`, but R + A_{K+1} - A_{j+1} with `start`: there the state
    that a token brings about is taken from its own return, so that a right value earns little more than a wrong one.

    The quantity `step_rewards` passes the controls as one vector of all r_j, sets are trajectories.

    Differs from the paper's release: cue words must stand alone (`word_boundary`), tokens are found by the offsets of
    the generated ids, states are concatenated ids, an unclosed thinking is closed at its end, an opening tag may
    stand in the prompt, and one verifier scores everything.
    Degenerate: no step, or equal A_j: only the outcome reward; a split token outside the model's own tokens loses its
    reward and is counted; an unscorable trajectory leaves the batch's statistics.
    """

    gamma: float = 0.7
    lookahead: int = 4
    tol: float = 1e-5
    reward_at: str = "start"

    name = "vsrm"
    signals = ("step_rewards",)
    token_credit = True
    objectives = ("reinforce_pp", "ppo")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("method.vsrm.gamma", self.gamma, 0.0, 1.0)
        check_range("method.vsrm.lookahead", self.lookahead, 0)
        check_range("method.vsrm.tol", self.tol, 0.0)
        if self.reward_at not in ("start", "end"):
            raise ConfigError(
                "unknown place of the step reward", where="method.vsrm.reward_at", got=self.reward_at,
                expected="start or end",
            )  # fmt: skip

    def token_rewards(self, trajs: list[Trajectory], ctx: Context) -> Tensor:
        batch = ctx.batch
        assert batch is not None
        traces = self.traces(trajs, ctx)
        accuracies = self.accuracies(trajs, traces, ctx)
        owner_M, token_M, r_M = self._rewards(traces, accuracies, ctx)
        rewards_ST = place(owner_M, token_M, r_M, ctx.total_reward(), batch)
        self._note(traces, accuracies, owner_M, token_M, r_M, ctx)
        return rewards_ST

    def _rewards(self, traces: Sequence[Trace], accuracies: Sequence[list[float] | None], ctx: Context):
        """Trajectory, token and value of every step reward, after the controls."""
        owners, tokens, values = [], [], []
        for i, (trace, accuracy) in enumerate(zip(traces, accuracies, strict=True)):
            if accuracy is not None:
                values += stepwise_rewards(accuracy, len(trace.steps), self.gamma, self.lookahead, self.tol)
                cuts = trace.cuts
                tokens += cuts[:-1] if self.reward_at == "start" else [cut - 1 for cut in cuts[1:]]
                owners += [i] * len(trace.steps)
        owner_M, token_M = torch.tensor(owners, dtype=torch.long), torch.tensor(tokens, dtype=torch.long)
        r_M = torch.tensor(values, dtype=torch.float32)
        return owner_M, token_M, ctx.signal(self, "step_rewards", r_M, within=owner_M) if owners else r_M

    def _note(self, traces, accuracies, owner_M: Tensor, token_M: Tensor, r_M: Tensor, ctx: Context) -> None:
        n = max(len(traces), 1)
        measured = [(t, a) for t, a in zip(traces, accuracies, strict=True) if a is not None]
        batch = ctx.batch
        assert batch is not None
        self.counts |= {
            "steps": sum(len(t.steps) for t in traces) / n,
            "with_steps": sum(bool(t.steps) for t in traces) / n,
            "unclosed": sum(not t.closed for t in traces) / n,
            "penalised": float((ctx.total_reward() < 0).float().mean()),
            "dropped": float((~inside(owner_M, token_M, batch)).sum()),
            "reward/abs": float(r_M.abs().mean()) if len(r_M) else 0.0,
            "ineffective_steps": _mean([ineffective_share(a) for _, a in measured]),
            "post_solution": _mean([post_solution_share(a, t) for t, a in measured]),
        }
        by_cue: dict[str, list[float]] = defaultdict(list)
        cues = [step.cue.lower() for t, _ in measured for step in t.steps]
        for cue, r in zip(cues, r_M.tolist(), strict=True):
            by_cue[cue].append(r)
        self.counts = {k: v for k, v in self.counts.items() if not k.startswith("cue/")}
        self.counts |= {f"cue/{cue}": _mean(values) for cue, values in sorted(by_cue.items())}

    def metrics(self) -> dict[str, float]:
        return dict(self.counts)


def stepwise_rewards(
    accuracy: Sequence[float], steps: int, gamma: float = 0.7, lookahead: int = 4, tol: float = 1e-5
) -> list[float]:
    """r_1..r_K from A_1..A_{K+1}. ValueError if there are not K + 1 accuracies."""
    if len(accuracy) != steps + 1:
        raise ValueError(f"{steps} steps need {steps + 1} state accuracies, got {len(accuracy)}")
    rewards = [0.0] * steps
    effect, distance = 0.0, lookahead + 1  # of the next step that has an effect, seen from behind
    for j in range(steps - 1, -1, -1):
        gain = accuracy[j + 1] - accuracy[j]
        effect, distance = (gain, 0) if abs(gain) >= tol else (effect, distance + 1)
        rewards[j] = gamma**distance * effect if distance <= lookahead else 0.0
    return rewards


def last_rows(batch) -> Tensor:
    """(N,) the last training row of each trajectory."""
    rows = torch.arange(batch.rows, device=batch.traj_S.device)
    last_N = torch.zeros(len(batch.trajs), dtype=torch.long, device=rows.device)
    return last_N.scatter_reduce(0, batch.traj_S, rows, reduce="amax")


def inside(owner_M: Tensor, token_M: Tensor, batch) -> Tensor:
    """(M,) whether each token of its trajectory's last row was written by the model."""
    device, width = batch.traj_S.device, batch.model_mask_ST.shape[1]
    owner_M, token_M = owner_M.to(device), token_M.to(device)
    mask_M = batch.model_mask_ST[last_rows(batch)[owner_M], token_M.clamp(0, width - 1)].bool()
    return mask_M & (token_M >= 0) & (token_M < width)


def place(owner_M: Tensor, token_M: Tensor, r_M: Tensor, outcome_N: Tensor, batch) -> Tensor:
    """(S, T) step rewards on their tokens, and the outcome SET on each trajectory's last model token."""
    mask_ST = batch.model_mask_ST
    device, width = mask_ST.device, mask_ST.shape[1]
    rewards_ST = torch.zeros(mask_ST.shape, dtype=torch.float32, device=device)
    row_N = last_rows(batch)
    keep_M = inside(owner_M, token_M, batch)
    where = (row_N[owner_M.to(device)][keep_M], token_M.to(device)[keep_M])
    rewards_ST.index_put_(where, r_M.to(device)[keep_M], accumulate=True)
    last_N = (torch.arange(1, width + 1, device=device) * mask_ST[row_N]).argmax(1)
    rewards_ST[row_N, last_N] = outcome_N.to(device=device, dtype=torch.float32)
    return rewards_ST


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
