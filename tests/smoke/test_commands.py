"""The commands end to end on a tiny model: sft and its resume, a study, a sweep with its report, eval of a run."""

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
import yaml

TINY = ["model.warm_start.steps=20", "task.train_rows=200"]
SHORT = [
    "trainer.max_steps=2",
    "trainer.save_every=2",
    "eval.every=2",
    "eval.items=6",
    "eval.samples=2",
    "eval.kl_probe=2",
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return os.environ | {"ASSAY_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def assay(environment, tmp_path):
    def call(command, *words):
        line = [str(Path(sys.executable).with_name("assay")), command, *words]
        line += ["--results-dir", str(tmp_path)] if command == "report" else [f"results_dir={tmp_path}"]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=280, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return call


def test_a_sweep_makes_one_table_and_is_skipped_the_second_time(assay, tmp_path):
    words = ["-m", "method=[],[ha_dw]", "objective=grpo,gspo", "seed=0,1", "scale=cpu", *TINY, *SHORT]
    assay("train", *words)
    runs = list(tmp_path.rglob("summary.json"))
    assert len(runs) == 8
    before = {p: p.stat().st_mtime_ns for p in runs}
    assay("train", *words)
    assert {p: p.stat().st_mtime_ns for p in runs} == before
    out, _ = assay("report")
    table = Path(out.strip().splitlines()[-1])
    assert table.name == "table.md" and "demonstration" in table.read_text()
    frame = pd.read_csv(table.with_name("runs.csv"))
    assert len(frame) == 8 and frame["arm"].nunique() == 4
    assert {p.suffix for p in table.with_name("figures").iterdir()} == {".png", ".svg"}


def test_a_finished_run_is_evaluated_and_started_from(assay, tmp_path):
    out, _ = assay("train", "name=first", "method=[ha_dw]", "scale=cpu", *TINY, *SHORT)
    run = Path(out.strip().splitlines()[-1])
    state = json.loads((run / "model" / "state.json").read_text())
    assert state["state"]["trainer"]["stack"]["methods"]["ha_dw"]["beliefs"]
    out, _ = assay("eval", f"model.init={run}", "method=[ha_dw]", "eval.items=9", "name=scored")
    assert "score" in out and "95 %" in out
    record = pd.read_parquet(Path(out.strip().splitlines()[-1]) / "eval.parquet")
    assert len(record) == 9 and record["score"].between(0, 1).all()
    out, _ = assay("train", "name=second", f"model.init={run}", "scale=cpu", "task.train_rows=200", *SHORT)
    before = json.loads((Path(out.strip().splitlines()[-1]) / "run.json").read_text())["before"]
    spent = json.loads((run / "summary.json").read_text())["cost"]
    assert before["step"] == 2 and before["cost/generated_tokens"] == spent["generated_tokens"] > 0


def test_study(assay, tmp_path):
    assay("eval", "experiment=ha_dw_bias", "smoke=true", "report=false")
    frames = [pd.read_parquet(p) for p in tmp_path.rglob("eval.parquet")]
    assert len(frames) == 4
    for frame in frames:
        assert frame["gap"].abs().mean() < 0.3 and {"closed_form", "p"} <= set(frame)


SFT = ["objective=sft", "method=[]", "name=sft", "scale=cpu", "model.warm_start=null", "task.train_rows=200"]
SFT += ["trainer.max_steps=30", "trainer.save_every=5", "trainer.learning_rate=3e-3", "eval.every=10", "eval.items=6"]
SFT += ["eval.kl_probe=2", "trainer.prompts_per_step=32"]


def metrics(folder):
    (path,) = Path(folder).rglob("metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_sft_learns_and_resumes_exactly(environment, tmp_path):
    def start(folder):
        line = [str(Path(sys.executable).with_name("assay")), "train", *SFT, f"results_dir={folder}"]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(whole)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    process = start(cut)
    while not list(cut.glob("raw/*/*/seed0/checkpoints/step_10")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(cut)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert metrics(cut) == metrics(whole)
    losses = [m["loss"] for m in metrics(whole)]
    assert losses[-1] < losses[0]


EXPERIMENTS = Path(__file__).resolve().parents[2] / "conf" / "experiment"


def trained() -> list:
    """One experiment of each task; its others, which go through the same code, are slow tests."""
    found, tasks = [], set()
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        plan = yaml.safe_load(path.read_text())
        if "smoke" in plan and plan["command"] == "train":
            task = next((word for word in plan.get("common", []) if word.startswith("task=")), None)
            found.append(pytest.param(path.stem, marks=[pytest.mark.slow] if task in tasks else []))
            tasks.add(task)
    return found


@pytest.mark.parametrize("name", trained())
def test_smoke_variant_of_every_trained_experiment(name, assay, tmp_path):
    """Every arm of the smoke variant trains, and the report has the primary comparison of the file."""
    plan = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    taken = {word.partition("=")[0] for arm in plan["arms"].values() for word in arm}
    taken |= {"model.warm_start.steps"} if "model.warm_start=null" in plan["common"] else set()
    words = [word for word in TINY if word.partition("=")[0] not in taken]
    out, _ = assay("train", f"experiment={name}", "smoke=true", "scale=cpu", *words)
    table = (tmp_path / f"{name}-smoke" / "table.md").read_text()
    primary = plan["primary"]["metric"]
    assert primary in table and "demonstration" in table
    assert "table.md" in out or "raw" in out.strip().splitlines()[-1]
