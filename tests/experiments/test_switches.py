"""Memory and speed switches, each for two steps on the CPU: LoRA, checkpointing, bf16, attention, trackers."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest
import torch

from experiments import run as runs
from experiments import tracking
from methods.errors import ConfigError

WORDS = [
    "scale=cpu", "trainer.max_steps=2", "trainer.prompts_per_step=2", "trainer.rollouts_per_prompt=4",
    "task.train_rows=8", "trainer.save_every=0", "eval.every=0", "eval.items=2", "eval.samples=1", "eval.kl_probe=0",
    "name=switch", "trainer.warmup_steps=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(random_model, tmp_path_factory):
    from experiments.weights import export

    return export(random_model.model, random_model.tokenizer, tmp_path_factory.mktemp("weights") / "model")


@pytest.fixture
def train(conf, folder, digit_share, tmp_path, monkeypatch):
    """train(words...) -> (run folder, lines of metrics), with a reward that a random model varies."""
    from hydra import compose, initialize_config_dir

    from experiments import rewards

    spec = rewards.RewardSpec("task", digit_share, 1.0, "outcome")
    monkeypatch.setattr(rewards, "build", lambda *_: [spec])

    def make(*words):
        with initialize_config_dir(str(conf), version_base=None):
            line = [*WORDS, "model=hf", f"model.path={folder}", f"results_dir={tmp_path}", *words]
            path = runs.run(compose("train", line))
        return path, [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]

    return make


@pytest.mark.slow
def test_lora_trains_adapters_alone_and_exports_a_whole_model(train, folder):
    from safetensors.torch import load_file

    path, lines = train("model.lora={r: 4}", "trainer.learning_rate=0.1")
    assert len(lines) == 2 and lines[0]["grad_norm"] > 0
    before, after = load_file(folder / "model.safetensors"), load_file(path / "model" / "model.safetensors")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all("proj" in name for name in moved) and before.keys() == after.keys()


@pytest.mark.slow
def test_checkpointing_and_attention_change_memory_and_not_the_numbers(train, tmp_path):
    _, plain = train("arm=plain")
    for words in (["scale.gradient_checkpointing=true"], ["model.attn_implementation=eager"]):
        _, lines = train(f"arm={words[0].split('=')[0]}", *words)
        for a, b in zip(plain, lines, strict=True):
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_bf16_autocast_is_near_and_not_equal(train):
    _, plain = train("arm=plain", "trainer.max_steps=1")
    _, half = train("arm=half", "trainer.max_steps=1", "scale.bf16=true")
    a, b = plain[0]["grad_norm"], half[0]["grad_norm"]
    assert a != b and abs(a - b) < 0.5 * a


@pytest.mark.slow
@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_metrics_and_evaluations(train):
    path, _ = train("record.report_to=tensorboard")
    (file,) = (path / "tensorboard").iterdir()
    assert b"eval/score" in file.read_bytes() and b"advantage/abs" in file.read_bytes()


def test_trackers_are_checked_before_anything_starts(monkeypatch):
    tracking.check("none")
    with pytest.raises(ConfigError, match=r"unknown tracker.*did you mean 'wandb'"):
        tracking.check("wandbb")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed.*pip install wandb"):
        tracking.check("wandb")


def test_every_scale_composes_and_names_itself(conf, monkeypatch):
    from hydra import compose, initialize_config_dir

    from experiments import launching

    monkeypatch.setattr(launching, "gpus", lambda: 8)
    for file in sorted((conf / "scale").glob("*.yaml")):
        with initialize_config_dir(str(conf), version_base=None):
            cfg = compose("train", [f"scale={file.stem}", "trainer.prompts_per_step=16", "method=[ha_dw]"])
        assert cfg.scale.name == file.stem
        runs.check(cfg)
        assert launching.processes(cfg.scale) == (8 if "num_processes" in cfg.scale else 1)
    assert "trackio" not in sys.modules and "wandb" not in sys.modules
