"""The fixed responses under which checkpoints are compared, as token ids with a mark on what the model would write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engines.progress import progress_bar
from experiments.seeds import derive
from experiments.shift.checkpoints import WHERE, Checkpoint, ancestry
from experiments.tokenizers import IGNORED, encode, prompt_ids
from methods.errors import ConfigError, DataError

if TYPE_CHECKING:
    from experiments.weights import LoadedModel

SOURCES = ("auto", "demos", "greedy", "samples")
Named = tuple[str, Any]  # the id of a row and what `encode` takes


@dataclass(frozen=True)
class Text:
    """One response: token ids of prompt and response, labels as in `experiments.tokenizers.encode`."""

    id: str
    ids: list[int]
    labels: list[int]

    @cached_property
    def positions(self) -> list[int]:
        """Where the measured tokens stand; the first token of all has no prediction."""
        return [i for i, label in enumerate(self.labels) if label != IGNORED and i > 0]

    @property
    def prompt(self) -> list[int]:
        """What stands before the first measured token."""
        return self.ids[: self.positions[0]]


@dataclass(frozen=True)
class Texts:
    """Responses of one source: `by` names it in a table, `told` says more. `sampled`: written by a checkpoint.

    `left_out`: how many had nothing to measure or did not fit into the model's context.
    """

    by: str
    told: str
    rows: list[Text]
    left_out: int = 0
    sampled: bool = False

    @property
    def tokens(self) -> int:
        return sum(len(text.positions) for text in self.rows)


def choose(
    how: str, base: LoadedModel, found: Sequence[Checkpoint], config: Mapping[str, Any], items: int, seed: int
) -> Texts:
    """At most `items` responses for the tokenizer of `base`, the loaded model of `found[0]`.

    how: `demos` takes demonstrations of held-out rows: those of the evaluation split if it has any, else rows of
    another training seed with prompts that no run here was trained on. `greedy` and `samples` are completions of
    `base` for the evaluation split. `auto` takes demos where there are some, else greedy. Any other word is a JSONL
    file with `prompt` and `completion` (or `messages`) per line. `config` holds the settings `task` and `eval`.
    Raises ConfigError without a task, DataError if no response is left.
    """
    if how not in SOURCES:
        rows = _from_file(how)
        return _encoded(Path(how).name, f"responses of {how}", rows[:items], base)
    if not config.get("task"):
        raise ConfigError(
            "There are no texts to compare the checkpoints on",
            where=WHERE,
            got="folders of weights without a run's config.yaml",
            fix="add a task, such as task=gsm8k task.path=FILE, or give --texts FILE.jsonl",
        )
    task, held_out = _task(config)
    if how in ("auto", "demos"):
        rows, told = _demonstrations(task, held_out, found, seed)
        if rows:
            return _encoded("demonstrations", told, rows[:items], base)
        if how == "demos":
            raise DataError(
                "No held-out row has a demonstration",
                where=f"task {task.name}",
                fix="use --texts greedy, or give the demonstrations as --texts FILE.jsonl",
            )
    greedy = how != "samples"
    by = f"{'greedy responses' if greedy else 'samples'} of {found[0].name}"
    prompts = [(row.id, prompt_ids(row.prompt, base)) for row in held_out[:items]]
    return sample(by, base, prompts, task.max_completion_tokens, seed, temperature=0.0 if greedy else 1.0)


def _task(config: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The task and the rows of its evaluation split."""
    from experiments.engines.build import instantiate

    task, evaluation = instantiate(config["task"]), config.get("eval") or {}
    return task, task.rows(evaluation.get("split", "eval"), evaluation.get("seed", 0))


def _demonstrations(task: Any, held_out: list, found: Sequence[Checkpoint], seed: int) -> tuple[list[Named], str]:
    rows = [(row.id, row) for row in held_out if row.demo is not None]
    if rows:
        return rows, f"demonstrations of held-out rows of task {task.name}"
    seen = set[str]()
    for one in found:
        for config in ancestry(one):
            seen |= _trained_on(config)
    fresh = {_key(row.prompt): row for row in task.rows("train", derive(seed, "shift")) if row.demo is not None}
    rows = [(row.id, row) for prompt, row in fresh.items() if prompt not in seen]
    return rows, f"demonstrations of task {task.name} for prompts that none of these runs was trained on"


def _trained_on(config: Mapping[str, Any]) -> set[str]:
    """The prompts that a run and its warm start may have met."""
    from experiments.engines.build import instantiate

    task, model = instantiate(config["task"]), config.get("model") or {}
    rows = task.rows("train", config.get("seed", 0))
    warm = None if model.get("init") else model.get("warm_start")
    if warm:
        rows = [*rows, *task.warm_rows(config.get("seed", 0) if warm.get("seed") is None else warm["seed"])]
    return {_key(row.prompt) for row in rows}


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)


def _from_file(name: str) -> list[Named]:
    from experiments.tasks.base import read_table

    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            "There is no file with texts", where="--texts", got=name, expected=f"{', '.join(SOURCES)}, or a JSONL file"
        )
    records = read_table(str(path), key="--texts")
    for number, record in enumerate(records, start=1):
        if "messages" not in record and not (record.get("prompt") and record.get("completion")):
            raise DataError(
                "A text lacks its prompt or its completion",
                where=f"{path}, row {number}",
                got="keys " + ", ".join(record),
                expected='{"prompt": "2+2=", "completion": "4"} or {"messages": [...]}',
            )
    return [(f"row {number}", record) for number, record in enumerate(records, start=1)]


def _encoded(by: str, told: str, rows: Sequence[Named], base: LoadedModel) -> Texts:
    encoded = [(name, encode(row, base)) for name, row in rows]
    return _fitting(by, told, [Text(name, e["input_ids"], e["labels"]) for name, e in encoded], base)


def _fitting(by: str, told: str, rows: Sequence[Text], loaded: LoadedModel, sampled: bool = False) -> Texts:
    """Those rows that have something to measure and fit into the model's context. DataError if none does."""
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    kept = [row for row in rows if row.positions and len(row.ids) <= context]
    if not kept:
        raise DataError(
            "There is no text to compare the checkpoints on",
            where=told,
            got=f"{len(rows)} responses",
            expected=f"at least one with a token, not longer than the context of {context} tokens",
        )
    return Texts(by, told, kept, len(rows) - len(kept), sampled)


def sample(
    by: str,
    loaded: LoadedModel,
    prompts: Sequence[tuple[str, list[int]]],
    max_tokens: int,
    seed: int,
    temperature: float = 1.0,
) -> Texts:
    """One completion of each prompt by this model; the random stream of a row depends on `seed` and its id only."""
    from experiments.engines.base import Request
    from experiments.engines.transformers import TransformersEngine

    engine = TransformersEngine(loaded.model, loaded.tokenizer, chat=loaded.chat)
    requests = [
        Request(prompt_ids=ids, max_tokens=max_tokens, temperature=temperature, seed=derive(seed, "shift", name))
        for name, ids in prompts
    ]
    with progress_bar(by, len(requests), unit="responses") as advance:
        results = engine.generate(requests, advance)
    rows = [
        Text(name, [*ids, *(result[0].ids or [])], [IGNORED] * len(ids) + list(result[0].ids or []))
        for (name, ids), result in zip(prompts, results, strict=True)
    ]
    return _fitting(by, by, rows, loaded, sampled=True)
