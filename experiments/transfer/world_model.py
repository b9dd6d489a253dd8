"""The language model of the digit world, its fine-tunes on one source domain, and what they do elsewhere."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.artefacts import artefact
from experiments.models import Tiny, one_thread
from experiments.seeds import derive
from experiments.sft import SFTSettings, train_sft, untouched_random_state
from experiments.tokenizers import IGNORED, tiny_tokenizer
from experiments.transfer.world import ANSWER, EXAMPLES, NAMES, PLAIN, PLUS5, SYMBOLS, Language, all_pairs
from experiments.weights import LoadedModel, open_model, quiet_unless_watched

RECIPE = 1


@dataclass(frozen=True)
class Pretraining:
    """Documents per step, steps, and the rate: AdamW, linear warm-up over 100 steps, cosine to zero."""

    steps: int = 1400
    batch: int = 32
    learning_rate: float = 4e-3


def load_world_model(seed: int, settings: Pretraining) -> LoadedModel:
    """The language model of `seed`: 3 layers, width 64, 4 heads, rotary positions; trained once and cached."""
    import torch
    import transformers

    versions = {m.__name__: m.__version__ for m in (torch, transformers)}
    key = {"recipe": RECIPE, "seed": seed, "settings": asdict(settings), "versions": versions}
    folder = artefact("digit_world", key, lambda target: _build(target, seed, settings))
    return open_model(folder, f"digits-{seed}", dtype="float32", folder=folder)


def _build(folder: Path, seed: int, settings: Pretraining) -> None:
    shape = Tiny(layers=3, heads=4, kv_heads=4, feed_forward=172, init_std=0.1, max_length=128)
    tokenizer = tiny_tokenizer(SYMBOLS)
    with untouched_random_state(), one_thread():
        model = shape.new(tokenizer, derive(seed, "digit_world", "weights"))
        loss = _pretrain(model, Language.of(tokenizer), seed, settings)
    with quiet_unless_watched():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps({"loss": loss}) + "\n")


def _pretrain(model: Any, language: Language, seed: int, settings: Pretraining) -> float:
    """Next-token loss on answer digits; returns the last one."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from experiments.engines.progress import progress_bar

    rng = np.random.default_rng(derive(seed, "digit_world", "documents"))
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimiser, min(100, settings.steps), settings.steps)
    answers = torch.from_numpy(np.flatnonzero(answer_mask(1 + 7 * EXAMPLES)))
    loss = torch.zeros(())
    model.train()
    with progress_bar(f"digit world, language model {seed}", settings.steps, unit="step") as progress:
        for _ in range(settings.steps):
            ids = torch.from_numpy(language.documents(settings.batch, rng))
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, answers - 1]
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, answers].flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress(1)
    model.eval()
    return loss.item()


def answer_mask(length: int) -> np.ndarray:
    """(length,) true at answer digits; position 0 is the start token."""
    place = (np.arange(length) - 1) % 7
    return (np.arange(length) > 0) & (place >= ANSWER.start) & (place < ANSWER.stop)


# ---------------------------------------------------------------- fine-tunes and what they change


@dataclass(frozen=True)
class Tuning:
    """Supervised steps on `plus5` answers of one source domain, from a start token each; constant rate."""

    examples: int = 200
    epochs: float = 2
    batch: int = 25
    learning_rate: float = 2e-4
    repeats: int = 2


def fine_tune(loaded: LoadedModel, rows_NT: np.ndarray, seed: int, settings: Tuning, folder: Path) -> Any:
    """A copy of the model, trained through TRL on the answer digits of `rows_NT` (N documents of one length)."""
    mask = answer_mask(rows_NT.shape[1])
    rows = [{"input_ids": ids.tolist(), "labels": np.where(mask, ids, IGNORED).tolist()} for ids in rows_NT]
    tuned = replace(loaded, model=copy.deepcopy(loaded.model))
    sft = SFTSettings(
        epochs=settings.epochs,
        batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        schedule="constant",
        use_cpu=True,
    )
    with one_thread():
        train_sft(tuned, rows, sft, output_dir=folder, seed=seed, progress=False)
    return tuned.model.eval()


def source_examples(language: Language, source: str, rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 7) `plus5` examples of a domain, questions drawn with replacement from its hundred."""
    a, b = rng.integers(10, size=(2, count))
    return language.examples(source, a, b, PLUS5)


def accuracies(
    model: Any, language: Language, variant: int = PLAIN, places: np.ndarray | slice = slice(None)
) -> dict[str, float]:
    """Share of each domain's questions answered under `variant` without demonstrations (both digits).

    `places`: which of the hundred questions.
    """
    import torch

    a, b = (values[places] for values in all_pairs())
    ids = np.concatenate([language.queries(language.examples(name, a, b, variant)) for name in NAMES])
    with torch.no_grad():
        guess = model(input_ids=torch.from_numpy(ids)).logits[:, ANSWER.start : ANSWER.stop].argmax(-1).numpy()
    # Logits at position t predict t + 1, and the start token shifts an example by one: its slice serves for both.
    right = (guess == ids[:, 1 + ANSWER.start : 1 + ANSWER.stop]).all(axis=1)
    return {name: float(r.mean()) for name, r in zip(NAMES, right.reshape(len(NAMES), -1), strict=True)}
