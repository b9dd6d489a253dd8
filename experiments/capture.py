"""Activations of a transformers model at one decoder layer: batched, streaming, in flat memory.

The residual stream after layer i (counted from 0) is the output tensor of decoder layer i, `blocks.i.hook_resid_post`
in TransformerLens, `hidden_states[i + 1]` of transformers for every layer but the last, where transformers returns
what the final norm makes of it. A forward hook takes it and ends the forward pass there: later layers and the
vocabulary head are not computed.

The paper (arXiv 2603.02908) takes layer 25 of 28 or 32 and 31 of 42. Its released code hooks vLLM's decoder layer,
whose first output is the MLP's, before the residual sum: not what the SAE was trained on, and not offered here.

A `Passage` says which tokens count: start tokens, chat templates and demonstrations are read and left out; padding
is on the right and never counted. Tensor suffixes: B passages, L tokens of the longest, T counted tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.errors import ConfigError, DataError

WINDOW = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Passage:
    """Tokens to read; those inside `spans`, half-open and in order, count."""

    ids: Sequence[int]
    spans: Sequence[tuple[int, int]]

    @property
    def counted(self) -> list[int]:
        """The ids of the tokens that count."""
        return [token for start, end in self.spans for token in self.ids[start:end]]

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True)
class Vectors:
    """What one forward pass gives: residual vectors of the counted tokens, passage after passage.

    `row_T` says to which passage (its place among those given) a vector belongs.
    """

    z_Td: Tensor
    row_T: Tensor


class _Reached(Exception):
    pass


class Capture:
    """Reads the residual stream after decoder layer `layer` of a causal language model.

    `batch_tokens`: tokens of one forward pass, padding included. `early_stop`: end the pass at the layer.
    ConfigError for a layer that the model does not have, or a model without a list of decoder layers.
    """

    def __init__(self, model: Any, layer: int, batch_tokens: int = 4096, early_stop: bool = True) -> None:
        self.model, self.layer, self.batch_tokens, self.early_stop = model, layer, batch_tokens, early_stop
        blocks = decoder_layers(model)
        if not (isinstance(layer, int) and 0 <= layer < len(blocks)):
            raise ConfigError(
                "The model has no such decoder layer",
                where="layer",
                got=layer,
                expected=f"0 to {len(blocks) - 1}",
                fix="choose a layer at 0.6 to 0.9 of the depth, or the one for which the SAE was trained",
            )
        self.block = blocks[layer]
        self.width = int(model.config.get_text_config().hidden_size)
        self.context = context_length(model)

    def read(self, passages: Iterable[Passage]) -> Iterator[Vectors]:
        """Vectors of the passages, batch by batch; within a window of batches the shorter ones come first.

        DataError for a passage longer than the model's context.
        """
        for batch in self._batches((p,) for p in passages):
            yield self._vectors([p for (p,) in batch.items], batch.rows)

    def read_pairs(self, pairs: Iterable[tuple[Passage, Passage]]) -> Iterator[tuple[Vectors, Vectors]]:
        """(base, context) vectors of the same tokens. DataError if the counted tokens of a pair differ."""
        for batch in self._batches(pairs):
            for row, (base, context) in zip(batch.rows, batch.items, strict=True):
                if base.counted != context.counted:
                    raise DataError(
                        "The tokens to be compared without and with demonstrations are not the same",
                        where=f"pair {row}",
                        got=f"{len(base.counted)} and {len(context.counted)} tokens",
                        expected="equal token ids",
                    )
            yield tuple(self._vectors([pair[side] for pair in batch.items], batch.rows) for side in (0, 1))  # type: ignore[misc]

    def _vectors(self, passages: Sequence[Passage], rows: Sequence[int]) -> Vectors:
        hidden_BLd = self.forward([p.ids for p in passages])
        z_Td = torch.cat([hidden_BLd[b, start:end] for b, p in enumerate(passages) for start, end in p.spans])
        counts = torch.tensor([p.tokens for p in passages])
        row_T = torch.repeat_interleave(torch.tensor(rows, dtype=torch.long), counts).to(z_Td.device)
        return Vectors(z_Td, row_T)

    @torch.no_grad()
    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """(B, L, d) residual stream of sequences, padded on the right. DataError beyond the model's context."""
        longest = max(len(row) for row in ids)
        if self.context and longest > self.context:
            raise too_long(longest, self.context)
        inputs = padded(ids, next(self.model.parameters()).device)
        found: list[Tensor] = []

        def keep(module: Any, given: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            if self.early_stop:
                raise _Reached

        handle = self.block.register_forward_hook(keep)
        try:
            self.model(**inputs, use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]

    def _batches(self, items: Iterable[tuple[Passage, ...]]) -> Iterator[_Batch]:
        """Batches of at most `batch_tokens` padded tokens (always one item), sorted by length in windows."""
        numbered = enumerate(items)
        held: list[tuple[int, tuple[Passage, ...]]] = []
        while True:
            # A window holds about WINDOW batches of items, however long they are.
            tokens = sum(_length(item) for _, item in held)
            for row, item in numbered:
                _check_passages(row, item)
                held.append((row, item))
                tokens += _length(item)
                if tokens >= WINDOW * self.batch_tokens:
                    break
            if not held:
                return
            held.sort(key=lambda pair: (_length(pair[1]), pair[0]))
            yield from self._cut(held)
            held = []

    def _cut(self, held: list[tuple[int, tuple[Passage, ...]]]) -> Iterator[_Batch]:
        at = 0
        while at < len(held):
            size = 1
            # Sorted by length, so the last one is the longest.
            while at + size < len(held) and (size + 1) * _length(held[at + size][1]) <= self.batch_tokens:
                size += 1
            part = held[at : at + size]
            yield _Batch([row for row, _ in part], [item for _, item in part])
            at += size


@dataclass(frozen=True)
class _Batch:
    rows: list[int]
    items: list[tuple[Passage, ...]]


def _length(item: tuple[Passage, ...]) -> int:
    return max(len(p.ids) for p in item)


def _check_passages(row: int, item: tuple[Passage, ...]) -> None:
    for p in item:
        inside = all(0 <= start <= end <= len(p.ids) for start, end in p.spans)
        if not (inside and p.tokens):
            raise DataError(
                "A text has no tokens to average over",
                where=f"text {row}",
                got=f"tokens {list(p.spans)} of {len(p.ids)}",
                expected="at least one token",
            )


def padded(ids: Sequence[Sequence[int]], device: Any) -> dict[str, Tensor]:
    """`input_ids` (B, L) of sequences padded on the right, with an `attention_mask` where there is padding."""
    lengths = [len(row) for row in ids]
    longest = max(lengths)
    # Causal attention never looks to the right, so what stands there changes nothing; id 0 is always in range.
    found = {"input_ids": torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=device)}
    if min(lengths) < longest:  # without padding attention is faster without a mask
        mask_BL = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        found["attention_mask"] = mask_BL.long()
    return found


