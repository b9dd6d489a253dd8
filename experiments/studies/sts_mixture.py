"""Does the advised data mixture keep more of the other domains than other mixtures of the same budget (STS)?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from methods.errors import ConfigError, check_range

if TYPE_CHECKING:
    import pandas as pd

MIXTURES = ("none", "uniform", "advised", "advised_icl", "random", "worst", "measured")


@dataclass
class StsMixture:
    """A language model of the digit world per seed; one row per source, over the thirteen other domains.

    mixture: none (the source alone), uniform, advised (by STS_act, what mixture.budget does by default), advised_icl
    (by STS_ICL), random (shares drawn evenly from all shares), worst (the advised counts, most to the domain of the
    lowest score), measured (by the size of the change that the source alone made, in fine-tunes of `sts_tiny`: no
    prediction). Columns: score = mean accuracy of the thirteen after the fine-tune, on questions that no mixture trains
    on; lowest = that of the worst domain; learned = the source's accuracy under its new rule; top = share of the budget
    that the three largest counts hold.
    """

    mixture: str = "advised"
    budget: int = 50  # examples, a quarter of the source's 200
    latents: int = 16
    learning_rate: float = 2e-4
    steps: int = 1400  # of the language model
    sae_steps: int = 800
    sae_vectors: int = 140_000
    queries: int = 150
    repeats: int = 2  # fine-tunes per source behind `measured`
    sources: int = 7

    def __post_init__(self) -> None:
        if self.mixture not in MIXTURES:
            raise ConfigError("unknown mixture", where="study.mixture", got=self.mixture, expected=", ".join(MIXTURES))
        check_range("study.budget", self.budget, 0)
        check_range("study.latents", self.latents, 1, 512)
        check_range("study.learning_rate", self.learning_rate, 0.0)
        check_range("study.sources", self.sources, 1, 7)

    def simulate(self, seed: int) -> pd.DataFrame:
        import pandas as pd

        from experiments.transfer.world import SOURCES, Language
        from experiments.transfer.world_mixture import after_mixture
        from experiments.transfer.world_model import Pretraining, Tuning, load_world_model
        from experiments.transfer.world_scores import Settings, measured

        pretraining = Pretraining(steps=self.steps)
        tuning = Tuning(learning_rate=self.learning_rate, repeats=self.repeats)
        found = measured(seed, Settings(
            pretraining=pretraining, tuning=tuning, sae_steps=self.sae_steps, sae_vectors=self.sae_vectors,
            queries=self.queries, domain_queries=self.queries * 2 // 3, sources=self.sources,
        ))  # fmt: skip
        loaded = load_world_model(seed, pretraining)
        language = Language.of(loaded.tokenizer)
        rows = []
        for k, source in enumerate(SOURCES[: self.sources]):
            counts = self.counts(found, k, source, seed)
            plain, learned = after_mixture(loaded, language, source, counts, seed, tuning)
            others = [accuracy for name, accuracy in plain.items() if name != source]
            rows.append({
                "item_id": source,
                "tier": "all",
                "length": float(sum(counts)),
                "score": float(np.mean(others)),
                "lowest": min(others),
                "learned": learned,
                "top": sum(sorted(counts)[-3:]) / max(1, sum(counts)),
            })  # fmt: skip
        return pd.DataFrame(rows)

    def counts(self, found: dict[str, Any], k: int, source: str, seed: int) -> list[int]:
        """Examples of each of the fourteen domains; none of the source."""
        from experiments.seeds import derive
        from experiments.transfer.world import NAMES
        from methods.sts.scores import mixture, select

        others = [i for i, name in enumerate(NAMES) if name != source]
        chosen = select(found["delta"][k], self.latents).latents
        scores = {
            "uniform": np.ones(len(others)),
            "random": np.random.default_rng(derive(seed, "mixture", source)).dirichlet(np.ones(len(others))),
            "measured": found["change"][k][others].abs().double().numpy(),
            "advised_icl": found["icl"][others][:, chosen].double().sum(1).numpy(),
        }.get(self.mixture, found["mean"][others][:, chosen].double().sum(1).numpy())
        counts = np.zeros(len(NAMES), dtype=int)
        if self.mixture != "none":
            counts[others] = mixture(scores.tolist(), self.budget)
        if self.mixture == "worst":  # the same counts in the opposite order
            order = np.array(others)[np.argsort(scores, kind="stable")]
            counts[order] = sorted(counts[others].tolist(), reverse=True)
        return counts.tolist()
