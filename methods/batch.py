"""Trajectories and the padded batch that they become (shape legend in methods/base.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Segment:
    """One model context: a prompt and what was written after it, as token ids (never re-tokenised).

    `model_mask` is 1 on tokens that the model wrote and 0 on tool or environment text; None means all ones.
    `logprobs` are the sampler's own log-probabilities of `completion_ids`, where it reports them.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float] | None = None
    model_mask: list[int] | None = None


@dataclass
class Turn:
    """One model turn: tokens `start:end` (half-open) of `segments[segment].completion_ids`, model tokens only."""

    segment: int
    start: int
    end: int
    kind: str = "answer"
    calls: list[Any] = field(default_factory=list)  # parsed calls; unparsable ones stay as None
    result: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    text: str = ""  # what the model wrote, where an episode with tools was run


@dataclass
class Trajectory:
    """One rollout of one prompt, or a demonstration placed in its group."""

    row_id: str
    group_id: int
    sample_id: int
    segments: list[Segment]
    turns: list[Turn] = field(default_factory=list)
    finish: str = "stop"  # stop | length
    is_demo: bool = False
    rewards: dict[str, float] = field(default_factory=dict)  # NaN = the reward does not apply
    text: str = ""
    row: Any = None

    @property
    def length(self) -> int:
        """Number of tokens that the model wrote."""
        return sum(len(s.completion_ids) if s.model_mask is None else sum(s.model_mask) for s in self.segments)


def _pad(rows: Sequence[Sequence[float]], value: float, dtype: torch.dtype, left: bool = False) -> Tensor:
    width = max((len(r) for r in rows), default=0)
    if left:
        padded = [[value] * (width - len(r)) + list(r) for r in rows]
    else:
        padded = [list(r) + [value] * (width - len(r)) for r in rows]
    return torch.tensor(padded, dtype=dtype).reshape(len(rows), width)


