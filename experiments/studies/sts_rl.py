"""Do demonstrations predict what GRPO shifts as well as what a fine-tune shifts (STS, the paper's section 6)?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.errors import ConfigError, check_range

if TYPE_CHECKING:
    import pandas as pd

TRAININGS = ("sft", "grpo")


@dataclass
class StsRl:
    """A language model of the digit world per seed; one row per source, over the thirteen other domains.

    training: sft (the fine-tunes of `sts_tiny`) or grpo on the same source and rule, from the same model.
    Columns: overlap = share of the latents that demonstrations shift most among those that this training shifts most;
    score, icl, tuned = Pearson r of STS_act, of STS_ICL, and of STS_act with the latents that this training shifted,
    with the size of the change of accuracy that it made; both = overlap of the latents that the two trainings shift;
    share = of the shift in its top latents; learned = the source's accuracy under the new rule; change = mean size of
    the change elsewhere.
    """

    training: str = "grpo"
    latents: int = 16  # N, of 512
    grpo_steps: int = 60
    grpo_learning_rate: float = 2e-4
    learning_rate: float = 2e-4  # of the fine-tune
    repeats: int = 2  # trainings per source
    steps: int = 1400  # of the language model
    sae_steps: int = 800
    sae_vectors: int = 140_000
    queries: int = 150
    sources: int = 7

    def __post_init__(self) -> None:
        if self.training not in TRAININGS:
            raise ConfigError(
                "unknown training", where="study.training", got=self.training, expected=", ".join(TRAININGS)
            )
        check_range("study.latents", self.latents, 1, 512)
        check_range("study.grpo_steps", self.grpo_steps, 1)
        for name in ("learning_rate", "grpo_learning_rate"):
            check_range(f"study.{name}", getattr(self, name), 0.0)
        check_range("study.repeats", self.repeats, 1)
        check_range("study.sources", self.sources, 1, 7)

    def simulate(self, seed: int) -> pd.DataFrame:
        import pandas as pd

        from experiments.transfer.world import SOURCES
        from experiments.transfer.world_model import Pretraining, Tuning
        from experiments.transfer.world_rl import Reinforcing, reinforced
        from experiments.transfer.world_scores import Settings, measured

        settings = Settings(
            pretraining=Pretraining(steps=self.steps),
            tuning=Tuning(learning_rate=self.learning_rate, repeats=self.repeats),
            sae_steps=self.sae_steps, sae_vectors=self.sae_vectors,
            queries=self.queries, domain_queries=self.queries * 2 // 3, sources=self.sources,
        )  # fmt: skip
        by_sft = measured(seed, settings)
        reinforcing = Reinforcing(steps=self.grpo_steps, learning_rate=self.grpo_learning_rate)
        by_grpo = reinforced(seed, settings, reinforcing)
        return pd.DataFrame([self.row(by_sft, by_grpo, k, s) for k, s in enumerate(SOURCES[: self.sources])])

    def row(self, by_sft: dict[str, Any], by_grpo: dict[str, Any], k: int, source: str) -> dict[str, Any]:
        from experiments.transfer.world import NAMES
        from methods.sts.correlation import pearson
        from methods.sts.scores import concentration, overlap, select

        others = [i for i, name in enumerate(NAMES) if name != source]
        effects = by_sft if self.training == "sft" else by_grpo
        change = effects["change"][k][others].abs().double().numpy()
        mean, icl = by_sft["mean"][others].double(), by_sft["icl"][others].double()

        def top(delta_s: Any) -> list[int]:
            return select(delta_s, self.latents).latents if bool((delta_s > 0).any()) else []

        predicted, moved = top(by_sft["delta"][k]), top(effects["true_delta"][k])
        other = top((by_grpo if self.training == "sft" else by_sft)["true_delta"][k])
        return {
            "item_id": source,
            "tier": "all",
            "length": 0.0,
            "overlap": overlap(predicted, moved) if moved else math.nan,
            "both": overlap(other, moved) if moved and other else math.nan,
            "score": pearson(mean[:, predicted].sum(1).numpy(), change),
            "icl": pearson(icl[:, predicted].sum(1).numpy(), change),
            "tuned": pearson(mean[:, moved].sum(1).numpy(), change) if moved else math.nan,
            "share": concentration(effects["true_delta"][k], moved),
            "learned": float(effects["learned"][k]),
            "change": float(change.mean()),
        }
