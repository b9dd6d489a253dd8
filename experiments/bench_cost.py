"""The cost model against real steps on the CPU: python -m experiments.bench_cost

Memory beside the weights, seconds of generation and of training of the tiny model and of SmolLM2, with the speed and
the bandwidth of one thread as they are measured first.
"""

from __future__ import annotations

from typing import Any

from experiments.cost import GB, Machine, Shape, generation_seconds, job_of, memory, phases, training_seconds

CHECKS = (
    ("model=tiny", "trainer.prompts_per_step=16", "trainer.rollouts_per_prompt=8"),
    (
        "model=smollm2",
        "trainer.prompts_per_step=1",
        "trainer.rollouts_per_prompt=4",
        "trainer.max_completion_tokens=32",
    ),
)


def this_machine() -> Machine:
    """One thread: float32 FLOP/s of a large product, bytes/s of reading, both as reached."""
    import time

    import torch

    torch.set_num_threads(1)

    def best(work: Any, count: int = 7) -> float:
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    a, x = torch.randn(1024, 1024), torch.randn(64_000_000)
    product = best(lambda: a @ a)
    return Machine(2 * 1024**3 / product, 4 * len(x) / best(x.sum), 8 * GB, 1.0, 1.0, 0.0)


def check(words: tuple[str, ...], steps: int = 3) -> str:
    """Memory and seconds of a real step on the CPU beside those of the formulas."""
    import statistics
    import tempfile
    from pathlib import Path

    from hydra.utils import instantiate

    from experiments.bench import configuration, our_trainer
    from experiments.run import quiet

    quiet()
    machine = this_machine()
    cfg = configuration("scale=cpu", f"trainer.max_steps={steps}", "trainer.save_every=0", *words)
    task = instantiate(cfg.task)
    loaded = instantiate(cfg.model).load(task, 0)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(cfg, loaded, task, [], Path(folder))
        trainer.add_callback(_clock(seconds))
        before, most = _resident(), _most_resident(trainer.train)
    logs = [h for h in trainer.state.log_history if "loss" in h][1:]
    drawing = statistics.median(h["time/generation"] for h in logs)
    assert trainer.last_ctx is not None
    segments = [t.segments[0] for t in trainer.last_ctx.trajs]
    prompt, written = max(len(s.prompt_ids) for s in segments), max(len(s.completion_ids) for s in segments)
    job, shape = job_of(cfg, written, prompt, 1, "none"), Shape.of(loaded.model.config)
    parts = memory(shape, job)
    training, generating = phases(parts)
    wanted = max(training, generating + parts["cache"]) - parts["weights"]  # which were there before
    told = (wanted / 1e6, generation_seconds(shape, job, machine), training_seconds(shape, job, machine))
    found = ((most - before) / 1e6, drawing, statistics.median(seconds[1:]) - drawing)
    rows = zip(("memory beside the weights, MB", "generation, s", "training, s"), told, found, strict=True)
    head = f"{cfg.model.name}: {shape.weights / 1e6:.2f} M weights, {job.rows} rows of {prompt} + {written} tokens, one"
    head += f" thread of {machine.flops / 1e9:.0f} GFLOP/s and {machine.bandwidth / 1e9:.1f} GB/s"
    return "\n".join([head, *(f"  {what:<30} formula {a:9.3f}  measured {b:9.3f}" for what, a, b in rows)])


def _resident() -> int:
    from pathlib import Path

    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _most_resident(work: Any) -> int:
    """Calls work(); the most bytes that were resident meanwhile."""
    import threading

    done, seen = threading.Event(), [0]

    def look() -> None:
        while not done.wait(0.01):
            seen[0] = max(seen[0], _resident())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return seen[0]


def _clock(seconds: list[float]) -> Any:
    import time

    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    return Clock()


if __name__ == "__main__":
    for words in CHECKS:
        print(check(words), flush=True)