@dataclass
class Batch:
    """Padded tensors of S training rows; a row is a segment of a trajectory.

    prompts are padded on the left (width P), completions on the right (width T). `adv_ST` is float32 and 0
    outside `model_mask_ST`. `row_weight_S` are relative weights of rows (None: all equal). `extras` are tensors
    of shape (S,) or (S, T) that reappear beside the loss as `lctx.extras`.
    """

    trajs: list[Trajectory]
    prompt_ids_SP: Tensor
    prompt_mask_SP: Tensor
    completion_ids_ST: Tensor
    completion_mask_ST: Tensor
    model_mask_ST: Tensor
    traj_S: Tensor  # index into trajs
    group_S: Tensor
    turn_ST: Tensor  # index into trajs[i].turns, -1 = no turn
    adv_ST: Tensor
    old_logps_ST: Tensor | None = None
    ref_logps_ST: Tensor | None = None
    entropies_ST: Tensor | None = None
    row_weight_S: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.completion_ids_ST.shape[0]

    def sequences(self) -> tuple[Tensor, Tensor]:
        """(S, P + T) ids and attention mask of prompt and completion together."""
        ids = torch.cat([self.prompt_ids_SP, self.completion_ids_ST], dim=1)
        return ids, torch.cat([self.prompt_mask_SP, self.completion_mask_ST], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Every row-aligned tensor by field name; extras as `extra/<name>`."""
        named = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return named | {f"extra/{k}": v for k, v in self.extras.items()}

    def with_tensors(self, named: dict[str, Tensor], trajs: list[Trajectory]) -> Batch:
        extras = {k.removeprefix("extra/"): v for k, v in named.items() if k.startswith("extra/")}
        fields = {k: v for k, v in named.items() if not k.startswith("extra/")}
        return replace(self, trajs=trajs, extras=extras, **fields)

    def rows_at(self, rows: slice) -> Batch:
        """These rows alone, of any trajectories; `trajs` stays whole."""
        return self.with_tensors({k: x[rows] for k, x in self.tensors().items()}, self.trajs)

    def take(self, trajectories: Sequence[int]) -> Batch:
        """The named trajectories in the given order (repeats allowed), whole, with their extras."""
        rows_of: list[list[int]] = [[] for _ in self.trajs]
        for row, traj in enumerate(self.traj_S.tolist()):
            rows_of[traj].append(row)
        rows = [r for i in trajectories for r in rows_of[i]]
        index = torch.tensor(rows, dtype=torch.long, device=self.traj_S.device)
        named = {k: v[index] for k, v in self.tensors().items()}
        counts = torch.tensor([len(rows_of[i]) for i in trajectories], device=self.traj_S.device)
        named["traj_S"] = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        return self.with_tensors(named, [self.trajs[i] for i in trajectories])

    def concat(self, other: Batch) -> Batch:
        """Rows of both, padded to the wider one. Both must carry the same tensors.

        An extra or log-prob that only one side has raises ValueError: silently inventing a value would train on it.
        """
        mine, theirs = self.tensors(), other.tensors()
        if mine.keys() != theirs.keys():
            odd = sorted(mine.keys() ^ theirs.keys())
            raise ValueError(f"batches carry different tensors: {odd} on one side only")
        theirs["traj_S"] = theirs["traj_S"] + len(self.trajs)
        named = {k: torch.cat(_align(k, mine[k], theirs[k])) for k in mine}
        return self.with_tensors(named, self.trajs + other.trajs)

    def trim(self) -> Batch:
        """Drops columns that are padding in every row (at least one column stays)."""
        if self.rows == 0:
            return self
        width_T = max(int(self.completion_mask_ST.sum(1).max()), 1)
        width_P = max(int(self.prompt_mask_SP.sum(1).max()), 1)
        named = {}
        for name, x in self.tensors().items():
            if x.dim() == 2:
                x = x[:, -width_P:] if name.endswith("_SP") else x[:, :width_T]
            named[name] = x
        return self.with_tensors(named, self.trajs)


_PAD_VALUE = {"turn_ST": -1}


def _align(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dim() < 2 or a.shape[1] == b.shape[1]:
        return a, b
    width = max(a.shape[1], b.shape[1])
    value = _PAD_VALUE.get(name, 0)

    def widen(x: Tensor) -> Tensor:
        gap = (width - x.shape[1], 0) if name.endswith("_SP") else (0, width - x.shape[1])
        return torch.nn.functional.pad(x, gap, value=value)

    return widen(a), widen(b)


def assemble(trajs: list[Trajectory], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pads trajectories into one Batch; `adv_ST` starts at zero.

    Rows keep trajectory order, then segment order. An empty completion or a turn outside its segment raises
    ValueError: both would silently shift credit.
    """
    segments = [(i, j, s) for i, t in enumerate(trajs) for j, s in enumerate(t.segments)]
    for i, j, s in segments:
        if not s.completion_ids:
            raise ValueError(f"trajectory {i} ({trajs[i].row_id}), segment {j}: empty completion (needs at least eos)")
    completion_ids_ST = _pad([s.completion_ids for *_, s in segments], pad_id, torch.long)
    completion_mask_ST = _pad([[1] * len(s.completion_ids) for *_, s in segments], 0, torch.long)
    masks = [s.model_mask or [1] * len(s.completion_ids) for *_, s in segments]
    if any(len(m) != len(s.completion_ids) for m, (*_, s) in zip(masks, segments, strict=True)):
        raise ValueError("model_mask and completion_ids differ in length")
    turn_ST = torch.full(completion_ids_ST.shape, -1, dtype=torch.long)
    row_of = {(i, j): row for row, (i, j, _) in enumerate(segments)}
    for i, t in enumerate(trajs):
        for k, turn in enumerate(t.turns):
            length = len(t.segments[turn.segment].completion_ids)
            if not 0 <= turn.start <= turn.end <= length:
                raise ValueError(f"turn {k} of {t.row_id}: {turn.start}:{turn.end} lies outside its {length} tokens")
            turn_ST[row_of[i, turn.segment], turn.start : turn.end] = k
    traj_S = torch.tensor([i for i, *_ in segments], dtype=torch.long)
    group_N = torch.tensor([t.group_id for t in trajs], dtype=torch.long)
    batch = Batch(
        trajs=trajs,
        prompt_ids_SP=_pad([s.prompt_ids for *_, s in segments], pad_id, torch.long, left=True),
        prompt_mask_SP=_pad([[1] * len(s.prompt_ids) for *_, s in segments], 0, torch.long, left=True),
        completion_ids_ST=completion_ids_ST,
        completion_mask_ST=completion_mask_ST,
        model_mask_ST=_pad(masks, 0, torch.long),
        traj_S=traj_S,
        group_S=group_N[traj_S],
        turn_ST=turn_ST,
        adv_ST=torch.zeros(completion_ids_ST.shape, dtype=torch.float32),
    )
    return batch.with_tensors({k: v.to(device) for k, v in batch.tensors().items()}, trajs)
