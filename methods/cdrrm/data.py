"""Rows for supervised training of the rubric generator and of the judge, as chat messages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

from methods.cdrrm import prompts
from methods.cdrrm.parsing import winner
from methods.cdrrm.rubric import Rubric

Item = TypeVar("Item")

SEED = 42  # of the order of the rows, as in the released code


def _row(asked: prompts.Messages, answer: str) -> dict[str, Any]:
    return {"messages": [*asked, {"role": "assistant", "content": answer}]}


def generator_row(prompt: str | Sequence[dict[str, str]], response_a: str, response_b: str, rubric: Rubric) -> dict:
    """P3 answered by the rubric. The generator sees both answers, in the order given, and never the label."""
    return _row(prompts.generation(prompt, response_a, response_b), rubric.dumps())


def judge_row(
    prompt: str | Sequence[dict[str, str]], response_a: str, response_b: str, rubric: Rubric, text: str
) -> dict | None:
    """P4 answered by the teacher's analysis and winner; None where the text names no winner.

    Differs from the paper: `rubric` is there the trained generator's, in the rows of `assay judge` the teacher's. No
    switch against thinking is put into the prompt; where a model needs one it is an argument of its chat template.
    """
    if winner(text) is None:
        return None
    return _row(prompts.judging(prompt, response_a, response_b, rubric), text)


def shuffled(rows: Sequence[Item], seed: int = SEED) -> list[Item]:
    """The rows in an order that depends on their number and `seed` alone."""
    found = list(rows)
    random.Random(seed).shuffle(found)
    return found
