"""Training a topk SAE on the residual stream of any transformers model, streaming, resumable to the bit.

Activations come in blocks: the next `buffer` vectors of the texts, read through the model, shuffled, and passed over
`passes` times in batches. A checkpoint holds weights, Adam's moments, and where the present block began in the texts;
going on reads that block again, so no activation is ever stored and memory does not grow with the texts.

The SAE is trained on c z with c = sqrt(d) / mean |z| over the first block, which also gives the first b_dec; c is
folded in at the end. Decoder rows start as random directions of norm 1, the encoder as their transpose.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from experiments import checkpoints
from experiments.capture import Capture, Passage, context_length, decoder_layers, pieces, start_ids
from experiments.files import os_errors
from experiments.seeds import derive
from methods.errors import ConfigError, DataError, RecordError, RunError, check_range
from methods.sts.loss import project_gradient, topk_loss, unit_rows
from methods.sts.sae import SAE, refuse_not_finite

if TYPE_CHECKING:
    from experiments.progress import Progress
    from experiments.signals import StopSignals
    from experiments.weights import LoadedModel

RECIPE = 1  # part of the key of a trained SAE: raise it when the code below makes other weights from the same key
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LATENTS_OF_RATE = 2**14  # the learning rate is stated for so many latents


@dataclass(frozen=True)
class SAETraining:
    """How an SAE is trained. None follows the model: layer 2/3 deep, 8 d latents, k = d / 8.

    `batch`, `buffer`, `dead_after` and `eval_tokens` count token vectors, `context` tokens of a piece of text.
    `learning_rate` None is 2e-4 / sqrt(s / 2^14). `dtype` is that of the SAE's matrix products; weights, gradients and
    Adam's moments are float32. `held_out` is the share of the texts that is only measured on.
    """

    layer: int | None = None
    latents: int | None = None
    k: int | None = None
    steps: int = 1500
    batch: int = 1024
    buffer: int = 65536
    passes: int = 1
    learning_rate: float | None = None
    warmup: int = 100
    decay: float = 0.2
    aux: float = 1 / 32
    k_aux: int | None = None
    dead_after: int = 20_000
    context: int = 512
    held_out: float = 0.1
    eval_tokens: int = 8192
    dtype: str = "float32"
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "buffer", "passes", "context", "eval_tokens", "save_every"):
            check_range(f"sae.{name}", getattr(self, name), 1)
        for name in ("layer", "latents", "k", "k_aux"):
            if getattr(self, name) is not None:
                check_range(f"sae.{name}", getattr(self, name), 0 if name == "layer" else 1)
        for name in ("warmup", "aux", "dead_after"):
            check_range(f"sae.{name}", getattr(self, name), 0)
        check_range("sae.learning_rate", 1.0 if self.learning_rate is None else self.learning_rate, 0, above=True)
        check_range("sae.decay", self.decay, 0, 1)
        check_range("sae.held_out", self.held_out, 0, 0.9, above=True)
        if self.buffer < self.batch:
            raise ConfigError(
                "a block of vectors is smaller than a batch", where="sae.buffer", got=self.buffer, expected="sae.batch"
            )
        if self.dtype not in DTYPES:
            raise ConfigError("unknown dtype", where="sae.dtype", got=self.dtype, expected=" | ".join(DTYPES))

    def of(self, model: Any) -> SAETraining:
        """The same with everything that followed the model filled in. ConfigError if it does not fit the model."""
        from dataclasses import replace

        d = int(model.config.get_text_config().hidden_size)
        layers = len(decoder_layers(model))
        layer = max(0, round(layers * 2 / 3) - 1) if self.layer is None else self.layer
        if not layer < layers:
            expected = f"0 to {layers - 1}"
            raise ConfigError("The model has no such layer", where="sae.layer", got=layer, expected=expected)
        latents = self.latents or 8 * d
        k = self.k or max(1, d // 8)
        if k > latents:
            raise ConfigError("A topk SAE has at least k latents", where="sae.k", got=f"{k} of {latents}")
        rate = self.learning_rate or 2e-4 / math.sqrt(latents / LATENTS_OF_RATE)
        context = min(self.context, context_length(model) or self.context)
        k_aux = self.k_aux or max(1, d // 2)
        return replace(
            self, layer=layer, latents=latents, k=k, learning_rate=rate, context=context, k_aux=min(k_aux, latents)
        )


class Documents(Protocol):
    """Training material: passages of document i, and a digest of everything that determines them."""

    def __len__(self) -> int: ...
    def passages(self, i: int) -> Sequence[Passage]: ...
    def digest(self) -> str: ...


class Texts:
    """Plain texts, cut into pieces of at most `context` tokens behind the tokenizer's start token."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, context: int) -> None:
        self.texts, self.tokenizer, self.context = texts, tokenizer, context
        self.start = start_ids(tokenizer)

    def __len__(self) -> int:
        return len(self.texts)

    def passages(self, i: int) -> list[Passage]:
        # A text may be longer than the context: it is cut here, so the tokenizer's warning says nothing.
        ids = self.tokenizer(self.texts[i], add_special_tokens=False, verbose=False)["input_ids"]
        return pieces(ids, self.context, self.start)

    def digest(self) -> str:
        return _digest([*self.texts, str(self.start), str(self.context)])


