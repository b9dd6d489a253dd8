"""Engine on a live model of this process, through `model.generate`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from experiments.engines.base import TOO_LONG, BaseEngine, Request, Result, Usage, encode, failed
from experiments.engines.sampling import pick, uniforms
from experiments.seeds import derive
from experiments.vision import model_inputs
from methods.errors import ConfigError


@dataclass(frozen=True)
class _Job:
    """One completion to sample: which request, which of its n, from which prompt, with which stream."""

    request: int
    sample: int
    ids: list[int]
    seed: int
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Setting:
    """What the rows of one batch share."""

    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]


class TransformersEngine(BaseEngine):
    """Sample from a model in this process: in batches, sorted by prompt length, left-padded, each prompt read once.

    Each completion draws from a stream of its own that depends on `Request.seed` and its number only. So it does not
    depend on what else is in the batch (up to rounding in the forward pass), torch's global generators are never
    touched, and a job that was cut off goes on with the completions it would have had. Train and eval modes and
    gradient flags are as before afterwards. A prompt that fills the model's context gives an error result; one that
    leaves less room than `max_tokens` is generated until the context is full.

    batch_size: completions generated together. chat: wrap plain prompts into a user message. device: where to put
    the inputs (None = where the model's embeddings are). logprobs: return them with each result.
    Raises ConfigError for `json_schema`, which needs an engine with guided decoding.
    """

    name = "transformers"
    needs = "model"
    processor: Any = None  # of a vision-language model
    batch_tokens: int | None = None  # no more prompt tokens together than these, padding included, but one prompt

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 256,
        chat: bool = False,
        device: str | torch.device | None = None,
        logprobs: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(
                "The batch size is too small", where="engine.batch_size", got=batch_size, expected="at least 1"
            )
        self.tokenizer = tokenizer
        self.model: Any = unwrap(model)
        self.batch_size, self.chat, self.device, self.logprobs = batch_size, chat, device, logprobs

    def identity(self) -> dict[str, Any]:
        """Holds a digest of all weights as they are now, so that a trained model never gets a stale answer."""
        return {
            "engine": self.name,
            "weights": fingerprint(self.model),
            "vocabulary": hashlib.blake2b(
                json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode(), digest_size=16
            ).hexdigest(),
            "template": getattr(self.tokenizer, "chat_template", None),
            "chat": self.chat,
            "logprobs": self.logprobs,
        }

    def _stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Result]]]:
        if any(request.json_schema is not None for request in requests):
            raise ConfigError(
                "The engine 'transformers' cannot hold a completion to a JSON schema",
                where="engine",
                expected="an engine with guided decoding",
                fix="choose engine=vllm or engine=openai",
            )
        groups: dict[_Setting, list[_Job]] = {}
        missing: dict[int, int] = {}
        done: dict[int, list[Result | None]] = {}
        for index, request in enumerate(requests):
            ids = encode(self.tokenizer, request, self.chat)
            room = self.context() - len(ids)
            if not ids or room < 1:
                problem = f"{TOO_LONG} of {self.context()} tokens" if ids else "the prompt is empty"
                yield index, failed(request, f"{problem} ({len(ids)} tokens)", len(ids))
                continue
            setting = _Setting(min(request.max_tokens, room), request.temperature, request.top_p, request.stop)
            seed = secrets.randbits(63) if request.seed is None else request.seed
            # n greedy completions are one completion.
            missing[index] = 1 if request.temperature == 0 else request.n
            done[index] = [None] * missing[index]
            groups.setdefault(setting, []).extend(
                _Job(index, sample, ids, derive(seed, "engine", sample), request.images)
                for sample in range(missing[index])
            )
        for setting, jobs in groups.items():
            jobs.sort(key=lambda job: -len(job.ids))  # longest first: what does not fit into memory fails at once
            for batch in self._batches(jobs):
                if self.halted:
                    return
                for job, result in zip(batch, self._batch(batch, setting), strict=True):
                    done[job.request][job.sample] = result
                    missing[job.request] -= 1
                    if not missing[job.request]:
                        results: Any = done.pop(job.request)
                        yield job.request, results * (requests[job.request].n // len(results))

    def _batches(self, jobs: list[_Job]) -> Iterator[list[_Job]]:
        """`jobs`, longest first, as they go through the model together."""
        start = 0
        while start < len(jobs):
            most = self.batch_size if self.batch_tokens is None else self.batch_tokens // len(jobs[start].ids)
            batch = jobs[start : start + max(1, min(most, self.batch_size))]
            yield batch
            start += len(batch)

    def context(self) -> int:
        """Most tokens that prompt and completion have together."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or 2**31

    def _batch(self, jobs: list[_Job], setting: _Setting) -> list[Result]:
        """One result per job. The only place that touches the model."""
        device = self.device or self.model.get_input_embeddings().weight.device
        eos = eos_ids(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else next(iter(eos), 0)
        width = max(len(job.ids) for job in jobs)
        ids_BT = torch.full((len(jobs), width), pad, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, job in enumerate(jobs):
            ids_BT[row, width - len(job.ids) :] = torch.tensor(job.ids)
            mask_BT[row, width - len(job.ids) :] = 1
        sampler = _Sampler([job.seed for job in jobs], setting, width, device, self.logprobs)
        stopper = _StopText(self.tokenizer, setting.stop, width, len(jobs))
        config = GenerationConfig(
            max_new_tokens=setting.max_tokens, do_sample=False, num_beams=1, use_cache=True,
            # Stated, because `generate` fills what is left open from the model's own generation_config.json. Without
            # `do_sample` the first three are not used; these values keep it from warning about them.
            temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0,
            eos_token_id=sorted(eos) or None, pad_token_id=pad, return_dict_in_generate=False,
        )  # fmt: skip
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        seen = model_inputs(self.processor, self.model, ids_BT, [job.images for job in jobs])
        if seen:  # a sampled image token would have no image
            config.suppress_tokens = [self.model.config.image_token_id]
        with inference(self.model, device):
            out_BT = self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stopper] if setting.stop else []),
                past_key_values=None if seen else self._shared_prefill(jobs, ids_BT, mask_BT, config),
                **seen,
            )
        rows = out_BT[:, width:].tolist()
        logps = sampler.logps() if self.logprobs else [None] * len(rows)
        return [
            self._result(job, row, stopper.end_B[index], eos, setting, logps[index])
            for index, (job, row) in enumerate(zip(jobs, rows, strict=True))
        ]

    def _shared_prefill(self, jobs: list[_Job], ids_BT: torch.Tensor, mask_BT: torch.Tensor, config: Any) -> Any:
        """The cache of all but the last prompt token, read once per distinct prompt; None where none repeats."""
        places: dict[tuple[int, ...], int] = {}
        owner = [places.setdefault(tuple(job.ids), len(places)) for job in jobs]
        width = ids_BT.shape[1]
        if len(places) == len(jobs) or width == 1:
            return None
        first = torch.tensor([owner.index(place) for place in range(len(places))], device=ids_BT.device)
        once = GenerationConfig(**(config.to_diff_dict() | {"max_new_tokens": 1, "return_dict_in_generate": True}))
        cache = self.model.generate(
            input_ids=ids_BT[first], attention_mask=mask_BT[first], generation_config=once
        ).past_key_values
        if not cache.is_croppable or any(cache.is_sliding):
            return None  # such layers cannot give the last token back
        cache.crop(-1)  # the last token gives the scores of the first new one
        cache.batch_select_indices(torch.tensor(owner, device=ids_BT.device))
        return cache

    def _result(
        self, job: _Job, row: list[int], stop_end: int | None, eos: set[int], setting: _Setting, logps: list | None
    ) -> Result:
        ends = [position + 1 for position, token in enumerate(row) if token in eos][:1]
        if stop_end is not None:
            ends.append(stop_end)
        end = min([*ends, setting.max_tokens, len(row)])
        ids = row[:end]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text[: _first(text, setting.stop)]
        usage = Usage(len(job.ids), len(ids))
        return Result(text, ids, logps[:end] if logps else None, "stop" if ends else "length", usage)

    def ends(self) -> set[int]:
        """Ids that end a completion."""
        return eos_ids(self.model, self.tokenizer)

    def close(self) -> None:
        self.model = None


