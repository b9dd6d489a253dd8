"""What retrieval from a graph memory costs: python -m experiments.bench_memory

Steps of task=procedures with its tools, 16 questions x 8 episodes of the tiny model, with 10,000 stored questions:
their time and the share of the method's hooks, where the memory is used (objective=grpo) and where its weights are
trained (graph_weights). Then the retrieval alone, for 16 questions at 1e3, 1e4 and 1e5 stored ones, over the grpo step:
questions of the task as the bench embeds them (hashed words, many zeros), and vectors without zeros.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from experiments.bench import WARM_UP, Baton, configuration, median_seconds, our_trainer, turns

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


def steps(objective: str, size: int = 10_000, count: int = 20) -> float:
    """Prints step time and hook share with their ranges; the median step in seconds."""
    from hydra.utils import instantiate

    from methods.graph_memory.graph_memory import GraphMemory

    words = ["task=procedures", f"objective={objective}", f"trainer.prompts_per_step={QUESTIONS}"]
    words += [f"trainer.max_steps={count + WARM_UP}", "trainer.save_every=0", "eval.every=0"]
    cfg = configuration(*words, "method=[graph_memory]")
    task = instantiate(cfg.task)
    loaded = instantiate(cfg.model).load(task, 0)
    method = GraphMemory(memory=stored(size), memory_questions=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer, baton = our_trainer(cfg, loaded, task, [method], Path(folder)), Baton(["only"])
        turns(trainer, "only", baton, 0)
        trainer.train()
    hook = [h["time/hook/graph_memory"] for h in trainer.state.log_history if "loss" in h][WARM_UP:]
    seconds = baton.seconds["only"][WARM_UP:]
    shares = sorted(h / s for h, s in zip(hook, seconds, strict=True))
    step = statistics.median(seconds)
    print(f"  {objective:<14} {1000 * step:6.0f} ms, hooks {statistics.median(shares):.2%}  ", end="")
    print(f"[{shares[0]:.2%}, {shares[-1]:.2%}]")
    return step


def retrieval(step: float, sizes: tuple[int, ...] = (1_000, 10_000, 100_000)) -> None:
    from types import SimpleNamespace

    import numpy as np
    from hydra.utils import instantiate

    from experiments.services import Services
    from methods.graph_memory.prompts import question_of

    task = instantiate(configuration("task=procedures").task)
    texts = [question_of(row) for row in task.rows("train", 0)[:QUESTIONS]]
    hashed = Services(None, task, 0, SimpleNamespace()).embed(texts).numpy()
    dense = np.random.default_rng(1).normal(size=(QUESTIONS, WIDTH)).astype(np.float32)
    for size in sizes:
        memory = stored(size)
        for name, asked in (("questions", hashed), ("dense vectors", dense)):
            seconds = median_seconds(lambda m=memory, a=asked: m.activate(a, 5), 25)
            print(f"  {size:>7} stored  {name:<14} {1000 * seconds:8.2f} ms  {seconds / step:7.2%} of a step")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print(f"steps of {QUESTIONS} questions x 8 episodes, 10,000 stored questions: median of 20, range of the shares")
    step = steps("grpo")
    steps("graph_weights")
    print(f"retrieval for {QUESTIONS} questions, median of 25")
    retrieval(step)
