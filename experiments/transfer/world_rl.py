"""GRPO on one source of the digit world, and what it shifts and changes, measured as a fine-tune's effects are.

Every step asks `questions` questions of the source without demonstrations and samples `samples` answers of each, two
tokens at temperature 1; the reward is 1 for an answer that is right under the new rule. Advantages are
(r - mean of the group) / (sd of the group + 1e-4); the loss is the mean over tokens of -A log pi. There is one update
per batch of answers, so the ratio to the sampling policy is 1 and clipping does nothing; no KL term (TRL's defaults).
Sampled zero-shot, the new rule's answers are as likely as its documents were in pre-training, so the reward starts
above zero. What the model is rewarded for is what the fine-tune's answers and the demonstrations show.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.artefacts import artefact
from experiments.models import one_thread
from experiments.seeds import derive
from experiments.transfer.world import ANSWER, SOURCES, Language
from experiments.transfer.world_model import accuracies, source_examples
from experiments.transfer.world_scores import Measurement, Settings, mean_of

RECIPE = 1


@dataclass(frozen=True)
class Reinforcing:
    """AdamW at a constant rate without weight decay, as the fine-tune has it."""

    steps: int = 60
    questions: int = 25
    samples: int = 8
    learning_rate: float = 2e-4


def reinforce(model: Any, language: Language, source: str, seed: int, settings: Reinforcing) -> Any:
    """A copy of the model after GRPO on the source. A function of the weights, the settings and `seed`."""
    model = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.0)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    first = 1 + ANSWER.start  # the start token shifts an example by one
    for _ in range(settings.steps):
        right = source_examples(language, source, rng, settings.questions).repeat(settings.samples, axis=0)
        ids_BL = torch.from_numpy(language.queries(right))[:, : 1 + ANSWER.stop]
        truth_BT = ids_BL[:, first:].clone()
        ids_BL = sample(model, ids_BL, first, generator)
        reward_B = (ids_BL[:, first:] == truth_BT).all(1).float()
        adv_B = group_advantages(reward_B, settings.samples)
        logp_BT = model(input_ids=ids_BL).logits[:, first - 1 : -1].log_softmax(-1)
        logp_BT = logp_BT.gather(2, ids_BL[:, first:, None]).squeeze(2)
        loss = -(adv_B[:, None] * logp_BT).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model


@torch.no_grad()
def sample(model: Any, ids_BL: Tensor, first: int, generator: torch.Generator) -> Tensor:
    """The same rows with everything from place `first` on sampled at temperature 1."""
    ids_BL = ids_BL.clone()
    for place in range(first, ids_BL.shape[1]):
        probability_BV = model(input_ids=ids_BL[:, :place]).logits[:, -1].softmax(-1)
        ids_BL[:, place] = torch.multinomial(probability_BV, 1, generator=generator).squeeze(1)
    return ids_BL


def group_advantages(reward_B: Tensor, samples: int) -> Tensor:
    """(B,) rewards less their group's mean, over its sd + 1e-4; rows of a group stand together."""
    reward_PS = reward_B.view(-1, samples)
    centred_PS = reward_PS - reward_PS.mean(1, keepdim=True)
    return (centred_PS / (reward_PS.std(1, keepdim=True) + 1e-4)).flatten()


def reinforced(seed: int, settings: Settings, reinforcing: Reinforcing) -> dict[str, Tensor]:
    """`true_delta`, `change` and `learned` after GRPO, a row per source, mean over the repeats; measured once."""
    from safetensors.torch import load_file, save_file

    key = {"recipe": RECIPE, "seed": seed, "settings": asdict(settings), "reinforcing": asdict(reinforcing),
           "torch": torch.__version__}  # fmt: skip

    def build(folder: Path) -> None:
        from experiments.engines.progress import progress_bar

        with one_thread(), TemporaryDirectory() as scratch:
            measurement = Measurement(seed, settings, Path(scratch))
            before = accuracies(measurement.loaded.model, measurement.language)
            chosen = SOURCES[: settings.sources]
            rows = []
            with progress_bar(f"digit world, GRPO on model {seed}", len(chosen), unit="source") as progress:
                for source in chosen:
                    rows.append(_effects(measurement, source, before, reinforcing))
                    progress(1)
            found = {name: torch.stack([row[name] for row in rows]).contiguous() for name in rows[0]}
            save_file(found, folder / "reinforced.safetensors")

    return load_file(artefact("digit_world_rl", key, build) / "reinforced.safetensors")


def _effects(measurement: Measurement, source: str, before: dict[str, float], settings: Reinforcing) -> Any:
    alone, rows = measurement.language.queries(measurement.source_queries(source)), []
    for repeat in range(measurement.settings.tuning.repeats):
        seed = derive(measurement.seed, "digit_world", "grpo", source, repeat) % 2**31
        model = reinforce(measurement.loaded.model, measurement.language, source, seed, settings)
        rows.append(measurement.effects(source, model, alone, before))
    return mean_of(rows)
