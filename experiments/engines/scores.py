"""A scalar reward model behind the engine protocol: the text of an answer is the score, so that the cache serves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.engines.base import BaseEngine, Request, Result, Usage
from methods.errors import ConfigError, check_range


def as_request(prompt: str | Sequence[dict[str, str]], response: str) -> Request:
    """The conversation to be scored: the prompt with the response as its last turn."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return Request(messages=[*turns, {"role": "assistant", "content": response}], max_tokens=1, temperature=0.0)


def conversation_ids(tokenizer: Any, messages: list[dict]) -> list[int]:
    """What a reward model reads: the chat template's text; without a template the turns, joined by line breaks."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote the special ones
    return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])


class ScoreEngine(BaseEngine):
    """Scores whole conversations with a sequence classifier of one output; larger is better.

    model: a folder or hub id, or a live model, which comes with its tokenizer. What is longer than `max_length` tokens
    loses its beginning, counted in `counts`. Scores are float32, written so that reading them back gives the same
    number. Raises ConfigError for a folder that holds no such model.
    """

    name = "scores"
    needs = "nothing"

    def __init__(self, model: Any, tokenizer: Any = None, *, batch_size: int = 16, max_length: int = 4096) -> None:
        super().__init__()
        check_range("batch_size", batch_size, 1)
        check_range("max_length", max_length, 1)
        self.batch_size, self.max_length = batch_size, max_length
        self.counts: Counter[str] = Counter()
        self.model: Any
        self.model, self.tokenizer = (model, tokenizer) if tokenizer is not None else _load(model)

    def identity(self) -> dict[str, Any]:
        from experiments.engines.transformers import fingerprint

        template = getattr(self.tokenizer, "chat_template", None)
        return {"engine": self.name, "weights": fingerprint(self.model), "template": template, "max": self.max_length}

    def _ids(self, messages: list[dict]) -> list[int]:
        ids = conversation_ids(self.tokenizer, messages)
        if len(ids) > self.max_length:
            self.counts["conversation cut at its beginning"] += 1
        return ids[-self.max_length :] or [self.tokenizer.eos_token_id or 0]

    def _stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Result]]]:
        encoded = sorted(enumerate(self._ids(r.messages or []) for r in requests), key=lambda pair: -len(pair[1]))
        for start in range(0, len(encoded), self.batch_size):
            batch = encoded[start : start + self.batch_size]
            for (index, ids), score in zip(batch, self._scores([ids for _, ids in batch]), strict=True):
                yield index, [Result(repr(score), None, None, "stop", Usage(len(ids), 0))]

    def _scores(self, rows: list[list[int]]) -> list[float]:
        import torch

        from experiments.engines.transformers import inference

        width, device = max(map(len, rows)), next(self.model.parameters()).device
        pad = self.model.config.pad_token_id
        ids_BT = torch.full((len(rows), width), pad, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for place, ids in enumerate(rows):
            ids_BT[place, : len(ids)] = torch.tensor(ids)  # right: where the head looks for the last token
            mask_BT[place, : len(ids)] = 1
        with inference(self.model, device):
            out = self.model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device))
        return out.logits[:, 0].float().cpu().tolist()

    def close(self) -> None:
        self.model = None


def _load(source: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False}
    place = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model: Any = AutoModelForSequenceClassification.from_pretrained(place, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "The reward model cannot be loaded",
            where=f"reward model {source}",
            got=" ".join(str(error).split())[:200],
            expected="a folder or hub id of a sequence classifier with safetensors",
        ) from error
    if model.config.num_labels != 1:
        raise ConfigError(
            "A reward model has one output", where=f"reward model {source}", got=f"{model.config.num_labels} outputs"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return (model.cuda() if torch.cuda.is_available() else model), tokenizer