class Ready:
    """Passages as they are, one a document."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._passages = passages

    def __len__(self) -> int:
        return len(self._passages)

    def passages(self, i: int) -> list[Passage]:
        return [self._passages[i]]

    def digest(self) -> str:
        return _digest([f"{list(p.ids)}{list(p.spans)}" for p in self._passages])


def _digest(parts: Sequence[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def split(documents: Documents, settings: SAETraining) -> tuple[list[int], list[int]]:
    """(training, held-out) documents. DataError if either would be empty."""
    count = len(documents)
    held = max(1, round(count * settings.held_out))
    if count < 2:
        raise DataError("An SAE needs texts to train and to measure on", got=f"{count} texts", expected="2 or more")
    order = _permutation(count, derive(settings.seed, "sae", "split"))
    return sorted(order[held:]), sorted(order[:held])


def _permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


class Stream:
    """Blocks of `buffer` residual vectors from the texts, epoch after epoch, each epoch in an order of its own.

    `cursor` (epoch, text, piece) is where the next block begins. DataError if the texts hold no tokens.
    """

    def __init__(self, capture: Capture, documents: Documents, chosen: Sequence[int], settings: SAETraining) -> None:
        self.capture, self.documents, self.chosen, self.settings = capture, documents, chosen, settings
        self.cursor = (0, 0, 0)

    def block(self, beat: Callable[[], None] = lambda: None) -> Tensor:
        """(buffer, d) float32 vectors on the model's device; moves the cursor on. `beat` is called now and then."""
        parts = []
        for vectors in self.capture.read(self._next_passages()):
            refuse_not_finite(vectors.z_Td, self.capture.layer)
            parts.append(vectors.z_Td.float())
            beat()
        return torch.cat(parts)[: self.settings.buffer]

    def _next_passages(self) -> Iterator[Passage]:
        left, (epoch, text, piece) = self.settings.buffer, self.cursor
        empty_since = 0
        while left > 0:
            order = _permutation(len(self.chosen), derive(self.settings.seed, "sae", "epoch", epoch))
            for at in range(text, len(order)):
                found = self.documents.passages(self.chosen[order[at]])
                for place in range(piece, len(found)):
                    yield found[place]
                    left -= found[place].tokens
                    if left <= 0:
                        self.cursor = (epoch, at, place + 1)
                        return
                piece = 0
                empty_since = 0 if found else empty_since + 1
                if empty_since > len(order):
                    raise DataError("The texts for the SAE are empty", got=f"{len(order)} texts without a token")
            epoch, text = epoch + 1, 0


