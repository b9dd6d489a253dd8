"""What retrieval from a graph memory costs: python -m experiments.bench_memory

Milliseconds for the questions of one generation at 1e3, 1e4 and 1e5 stored questions, and the method's hooks over step
time at 10,000, where the memory is used (objective=grpo) and where its weights are trained (graph_weights).
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from experiments.bench import Baton, configuration, median_seconds, our_trainer, turns

QUESTIONS, WIDTH, PATHS, STRATEGIES = 16, 512, 40, 64


def stored(count: int) -> Any:
    """A memory of `count` questions with three paths each, every path with eight strategies."""
    import numpy as np

    from methods.graph_memory.graph import Edges, Memory, Strategy

    rng = np.random.default_rng(0)

    def edges(rows: int, columns: int, each: int) -> Edges:
        target = np.sort(rng.permuted(np.tile(np.arange(columns), (rows, 1)), axis=1)[:, :each], axis=1).ravel()
        source = np.repeat(np.arange(rows), each)
        return Edges(source, target, np.ones(len(source)), np.ones((len(source), 2), np.int64))

    vectors = rng.normal(size=(count, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Memory(
        [f"question {i}" for i in range(count)],
        vectors,
        [(f"path {j}",) for j in range(PATHS)],
        [Strategy(f"Strategy {k}.") for k in range(STRATEGIES)],
        edges(count, PATHS, 3),
        edges(PATHS, STRATEGIES, 8),
    )


def retrieval(sizes: tuple[int, ...] = (1_000, 10_000, 100_000)) -> None:
    import numpy as np

    asked = np.random.default_rng(1).normal(size=(QUESTIONS, WIDTH)).astype(np.float32)
    print(f"retrieval for {QUESTIONS} questions, median of 15")
    for size in sizes:
        memory = stored(size)
        print(f"  {size:>7} stored  {1000 * median_seconds(lambda m=memory: m.activate(asked, 5), 15):8.2f} ms")


def share(objective: str, size: int = 10_000, rows: int = 64, tokens: int = 64, count: int = 6) -> None:
    from hydra.utils import instantiate

    from methods.graph_memory.graph_memory import GraphMemory

    words = [f"objective={objective}", f"trainer.prompts_per_step={rows // 8}", f"trainer.max_steps={count + 1}"]
    words += [f"trainer.max_completion_tokens={tokens}", "trainer.save_every=0", "eval.every=0"]
    cfg = configuration(*words, "method=[graph_memory]", "model.warm_start=null")
    task = instantiate(cfg.task)
    loaded = instantiate(cfg.model).load(task, 0)
    method = GraphMemory(memory=stored(size), memory_questions=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer, baton = our_trainer(cfg, loaded, task, [method], Path(folder)), Baton(["only"])
        turns(trainer, "only", baton, 0)
        trainer.train()
    hook = [h["time/hook/graph_memory"] for h in trainer.state.log_history if "loss" in h][1:]
    shares = sorted(h / s for h, s in zip(hook, baton.seconds["only"][1:], strict=True))
    print(f"  {objective:<14} {statistics.median(shares):.3%}  [{shares[0]:.3%}, {shares[-1]:.3%}]")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    retrieval()
    print("hook time / step time at 10,000 stored questions, 64 rows of 64 tokens, median of 6 steps with its range")
    share("grpo")
    share("graph_weights")
