"""The rollouts of the last rounds, first in, first out: compact tensors by round, and what a record shows of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
        if len(chosen_K) == 0:
            raise ValueError("nothing was chosen from the buffer")
        pieces, shown, start = [], [], 0
        for _, r, inside in self._parts(chosen_K):
            rows = torch.isin(r.tensors["traj_S"], inside.int())
            piece = {k: v[rows] for k, v in r.tensors.items()}
            piece["traj_S"] = start + torch.searchsorted(inside, piece["traj_S"].long())
            piece["group_S"] = piece["group_S"].long() + r.born * GROUPS_PER_ROUND
            pieces.append(piece)
            shown += [r.shown[i] for i in inside.tolist()]
            start += len(inside)
        named = {k: _widen(k, _cat(k, [piece[k] for piece in pieces])) for k in pieces[0]}
        named["turn_ST"] = torch.full(named["completion_ids_ST"].shape, -1)
        trajs = _trajectories(shown, named)
        fields = {k: v.to(device) for k, v in named.items() if not k.startswith("extra/")}
        extras = {k.removeprefix("extra/"): v.to(device) for k, v in named.items() if k.startswith("extra/")}
        return Batch(trajs=trajs, extras=extras, **fields).trim()  # type: ignore[arg-type]

    def _parts(self, chosen_K: Tensor):
        """(which of chosen_K, round, positions inside it) for every round that was chosen from."""
        ends = torch.tensor([len(r.facts_NF) for r in self.rounds]).cumsum(0)
        owner_K = torch.searchsorted(ends, chosen_K, right=True)
        for i in owner_K.unique().tolist():
            part = owner_K == i
            yield part, self.rounds[i], chosen_K[part] - (ends[i] - len(self.rounds[i].facts_NF))

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
    """A copy on the CPU, ids as int32 and masks as bool: a third of the bytes of a batch in training."""
    kind = torch.bool if "_mask_" in name else torch.int32 if x.dtype == torch.long else x.dtype
    return x.detach().to("cpu", kind, copy=True)


def _widen(name: str, x: Tensor) -> Tensor:
    return x.long() if x.dtype == torch.int32 or "_mask_" in name else x


def _cat(name: str, parts: list[Tensor]) -> Tensor:
    """Rows of all parts, padded to the widest: prompts on the left, everything else on the right."""
    width = max(x.shape[-1] for x in parts)
    if parts[0].dim() > 1:
        gaps = [width - x.shape[1] for x in parts]
        left = name.endswith("_SP")
        parts = [F.pad(x, (g, 0) if left else (0, g)) if g else x for x, g in zip(parts, gaps, strict=True)]
    return torch.cat(parts)


def _trajectories(shown: list[list[Any]], named: dict[str, Tensor]) -> list[Trajectory]:
    """The rollouts themselves, for what reads ids rather than tensors: a forward pass, the sample browser."""
    out = []
    for row_id, tier, sample, finish, text, rewards in shown:
        row = StoredRow(row_id, tier)
        out.append(Trajectory(row_id, 0, sample, [], finish=finish, rewards=dict(rewards), text=text, row=row))
    columns = ("traj_S", "group_S", "prompt_ids_SP", "completion_ids_ST", "model_mask_ST")
    lengths = (named["prompt_mask_SP"].sum(1).tolist(), named["completion_mask_ST"].sum(1).tolist())
    rows = zip(*(named[c].tolist() for c in columns), *lengths, strict=True)
    for traj, group, prompt, completion, mask, p, c in rows:
        out[traj].group_id = group
        out[traj].segments.append(Segment(prompt[len(prompt) - p :], completion[:c], model_mask=mask[:c]))
    return out
