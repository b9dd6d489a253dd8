"""What a run with compressed contexts is measured by, read from its trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from methods.base import Trajectory
from methods.ziprl.quality import PARTS

QUALITY = "q_com"  # among the scores of a turn that zipped something
QUALITIES = {f"quality_{part}": f"q_{part}" for part in PARTS[:4]}
OVERFLOWS = dict.fromkeys(("overflow_cut", "overflow_dropped", "overflow_document")).keys()  # in this order
NAN = float("nan")


def of_trajectory(traj: Trajectory) -> dict[str, float]:
    """turns, finished (without force), forced; peak and total prompt tokens; quality and its parts, level and ratio of
    its zips (NaN without any); overflow events; missing and unknown zips."""
    zipped = [t.scores for t in traj.turns if QUALITY in t.scores]
    prompts = [len(s.prompt_ids) for s in traj.segments]
    source = sum(s["source"] for s in zipped)
    values = {
        "turns": float(len(traj.turns)),
        "finished": float(any(t.kind == "answer" for t in traj.turns)),
        "forced": float(any(t.kind == "forced" for t in traj.turns)),
        "peak_prompt": float(max(prompts)),
        "total_prompt": float(sum(prompts)),
        "quality": mean([s[QUALITY] for s in zipped]),
        "compression": sum(s["kept"] for s in zipped) / source if source else NAN,
        "level": mean([s["level"] for s in zipped]),
        "unknown_zips": float(sum(s["unknown_zips"] for s in zipped)),
    }
    values |= {name: mean([s[score] for s in zipped]) for name, score in QUALITIES.items()}
    over = [t.scores for t in traj.turns if not OVERFLOWS.isdisjoint(t.scores)]  # mostly none
    return values | {name: float(sum(s.get(name, 0) for s in over)) for name in OVERFLOWS}


def of_batch(trajs: Sequence[Trajectory]) -> dict[str, float]:
    """Means of `of_trajectory` (NaN left out), the share of turns at each level, and how level follows relevance."""
    columns = [of_trajectory(t) for t in trajs]
    values = {name: mean([c[name] for c in columns]) for name in columns[0]}
    zipped = [t.scores for traj in trajs for t in traj.turns if QUALITY in t.scores]
    levels = [s["level"] for s in zipped]
    values |= {f"level_{k}": levels.count(k) / len(levels) if levels else NAN for k in range(1, 6)}
    values["level_relevance"] = rank_correlation(levels, [s["q_relevance"] for s in zipped])
    values["missing_quality"] = float(sum(math.isnan(s[QUALITY]) for s in zipped))
    return values


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
