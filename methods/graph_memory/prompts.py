"""Questions with advice before them, and what the advice changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor


def reward_gap(reward_BG: Tensor) -> Tensor:
    """(B,) mean reward of the latter half of each group minus that of the first; 0 where a half has no reward."""
    half = reward_BG.shape[1] // 2
    gap_B = reward_BG[:, half:].nanmean(1) - reward_BG[:, :half].nanmean(1)
    return torch.nan_to_num(gap_B, nan=0.0)


def question_of(row: Any) -> str:
    """What similarity is measured on: the question itself where a row names it, else the last thing that is asked."""
    if (named := row.meta.get("question")) is not None:
        return str(named)
    return row.prompt if isinstance(row.prompt, str) else str(row.prompt[_last_asked(row.prompt)]["content"])


def before(row: Any, advice: str) -> Any:
    """The row with advice before its question: in a chat, at the head of the last user's message."""
    if not advice:
        return row
    if isinstance(row.prompt, str):
        return replace(row, prompt=f"{advice}\n{row.prompt}")
    last, messages = _last_asked(row.prompt), [dict(m) for m in row.prompt]
    messages[last]["content"] = f"{advice}\n{messages[last]['content']}"
    return replace(row, prompt=messages)


def _last_asked(messages: Sequence[Any]) -> int:
    return max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
