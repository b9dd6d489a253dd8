"""Everything that the scores of the digit world need from one language model, measured once and cached.

For each source: which latents demonstrations shift, which ones the fine-tune shifts, and what it changes in the other
domains. For each domain: what its text excites. Scores are then arithmetic (`experiments.studies.sts_tiny`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.artefacts import artefact
from experiments.capture import Capture, Passage, edited
from experiments.models import one_thread
from experiments.sae_training import Ready, SAETraining
from experiments.saes import trained_sae
from experiments.seeds import derive
from experiments.transfer.world import COMPARED, NAMES, PLAIN, PLUS5, SOURCES, Language, all_pairs
from experiments.transfer.world_model import (
    Pretraining,
    Tuning,
    accuracies,
    answer_mask,
    fine_tune,
    load_world_model,
    source_examples,
)
from methods.sts.sae import SAE
from methods.sts.scores import FeatureSums, PairSums, select

RECIPE = 1


@dataclass(frozen=True)
class Settings:
    """Of the prototype behind the experiment (`sts_tiny`): layer 1 is the second block; queries and demonstrations
    per source, then per domain; N latents for the ablation."""

    pretraining: Pretraining = field(default_factory=Pretraining)
    tuning: Tuning = field(default_factory=Tuning)
    layer: int = 1
    latents: int = 512
    k: int = 8
    sae_vectors: int = 140_000
    sae_steps: int = 800
    queries: int = 150
    demos: int = 2
    domain_queries: int = 100
    domain_demos: int = 4
    ablated: int = 16
    sources: int = len(SOURCES)


def measured(seed: int, settings: Settings) -> dict[str, Tensor]:
    """The tensors of `Measurement` for the language model `seed`."""
    from safetensors.torch import load_file, save_file

    key = {"recipe": RECIPE, "seed": seed, "settings": asdict(settings), "torch": torch.__version__}

    def build(folder: Path) -> None:
        with one_thread(), TemporaryDirectory() as scratch:
            save_file(Measurement(seed, settings, Path(scratch)).tensors(), folder / "measured.safetensors")

    return load_file(artefact("digit_world_scores", key, build) / "measured.safetensors")


class Reader:
    """Features of world sequences: of the SAE, of another SAE, or of the residual dimensions themselves."""

    def __init__(self, model: Any, layer: int, encode: Any) -> None:
        self.capture, self.encode = Capture(model, layer), encode

    def sums(self, ids_NT: np.ndarray) -> FeatureSums:
        """Over the compared tokens of the last example of each sequence."""
        found = FeatureSums()
        for vectors in self.capture.read(passages(ids_NT)):
            found.add(self.encode(vectors.z_Td))
        return found

    def pairs(self, base_NT: np.ndarray, context_NT: np.ndarray, context: Reader | None = None) -> PairSums:
        """Of the same examples read twice; `context` reads the second time (after a fine-tune, say)."""
        found = PairSums()
        bases, others = passages(base_NT), passages(context_NT)
        batches = self.capture.read_pairs(zip(bases, others, strict=True))
        if context is not None:  # another model on sequences of the same length, so in the same batches
            batches = zip(self.capture.read(bases), context.capture.read(others), strict=True)
        for base, other in batches:
            found.add(self.encode(base.z_Td), self.encode(other.z_Td))
        return found


def passages(ids_NT: np.ndarray) -> list[Passage]:
    start = ids_NT.shape[1] - 7
    return [Passage(ids.tolist(), [(start + COMPARED.start, start + COMPARED.stop)]) for ids in ids_NT]


class Measurement:
    """One language model with its SAE, and what is measured on them."""

    def __init__(self, seed: int, settings: Settings, scratch: Path) -> None:
        self.seed, self.settings, self.scratch = seed, settings, scratch
        self.loaded = load_world_model(seed, settings.pretraining)
        self.language = Language.of(self.loaded.tokenizer)
        self.sae, self.quality = world_sae(self.loaded, self.language, seed, settings)
        self.encoders = {
            "sae": self.sae.encode,
            "untrained": untrained(self.sae, derive(seed, "digit_world", "untrained")).encode,
            "raw": lambda z_Td: z_Td,
        }

    def reader(self, kind: str = "sae", model: Any = None) -> Reader:
        return Reader(model or self.loaded.model, self.settings.layer, self.encoders[kind])

    def rng(self, *names: str | int) -> np.random.Generator:
        return np.random.default_rng(derive(self.seed, "digit_world", *names))

    def tensors(self) -> dict[str, Tensor]:
        from experiments.engines.progress import progress_bar

        before = accuracies(self.loaded.model, self.language)
        found: dict[str, list[Tensor]] = {}
        chosen = SOURCES[: self.settings.sources]
        with progress_bar(f"digit world, sources of model {self.seed}", len(chosen), unit="source") as progress:
            for source in chosen:
                for name, value in self.source(source, before).items():
                    found.setdefault(name, []).append(value)
                progress(1)
        for domain in NAMES:
            for name, value in self.domain(domain).items():
                found.setdefault(name, []).append(value)
        tensors = {name: torch.stack(values).contiguous() for name, values in found.items()}
        tensors["before"] = torch.tensor([before[name] for name in NAMES])
        tensors["quality"] = torch.tensor([self.quality[name] for name in ("fvu", "l0", "dead", "recovered")])
        return tensors

    def domain(self, domain: str) -> dict[str, Tensor]:
        """What the domain's plain questions and answers excite, and what demonstrations of it move."""
        s, rng = self.settings, self.rng("domain", domain)
        a, b = rng.integers(10, size=(2, s.domain_queries + s.domain_demos))
        rows = self.language.examples(domain, a, b, PLAIN)
        demos, queries = rows[: s.domain_demos], rows[s.domain_demos :]
        pair = self.reader().pairs(self.language.queries(queries), self.language.queries(queries, demos))
        found = {"mean": pair.base.mean_s, "square": pair.base.mean_square_s, "icl": pair.delta_s}
        found["untrained_mean"] = self.reader("untrained").sums(self.language.queries(queries)).mean_s
        raw = Reader(self.loaded.model, s.layer, torch.abs).sums(self.language.queries(queries))
        return found | {"raw_mean": raw.mean_s}

    def source(self, source: str, before: dict[str, float]) -> dict[str, Tensor]:
        """Shifts by demonstrations and by the fine-tune, accuracies after it, and what zeroing latents costs."""
        s, rng, language = self.settings, self.rng("source", source), self.language
        queries = self.source_queries(source, rng)
        alone = language.queries(queries)
        behind = language.queries(queries, source_examples(language, source, rng, s.demos))
        a, b = rng.integers(10, size=(2, s.demos))
        rule = language.queries(queries, language.examples(source, a, b, PLAIN))
        other = SOURCES[(SOURCES.index(source) + 1) % len(SOURCES)]
        foreign = language.queries(queries, language.examples(other, a, b, PLUS5))
        pair = self.reader().pairs(alone, behind)
        found = {
            "delta": pair.delta_s,
            "unaligned": pair.unaligned_s,
            "suppressed": pair.suppressed_s,
            "source_mean": pair.base.mean_s,
            "delta_foreign": self.reader().pairs(alone, foreign).delta_s,
            "delta_rule": self.reader().pairs(alone, rule).delta_s,
            "untrained_delta": self.reader("untrained").pairs(alone, behind).delta_s,
            "raw_delta": self.reader("raw").pairs(alone, behind).delta_s,
        }
        found |= self.tuned(source, alone, before)
        return found | {"ablation": self.ablation(source, found["delta"], before[source])}

    def source_queries(self, source: str, rng: np.random.Generator | None = None) -> np.ndarray:
        """The source's questions with their new answers, on which every shift is measured."""
        return source_examples(self.language, source, rng or self.rng("source", source), self.settings.queries)

    def tuned(self, source: str, alone: np.ndarray, before: dict[str, float]) -> dict[str, Tensor]:
        """After fine-tuning, mean over the repeats: shifts of the same queries, changes, what was learned."""
        s, language = self.settings, self.language
        rows: list[dict[str, Tensor]] = []
        for repeat in range(s.tuning.repeats):
            examples = source_examples(language, source, self.rng("tuning", source, repeat), s.tuning.examples)
            seed = derive(self.seed, "digit_world", "tuning", source, repeat) % 2**31
            model = fine_tune(self.loaded, language.queries(examples), seed, s.tuning, self.scratch)
            rows.append(self.effects(source, model, alone, before))
        return mean_of(rows)

    def effects(self, source: str, model: Any, alone: np.ndarray, before: dict[str, float]) -> dict[str, Tensor]:
        """What training that ended in `model` did: shifts of the source's queries, changes, what was learned."""
        after = accuracies(model, self.language)

        def shifts(kind: str) -> Tensor:
            return self.reader(kind).pairs(alone, alone, self.reader(kind, model)).delta_s

        return {
            "true_delta": shifts("sae"),
            "raw_true_delta": shifts("raw"),
            "untrained_true_delta": shifts("untrained"),
            "change": torch.tensor([after[name] - before[name] for name in NAMES]),
            "learned": torch.tensor(accuracies(model, self.language, PLUS5)[source]),
        }

    def ablation(self, source: str, delta_s: Tensor, before: float) -> Tensor:
        """(3,) accuracy on the source's plain questions: as it is, without D_N, without as many random live latents."""
        chosen = select(delta_s, self.settings.ablated).latents
        live = np.flatnonzero(self.reader().sums(self.language.queries(self._all(source))).mean_s.numpy() > 0)
        rng = self.rng("ablation", source)
        drawn = [rng.choice(live, min(len(chosen), len(live)), replace=False).tolist() for _ in range(5)]
        without = [self._accuracy_without(source, latents) for latents in (chosen, *drawn)]
        return torch.tensor([before, without[0], float(np.mean(without[1:]))])

    def _all(self, source: str) -> np.ndarray:
        return self.language.examples(source, *all_pairs(), PLAIN)

    def _accuracy_without(self, source: str, latents: Sequence[int]) -> float:
        with edited(self.loaded.model, self.settings.layer, lambda z: self.sae.ablate(z, latents)):
            return accuracies(self.loaded.model, self.language)[source]


