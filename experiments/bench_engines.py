"""The same greedy prompts through `transformers`, `vllm` and `openai` over a vLLM server: tokens, gaps, speed.

    python -m experiments.bench_engines [FOLDER] [--tokens 32] [--prompts 1 8 64] [--dtype float32]

FOLDER holds a chat model; without it SmolLM2-135M-Instruct. Needs vLLM beside assay (on a CPU: the environment that
`make test-vllm` makes). The server is started here and stopped at the end. Where two engines write different tokens,
the two highest logits at the first difference are shown, from a forward pass of transformers over what both wrote
before: a gap of the size of rounding is a tie, which kernels that add in another order break in another way.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.engines.base import BaseEngine, Request, Result, encode
from methods.errors import AssayError, ConfigError, RunError

THINGS = ("rivers", "bridges", "bread", "the moon", "bees", "glass", "trains", "salt", "maps", "clocks", "tea", "wool",
          "paper", "rain", "chess", "violins")  # fmt: skip
ASKED = (
    "Write one sentence about {}.",
    "Name three facts about {}.",
    "Why do people like {}?",
    "Explain {} to a child.",
)


def requests(count: int, tokens: int) -> list[Request]:
    """`count` different prompts, greedy."""
    texts = [form.format(thing) for form in ASKED for thing in THINGS][:count]
    return [Request(prompt=text, temperature=0.0, max_tokens=tokens) for text in texts]


@contextlib.contextmanager
def vllm_server(folder: str | Path, *words: str, wait: float = 900.0, port: int | None = None) -> Iterator[tuple]:
    """(process, base address) of a vLLM server over `folder`, stopped at the end. RunError if it does not come up."""
    import httpx

    port = port or free_port()
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    url, log = f"http://127.0.0.1:{port}/v1", Path(tempfile.gettempdir(), f"vllm-server-{port}.log")
    with log.open("w") as file:
        # A session of its own: its worker processes end with it.
        server = subprocess.Popen([*line, *words], stdout=file, stderr=file, start_new_session=True)
    try:
        began = time.monotonic()
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/models", timeout=5.0).status_code == 200:
                    break
            if server.poll() is not None or time.monotonic() - began > wait:
                raise RunError("The vLLM server does not come up", where=str(log), got=log.read_text()[-500:])
            time.sleep(0.5)
        yield server, url
    finally:
        stop(server)


def stop(server: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Ends a server with all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, number)
    server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measured(name: str, engine: BaseEngine, sizes: Sequence[int], tokens: int) -> list[Result]:
    """Prints tokens per second at each number of prompts; returns the results of the largest."""
    engine.generate(requests(1, tokens))  # loads, compiles, fills the cache of prompts
    shown, results = [], []
    for size in sizes:
        began = time.perf_counter()
        results = [r[0] for r in engine.generate(requests(size, tokens))]
        seconds = time.perf_counter() - began
        if lost := [r.error for r in results if r.finish == "error"]:
            raise RunError(f"{len(lost)} requests failed", where=name, got=lost[0])
        shown.append(f"{sum(r.usage.completion_tokens for r in results) / seconds:>10.1f}")
    print(f"{name:<14}{''.join(shown)}", flush=True)
    return results


def differences(loaded: Any, asked: Sequence[Request], ours: Sequence[list[int]], theirs: Sequence[list[int]]):
    """(prompt, position, gap, highest logit) of the first difference of each pair that differs."""
    import torch

    found = []
    for number, (request, a, b) in enumerate(zip(asked, ours, theirs, strict=True)):
        place = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if place is None:
            continue
        ids = encode(loaded.tokenizer, request, True) + a[:place]
        with torch.no_grad():
            top = loaded.model(torch.tensor([ids])).logits[0, -1].float().topk(2).values
        found.append((number, place, float(top[0] - top[1]), float(top[0])))
    return found


def compare(name: str, loaded: Any, asked: Sequence[Request], ours: Sequence[list[int]], theirs: Sequence[list[int]]):
    found = differences(loaded, asked, ours, theirs)
    print(f"{name}: {len(asked) - len(found)} of {len(asked)} equal")
    for number, place, gap, top in found:
        print(
            f"  prompt {number}, token {place}: the two highest logits differ by {gap:.2g} (the highest is {top:.3g})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    try:
        run(asked.folder or _smollm2(), sorted(asked.prompts), asked.tokens, asked.dtype)
    except AssayError as error:
        raise SystemExit(f"bench_engines: error: {error}") from None


def _smollm2() -> str:
    from experiments.models import SmolLM2
    from experiments.tasks.base import Task

    return str(SmolLM2().load(Task(name="any"), 0).path)


def run(folder: str, sizes: Sequence[int], tokens: int, dtype: str) -> None:
    from experiments.engines.openai import OpenAIEngine
    from experiments.engines.transformers import TransformersEngine
    from experiments.engines.vllm import VllmEngine
    from experiments.models import open_model

    if not Path(folder, "config.json").is_file():
        raise ConfigError("There is no model", got=folder, expected="a folder with config.json")
    VllmEngine(folder)  # says so where vLLM is missing
    loaded = open_model(folder, "model", dtype=dtype, folder=Path(folder))
    print(f"{'tokens/s':<14}{''.join(f'{n:>10}' for n in sizes)}  prompts at once, {tokens} tokens each, {dtype}")
    plain = TransformersEngine(loaded.model, loaded.tokenizer, chat=True)
    ours = [r.ids or [] for r in measured("transformers", plain, sizes, tokens)]
    options = {"dtype": dtype, "max_model_len": 1024, "gpu_memory_utilization": 0.1}
    with VllmEngine(folder, extra={"enforce_eager": True}, **options) as engine:
        offline = measured("vllm", engine, sizes, tokens)
    words = ["--dtype", dtype, "--max-model-len", "1024", "--enforce-eager", "--gpu-memory-utilization", "0.1"]
    with (
        vllm_server(folder, *words) as (_, url),
        OpenAIEngine(url, concurrency=max(sizes), extra={"return_token_ids": True}) as engine,
    ):
        served = measured("openai", engine, sizes, tokens)
    offline_ids, served_ids = ([r.ids or [] for r in results] for results in (offline, served))
    prompts = requests(max(sizes), tokens)
    compare("transformers and vllm", loaded, prompts, ours, offline_ids)
    compare("transformers and openai", loaded, prompts, ours, served_ids)
    compare("vllm and openai", loaded, prompts, offline_ids, served_ids)


if __name__ == "__main__":
    main()
