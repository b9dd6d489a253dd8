"""kill -9 at a random moment, SIGTERM and Ctrl-C: the resumed run's record equals the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

STEPS = 12
WORDS = [
    "name=resume",
    "scale=cpu",
    "model.warm_start=null",
    "model.init_std=0.2",
    "task.train_rows=24",  # six steps an epoch
    "trainer.prompts_per_step=4",
    "trainer.rollouts_per_prompt=4",
    f"trainer.max_steps={STEPS}",
    "trainer.save_every=2",
    "eval.every=4",
    "eval.items=6",
    "eval.samples=2",
    "eval.kl_probe=4",
]
STACKS = {
    "empty": "method=[]",
    "ha_dw": "method=[ha_dw]",
    "ppo": "objective=ppo",
    "srft": "method=[srft]",
    "ziprl": "method=[ziprl_archive,shuffle] method.shuffle.target=ziprl.qualities task=archive_walk",
    "graph_memory": "method=[graph_memory] objective=graph_weights method.graph_memory.memory_questions=8 "
    f"method.graph_memory.weight_questions=16 method.graph_memory.planted=[a,b] reward={__file__}:odd_length",
    "vsrm": "method=[vsrm_chain,overthinking_chain] objective=reinforce_pp task=chain",
}


def odd_length(texts, rows):
    """A reward that an untrained model gets now and then, so that gaps differ from zero."""
    return [float(len(text) % 2) for text in texts]


def command(folder, stack):
    assay = Path(sys.executable).with_name("assay")
    return [str(assay), "train", *WORDS, *STACKS[stack].split(), f"results_dir={folder}"]


def start(folder, stack, cache):
    env = os.environ | {"ASSAY_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command(folder, stack), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder, stack, cache):
    process = start(folder, stack, cache)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return Path(out.strip().splitlines()[-1]), err


def record(run):
    """Metrics without timing, evaluations and samples."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    samples = (run / "samples.jsonl").read_text()
    weights = (run / "model" / "model.safetensors").read_bytes()
    return metrics, pd.read_parquet(run / "eval.parquet"), samples, weights


def steps_done(folder):
    files = list(Path(folder).glob("raw/*/*/seed*/metrics.jsonl"))  # only folders that stay: checkpoints come and go
    return len(files[0].read_bytes().splitlines()) if files else 0


def interrupt(process, folder, step, number):
    """Sends the signal some milliseconds after `step` was logged."""
    deadline = time.time() + 200
    while steps_done(folder) < step:
        assert process.poll() is None and time.time() < deadline, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(random.random() * 0.15)
    process.send_signal(number)
    return process.communicate(timeout=100)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """Uninterrupted runs."""
    return {s: record(finish(tmp_path_factory.mktemp(s), s, cache)[0]) for s in STACKS}


def assert_equal(run, expected):
    metrics, evals, samples, weights = record(run)
    assert metrics == expected[0]
    pd.testing.assert_frame_equal(evals, expected[1], check_exact=True)
    assert samples == expected[2]
    assert weights == expected[3]


@pytest.mark.parametrize("stack", STACKS)
def test_kill_9_and_resume(stack, cache, whole, tmp_path):
    random.seed()
    kills = 2 if stack == "ha_dw" else 1  # twice is the same code once more
    for step in sorted(random.sample(range(1, STEPS - 1), kills)):
        interrupt(start(tmp_path, stack, cache), tmp_path, step, signal.SIGKILL)
        assert not list(tmp_path.rglob("summary.json"))
    run, _ = finish(tmp_path, stack, cache)
    assert_equal(run, whole[stack])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints_and_stops(number, cache, whole, tmp_path):
    process = start(tmp_path, "ha_dw", cache)
    _, err = interrupt(process, tmp_path, 3, number)
    assert process.returncode == 128 + number, err  # 130 for Ctrl-C, as shells have it
    (folder,) = tmp_path.rglob("run.json")
    assert json.loads(folder.read_text())["status"] == "interrupted"
    saved = [p.name for p in tmp_path.rglob("step_*") if p.is_dir()]
    assert len(saved) == 1 and int(saved[0].removeprefix("step_")) >= 3
    run, err = finish(tmp_path, "ha_dw", cache)
    assert f"going on from step {saved[0].removeprefix('step_')}" in err
    assert_equal(run, whole["ha_dw"])


def test_two_runs_with_one_seed_are_equal_and_a_finished_one_is_skipped(cache, whole, tmp_path):
    run, _ = finish(tmp_path, "empty", cache)
    assert_equal(run, whole["empty"])
    before = (run / "summary.json").stat().st_mtime_ns
    again, err = finish(tmp_path, "empty", cache)
    assert again == run and "skipped" in err
    assert (run / "summary.json").stat().st_mtime_ns == before


def test_a_kill_between_the_last_checkpoint_and_the_summary(cache, whole, tmp_path, monkeypatch):
    """Nothing is left to train then: the second sitting only finishes the record."""
    from cli import launch
    from experiments import run as running
    from methods.errors import RunError

    monkeypatch.setenv("ASSAY_CACHE", str(cache))
    line = [*WORDS, STACKS["ha_dw"], f"results_dir={tmp_path}"]
    (job,) = launch.plan("train", line).jobs

    def killed(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(running, "finish", killed)
        with pytest.raises(RunError, match="killed"):
            running.run(job.cfg)
    assert_equal(running.run(job.cfg), whole["ha_dw"])
