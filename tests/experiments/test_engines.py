"""One contract over all engines, then what each does on its own: sampling, patience, the key, the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.machinery
import json
import math
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest

from experiments.engines.base import BaseEngine, Engine, Request, Result, Usage, request_key
from experiments.engines.cache import CachedEngine
from methods.errors import ConfigError, RunError

CONTEXT = 64
SYMBOLS = tuple("abcdefghij0123456789 =")
SECRET = "sk-test-4f1c9a77e2"


def fake_text(prompt: str, seed: int | None, sample: int, max_tokens: int, stop: list[str] | None) -> tuple[str, str]:
    """What both fakes answer: one character per token, a walk through the alphabet that depends on all arguments."""
    start = sum(map(ord, prompt)) + 7 * (seed or 0) + 3 * sample
    text = "".join(chr(97 + (start + 5 * i) % 26) for i in range(20))
    finish = "stop"
    if max_tokens < len(text):
        text, finish = text[:max_tokens], "length"
    cut = min((text.find(s) for s in stop or [] if s in text), default=-1)
    return (text[:cut], "stop") if cut >= 0 else (text, finish)


# ---------------------------------------------------------------- fakes


class FakeServer(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint. `plan(body, count)` may answer (status, headers, bytes) or "drop" instead."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.auth: list[str | None] = []
        self.plan = lambda body, count: None
        self.models = ["fake"]
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: object) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_GET(self) -> None:
        verdict = self.server.plan({"path": self.path}, 0)
        self.reply(*(verdict or (200, {}, json.dumps({"data": [{"id": m} for m in self.server.models]}).encode())))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.auth.append(self.headers.get("Authorization"))
            count = len(self.server.bodies)
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        try:
            verdict = self.server.plan(body, count)
            if verdict == "drop":
                self.close_connection = True
                self.connection.close()
                return
            self.reply(*(verdict or (200, {}, json.dumps(self.answer(body)).encode())))
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def answer(self, body: dict) -> dict:
        chat = self.path.endswith("/chat/completions")
        prompt = body["messages"][-1]["content"] if chat else str(body["prompt"])
        choices = []
        for sample in range(body["n"]):
            text, finish = fake_text(prompt, body.get("seed"), sample, body["max_tokens"], body.get("stop"))
            logps = {"content": [{"token": c, "logprob": -1.0} for c in text]} if body.get("logprobs") else None
            part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            if body.get("return_token_ids"):
                part["token_ids"] = [ord(letter) for letter in text]
            choices.append({"index": sample, "finish_reason": finish, "logprobs": logps, **part})
        size = sum(len((c.get("message") or {}).get("content") or c.get("text") or "") for c in choices)
        return {"choices": choices, "usage": {"prompt_tokens": len(prompt), "completion_tokens": size}}

    def reply(self, status: int, headers: dict, data: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.shutdown()
    fake.server_close()


class CharTokenizer:
    chat_template = "{{ messages }}"
    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True):
        assert add_generation_prompt and not tokenize
        return messages[-1]["content"]


def fake_vllm() -> dict[str, types.ModuleType]:
    """The part of vLLM 0.31 that the engine touches, with its signatures and its refusals."""
    vllm, sampling, errors = (types.ModuleType(n) for n in ("vllm", "vllm.sampling_params", "vllm.exceptions"))

    class VLLMClientError(Exception):
        pass

    @dataclasses.dataclass
    class StructuredOutputsParams:
        json: str | dict | None = None
        regex: str | None = None

    @dataclasses.dataclass
    class SamplingParams:
        n: int = 1
        presence_penalty: float = 0.0
        frequency_penalty: float = 0.0
        repetition_penalty: float = 1.0
        temperature: float = 1.0
        top_p: float = 1.0
        top_k: int = 0
        min_p: float = 0.0
        seed: int | None = None
        stop: str | list[str] | None = None
        stop_token_ids: list[int] | None = None
        ignore_eos: bool = False
        max_tokens: int | None = 16
        min_tokens: int = 0
        logprobs: int | None = None
        structured_outputs: StructuredOutputsParams | None = None

        def __post_init__(self):
            if self.temperature > 2.0:
                raise VLLMClientError(f"temperature must be in [0, 2], got {self.temperature}.")
            assert self.max_tokens is not None and self.max_tokens >= 1
            assert isinstance(self.top_k, int) and isinstance(self.n, int)

    class LLM:
        def __init__(self, model: str, *, tokenizer=None, dtype="auto", tensor_parallel_size=1, seed=0,
                     gpu_memory_utilization=0.92, enforce_eager=False, **kwargs):  # fmt: skip
            assert isinstance(model, str)
            assert set(kwargs) <= {"enable_prefix_caching", "max_model_len"} and None not in kwargs.values()
            self.model_config = types.SimpleNamespace(max_model_len=kwargs.get("max_model_len", 2048))
            self.calls = 0

        def get_tokenizer(self):
            return CharTokenizer()

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
            self.calls += 1
            assert len(prompts) == len(sampling_params)
            for prompt, params in zip(prompts, sampling_params, strict=True):
                guide = params.structured_outputs
                if guide is not None and guide.json.get("type") == "nonsense":
                    raise VLLMClientError("Grammar error: unknown type")
                assert len(prompt["prompt_token_ids"]) + params.max_tokens <= self.model_config.max_model_len
            return [self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

        def _one(self, ids, params):
            outputs = []
            for index in range(params.n):
                prompt = "".join(map(chr, ids))
                text, finish = fake_text(prompt, params.seed, index, params.max_tokens, params.stop)
                token_ids = tuple(ord(c) for c in text)
                logps = None
                if params.logprobs is not None:
                    logps = [{t: types.SimpleNamespace(logprob=-1.0, rank=1)} for t in token_ids]
                outputs.append(types.SimpleNamespace(index=index, text=text, token_ids=token_ids, logprobs=logps,
                                                     finish_reason=finish, stop_reason=None))  # fmt: skip
            return types.SimpleNamespace(prompt_token_ids=ids, outputs=outputs, finished=True)

    vllm.LLM, vllm.SamplingParams, vllm.__version__ = LLM, SamplingParams, "0.31.0"
    sampling.StructuredOutputsParams, errors.VLLMClientError = StructuredOutputsParams, VLLMClientError
    for module in (vllm, sampling, errors):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    return {"vllm": vllm, "vllm.sampling_params": sampling, "vllm.exceptions": errors}


@pytest.fixture(scope="session")
def tiny():
    """A random model with room for 64 tokens, and a tokenizer of one token per character."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from experiments.tokenizers import tiny_tokenizer

    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer(SYMBOLS, True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.4,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config).eval()
        model.lm_head.weight.data[: len(tokenizer) - len(SYMBOLS)] = 0.0  # special tokens are rare
    # What a published model brings along must not leak into what a request asks for.
    model.generation_config.update(repetition_penalty=1.8, temperature=0.3, top_k=3, do_sample=True)
    return model, tokenizer


