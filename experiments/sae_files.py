"""Folders that hold a sparse autoencoder: read those of SAELens and sparsify, write SAELens 6.

Only safetensors and JSON are read. A hook name says after which decoder layer the residual stream is taken;
`blocks.7.hook_resid_post`, `model.layers.7`, `layers.7` and `resid_post_layer_7` are the same place.
`blocks.7.hook_resid_pre` is the stream after layer 6.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.artefacts import atomic_folder
from experiments.files import clean
from methods.errors import DataError
from methods.sts.sae import SAE

CONFIG, WEIGHTS, SPARSIFY_WEIGHTS = "cfg.json", "sae_weights.safetensors", "sae.safetensors"
SAELENS_VERSION = "6.54.12"  # whose layout is written
KINDS = {"standard": "relu", "relu": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_PLACES = (
    (re.compile(r"blocks\.(\d+)\.hook_resid_post"), 0),
    (re.compile(r"blocks\.(\d+)\.hook_resid_pre"), -1),
    (re.compile(r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.(\d+)"), 0),
    (re.compile(r"resid_post_layer_(\d+)"), 0),
)


@dataclass(frozen=True)
class SAEFolder:
    """An SAE and what its folder says about it. `metadata`: model, context and the figures of its training."""

    sae: SAE
    hook: str
    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)


def read_sae(folder: str | Path) -> SAEFolder:
    """The SAE of a folder of SAELens (5 or 6) or sparsify. DataError for anything that cannot be used."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(
            "There is no folder with an SAE",
            where="sae",
            got=str(folder),
            expected=f"a folder with {CONFIG} and {WEIGHTS} (SAELens) or {SPARSIFY_WEIGHTS} (sparsify)",
        )
    config = _config(path)
    if (path / WEIGHTS).is_file():
        return _saelens(path, config)
    if (path / SPARSIFY_WEIGHTS).is_file():
        return _sparsify(path, config)
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise DataError(
        "A folder holds no weights of an SAE that can be read",
        where=str(path),
        got=found,
        expected=f"{WEIGHTS} or {SPARSIFY_WEIGHTS}",
        fix="only safetensors are read; convert pickles and npz files with the library that wrote them",
    )


def layer_of(hook: str, where: str = "hook_name") -> int:
    """The decoder layer (from 0) after which the hook takes the residual stream. DataError for any other hook."""
    for pattern, offset in _PLACES:
        if (match := pattern.fullmatch(hook)) and int(match[1]) + offset >= 0:
            return int(match[1]) + offset
    raise DataError(
        "This SAE does not read the residual stream after a decoder layer",
        where=where,
        got=repr(hook),
        expected="blocks.I.hook_resid_post (model.layers.I, layers.I), or blocks.I.hook_resid_pre with I of at least 1",
        fix="choose an SAE of the residual stream; those of attention heads, MLPs and transcoders are not offered",
    )


def hook_of(layer: int) -> str:
    """SAELens's name of the residual stream after a decoder layer."""
    return f"blocks.{layer}.hook_resid_post"


# ---------------------------------------------------------------- SAELens


def _saelens(path: Path, config: dict[str, Any]) -> SAEFolder:
    old = "metadata" not in config  # before version 6 everything lay side by side
    metadata = dict(config["metadata"]) if isinstance(config.get("metadata"), Mapping) else dict(config)
    hook = str(metadata.get("hook_name") or metadata.get("hook_point") or config.get("hook_name") or "")
    if metadata.get("hook_head_index") is not None:
        hook += f" (head {metadata['hook_head_index']})"
    layer = layer_of(hook, f"{path / CONFIG}, hook_name")
    tensors = _tensors(path / WEIGHTS)
    architecture, k = _architecture(path, config)
    sae = SAE(
        architecture,
        tensors,
        k=k,
        layer=layer,
        centred=bool(config.get("apply_b_dec_to_input", True)),
        normalisation=_normalisation(path, config, old),
        source=str(path),
    )
    if config.get("reshape_activations", "none") not in (None, "none"):
        raise _unusable(path, "reshape_activations", config["reshape_activations"], "none")
    if config.get("finetuning_scaling_factor"):
        raise _unusable(path, "finetuning_scaling_factor", True, "false (fold it in with SAELens first)")
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
        sae.rank_by_decoder_norm()
    _same_width(path, config, sae)
    return SAEFolder(sae, hook, path, metadata)


