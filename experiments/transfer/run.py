"""The job behind `assay score-transfer`: scores of domains, measured changes if asked for, files and a record."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.engines.build import instantiate
from experiments.engines.progress import progress_bar
from experiments.evaluate import is_done, sigterm_interrupts
from experiments.transfer import data as reading
from methods.errors import ConfigError, DataError, check_range

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.transfer.scoring import Scorer

SETTINGS = {  # key: the least value
    "score.source_demos": 1, "score.source_tokens": 1, "score.demos": 1, "score.tokens": 1, "score.latents": 1,
    "score.context": 8, "score.piece": 40, "score.batch_tokens": 1, "sft.rows": 1, "sft.items": 1, "mixture.budget": 1,
    "extremes": 1,
}  # fmt: skip


def run(cfg: DictConfig) -> Path:
    """Score as `cfg` (conf/score_transfer.yaml) says and return the run folder.

    A finished record of the same configuration is returned at once. An interrupted one goes on with the next domain, a
    fine-tune from its last checkpoint, and ends in the same files. Raises DataError and ConfigError before the model is
    loaded where the data or the settings are wrong, KeyboardInterrupt on SIGINT and SIGTERM.
    """
    from experiments.recording import make_room, only_writer, open_record, run_folder

    path = run_folder(cfg)
    if is_done(path, cfg):
        print(f"{path}: finished earlier, skipped", file=sys.stderr)
        return path
    check(cfg)
    data = reading.read(instantiate(cfg.domains), cfg.source, cfg.score.piece, int(cfg.seed))
    with only_writer(path):
        make_room(path, cfg)
        writer = open_record(path, cfg, "score-transfer")
        try:
            with sigterm_interrupts():
                values, cost = _Job(cfg, data, path).work()
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
    check_range("sft.learning_rate", cfg.sft.learning_rate, 0)
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


class _Job:
    def __init__(self, cfg: DictConfig, data: reading.Data, path: Path) -> None:
        self.cfg, self.data, self.path = cfg, data, path
        self.seed = int(cfg.seed)

    def work(self) -> tuple[dict[str, float], dict[str, float]]:
        from experiments.run import quiet, threads_for
        from experiments.tasks.base import Task
        from experiments.transfer import output

        quiet()
        began = time.monotonic()
        model = instantiate(self.cfg.model)
        self.loaded = model.load(Task(name="score_transfer"), self.seed, results_dir=self.cfg.results_dir)
        self._place()
        threads_for(self.loaded)
        scored, scorer = self._scored()
        if self.cfg.changes:
            from experiments.transfer.effects import given_changes

            measured = given_changes(self.cfg.changes, list(scored.domains))
            scored = replace(scored, changes=measured, measured="the given measure")
        elif self.cfg.measure:
            scored = self._measured(scored, scorer)
        output.write(self.path, scored, self.seed, self.cfg.mixture.budget, self.cfg.extremes)
        cost = {"forwarded_tokens": float(scorer.read), "scoring_seconds": scorer.seconds}
        return output.figures_of(self.path), {**cost, "seconds": time.monotonic() - began}

    def _place(self) -> None:
        from experiments.run import device_arguments

        self.device = device_arguments(self.cfg.scale)
        if not self.device["use_cpu"]:
            self.loaded.model.to("cuda")

    # ---------------------------------------------------------------- scores

    def _scored(self) -> tuple[Any, Scorer]:
        from experiments.saes import warnings, weights_digest
        from experiments.transfer.output import Scored
        from experiments.transfer.scoring import Scorer, selection

        cfg = self.cfg.score
        found = self._sae()
        scorer = Scorer(
            self.loaded, found.sae, self.seed, cfg.source_demos, cfg.source_tokens, cfg.demos, cfg.tokens, cfg.context,
            cfg.batch_tokens,
        )  # fmt: skip
        made_from = {
            "data": self.data.digest, "seed": self.seed, "model": weights_digest(self.loaded.model),
            "sae": weights_digest(found.sae), "score": {k: v for k, v in cfg.items() if k != "batch_tokens"},
        }  # fmt: skip
        total = 1 + len(self.data.domains)
        with progress_bar(f"scores on {self.loaded.name}", total, unit="domains") as progress:
            source = self._source_part(scorer, made_from)
            progress(1)
            chosen = selection(source, cfg.latents, cfg.share)
            release = selection(source, len(chosen.latents), cfg.share, "unaligned")
            domains = {}
            for name in self.data.domains:
                latents = {"latents": chosen.latents, "release": release.latents}
                domains[name] = self._domain_part(scorer, name, latents, made_from)
                progress(1)
        facts = {
            "model": self.loaded.name, "source": self.data.source, "seed": self.seed, "demos": cfg.source_demos,
            "source_tokens": int(source["tokens"][0]), "alignment": "same tokens", "positions": "query and answer",
            "sae": {"name": found.path.name, "layer": found.sae.layer, "latents": found.sae.latents,
                    "architecture": found.sae.architecture, "quality": found.metadata.get("quality") or {}},
            "warnings": warnings(found.metadata.get("quality") or {}),
        }  # fmt: skip
        title = f"Score-transfer from {self.data.source} on {self.loaded.name}"
        off = selection(source, len(chosen.latents), cfg.share, "suppressed").latents if cfg.suppressed else None
        return Scored(title, facts, chosen, source, domains, off), scorer

    def _sae(self) -> Any:
        from experiments.sae_training import SAETraining, Texts
        from experiments.saes import fitted, read_sae, trained_sae
        from experiments.signals import StopSignals

        if self.cfg.sae.path is not None:
            return fitted(read_sae(self.cfg.sae.path), self.loaded.model)
        settings = SAETraining(**{k: v for k, v in self.cfg.sae.items() if k not in ("path", "train")})
        examples = [e for e in (*self.data.source_examples, *sum(self.data.domains.values(), []))]
        texts = [f"{e.prompt}\n{e.answer}" if e.prompt else e.answer for e in examples]
        with StopSignals() as stop:
            return trained_sae(self.loaded, Texts(texts, self.loaded.tokenizer, settings.context), settings, stop)

    def _source_part(self, scorer: Scorer, made_from: dict[str, Any]) -> dict[str, np.ndarray]:
        from experiments.transfer.scoring import keep_part, kept_part

        file = self.path / "parts" / "source.safetensors"
        if (kept := kept_part(file, made_from)) is not None:
            return kept[0]
        began = time.monotonic()
        part = scorer.source(self.data.source_examples)
        scorer.seconds += time.monotonic() - began
        keep_part(file, made_from, part)
        return part

    def _domain_part(
        self, scorer: Scorer, name: str, latents: dict[str, list[int]], made_from: dict[str, Any]
    ) -> tuple[dict[str, np.ndarray], Any]:
        from experiments.artefacts import digest
        from experiments.transfer.scoring import keep_part, kept_part

        # Names of domains come from data and may not be names of files.
        file = self.path / "parts" / f"domain-{digest(name)[:12]}.safetensors"
        made_from = {**made_from, "domain": name, "latents": latents}
        if (kept := kept_part(file, made_from)) is not None:
            return kept
        began = time.monotonic()
        examples = self.data.domains[name]
        part = scorer.domain(examples, latents)
        scorer.seconds += time.monotonic() - began
        texts = [query.id.partition(",")[0] for query, _, _ in scorer.pairs(examples, scorer.demos, scorer.tokens)]
        numbers = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        info = {"skipped": scorer.skipped, "clusters": [numbers[text] for text in texts],
                "shown": scorer.shown(examples, part)}  # fmt: skip
        keep_part(file, made_from, part, info)
        return part, info

    # ---------------------------------------------------------------- measured changes

    def _measured(self, scored: Any, scorer: Scorer) -> Any:
        """Each domain before, the fine-tune, each domain after; the latents that it shifted most."""
        from experiments.transfer import effects

        kinds = {effects.by_accuracy(examples) for examples in self.data.domains.values()}
        if len(kinds) > 1:
            raise DataError("Some domains have options and others have none, so their changes cannot be compared")
        before = self._values("before")
        base_T = [v.z_Td for v in scorer.capture.read(self._source_passages(scorer))]
        self._tune()
        after = self._values("after")
        accuracy = kinds == {True}
        changes = {name: _change(before[name], after[name], accuracy) for name in scored.domains}
        true = self._true_latents(scorer, base_T, len(scored.selection.latents))
        return replace(scored, changes=changes, measured="accuracy" if accuracy else "loss", true_latents=true)

    def _values(self, when: str) -> dict[str, Any]:
        from experiments.artefacts import digest
        from experiments.transfer.effects import Measured, measure
        from experiments.transfer.scoring import keep_part, kept_part

        found = {}
        made_from = {"data": self.data.digest, "when": when, "items": self.cfg.sft["items"]}
        with progress_bar(f"{when} fine-tuning", len(self.data.domains), unit="domains") as progress:
            for name, examples in self.data.domains.items():
                file = self.path / "parts" / f"{when}-{digest(name)[:12]}.safetensors"
                kept = kept_part(file, made_from)
                if kept is None:
                    value = measure(self.loaded, examples[: self.cfg.sft["items"]], self.cfg.score.context)
                    keep_part(file, made_from, asdict(value))
                found[name] = value if kept is None else Measured(**kept[0])
                progress(1)
        return found

    def _tune(self) -> None:
        """Puts the fine-tuned model in place of the untouched one; what an earlier start finished is read."""
        from experiments.run import quiet
        from experiments.transfer.effects import fine_tune
        from experiments.weights import export, open_model

        folder = self.path / "model"
        if not folder.is_dir():
            quiet()
            fine_tune(self.loaded, self.data.source_examples, self.cfg.sft, self.path / "sft", self.seed, self.device)
            export(self.loaded.model, self.loaded.tokenizer, folder)
        chat, name = self.loaded.chat, self.loaded.name
        del self.loaded.model
        gc.collect()
        self.loaded = open_model(folder, f"{name}, fine-tuned", dtype="float32", folder=folder, chat=chat)
        if not self.device["use_cpu"]:
            self.loaded.model.to("cuda")

    def _source_passages(self, scorer: Scorer) -> list[Any]:
        pairs = scorer.pairs(self.data.source_examples, scorer.source_demos, scorer.source_tokens)
        return [base for _, base, _ in pairs]

    def _true_latents(self, scorer: Scorer, base: list[Any], n: int) -> list[int]:
        from experiments.capture import Capture
        from methods.sts.scores import PairSums, select

        sums = PairSums()
        tuned = Capture(self.loaded.model, scorer.capture.layer, scorer.batch_tokens)
        passages = self._source_passages(scorer)
        for z_Td, vectors in zip(base, tuned.read(passages), strict=True):
            sums.add(scorer.features(z_Td), scorer.features(vectors.z_Td))
        return select(sums.delta_s, n).latents


def _change(before: Any, after: Any, accuracy: bool) -> dict[str, Any]:
    from experiments.transfer.effects import change
    from methods.sts.correlation import change_note

    interval = change(before, after)
    note = change_note(before.mean, after.mean, len(before.value_N)) if accuracy else ""
    bounds = {"change_low": interval.low, "change_high": interval.high}
    return {"before": before.mean, "after": after.mean, "change": interval.mean, **bounds, "note": note}
