"""What a run with compressed contexts is measured by, read from its trajectories."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from methods.base import Trajectory
from methods.ziprl.quality import PARTS

QUALITY = "q_com"  # among the scores of a turn that zipped something
QUALITIES = {f"quality_{part}": f"q_{part}" for part in PARTS[:4]}
# Of a turn that zipped something.
SCORES = (QUALITY, *QUALITIES.values(), "q_relevance", "level", "source", "kept", "unknown_zips")
SCORES_OF = operator.itemgetter(*SCORES)
OVERFLOWS = dict.fromkeys(("overflow_cut", "overflow_dropped", "overflow_document")).keys()  # in this order
NAN = float("nan")


def of_trajectories(trajs: Sequence[Trajectory]) -> dict[str, list[float]]:
    """A value for each trajectory of: turns, finished (without force), forced; peak and total prompt tokens; quality
    and its parts, level and ratio of its zips (NaN without any); missing and unknown zips; overflow events."""
    return _columns(trajs, *_zipped(trajs))


def of_batch(trajs: Sequence[Trajectory]) -> dict[str, float]:
    """Means of `of_trajectories` (NaN left out), the share of turns at each level, and how level follows relevance."""
    traj_M, scores_MC = _zipped(trajs)
    values = {name: mean(column) for name, column in _columns(trajs, traj_M, scores_MC).items()}
    quality, level, relevance = (scores_MC[:, SCORES.index(c)].tolist() for c in (QUALITY, "level", "q_relevance"))
    values |= {f"level_{k}": level.count(k) / len(level) if level else NAN for k in range(1, 6)}
    values["level_relevance"] = rank_correlation(level, relevance)
    values["missing_quality"] = float(sum(map(math.isnan, quality)))
    return values


def _zipped(trajs: Sequence[Trajectory]) -> tuple[Tensor, Tensor]:
    """(M,) the trajectory and (M, C) the scores of each turn that zipped something."""
    turns = [(k, t.scores) for k, traj in enumerate(trajs) for t in traj.turns if QUALITY in t.scores]
    flat = np.fromiter(chain.from_iterable([SCORES_OF(s) for _, s in turns]), dtype=float)
    scores_MC = torch.from_numpy(flat).reshape(len(turns), len(SCORES))
    return torch.tensor([k for k, _ in turns], dtype=torch.long), scores_MC


def _columns(trajs: Sequence[Trajectory], traj_M: Tensor, scores_MC: Tensor) -> dict[str, list[float]]:
    zeros_NC = torch.zeros(len(trajs), len(SCORES), dtype=torch.float64)
    total_NC = zeros_NC.index_add(0, traj_M, scores_MC.nan_to_num())
    count_NC = zeros_NC.index_add(0, traj_M, (~scores_MC.isnan()).double())
    total = dict(zip(SCORES, total_NC.T, strict=True))
    means = dict(zip(SCORES, (total_NC / count_NC).T.tolist(), strict=True))  # 0 / 0: NaN, nothing was zipped
    prompts = [[len(s.prompt_ids) for s in t.segments] for t in trajs]
    kinds = [{turn.kind for turn in t.turns} for t in trajs]
    over = [[t.scores for t in traj.turns if not OVERFLOWS.isdisjoint(t.scores)] for traj in trajs]  # mostly none
    return {
        "turns": [float(len(t.turns)) for t in trajs],
        "finished": [float("answer" in kind) for kind in kinds],
        "forced": [float("forced" in kind) for kind in kinds],
        "peak_prompt": [float(max(p)) for p in prompts],
        "total_prompt": [float(sum(p)) for p in prompts],
        "quality": means[QUALITY],
        "compression": (total["kept"] / total["source"]).tolist(),
        "level": means["level"],
        "unknown_zips": total["unknown_zips"].tolist(),
        **{name: means[score] for name, score in QUALITIES.items()},
        **{name: [float(sum([s.get(name, 0) for s in turns])) for turns in over] for name in OVERFLOWS},
    }


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rho over the pairs without NaN; NaN where one side does not vary."""
    pairs = np.array([a, b], dtype=float)
    pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
    if pairs.shape[1] < 2 or (pairs.std(axis=1) == 0).any():
        return NAN
    return float(np.corrcoef(_ranks(pairs[0]), _ranks(pairs[1]))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 to n; equal values share the mean of their places. As scipy's rankdata, without loading scipy in a step."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def mean(values: Sequence[float]) -> float:
    """Mean of what is not NaN; NaN where nothing is left."""
    total = sum(values)
    if not math.isnan(total):
        return total / len(values) if values else NAN
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else NAN
