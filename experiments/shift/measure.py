"""Teacher forcing: what two models say about every token of fixed responses, and how well each predicts a set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.shift.checkpoints import WHERE, Checkpoint
from methods.errors import ConfigError

if TYPE_CHECKING:
    from experiments.shift.texts import Text
    from experiments.weights import LoadedModel

CELLS = 2**25  # logits of one batch (128 MiB in float32); a batch has at least one row
COLUMNS = ("response", "position", "token_id", "p_base", "p_new", "dp", "dlogp", "entropy", "kl")
Advance = Callable[[int], None]


def same_vocabulary(base: LoadedModel, new: LoadedModel, names: Sequence[str]) -> None:
    """ConfigError unless both models give probabilities to the same tokens under the same ids."""
    sizes = [loaded.model.config.get_text_config().vocab_size for loaded in (base, new)]
    if sizes[0] != sizes[1] or base.tokenizer.get_vocab() != new.tokenizer.get_vocab():
        raise _other_vocabulary(names, sizes)


def same_tokens(base: LoadedModel, name: str, others: Sequence[Checkpoint]) -> None:
    """The same check on the tokenizers of folders alone, before anything is sampled."""
    from transformers import AutoTokenizer

    own = base.tokenizer.get_vocab()
    for one in others:
        try:
            found = AutoTokenizer.from_pretrained(str(one.weights), trust_remote_code=False).get_vocab()
        except (OSError, ValueError):  # no folder, or a damaged one: loading it will say what is wrong
            continue
        if found != own:
            raise _other_vocabulary((name, one.name), (len(own), len(found)))


def _other_vocabulary(names: Sequence[str], sizes: Sequence[int]) -> ConfigError:
    return ConfigError(
        "These checkpoints have different vocabularies, so their token probabilities cannot be compared",
        where=WHERE,
        got=f"{sizes[0]} tokens in {names[0]}, {sizes[1]} in {names[1]}",
        expected="checkpoints of one model family",
        fix="compare checkpoints that share a start",
    )


@torch.no_grad()
def logits(model: Any, texts: Sequence[Text]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Per text its index, its measured token ids (T,) and their logits (T, V) in float32, in order of length.

    Rows are padded on the right and batched so that a batch holds at most `CELLS` logits; only one batch exists at a
    time.
    """
    device, width = model.get_input_embeddings().weight.device, model.config.get_text_config().vocab_size
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i].ids), i))
    start = 0
    while start < len(order):
        longest = len(texts[order[start]].ids)
        rows = order[start : start + max(1, CELLS // (longest * width))]
        ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for k, i in enumerate(rows):
            ids_BT[k, : len(texts[i].ids)] = torch.tensor(texts[i].ids)
            mask_BT[k, : len(texts[i].ids)] = 1
        logits_BTV = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False).logits
        for k, i in enumerate(rows):
            at = torch.tensor(texts[i].positions, device=device)
            yield i, ids_BT[k].to(device)[at], logits_BTV[k, at - 1].float()
        del logits_BTV
        start += len(rows)


def compare(base: Any, new: Any, texts: Sequence[Text], advance: Advance) -> dict[str, np.ndarray]:
    """Every measured token under both models: arrays of `COLUMNS`, tokens in the order of the texts.

    `position` counts from 0 in the response, `entropy` is the base model's in nats, `kl` is KL(base || new) of the
    token's whole distribution.
    """
    parts: list[dict[str, np.ndarray]] = [{}] * len(texts)
    for (i, ids_T, base_TV), (_, _, new_TV) in zip(logits(base, texts), logits(new, texts), strict=True):
        log_p, log_q = base_TV.log_softmax(-1), new_TV.log_softmax(-1)
        p = log_p.exp()
        logp_base, logp_new = (x.gather(1, ids_T[:, None])[:, 0].double() for x in (log_p, log_q))
        # A token of probability 0 adds nothing, though its log is -inf.
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp(min=0)
        numbers = (logp_base.exp(), logp_new.exp(), logp_new.exp() - logp_base.exp(), logp_new - logp_base, entropy, kl)
        count = len(ids_T)
        arrays = [np.full(count, i), np.arange(count), *(x.cpu().numpy() for x in (ids_T, *numbers))]
        parts[i] = dict(zip(COLUMNS, arrays, strict=True))
        advance(1)
    return {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}


def cross_entropy(model: Any, texts: Sequence[Text], advance: Advance) -> np.ndarray:
    """Per text the sum of -log p over its measured tokens (R,)."""
    sums = np.zeros(len(texts))
    for i, ids_T, logits_TV in logits(model, texts):
        sums[i] = -float(logits_TV.log_softmax(-1).gather(1, ids_T[:, None]).double().sum())
        advance(1)
    return sums
