"""The data mixture of the digit world: examples of other domains added to the source, answered by the untouched model.

The advice (paper, section 5) gives domain c `budget * score_c / sum of scores` examples. The answers are the model's
own from before the fine-tune, so they pull it back to what it did. Questions are split in halves: training draws from
one, accuracy is measured on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from experiments.seeds import derive
from experiments.transfer.world import ANSWER, NAMES, PLAIN, PLUS5, Language, all_pairs
from experiments.transfer.world_model import Tuning, accuracies, fine_tune


@dataclass(frozen=True)
class Halves:
    """Places among the hundred questions of a domain: those to train on and those to measure on."""

    train: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, seed: int) -> Halves:
        order = np.random.default_rng(derive(seed, "digit_world", "halves")).permutation(100)
        return cls(order[:50], order[50:])


def own_answers(model: Any, language: Language, domain: str, places: np.ndarray) -> np.ndarray:
    """(N, 7) examples of these questions with the digits that the model finds likeliest without demonstrations."""
    import torch

    a, b = (values[places] for values in all_pairs())
    rows = language.examples(domain, a, b, PLAIN)
    for column in range(ANSWER.start, ANSWER.stop):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(language.queries(rows))).logits
        # The start token shifts an example by one: logits at `column` predict what stands in `column` of the example.
        rows[:, column] = logits[:, column].argmax(-1).numpy()
    return rows


def after_mixture(
    loaded: Any, language: Language, source: str, counts: Sequence[int], seed: int, settings: Tuning
) -> tuple[dict[str, float], float]:
    """(accuracy of each domain under the plain rule, the source's under its new rule) after a fine-tune, test half.

    `counts`: examples of each of `NAMES` beside `settings.examples` of the source under its new rule. The source's
    examples, the questions' order and the seed of the fine-tune do not depend on `counts`.
    """
    halves = Halves.of(seed)
    rng = np.random.default_rng(derive(seed, "digit_world", "mixture", source))
    places = rng.choice(halves.train, settings.examples)
    a, b = (values[places] for values in all_pairs())
    rows = [language.queries(language.examples(source, a, b, PLUS5))]
    for name, count in zip(NAMES, counts, strict=True):
        places = np.resize(rng.permutation(halves.train), count)  # beyond fifty they come again
        if count:
            rows.append(language.queries(own_answers(loaded.model, language, name, places)))
    with TemporaryDirectory() as scratch:
        trained = derive(seed, "digit_world", "mixture", "tuning", source) % 2**31
        model = fine_tune(loaded, np.concatenate(rows), trained, settings, Path(scratch))
    plain = accuracies(model, language, PLAIN, halves.test)
    return plain, accuracies(model, language, PLUS5, halves.test)[source]