class Trainer:
    """One training: `run` goes on from the newest checkpoint below `folder` and returns the SAE, scale folded in."""

    def __init__(
        self, loaded: LoadedModel, documents: Documents, settings: SAETraining, folder: Path, key: str = ""
    ) -> None:
        self.settings = settings = settings.of(loaded.model)
        self.folder, self.key = folder, key
        assert settings.layer is not None
        self.capture = Capture(loaded.model, settings.layer)
        train, self.held_out = split(documents, settings)
        self.stream = Stream(self.capture, documents, train, settings)
        self.per_block = (settings.buffer // settings.batch) * settings.passes  # steps
        self.step, self.began, self.scale = 0, (0, 0, 0), 1.0
        self.sae: SAE | None = None
        self.last: dict[str, float] = {}

    def run(self, progress: Progress | None = None, stop: StopSignals | None = None) -> SAE:
        """Trains to the end. KeyboardInterrupt(signal) behind a checkpoint after a stop, RunError for a NaN loss."""
        s, held, block_Nd = self.settings, None, torch.empty(0)

        def beat() -> None:
            if progress is not None:
                progress(self.step, s.steps, self.last)
            if stop is not None and stop.received is not None and self.step < s.steps:
                if self.sae is not None:
                    self._save(self.sae)
                raise KeyboardInterrupt(stop.received)

        if checkpoint := checkpoints.latest(self.folder / "checkpoints"):
            self._resume(checkpoint)
        while self.sae is None or self.step < s.steps:
            block, place = divmod(self.step, self.per_block)
            if block != held:
                block_Nd, held = self.stream.block(beat), block
            self.sae = self.sae or self._begin(block_Nd)
            self._update(self.sae, self._batch(block_Nd, place))
            self.step += 1
            if self.step % self.per_block == 0:
                self.began = self.stream.cursor
            if self.step % s.save_every == 0 and self.step < s.steps:
                self._save(self.sae)
            beat()
        return self.sae.fold_scale(self.scale).requires_grad_(False)

    def _begin(self, block_Nd: Tensor) -> SAE:
        s, d = self.settings, block_Nd.shape[1]
        if float((block_Nd - block_Nd.mean(0)).square().sum()) <= 1e-10 * float(block_Nd.square().sum()):
            raise DataError("The residual stream is all the same", where=f"layer {s.layer}", expected="different texts")
        self.scale = float(d**0.5 / block_Nd.norm(dim=1).mean())
        generator = torch.Generator().manual_seed(derive(s.seed, "sae", "weights"))
        assert s.latents is not None
        W_dec_sd = torch.randn(s.latents, d, generator=generator)
        W_dec_sd /= W_dec_sd.norm(dim=1, keepdim=True)
        return self._make(
            {
                "W_enc": W_dec_sd.T.contiguous(),
                "b_enc": torch.zeros(s.latents),
                "W_dec": W_dec_sd,
                "b_dec": (self.scale * block_Nd).mean(0).cpu(),
            }
        )

    def _make(self, tensors: dict[str, Tensor]) -> SAE:
        s, device = self.settings, next(self.capture.model.parameters()).device
        sae = SAE("topk", tensors, k=s.k, layer=s.layer).to(device).requires_grad_(True)
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=s.learning_rate or 0.0, betas=(0.9, 0.999))
        self.since_s = torch.zeros(sae.latents, dtype=torch.int64, device=device)  # tokens since it last fired
        return sae

    def _batch(self, block_Nd: Tensor, place: int) -> Tensor:
        """The batch at `place` of the block: every pass is a permutation of its own."""
        s = self.settings
        turn, at = divmod(place, s.buffer // s.batch)
        order = torch.Generator().manual_seed(derive(s.seed, "sae", "order", *self.began, turn))
        chosen = torch.randperm(len(block_Nd), generator=order)[at * s.batch : (at + 1) * s.batch]
        return block_Nd[chosen.to(block_Nd.device)] * self.scale

    def _update(self, sae: SAE, x_Td: Tensor) -> None:
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = (s.learning_rate or 0.0) * self._schedule()
        assert s.k_aux is not None
        dtype = DTYPES[s.dtype]
        with torch.autocast(x_Td.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = topk_loss(sae, x_Td, self.since_s > s.dead_after, s.k_aux)
            total = loss.fvu + s.aux * loss.aux
        if not bool(total.isfinite()):
            raise RunError(
                "The loss of the SAE is not finite",
                where=f"step {self.step}",
                got=total.item(),
                fix="lower sae.learning_rate, or train in float32",
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        project_gradient(sae)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        self.optimizer.step()
        unit_rows(sae)
        self.since_s = torch.where(loss.fired_s, 0, self.since_s + len(x_Td))
        self.last = {"loss": loss.fvu.item(), "aux": loss.aux.item()}

    def _schedule(self) -> float:
        s = self.settings
        rising = min(1.0, (self.step + 1) / s.warmup) if s.warmup else 1.0
        falling = min(1.0, (s.steps - self.step) / (s.decay * s.steps)) if s.decay else 1.0
        return min(rising, falling)

    def _save(self, sae: SAE) -> None:
        folder = self.folder / "checkpoints" / f"checkpoint-{self.step}"
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        moments = {
            name: {k: v for k, v in self.optimizer.state[p].items() if isinstance(v, Tensor)}
            for name, p in sae.named_parameters()
        }
        state = {
            "key": self.key,
            "settings": asdict(self.settings),
            "step": self.step,
            "began": list(self.began),  # the stream's cursor moves on while a block is read
            "scale": self.scale,
            "weights": {name: p.detach() for name, p in sae.named_parameters()},
            "moments": moments,
            "since": self.since_s,
        }
        checkpoints.seal(folder, state, keep=1)

    def _resume(self, checkpoint: Path) -> None:
        state = checkpoints.read_state(checkpoint)
        if state["key"] != self.key or state["settings"] != asdict(self.settings):
            raise RecordError(
                "This checkpoint is of another SAE",
                where=str(checkpoint),
                expected="the same model, texts and settings",
                fix=f"delete {checkpoint.parent}, or give another folder",
            )
        self.step, self.scale = state["step"], state["scale"]
        self.began = self.stream.cursor = tuple(state["began"])  # the block in which it stopped is read again
        self.sae = sae = self._make(state["weights"])
        for name, p in sae.named_parameters():
            moments = {k: v if k == "step" else v.to(p.device) for k, v in state["moments"][name].items()}
            self.optimizer.state[p] = moments
        self.since_s = state["since"].to(self.since_s.device)
