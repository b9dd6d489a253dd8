"""reward=rubric: a judge behind an engine grades every answer by its instruction's rubric, or lets a group compete.

An extension of CDRRM, whose paper has no reinforcement learning.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.engines.base import Engine
from experiments.judging.asking import Asker
from experiments.judging.judges import LETTER, VERDICT, first_word
from experiments.tasks.base import Row
from methods.cdrrm import prompts
from methods.cdrrm.parsing import Rejected, parse_json, winner
from methods.cdrrm.rewards import ALPHA, pointwise, tournament
from methods.cdrrm.rubric import Rubric
from methods.errors import ConfigError, DataError, check_range

MODES = ("pointwise", "tournament")
MOST = 8  # answers of a group that can all meet each other


class RubricReward:
    """Rewards in [0, 1] for groups of answers to the same row.

    mode: `pointwise` grades each answer on the row's rubric, r = .8 mean of hard rules + .2 mean of principles;
    `tournament` lets each two answers of a group meet in both orders, r_i = mean credit of i, G (G - 1) calls. engine:
    an engine's keys with its `_target_`, as in conf/engine; one that needs a live model has the keys of a file in
    conf/model under `model`. max_tokens: longest grading or judgment. analysis: let the judge of a tournament reason
    first; false begins its answer with the verdict line, so that it writes the letter only. The rubric is the column
    `rubric` of the data (JSON, as rubrics.jsonl has it); a tournament without one asks directly.
    Degenerate: a grading that is cut off or cannot be read is None (no reward there, never 0); an unreadable verdict
    counts 1/2, as do two equal answers, about which nobody is asked. Raises ConfigError for a group of more than eight
    answers, DataError for a row without a valid rubric.
    """

    def __init__(self, mode: str = "pointwise", engine: Mapping[str, Any] | Engine | None = None,
                 max_tokens: int = 2048, alpha: float = ALPHA, analysis: bool = True) -> None:  # fmt: skip
        if mode not in MODES:
            raise ConfigError("Unknown mode", where="reward rubric: mode", got=mode, expected=", ".join(MODES))
        if engine is None:
            raise ConfigError("A rubric reward needs an engine to ask", where="reward rubric: engine")
        check_range("reward rubric: max_tokens", max_tokens, 1)
        check_range("reward rubric: alpha", alpha, 0.0, 1.0)
        self.mode, self.alpha = mode, alpha
        self.begun = VERDICT if mode == "tournament" and not analysis else ""
        self.asker = Asker(
            _built(engine) if isinstance(engine, Mapping) else engine, LETTER if self.begun else max_tokens
        )

    def __call__(self, texts: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        groups = list(_groups(texts, rows))
        if self.mode == "pointwise":
            return self._graded(groups)
        return [value for row, answers in groups for value in self._met(row, answers)]

    def _graded(self, groups: list[tuple[Row, list[str]]]) -> list[float | None]:
        asked = [(row, rubric_of(row), text) for row, answers in groups for text in answers]
        results = self.asker.ask([prompts.grading(row.prompt, text, rubric) for row, rubric, text in asked])
        values: list[float | None] = []
        for (_, rubric, _), result in zip(asked, results, strict=True):
            try:
                if result.finish == "length":
                    raise Rejected("cut off")
                values.append(pointwise(*prompts.read_grades(result.text, rubric), alpha=self.alpha))
            except Rejected:
                values.append(None)
        return values

    def _met(self, row: Row, answers: list[str]) -> list[float]:
        if len(answers) > MOST:
            raise ConfigError(
                "A tournament asks about every two answers of a group, in both orders", where="reward rubric",
                got=f"{len(answers)} answers", expected=f"at most {MOST}", fix="lower trainer.rollouts_per_prompt",
            )  # fmt: skip
        rubric = rubric_of(row) if "rubric" in row.meta else None
        places = range(len(answers))
        meets = [(i, j) for i in places for j in places if i != j and answers[i] != answers[j]]
        asked = [prompts.judging(row.prompt, answers[i], answers[j], rubric) for i, j in meets]
        said = [winner(self._whole(result.text)) for result in self.asker.ask(asked, self.begun)] if asked else []
        W_GG = np.full((len(answers), len(answers)), 0.5)
        votes = {pair: slot for pair, slot in zip(meets, said, strict=True)}
        for i, j in meets:
            one, back = votes[i, j], votes[j, i]
            W_GG[i, j] = 1.0 if (one, back) == (0, 1) else 0.0 if (one, back) == (1, 0) else 0.5
        return tournament(W_GG).tolist()

    def _whole(self, text: str) -> str:
        return self.begun + first_word(text) if self.begun else text


def rubric_of(row: Row) -> Rubric:
    """The rubric in the row's data. Raises DataError."""
    value = row.meta.get("rubric")
    try:
        return Rubric.from_json(dict(value) if isinstance(value, Mapping) else parse_json(str(value or "")))
    except Rejected as refusal:
        raise DataError(
            "The row has no valid rubric", where=f"row {row.id}, column 'rubric'", got=str(refusal),
            expected='{"hard_rules": [...], "principles": [...]}, as in rubrics.jsonl of assay judge',
        ) from refusal  # fmt: skip


def _groups(texts: Sequence[str], rows: Sequence[Row]) -> Iterator[tuple[Row, list[str]]]:
    """Consecutive answers to one row: a group of the trainer."""
    for _, members in itertools.groupby(zip(rows, texts, strict=True), key=lambda pair: pair[0].id):
        found = list(members)
        yield found[0][0], [text for _, text in found]


def _built(node: Mapping[str, Any]) -> Engine:
    """The engine of `node` behind the cache. Raises ConfigError."""
    from omegaconf import OmegaConf

    from experiments.engines.build import build_engine, engine_factory
    from experiments.tasks.base import Task

    engine = dict(node)
    model = engine.pop("model") if isinstance(engine.get("model"), Mapping) else {}
    cfg = OmegaConf.create({"engine": engine, "model": model, "seed": 0, "results_dir": "results"})
    if engine_factory(cfg).func.needs == "model" and not model:
        raise ConfigError(
            "This engine runs a model, and none is named", where="reward rubric: engine.model",
            got=engine.get("model"), expected="the keys of a file in conf/model with its _target_",
            fix="see reward=rubric_local",
        )  # fmt: skip
    return build_engine(cfg, Task(name="judge"))