def too_long(length: int, context: int) -> DataError:
    """The refusal of a text that the model cannot read whole."""
    return DataError(
        "A text is longer than the model's context",
        got=f"{length} tokens",
        expected=f"at most {context}",
        fix="cut it into pieces (`pieces`), or leave it out",
    )


def pieces(ids: Sequence[int], size: int, start: Sequence[int] = ()) -> list[Passage]:
    """A long text as passages of at most `size` tokens, each behind `start` (see `start_ids`), which does not count."""
    head = len(start)
    room = size - head
    if room < 1:
        raise ConfigError("A piece of text has no room for a token", got=size, expected=f"over {head}")
    cut = [ids[at : at + room] for at in range(0, len(ids), room)]
    return [Passage([*start, *part], [(head, head + len(part))]) for part in cut]


def start_ids(tokenizer: Any) -> list[int]:
    """What stands in front of every text: the tokenizer's own start tokens, else its BOS, else its EOS.

    There is always one, because the first token of a sequence, whatever it is, takes a norm a hundred times that of
    the others in many models (an attention sink): no token of a text may stand there.
    """
    built = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    at = next((i for i in range(1, len(built)) if plain and built[i : i + len(plain)] == plain), 0)
    spare = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return built[:at] if at else [] if spare is None else [spare]


def context_length(model: Any) -> int | None:
    """Tokens that the model can read at once; None if its configuration does not say."""
    size = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(size) if size else None


def absolute_positions(model: Any) -> bool:
    """Whether the model learned a vector for every position: there a prompt in front changes features by itself."""
    names = ("wpe", "embed_positions", "position_embeddings")
    return any(
        name.rpartition(".")[2] in names and isinstance(module, torch.nn.Embedding)
        for name, module in model.named_modules()
    )


@contextmanager
def edited(model: Any, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block the residual stream (B, L, d) after decoder layer `layer` is what `edit` makes of it."""

    def change(module: Any, inputs: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = decoder_layers(model)[layer].register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def decoder_layers(model: Any) -> Any:
    """The list of decoder layers of a transformers model (also under LoRA). ConfigError if there is none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    # Where a model also has a tower for images, its decoder is the one that reads text.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for root in (decoder, model):
        for module in [] if root is None else root.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == count:
                return module
    raise ConfigError(
        "The model has no list of decoder layers to hook",
        where=type(model).__name__,
        expected=f"a list of {count} layers, as in the decoder models of transformers",
    )


def take(passages: Iterable[Passage], tokens: int) -> Iterator[Passage]:
    """Passages until `tokens` counted tokens are reached; the last one is whole."""
    for passage in passages:
        yield passage
        tokens -= passage.tokens
        if tokens <= 0:
            return
