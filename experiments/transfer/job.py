"""The work of `assay score-transfer`: an SAE, parts, measured changes, files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.capture import Capture, absolute_positions
from experiments.engines.build import instantiate
from experiments.engines.progress import progress_bar
from experiments.run import device_arguments, quiet, threads_for
from experiments.sae_training import SAETraining, Texts
from experiments.saes import fitted, read_sae, trained_sae, warnings, weights_digest
from experiments.signals import StopSignals
from experiments.tasks.base import Task, plain
from experiments.transfer import output
from experiments.transfer.data import Data, Example
from experiments.transfer.effects import Measured, by_accuracy, change, fine_tune, given_changes, measure
from experiments.transfer.output import Scored
from experiments.transfer.scoring import Scorer, keep_part, kept_part, part_file, selection
from methods.sts.correlation import change_note
from methods.sts.scores import PairSums, select

if TYPE_CHECKING:
    from omegaconf import DictConfig

OF_OUTPUT = ("batch_tokens", "rank", "suppressed")  # keys that change no part
RECIPE = 3  # of parts: raise it when the code makes others from the same key


class Job:
    """The work of one record: `work` gives its metrics and costs, and leaves its files in `path`."""

    def __init__(self, cfg: DictConfig, data: Data, path: Path) -> None:
        self.cfg, self.data, self.path = cfg, data, path
        self.seed = int(cfg.seed)

    def work(self) -> tuple[dict[str, float], dict[str, float]]:
        quiet()
        began, cfg = time.monotonic(), self.cfg
        given = given_changes(cfg.changes, list(self.data.domains)) if cfg.changes else None  # before the long part
        model = instantiate(self.cfg.model)
        self.loaded = model.load(Task(name="score_transfer"), self.seed, results_dir=self.cfg.results_dir)
        self._place()
        threads_for(self.loaded)
        scored, scorer = self._scored()
        if given is not None:
            scored = replace(scored, changes=given, measured="the given measure")
        elif self.cfg.measure:
            scored = self._measured(scored, scorer)
        output.write(self.path, scored, self.seed, cfg.score.rank, cfg.mixture.budget, cfg.extremes)
        shutil.rmtree(self.path / "sft", ignore_errors=True)  # it served only to go on from
        cost = {"forwarded_tokens": float(scorer.read), "scoring_seconds": scorer.seconds}
        return output.figures_of(self.path, cfg.score.rank), {**cost, "seconds": time.monotonic() - began}

    def _place(self) -> None:
        self.device = device_arguments(self.cfg.scale)
        if not self.device["use_cpu"]:
            self.loaded.model.to("cuda")

    # ---------------------------------------------------------------- scores

    def _scored(self) -> tuple[Any, Scorer]:
        cfg = self.cfg.score
        found = self._sae()
        scorer = Scorer(
            self.loaded, found.sae, self.seed, cfg.source_demos, cfg.source_tokens, cfg.demos, cfg.tokens, cfg.context,
            cfg.batch_tokens, cfg.longest,
        )  # fmt: skip
        self.made_from = {
            "recipe": RECIPE, "data": self.data.digest, "seed": self.seed, "model": weights_digest(self.loaded.model),
            "sae": weights_digest(found.sae), "score": {k: v for k, v in cfg.items() if k not in OF_OUTPUT},
        }  # fmt: skip
        with progress_bar(f"scores on {self.loaded.name}", 1 + len(self.data.domains), unit="domains") as progress:
            source, _ = self._part(
                {**self.made_from, "of": "source"}, lambda: (scorer.source(self.data.source_examples), None)
            )
            progress(1)
            chosen = selection(source, cfg.latents, cfg.share)
            release = selection(source, len(chosen.latents), cfg.share, "unaligned")
            latents = {"latents": chosen.latents, "release": release.latents}
            domains = {}
            for name, examples in self.data.domains.items():
                made_from = {**self.made_from, "domain": name, "latents": latents}
                domains[name] = self._part(made_from, partial(scorer.scored, examples, latents))
                progress(1)
        facts = {
            "model": self.loaded.name, "source": self.data.source, "seed": self.seed, "demos": cfg.source_demos,
            "source_tokens": int(source["tokens"][0]), "left_out": int(source["left_out"][0]),
            "alignment": "same tokens", "positions": "query and answer",
            "sae": {"name": found.path.name, "layer": found.sae.layer, "latents": found.sae.latents,
                    "architecture": found.sae.architecture, "quality": found.metadata.get("quality") or {}},
            "warnings": [*warnings(found.metadata.get("quality") or {}), *_about_positions(self.loaded.model)],
        }  # fmt: skip
        title = f"Score-transfer from {self.data.source} on {self.loaded.name}"
        off = selection(source, len(chosen.latents), cfg.share, "suppressed").latents if cfg.suppressed else None
        return Scored(title, facts, chosen, source, domains, off), scorer

    def _sae(self) -> Any:
        if self.cfg.sae.path is not None:
            return fitted(read_sae(self.cfg.sae.path), self.loaded.model)
        settings = SAETraining(**{k: v for k, v in self.cfg.sae.items() if k not in ("path", "train", "characters")})
        texts = self.data.texts(self.cfg.sae.characters)
        with StopSignals() as stop:
            return trained_sae(self.loaded, Texts(texts, self.loaded.tokenizer, settings.context), settings, stop)

    def _part(self, made_from: dict[str, Any], make: Callable[[], tuple[dict[str, np.ndarray], Any]]) -> Any:
        """(arrays, info) of one part: from the cache, or made and kept there."""
        file = part_file(made_from)
        if (kept := kept_part(file, made_from)) is not None:
            return kept
        arrays, info = make()
        keep_part(file, made_from, arrays, info)
        return arrays, info

    # ---------------------------------------------------------------- measured changes

    def _measured(self, scored: Any, scorer: Scorer) -> Any:
        """Each domain before, the fine-tune, each domain after; the latents that it shifted most."""
        base_T: list[Any] = []
        before = self._values({"when": "before"}, base_T)
        tuned = {"when": "after", "sft": plain(self.cfg.sft), "device": self.device}
        after = self._values(tuned, base_T, scorer)
        shifted, _ = self._part(
            {**self.made_from, **tuned, "of": "source"}, lambda: (self._shifted(scorer, base_T), None)
        )
        accuracy = all(by_accuracy(examples) for examples in self.data.domains.values())
        changes = {name: _change(before[name], after[name], self._chance(name)) for name in scored.domains}
        delta_s = torch.from_numpy(shifted["delta"])
        true = select(delta_s, len(scored.selection.latents)).latents if bool((delta_s > 0).any()) else None
        return replace(scored, changes=changes, measured="accuracy" if accuracy else "loss", true_latents=true)

    def _chance(self, domain: str) -> float | None:
        """Accuracy by guessing; None for a domain that is measured by loss."""
        options = [len(e.options) for e in self.data.domains[domain]]
        return float(np.mean([1 / n for n in options])) if all(options) else None

    def _values(self, when: dict[str, Any], base_T: list[Any], scorer: Scorer | None = None) -> dict[str, Measured]:
        """Every domain's items; with a `scorer` after the fine-tune, which the first value not kept asks for."""
        found, items = {}, self.cfg.sft["items"]
        with progress_bar(f"{when['when']} fine-tuning", len(self.data.domains), unit="domains") as progress:
            for name, examples in self.data.domains.items():

                def make(examples: Sequence[Example] = examples) -> tuple[dict[str, np.ndarray], Any]:
                    if scorer is not None:
                        self._tune(scorer, base_T)
                    return vars(measure(self.loaded, examples[:items], self.cfg.score.context)), None

                arrays, _ = self._part({**self.made_from, **when, "items": items, "domain": name}, make)
                found[name] = Measured(**arrays)
                progress(1)
        return found

    def _tune(self, scorer: Scorer, base_T: list[Any]) -> None:
        """Fine-tunes the model in place, once; the source's vectors before that go to `base_T`."""
        if base_T:
            return
        base_T += scorer.capture.read(self._source_passages(scorer))
        fine_tune(self.loaded, self.data.source_examples, self.cfg.sft, self.path / "sft", self.seed, self.device)
        self.loaded.model.eval()

    def _shifted(self, scorer: Scorer, base_T: list[Any]) -> dict[str, np.ndarray]:
        """The shift of every latent by the fine-tune, on the source's queries without demonstrations."""
        self._tune(scorer, base_T)
        sums = PairSums()
        capture = Capture(self.loaded.model, scorer.capture.layer, scorer.batch_tokens)
        for base, tuned in zip(base_T, capture.read(self._source_passages(scorer)), strict=True):
            keep_T = scorer.usual(base) & scorer.usual(tuned)
            sums.add(scorer.features(base.z_Td[keep_T]), scorer.features(tuned.z_Td[keep_T]))
        return {"delta": sums.delta_s.cpu().numpy()}

    def _source_passages(self, scorer: Scorer) -> list[Any]:
        pairs = scorer.pairs(self.data.source_examples, scorer.source_demos, scorer.source_tokens)
        return [base for _, base, _ in pairs]


def _about_positions(model: Any) -> list[str]:
    if not absolute_positions(model):
        return []
    return ["the model learned a vector per position, so that a prompt in front shifts features by itself"]


def _change(before: Measured, after: Measured, chance: float | None) -> dict[str, Any]:
    interval = change(before, after)
    note = "" if chance is None else change_note(before.mean, after.mean, len(before.value_N), chance)
    bounds = {"change_low": interval.low, "change_high": interval.high}
    return {"before": before.mean, "after": after.mean, "change": interval.mean, **bounds, "note": note}
