"""What compressing the context costs: python -m experiments.bench_ziprl

Time over step time of training runs on task=archive_walk from a warm start (about a minute, once): ZipRL's hooks
(prompts, memory, reading zips, their quality, credit), and with them the tokenizer, which reads every prompt anew.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from experiments.bench import Baton, configuration, our_trainer, turns

WARM_UP = 2
WORLD = ["task=archive_walk", "model.heads=2", "model.rope_theta=10000.0", "model.init_std=0.05"]
START = ["steps=1500", "batch_size=32", "learning_rate=4.0e-3"]


def shares(rows: int, count: int = 10) -> None:
    from hydra.utils import instantiate

    words = [*WORLD, *(f"model.warm_start.{word}" for word in START), "method=[ziprl_archive]"]
    words += ["eval.every=0", "trainer.save_every=0", "trainer.rows_per_device=32"]
    words += [f"trainer.prompts_per_step={rows // 8}", f"trainer.max_steps={count + WARM_UP}"]
    cfg = configuration(*words)
    task = instantiate(cfg.task)
    loaded = instantiate(cfg.model).load(task, 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(cfg, loaded, task, [instantiate(cfg.method.ziprl)], Path(folder))
        baton = Baton(["only"])
        turns(trainer, "only", baton, 0)
        trainer.train()
    logs = [h for h in trainer.state.log_history if "loss" in h]
    found = list(zip(logs, baton.seconds["only"], strict=True))[WARM_UP:]
    hook = sorted(h["time/hook/ziprl"] / s for h, s in found)
    both = sorted((h["time/hook/ziprl"] + h["time/service/encode"]) / s for h, s in found)
    step = statistics.median(s for _, s in found)
    print(f"  {rows:>4} episodes, step {step:.2f} s:", end=" ")
    for name, values in (("hooks", hook), ("with the tokenizer", both)):
        print(f"{name} {statistics.median(values):.3%} [{values[0]:.3%}, {values[-1]:.3%}]", end="  ")
    print()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print("ZipRL's time / step time, median of 10 steps with its range")
    for rows in (32, 64):
        shares(rows)
