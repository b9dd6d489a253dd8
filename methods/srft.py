"""SRFT: supervised and reinforcement fine-tuning in one stage (arXiv 2506.19767)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.base import Batch, Context, LossContext, Method, Segment, Trajectory
from methods.errors import ConfigError


@dataclass
class Srft(Method):
    """SRFT: one loss of four terms over rollouts and demonstrations, two of them weighted by policy entropy.

    A_k = group-relative advantage over rollouts and demonstrations together (Eq. 6-7). With H the mean token
    entropy of a row, sg = stop-gradient, N_demo and N_roll the trained tokens of each kind in the whole batch:
        demo_sft  = sum -w_SFT log pi / N_demo,   w_SFT = 0.5 sg exp(-H)                            (Eq. 8)
        demo_rl   = sum -A pi / N_demo            (behaviour probability 1, no clip)                 (Eq. 9-10)
        self_pos  = sum -w_RL log pi / N_roll     over correct rollouts, w_RL = 0.1 sg exp(+H)       (Eq. 11-12)
        self_neg  = sum log pi / N_roll           over wrong rollouts
    loss = their sum (Eq. 13). A rollout is correct if its outcome reward is above 1/2.

    The last `n_demo` slots of each group hold the row's demonstration (`Row.demo`, or a list of them in
    `Row.meta["demos"]`); only the other slots are generated.

    Differs from the paper: H is the row's own mean, so that it does not depend on micro-batches (the paper writes
    one scalar); normalisation is the token mean per kind (Eq. 11 splits one expectation over rollouts of both
    signs). A demonstration that the verifier rejects leaves terms 1 and 2 and is counted.
    Degenerate: equal rewards give A = 0, and terms 1, 3, 4 stay alive; a row without a demonstration, or with one
    longer than the completion limit, keeps a group of rollouts; a kind without tokens contributes 0; a NaN reward
    leaves a rollout out of terms 3 and 4. Term 4 has no lower bound: keep gradient clipping on.
    """

    n_demo: int = 1
    sft_coefficient: float = 0.5
    rl_coefficient: float = 0.1
    counts: dict[str, float] = field(default_factory=dict, init=False)

    name = "srft"
    objectives = ("grpo",)
    needs = frozenset({"group_baseline"})
    keeps_dead_groups = True

    def __post_init__(self) -> None:
        if self.n_demo < 1:
            raise ConfigError("SRFT needs a demonstration slot", where="method.srft.n_demo", got=self.n_demo)

    # ---- demonstrations in the group ----
    def rollout(self, rows: list[Any], ctx: Context, default) -> list[Trajectory]:
        if ctx.mode == "eval":
            return default(rows)
        G, demos, skipped = ctx.group_size, {}, 0
        if self.n_demo >= G:
            raise ConfigError(
                "no slot is left for rollouts", where="method.srft.n_demo", got=self.n_demo, expected=f"< {G}"
            )
        for start in range(0, len(rows), G):
            for k, text in enumerate(demonstrations(rows[start])[: self.n_demo]):
                ids = [*ctx.tokenizer(text, add_special_tokens=False)["input_ids"], ctx.tokenizer.eos_token_id]
                if len(ids) > ctx.limits.max_completion_tokens:
                    skipped += 1
                else:
                    demos[start + G - 1 - k] = (ids, text)
        free = [j for j in range(len(rows)) if j not in demos]
        drawn = dict(zip(free, default([rows[j] for j in free], slots=free), strict=True))
        self.counts = {"demos": len(demos), "demo_too_long": skipped}
        return [drawn[j] if j in drawn else self._demo(j, rows[j], demos[j], drawn, G) for j in range(len(rows))]

    def _demo(self, slot: int, row: Any, demo: tuple, drawn: dict[int, Trajectory], G: int) -> Trajectory:
        ids, text = demo
        sibling = drawn[slot // G * G]  # slot 0 of the group is always a rollout
        prompt = sibling.segments[0].prompt_ids
        return Trajectory(row.id, sibling.group_id, slot % G, [Segment(prompt, ids)], is_demo=True, text=text, row=row)

    # ---- flags that travel to the loss ----
    def select(self, batch: Batch, ctx: Context) -> Batch:
        reward_N = ctx.reward(ctx.reward_name("outcome"))
        demo_N = torch.tensor([t.is_demo for t in batch.trajs])
        sign_N = torch.nan_to_num(torch.sign(reward_N - 0.5))  # 0 = the verifier could not say
        accepted_N = demo_N & (sign_N > 0)
        kind_N = torch.where(demo_N, 2.0 * accepted_N, sign_N)  # 2 demonstration, +1 / -1 rollout, 0 left out
        device = batch.adv_ST.device
        kind_S = kind_N.to(device)[batch.traj_S]
        tokens_S = batch.model_mask_ST.sum(1)
        batch.extras["srft_kind"] = kind_S
        for name, mine in (("demo", kind_S == 2), ("roll", kind_S.abs() == 1)):
            total = ctx.gather((tokens_S * mine).sum().reshape(1).float()).sum()
            batch.extras[f"srft_{name}_tokens"] = total.expand(batch.rows).clone()
        self.counts |= {"demo_rejected": float((demo_N & ~accepted_N).sum())}
        return batch

    # ---- the four terms ----
    def loss(self, lctx: LossContext) -> Tensor:
        terms = srft_terms(lctx, self.sft_coefficient, self.rl_coefficient)
        for name, value in terms.items():
            lctx.log(f"srft/{name}", value.detach())
        # Each term is a sum over this micro-batch divided by the tokens of the whole generation, of which one update
        # sees a share.
        return (terms["demo_sft"] + terms["demo_rl"] + terms["self_pos"] + terms["self_neg"]) * lctx.updates

    def metrics(self) -> dict[str, float]:
        return {k: float(v) for k, v in self.counts.items()}


def demonstrations(row: Any) -> list[str]:
    """A row's demonstrations: `meta["demos"]`, else its `demo`, else none."""
    several = (getattr(row, "meta", None) or {}).get("demos")
    if several:
        return list(several)
    return [row.demo] if getattr(row, "demo", None) else []


