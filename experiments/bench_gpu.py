"""A GRPO step on a GPU with and without our layer: python -m experiments.bench_gpu

A model of the shape of Qwen3-0.6B with random weights, bf16, 8 prompts x 8 rollouts of 256 tokens. Plain TRL, the empty
stack and each method take turns step by step: ratio of step times, tokens per second, share of the hooks, peak memory.
`--cpu` runs the same script on a model of two layers, to see that it works.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from experiments.bench import WARM_UP, Baton, configuration, interval, our_trainer, plain_trainer, turns
from experiments.cost import SHAPES, Shape

METHODS = ("ha_dw", "rollout_bandits", "tapo")
SMALL = Shape(2, 64, 4, 2, 16, 128, 512)


def random_model(shape: Shape, tokenizer: Any, device: str) -> Any:
    """A Qwen3 of this shape whose vocabulary begins with the tokenizer's; its samples hardly ever end by themselves."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = Qwen3ForCausalLM(config)
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def trainers(shape: Shape, device: str, steps: int, tokens: int, folder: Path) -> dict[str, Any]:
    """Plain TRL, the empty stack, and a stack of each method alone, all on copies of one model."""
    from hydra.utils import instantiate

    from experiments.tokenizers import tiny_tokenizer
    from experiments.weights import LoadedModel

    words = [f"trainer.max_steps={steps + WARM_UP}", f"trainer.max_completion_tokens={tokens}", "eval.every=0"]
    words += ["trainer.prompts_per_step=8", "trainer.save_every=0", "method=[" + ",".join(METHODS) + "]"]
    cfg = configuration(*words, f"scale={'gpu' if device == 'cuda' else 'cpu'}")
    task = instantiate(cfg.task)
    tokenizer = tiny_tokenizer(task.symbols)
    loaded = LoadedModel(random_model(shape, tokenizer, device), tokenizer, False, "random")
    stacks = {"empty": []} | {name: [instantiate(cfg.method[name])] for name in METHODS}
    made = {name: our_trainer(cfg, loaded, task, stack, folder / name) for name, stack in stacks.items()}
    return {"plain": plain_trainer(made["empty"], loaded, task), **made}


def measure(shape: Shape, device: str, steps: int = 10, tokens: int = 256) -> None:
    import torch

    with tempfile.TemporaryDirectory() as name:
        made = trainers(shape, device, steps, tokens, Path(name))
        baton = Baton(list(made))
        for who, trainer in made.items():
            turns(trainer, who, baton, 0, clock=_clock(device))
        threads = [threading.Thread(target=t.train) for t in made.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows = 8 * made["empty"].num_generations
    plain = baton.seconds["plain"][WARM_UP:]
    median = statistics.median(plain)
    print(f"{shape.weights / 1e6:.0f} M weights, {rows} rows x {tokens} tokens; plain TRL {median:.2f} s per step,")
    print(f"  {rows * tokens / median:.0f} generated and trained tokens per second")
    for who, trainer in made.items():
        if who == "plain":
            continue
        seconds = baton.seconds[who][WARM_UP:]
        hooks = [h.get(f"time/hook/{who}", 0.0) for h in trainer.state.log_history if "loss" in h][WARM_UP:]
        share = statistics.median(h / s for h, s in zip(hooks, seconds, strict=True))
        ratio = interval([a / b for a, b in zip(seconds, plain, strict=True)])
        print(f"  {who:<16} / plain TRL {ratio}; hooks {share:.2%}")
    if device == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, {len(made)} trainers together")


def _clock(device: str):
    import time

    import torch

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(prog="python -m experiments.bench_gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="two layers on the CPU, to see that the script works")
    args = parser.parse_args()
    if args.cpu:
        torch.set_num_threads(1)
        measure(SMALL, "cpu", steps=2, tokens=16)
    elif torch.cuda.is_available():
        measure(SHAPES["Qwen3-0.6B"], "cuda")
    else:
        sys.exit("assay: error: there is no GPU here. To fix it: --cpu shows that the script works.")


if __name__ == "__main__":
    main()
