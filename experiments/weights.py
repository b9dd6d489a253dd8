"""Folders of weights: find, read and write them. Only safetensors are read and no code of a model runs."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.artefacts import atomic_folder
from experiments.tokenizers import stop_ids
from methods.errors import ConfigError, nearest

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class LoadedModel:
    """A model in evaluation mode with its tokenizer (padding on the left, pad and eos tokens set).

    `chat`: prompts go through the chat template. `path`: the folder it was read from (None for a hub id).
    `trained_tokens`: tokens on which the warm start was trained, shared by all runs that use it. `processor`: of a
    vision-language model; it holds the tokenizer.
    """

    model: Any
    tokenizer: Any
    chat: bool
    name: str
    path: Path | None = None
    trained_tokens: int = 0
    processor: Any = None

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())


def find_init(init: str, seed: int, results_dir: str | Path = "results") -> Path:
    """The folder of weights that `model.init` means.

    `init` is a folder with weights, a run folder (its `model/` export, else its last checkpoint), or
    `experiment/arm` below `<results_dir>/raw`, where the run with the same seed is taken. ConfigError otherwise.
    """
    roots = [Path(init).expanduser(), Path(results_dir) / "raw" / init]
    for root in roots:
        for place in (root, root / f"seed{seed}"):
            last = sorted(place.glob("checkpoints/step_*"), key=_step) or sorted(place.glob("checkpoint-*"), key=_step)
            for folder in (place, place / "model", *last[-1:]):
                if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
                    return folder
    tried = ", ".join(str(r) for r in roots)
    raise ConfigError(
        "There are no weights to start from",
        where="model.init",
        got=init,
        expected=f"a run with a model/ folder or a checkpoint, or a folder of weights (looked in {tried})",
        fix="run the earlier stage first, or give the path of its run folder",
    )


def export(model: Any, processor: Any, folder: str | Path, weights: dict[str, Any] | None = None) -> Path:
    """Write a folder that transformers and vLLM can load; LoRA adapters are merged. Atomic; `model` is unchanged.

    `processor`: the tokenizer, or what holds it and the image processor. `weights`: the whole state dict of a
    model whose own is sharded.

    Give the unwrapped model. With adapters the base is read again from where it came from, on the CPU, so that
    merging needs no memory on the device and leaves no rounding in the live weights.
    """
    folder = Path(folder)
    with atomic_folder(folder) as target, quiet_unless_watched():
        if hasattr(model, "peft_config"):
            model = _merged(model)
        model.save_pretrained(target, **({} if weights is None else {"state_dict": weights}))
        processor.save_pretrained(target)
    return folder


def _merged(model: Any) -> Any:
    from tempfile import TemporaryDirectory

    live = model.get_base_model()
    with TemporaryDirectory() as adapter:
        model.save_pretrained(adapter, selected_adapters=["default"])
        merged = _read_adapter(Path(adapter), str(live.dtype).removeprefix("torch."))
    for name in ("eos_token_id", "pad_token_id"):
        setattr(merged.config, name, getattr(live.config, name))
    merged.generation_config = copy.deepcopy(live.generation_config)
    return merged


def load_weights(model: Any, folder: str | Path) -> None:
    """Puts the weights of a checkpoint (whole model or adapter) into `model`."""
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(Path(folder) / "adapter_model.safetensors"))
        return
    saved = type(model).from_pretrained(str(folder), dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())


def _read_adapter(folder: Path, dtype: str, **options: Any) -> Any:
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError("An adapter must be stored as safetensors", where=str(folder), got="no such file")
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(_read_model(base, dtype, **options), folder).merge_and_unload()


def _read_model(source: str | Path, dtype: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    sees = hasattr(AutoConfig.from_pretrained(str(source), trust_remote_code=False), "vision_config")
    return (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
        str(source), dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
    )


def open_model(
    source: str | Path,
    name: str,
    *,
    dtype: str,
    folder: Path | None,
    chat: bool | None = None,
    attn_implementation: str | None = None,
) -> LoadedModel:
    from transformers import AutoProcessor, AutoTokenizer

    if dtype not in DTYPES:
        raise ConfigError(
            f"Unknown dtype '{dtype}'", where="model.dtype", expected=", ".join(DTYPES), fix=nearest(dtype, DTYPES)
        )
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        with quiet_unless_watched():
            tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
            if folder and (folder / "adapter_config.json").is_file():
                model = _read_adapter(folder, dtype, **options)
            else:
                model = _read_model(source, dtype, **options)
            processor = None
            if hasattr(model.config, "vision_config"):
                processor = AutoProcessor.from_pretrained(str(source), trust_remote_code=False)
                tokenizer, template = processor.tokenizer, processor.chat_template
                tokenizer.chat_template = tokenizer.chat_template or template
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"The model '{name}' could not be loaded",
            where=str(source),
            got=" ".join(str(error).split())[:300],
            expected="a folder with config.json, safetensors and a tokenizer, or a hub id that can be reached",
            fix="check model.path; without a network, download it elsewhere and give the folder",
        ) from error
    tokenizer.padding_side = "left"
    loaded = LoadedModel(model.eval(), tokenizer, False, name, folder, processor=processor)
    loaded.chat = bool(tokenizer.chat_template) if chat is None else chat
    if loaded.chat and not tokenizer.chat_template:
        raise ConfigError(
            f"The tokenizer of '{name}' has no chat template", where="model.chat", got=True, fix="set model.chat=false"
        )
    _set_pad(loaded)
    return loaded


def _set_pad(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"The tokenizer of '{loaded.name}' names no end-of-sequence token", where="tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        spare = "<|finetune_right_pad_id|>"  # what Llama 3 keeps for this
        tokenizer.pad_token = spare if spare in tokenizer.get_vocab() else tokenizer.eos_token
    for config in (loaded.model.config.get_text_config(), loaded.model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    if loaded.model.generation_config.eos_token_id is None:
        loaded.model.generation_config.eos_token_id = tokenizer.eos_token_id


def set_eos(loaded: LoadedModel, token: str) -> None:
    if token not in loaded.tokenizer.get_vocab():
        raise ConfigError(
            f"'{token}' is not a token of '{loaded.name}'",
            where="model.eos_token",
            fix=nearest(token, loaded.tokenizer.get_added_vocab()),
        )
    loaded.tokenizer.eos_token = token
    stops = stop_ids(loaded)
    loaded.model.config.get_text_config().eos_token_id = loaded.tokenizer.eos_token_id
    loaded.model.generation_config.eos_token_id = sorted(stops)


def _step(folder: Path) -> int:
    digits = folder.name.replace("-", "_").rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


@contextmanager
def quiet_unless_watched() -> Iterator[None]:
    """No bars of transformers where nobody watches a terminal (they would fill a log file)."""
    from transformers.utils import logging

    hide = not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()