def mean_of(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of the same tensors measured several times, the mean of each."""
    return {name: torch.stack([row[name] for row in rows]).mean(0) for name in rows[0]}


def untrained(sae: SAE, seed: int) -> SAE:
    """An SAE of the same shape and centre with random directions: a control."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    W_dec = torch.randn(sae.latents, sae.width, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(sae.latents), "W_dec": W_dec, "b_dec": sae.b_dec}
    return SAE("topk", tensors, k=sae.k, layer=sae.layer, source="an untrained SAE")


def world_sae(loaded: Any, language: Language, seed: int, settings: Settings) -> tuple[SAE, dict[str, float]]:
    """The SAE of this language model, trained once and cached; FVU, L0 and dead share on held-out documents.

    `recovered` = (loss with the mean vector - loss with the reconstruction) / (loss with the mean - loss as it is), on
    answer digits of fresh documents.
    """
    s, rng = settings, np.random.default_rng(derive(seed, "digit_world", "sae"))
    documents = language.documents(s.sae_vectors // 35, rng)
    vectors = 35 * len(documents)
    training = SAETraining(
        layer=s.layer,
        latents=s.latents,
        k=s.k,
        steps=s.sae_steps,
        buffer=min(65536, vectors // 2),
        batch=min(1024, vectors // 8),
        seed=derive(seed, "digit_world", "sae") % 2**31,
    )
    ready = Ready([Passage(ids.tolist(), [(1, len(ids))]) for ids in documents])
    found = trained_sae(loaded, ready, training)
    fresh = language.documents(300, rng)
    mean_d = torch.cat(
        [v.z_Td for v in Capture(loaded.model, s.layer).read([p for i in range(100) for p in ready.passages(i)])]
    ).mean(0)
    losses = []
    for change in (lambda z: z, lambda z: found.sae.reconstruct(z)[1], lambda z: mean_d.expand_as(z)):
        with edited(loaded.model, s.layer, change):
            losses.append(answer_loss(loaded.model, fresh))
    clean, rebuilt, ablated = losses
    return found.sae, {**found.metadata["quality"], "recovered": (ablated - rebuilt) / (ablated - clean)}


@torch.no_grad()
def answer_loss(model: Any, documents: np.ndarray) -> float:
    """Mean next-token loss on answer digits."""
    ids = torch.from_numpy(documents)
    at = torch.from_numpy(np.flatnonzero(answer_mask(documents.shape[1])))
    logits = model(input_ids=ids).logits[:, at - 1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, at].flatten()))