def srft_terms(lctx: LossContext, sft_coefficient: float = 0.5, rl_coefficient: float = 0.1) -> dict[str, Tensor]:
    """The four terms of the batch, and the weights' means; sums over rows divided by the batch's token counts.

    RuntimeError if an entropy is not a number.
    """
    mask = lctx.mask_BT.to(lctx.logps_BT.dtype)
    lengths_B = mask.sum(1).clamp(min=1)
    entropy_B = ((lctx.entropies_BT.detach() * mask).sum(1) / lengths_B).float()
    if not torch.isfinite(entropy_B).all():
        raise RuntimeError("SRFT weighs by entropy, and an entropy is not a number")
    kind_B = lctx.extras["srft_kind"]
    demo_B, right_B, wrong_B = (kind_B == 2), (kind_B == 1), (kind_B == -1)
    n_demo = lctx.extras["srft_demo_tokens"][0].clamp(min=1)
    n_roll = lctx.extras["srft_roll_tokens"][0].clamp(min=1)
    sft_weight_B = sft_coefficient * torch.exp(-entropy_B)
    rl_weight_B = rl_coefficient * torch.exp(entropy_B)
    logp_B = (lctx.logps_BT * mask).sum(1)
    prob_B = (torch.exp(lctx.logps_BT) * lctx.adv_BT * mask).sum(1)
    nothing = torch.zeros_like(logp_B)

    def over(rows_B: Tensor, values_B: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(rows_B, values_B, nothing).sum() / tokens

    def mean_weight(rows_B: Tensor, weight_B: Tensor) -> Tensor:
        return weight_B[rows_B].mean() if bool(rows_B.any()) else torch.tensor(math.nan)

    return {
        "demo_sft": over(demo_B, -sft_weight_B * logp_B, n_demo),
        "demo_rl": over(demo_B, -prob_B, n_demo),
        "self_pos": over(right_B, -rl_weight_B * logp_B, n_roll),
        "self_neg": over(wrong_B, logp_B, n_roll),
        "w_sft": mean_weight(demo_B, sft_weight_B),
        "w_rl": mean_weight(right_B, rl_weight_B),
    }
