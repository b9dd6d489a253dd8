"""Speed side by side, in one process and one sitting: python -m experiments.bench [PART...], by default all of them.

steps    step time of this trainer with an empty and with an identity stack, against plain GRPOTrainer. The three
         trainers take turns step by step, each with its own random stream, so that a pair of steps sees the same
         machine; their losses must be identical.
hooks    each method's hook time over step time, at 64 completion tokens and 64, 256, 1024 rows.
buffer   rollout bandits: the hook with a full pool, and the buffer of 10,000 and 100,000 rollouts, over step time.
startup  `assay --help` against `trl --help`, taking turns.
tapo     TAPO's hook over step time at 128 rollouts of 8 calls each, and how the hook grows with the rollouts.
rollout  episodes with tools: tokens per second of the rollout and time of a step, against TRL's own tool loop.

All figures are ratios with a 95 % bootstrap interval of the median; absolute times belong to one machine.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

WARM_UP = 3
ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf" if (ROOT / "conf").is_dir() else ROOT / "cli" / "conf"  # the clone's, else the wheel's


def interval(ratios: list[float], draws: int = 4000) -> str:
    """Median of paired ratios with its 95 % bootstrap interval."""
    import numpy as np

    values = np.asarray(ratios)
    medians = np.median(np.random.default_rng(0).choice(values, (draws, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return f"{np.median(values):.3f} [{low:.3f}, {high:.3f}] over {len(values)} pairs"


class Baton:
    """Lets trainers in threads take turns, one optimiser step each, and times each turn."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.turn = names, 0
        self.condition = threading.Condition()
        self.seconds: dict[str, list[float]] = {n: [] for n in names}
        self.random: dict[str, Any] = {}

    def wait(self, name: str) -> None:
        import torch

        with self.condition:
            self.condition.wait_for(lambda: self.names[self.turn % len(self.names)] == name)
        if name in self.random:
            torch.set_rng_state(self.random[name])

    def release(self, name: str) -> None:
        import torch

        self.random[name] = torch.get_rng_state()
        with self.condition:
            self.turn += 1
            self.condition.notify_all()


def turns(trainer, name: str, baton: Baton, seed: int, clock=time.perf_counter):
    """A callback that passes the baton after every step; what happens between two steps is timed as well."""
    from transformers import TrainerCallback, set_seed

    class Turns(TrainerCallback):
        def on_train_begin(self, args, state, control, **kw):
            baton.wait(name)
            set_seed(seed)
            self.started = clock()

        def on_step_end(self, args, state, control, **kw):
            baton.seconds[name].append(clock() - self.started)
            baton.release(name)
            if state.global_step < args.max_steps:
                baton.wait(name)
            self.started = clock()

    trainer.add_callback(Turns())


def identity_method():
    """A method that implements every hook and changes nothing."""
    from methods.base import Method

    def same(first):
        return lambda self, value, ctx: value if first else None

    hooks = {
        "prepare_rows": same(True),
        "rollout": lambda self, rows, ctx, default: default(rows),
        "rewards": same(False),
        "token_rewards": lambda self, trajs, ctx: ctx.token_rewards_ST,
        "advantages": same(True),
        "select": same(True),
        "token_advantages": same(True),
        "clip_range": lambda self, lctx: None,
        "extra_loss": lambda self, lctx: None,
        "after_step": lambda self, ctx: None,
        "metrics": lambda self: {},
    }
    return type("Identity", (Method,), hooks | {"name": "identity"})()


def configuration(*words: str):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base=None):
        return compose("train", ["scale=cpu", *words])


def our_trainer(cfg, loaded, task, methods, folder: Path):
    from transformers import PrinterCallback, TrainerCallback

    from experiments import batching, rewards
    from experiments.run import build_trainer
    from methods.stack import Stack

    fresh = copy.copy(loaded)
    fresh.model = copy.deepcopy(loaded.model)
    rows = task.rows("train", 0)
    trainer = build_trainer(cfg, batching.plan(cfg.trainer), task, fresh, rows, rewards.build(cfg.reward, task), folder)
    trainer.stack = Stack(methods, trainer.stack.objective)
    trainer.args.save_strategy = "no"
    trainer.remove_callback(PrinterCallback)
    trainer.attach(TrainerCallback(), None)
    return trainer


