"""Trains every method for three steps on replayed rollouts, in one process or in several, and keeps what came out.

    python tests/experiments/replay.py FOLDER                                    # draws the rollouts and records them
    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/experiments/replay.py FOLDER

Not a test module: test_processes.py runs it and compares.
"""

from __future__ import annotations

import copy
import pickle
import sys
import zlib
from pathlib import Path

TOOLS = ("autosearch", "search_penalty", "tapo", "search_depth")
CASES = {
    "empty": ["method=[]"],
    "accumulated": ["method=[]", "trainer.rows_per_device=4"],
    "kl": ["method=[]", "objective.beta=0.1"],
    "batch_scale": ["method=[]", "objective.scale_rewards=batch"],
    "two_updates_and_passes": ["method=[ha_dw]", "trainer.iterations=2", "trainer.max_steps=4", "trainer.log_every=2"],
    "bandit_buffer": ["method=[rollout_bandits]", "method.rollout_bandits.mode=both"],
    "bandit_shuffled": ["method=[rollout_bandits,shuffle]", "method.shuffle.target=rollout_bandits.scores"],
    "tapo_shuffled": ["method=[tapo,shuffle]", "method.shuffle.target=tapo.transfer"],
    "stacked": ["method=[tapo,ha_dw]", "objective=dapo"],
    "redrawn": ["method=[]", "objective=dapo", "objective.dynamic_sampling=true"],
}
COMMON = [
    "scale=ddp", "model.warm_start=null", "model.init_std=0.2", "task.train_rows=64", "trainer.prompts_per_step=4",
    "trainer.rollouts_per_prompt=4", "trainer.max_steps=3", "trainer.save_every=0", "trainer.max_completion_tokens=8",
    "trainer.learning_rate=1e-3", "trainer.log_every=1", "trainer.warmup_steps=0",
]  # fmt: skip
MEMORY = ["memory_questions=8", "weight_questions=16", "planted=[a,b]"]


def cases() -> dict[str, list[str]]:
    """Words of every case: the special ones, every objective alone, and every method of conf/method."""
    conf = Path(__file__).resolve().parents[2] / "conf"
    named = dict(CASES)
    for file in sorted((conf / "objective").glob("*.yaml")):
        if "_target_" in file.read_text() and file.stem != "graph_weights":
            named[f"objective {file.stem}"] = ["method=[]", f"objective={file.stem}"]
    for file in sorted((conf / "method").glob("*.yaml")):
        words = [f"method=[{file.stem}]"]
        if file.stem.startswith(("vsrm", "overthinking")):
            words += ["objective=reinforce_pp", "task=chain", "trainer.max_completion_tokens=24"]
        if file.stem.startswith("graph_memory"):
            words += ["objective=graph_weights", *(f"method.graph_memory.{w}" for w in MEMORY)]
        if file.stem.startswith("ziprl"):
            words += ["task=archive_walk"]
        named[file.stem] = words
    return named


def mark(*things: object) -> int:
    return zlib.crc32(repr(things).encode())


def outcome(texts, rows):
    return [float(mark(text, row.id) % 2) for text, row in zip(texts, rows, strict=True)]


def reasoning(texts, rows):
    return [mark("r", text, row.id) % 5 / 4 for text, row in zip(texts, rows, strict=True)]


