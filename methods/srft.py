"""SRFT: supervised and reinforcement fine-tuning in one stage (arXiv 2506.19767)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Batch, Context, LossContext
from methods.demonstrations import Demonstrations, tokens_of
from methods.errors import check_range


@dataclass
class Srft(Demonstrations):
    """SRFT: one loss of four terms over rollouts and demonstrations, two of them weighted by policy entropy.

    A_k = group-relative advantage over rollouts and demonstrations together (Eq. 6-7). With H the mean token
    entropy of a row, sg = stop-gradient, N_demo and N_roll the trained tokens of each kind in the whole batch:
        demo_sft  = sum -w_SFT log pi / N_demo,   w_SFT = 0.5 sg exp(-H)                            (Eq. 8)
        demo_rl   = sum -A pi / N_demo            (behaviour probability 1, no clip)                 (Eq. 9-10)
        self_pos  = sum -w_RL log pi / N_roll     over correct rollouts, w_RL = 0.1 sg exp(+H)       (Eq. 11-12)
        self_neg  = sum log pi / N_roll           over wrong rollouts
    loss = their sum (Eq. 13). A rollout is correct if its outcome reward is above 1/2.

    `entropy_weights=false` makes the coefficients themselves the weights (the paper's ablation).

    Differs from the paper: H is the row's own mean, so that it does not depend on micro-batches (the paper writes
    one scalar); normalisation is the token mean per kind (Eq. 11 splits one expectation over rollouts of both
    signs). A demonstration that the verifier rejects leaves terms 1 and 2 and is counted.
    Degenerate: equal rewards give A = 0, and terms 1, 3, 4 stay alive; a kind without tokens contributes 0; a NaN
    reward leaves a rollout out of terms 3 and 4. Term 4 has no lower bound: keep gradient clipping on.
    """

    sft_coefficient: float = 0.5
    rl_coefficient: float = 0.1
    entropy_weights: bool = True

    name = "srft"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("method.srft.sft_coefficient", self.sft_coefficient, 0.0)
        check_range("method.srft.rl_coefficient", self.rl_coefficient, 0.0)

    # ---- flags that travel to the loss ----
    def select(self, batch: Batch, ctx: Context) -> Batch:
        batch = super().select(batch, ctx)
        reward_N = ctx.reward(ctx.reward_name("outcome"))
        demo_N = torch.tensor([t.is_demo for t in batch.trajs])
        sign_N = torch.nan_to_num(torch.sign(reward_N - 0.5))  # 0 = the verifier could not say
        accepted_N = demo_N & (sign_N > 0)
        kind_N = torch.where(demo_N, 2.0 * accepted_N, sign_N)  # 2 demonstration, +1 / -1 rollout, 0 left out
        kind_S = kind_N.to(batch.adv_ST.device)[batch.traj_S]
        batch.extras["srft_kind"] = kind_S
        batch.extras["srft_demo_tokens"] = tokens_of(batch, kind_S == 2, ctx)
        batch.extras["srft_roll_tokens"] = tokens_of(batch, kind_S.abs() == 1, ctx)
        self.counts |= {"demo_rejected": float((demo_N & ~accepted_N).sum())}
        return batch

    # ---- the four terms ----
    def loss(self, lctx: LossContext) -> Tensor:
        terms = srft_terms(lctx, self.sft_coefficient, self.rl_coefficient, self.entropy_weights)
        for name, value in terms.items():
            lctx.log(f"srft/{name}", value.detach())
        # Each term is a sum over this micro-batch divided by the tokens of the whole generation, of which one process
        # sees a share in one update.
        return (terms["demo_sft"] + terms["demo_rl"] + terms["self_pos"] + terms["self_neg"]) * lctx.updates


def srft_terms(
    lctx: LossContext, sft_coefficient: float = 0.5, rl_coefficient: float = 0.1, entropy_weights: bool = True
) -> dict[str, Tensor]:
    """The four terms of the batch; the means of the weights and of the entropies by kind of row.

    Sums over rows divided by the batch's token counts. RuntimeError if an entropy is not a number.
    """
    mask = lctx.mask_BT.to(lctx.logps_BT.dtype)
    lengths_B = mask.sum(1).clamp(min=1)
    entropy_B = ((lctx.entropies_BT.detach() * mask).sum(1) / lengths_B).float()
    if not torch.isfinite(entropy_B).all():
        raise RuntimeError("SRFT weighs by entropy, and an entropy is not a number")
    kind_B = lctx.extras["srft_kind"]
    # Rows that only fill up a batch have no token; they are of no kind.
    kind_B = kind_B * (mask.sum(1) > 0)
    demo_B, right_B, wrong_B = (kind_B == 2), (kind_B == 1), (kind_B == -1)
    n_demo = lctx.extras["srft_demo_tokens"][0].clamp(min=1)
    n_roll = lctx.extras["srft_roll_tokens"][0].clamp(min=1)
    exponent_B = entropy_B if entropy_weights else torch.zeros_like(entropy_B)
    sft_weight_B = sft_coefficient * torch.exp(-exponent_B)
    rl_weight_B = rl_coefficient * torch.exp(exponent_B)
    logp_B = (lctx.logps_BT * mask).sum(1)
    prob_B = (torch.exp(lctx.logps_BT) * lctx.adv_BT * mask).sum(1)
    nothing = torch.zeros_like(logp_B)

    def over(rows_B: Tensor, values_B: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(rows_B, values_B, nothing).sum() / tokens

    def mean(rows_B: Tensor, values_B: Tensor) -> Tensor:
        return values_B[rows_B].mean() if bool(rows_B.any()) else torch.tensor(math.nan)

    return {
        "demo_sft": over(demo_B, -sft_weight_B * logp_B, n_demo),
        "demo_rl": over(demo_B, -prob_B, n_demo),
        "self_pos": over(right_B, -rl_weight_B * logp_B, n_roll),
        "self_neg": over(wrong_B, logp_B, n_roll),
        "w_sft": mean(demo_B, sft_weight_B),
        "w_rl": mean(right_B, rl_weight_B),
        "entropy_demo": mean(demo_B, entropy_B),
        "entropy_roll": mean(right_B | wrong_B, entropy_B),
        "neg_logp": mean(wrong_B, logp_B / lengths_B).detach(),
    }