def plain_trainer(ours, loaded, task):
    """TRL's GRPOTrainer with the same arguments, prompts and reward."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.trainer.grpo_trainer import GRPOTrainer

    rows = task.rows("train", 0)

    def reward(completions, index, **_):
        return [task.score(text, rows[i]) for text, i in zip(completions, index, strict=True)]

    trainer = GRPOTrainer(
        model=copy.deepcopy(loaded.model),
        reward_funcs=[reward],
        args=ours.args,
        train_dataset=Dataset.from_dict({"prompt": [r.prompt for r in rows], "index": list(range(len(rows)))}),
        processing_class=loaded.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def steps(pairs: int = 60) -> None:
    """Empty and identity stack against plain TRL, step by step in turns."""
    import torch
    from hydra.utils import instantiate

    torch.set_num_threads(1)
    cfg = configuration(f"trainer.max_steps={pairs + WARM_UP}", "trainer.save_every=0", "eval.every=0")
    task = instantiate(cfg.task)
    loaded = instantiate(cfg.model).load(task, 0)
    with tempfile.TemporaryDirectory() as folder:
        empty = our_trainer(cfg, loaded, task, [], Path(folder) / "a")
        identity = our_trainer(cfg, loaded, task, [identity_method()], Path(folder) / "b")
        trainers = {"plain": plain_trainer(empty, loaded, task), "empty": empty, "identity": identity}
        baton = Baton(list(trainers))
        for name, trainer in trainers.items():
            turns(trainer, name, baton, empty.args.seed)
        threads = [threading.Thread(target=t.train) for t in trainers.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    losses = {n: [h["loss"] for h in t.state.log_history if "loss" in h] for n, t in trainers.items()}
    median = statistics.median(baton.seconds["plain"][WARM_UP:])
    rows = cfg.trainer.prompts_per_step * cfg.trainer.rollouts_per_prompt
    print(f"step time at {rows} rows, plain TRL {median * 1e3:.0f} ms")
    for name in ("empty", "identity"):
        ratios = [a / b for a, b in zip(baton.seconds[name], baton.seconds["plain"], strict=True)][WARM_UP:]
        same = "identical" if losses[name] == losses["plain"] else "DIFFERENT"
        print(f"  {name} stack / plain TRL: {interval(ratios)}; losses {same}")


def hooks(sizes: tuple[int, ...] = (64, 256, 1024), tokens: int = 64, count: int = 6) -> None:
    """Hook time over step time of every method, alone on the first objective that it runs on."""
    import torch
    from hydra.utils import get_class, instantiate
    from omegaconf import OmegaConf

    torch.set_num_threads(1)
    files = sorted((CONF / "method").glob("*.yaml"))
    names = [p.stem for p in files if "_target_: methods.controls" not in p.read_text()]
    print(f"hook time / step time, {tokens} tokens, median of {count} steps with its range")
    for name in names:
        conf: Any = OmegaConf.load(CONF / "method" / f"{name}.yaml")
        runs_on: Any = get_class(conf._target_)
        objective = [f"objective={runs_on.objectives[0]}"] if runs_on.objectives else []
        for rows in sizes:
            words = [*objective, f"method=[{name}]", f"trainer.prompts_per_step={rows // 8}"]
            words += ["trainer.rows_per_device=64", f"trainer.max_completion_tokens={tokens}"]
            words += [f"trainer.max_steps={count + 1}", "trainer.save_every=0"]
            cfg = configuration(*words, "model.warm_start=null", "eval.every=0")
            task = instantiate(cfg.task)
            loaded = instantiate(cfg.model).load(task, 0)
            methods = [instantiate(node) for node in cfg.method.values()]
            with tempfile.TemporaryDirectory() as folder:
                trainer = our_trainer(cfg, loaded, task, methods, Path(folder))
                baton = Baton(["only"])
                turns(trainer, "only", baton, 0)
                trainer.train()
            hook = [h[f"time/hook/{methods[0].name}"] for h in trainer.state.log_history if "loss" in h][1:]
            shares = sorted(h / s for h, s in zip(hook, baton.seconds["only"][1:], strict=False))
            middle = statistics.median(shares)
            print(f"  {name:<20} {rows:>5} rows  {middle:.3%}  [{shares[0]:.3%}, {shares[-1]:.3%}]")


def buffer(sizes: tuple[int, ...] = (10_000, 100_000), rows: int = 64, tokens: int = 64, count: int = 12) -> None:
    """Rollout bandits: hook share with a full pool; push, evict and score, take, and refresh, over step time."""
    import torch
    from hydra.utils import instantiate

    from methods.rollout_bandits.buffer import Buffer
    from methods.rollout_bandits.features import Scale, context
    from methods.rollout_bandits.scheduler import POOL, Scheduler
    from methods.rollout_bandits.selection import best

    torch.set_num_threads(1)
    words = [f"trainer.prompts_per_step={rows // 8}", f"trainer.max_completion_tokens={tokens}"]
    words += [f"trainer.max_steps={count + WARM_UP}", "trainer.save_every=0", "eval.every=0", "model.warm_start=null"]
    cfg = configuration("method=[rollout_bandits]", *words)
    task = instantiate(cfg.task)
    method = instantiate(cfg.method.rollout_bandits)
    scheduler = method.scheduler = Scheduler(len(method.features), warmup=0)
    kept = torch.rand(rows // 2, len(method.features))
    for k in range(POOL):
        scheduler.learn(kept, kept.mean(0) - 0.5, float(k % 3))
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(cfg, instantiate(cfg.model).load(task, 0), task, [method], Path(folder))
        baton = Baton(["only"])
        turns(trainer, "only", baton, 0)
        trainer.train()
    steps_s = baton.seconds["only"][WARM_UP:]
    hook = [h["time/hook/rollout_bandits"] for h in trainer.state.log_history if "loss" in h][WARM_UP:]
    step = statistics.median(steps_s)
    print(f"rollout bandits at {rows} rows x {tokens} tokens, step {step * 1e3:.0f} ms; medians of {count}")
    print(f"  hook with a full pool / step         {statistics.median(hook) / step:.3%}")

    ctx = trainer.last_ctx
    assert ctx is not None and ctx.batch is not None
    batch, facts, scale = ctx.batch, torch.rand(rows, 10), Scale(tokens, 64, sizes[0] // rows)
    batch.old_logps_ST = torch.zeros_like(batch.adv_ST)

    for size in sizes:
        now, store = iter(range(10**9)), Buffer(size // rows)
        for _ in range(size // rows):
            store.push(batch, facts, next(now))
        megabytes = (
            sum(in_bytes(r.tensors) + r.facts_NF.nbytes + len(json.dumps(r.shown)) for r in store.rounds) / 2**20
        )

        def choose(store=store, now=now):
            t = next(now)
            store.push(batch, facts, t)
            return best(scheduler.scores(context(store.facts(t), scale)), rows)

        ratio, taken = median_seconds(choose, count) / step, choose()
        print(f"  {size:>7} buffered ({megabytes:.0f} MB): push, evict, score / step {ratio:.3%},", end=" ")
        taking = median_seconds(lambda store=store, taken=taken: store.take(taken), count)
        print(f"take {rows} / step {taking / step:.3%}")
    some = store.take(torch.arange(method.refresh_max)).trajs
    seen = median_seconds(lambda: ctx.forward(some, ("logps", "entropies")), count)
    print(f"  refresh of {len(some)} / step              {seen / step:.3%}")


def median_seconds(action, count: int) -> float:
    """Median wall time of `count` calls."""
    spent = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def in_bytes(tensors: dict[str, Any]) -> int:
    return sum(x.nbytes for x in tensors.values())


def startup(pairs: int = 15) -> None:
    """`assay --help` against `trl --help`."""
    commands = {name: [str(Path(sys.executable).with_name(name)), "--help"] for name in ("assay", "trl")}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(pairs + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["assay"], seconds["trl"], strict=True)][1:]
    print(f"start-up, trl --help {statistics.median(seconds['trl']):.2f} s")
    print(f"  assay --help / trl --help: {interval(ratios)}")


def recorded_calls(calls: int = 8, group: int = 8):
    """A method that writes `calls` search calls and an outcome into each rollout, so that no task with tools is needed.

    Half of the calls come from a dozen queries of their prompt, the others are of their own.
    """
    import random

    from methods.base import Method, Turn

    draw = random.Random(0)
    words = [f"word{i}" for i in range(3000)]

    def query() -> str:
        return " ".join(draw.sample(words, 6))

    def rewards(self, trajs, ctx):
        popular: dict[int, list[str]] = {}
        for traj in trajs:
            traj.rewards["task"] = float(draw.random() < 0.4)
            length = len(traj.segments[0].completion_ids)
            ends = [length * (k + 1) // (calls + 1) for k in range(calls)]
            traj.turns = []
            for start, end in zip([0, *ends], ends, strict=False):
                asked = draw.choice(popular.setdefault(traj.group_id, [query() for _ in range(12)]))
                asked = asked if draw.random() < 0.5 else query()
                traj.turns.append(Turn(0, start, end, "call", [{"tool": "search", "args": {"query": asked}}]))

    return type("RecordedCalls", (Method,), {"name": "recorded_calls", "rewards": rewards})()


def tapo(sizes: tuple[int, ...] = (128, 512, 2048, 8192), tokens: int = 128, count: int = 6) -> None:
    """Hook time over step time with 8 calls per rollout, and its growth; rollouts are generated by the tiny model."""
    import torch
    from hydra.utils import instantiate

    from methods.base import Segment, Trajectory, assemble

    torch.set_num_threads(1)
    words = ["method=[tapo]", f"trainer.prompts_per_step={sizes[0] // 8}", "trainer.rows_per_device=64"]
    words += [f"trainer.max_completion_tokens={tokens}", f"trainer.max_steps={count + 1}", "trainer.save_every=0"]
    cfg = configuration(*words, "model.warm_start=null", "eval.every=0")
    task = instantiate(cfg.task)
    recorder, method = recorded_calls(), instantiate(cfg.method.tapo)
    with tempfile.TemporaryDirectory() as folder:
        loaded = instantiate(cfg.model).load(task, 0)
        trainer = our_trainer(cfg, loaded, task, [recorder, method], Path(folder))
        baton = Baton(["only"])
        turns(trainer, "only", baton, 0)
        trainer.train()
    steps = [h for h in trainer.state.log_history if "loss" in h][1:]
    shares = sorted(h["time/hook/tapo"] / s for h, s in zip(steps, baton.seconds["only"][1:], strict=False))
    found = statistics.median(h["tapo/rho_action"] for h in steps)
    print(f"TAPO, {sizes[0]} rollouts x 8 calls, {tokens} tokens, rho_action {found:.2f}")
    print(f"  hook / step: {statistics.median(shares):.3%}  [{shares[0]:.3%}, {shares[-1]:.3%}] of {count} steps")
    print("  rollouts and CPU time of the hook:", end="")
    for rows in sizes:
        ctx = trainer.new_context("train")
        ctx.trajs = [Trajectory(f"row{i // 8}", i // 8, i % 8, [Segment([1], [5] * tokens)]) for i in range(rows)]
        recorder.rewards(ctx.trajs, ctx)
        ctx.batch = assemble(ctx.trajs, 0)
        adv_ST = trainer.stack.objective.advantages(ctx)
        seconds = []
        for _ in range(count):
            start = time.process_time()
            method.advantages(adv_ST, ctx)
            seconds.append(time.process_time() - start)
        print(f"  {rows}: {statistics.median(seconds) * 1e3:.1f} ms", end="")
    print()


def main(words: list[str]) -> None:
    from experiments.bench_rollout import rollout

    parts = {"steps": steps, "hooks": hooks, "buffer": buffer, "startup": startup, "tapo": tapo, "rollout": rollout}
    for name in words or parts:
        if name not in parts:
            sys.exit(f"unknown part '{name}'; choose from {', '.join(parts)}")
        parts[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
