"""Controls: stack entries that change one decisive quantity of a method, to test that it is what makes the effect.

A method passes that quantity through `ctx.signal(self, "direction", x, within=ids)`. A control with
`target: ha_dw.direction` changes it; the target `advantages` is the base advantage of any objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Context, Method


class Control(Method):
    """A stack entry that changes the signal it targets."""

    target: str

    def change(self, x: Tensor, within: Tensor | None, ctx: Context) -> Tensor:
        raise AssertionError("a control changes its signal")


@dataclass
class Flip(Control):
    """Negates a signal: does the direction matter?"""

    target: str
    name = "flip"

    def change(self, x: Tensor, within: Tensor | None, ctx: Context) -> Tensor:
        return -x


@dataclass
class Scale(Control):
    """Multiplies a signal by a constant: is the effect only a step size?"""

    target: str
    factor: float
    name = "scale"

    def change(self, x: Tensor, within: Tensor | None, ctx: Context) -> Tensor:
        return x * self.factor


@dataclass
class Shuffle(Control):
    """Permutes a signal inside each set (group, trajectory): does it matter who gets it?

    Entries are the slices along the first dimension; without `within` the whole batch is one set.
    """

    target: str
    name = "shuffle"

    def change(self, x: Tensor, within: Tensor | None, ctx: Context) -> Tensor:
        ids = torch.zeros(len(x), dtype=torch.long) if within is None else within.cpu()
        order = ctx.rng(f"control/{self.name}/{self.target}").random(len(x))
        # Sorting by (id, noise) permutes inside each id; sorting by (id, position) names the places to fill.
        noisy = torch.tensor(sorted(range(len(x)), key=lambda i: (int(ids[i]), order[i])), dtype=torch.long)
        places = torch.argsort(ids, stable=True)
        index = torch.empty_like(noisy)
        index[places] = noisy
        return rows_from(x, index, ctx)


@dataclass
class Random(Control):
    """Replaces each entry by a random one of the batch: does the information matter, or only its distribution?"""

    target: str
    name = "random"

    def change(self, x: Tensor, within: Tensor | None, ctx: Context) -> Tensor:
        drawn = ctx.rng(f"control/{self.name}/{self.target}").integers(0, len(x), size=len(x))
        return rows_from(x, torch.from_numpy(drawn), ctx)


def rows_from(x: Tensor, index: Tensor, ctx: Context) -> Tensor:
    """x[index] along the first dimension; credit on tokens is laid onto the receiver's own model tokens.

    Rows differ in length: a receiver longer than its donor goes on with the donor's last value, and nothing is
    left on padding or tool text.
    """
    index = index.to(x.device)
    mask_ST = None if ctx.batch is None else ctx.batch.model_mask_ST
    if mask_ST is None or x.shape != mask_ST.shape:
        return x[index]
    positions = torch.arange(x.shape[1], device=x.device).expand_as(mask_ST)
    last_ST = torch.cummax(torch.where(mask_ST.bool(), positions, -1), dim=1).values
    source_ST = torch.where(last_ST < 0, mask_ST.argmax(1, keepdim=True), last_ST)
    return x[index].gather(1, source_ST[index]) * mask_ST
