"""Plain steps between rollouts and tensors: scoring, dead groups, filling up, slices, samples for the record."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from experiments.team import Team
from methods.base import Batch, Context, Segment, Trajectory, Turn
from methods.errors import RunError

ROUNDING = 1e-3  # equal rewards less their mean, over a deviation of 1e-4, can be this far from 0


class Meter(defaultdict):
    """Named lists of numbers (tensors stay on their device until drained)."""

    def __init__(self) -> None:
        super().__init__(list)

    def drain(self) -> dict[str, float]:
        """Mean of each list, NaN left out; empties the meter."""
        means = {}
        for name, values in sorted(self.items()):
            tensor = torch.stack([torch.as_tensor(v, dtype=torch.float32, device="cpu") for v in values])
            means[name] = torch.nanmean(tensor).item()
        self.clear()
        return means


class Cost(dict):
    """What the run has spent. Each process counts its own; `settle` makes it what all have spent."""

    def __init__(self) -> None:
        super().__init__({k: 0 for k in ("generated_tokens", "trained_tokens", "forwarded_tokens", "judge_calls")})
        self._settled = dict(self)

    def settle(self, team: Team) -> None:
        spent = team.total({k: v - self._settled.get(k, 0) for k, v in self.items()})
        self.load({k: self._settled.get(k, 0) + v for k, v in spent.items()})

    def load(self, totals: dict[str, int]) -> None:
        self.update(totals)
        self._settled = dict(self)


def trajectory(row, slot, prompt_ids, ids, logprobs, text, *, ends, group_size: int, first_group: int) -> Trajectory:
    """One sampled completion; slot j is sample j % G of group j // G of this process."""
    return Trajectory(
        row_id=row.id,
        group_id=first_group + slot // group_size,
        sample_id=slot % group_size,
        segments=[Segment(prompt_ids, ids, logprobs)],
        turns=[Turn(0, 0, len(ids))],
        finish="stop" if ids[-1] in ends else "length",
        text=text,
        row=row,
    )


def learning_names(ctx: Context) -> list[str]:
    """The rewards that are trained on; those of weight 0 are recorded only."""
    return [n for n, w in zip(ctx.reward_names, ctx.reward_weights, strict=True) if w]


def summary(ctx: Context, batch: Batch) -> dict[str, Any]:
    """What is always logged of a generation: rewards, lengths, groups without signal, size of the advantage.

    groups/dead: share of groups whose rewards are all equal. groups/live: share with an advantage that is not 0; the
    two need not sum to 1, because methods give dead groups a signal, or others none. Rewards are those of every draw;
    advantages are those of `batch`, after `select`.
    """
    trajs = ctx.trajs
    drawn = [t for t in trajs if not t.is_demo] or trajs
    draws = {n: ctx.rewards_all.get(n, ctx.reward(n)) for n in ctx.reward_names}
    values: dict[str, Any] = {f"reward/{n}": torch.nanmean(x) for n, x in draws.items()}
    weighted = torch.stack([w * draws[n] for n, w in zip(ctx.reward_names, ctx.reward_weights, strict=True) if w])
    values["reward"] = torch.nanmean(weighted.nansum(0).where(~weighted.isnan().all(0), torch.nan))
    values["completions/mean_length"] = sum(t.length for t in drawn) / len(drawn)
    values["completions/truncated"] = sum(t.finish == "length" for t in drawn) / len(drawn)
    groups, dead = {t.group_id for t in trajs}, dead_groups(trajs, learning_names(ctx))
    largest_S = (batch.adv_ST.abs() * batch.model_mask_ST).amax(1)
    owners = [batch.trajs[i].group_id for i in batch.traj_S.tolist()]
    live = {g for g, a in zip(owners, largest_S.tolist(), strict=True) if a > (ROUNDING if g in dead else 0)}
    values["groups/dead"] = len(dead) / len(groups)
    values["groups/live"] = len(live) / len(groups | live)
    tokens = batch.model_mask_ST.sum().clamp(min=1)
    values["advantage/abs"] = (batch.adv_ST.abs() * batch.model_mask_ST).sum() / tokens
    return values


