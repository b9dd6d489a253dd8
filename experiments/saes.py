"""An SAE for a model: trained once and cached, or read from a folder; checked against the model and measured."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.artefacts import artefact, cache_root, digest
from experiments.capture import Capture, Passage, decoder_layers, edited, padded, take
from experiments.sae_files import SAEFolder, fill_folder, read_sae
from experiments.sae_training import RECIPE, Documents, SAETraining, Trainer, split
from methods.errors import ConfigError
from methods.sts.sae import SAE, Quality

if TYPE_CHECKING:
    from experiments.signals import StopSignals
    from experiments.weights import LoadedModel

USABLE = 0.5  # FVU and dead share above which an SAE says little about the model
LOGITS = 1024  # tokens whose logits are held at once


def trained_sae(
    loaded: LoadedModel, documents: Documents, settings: SAETraining, stop: StopSignals | None = None
) -> SAEFolder:
    """The SAE of this model, these texts and settings: trained by the first call, read from the cache afterwards.

    An interrupted training goes on from its last checkpoint. Its figures on held-out texts are in
    `metadata["quality"]` (see `quality`). Raises what `Trainer.run` raises.
    """
    from experiments.progress import Progress

    settings = settings.of(loaded.model)
    key = {
        "recipe": RECIPE,
        "model": weights_digest(loaded.model),
        "texts": documents.digest(),
        "settings": {k: v for k, v in asdict(settings).items() if k != "save_every"},
    }
    work = cache_root() / "sae" / f"{digest(key)[:20]}.work"

    def build(folder: Path) -> None:
        trainer = Trainer(loaded, documents, settings, work, digest(key))
        headline = (
            f"SAE of {loaded.name}, layer {settings.layer}: {settings.latents} latents, k {settings.k}, "
            f"one step = {settings.batch} tokens"
        )
        with Progress(Path("sae") / loaded.name, headline) as progress:
            sae = trainer.run(progress, stop)
        found = quality(sae, loaded.model, documents, trainer.held_out, settings.eval_tokens)
        trained = {"steps": settings.steps, "tokens": settings.steps * settings.batch, **asdict(settings)}
        fill_folder(sae, folder, {"model_name": loaded.name, "quality": found, "training": trained})

    folder = artefact("sae", key, build)
    shutil.rmtree(work, ignore_errors=True)  # it served only to go on from
    return read_sae(folder)


def fitted(found: SAEFolder, model: Any) -> SAEFolder:
    """The SAE, on the model's device, if it fits the model. ConfigError naming what does not."""
    sae, width, layers = found.sae, int(model.config.get_text_config().hidden_size), len(decoder_layers(model))
    if sae.width != width:
        raise ConfigError(
            "The SAE does not fit the model: its width is not the size of the residual stream",
            where=str(found.path),
            got=f"width {sae.width}, model {width}",
            expected="an SAE that was trained on this model",
        )
    assert sae.layer is not None
    if sae.layer >= layers:
        raise ConfigError(
            "The SAE does not fit the model: it reads a layer that the model does not have",
            where=f"{found.path}, {found.hook}",
            got=f"layer {sae.layer} of a model with layers 0 to {layers - 1}",
            expected="an SAE that was trained on this model",
        )
    sae.to(next(model.parameters()).device)
    return found


def warnings(quality: dict[str, Any]) -> list[str]:
    """What a result has to say about an SAE that describes the model badly."""
    found = []
    for key, name in (("fvu", "share of variance left unexplained"), ("dead", "share of dead latents")):
        value = quality.get(key)
        if value is not None and not value <= USABLE:
            found.append(f"the SAE is not usable: its {name} is {value:.2f}, above {USABLE}")
    return found


def quality(sae: SAE, model: Any, documents: Documents, chosen: Sequence[int], tokens: int) -> dict[str, float]:
    """FVU, L0, dead share and loss recovered on about `tokens` tokens of the chosen documents.

    loss recovered = (CE_mean - CE_sae) / (CE_mean - CE_clean): the next-token cross-entropy with the layer's vectors
    as they are, replaced by their reconstructions, and by their mean. NaN where the mean costs nothing.
    """
    assert sae.layer is not None
    passages = list(take((p for i in chosen for p in documents.passages(i)), tokens))
    counts = Quality(sae)
    for vectors in Capture(model, sae.layer).read(passages):
        h_Ts, z_hat_Td = sae.reconstruct(vectors.z_Td.float())
        counts.add(vectors.z_Td, h_Ts, z_hat_Td)
    found = counts.metrics()
    mean_d = (counts.sum_d / counts.tokens).float()
    clean = cross_entropy(model, sae.layer, passages)
    by_sae = cross_entropy(model, sae.layer, passages, lambda z_Td: sae.reconstruct(z_Td.float())[1])
    by_mean = cross_entropy(model, sae.layer, passages, lambda z_Td: mean_d.expand_as(z_Td))
    recovered = (by_mean - by_sae) / (by_mean - clean) if by_mean > clean else math.nan
    return {**found, "loss_recovered": recovered, "ce": clean, "ce_sae": by_sae, "ce_mean": by_mean}


@torch.no_grad()
def cross_entropy(model: Any, layer: int, passages: Sequence[Passage], edit: Any = None) -> float:
    """Mean next-token cross-entropy behind the counted tokens, their vectors (T, d) at `layer` put through `edit`."""
    device = next(model.parameters()).device
    total, count, at = 0.0, 0, 0
    ordered = sorted(passages, key=lambda p: len(p.ids))
    while at < len(ordered):
        size = max(1, LOGITS // len(ordered[at].ids))
        batch, at = ordered[at : at + size], at + size
        inputs = padded([p.ids for p in batch], device)
        counted_BL = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for b, passage in enumerate(batch):
            for start, end in passage.spans:
                counted_BL[b, start:end] = True

        def change(z_BLd: Tensor, mask_BL: Tensor = counted_BL) -> Tensor:
            z_BLd = z_BLd.clone()
            if edit is not None:
                z_BLd[mask_BL] = edit(z_BLd[mask_BL]).to(z_BLd.dtype)
            return z_BLd

        with edited(model, layer, change):
            logits_BLV = model(**inputs, use_cache=False).logits
        last = torch.tensor([len(p.ids) - 1 for p in batch], device=device)
        places = torch.arange(counted_BL.shape[1], device=device)
        predicts_BL = counted_BL & (places < last[:, None])
        targets = inputs["input_ids"].roll(-1, 1)[predicts_BL]
        total += float(torch.nn.functional.cross_entropy(logits_BLV[predicts_BL].float(), targets, reduction="sum"))
        count += int(predicts_BL.sum())
    return total / count if count else math.nan


def weights_digest(model: Any) -> str:
    """Hash of all weights of a model, whatever it was loaded from."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        found.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


__all__ = ["SAETraining", "cross_entropy", "fitted", "quality", "read_sae", "split", "trained_sae", "warnings"]
