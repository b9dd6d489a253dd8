"""Runs on two processes from the command line: killed, stopped and resumed exactly; refused lines; supervised runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

STEPS = 12
TWO = ["scale=ddp", "scale.num_processes=2"]
WORDS = [
    "name=team", "model.warm_start=null", "model.init_std=0.2", "task.train_rows=64", "trainer.prompts_per_step=4",
    "trainer.rollouts_per_prompt=4", f"trainer.max_steps={STEPS}", "trainer.save_every=2", "eval.every=4",
    "eval.items=6", "eval.samples=2", "eval.kl_probe=4", f"reward={__file__}:odd_length",
]  # fmt: skip
METHODS = ["method=[ha_dw,rollout_bandits]", "method.rollout_bandits.mode=both"]


def odd_length(texts, rows):
    return [float(len(text) % 2) for text in texts]


def start(folder, *words, cache):
    assay = Path(sys.executable).with_name("assay")
    (Path(folder) / "tmp").mkdir(exist_ok=True, parents=True)
    env = os.environ | {"ASSAY_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"TMPDIR": str(Path(folder) / "tmp")}
    line = [str(assay), "train", *WORDS, *words, f"results_dir={folder}/results"]
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder, *words, cache):
    process = start(folder, *words, cache=cache)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return Path(out.strip().splitlines()[-1]), err


def record(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    weights = (run / "model" / "model.safetensors").read_bytes()
    return metrics, pd.read_parquet(run / "eval.parquet"), (run / "samples.jsonl").read_text(), weights


def pids(folder):
    return {f.stem: int(f.read_text()) for f in Path(folder).glob("tmp/assay-*/rank*.pid") if f.read_text()}


def reach(process, folder, step):
    deadline = time.time() + 400
    while True:
        files = list(Path(folder).glob("results/raw/*/*/seed*/metrics.jsonl"))  # checkpoints come and go
        if files and len(files[0].read_bytes().splitlines()) >= step:
            return
        assert process.poll() is None and time.time() < deadline, process.communicate()[1]
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    return record(finish(tmp_path_factory.mktemp("whole"), *TWO, *METHODS, cache=cache)[0])


def assert_equal(run, expected):
    metrics, evals, samples, weights = record(run)
    assert metrics == expected[0]
    pd.testing.assert_frame_equal(evals, expected[1], check_exact=True)
    assert samples == expected[2] and weights == expected[3]


@pytest.mark.parametrize("victim", ["rank1", "rank0"])
def test_a_killed_process_ends_the_run_with_its_cause_and_it_resumes_exactly(victim, cache, whole, tmp_path):
    process = start(tmp_path, *TWO, *METHODS, cache=cache)
    reach(process, tmp_path, 5)
    both = pids(tmp_path)
    os.kill(both[victim], signal.SIGKILL)
    begun = time.time()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and time.time() - begun < 120
    errors = [line for line in err.splitlines() if "assay: error" in line]
    assert len(errors) == 1 and f"process {victim[-1]} of 2" in errors[0] and "Traceback" not in err
    assert not any(alive(pid) for pid in both.values())
    (file,) = tmp_path.rglob("run.json")
    assert json.loads(file.read_text())["status"] == "failed" and "was killed" in json.loads(file.read_text())["error"]
    run, err = finish(tmp_path, *TWO, *METHODS, cache=cache)
    assert "going on from step" in err
    assert_equal(run, whole)


def test_a_killed_parent_takes_the_processes_along(cache, whole, tmp_path):
    process = start(tmp_path, *TWO, *METHODS, cache=cache)
    reach(process, tmp_path, 3)
    both = pids(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    run, _ = finish(tmp_path, *TWO, *METHODS, cache=cache)  # at once: the record waits until nobody writes it
    assert not any(alive(pid) for pid in both.values())
    assert_equal(run, whole)


def test_a_signal_stops_all_processes_at_the_same_step(cache, whole, tmp_path):
    process = start(tmp_path, *TWO, *METHODS, cache=cache)
    reach(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    (file,) = tmp_path.rglob("run.json")
    assert json.loads(file.read_text())["status"] == "interrupted"
    assert_equal(finish(tmp_path, *TWO, *METHODS, cache=cache)[0], whole)


def test_supervised_steps_of_two_processes_equal_those_of_one(cache, tmp_path):
    words = ["objective=sft", "trainer.learning_rate=1e-3", "eval.every=0"]
    runs = [finish(tmp_path / str(len(how)), *words, *how, cache=cache)[0] for how in (["scale=cpu"], TWO)]
    one, two = ([json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in runs)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["cost/trained_tokens"] == b["cost/trained_tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_tools_and_a_reward_that_fails_on_one_process(cache, tmp_path):
    run, _ = finish(tmp_path / "a", *TWO, "task=search_world", "method=[autosearch_world]", "trainer.max_steps=2",
                    cache=cache)  # fmt: skip
    assert len(record(run)[0]) == 2
    broken = tmp_path / "broken.py"
    broken.write_text("import os\n\ndef score(texts, rows):\n    return [float(len(t)) for t in texts] if "
                      "os.environ['RANK'] == '0' else [float('inf')] * len(texts)\n")  # fmt: skip
    process = start(tmp_path / "b", *TWO, f"reward={broken}:score", cache=cache)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and err.count("assay: error") == 1 and "no finite number" in err, err


@pytest.mark.parametrize("words, said", [
    (["scale=ddp", "scale.num_processes=8"], "more processes than prompts"),
    (["scale=ddp", "scale.num_processes=3"], "do not divide by the processes"),
    (["scale=ddp"], "no GPU here"),
    (["scale=zero3"], "no GPU here"),
    (["scale=gpu"], "no GPU here"),
    (["scale=cpu", "scale.num_processes=2"], "no key 'scale.num_processes'"),
])  # fmt: skip
def test_refused_before_anything_is_written(words, said, cache, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    process = start(tmp_path, *words, cache=cache)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and said in err and err.count("\n") < 4, err
    assert not (tmp_path / "results").exists()
