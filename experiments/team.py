"""The processes of one run: what each has a share of, and what all have in common.

The hooks of a generation see the whole of it on every process, so that no method needs to know of processes: a group, a
buffer, a running mean are the same everywhere, and a method's state is saved once. What costs time is divided and then
joined: rollouts by groups, the services (sampling, forwards, verifier, judge) by requests or rows. Each process then
trains on its own rows.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.batch import Batch, Trajectory
from methods.errors import ConfigError, RunError


@dataclass(frozen=True)
class Team:
    """Process `rank` of `size`; alone it costs nothing.

    `part` and `rows_of` are sums; every other method is a meeting: all processes call it, in the same order.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def meet(cls, processes: int, use_cpu: bool) -> Team:
        """Waits for all processes of the run. ConfigError unless there are as many as asked for."""
        from accelerate import PartialState

        if processes == 1:
            return cls()
        state = PartialState(cpu=use_cpu)
        if state.num_processes != processes:
            raise ConfigError(
                "the launcher started another number of processes than the run asks for",
                where="scale.num_processes",
                got=state.num_processes,
                expected=str(processes),
                fix="let assay start them, or give the launcher the same number",
            )
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # ---- shares ----
    def part(self, count: int, unit: int = 1) -> slice:
        """Which of `count` things are this process's own: neighbours, in whole units (groups)."""
        units = count // unit
        return slice(self.rank * units // self.size * unit, (self.rank + 1) * units // self.size * unit)

    def rows_of(self, batch: Batch) -> Batch:
        """Every size-th row of a batch, so that long and short groups are spread, without columns of padding."""
        if self.size == 1:
            return batch
        index = torch.arange(self.rank, batch.rows, self.size, device=batch.traj_S.device)
        return batch.with_tensors({k: x[index] for k, x in batch.tensors().items()}, batch.trajs).trim()

    # ---- meetings ----
    def joined(self, mine: Sequence[Any]) -> list[Any]:
        """The items of all processes, in the order of the processes."""
        if self.size == 1:
            return list(mine)
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, list(mine))
        return [item for part in parts for item in part]

    def divided(self, items: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
        """work(items), each process doing its part. What one raises, all raise, so that none waits for it."""
        if self.size == 1:
            return list(work(items)) if len(items) else []
        mine, error = items[self.part(len(items))], None
        try:
            done: list[Any] = list(work(mine)) if len(mine) else []
        except Exception as failure:  # whatever a verifier or an engine raises
            done, error = [], _picklable(failure)
        for failure in self.joined([error]):
            if failure is not None:
                raise failure
        return self.joined(done)

    def divided_rows(self, count: int, work: Callable[[slice], Tensor]) -> Tensor:
        """work(slice) gives a tensor with a row for each of `count`; each process computes its part, all get all."""
        if self.size == 1 or count < self.size:
            return work(slice(0, count))
        mine = work(self.part(count))
        sizes = [len(range(count)[Team(rank, self.size).part(count)]) for rank in range(self.size)]
        padded = torch.cat([mine, mine.new_zeros(max(sizes) - len(mine), *mine.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def trajectories(self, mine: list[Trajectory], rows: Sequence[Any]) -> list[Trajectory]:
        """The rollouts of all processes. Their rows, which may be large, are found in `rows` where they are known."""
        if self.size == 1:
            return mine
        place_of = {id(row): k for k, row in enumerate(rows)}
        sent = [(t, t.row, place_of.get(id(t.row))) for t in mine]
        for t in mine:
            t.row = None
        out = []
        for t, row, place in self.joined([(t, row if place is None else None, place) for t, row, place in sent]):
            t.row = row if place is None else rows[place]
            out.append(t)
        return out

    def total(self, numbers: dict[str, int]) -> dict[str, int]:
        """The sum of each number over processes."""
        if self.size == 1:
            return numbers
        return {k: sum(one.get(k, 0) for one in self._all(numbers)) for k in numbers}

    def mean(self, numbers: dict[str, float]) -> dict[str, float]:
        """The mean of each number over the processes that have it, NaN left out."""
        if self.size == 1:
            return numbers
        parts = self._all(numbers)
        names = dict.fromkeys(name for one in parts for name in one)
        found = {name: [one[name] for one in parts if name in one and one[name] == one[name]] for name in names}
        return {name: sum(xs) / len(xs) if xs else float("nan") for name, xs in found.items()}

    def largest(self, number: int) -> int:
        return max(self.joined([number]))

    def from_main(self, work: Callable[[], Any]) -> Any:
        """What work() gives on the first process; the others wait for it."""
        return self.divided([work] * self.size, lambda calls: [calls[0]() if self.is_main else None])[0]

    def agree(self, what: str, number: int) -> None:
        """RunError unless all processes have the same number: their next steps would not fit together."""
        found = self.joined([number])
        if len(set(found)) > 1:
            raise RunError(
                f"the processes differ in {what}",
                got=", ".join(map(str, found)),
                fix="a method or reward must depend on its arguments and ctx.rng alone; look for a clock or a set",
            )

    def _all(self, mine: Any) -> Iterable[Any]:
        return self.joined([mine])


ALONE = Team()


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")


# ---------------------------------------------------------------- sharded weights


def all_weights(model: Any, trainer: Any) -> AbstractContextManager:
    """Inside: every process has all weights of `model` and forwards it for itself, as often as it likes."""
    if getattr(trainer, "is_fsdp_enabled", False):
        return unsharded(model)
    if getattr(trainer, "is_deepspeed_enabled", False):
        from trl.models.utils import unwrap_model_for_generation

        return unwrap_model_for_generation(model, trainer.accelerator)
    return nullcontext()


@contextmanager
def unsharded(model: Any):
    """All parameters of a model under FSDP2 gathered, until the end of the block."""
    from torch.distributed.fsdp import FSDPModule

    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield model
    finally:
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
