"""The rollouts of the last rounds, first in, first out: compact tensors by round, and what a record shows of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.base import Batch, Segment, Trajectory
from methods.rollout_bandits.features import COLUMN

AGE, USAGE = COLUMN["age"], COLUMN["usage"]
# Rebuilt when a rollout is taken out again, or read by nothing behind `select`.
NOT_KEPT = ("turn_ST", "entropies_ST")
GROUPS_PER_ROUND = 10**6  # group ids of different rounds must not meet


@dataclass(frozen=True)
class StoredRow:
    """What remains of a task's row in the buffer."""

    id: str
    tier: str


@dataclass
class Round:
    """One round: its rows in narrow types, the facts of its rollouts, and what the record shows of them."""

    born: int
    tensors: dict[str, Tensor]
    facts_NF: Tensor
    shown: list[list[Any]]  # row id, tier, sample id, finish, text, rewards


class Buffer:
    """Rollouts of the last `rounds` rounds with prompt, completion, behaviour log-probs, advantage and extras.

    Candidates are numbered from the oldest round to the newest, inside a round in the order of its batch. A rollout
    taken out is a new Trajectory without turns; its group id is made unique over rounds.
    """

    def __init__(self, rounds: int) -> None:
        self.limit, self.rounds = rounds, list[Round]()

    def __len__(self) -> int:
        return sum(len(r.facts_NF) for r in self.rounds)

    def push(self, batch: Batch, facts_NF: Tensor, now: int) -> None:
        """Adds the rollouts of round `now`, and drops rounds that are `limit` or more rounds old."""
        tensors = {k: _narrow(k, v) for k, v in batch.tensors().items() if k not in NOT_KEPT}
        shown = [
            [t.row_id, getattr(t.row, "tier", "all"), t.sample_id, t.finish, t.text, dict(t.rewards)]
            for t in batch.trajs
        ]
        self.rounds = [r for r in self.rounds if r.born > now - self.limit]
        if shown:
            self.rounds.append(Round(now, tensors, facts_NF.clone(), shown))

    def facts(self, now: int) -> Tensor:
        """(M, 10) facts of all candidates; age is counted from the round of birth."""
        if not self.rounds:
            return torch.zeros(0, len(COLUMN))
        facts_NF = torch.cat([r.facts_NF for r in self.rounds])
        sizes = torch.tensor([len(r.facts_NF) for r in self.rounds])
        ages = torch.tensor([float(now - r.born) for r in self.rounds])
        facts_NF[:, AGE] = torch.repeat_interleave(ages, sizes)
        return facts_NF

    def refresh(self, chosen_K: Tensor, values: dict[str, Tensor]) -> None:
        """Overwrites named facts (K,) of some candidates."""
        for part, r, inside in self._parts(chosen_K):
            for name, x_K in values.items():
                r.facts_NF[inside, COLUMN[name]] = x_K[part]

    def use(self, chosen_K: Tensor) -> None:
        """Counts one more use of these candidates."""
        for _, r, inside in self._parts(chosen_K):
            r.facts_NF[inside, USAGE] += 1

    def take(self, chosen_K: Tensor, device: torch.device | str = "cpu") -> Batch:
        """The named candidates (ascending) as one batch on `device`. ValueError for an empty choice."""
        batches = [_batch(r, inside, device) for _, r, inside in self._parts(chosen_K)]
        if not batches:
            raise ValueError("nothing was chosen from the buffer")
        whole = batches[0]
        for other in batches[1:]:
            whole = whole.concat(other)
        return whole.trim()

    def _parts(self, chosen_K: Tensor):
        """(which of chosen_K, round, positions inside it) for every round that was chosen from."""
        start = 0
        for r in self.rounds:
            part = (chosen_K >= start) & (chosen_K < start + len(r.facts_NF))
            if bool(part.any()):
                yield part, r, chosen_K[part] - start
            start += len(r.facts_NF)

    # ---- state ----
    def state_dict(self) -> dict[str, Any]:
        return {
            str(r.born): {"tensors": dict(r.tensors), "facts": r.facts_NF.clone(), "shown": r.shown}
            for r in self.rounds
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds = [
            Round(int(born), dict(r["tensors"]), r["facts"].clone(), r["shown"]) for born, r in state.items()
        ]


def _narrow(name: str, x: Tensor) -> Tensor:
    """Ids as int32, masks as bool, on the CPU: a quarter of the bytes of a batch in training."""
    if "_mask_" in name:
        return x.bool().cpu()
    return (x.int() if x.dtype == torch.long else x.detach()).cpu()


def _widen(name: str, x: Tensor) -> Tensor:
    return x.long() if x.dtype == torch.int32 or "_mask_" in name else x


def _batch(r: Round, inside_K: Tensor, device: torch.device | str) -> Batch:
    """A batch of the rollouts `inside_K` (ascending) of one round."""
    rows = torch.isin(r.tensors["traj_S"], inside_K.int()).nonzero().squeeze(1)
    named = {k: _widen(k, v[rows]) for k, v in r.tensors.items()}
    named["traj_S"] = torch.searchsorted(inside_K, named["traj_S"])
    named["group_S"] = named["group_S"] + r.born * GROUPS_PER_ROUND
    named["turn_ST"] = torch.full(named["completion_ids_ST"].shape, -1)
    trajs = _trajectories(r, inside_K, named)
    fields = {k: v.to(device) for k, v in named.items() if not k.startswith("extra/")}
    extras = {k.removeprefix("extra/"): v.to(device) for k, v in named.items() if k.startswith("extra/")}
    return Batch(trajs=trajs, extras=extras, **fields)  # type: ignore[arg-type]


def _trajectories(r: Round, inside_K: Tensor, named: dict[str, Tensor]) -> list[Trajectory]:
    """The rollouts themselves, for what reads ids rather than tensors: a forward pass, the sample browser."""
    out = []
    for i in inside_K.tolist():
        row_id, tier, sample, finish, text, rewards = r.shown[i]
        row = StoredRow(row_id, tier)
        out.append(Trajectory(row_id, 0, sample, [], finish=finish, rewards=dict(rewards), text=text, row=row))
    columns = ("traj_S", "group_S", "prompt_ids_SP", "completion_ids_ST", "model_mask_ST")
    lengths = (named["prompt_mask_SP"].sum(1).tolist(), named["completion_mask_ST"].sum(1).tolist())
    rows = zip(*(named[c].tolist() for c in columns), *lengths, strict=True)
    for traj, group, prompt, completion, mask, p, c in rows:
        out[traj].group_id = group
        out[traj].segments.append(Segment(prompt[len(prompt) - p :], completion[:c], model_mask=mask[:c]))
    return out
