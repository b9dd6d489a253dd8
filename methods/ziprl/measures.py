"""What a run with compressed contexts is measured by, read from its trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from methods.base import Trajectory
from methods.ziprl.quality import PARTS

QUALITY = "q_com"  # among the scores of a turn that zipped something
OVERFLOWS = ("overflow_cut", "overflow_dropped", "overflow_document")
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
    values |= {f"quality_{part}": mean([s[f"q_{part}"] for s in zipped]) for part in PARTS[:4]}
    return values | {name: float(sum(t.scores.get(name, 0.0) for t in traj.turns)) for name in OVERFLOWS}


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
    from scipy.stats import rankdata

    pairs = np.array([(x, y) for x, y in zip(a, b, strict=True) if not math.isnan(x) and not math.isnan(y)])
    if len(pairs) < 2 or (pairs.std(axis=0) == 0).any():
        return NAN
    return float(np.corrcoef(rankdata(pairs[:, 0]), rankdata(pairs[:, 1]))[0, 1])


def mean(values: Sequence[float]) -> float:
    """Mean of what is not NaN; NaN where nothing is left."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else NAN
