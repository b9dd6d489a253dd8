"""Shared fixtures: a tiny random model, a task, and trainers over them that take milliseconds per step."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def conf() -> Path:
    return ROOT / "conf"


@pytest.fixture(scope="session")
def data() -> Path:
    """Small real data sets that nobody here wrote; not part of the project."""
    folder = os.environ.get("ASSAY_DATA")
    if not folder:
        pytest.skip("ASSAY_DATA is not set: it names the folder with the real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def arithmetic():
    from experiments.tasks.arithmetic import Arithmetic

    return Arithmetic(name="arithmetic", train_rows=64, eval_rows=12)


@pytest.fixture(scope="session")
def random_model(arithmetic, tmp_path_factory):
    """An untrained tiny model; sharp enough that its samples differ in reward."""
    from experiments.models import Tiny

    os.environ.setdefault("ASSAY_CACHE", str(tmp_path_factory.mktemp("cache")))
    return Tiny(warm_start=None, init_std=0.2).load(arithmetic, 0)


@pytest.fixture
def make_trainer(arithmetic, random_model, tmp_path):
    """make_trainer(methods, objective=..., task=..., loaded=..., **trainer keys) -> AssayTrainer on fresh copies."""
    from omegaconf import OmegaConf

    from experiments import batching
    from experiments.rewards import RewardSpec
    from experiments.run import PromptWrapper, device_arguments
    from methods.stack import Stack

    def make(methods=(), objective=None, *, task=None, loaded=None, reward=None, rewards=None, folder=None, **keys):
        import torch
        from transformers import PrinterCallback, set_seed
        from trl import GRPOConfig

        from experiments.trainer import AssayTrainer
        from methods.objectives.policy_gradient import Grpo

        torch.set_num_threads(1)
        t = {"max_steps": 2, "prompts_per_step": 4, "rollouts_per_prompt": 4, "rows_per_device": None}
        t |= {"updates_per_generation": 1, "iterations": 1, "learning_rate": 1e-3, "seed": 7} | keys
        seed = t.pop("seed")
        learning_rate = t.pop("learning_rate")
        extra = {k: t.pop(k) for k in list(t) if k not in TRAINER_WORDS}
        batches = batching.plan(OmegaConf.create(t), world=1)
        stack = Stack(list(methods), objective or Grpo())
        set_seed(seed)
        args = GRPOConfig(
            output_dir=str(folder or tmp_path / "out"),
            per_device_train_batch_size=batches.rows_per_device,
            gradient_accumulation_steps=batches.accumulation,
            steps_per_generation=batches.slices,
            num_generations=batches.group_size,
            num_iterations=batches.iterations,
            max_steps=t["max_steps"],
            learning_rate=learning_rate,
            logging_steps=1,
            seed=seed,
            **(COMMON | {"beta": stack.objective.beta} | extra),
            **device_arguments(OmegaConf.create({"device": "cpu", "bf16": False, "gradient_checkpointing": False})),
        )
        fn = reward or _digit_share
        task, loaded = task or arithmetic, loaded or random_model
        trainer = AssayTrainer(
            stack=stack,
            rows=task.rows("train", 0),
            rewards=rewards or [RewardSpec("task", fn, 1.0, "outcome")],
            task=task,
            wrap_prompt=PromptWrapper(False),
            seed=seed,
            args=args,
            model=copy.deepcopy(loaded.model),
            processing_class=loaded.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.attach(SimpleCallback(), lambda sample: None)
        return trainer

    return make


TRAINER_WORDS = (
    "max_steps",
    "prompts_per_step",
    "rollouts_per_prompt",
    "rows_per_device",
    "updates_per_generation",
    "iterations",
)
COMMON = {
    "max_completion_length": 6,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "temperature": 1.0,
    "top_k": 0,
    "loss_type": "grpo",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="session")
def digit_share():
    return _digit_share


def _digit_share(texts, rows):
    """A reward that random completions vary: the share of characters that are digits below 5."""
    return [sum(c in "01234" for c in text) / max(len(text), 1) for text in texts]


def SimpleCallback():
    from transformers import TrainerCallback

    return TrainerCallback()


@pytest.fixture
def fake_context():
    """fake_context(trajs, ...) -> a Context over CPU tensors without a trainer."""
    import numpy as np

    from methods.base import Context, assemble

    def make(trajs, *, names=("task",), roles=("outcome",), weights=(1.0,), stack=None, **keys):
        services = SimpleNamespace(
            gather=lambda x: x,
            limits=SimpleNamespace(scale_rewards="group"),
            rng=lambda name: np.random.default_rng(abs(hash(name)) % 2**32),
        )
        ctx = Context(mode="train", step=0, round=0, group_size=0, services=services, **keys)
        ctx.reward_names, ctx.reward_roles, ctx.reward_weights = list(names), list(roles), list(weights)
        ctx.trajs = trajs
        ctx.rewards_all = {n: ctx.reward(n) for n in names}
        ctx.batch = assemble(trajs, 0)
        if stack is not None:
            ctx.signal_fn = stack.signal
        return ctx

    return make
