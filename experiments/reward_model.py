"""A scalar reward model: objective=reward_model trains one through TRL's RewardTrainer, reward=reward_model asks one.

Bradley-Terry: L = -log sigmoid(s(x, y_c) - s(x, y_r)), mean over the pairs of a batch, s the one output of a sequence
classifier at the last token. A row's pair is its prompt with `chosen` and `rejected` from its data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engines.base import Result, Usage
from experiments.engines.scores import ScoreEngine, as_request, conversation_ids
from experiments.judging.formats import V1_ROWS
from experiments.scoring import score_results
from experiments.sft import Batches, SFTSettings, arguments, costs_callback, fit, lay_out, untouched_random_state
from experiments.tasks.base import Row
from experiments.weights import find_init, quiet_unless_watched
from methods.errors import ConfigError, DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.weights import LoadedModel

Pair = tuple[str | list[dict], str, str]


def pair_of(row: Row) -> Pair:
    """(prompt, chosen, rejected) of a row; the chosen one may be its answer. Raises DataError."""
    chosen, rejected = row.meta.get("chosen", row.answer), row.meta.get("rejected")
    if not (isinstance(chosen, str) and isinstance(rejected, str) and chosen.strip() and rejected.strip()):
        columns = ", ".join(map(str, row.meta)) or "none"
        raise DataError(
            "The row is no preference pair, which a reward model is trained on", where=f"row {row.id}",
            got=f"answer {row.answer!r:.40}; further columns: {columns:.200}",
            expected="two texts that are not empty: chosen (or the answer) and rejected",
            fix="task=jsonl task.answer_column=chosen task.path=FILE, or task=constraint_rubrics task.target=pair",
        )  # fmt: skip
    if chosen == rejected:
        raise DataError("Both answers of a pair are the same", where=f"row {row.id}", got=repr(chosen)[:80])
    return row.prompt, chosen, rejected


def classifier(loaded: LoadedModel, seed: int) -> LoadedModel:
    """`loaded` with a head of one output on its last layer in place of the words'.

    Weights come from the folder of `loaded`: a language model gets a new head drawn from `seed`, a reward model keeps
    its own. Raises ConfigError for a LoRA model and for an architecture without such a head.
    """
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    if hasattr(loaded.model, "peft_config") or (loaded.path and (loaded.path / "adapter_config.json").is_file()):
        raise ConfigError(
            "A reward model is trained whole", where="model", got="a LoRA adapter", fix="choose a model without one"
        )
    place, level = str(loaded.path or loaded.model.config._name_or_path), logging.get_verbosity()
    logging.set_verbosity_error()  # the head is new and is meant to be
    try:
        with untouched_random_state(), quiet_unless_watched():
            torch.manual_seed(seed % 2**63)
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                place, num_labels=1, dtype=loaded.model.dtype, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The model '{loaded.name}' cannot become a reward model", where=place,
            got=" ".join(str(error).split())[:200], expected="an architecture with a sequence classifier",
        ) from error  # fmt: skip
    finally:
        logging.set_verbosity(level)
    model.config.pad_token_id = loaded.tokenizer.pad_token_id
    return replace(loaded, model=model.eval())


def make_batches(rows: Sequence[Row], loaded: LoadedModel, cfg: SFTSettings, seed: int) -> Batches:
    """Every row's pair as token ids, in training order. A conversation longer than `cfg.max_length` loses its start.

    DataError for rows of RewardBench, told by their subset (other benchmarks' files are no pairs, and refused as such).
    """
    sides: list[dict] = []
    truncated = 0
    for row in rows:
        prompt, *answers = pair_of(row)
        if not V1_ROWS.keys().isdisjoint((row.tier, str(row.meta.get("subset")))):
            raise DataError("The rows are RewardBench's, and a benchmark is never trained on", where=f"row {row.id}",
                            got=f"subset {row.meta.get('subset', row.tier)}", fix="train on other pairs")  # fmt: skip
        ids = [conversation_ids(loaded.tokenizer, as_request(prompt, answer).messages or []) for answer in answers]
        truncated += any(len(side) > cfg.max_length for side in ids)
        sides.append({"chosen_ids": ids[0][-cfg.max_length :], "rejected_ids": ids[1][-cfg.max_length :]})
    tokens = [len(side["chosen_ids"]) + len(side["rejected_ids"]) for side in sides]
    return lay_out(sides, tokens, tokens, truncated, cfg, seed)


def train_reward_model(
    loaded: LoadedModel,
    rows: Sequence[Row],
    cfg: SFTSettings,
    *,
    output_dir: str | Path,
    seed: int,
    callbacks: Sequence[Any] = (),
    resume: str | Path | None = None,
    run_name: str | None = None,
) -> dict[str, float]:
    """Train the classifier `loaded.model` in place, a batch being `cfg.batch_size` pairs; as `sft.train_sft`."""
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    with untouched_random_state():
        batches = make_batches(rows, loaded, cfg, seed)
        trainer = RewardTrainer(
            model=loaded.model,
            args=arguments(RewardConfig, cfg, len(batches.trained_tokens) - 1, Path(output_dir), seed, run_name),
            train_dataset=batches.dataset,
            processing_class=loaded.tokenizer,
            callbacks=[costs_callback(batches), *callbacks],
        )
        return fit(trainer, batches, resume)


class Measure:
    """`measure(step)`: which answer of each held-out pair scores higher, strictly; a tie is wrong, as in benchmarks.

    The task's further values are those of the preferred answer; `margin` is chosen minus rejected.
    """

    def __init__(self, cfg: DictConfig, task: Any, loaded: LoadedModel) -> None:
        e = cfg.eval
        self.task, self.split = task, e.split
        self.rows = task.rows(e.split, e.seed)[: e["items"]]
        self.pairs = [pair_of(row) for row in self.rows]
        self.engine = ScoreEngine(
            loaded.model, loaded.tokenizer, batch_size=e.batch_size, max_length=cfg.objective.max_length
        )

    def prepare(self) -> None:
        """There is no probe: a reward model has no distribution over words."""

    def __call__(self, step: int):
        if not self.rows:
            return None
        asked = [as_request(prompt, answer) for prompt, *answers in self.pairs for answer in answers]
        scores = iter([float(answers[0].text) for answers in self.engine.generate(asked)])
        margins = [next(scores) - next(scores) for _ in self.rows]
        said = [
            [Result(pair[1] if margin > 0 else pair[2], None, None, "stop", Usage(0, 0))]
            for pair, margin in zip(self.pairs, margins, strict=True)
        ]
        frame = score_results(self.task, self.rows, said, split=self.split)
        frame["score"] = [float(margin > 0) for margin in margins]
        frame["margin"] = margins
        return frame, {"eval/score": float(frame["score"].to_numpy().mean())}


def reward(model: str, batch_size: int = 16, max_length: int = 4096) -> Callable[[list[str], list[Row]], list[float]]:
    """The reward function that scores each completion behind its row's prompt. model: run, folder or hub id."""
    engine = ScoreEngine(trained(model), batch_size=batch_size, max_length=max_length)

    def score(texts: list[str], rows: list[Row]) -> list[float]:
        asked = [as_request(row.prompt, text) for text, row in zip(texts, rows, strict=True)]
        return [float(answers[0].text) for answers in engine.generate(asked)]

    return score


def trained(model: str, seed: int = 0, results_dir: str | Path = "results") -> str:
    """The folder that holds the weights of the run `model`; what is no run and no folder is taken for a hub id."""
    try:
        return str(find_init(model, seed, results_dir))
    except ConfigError:
        return model
