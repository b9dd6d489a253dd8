"""The job behind `assay score-transfer`: scores of domains, measured changes if asked for, files and a record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.engines.build import instantiate
from experiments.evaluate import is_done, sigterm_interrupts
from methods.errors import ConfigError, DataError, check_range

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.transfer.data import Data

RANKS = ("act", "icl", "released", "cosine", "random", "tuned")
SETTINGS = {  # key: the least value
    "score.source_demos": 1, "score.source_tokens": 1, "score.demos": 1, "score.tokens": 1, "score.latents": 1,
    "score.context": 8, "score.piece": 40, "score.batch_tokens": 1, "sae.characters": 1, "sft.rows": 1, "sft.items": 1,
    "mixture.budget": 1, "extremes": 1,
}  # fmt: skip


def run(cfg: DictConfig) -> Path:
    """Score as `cfg` (conf/score_transfer.yaml) says and return the run folder.

    A finished record of the same configuration is returned at once. An interrupted one goes on with the next domain, a
    fine-tune from its last checkpoint, and ends in the same files. Raises DataError and ConfigError before the model is
    loaded where the data or the settings are wrong, KeyboardInterrupt on SIGINT and SIGTERM.
    """
    from experiments.recording import make_room, only_writer, open_record, run_folder
    from experiments.transfer.data import read

    path = run_folder(cfg)
    if is_done(path, cfg):
        print(f"{path}: finished earlier, skipped", file=sys.stderr)
        return path
    check(cfg)
    data = read(instantiate(cfg.domains), cfg.source, cfg.score.piece, int(cfg.seed))
    _check_data(cfg, data)
    from experiments.transfer.job import Job

    with only_writer(path):
        make_room(path, cfg)
        writer = open_record(path, cfg, "score-transfer")
        try:
            with sigterm_interrupts():
                values, cost = Job(cfg, data, path).work()
        except BaseException as error:
            writer.fail("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", str(error))
            raise
        writer.finish(values, cost)
    return path


def check(cfg: DictConfig) -> None:
    """Raises ConfigError for settings that cannot be run, without reading data or loading a model."""
    from omegaconf import OmegaConf

    for key, least in SETTINGS.items():
        value = OmegaConf.select(cfg, key)
        if value is not None:
            check_range(key, value, least)
    check_range("score.share", cfg.score.share, 0, 1, above=True)
    if cfg.score.longest is not None:
        check_range("score.longest", cfg.score.longest, 1, above=True)
    check_range("sft.learning_rate", cfg.sft.learning_rate, 0)
    if cfg.score.rank not in RANKS:
        raise ConfigError("unknown score", where="score.rank", got=cfg.score.rank, expected=", ".join(RANKS))
    if cfg.score.rank == "tuned" and not cfg.measure:
        raise ConfigError("The rank 'tuned' needs the fine-tune", where="score.rank", fix="add measure=true")
    if cfg.measure and cfg.changes:
        raise ConfigError("Changes are either given or measured", where="changes", fix="leave out changes or measure")
    if cfg.extremes and not (cfg.measure or cfg.changes):
        raise ConfigError("The extremes are chosen by measured changes", where="extremes", fix="add measure=true")
    if cfg.sae.path is None and not cfg.sae.train:
        raise ConfigError(
            "A score needs an SAE of this model",
            where="sae.path",
            expected="a folder in SAELens's or sparsify's layout",
            fix="give sae.path=FOLDER, or sae.train=true to train one on these texts",
        )
    instantiate(cfg.domains)


def _check_data(cfg: DictConfig, data: Data) -> None:
    """Raises ConfigError and DataError for data that would be refused behind a part of the scoring."""
    from experiments.transfer.data import refuse_too_few

    refuse_too_few(data.source_examples, cfg.score.source_demos)
    for examples in data.domains.values():
        refuse_too_few(examples, cfg.score.demos)
    if cfg.extremes and len(data.domains) < 2 * cfg.extremes:
        raise ConfigError(
            "There are too few domains to take the most and the least changed of",
            where="extremes",
            got=f"{cfg.extremes} of {len(data.domains)} domains",
            expected=f"at most {len(data.domains) // 2}",
        )
    if cfg.measure and len({all(e.options for e in examples) for examples in data.domains.values()}) > 1:
        raise DataError("Some domains have options and others have none, so their changes cannot be compared")


def shown(cfg: DictConfig) -> str:
    """What a finished run says: its table."""
    from experiments.recording import run_folder

    return (run_folder(cfg) / "table.md").read_text(encoding="utf-8")
