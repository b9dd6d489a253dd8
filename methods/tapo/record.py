"""What TAPO reads from a batch: its tool calls as arrays, and one advantage per rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from methods.base import Batch, Trajectory
from methods.errors import DataError
from methods.tapo.matching import Bools
from methods.tapo.similarity import Calls, Floats, Ints


@dataclass
class Actions:
    """The U calls of N rollouts in order; K is the most turns of a rollout.

    Per call: its rollout, its turn, its identity (-1: it matches nothing), could it be read, has its turn tokens, is it
    one of the row's useful calls (-1: the row does not say).
    """

    rollout_U: Ints
    turn_U: Ints
    call_U: Ints
    parsable_U: Bools
    spanned_U: Bools
    useful_U: Ints
    shape: tuple[int, int]

    def count_NK(self, weight_U: Floats | Bools | None = None) -> Floats | Ints:
        """Sum over the calls of each turn; without weights, their number."""
        place_U = self.rollout_U * self.shape[1] + self.turn_U
        return np.bincount(place_U, weight_U, self.shape[0] * self.shape[1]).reshape(self.shape)


def actions_of(trajs: Sequence[Trajectory], calls: Calls, compared_N: Bools) -> Actions:
    """All calls; only those of the rollouts that are compared with others get an identity."""
    flat: list[int] = []  # six numbers per call: one list of numbers becomes an array faster than many tuples
    for i, (traj, compared) in enumerate(zip(trajs, compared_N.tolist(), strict=True)):
        known = getattr(traj.row, "meta", {}).get("useful_calls")
        for k, turn in enumerate(traj.turns):
            spanned = turn.end > turn.start
            for call in turn.calls or ():
                useful = -1 if known is None else call in known
                flat += i, k, calls.add(call) if compared else -1, call is not None, spanned, useful
    table = np.fromiter(flat, np.int64, len(flat)).reshape(-1, 6).T
    shape = (len(trajs), max((len(t.turns) for t in trajs), default=0) or 1)
    return Actions(table[0], table[1], table[2], table[3] > 0, table[4] > 0, table[5], shape)


def rollout_means(adv_ST: Tensor, batch: Batch) -> Floats:
    """(N,) mean advantage of each rollout's model tokens: A_i where every token of a row has the same."""
    sums_S2 = torch.stack([(adv_ST * batch.model_mask_ST).sum(1), batch.model_mask_ST.sum(1)], dim=1).double()
    sums_N2 = sums_S2.new_zeros(len(batch.trajs), 2).index_add_(0, batch.traj_S, sums_S2)
    return (sums_N2[:, 0] / sums_N2[:, 1].clamp(min=1)).cpu().numpy()


def refuse_overlaps(trajs: Sequence[Trajectory], batch: Batch) -> None:
    """DataError if two turns of a rollout claim the same token: its credit would be that of the later one."""
    claimed = [sum(turn.end - turn.start for turn in t.turns) for t in trajs]
    marked_N = torch.zeros(len(trajs), dtype=torch.long, device=batch.traj_S.device)
    marked_N.index_add_(0, batch.traj_S, (batch.turn_ST >= 0).sum(1))
    for traj, wanted, found in zip(trajs, claimed, marked_N.tolist(), strict=True):
        if wanted != found:
            raise DataError(
                "turns of a rollout overlap",
                where=f"row {traj.row_id}, sample {traj.sample_id}",
                got=", ".join(f"{t.start}:{t.end} of segment {t.segment}" for t in traj.turns),
                expected="spans that share no token",
                fix="repair the rollout that wrote these turns",
            )
