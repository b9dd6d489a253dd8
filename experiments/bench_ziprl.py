"""What compressing the context costs: python -m experiments.bench_ziprl

Time over step time of training runs on task=archive_walk from a warm start (about a minute, once), each with all that
stands before it: the bookkeeping of the compression (prompts, memory, reading zips, their quality), all of ZipRL's
hooks (credit and metrics), and the tokenizer, which reads every prompt anew.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from experiments.bench import Baton, configuration, our_trainer, turns
from methods.ziprl.loop import Loop

WARM_UP = 2
WORLD = ["task=archive_walk", "model.heads=2", "model.rope_theta=10000.0", "model.init_std=0.05"]
START = ["steps=1500", "batch_size=32", "learning_rate=4.0e-3"]


def shares(rows: int, count: int = 30) -> None:
    from hydra.utils import instantiate

    words = [*WORLD, *(f"model.warm_start.{word}" for word in START), "method=[ziprl_archive]"]
    words += ["eval.every=0", "trainer.save_every=0", "trainer.rows_per_device=32"]
    words += [f"trainer.prompts_per_step={rows // 8}", f"trainer.max_steps={count + WARM_UP}"]
    cfg = configuration(*words)
    task = instantiate(cfg.task)
    loaded = instantiate(cfg.model).load(task, 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(cfg, loaded, task, [instantiate(cfg.method.ziprl)], Path(folder))
        baton, kept = Baton(["only"]), []
        turns(trainer, "only", baton, 0)
        with timed_loop(trainer, kept):
            trainer.train()
    logs = [h for h in trainer.state.log_history if "loss" in h]
    found = list(zip(logs, kept, baton.seconds["only"], strict=True))[WARM_UP:]
    parts = {
        "bookkeeping": [own / s for _, own, s in found],
        "all hooks": [h["time/hook/ziprl"] / s for h, _, s in found],
        "with the tokenizer": [(h["time/hook/ziprl"] + h["time/service/encode"]) / s for h, _, s in found],
    }
    print(f"  {rows:>4} episodes, step {statistics.median(s for *_, s in found):.2f} s:", end=" ")
    for name, values in parts.items():
        print(f"{name} {statistics.median(values):.2%} [{min(values):.2%}, {max(values):.2%}]", end="  ")
    print()


@contextmanager
def timed_loop(trainer, kept: list[float]):
    """Inside, `kept` gets the seconds of each rollout's loop without generation, tokenizer and tools."""
    run = Loop.run

    def timed(*args) -> None:
        start, service = time.perf_counter(), trainer.stack.service_seconds
        run(*args)
        kept.append(time.perf_counter() - start - (trainer.stack.service_seconds - service))

    with mock.patch.object(Loop, "run", timed):
        yield


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print("ZipRL's time / step time, median of 30 steps with its range")
    for rows in (32, 64):
        shares(rows)