REAL_VLLM = pytest.param(
    "real_vllm",
    marks=[pytest.mark.slow, pytest.mark.skipif(not find_spec("vllm"), reason="no vLLM here: make test-vllm")],
)


@pytest.fixture(scope="session")
def real_vllm(tiny, tmp_path_factory):
    """vLLM's own engine on a random model in a folder, loaded once; its kernels want heads of at least 32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from experiments.engines.vllm import VllmEngine

    model, tokenizer = tiny
    folder = tmp_path_factory.mktemp("random")
    keep = {**model.config.to_dict(), "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    other = Qwen3ForCausalLM(Qwen3Config(**keep))
    other.lm_head.weight.data[: len(tokenizer) - len(SYMBOLS)] = 0.0
    other.generation_config.update(repetition_penalty=1.8, temperature=0.3, top_k=3, do_sample=True)
    other.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = {"max_model_len": CONTEXT, "dtype": "float32", "gpu_memory_utilization": 0.1}
    engine = VllmEngine(str(folder), extra={"enforce_eager": True}, **options)
    loaded = engine._live()

    def build(**more):
        made = VllmEngine(str(folder), chunk_size=3, **{"chat": False, **options, **more})
        made._llm = loaded
        return made

    yield build
    engine.close()


@pytest.fixture(params=["transformers", "openai", "vllm", REAL_VLLM])
def make(request, monkeypatch):
    """A function that makes an engine of one kind, whose context is `CONTEXT` tokens."""
    if request.param == "real_vllm":
        return request.getfixturevalue("real_vllm")
    if request.param == "transformers":
        from experiments.engines.transformers import TransformersEngine

        model, tokenizer = request.getfixturevalue("tiny")
        return lambda **more: TransformersEngine(model, tokenizer, batch_size=3, **more)
    if request.param == "vllm":
        for name, module in fake_vllm().items():
            monkeypatch.setitem(sys.modules, name, module)
        from experiments.engines.vllm import VllmEngine

        return lambda **more: VllmEngine("folder", max_model_len=CONTEXT, chunk_size=3, **{"chat": False, **more})
    fake = request.getfixturevalue("server")

    def refuse_long(body: dict, count: int):
        text = body["prompt"] if "prompt" in body else body.get("messages", [{"content": ""}])[-1]["content"]
        return (400, {}, b'{"error": "maximum context length is 64"}') if len(text) >= CONTEXT else None

    fake.plan = refuse_long
    from experiments.engines.openai import OpenAIEngine

    def build(chat: bool = False, **more):
        return OpenAIEngine(fake.url, endpoint="chat" if chat else "completions", backoff=0.01, concurrency=3, **more)

    return build


# ---------------------------------------------------------------- the contract


def test_order_does_not_depend_on_length_or_batch(make):
    prompts = ["a" * k + "=" for k in (9, 1, 30, 2, 17, 5, 3)]
    requests = [Request(prompt=p, temperature=0, max_tokens=4) for p in prompts]
    with make() as engine:
        assert isinstance(engine, Engine)
        together = engine.generate(requests)
        alone = [engine.generate([request])[0] for request in requests]
        assert [r[0].text for r in together] == [r[0].text for r in alone]
        assert [r[0].usage.prompt_tokens for r in together] == [len(p) for p in prompts]
        assert len({r[0].text for r in together}) > 1
        assert engine.generate([]) == []


def test_n_and_seeds(make):
    ask = Request(prompt="ab=", n=4, max_tokens=12, seed=1)
    with make() as engine:
        first, other, again = engine.generate([ask, dataclasses.replace(ask, seed=2), ask])
        assert len(first) == 4 and len({r.text for r in first}) > 1
        assert first == again == engine.generate([ask])[0]
        assert [r.text for r in first] != [r.text for r in other]


def test_max_tokens_and_usage(make):
    done = []
    with make() as engine:
        requests = [Request(prompt="0123", n=2, max_tokens=k, seed=3) for k in (1, 5)]
        results = engine.generate(requests, done.append)
        assert sum(done) == 2
        for request, pair in zip(requests, results, strict=True):
            for result in pair:
                assert result.usage == Usage(4, request.max_tokens)
                assert result.finish == "length" and result.error is None
                assert result.ids is None or len(result.ids) == request.max_tokens
        cost = engine.cost()
        assert (cost["requests"], cost["errors"], cost["prompt_tokens"], cost["completion_tokens"]) == (2, 0, 8, 12)


def test_stop_strings_end_the_text(make):
    with make() as engine:
        ask = Request(prompt="cab", max_tokens=12, seed=5)
        whole = engine.generate([ask])[0][0].text
        for stop in (whole[4], whole[3:6]):
            cut = engine.generate([dataclasses.replace(ask, stop=("never there", stop))])[0][0]
            assert cut.text == whole[: whole.index(stop)]
            assert cut.finish == "stop"


def test_one_bad_request_does_not_hurt_the_others(make):
    good = Request(prompt="ab", max_tokens=3, temperature=0)
    bad = Request(prompt="a" * (CONTEXT + 5), n=2, max_tokens=3, temperature=0)
    with make() as engine:
        first, middle, last = engine.generate([good, bad, good])
        assert first == last and first[0].finish != "error"
        assert [r.finish for r in middle] == ["error", "error"]
        assert "context" in middle[0].error and middle[0].text == ""
        assert engine.cost()["errors"] == 1


def test_logprobs_are_one_per_token(make):
    with make(logprobs=True) as engine:
        result = engine.generate([Request(prompt="ab", max_tokens=4, seed=0)])[0][0]
        if engine.name == "openai":
            assert result.logprobs is None  # this fake's completions endpoint gives none
        else:
            assert len(result.logprobs) == len(result.ids) == 4
            assert all(value < 0 for value in result.logprobs)


def test_chat_wraps_plain_prompts(make):
    with make(chat=True) as engine:
        plain, message = engine.generate(
            [
                Request(prompt="ab=", temperature=0, max_tokens=4),
                Request(messages=[{"role": "user", "content": "ab="}], temperature=0, max_tokens=4),
            ]
        )
        assert plain == message


def test_close_twice(make):
    engine = make()
    engine.close()
    engine.close()


def test_identity_is_json_and_tells_settings_apart(make):
    one, two = make(logprobs=False).identity(), make(logprobs=True).identity()
    assert one != two
    assert request_key(one, Request(prompt="a")) == request_key(json.loads(json.dumps(one)), Request(prompt="a"))


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"prompt": "a", "prompt_ids": [1]},
        {"prompt": "a", "n": 0},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "temperature": -1.0},
        {"prompt": "a", "temperature": math.nan},
        {"prompt": "a", "top_p": 0.0},
        {"prompt": "a", "stop": ("",)},
        {"messages": []},
    ],
)
def test_impossible_requests_are_refused(bad):
    with pytest.raises(ConfigError):
        Request(**bad)


def test_every_field_of_a_request_is_in_its_key():
    base = Request(prompt="a")
    variants = [base, Request(messages=[{"role": "user", "content": "a"}]), Request(prompt_ids=[97])]
    for change in ({"n": 2}, {"max_tokens": 9}, {"temperature": 0.5}, {"top_p": 0.5}, {"stop": ("x",)}, {"seed": 0},
                   {"json_schema": {}}, {"prompt": "b"}):  # fmt: skip
        variants.append(dataclasses.replace(base, **change))
    assert len({request_key({"m": 1}, v) for v in variants}) == len(variants)
    assert request_key({"m": 1}, base) != request_key({"m": 2}, base)


# ---------------------------------------------------------------- transformers


def test_sampling_follows_the_distribution(tiny):
    import torch

    from experiments.engines.transformers import TransformersEngine

    model, tokenizer = tiny
    draws = 6000
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.6)):
        ask = Request(prompt="ab", n=draws, max_tokens=1, temperature=temperature, top_p=top_p, seed=0)
        engine = TransformersEngine(model, tokenizer, batch_size=2000)
        drawn = torch.tensor([r.ids[0] for r in engine.generate([ask])[0]])
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer("ab")["input_ids"]])).logits[0, -1]
        probs = (logits / temperature).softmax(-1)
        order = probs.argsort(descending=True)
        keep = order[: int((probs[order].cumsum(0) < top_p).sum()) + 1]
        expected = torch.zeros_like(probs).index_copy(0, keep, probs[keep])
        expected = expected / expected.sum()
        found = torch.bincount(drawn, minlength=len(probs)) / draws
        assert found[expected == 0].sum() == 0
        error = (found - expected).abs() / (expected * (1 - expected) / draws).sqrt().clamp(min=1e-4)
        assert error.max() < 4.5  # standard errors


@pytest.mark.parametrize("number, token", [(0.0, 1), (1.0, 2)])
def test_no_draw_picks_an_impossible_token(number, token):
    """The ends of the unit interval, with impossible tokens at both ends of the vocabulary."""
    import torch

    from experiments.engines.transformers import _Sampler, _Setting

    sampler = _Sampler([0], _Setting(1, 1.0, 1.0, ()), 1, "cpu", False)
    sampler.uniform_BT = torch.tensor([[number]])
    scores = sampler(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[-torch.inf, 0.3, 0.1, -torch.inf]]))
    assert scores.argmax().item() == token and torch.isfinite(scores).sum() == 1


def test_logprobs_are_those_of_the_model_whatever_the_temperature(tiny):
    import torch

    from experiments.engines.transformers import TransformersEngine

    model, tokenizer = tiny
    engine = TransformersEngine(model, tokenizer, logprobs=True)
    asks = [Request(prompt=p, max_tokens=6, temperature=t, top_p=0.9, seed=1) for p, t in (("ab", 0.5), ("abcd=", 0.5))]
    for ask, (result,) in zip(asks, engine.generate(asks), strict=True):
        prompt = tokenizer(ask.prompt)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + result.ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(result.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(result.logprobs), expected, atol=1e-5)


def test_sampled_text_does_not_depend_on_the_batch(tiny):
    from experiments.engines.transformers import TransformersEngine

    model, tokenizer = tiny
    asks = [Request(prompt="a" * k, n=3, max_tokens=8, seed=k) for k in range(1, 9)]
    wide = TransformersEngine(model, tokenizer, batch_size=64).generate(asks)
    narrow = TransformersEngine(model, tokenizer, batch_size=1).generate(asks[::-1])[::-1]
    assert wide == narrow


def test_a_batch_has_no_more_prompt_tokens_than_allowed(tiny, monkeypatch):
    from experiments.engines.transformers import TransformersEngine

    engine = TransformersEngine(*tiny, batch_size=3)
    engine.batch_tokens = 12
    sizes, batch = [], engine._batch
    monkeypatch.setattr(engine, "_batch", lambda jobs, *more: sizes.append(len(jobs)) or batch(jobs, *more))
    asks = [Request(prompt="a" * k, max_tokens=2, seed=k) for k in (20, 6, 5, 4, 3, 2, 1)]
    found = engine.generate(asks)
    assert sizes == [1, 2, 3, 1]  # 20; 6 + 5, padded 12; 4 + 3 + 2, padded 12; 1
    engine.batch_tokens = None
    assert engine.generate(asks) == found and sizes[4:] == [3, 3, 1]


def test_a_prompt_is_read_once_for_all_its_samples(tiny, monkeypatch):
    import torch

    from experiments.engines.transformers import TransformersEngine

    model, tokenizer = tiny
    widths = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    asks = [Request(prompt=p, n=5, max_tokens=4, seed=k) for k, p in enumerate(("abcd", "ab", "abcd", "fedc=a"))]
    shared = TransformersEngine(model, tokenizer, logprobs=True)
    answers = shared.generate(asks)
    hook.remove()
    assert widths[0] == (3, 6) and set(widths[1:]) == {(20, 1)}  # three different prompts, then token by token
    monkeypatch.setattr(shared, "_shared_prefill", lambda *_: None)
    for one, other in zip(answers, shared.generate(asks), strict=True):
        assert [r.ids for r in one] == [r.ids for r in other]
        assert all(torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5)
                   for a, b in zip(one, other, strict=True))  # fmt: skip


def test_the_end_token_is_kept_in_ids_but_not_in_text(tiny, monkeypatch):
    from experiments.engines.transformers import TransformersEngine

    model, tokenizer = tiny
    engine = TransformersEngine(model, tokenizer)
    ask = Request(prompt="abc", temperature=0, max_tokens=9)
    whole = engine.generate([ask])[0][0]
    end = whole.ids[3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end])
    short, other = (r[0] for r in engine.generate([ask, Request(prompt="fedcba98", temperature=0, max_tokens=9)]))
    assert short.ids == whole.ids[: whole.ids.index(end) + 1]
    assert short.finish == "stop" and short.usage.completion_tokens == len(short.ids)
    assert tokenizer.pad_token_id not in short.ids + other.ids


def test_the_model_and_the_random_state_are_left_alone(tiny):
    import numpy as np
    import torch

    from experiments.engines.transformers import TransformersEngine

    model, tokenizer = tiny
    model.train()
    model.model.layers[0].eval()
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    TransformersEngine(model, tokenizer).generate([Request(prompt="ab", max_tokens=3), Request(prompt="c", seed=1)])
    assert [m.training for m in model.modules()] == modes
    assert not frozen.requires_grad and model.lm_head.weight.requires_grad
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    model(torch.tensor([[5, 6]])).logits.sum().backward()  # no inference tensors were left behind
    model.zero_grad()
    frozen.requires_grad_(True)
    model.eval()


def test_works_on_a_wrapped_model_and_under_a_patched_forward(tiny):
    from experiments.engines.transformers import TransformersEngine

    model, tokenizer = tiny
    ask = [Request(prompt="ab", max_tokens=5, seed=1)]
    plain = TransformersEngine(model, tokenizer).generate(ask)
    calls = []
    original = model.forward

    def patched(*args, labels=None, fused_lm_head=False, **kwargs):
        calls.append(fused_lm_head)
        return original(*args, **kwargs)

    model.forward = patched
    try:
        wrapped = types.SimpleNamespace(module=model)
        assert TransformersEngine(wrapped, tokenizer).generate(ask) == plain
    finally:
        del model.forward
    assert calls and not any(calls)


def test_the_context_limits_the_budget(tiny):
    from experiments.engines.transformers import TransformersEngine

    model, tokenizer = tiny
    engine = TransformersEngine(model, tokenizer)
    full, none = engine.generate(
        [Request(prompt="a" * (CONTEXT - 3), temperature=0, max_tokens=50), Request(prompt_ids=[], max_tokens=2)]
    )
    assert len(full[0].ids) == 3 and full[0].finish == "length"
    assert none[0].finish == "error" and "empty" in none[0].error


def test_transformers_refuses_a_schema_and_names_who_can(tiny):
    from experiments.engines.transformers import TransformersEngine

    with pytest.raises(ConfigError, match=r"engine=vllm.*engine=openai"):
        TransformersEngine(*tiny).generate([Request(prompt="a", json_schema={"type": "object"})])


def test_identity_follows_the_weights(tiny):
    import torch

    from experiments.engines.transformers import TransformersEngine

    engine = TransformersEngine(*tiny)
    before = engine.identity()
    weight = engine.model.lm_head.weight
    old = weight.data[0, 0].item()
    with torch.no_grad():
        weight[0, 0] += 1e-6
    assert engine.identity() != before
    weight.data[0, 0] = old
    assert engine.identity() == before


# ---------------------------------------------------------------- openai


def endpoint(server, **more):
    from experiments.engines.openai import OpenAIEngine

    settings = {"model": "fake", "backoff": 0.01, "attempts": 4, "timeout": 2.0, "deadline": 10.0}
    return OpenAIEngine(server.url, **{**settings, **more})


BAD = {
    "429": (429, {"Retry-After": "0.05"}, b"slow down"),
    "500": (500, {}, b"oops"),
    "not json": (200, {}, b"<html>"),
    "no choices": (200, {}, b'{"choices": []}'),
    "wrong shape": (200, {}, b'{"choices": [{}]}'),
    "a list": (200, {}, b"[1]"),
    "drop": "drop",
}


@pytest.mark.parametrize("fault", BAD, ids=list(BAD))
def test_passing_faults_are_tried_again(server, fault):
    server.plan = lambda body, count: BAD[fault] if count <= 2 else None
    with endpoint(server) as engine:
        result = engine.generate([Request(prompt="ab", max_tokens=4, seed=1)])[0][0]
    assert result.finish == "length" and len(result.text) == 4
    assert len(server.bodies) == 3 and engine.cost()["retries"] == 2
    assert server.bodies[0] == server.bodies[2]


def test_retry_after_is_honoured(server):
    from email.utils import formatdate

    stamps = []

    def plan(body, count):
        stamps.append(time.monotonic())
        wait = "0.6" if count == 1 else formatdate(time.time() + 2, usegmt=True)
        return (429, {"Retry-After": wait}, b"") if count <= 2 else None

    server.plan = plan
    with endpoint(server) as engine:
        engine.generate([Request(prompt="a", max_tokens=1)])
    assert stamps[1] - stamps[0] >= 0.6
    assert stamps[2] - stamps[1] >= 0.3  # the date has whole seconds: some of the two are gone already


def test_slow_answers_time_out_and_the_deadline_holds(server):
    server.plan = lambda body, count: time.sleep(0.6)
    began = time.monotonic()
    with endpoint(server, timeout=0.1, deadline=0.5, attempts=99) as engine, pytest.raises(RunError) as error:
        engine.generate([Request(prompt="a")])
    assert time.monotonic() - began < 9  # 99 attempts would take longer
    assert "no answer within" in str(error.value)


@pytest.mark.parametrize("fault", ["429", "500", "drop"])
def test_an_endpoint_that_stays_down_is_a_run_error(server, fault):
    server.plan = lambda body, count: BAD[fault] if "path" not in body or fault != "drop" else (500, {}, b"")
    with endpoint(server) as engine, pytest.raises(RunError) as error:
        engine.generate([Request(prompt="a"), Request(prompt="b")])
    assert server.url in str(error.value) and "To fix it" in str(error.value)


def test_nothing_listens():
    from experiments.engines.openai import OpenAIEngine

    engine = OpenAIEngine("http://127.0.0.1:9/v1", "m", attempts=2, backoff=0.01)
    with pytest.raises(RunError, match=r"127\.0\.0\.1:9"):
        engine.generate([Request(prompt="a")])


def test_a_request_that_breaks_the_server_is_its_own_fault(server):
    def plan(body, count):
        poison = "messages" in body and body["messages"][0]["content"] == "poison"
        return (500, {}, b"assertion failed") if poison else None

    server.plan = plan
    with endpoint(server) as engine:
        bad, good = engine.generate([Request(prompt="poison"), Request(prompt="a")])
    assert bad[0].finish == "error" and "assertion failed" in bad[0].error
    assert good[0].finish == "stop"


def test_a_request_that_is_always_limited_does_not_stop_those_that_are_served(server):
    def plan(body, count):
        if body.get("messages", [{}])[0].get("content") == "x":
            return BAD["429"]
        return time.sleep(0.02)

    server.plan = plan
    with endpoint(server, concurrency=2, backoff=0.05, attempts=3) as engine:
        bad, *good = engine.generate([Request(prompt=p, max_tokens=1) for p in "xabcdefghijklmnopqrst"])
    assert bad[0].finish == "error" and "429" in bad[0].error
    assert {r[0].finish for r in good} == {"length"}


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_client_errors_are_not_tried_again(server, status):
    server.plan = lambda body, count: (status, {}, b"no") if body["messages"][0]["content"] == "x" else None
    with endpoint(server) as engine:
        bad, good = engine.generate([Request(prompt="x", n=3), Request(prompt="a")])
    assert [r.finish for r in bad] == ["error"] * 3 and str(status) in bad[0].error
    assert good[0].finish == "stop" and len(server.bodies) == 2


@pytest.mark.parametrize("status", [401, 404])
def test_errors_that_concern_every_request_stop_the_job(server, status):
    server.plan = lambda body, count: (status, {}, b"no")
    with endpoint(server) as engine, pytest.raises(ConfigError, match=str(status)):
        engine.generate([Request(prompt=str(i)) for i in range(50)])
    assert len(server.bodies) <= 16


def test_concurrency_is_used_and_bounded(server):
    server.plan = lambda body, count: time.sleep(0.03)
    with endpoint(server, concurrency=4) as engine:
        engine.generate([Request(prompt=str(i), max_tokens=1) for i in range(24)])
    assert server.most_busy == 4


def test_missing_choices_are_asked_for(server):
    whole = Handler.answer

    def plan(body, count):
        answer = whole(types.SimpleNamespace(path="/v1/chat/completions"), {**body, "n": 1})
        return 200, {}, json.dumps(answer).encode()

    server.plan = plan
    with endpoint(server) as engine:
        results = engine.generate([Request(prompt="a", n=3, seed=1, max_tokens=6)])[0]
    assert len(results) == 3 and len({r.text for r in results}) == 3


def test_schema_prices_and_extra_fields(server):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    with endpoint(server, prices={"prompt": 2.0, "completion": 10.0}, extra={"top_k": 0}) as engine:
        engine.generate([Request(prompt="abcd", n=2, max_tokens=5, stop=("%",), json_schema=schema, seed=2**62)])
        assert engine.cost()["usd"] == pytest.approx((4 * 2.0 + 10 * 10.0) / 1e6)
    body = server.bodies[0]
    assert body["response_format"]["json_schema"]["schema"] == schema
    assert body["top_k"] == 0 and body["stop"] == ["%"] and 0 <= body["seed"] < 2**31


def test_token_ids_are_kept_where_the_endpoint_tells_them(server):
    asked = [Request(prompt="abc", n=2, max_tokens=5, seed=0)]
    with endpoint(server, extra={"return_token_ids": True}) as engine:
        results = engine.generate(asked)[0]
        assert [r.ids for r in results] == [[ord(letter) for letter in r.text] for r in results]
        assert [r.usage.completion_tokens for r in results] == [len(r.text) for r in results]
    with endpoint(server) as engine:
        assert [r.ids for r in engine.generate(asked)[0]] == [None, None]


def test_token_shares_add_up(server):
    with endpoint(server) as engine:
        results = engine.generate([Request(prompt="a", n=3, seed=1, max_tokens=7)])[0]
    assert sum(r.usage.completion_tokens for r in results) == 21
    with endpoint(server, logprobs=True) as engine:
        results = engine.generate([Request(prompt="a", n=2, seed=1, max_tokens=7)])[0]
    assert [len(r.logprobs) for r in results] == [7, 7]


def test_the_only_model_is_found_and_several_are_named(server):
    with endpoint(server, model=None) as engine:
        engine.generate([Request(prompt="a")])
    assert server.bodies[0]["model"] == "fake"
    server.models = ["one", "two"]
    with pytest.raises(ConfigError, match="one, two"):
        endpoint(server, model=None).generate([Request(prompt="a")])


def test_works_below_a_running_loop(server):
    import asyncio

    async def notebook():
        with endpoint(server, model=None) as engine:
            return engine.generate([Request(prompt="a", max_tokens=2)])

    assert asyncio.run(notebook())[0][0].text


def test_the_key_is_sent_and_stays_secret(server, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("ASSAY_TEST_KEY", SECRET)

    def echo(body, count):
        said = f"bad request for key {SECRET}".encode()
        return {1: None, 2: (400, {}, said), 3: (500, {}, said)}.get(count, (500, {}, said))

    server.plan = echo
    engine = CachedEngine(endpoint(server, api_key_env="ASSAY_TEST_KEY", attempts=2, concurrency=1), tmp_path)
    results = engine.generate([Request(prompt="a", seed=1), Request(prompt="b", seed=1)])
    with pytest.raises(RunError) as down:
        engine.generate([Request(prompt="c", seed=1)])
    assert server.auth[0] == f"Bearer {SECRET}"
    assert results[1][0].finish == "error" and "***" in results[1][0].error
    seen = [str(results), str(down.value), repr(engine.engine), str(vars(engine.engine.service)), caplog.text]
    seen += [*capfd.readouterr(), json.dumps(engine.identity()), str(engine.cost())]
    seen += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("cached" in text for text in seen) and not any(SECRET in text for text in seen)


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key_env": SECRET},
        {"url": f"http://user:{SECRET}@host/v1"},
        {"url": f"http://host/v1?api_key={SECRET}"},
        {"url": None},
        {"url": "localhost:8000"},
        {"endpoint": "chatter"},
        {"concurrency": 0},
    ],
)
def test_settings_that_cannot_be_right_are_refused_without_repeating_a_key(settings):
    from experiments.engines.openai import OpenAIEngine

    with pytest.raises(ConfigError) as error:
        OpenAIEngine(**{"url": "http://localhost/v1", **settings})
    assert SECRET not in str(error.value)


def test_a_named_key_that_is_not_set(server, monkeypatch):
    monkeypatch.delenv("ASSAY_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="ASSAY_TEST_KEY"):
        endpoint(server, api_key_env="ASSAY_TEST_KEY").generate([Request(prompt="a")])
    assert server.auth == []


def test_prompts_that_do_not_fit_the_endpoint(server):
    with pytest.raises(ConfigError, match=r"engine\.endpoint=completions"):
        endpoint(server).generate([Request(prompt_ids=[1])])
    with pytest.raises(ConfigError, match=r"engine\.endpoint=chat"):
        endpoint(server, endpoint="completions").generate([Request(messages=[{"role": "user", "content": "a"}])])


# ---------------------------------------------------------------- vllm


def test_vllm_guides_json_and_isolates_a_bad_schema(monkeypatch):
    for name, module in fake_vllm().items():
        monkeypatch.setitem(sys.modules, name, module)
    from experiments.engines.vllm import VllmEngine

    with VllmEngine("folder") as engine:
        good = Request(prompt="a", json_schema={"type": "object"}, max_tokens=4)
        bad = Request(prompt="a", json_schema={"type": "nonsense"}, max_tokens=4)
        hot = Request(prompt="a", temperature=3.0, max_tokens=4)
        results = engine.generate([good, bad, hot, good])
        assert [r[0].finish for r in results] == ["length", "error", "error", "length"]
        assert "Grammar" in results[1][0].error and "temperature" in results[2][0].error


def test_a_model_that_vllm_does_not_know(monkeypatch):
    for name, module in fake_vllm().items():
        monkeypatch.setitem(sys.modules, name, module)
    from experiments.engines.vllm import VllmEngine

    def unknown(model, **_):
        raise ValueError(f"no such model:\n{model}")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", unknown)
    with pytest.raises(ConfigError, match=r"vLLM cannot load this model.*engine\.model.*no such model: nowhere"):
        VllmEngine("nowhere").generate([Request(prompt="a")])


@pytest.mark.slow
def test_real_vllm_holds_to_a_schema_and_reads_a_shared_beginning_once():
    pytest.importorskip("vllm", reason="no vLLM here: make test-vllm")
    from experiments.engines.base import encode
    from experiments.engines.vllm import VllmEngine
    from experiments.models import SmolLM2
    from experiments.tasks.base import Task

    folder = SmolLM2().load(Task(name="any"), 0).path
    fields = {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}}
    schema = {"type": "object", "properties": fields, "required": ["name", "age"], "additionalProperties": False}
    options = {"dtype": "float32", "max_model_len": 1024, "gpu_memory_utilization": 0.1}
    with VllmEngine(folder, extra={"enforce_eager": True}, **options) as engine:
        asks = [Request(prompt=f"Describe a person from {town}.", temperature=0, max_tokens=60, json_schema=schema)
                for town in ("Oslo", "Lima")]  # fmt: skip
        bad = Request(prompt="x", max_tokens=4, json_schema={"type": "nonsense"})
        results = engine.generate([*asks, bad])
        for result in results[:2]:
            found = json.loads(result[0].text)
            assert set(found) == {"name", "age"} and 0 <= found["age"] <= 120 and len(found["name"]) <= 12
        assert results[2][0].finish == "error" and results[2][0].error
        rules = "Answer with one word. " * 60
        cached = []
        for question in ("Is snow white?", "Is coal white?"):
            ask = Request(prompt=rules + question, temperature=0, max_tokens=4)
            ids = encode(engine.tokenizer, ask, True)
            cached.append((engine._chunk([(0, ids, ask)])[0].num_cached_tokens or 0) / len(ids))
        print(f"share of the prompt from the cache: {cached[0]:.2f}, then {cached[1]:.2f}")
        assert cached[0] < 0.2 and cached[1] > 0.7


def test_without_vllm_the_error_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    from experiments.engines.vllm import VllmEngine

    with pytest.raises(ConfigError, match="pip install"):
        VllmEngine("folder")


# ---------------------------------------------------------------- cache


class Counting(BaseEngine):
    """Counts what it is asked; fails on the prompt `bad` and dies at request number `die_at`."""

    name = "counting"

    def __init__(self, die_at: int | None = None) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.die_at = die_at

    def identity(self) -> dict:
        return {"engine": "counting"}

    def _stream(self, requests):
        for index, request in enumerate(requests):
            if len(self.asked) == self.die_at:
                raise RunError("power cut")
            self.asked.append(request.prompt)
            if request.prompt == "bad":
                yield index, [Result("", None, None, "error", Usage(), "no")] * request.n
            else:
                text = f"{request.prompt}!\ud83d"  # a lone surrogate, as a cut emoji gives
                yield index, [Result(text, [1, 2], [-0.5, -0.25], "stop", Usage(1, 2))] * request.n


ASKS = [Request(prompt=str(i), seed=0) for i in range(6)]


def test_an_interrupted_job_goes_on_where_it_was(tmp_path):
    dying = Counting(die_at=4)
    with pytest.raises(RunError, match="power cut"):
        CachedEngine(dying, tmp_path).generate(ASKS)
    rest = Counting()
    with CachedEngine(rest, tmp_path) as engine:
        results = engine.generate(ASKS)
        assert rest.asked == ["4", "5"]
        assert results == Counting().generate(ASKS)
        assert engine.cost()["cached"] == 4 and engine.cost()["requests"] == 2


def test_what_is_not_cached(tmp_path):
    asks = [Request(prompt="free"), Request(prompt="bad", seed=0), Request(prompt="greedy", temperature=0)]
    for expected in (["free", "bad", "greedy"], ["free", "bad"]):
        inner = Counting()
        with CachedEngine(inner, tmp_path) as engine:
            assert engine.generate(asks)[1][0].finish == "error"
        assert inner.asked == expected


def test_equal_requests_are_asked_once(tmp_path):
    inner, done = Counting(), []
    results = CachedEngine(inner, tmp_path).generate([ASKS[0], ASKS[1], ASKS[0]], done.append)
    assert inner.asked == ["0", "1"] and results[0] == results[2] and sum(done) == 3


def test_a_cache_cut_in_half_loses_one_answer(tmp_path):
    CachedEngine(Counting(), tmp_path).generate(ASKS)
    (shard,) = tmp_path.glob("*.jsonl")
    data = shard.read_bytes()
    shard.write_bytes(data[: -len(data.splitlines()[-1]) // 2])
    inner = Counting()
    assert CachedEngine(inner, tmp_path).generate(ASKS) == Counting().generate(ASKS)
    assert inner.asked == ["5"]


def test_a_damaged_line_is_asked_again(tmp_path):
    CachedEngine(Counting(), tmp_path).generate(ASKS)
    (shard,) = tmp_path.glob("*.jsonl")
    lines = shard.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"finish"', b'"finish:')
    shard.write_bytes(b"".join(lines))
    inner = Counting()
    assert CachedEngine(inner, tmp_path).generate(ASKS) == Counting().generate(ASKS)
    assert inner.asked == ["2"]


def test_two_writers_share_a_folder(tmp_path):
    one, two = CachedEngine(Counting(), tmp_path), CachedEngine(Counting(), tmp_path)
    threads = [threading.Thread(target=e.generate, args=(a,)) for e, a in ((one, ASKS[:4]), (two, ASKS[2:]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    inner = Counting()
    CachedEngine(inner, tmp_path).generate(ASKS)
    assert inner.asked == []


def test_the_cache_survives_kill_9(tmp_path):
    script = (
        "import os, sys\n"
        "from experiments.engines.base import BaseEngine, Request, Result, Usage\n"
        "from experiments.engines.cache import CachedEngine\n"
        "class E(BaseEngine):\n"
        "    name = 'counting'\n"
        "    def identity(self): return {'engine': 'counting'}\n"
        "    def _stream(self, requests):\n"
        "        for i, r in enumerate(requests):\n"
        "            if i == 3: os.kill(os.getpid(), 9)\n"
        "            yield i, [Result(r.prompt + '!', [1, 2], [-0.5, -0.25], 'stop', Usage(1, 2))]\n"
        f"CachedEngine(E(), {str(tmp_path)!r}).generate([Request(prompt=str(i), seed=0) for i in range(6)])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    inner = Counting()
    CachedEngine(inner, tmp_path).generate(ASKS)
    assert inner.asked == ["3", "4", "5"]


def test_a_cache_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="cache"):
        CachedEngine(Counting(), file / "below")


def test_engines_that_do_not_stream_are_cached_in_pieces(tmp_path):
    class Whole:
        name = "whole"
        calls = 0

        def generate(self, requests, progress=None):
            self.calls += 1
            if self.calls == 2:
                raise RunError("power cut")
            return [[Result("x", None, None, "stop")] for _ in requests]

        def close(self):
            pass

    asks = [Request(prompt=str(i), seed=0) for i in range(100)]
    with pytest.raises(RunError):
        CachedEngine(Whole(), tmp_path).generate(asks)
    assert sum(len(p.read_text().splitlines()) for p in tmp_path.glob("*.jsonl")) == 64