class _Sampler(LogitsProcessor):
    """Picks each row's next token by inverting the cumulative distribution at a number drawn beforehand.

    `generate` then runs greedily on scores that leave this token only. One uniform number per row and position, all
    drawn before the loop, costs no Python per token and makes a row independent of its neighbours.
    """

    def __init__(self, seeds: list[int], setting: _Setting, width: int, device: Any, logprobs: bool) -> None:
        self.setting, self.width, self.want_logps = setting, width, logprobs
        self.logp_steps: list[torch.Tensor] = []
        if setting.temperature > 0:
            self.uniform_BT = uniforms(seeds, setting.max_tokens).to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        token_B1 = pick(scores, self._uniform(step), self.setting.temperature, self.setting.top_p)
        if self.want_logps:
            self.logp_steps.append(scores.log_softmax(-1).gather(1, token_B1))
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)

    def _uniform(self, step: int) -> torch.Tensor | None:
        # `generate` may run one step beyond the budget before it notices the end (deferred stop check on GPUs).
        step = min(step, self.setting.max_tokens - 1)
        return self.uniform_BT[:, step : step + 1] if self.setting.temperature > 0 else None

    def logps(self) -> list[list[float]]:
        return torch.cat(self.logp_steps, dim=1).tolist()


class _StopText(StoppingCriteria):
    """Ends a row when its new text holds a stop string; `end_B` is the number of new tokens that took."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], width: int, rows: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.end_B: list[int | None] = [None] * rows
        # A character takes at most four byte tokens; a few more for special tokens, which decode to nothing.
        self.window = 8 + max((len(text.encode()) for text in stop), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        start = max(self.width, input_ids.shape[1] - self.window)
        tails = self.tokenizer.batch_decode(
            input_ids[:, start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for row, tail in enumerate(tails):
            if self.end_B[row] is None and any(text in tail for text in self.stop):
                self.end_B[row] = input_ids.shape[1] - self.width
        return torch.tensor([end is not None for end in self.end_B], device=input_ids.device)


@contextlib.contextmanager
def inference(model: Any, device: Any) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module's own mode and all random generators are as before."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    model.eval()
    try:
        # no_grad, not inference_mode: buffers that a forward refreshes must stay usable in training.
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def fingerprint(model: Any) -> str:
    """Hex digest of a model's configuration and of every weight, bit for bit."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def unwrap(model: Any) -> Any:
    """The model below DDP and similar wrappers; a peft model generates by itself."""
    while not hasattr(model, "generate") and hasattr(model, "module"):
        model = model.module
    return model


def eos_ids(model: Any, tokenizer: Any) -> set[int]:
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    found = found if isinstance(found, (list, tuple)) else [found]
    return {int(token) for token in [*found, tokenizer.eos_token_id] if token is not None}


def _first(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first stop string begins, or None."""
    return min((place for place in map(text.find, stop) if place >= 0), default=None)