def enriched(traj, name: str, tokenizer):
    """What a random model does not write: tool calls that rollouts share, and thinking in steps."""
    from methods.base import Turn

    sign, segment = mark(traj.row_id, traj.sample_id, traj.segments[0].completion_ids), traj.segments[0]
    if name.startswith("vsrm") and sign % 4 and traj.row.demo:
        text = traj.row.demo if sign % 2 else traj.row.demo[: len(traj.row.demo) // 2]
        segment.completion_ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        traj.text, traj.turns = text, [Turn(0, 0, len(segment.completion_ids))]
    length = len(segment.completion_ids)
    if name.startswith((*TOOLS, "stacked")) and length > 1:
        call = {"tool": "search", "args": {"query": f"query {sign % 3}"}}
        traj.turns = [Turn(0, 0, length // 2, "call", [call], "found"), Turn(0, length // 2, length)]
    if name.startswith("ziprl"):
        traj.text = str(sign)
        for k, turn in enumerate(traj.turns):
            turn.scores["q_com"] = mark(sign, k) % 7 / 6
    return traj


class Tape:
    """Rollouts and generated texts of a run in one process, played to the processes of another."""

    def __init__(self, file: Path, name: str, tokenizer) -> None:
        self.file, self.name, self.tokenizer = file, name, tokenizer
        self.playing = file.exists()
        self.rollouts, self.texts = pickle.loads(file.read_bytes()) if self.playing else ([], [])
        self.at = 0

    def rollout(self, real):
        def rollout(rows, ctx, default):
            if self.playing:
                calls = [copy.deepcopy(trajs) for step, trajs in self.rollouts if step == ctx.step]
                start, drawn = next(
                    (k, trajs) for trajs in calls for k, t in enumerate(trajs) if t.group_id == ctx.first_group
                )
                trajs = drawn[start : start + len(rows)]
                for t, row in zip(trajs, rows, strict=True):
                    assert t.row_id == row.id
                    t.row = row
                return trajs
            trajs = [enriched(t, self.name, self.tokenizer) for t in real(rows, ctx, default)]
            self.rollouts.append((ctx.step, copy.deepcopy(trajs)))
            return trajs

        return rollout

    def generate(self, real, services):
        def generate(requests, stream):
            if services._apart:  # part of a rollout, which is replayed as a whole
                return real(requests, stream)
            self.at += 1
            if not self.playing:
                self.texts.append(real(requests, stream))
            assert len(self.texts[self.at - 1]) == len(requests)
            return self.texts[self.at - 1]

        return generate

    def keep(self) -> None:
        if not self.playing:
            self.file.write_bytes(pickle.dumps((self.rollouts, self.texts)))


def train(name: str, words: list[str], team, folder: Path) -> dict:
    from hydra.utils import instantiate
    from transformers import PrinterCallback, TrainerCallback

    from experiments import batching, run
    from experiments.bench import configuration
    from experiments.rewards import RewardSpec

    cfg = configuration(*COMMON, f"scale.num_processes={team.size}", *words)
    run.check(cfg)
    task = instantiate(cfg.task)
    task.score = lambda text, row: outcome([text], [row])[0]  # a random model is never right
    loaded = instantiate(cfg.model).load(task, 0)
    specs = [RewardSpec("task", outcome, 1.0, "outcome"), RewardSpec("reasoning", reasoning, 0.0, "aux")]
    batches = batching.plan(cfg.trainer, team.size)
    trainer = run.build_trainer(cfg, batches, task, loaded, task.rows("train", 0), specs, folder / "out", team)
    trainer.remove_callback(PrinterCallback)
    trainer.attach(TrainerCallback(), None)
    tape = Tape(folder / f"{name}.tape", name, loaded.tokenizer)
    trainer.stack.rollout = tape.rollout(trainer.stack.rollout)
    trainer.services.generate = tape.generate(trainer.services.generate, trainer.services)
    trained: list = []
    to_inputs = trainer._to_inputs

    def seen(generated, selected):
        out = to_inputs(generated, selected)
        rows = zip(out["completion_ids"], out["tool_mask"], out["advantages"], strict=True)
        trained.append([(i[m > 0].tolist(), a[m > 0].tolist()) for i, m, a in rows if m.any()])
        return out

    trainer._to_inputs = seen
    trainer.train()
    tape.keep()
    history = trainer.state.log_history
    return {
        "advantages": [sorted(team.joined(rows)) for rows in trained],
        "loss": [(h["loss"], h["grad_norm"]) for h in history if "loss" in h],
        "logs": {k: v for k, v in history[0].items() if not k.startswith("time/")},
        "state": trainer.state_dict(),
        "weights": {k: v.detach().clone() for k, v in loaded.model.state_dict().items()},
    }


def main(folder: Path) -> None:
    import os

    import torch

    from experiments.run import quiet
    from experiments.team import Team

    quiet()
    torch.set_num_threads(1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    team = Team.meet(size, use_cpu=True)
    chosen = sys.argv[2].split(",") if len(sys.argv) > 2 else list(cases())
    for name in chosen:
        result = train(name, cases()[name], team, folder)
        (folder / f"{name}.{size}.{team.rank}").write_bytes(pickle.dumps(result))
        print(name, *result["loss"][-1], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
