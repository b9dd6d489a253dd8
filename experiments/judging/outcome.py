"""From a verdict file to the record of a run: a row per pair for `assay report`, and the benchmark's table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.judging.credit import RIGHT, UNPARSED, Verdicts, arrays, both_orders, one_order
from experiments.judging.pairs import read_verdicts

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

LEVELS = np.array(["normal", "hard", "easy"])


def record(cfg: DictConfig, file: Path, writer: Any, benchmark: Any) -> dict[str, float]:
    """Write eval.parquet from the verdicts in `file`, and with judge.step=bench table.md and figures; the figures."""
    from experiments.judging.table import report

    verdicts = arrays(read_verdicts(file), str(file))
    if cfg.judge.step == "bench":
        left_out = getattr(benchmark, "left_out", {})
        report([file], file.parent, official=bool(getattr(benchmark, "official", False)), left_out=left_out)
    frame = pair_rows(verdicts)
    values: dict[str, float] = {"verdicts": float(verdicts.count)}
    if len(frame):
        writer.eval(frame, step=0)
        frame = frame[frame["finish"] != "error"]
        # Without intervals: those of the benchmark are in its table, and `assay report` makes its own over seeds.
        values |= {f"eval/{name}": mean for name, mean in frame.select_dtypes(float).mean().to_dict().items()}
        tiers: Any = frame.groupby("tier")["score"].mean()
        values |= {f"eval/score/{tier}": mean for tier, mean in tiers.to_dict().items()}
    return values


def pair_rows(verdicts: Verdicts) -> pd.DataFrame:
    """One row per pair: what an evaluation records.

    score: credit over both orders where both were asked, else of the seeded order (ties and unparsable verdicts 1/2,
    equal scores 0). tier: for three styles (RM-Bench) hard where the chosen answer is the plainer one, normal, easy;
    else `all`. consistent: both orders name the same answer. first: share of slot A among parsed verdicts. unparsable:
    share. gap: its mean is the easy minus the hard accuracy. length: characters of the better answer. finish: `error`
    where a request failed, and such a pair enters no figure of an evaluation.
    """
    import pandas as pd

    pairs = verdicts.pairs
    twice = bool(len(pairs.swapped_N)) and bool((pairs.swapped_N >= 0).all())
    score = both_orders(pairs) if twice else one_order(pairs.seeded_N, pairs.scored_N, 0.5, 0.5)
    styled = verdicts.benchmark == "rm_bench"
    level = LEVELS[np.sign(pairs.worse_N - 3 - pairs.better_N)] if styled else np.full(len(score), "all")
    said = [pairs.seeded_N, pairs.swapped_N] if twice else [pairs.seeded_N]
    # Slot A holds the better response in one order and the worse one in the other.
    first = [
        np.where(told > 1, np.nan, (told == RIGHT) == good)
        for told, good in zip(said, (pairs.first_N, ~pairs.first_N), strict=False)
    ]
    subset, name = verdicts.subset_I[pairs.item_N], verdicts.id_I[pairs.item_N]
    places = zip(subset, name, pairs.better_N, pairs.worse_N, strict=True)
    frame = pd.DataFrame(
        {
            "split": "eval",
            "item_id": [f"{verdicts.subsets[s]}/{n}/{b}-{w}" for s, n, b, w in places],
            "sample": 0,
            "score": score.astype(float),
            "length": pairs.length_better_N.astype(float),
            "tier": level,
            "finish": np.where(pairs.failed_N, "error", "stop"),
            "first": _mean(first),
            "unparsable": np.mean([told == UNPARSED for told in said], axis=0),
        }
    )
    if twice:
        frame["consistent"] = ((said[0] == said[1]) & (said[0] <= 1)).astype(float)
    if styled:
        share = {tier: float(np.mean(level == tier)) for tier in ("easy", "hard")}
        sign = (level == "easy") / max(share["easy"], 1e-12) - (level == "hard") / max(share["hard"], 1e-12)
        frame["gap"] = sign * score
    return frame


def _mean(columns: list[np.ndarray]) -> np.ndarray:
    """Mean over the orders that could be parsed; NaN where none could."""
    stacked = np.stack(columns)
    known = ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        return np.where(known, stacked, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)