def score(trajs: list[Trajectory], specs, step: int) -> None:
    """Fills `traj.rewards`. Raises RunError for an infinite reward.

    A reward that does not apply (None) becomes NaN; a trajectory with only NaN rewards gets advantage 0.
    """
    texts, rows = [t.text for t in trajs], [t.row for t in trajs]
    for spec in specs:
        for t, value in zip(trajs, spec.fn(texts, rows), strict=True):
            value = math.nan if value is None else float(value)
            if math.isinf(value):
                raise RunError(
                    f"the reward '{spec.name}' is infinite",
                    where=f"step {step}, row {t.row_id}",
                    got=value,
                    expected="a finite number, or None where the reward does not apply",
                    fix="repair the reward function; the run goes on from its last checkpoint",
                )
            t.rewards[spec.name] = value


def refuse_unscored(trajs: list[Trajectory], specs, step: int) -> None:
    """RunError if no rollout of the batch can be scored."""
    if specs and all(math.isnan(v) for t in trajs for v in t.rewards.values()):
        raise RunError(
            "every reward of the batch is NaN",
            where=f"step {step}, rewards {', '.join(s.name for s in specs)}",
            got=f"{len(trajs)} rollouts without a single number",
            expected="at least one rollout that can be scored",
            fix="repair the reward function; the run goes on from its last checkpoint",
        )


def group_rows(trajs: list[Trajectory]) -> dict[int, list[Trajectory]]:
    groups: dict[int, list[Trajectory]] = {}
    for t in trajs:
        groups.setdefault(t.group_id, []).append(t)
    return groups


def dead_groups(trajs: list[Trajectory], names: list[str]) -> list[int]:
    """Ids of groups in which every named reward is equal over all rollouts (NaN ignored): no group signal."""
    dead = []
    for group, members in group_rows(trajs).items():
        values = [{t.rewards[n] for t in members if n in t.rewards and not math.isnan(t.rewards[n])} for n in names]
        if all(len(v) <= 1 for v in values):
            dead.append(group)
    return dead


def replace_groups(kept: list[Trajectory], dead: list[int], drawn: list[Trajectory], names: list[str]):
    """Puts live groups of a new draw in the places of dead ones; what cannot be replaced stays."""
    drawn_groups = group_rows(drawn)
    live = [g for g in drawn_groups if g not in dead_groups(drawn, names)]
    new_for_old = dict(zip(dead, live, strict=False))
    out = []
    for group, members in group_rows(kept).items():
        out += drawn_groups[new_for_old[group]] if group in new_for_old else members
    return out


