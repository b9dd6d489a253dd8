"""Engine on vLLM's offline `LLM` (written for 0.31): prefix caching, guided JSON, continuous batching."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.engines.base import TOO_LONG, BaseEngine, Request, Result, Usage, encode, failed
from experiments.seeds import derive
from methods.errors import ConfigError


class VllmEngine(BaseEngine):
    """Completions of `model`, a folder or hub id, from vLLM in this process. Loaded at the first request.

    chat: wrap plain prompts into a user message. logprobs: return them with each result. chunk_size: requests handed
    over at once; finished answers reach the cache after each chunk. enable_prefix_caching: keep the keys and values of
    shared prompt beginnings. extra: more arguments of `vllm.LLM`. Prompts are tokenised here, so vLLM gets token ids.

    Raises ConfigError if vLLM is not installed or does not know the model. A prompt that fills the context, or a schema
    that vLLM refuses, gives an error result for that request.
    """

    name = "vllm"
    needs = "folder"

    def __init__(
        self,
        model: str | None = None,
        *,
        chat: bool = True,
        logprobs: bool = False,
        chunk_size: int = 1024,
        dtype: str = "auto",
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        seed: int = 0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not model:
            raise ConfigError(
                "The engine needs a model", where="engine.model", got=model, expected="a folder or a hub id"
            )
        self.model, self.chat, self.logprobs, self.chunk_size = str(model), chat, logprobs, chunk_size
        options = {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_prefix_caching": enable_prefix_caching,
            "seed": seed,
            **(extra or {}),
        }
        self.options = {name: value for name, value in options.items() if value is not None}
        self._vllm = _import_vllm()
        self._llm: Any = None

    def identity(self) -> dict[str, Any]:
        """The model by name: a folder whose weights change must change its name, or use a fresh cache."""
        kept = {name: value for name, value in self.options.items() if name != "gpu_memory_utilization"}
        return {"engine": self.name, "version": self._vllm.__version__, "model": self.model, "chat": self.chat,
                "logprobs": self.logprobs, "options": kept}  # fmt: skip

    @property
    def tokenizer(self) -> Any:
        return self._live().get_tokenizer()

    def ends(self) -> set[int]:
        """Ids that end a completion: the tokenizer's and those of the model's generation config, which vLLM heeds."""
        found = self._live().model_config.try_get_generation_config().get("eos_token_id")
        found = found if isinstance(found, (list, tuple)) else [found]
        return {token for token in [*found, self.tokenizer.eos_token_id] if token is not None}

    def context(self) -> int:
        """Most tokens that prompt and completion have together."""
        return self._live().model_config.max_model_len

    def _live(self) -> Any:
        if self._llm is None:
            try:
                self._llm = self._vllm.LLM(self.model, **self.options)
            except (OSError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    "vLLM cannot load this model",
                    where="engine.model",
                    got=f"{self.model}: {' '.join(str(error).split())[:400]}",
                    fix="check the folder or hub id, engine.max_model_len and the memory; vLLM's own log says more",
                ) from error
        return self._llm

    def _stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Result]]]:
        tokenizer, context = self.tokenizer, self.context()
        ready: list[tuple[int, list[int], Request]] = []
        for index, request in enumerate(requests):
            ids = encode(tokenizer, request, self.chat)
            if ids and len(ids) < context:
                ready.append((index, ids, request))
                continue
            problem = f"{TOO_LONG} of {context} tokens" if ids else "the prompt is empty"
            yield index, failed(request, f"{problem} ({len(ids)} tokens)", len(ids))
        for start in range(0, len(ready), self.chunk_size):
            if self.halted:
                return
            chunk = ready[start : start + self.chunk_size]
            for (index, ids, request), answer in zip(chunk, self._chunk(chunk), strict=True):
                if isinstance(answer, str):
                    yield index, failed(request, answer, len(ids))
                else:
                    yield index, [self._result(output, len(ids)) for output in answer.outputs]

    def _chunk(self, chunk: list[tuple[int, list[int], Request]]) -> list[Any]:
        """vLLM's output per request, or the reason why it refused it."""
        prompts = [{"prompt_token_ids": ids} for _, ids, _ in chunk]
        try:
            params = [self._params(request, len(ids)) for _, ids, request in chunk]
            return self._llm.generate(prompts, params, use_tqdm=False)
        except _client_errors() as error:
            # One bad request makes vLLM refuse all of them; alone it fails alone.
            if len(chunk) == 1:
                return [f"vLLM refused the request: {error}"]
            return [answer for item in chunk for answer in self._chunk([item])]

    def _params(self, request: Request, prompt_tokens: int) -> Any:
        from vllm.sampling_params import StructuredOutputsParams  # type: ignore[import-not-found]

        guide = None if request.json_schema is None else StructuredOutputsParams(json=request.json_schema)
        return self._vllm.SamplingParams(
            n=request.n,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=0,
            seed=None if request.seed is None else derive(request.seed, "engine"),
            stop=list(request.stop) or None,
            max_tokens=min(request.max_tokens, self._llm.model_config.max_model_len - prompt_tokens),
            # 0: of the sampled token only.
            logprobs=0 if self.logprobs else None,
            structured_outputs=guide,
        )

    def _result(self, output: Any, prompt_tokens: int) -> Result:
        ids = list(output.token_ids)
        usage = Usage(prompt_tokens, len(ids))
        if output.finish_reason not in ("stop", "length"):
            return Result("", None, None, "error", usage, f"vLLM ended the request with {output.finish_reason!r}")
        logps = None
        if self.logprobs and output.logprobs is not None:
            logps = [float(at[token].logprob) for at, token in zip(output.logprobs, ids, strict=True)]
        return Result(output.text, ids, logps, output.finish_reason, usage)

    def close(self) -> None:
        # vLLM frees the accelerator when its engine is collected.
        self._llm = None
        gc.collect()


def _import_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            "The engine 'vllm' cannot be used, because vLLM does not import here",
            where="engine=vllm",
            got=error,
            fix="pip install 'assay[vllm]' on a GPU machine (on a CPU `make test-vllm` makes an environment of its "
            "own), or choose engine=transformers or engine=openai",
        ) from None


def _client_errors() -> tuple[type[Exception], ...]:
    from vllm.exceptions import VLLMClientError  # type: ignore[import-not-found]

    return (VLLMClientError, ValueError)
