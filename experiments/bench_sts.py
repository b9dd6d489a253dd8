"""What score-transfer costs: python -m experiments.bench_sts

Scoring (reading a layer's residual stream, encoding it, running sums) against the bare forward pass of the model over
the same texts, the SAE's cost on top of the pass that ends at its layer, SAE training in tokens per second and peak
memory, and how scoring grows with tokens and domains. CPU seconds of one thread, taken in turns; medians with ranges.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.capture import Capture, Passage
from experiments.sae_training import Ready, SAETraining, Trainer
from methods.sts.sae import SAE
from methods.sts.scores import FeatureSums

ROUNDS = 7


def tiny() -> Any:
    """The size of the digit world's model: 3 layers of width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def smollm2() -> Any:
    from experiments.models import SmolLM2

    return SmolLM2().load(None, 0).model


def random_sae(width: int, layer: int, latents: int, k: int) -> SAE:
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(latents, width, generator=generator) / width**0.5
    tensors = {"W_enc": decoder.T.contiguous(), "b_enc": torch.zeros(latents)}
    return SAE("topk", tensors | {"W_dec": decoder, "b_dec": torch.zeros(width)}, k=k, layer=layer)


def texts(model: Any, count: int, length: int) -> list[Passage]:
    size = model.config.vocab_size
    ids = torch.randint(0, size, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    return [Passage(row, [(1, length)]) for row in ids]


def score(capture: Capture, sae: SAE, passages: list[Passage]) -> FeatureSums:
    sums = FeatureSums()
    for vectors in capture.read(passages):
        sums.add(sae.encode(vectors.z_Td))
    return sums


@torch.no_grad()
def bare(capture: Capture, passages: list[Passage]) -> None:
    """The whole forward pass, vocabulary head and all, in the same batches as scoring."""
    for batch in capture._batches((p,) for p in passages):
        capture.model(input_ids=torch.tensor([p.ids for (p,) in batch.items]), use_cache=False)


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turns(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, one after the other in every round; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            found = cpu_seconds(work)
            if turn:
                seconds[name].append(found)
    return seconds


def ratio(over: list[float], under: list[float]) -> str:
    found = sorted(a / b for a, b in zip(over, under, strict=True))
    return f"{statistics.median(found):.3f} [{found[0]:.3f}, {found[-1]:.3f}]"


def scoring(name: str, model: Any, layer: int, passages: list[Passage], rounds: int) -> None:
    width = model.config.hidden_size
    sae = random_sae(width, layer, 8 * width, width // 8)
    capture, through = Capture(model, layer), Capture(model, layer, early_stop=False)
    tokens = sum(p.tokens for p in passages)
    seconds = in_turns(
        {
            "bare": lambda: bare(capture, passages),
            "score": lambda: score(capture, sae, passages),
            "whole": lambda: score(through, sae, passages),
            "read": lambda: list(capture.read(passages)),
        },
        rounds,
    )
    rate = {name: tokens / statistics.median(found) for name, found in seconds.items()}
    print(f"{name}: layer {layer} of {model.config.num_hidden_layers}, width {width}, SAE of {sae.latents} latents")
    print(f"  bare forward {rate['bare']:,.0f} tokens/s, scoring {rate['score']:,.0f} tokens/s")
    print(f"  scoring / bare forward                       {ratio(seconds['bare'], seconds['score'])}")
    print(f"  the same, the pass not ended at the layer    {ratio(seconds['bare'], seconds['whole'])}")
    print(f"  reading alone / scoring, in time             {ratio(seconds['read'], seconds['score'])}")


def training(name: str, model: Any, passages: list[Passage], settings: SAETraining) -> None:
    """Tokens per second and the growth of peak memory, in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_train, args=(model, passages, settings, there))
    process.start()
    seconds, grown = here.recv()
    process.join()
    tokens = settings.steps * settings.batch
    read = tokens / settings.passes
    print(f"  {name}: {tokens / seconds:,.0f} tokens/s ({read:,.0f} read, {tokens:,} trained on), ", end="")
    print(f"peak memory + {grown:.0f} MB over {len(passages):,} texts")


def _train(model: Any, passages: list[Passage], settings: SAETraining, pipe: Any) -> None:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(_Bare(model), Ready(passages), settings, Path(folder))  # type: ignore[arg-type]
        seconds = cpu_seconds(trainer.run)
    pipe.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


class _Bare:
    def __init__(self, model: Any) -> None:
        self.model = model


def growth(model: Any, layer: int, rounds: int) -> None:
    """Seconds per token over those of the smallest job."""
    sae, capture = random_sae(64, layer, 512, 8), Capture(model, layer)
    domain = texts(model, 64, 64)
    jobs = {f"{n * 4032} tokens": n for n in (1, 2, 4, 8)}
    seconds = in_turns({name: lambda n=n: score(capture, sae, domain * n) for name, n in jobs.items()}, rounds)
    first = seconds[next(iter(jobs))]
    for name, n in jobs.items():
        print(f"  {name:>13}: {n} x {ratio(seconds[name], [n * s for s in first])}")

    def domains(n: int) -> None:
        for _ in range(n):
            score(capture, sae, domain)

    seconds = in_turns({str(n): lambda n=n: domains(n) for n in (1, 2, 4, 8)}, rounds)
    for n in (2, 4, 8):
        print(f"  {n:>5} domains: {n} x {ratio(seconds[str(n)], [n * s for s in seconds['1']])}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    small = tiny()
    print(f"tokens per CPU second of one thread, median of {ROUNDS} rounds [range]")
    scoring("tiny", small, 1, texts(small, 128, 31), ROUNDS)
    large = smollm2()
    scoring("smollm2", large, 19, texts(large, 4, 256), 3)
    print("SAE training")
    fit = SAETraining(steps=96, batch=1024, buffer=16384, passes=1, latents=512, k=8, learning_rate=1e-3, context=64)
    for count in (1000, 4000):
        training(f"tiny, {fit.latents} latents", small, texts(small, count, 64), fit)
    fit = SAETraining(steps=8, batch=512, buffer=1024, passes=4, layer=19, context=256)
    training("smollm2, 4608 latents", large, texts(large, 10, 256), fit)
    print("scoring time of the tiny model over n times the first one's")
    growth(small, 1, ROUNDS)
