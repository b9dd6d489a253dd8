"""Measures the bias of the group baseline on a real policy and sets it beside the closed form (HA-DW, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.ha_dw_bias import baseline_bias, overestimated

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class BaselineBias:
    """For each prompt: p from all rollouts, and E[p_hat | live group] - p over disjoint groups of `group_size`.

    Columns: score = measured bias; closed_form = the bias at that p; gap = their difference; p; overestimated =
    share of live groups whose baseline is above p; overestimated_exact. Tier `hard` is p < 1/4, `medium` up to
    3/4, `easy` above. Prompts without a live group are left out: they have no baseline to be wrong.
    """

    group_size: int = 8
    rollouts: int = 512

    def run(self, scores: Callable[[int], Sequence[Sequence[float]]], rows: Sequence[Any]) -> pd.DataFrame:
        """`scores(n)` gives n rewards in {0, 1} for each of `rows`."""
        import numpy as np
        import pandas as pd

        G, table = self.group_size, []
        for row, values in zip(rows, scores(self.rollouts), strict=True):
            rewards = np.asarray(values, dtype=float)
            groups = rewards[: len(rewards) // G * G].reshape(-1, G).mean(1)
            live = groups[(groups > 0) & (groups < 1)]
            p = float(rewards.mean())
            if len(live) == 0:
                continue
            measured, exact = float(live.mean()) - p, baseline_bias(p, G)
            table.append(
                {
                    "item_id": row.id,
                    "score": measured,
                    "tier": "hard" if p < 0.25 else "easy" if p > 0.75 else "medium",
                    "length": 0.0,
                    "closed_form": exact,
                    "gap": measured - exact,
                    "p": p,
                    "overestimated": float((live > p).mean()),
                    "overestimated_exact": overestimated(p, G),
                }
            )
        return pd.DataFrame(table)