def fill(batch: Batch, slices: int, processes: int = 1) -> Batch:
    """Fully masked rows up to a multiple of `slices` on each process, and row weights that sum to their product.

    TRL cuts a generation into `slices` equal parts and silently drops a remainder. Weights are normalised over
    the whole generation, so that a mean over rows does not count the fillers.
    """
    device, parts = batch.adv_ST.device, slices * processes
    target = max(-(-batch.rows // parts), 1) * parts
    weight_S = torch.ones(batch.rows, device=device) if batch.row_weight_S is None else batch.row_weight_S.float()
    batch.row_weight_S = weight_S * (parts / weight_S.sum().clamp(min=1e-12))
    missing = target - batch.rows
    if missing == 0:
        return batch
    if batch.rows == 0:
        raise RunError("select returned an empty batch", where="the last method with a select hook")
    filler = batch.take([0] * missing) if len(batch.trajs) == batch.rows else _first_rows(batch, missing)
    filler.model_mask_ST = torch.zeros_like(filler.model_mask_ST)
    filler.adv_ST = torch.zeros_like(filler.adv_ST)
    filler.row_weight_S = torch.zeros(missing, device=device)
    return batch.concat(filler)


def fingerprint(batch: Batch) -> int:
    """A number that tells which rollouts a batch holds, in which order."""
    held = [(t.row_id, t.group_id, t.sample_id) for t in batch.trajs]
    return zlib.crc32(repr((held, batch.traj_S.tolist())).encode())


def _first_rows(batch: Batch, count: int) -> Batch:
    index = torch.zeros(count, dtype=torch.long, device=batch.adv_ST.device)
    return batch.with_tensors({k: v[index] for k, v in batch.tensors().items()}, [batch.trajs[0]])


def as_inputs(batch: Batch, tokens: Tensor, weighted: bool) -> dict[str, Tensor]:
    """The dict that TRL shuffles and slices; `tokens` are trained in the whole generation."""
    out = {
        "prompt_ids": batch.prompt_ids_SP,
        "prompt_mask": batch.prompt_mask_SP,
        "completion_ids": batch.completion_ids_ST,
        "completion_mask": batch.completion_mask_ST,
        "advantages": batch.adv_ST,
        "tool_mask": batch.model_mask_ST,
        "num_items_in_batch": tokens,
    }
    more = {"old_per_token_logps": batch.old_logps_ST, "ref_per_token_logps": batch.ref_logps_ST}
    if weighted:
        more["row_weight"] = batch.row_weight_S
    out |= {name: x for name, x in more.items() if x is not None}
    return out | {f"extra/{name}": x for name, x in batch.extras.items()}


def row_slice(inputs: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Rows start:stop of TRL's dict, the longest first, without the columns that are padding in all of them.

    Rows of a rewritten context differ much in length, and padding costs as much as text. An empty part keeps one fully
    masked row, so that every rank has a backward.
    """
    prompt_S, written_S = inputs["prompt_mask"].sum(1), inputs["completion_mask"].sum(1)
    order = torch.argsort(prompt_S + written_S, descending=True, stable=True)
    empty = start >= len(order)
    chosen = order[:1] if empty else order[start:stop]
    width_P, width_T = (max(int(x_S[chosen].max()), 1) for x_S in (prompt_S, written_S))
    ends = {"prompt_ids": slice(-width_P, None), "prompt_mask": slice(-width_P, None)}
    part = {}
    for name, x in inputs.items():
        x = x[chosen] if x.dim() else x
        per_token = x.dim() > 1 and x.size(1) == inputs["completion_ids"].size(1)
        part[name] = x[:, ends.get(name, slice(width_T))] if name in ends or per_token else x
    if empty:
        part["tool_mask"] = torch.zeros_like(part["tool_mask"])
        part["row_weight"] = torch.zeros_like(part["row_weight"])
    return part


def samples(ctx: Context, batch: Batch, tokenizer, keep: int) -> list[dict[str, Any]]:
    """Up to `keep` rollouts of one group (another one each generation) for the sample browser.

    The tokens of all rows of each trajectory one after the other, with the advantages that they are trained on.
    """
    groups = list(group_rows(batch.trajs).values())
    if not groups:
        return []
    chosen = groups[ctx.round % len(groups)][:keep]
    index_of = {id(t): i for i, t in reversed(list(enumerate(batch.trajs)))}
    out = []
    for t in chosen:
        rows = (batch.traj_S == index_of[id(t)]).nonzero().flatten().tolist()
        written = [s.completion_ids for s in t.segments]
        out.append(
            {
                "step": ctx.step + 1,  # the optimiser step that trains on it, so that a resumed record is cut rightly
                "row_id": t.row_id,
                "group_id": t.group_id,
                "tier": getattr(t.row, "tier", "all"),
                "prompt": tokenizer.decode(t.segments[0].prompt_ids),
                "completion": t.text,
                "tokens": [tokenizer.decode([token]) for ids in written for token in ids],
                "advantages": [
                    round(a, 6)
                    for row, ids in zip(rows, written, strict=True)
                    for a in batch.adv_ST[row, : len(ids)].tolist()
                ],
                "rewards": dict(t.rewards),
                "finish": t.finish,
            }
        )
    return out
