"""A constant price on every search: what AutoSearch is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from methods.autosearch.probes import observed
from methods.base import Context, Method, Trajectory
from methods.errors import check_range


@dataclass
class SearchPenalty(Method):
    """Takes `penalty` from the reward for each search, whether it was needed or not.

    R = outcome - penalty * n, n = turns that were followed by an observation. The best penalty depends on the task;
    one that is too strong makes hard questions not worth asking.
    Degenerate: without searches, and with penalty 0, the reward is the outcome.
    """

    penalty: float = 0.1

    name = "search_penalty"

    def __post_init__(self) -> None:
        check_range("method.search_penalty.penalty", self.penalty, 0.0)

    def rewards(self, trajs: list[Trajectory], ctx: Context) -> None:
        ctx.add_reward("searches", weight=-self.penalty)
        for traj in trajs:
            traj.rewards["searches"] = float(len(observed(traj)))
