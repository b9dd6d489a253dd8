"""What fine-tuning on the source changes: a fine-tune through TRL, and each domain measured before and after.

A domain with options is measured by accuracy (the letter of largest probability), any other by the loss per token of
its answers, or of its plain texts; the same items before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments import stats
from experiments.capture import padded, start_ids
from experiments.models import Lora
from experiments.passages import Prompter
from experiments.seeds import derive
from experiments.sft import SFTSettings, train_sft
from experiments.transfer.data import LETTERS, Example
from methods.errors import ConfigError, DataError

if TYPE_CHECKING:
    from experiments.weights import LoadedModel

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Measured:
    """Per item of one domain: the value and its weight (tokens of a loss, 1 of an accuracy)."""

    value_N: np.ndarray
    weight_N: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.value_N @ self.weight_N / self.weight_N.sum())


def by_accuracy(examples: Sequence[Example]) -> bool:
    return all(e.options for e in examples)


def measure(loaded: LoadedModel, examples: Sequence[Example], context: int | None) -> Measured:
    """Accuracy (1 or 0) or mean loss of each example. DataError if none fits the context."""
    chat = loaded.chat and not examples[0].is_text
    prompter = Prompter(loaded, chat=chat, context=context)
    passages = [prompter.passage(e.asked) for e in examples]
    limit = prompter.context
    kept = [k for k, p in enumerate(passages) if not limit or len(p.ids) <= limit]
    if not kept:
        raise DataError("No text of a domain fits the context", where=f"domain {examples[0].domain}", got=limit)
    accuracy = by_accuracy(examples)
    letters = _letters(loaded.tokenizer) if accuracy else []
    value, weight = np.zeros(len(kept)), np.ones(len(kept))
    for rows in _batches([len(passages[k].ids) for k in kept]):
        inputs = padded([passages[kept[r]].ids for r in rows], next(loaded.model.parameters()).device)
        with torch.no_grad():
            logits_BLV = loaded.model(**inputs, use_cache=False).logits
        for b, row in enumerate(rows):
            example, passage = examples[kept[row]], passages[kept[row]]
            # The last span is the answer's, or all of a plain text; the first token of all has no prediction.
            start, end = max(1, passage.spans[-1][0]), passage.spans[-1][1]
            if accuracy:
                guess = int(logits_BLV[b, start - 1, letters[: len(example.options)]].argmax())
                value[row] = float(guess == example.right)
                continue
            targets = torch.tensor(passage.ids[start:end], device=logits_BLV.device)
            value[row] = float(torch.nn.functional.cross_entropy(logits_BLV[b, start - 1 : end - 1].float(), targets))
            weight[row] = end - start
    return Measured(value, weight)


def _letters(tokenizer: Any) -> list[int]:
    ids = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in LETTERS]
    if any(len(one) != 1 for one in ids):
        raise ConfigError("The tokenizer has no single tokens for the letters A to Z, so accuracy cannot be measured")
    return [one[0] for one in ids]


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Rows by length, at most `BATCH_TOKENS` padded tokens each."""
    order = sorted(range(len(lengths)), key=lambda r: lengths[r])
    found: list[list[int]] = []
    for row in order:
        if found and lengths[row] * (len(found[-1]) + 1) <= BATCH_TOKENS:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def change(before: Measured, after: Measured) -> stats.Interval:
    """After minus before on the same items, items resampled in pairs."""
    weight = before.weight_N

    def difference(count_N: np.ndarray) -> list[float]:
        total = float(count_N @ weight)
        return [float((count_N * weight) @ (after.value_N - before.value_N)) / total if total else float("nan")]

    items = np.arange(len(weight))
    return stats.cluster_bootstrap(difference, items, draws=2000, rng=np.random.default_rng(0))[0]


def fine_tune(
    loaded: LoadedModel, examples: Sequence[Example], cfg: Any, folder: Path, seed: int, gpu: dict[str, Any]
) -> dict[str, float]:
    """Fine-tune `loaded.model` on the source (LoRA where the configuration asks for it); goes on from a checkpoint."""
    if cfg.lora is not None:
        loaded.model = Lora(**cfg.lora).wrap(loaded.model, derive(seed, "lora"))
    rows = [row(e, loaded, cfg.max_length) for e in examples[: cfg.rows]]
    settings = SFTSettings(
        epochs=cfg.epochs,
        batch_size=cfg.batch_size,
        rows_per_device=cfg.rows_per_device,
        learning_rate=cfg.learning_rate,
        warmup_steps=cfg.warmup_steps,
        max_length=cfg.max_length,
        save_steps=cfg.save_every,
        bf16=gpu["bf16"],
        use_cpu=gpu["use_cpu"],
        gradient_checkpointing=gpu["gradient_checkpointing"],
    )
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    whole = [p for p in found if (p / "trainer_state.json").is_file()]
    return train_sft(
        loaded,
        rows,
        settings,
        output_dir=folder,
        seed=seed,
        progress="fine-tuning",
        resume=whole[-1] if whole else None,
    )


def row(example: Example, loaded: LoadedModel, length: int) -> dict[str, Any]:
    """A training row: a question with its answer, or all tokens of a plain text."""
    if not example.is_text:
        return {"prompt": example.prompt, "completion": example.answer}
    ids = [*start_ids(loaded.tokenizer), *loaded.tokenizer(example.answer, add_special_tokens=False)["input_ids"]]
    return {"input_ids": ids[:length], "labels": ids[:length]}


def given_changes(path: str, domains: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measured changes from a table with the columns domain and change (or before and after), for all domains.

    DataError for a domain without a number, or a column that is missing.
    """
    from experiments.tasks.base import columns_of, missing_column, read_table

    records = read_table(path, None, ("domain",), key="changes")
    columns = columns_of(records)
    pair = {"before", "after"} <= set(columns)
    if not pair and "change" not in columns:
        raise missing_column("change", columns, path, "changes")
    found = {}
    for place, record in enumerate(records):
        try:
            values = {key: float(record[key]) for key in (("before", "after") if pair else ("change",))}
            if not np.isfinite(list(values.values())).all():
                raise ValueError("not finite")
        except (TypeError, ValueError, KeyError) as error:
            raise DataError("A change is not a number", where=f"{path}, row {place + 1}", got=str(error)) from error
        values.setdefault("change", values.get("after", 0.0) - values.get("before", 0.0))
        found[str(record["domain"])] = values
    if missing := [name for name in domains if name not in found]:
        raise DataError(
            "Domains have no measured change", where=path, got=", ".join(missing[:10]), expected="a row each"
        )
    return {name: found[name] for name in domains}