def _architecture(path: Path, config: dict[str, Any]) -> tuple[str, int | None]:
    kind = str(config.get("architecture") or "standard")
    activation = str(config.get("activation_fn") or config.get("activation_fn_str") or "relu")
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if kind == "standard" and activation == "topk":  # SAELens before version 6
        kind = "topk"
    if kind not in KINDS or (kind == "standard" and activation != "relu"):
        raise _unusable(path, "architecture", f"{kind} ({activation})", " | ".join(KINDS))
    return KINDS[kind], k if KINDS[kind] == "topk" else None


def _normalisation(path: Path, config: dict[str, Any], old: bool) -> str:
    how = config.get("normalize_activations", "none")
    how = {True: "expected_average_only_in", False: "none", None: "none"}.get(how, how)
    if how == "expected_average_only_in":
        print(
            f"{path}: made for activations scaled to an average norm; the scale is taken as folded into the weights",
            file=sys.stderr,
        )
        return "none"
    return str(how)


def write_sae(sae: SAE, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a folder that SAELens 6 loads: cfg.json and the tensors of the architecture. Atomic.

    `metadata` goes beside `hook_name`; the SAE must know its layer.
    """
    with atomic_folder(Path(folder)) as target:
        fill_folder(sae, target, metadata)
    return Path(folder)


def fill_folder(sae: SAE, folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """The files of `write_sae` in an existing folder."""
    from safetensors.torch import save_file

    if sae.layer is None:
        raise ValueError("an SAE without a layer has no hook name")
    config: dict[str, Any] = {
        "architecture": {"relu": "standard"}.get(sae.architecture, sae.architecture),
        "d_in": sae.width,
        "d_sae": sae.latents,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": sae.normalisation,
        "reshape_activations": "none",
        "metadata": {
            "hook_name": hook_of(sae.layer),
            "hf_hook_name": f"model.layers.{sae.layer}",
            "sae_lens_version": SAELENS_VERSION,
            **(metadata or {}),
        },
    }
    if sae.architecture == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    (folder / CONFIG).write_text(json.dumps(clean(config), indent=1) + "\n")
    save_file({name: x.detach().cpu().contiguous() for name, x in sae.named_parameters()}, folder / WEIGHTS)


# ---------------------------------------------------------------- sparsify


def _sparsify(path: Path, config: dict[str, Any]) -> SAEFolder:
    for key, fine in (("transcode", False), ("skip_connection", False)):
        if config.get(key, fine) != fine:
            raise _unusable(path, key, config[key], str(fine).lower())
    if config.get("activation", "topk") != "topk":
        raise _unusable(path, "activation", config["activation"], "topk")
    found = _tensors(path / SPARSIFY_WEIGHTS)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    if missing := [name for name in names if name not in found]:
        raise _unusable(path, "tensors", f"no {', '.join(missing)}", ", ".join(names))
    tensors = {new: found[name] for name, new in names.items()}
    if tensors["W_enc"].dim() == 2:
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    sae = SAE("topk", tensors, k=config.get("k"), layer=layer_of(path.name, str(path)), source=str(path))
    latents = config.get("num_latents") or int(config.get("d_in", 0)) * int(config.get("expansion_factor", 0))
    _same_width(path, {"d_in": config.get("d_in"), "d_sae": latents or None}, sae)
    return SAEFolder(sae, path.name, path, dict(config))


# ---------------------------------------------------------------- both


def _config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no JSON"
        raise DataError("The configuration of an SAE cannot be read", where=str(file), got=reason) from error
    if not isinstance(config, dict):
        raise DataError("The configuration of an SAE is a JSON object", where=str(file), got=type(config).__name__)
    return config


def _tensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError("The weights of an SAE cannot be read", where=str(file), got=str(error)) from error
    return {name: x.float() if x.is_floating_point() else x for name, x in found.items()}


def _same_width(path: Path, config: Mapping[str, Any], sae: SAE) -> None:
    for key, size in (("d_in", sae.width), ("d_sae", sae.latents)):
        if config.get(key) is not None and config[key] != size:
            raise _unusable(path, key, f"{config[key]}, but weights for {size}", "one size")


def _unusable(path: Path, key: str, got: object, expected: str) -> DataError:
    return DataError("An SAE cannot be used", where=f"{path / CONFIG}, {key}", got=got, expected=expected)
