"""Decoding in turns with one KV cache per row: what was read or written is never computed again.

Rows of a batch have their own lengths. A row's keys and values lie at columns 0..length-1 without holes, so text of
any length can be appended to any row (tool output, the next prompt) and only that text is computed. Rows that have
ended a turn wait behind those that still write; rows that are not asked for again are dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from experiments import lean
from experiments.engines.sampling import pick, uniforms
from experiments.engines.transformers import eos_ids, inference, unwrap

GROWTH = 64  # columns that a cache grows by
REPACK = 0.75  # rows that still write are packed together when their share of the computed ones falls below this
MASKED = -1e9  # finite: a row of padding may attend to nothing, and -inf would make it NaN


def supports(model: Any) -> bool:
    """Whether every layer of `model` is plain causal attention that takes a ready mask."""
    config = unwrap(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return kinds == {"full_attention"} and not window and config._attn_implementation in ("sdpa", "eager")


class _Layer(CacheLayerMixin):
    """Keys and values of one layer as (R, heads, columns, D); the last column takes what padding writes."""

    place: tuple[Tensor, Tensor]  # (rows, columns) of the tokens that are being computed
    view: tuple[int, int]  # rows and columns that attention reads
    columns = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.rows, key_states.shape[1], self.columns, key_states.shape[3])
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        rows, columns = self.place
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = value_states.transpose(1, 2)
        n, width = self.view
        return self.keys[:n, :, :width], self.values[:n, :, :width]

    def resize(self, columns: int) -> None:
        self.columns = columns
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            grow = (0, 0, 0, columns - self.keys.shape[2])
            self.keys = torch.nn.functional.pad(self.keys, grow)
            self.values = torch.nn.functional.pad(self.values, grow)

    def take(self, index: Tensor) -> None:
        self.rows = len(index)
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.view[1], 0

    def get_seq_length(self) -> int:
        return self.view[1]

    def get_max_length(self) -> int:
        return -1


class CachedDecoder:
    """`write` appends ids to rows and lets the model go on until an end of turn, for all rows together.

    Row i samples with numbers from `seeds[i]` alone: neither its neighbours nor the order of rows matters (up to
    rounding in the forward pass). `most` is the number of tokens that a row may sample in all. A turn ends with an
    end-of-sequence token, with one of the texts `stop`, or at its budget. `computed_tokens` counts what the model was
    run on, prompts that several rows share once.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        seeds: Sequence[int],
        most: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: tuple[str, ...] = (),
    ) -> None:
        self.model, self.tokenizer = unwrap(model), tokenizer
        self.temperature, self.top_p, self.stop = temperature, top_p, stop
        self.device = self.model.get_input_embeddings().weight.device
        vocabulary = self.model.get_input_embeddings().num_embeddings
        self.ends_V = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        self.ends_V[sorted(eos_ids(self.model, tokenizer))] = True
        whole_V, may_V = _stopping_tokens(tokenizer, stop, vocabulary)
        self.ends_V, self.may_stop_V = self.ends_V | whole_V.to(self.device), may_V.to(self.device)
        self.computed_tokens = 0
        self.layers = [_Layer() for _ in range(self.model.config.get_text_config().num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        with torch.no_grad():
            self.lean = lean.Lean(self.model) if lean.fits(self.model) else None
        self._last: dict[int, list[int]] = {}  # the id that ended each row's turn: sampled, not yet computed
        self.row_R = list(range(len(seeds)))  # rows in the order of the cache
        self.length_R = torch.zeros(len(seeds), dtype=torch.long, device=self.device)
        self.drawn_R = torch.zeros_like(self.length_R)
        self.uniform_RT = uniforms(seeds, most).to(self.device) if temperature > 0 else None

    # ---- rows and columns ----
    def _take(self, index: list[int]) -> None:
        """Keeps these slots of the cache, in this order (repeats allowed)."""
        if index == list(range(len(self.row_R))):
            return
        at = torch.tensor(index, device=self.device)
        for layer in self.layers:
            layer.take(at)
        self.row_R = [self.row_R[i] for i in index]
        self.length_R, self.drawn_R = self.length_R[at], self.drawn_R[at]
        self.uniform_RT = None if self.uniform_RT is None else self.uniform_RT[at]

    def _room(self, columns: int) -> None:
        if columns + 1 > self.layers[0].columns:
            target = -(-(columns + 1) // GROWTH) * GROWTH
            for layer in self.layers:
                layer.resize(target)

    # ---- the model ----
    def _forward(self, ids_NL: Tensor, count_N: Tensor) -> Tensor:
        """(N, V) scores after the last `count_N[i]` ids of each of the first N slots (padding on the left)."""
        n, L = ids_NL.shape
        offset_NL = torch.arange(L, device=self.device) - (L - count_N).unsqueeze(1)
        position_NL = self.length_R[:n].unsqueeze(1) + offset_NL
        width = int(position_NL.max()) + 1
        self._room(width)
        sink = self.layers[0].columns - 1
        rows = torch.arange(n, device=self.device).unsqueeze(1).expand(n, L)
        columns = torch.where(offset_NL >= 0, position_NL, sink)
        hidden = torch.arange(width, device=self.device) > position_NL.unsqueeze(-1)
        mask_N1LW = torch.zeros(hidden.shape, dtype=self.model.dtype, device=self.device)
        mask_N1LW = mask_N1LW.masked_fill_(hidden, MASKED if self.model.dtype != torch.float16 else -6e4).unsqueeze(1)
        for layer in self.layers:
            layer.place, layer.view = (rows, columns), (n, width)
        scores_NV = self._scores(ids_NL, position_NL.clamp(min=0), mask_N1LW)
        self.length_R[:n] += count_N
        self.computed_tokens += int(count_N.sum())
        return scores_NV

    def _scores(self, ids_NL: Tensor, position_NL: Tensor, mask_N1LW: Tensor) -> Tensor:
        if self.lean is not None:
            return self.lean(ids_NL, position_NL, mask_N1LW, self.layers)
        out = self.model(
            input_ids=ids_NL,
            attention_mask=mask_N1LW,
            position_ids=position_NL,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()

    def _read(self, texts: list[list[int]]) -> Tensor:
        """Appends ids to the slots in order; (N, V) scores of what comes next."""
        L = max(map(len, texts))
        ids_NL = torch.tensor([[0] * (L - len(t)) + t for t in texts], device=self.device)
        return self._forward(ids_NL, torch.tensor([len(t) for t in texts], device=self.device))

    def _read_prompts(self, prompts: list[list[int]]) -> Tensor:
        """As `_read` on an empty cache; equal prompts are computed once and copied."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        which = {prompt: i for i, prompt in enumerate(distinct)}
        index = [which[tuple(p)] for p in prompts]
        kept = self.row_R, self.drawn_R, self.uniform_RT
        for layer in self.layers:
            layer.rows = len(distinct)
        self.length_R = torch.zeros(len(distinct), dtype=torch.long, device=self.device)
        scores_NV = self._read([list(p) for p in distinct])
        at = torch.tensor(index, device=self.device)
        for layer in self.layers:
            layer.take(at)
        self.length_R = self.length_R[at]
        self.row_R, self.drawn_R, self.uniform_RT = kept
        return scores_NV[at]

    # ---- one turn of every row ----
    def write(self, appended: dict[int, list[int]], budget: dict[int, int]) -> dict[int, list[int]]:
        """The ids that each row writes after `appended[row]` (at least one id), at most `budget[row]` (at least one).

        Rows that are not named are finished. The id that ended a row's turn is computed with what is appended next.
        """
        # Nothing in the lean forward depends on the mode of a module or draws a number.
        with torch.no_grad() if self.lean else inference(self.model, self.device):
            first = not self.layers[0].is_initialized
            self._take([slot for slot, row in enumerate(self.row_R) if row in appended])
            texts = [self._last.get(row, []) + appended[row] for row in self.row_R]
            scores_NV = self._read_prompts(texts) if first else self._read(texts)
            return self._write(scores_NV, budget)

    def _write(self, scores_NV: Tensor, budget: dict[int, int]) -> dict[int, list[int]]:
        rows = list(self.row_R)
        left_R = torch.tensor([budget[row] for row in rows], device=self.device)
        out_RT = torch.zeros(len(rows), int(left_R.max()), dtype=torch.long, device=self.device)
        count_R = torch.zeros_like(left_R)  # written so far; these three keep the order of `rows`
        at_R = torch.arange(len(rows), device=self.device)  # which of `rows` each slot holds
        busy_N = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        while True:
            n = scores_NV.shape[0]
            uniform_N1 = None
            if self.uniform_RT is not None:
                uniform_N1 = self.uniform_RT[:n].gather(1, self.drawn_R[:n].unsqueeze(1))
            token_N1 = pick(scores_NV, uniform_N1, self.temperature, self.top_p)
            token_N, at = token_N1.squeeze(1), at_R[:n][busy_N]
            out_RT[at, count_R[at]] = token_N[busy_N]
            count_R[at] += 1
            self.drawn_R[:n] += busy_N
            busy_N &= ~self.ends_V[token_N] & (count_R[at_R[:n]] < left_R[at_R[:n]])
            if self.stop:
                for slot in (busy_N & self.may_stop_V[token_N]).nonzero().flatten().tolist():
                    row = at_R[slot]
                    busy_N[slot] = not self._stopped(out_RT[row, : count_R[row]].tolist())
            writing = int(busy_N.sum())
            if not writing:
                break
            if writing < REPACK * n:
                waiting = (~busy_N).nonzero().flatten().tolist()
                order = [*busy_N.nonzero().flatten().tolist(), *waiting, *range(n, len(rows))]
                self._take(order)
                at_R, token_N1 = at_R[torch.tensor(order, device=self.device)], token_N1[busy_N]
                busy_N = busy_N[busy_N]
            # Rows that wait are computed along with no token of their own: padding.
            scores_NV = self._forward(token_N1, busy_N.long())
        counts = count_R.tolist()
        written = {row: ids[:k] for row, ids, k in zip(rows, out_RT.tolist(), counts, strict=True)}
        self._last = {row: [ids[-1]] for row, ids in written.items()}
        return written

    def _stopped(self, ids: list[int]) -> bool:
        tail = self.tokenizer.decode(ids[-(8 + max(map(len, self.stop))) :], skip_special_tokens=False)
        return any(text in tail for text in self.stop)


@functools.lru_cache(maxsize=8)
def _stopping_tokens(tokenizer: Any, stop: tuple[str, ...], vocabulary: int) -> tuple[Tensor, Tensor]:
    """(V,) tokens that hold a whole stop text; (V,) tokens that can end one begun before, whose row must be looked at.

    A token that is part of a character may be either's end.
    """
    whole_V = torch.zeros(vocabulary, dtype=torch.bool)
    may_V = torch.zeros_like(whole_V)
    if stop:
        ends = tuple(text[k:] for text in stop for k in range(1, len(text)))
        tokens = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
        for token, text in enumerate(tokens):
            whole_V[token] = any(s in text for s in stop)
            may_V[token] = text.startswith(ends) or "\ufffd" in text
    return whole_V, may_V & ~whole_V
