"""Metrics sent to a tracker beside the record (`record.report_to`); keys and addresses come from its environment."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from methods.errors import ConfigError, nearest

TRACKERS = ("none", "tensorboard", "wandb", "trackio")


def check(name: Any) -> None:
    """ConfigError for an unknown tracker, or one that is not installed."""
    if name not in TRACKERS:
        fix = nearest(str(name), TRACKERS)
        known = ", ".join(TRACKERS)
        raise ConfigError("unknown tracker", where="record.report_to", got=name, expected=known, fix=fix)
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"the tracker {name} is not installed", where="record.report_to", got=name, fix=f"pip install {name}"
        )


def callbacks(cfg: DictConfig, path: Path) -> list[Any]:
    """What hears every log of the run: to be added behind the recorder, whose evaluations it then sees.

    TensorBoard writes to `<run>/tensorboard`; wandb and trackio to the project `assay`, unless their environment names
    another one.
    """
    from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

    if cfg.record.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return [TensorBoardCallback(SummaryWriter(str(path / "tensorboard")))]
    os.environ.setdefault("WANDB_PROJECT", "assay")
    made = {"none": [], "wandb": [WandbCallback], "trackio": [TrackioCallback]}
    return [callback() for callback in made[cfg.record.report_to]]


def run_name(cfg: DictConfig) -> str:
    return f"{cfg.experiment}/{cfg.arm}/seed{cfg.seed}"
