from __future__ import annotations

import itertools
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import environment as machine
from experiments import files
from experiments.records import SCHEMA, Run, RunWriter, find_runs, latest_experiment, load_run, write_json
from methods.errors import ConfigError, RecordError, RunError

META = {"command": "train", "experiment": "e", "arm": "a", "seed": 3, "pair": "seed3", "argv": ["seed=3"]}


def open_run(root, arm="a", seed=3, **limits) -> RunWriter:
    meta = META | {"arm": arm, "seed": seed}
    return RunWriter.open(root / "raw" / "e" / arm / f"seed{seed}", meta, {"trainer": {"lr": 1e-3}}, **limits)


def items(*scores, **more):
    return [{"item_id": f"i{k}", "score": score, **more} for k, score in enumerate(scores)]


# ---------------------------------------------------------------- the record


def test_a_finished_run_reads_back(tmp_path):
    writer = open_run(tmp_path)
    writer.log(1, {"loss": np.float32(0.5), "groups/dead": np.int64(2)})
    writer.log(2, {"loss": 0.25})
    writer.eval(items(1.0, 0.0, length=7, depth=2.5), step=0)
    writer.eval(pd.DataFrame(items(1.0, 1.0)), step=2)
    writer.sample({"step": 2, "prompt": "p", "completion": "\ud800 é", "tokens": ["a"], "advantages": [0.5]})
    assert not load_run(writer.path).finished
    writer.finish({"eval/score": 1.0}, {"generated_tokens": 10})

    run = load_run(writer.path)
    assert run.finished and run.run["status"] == "finished" and run.run["schema"] == SCHEMA
    assert run.run["arm"] == "a" and run.run["pair"] == "seed3" and run.config == {"trainer": {"lr": 0.001}}
    assert run.summary == {"status": "finished", "metrics": {"eval/score": 1.0}, "cost": {"generated_tokens": 10}}
    assert run.metrics()["loss"].tolist() == [0.5, 0.25]
    evals = run.evals()
    assert evals["step"].tolist() == [0, 0, 2, 2] and evals["score"].tolist() == [1, 0, 1, 1]
    assert evals["tier"].tolist() == ["all"] * 4 and evals["split"].unique().tolist() == ["eval"]
    assert evals["depth"].tolist()[:2] == [2.5, 2.5] and evals["depth"].isna().tolist()[2:] == [True, True]
    assert run.samples()[0]["completion"] == "\ud800 é"
    assert run.env["packages"]["numpy"] == np.__version__


def test_nan_and_infinity_become_null(tmp_path):
    writer = open_run(tmp_path)
    writer.log(1, {"loss": math.nan, "norm": np.inf, "list": [1.0, -math.inf], "ok": True, "at": Path("x/y")})
    line = (writer.path / "metrics.jsonl").read_text()
    expected = {"step": 1, "loss": None, "norm": None, "list": [1.0, None], "ok": True, "at": "x/y"}
    assert json.loads(line) == expected and "NaN" not in line
    with pytest.raises(TypeError, match="object cannot be kept"):
        writer.log(2, {"x": object()})
    assert (writer.path / "metrics.jsonl").read_text() == line


def test_lines_of_one_step_are_merged(tmp_path):
    writer = open_run(tmp_path)
    writer.log(2, {"loss": 1.0})
    writer.log(1, {"loss": 3.0})
    writer.log(2, {"loss": 2.0, "kl": 0.5})
    writer.log(2, {"kl": None})
    frame = load_run(writer.path).metrics()
    assert frame["step"].tolist() == [1, 2] and frame["loss"].tolist() == [3, 2] and frame["kl"].iloc[1] == 0.5


def test_an_empty_record_has_empty_frames(tmp_path):
    run = load_run(open_run(tmp_path).path)
    assert len(run.metrics()) == len(run.evals()) == len(run.samples()) == 0
    assert "step" in run.metrics() and "score" in run.evals() and run.summary is None


def test_evaluating_a_step_again_replaces_it(tmp_path):
    writer = open_run(tmp_path)
    writer.eval(items(0.0, 0.0), step=5)
    writer.eval(items(0.5, split="test"), step=5)
    writer.eval(items(1.0), step=5)
    evals = load_run(writer.path).evals()
    assert evals[["split", "score"]].values.tolist() == [["test", 0.5], ["eval", 1.0]]
    with pytest.raises(RecordError, match="Got: no score"):
        writer.eval([{"item_id": "x"}], step=6)


# ---------------------------------------------------------------- kills and resumes


def test_a_line_that_a_kill_cut_off_is_not_read_and_goes_on_resume(tmp_path):
    writer = open_run(tmp_path)
    writer.log(1, {"loss": 1.0})
    with open(writer.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert load_run(writer.path).metrics()["step"].tolist() == [1]
    again = open_run(tmp_path)
    again.log(2, {"loss": 2.0})
    assert load_run(writer.path).metrics()["loss"].tolist() == [1, 2]


def test_cut_drops_everything_after_the_step(tmp_path):
    writer = open_run(tmp_path)
    for step in range(1, 7):
        writer.log(step, {"loss": step})
        writer.sample({"step": step})
        writer.eval(items(step), step)
    with open(writer.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4')
    before = (writer.path / "metrics.jsonl").read_bytes().splitlines()[:4]
    writer.cut(4)
    run = load_run(writer.path)
    assert (writer.path / "metrics.jsonl").read_bytes().splitlines() == before
    assert run.metrics()["step"].max() == run.evals()["step"].max() == run.samples()[-1]["step"] == run.run["step"] == 4
    writer.cut(-1)
    assert len(load_run(writer.path).metrics()) == len(load_run(writer.path).evals()) == 0


def test_taking_up_a_run_keeps_its_history_and_makes_it_unfinished(tmp_path):
    writer = open_run(tmp_path)
    writer.log(1, {"loss": 1.0})
    writer.update(step=1, created="long ago")
    writer.finish({})
    again = open_run(tmp_path)
    run = load_run(again.path)
    assert run.run["created"] == "long ago" and run.run["step"] == 1 and run.run["status"] == "running"
    assert not run.finished and len(run.metrics()) == 1
    assert again.fail("interrupted", "SIGTERM") and load_run(again.path).run["error"] == "SIGTERM"
    assert "error" not in open_run(tmp_path).run
    with pytest.raises(ValueError, match="finished"):
        again.fail("finished")


# ---------------------------------------------------------------- samples


def test_samples_are_capped_and_cover_the_whole_run(tmp_path):
    writer = open_run(tmp_path, max_samples=40, samples_per_step=4)
    for step in range(1, 501):
        for k in range(6):
            writer.sample({"step": step, "k": k})
    rows = load_run(writer.path).samples()
    assert 20 <= len(rows) <= 40
    steps = sorted({row["step"] for row in rows})
    gaps = {b - a for a, b in itertools.pairwise(steps)}
    assert len(gaps) == 1 and steps[0] == 1 and steps[-1] > 400  # evenly spread, late ones kept
    assert [row["k"] for row in rows[:4]] == [0, 1, 2, 3]


def test_a_resumed_run_keeps_the_spacing_of_its_samples(tmp_path):
    writer = open_run(tmp_path, max_samples=8, samples_per_step=2)
    for step in range(1, 30):
        writer.sample({"step": step})
    writer.cut(20)
    again = open_run(tmp_path, max_samples=8, samples_per_step=2)
    kept = [row["step"] for row in load_run(again.path).samples()]
    gap = kept[1] - kept[0]
    assert gap > 1 and not again.sample({"step": kept[-1] + gap - 1}) and again.sample({"step": kept[-1] + gap})


def test_one_step_alone_never_passes_the_cap(tmp_path):
    writer = open_run(tmp_path, max_samples=5, samples_per_step=50)
    kept = [writer.sample({"step": 0}) for _ in range(9)]
    assert kept == [True] * 5 + [False] * 4 and len(load_run(writer.path).samples()) == 5


# ---------------------------------------------------------------- finding runs


def test_runs_are_found_by_arm_and_seed_number(tmp_path):
    for arm, seed in (("b", 10), ("b", 9), ("a", 0)):
        open_run(tmp_path, arm, seed)
    (tmp_path / "raw/e/b/seed11").mkdir()  # killed before its first write
    found = [(run.run["arm"], run.run["seed"]) for run in find_runs(tmp_path, "e")]
    assert found == [("a", 0), ("b", 9), ("b", 10)]
    assert find_runs(tmp_path, "nothing") == []


def test_the_latest_experiment_is_the_one_that_wrote_last(tmp_path):
    assert latest_experiment(tmp_path) is None
    for name, age in (("old", 100), ("new", 50)):
        writer = RunWriter.open(tmp_path / "raw" / name / "a" / "seed0", META, {})
        os.utime(writer.path / "run.json", (1e9 - age, 1e9 - age))
    assert latest_experiment(tmp_path) == "new"
    writer = Run(tmp_path / "raw/old/a/seed0")
    write_json(writer.path / "summary.json", {})
    assert latest_experiment(tmp_path) == "old"


# ---------------------------------------------------------------- what is refused


def test_damaged_missing_and_foreign_records_are_named(tmp_path):
    writer = open_run(tmp_path)
    with pytest.raises(RecordError, match=r"not a run folder.*no run.json"):
        load_run(tmp_path)
    (writer.path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(RecordError, match=r"metrics.jsonl:2"):
        load_run(writer.path).metrics()
    (writer.path / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(RecordError, match="integer"):
        load_run(writer.path).metrics()
    writer.eval(items(1.0), 0)
    whole = (writer.path / "eval.parquet").read_bytes()
    (writer.path / "eval.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match=r"damaged.*eval.parquet"):
        load_run(writer.path).evals()
    write_json(writer.path / "run.json", META | {"schema": SCHEMA + 1})
    with pytest.raises(RecordError, match=rf"another version.*Got: schema {SCHEMA + 1}. Expected: schema {SCHEMA}"):
        load_run(writer.path)
    with pytest.raises(RecordError, match="another version"):
        open_run(tmp_path)
    (writer.path / "run.json").write_text('{"schema": 1')
    with pytest.raises(RecordError, match="damaged"):
        load_run(writer.path)


def test_a_parent_that_is_a_file_is_a_configuration_error(tmp_path):
    (tmp_path / "raw").write_text("I am a file")
    with pytest.raises(ConfigError, match=r"cannot be written.*Not a directory"):
        open_run(tmp_path)
    assert (tmp_path / "raw").read_text() == "I am a file" and os.listdir(tmp_path) == ["raw"]


def test_a_failed_start_leaves_nothing_but_its_neighbours(tmp_path, monkeypatch):
    open_run(tmp_path, "a", 0)
    real = files.os.replace

    def full(source, target):
        if Path(target).name == "run.json":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(RunError, match=r"No space left.*free some space"):
        open_run(tmp_path, "b", 1)
    assert not (tmp_path / "raw/e/b").exists() and (tmp_path / "raw/e/a/seed0/run.json").exists()


def test_a_failed_replacement_keeps_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="errno 28"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert os.listdir(tmp_path) == ["x.json"] and json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_fail_does_not_hide_the_error_that_is_on_its_way(tmp_path, monkeypatch):
    writer = open_run(tmp_path)
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert writer.fail("failed", "loss is NaN") is False
    assert load_run(writer.path).run["status"] == "running"


def test_a_file_size_limit_takes_the_half_written_line_back(tmp_path):
    """A real RLIMIT_FSIZE in a process of its own: the write fails half-way through the second line."""
    writer = open_run(tmp_path)
    writer.log(1, {"text": "x" * 3000})
    code = (
        "import resource, sys; from pathlib import Path; from experiments.records import RunWriter, load_run\n"
        "path = Path(sys.argv[1]); writer = RunWriter(path, load_run(path).run)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: writer.log(2, {'text': 'y' * 3000})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(writer.path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("RunError") and "File too large" in done.stdout and len(done.stdout.splitlines()) == 1
    assert load_run(writer.path).metrics()["step"].tolist() == [1]
    assert (writer.path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


# ---------------------------------------------------------------- the machine


def test_the_environment_is_described_without_importing_anything_heavy():
    code = (
        "import sys, json; from experiments.records import environment; e = environment()\n"
        "print(json.dumps(e)); assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["packages"]["numpy"] == np.__version__ and "torch" in found["packages"]
    assert found["cpu"] and found["cores"] >= 1 and found["gpu"] is None and found["torch_threads"] is None


def test_the_commit_of_a_repository_around_an_installed_copy_is_not_ours(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "a.txt").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "experiments" / "environment.py"))
    commit, dirty = machine._git.__wrapped__()
    assert commit and len(commit) == 40 and dirty is False
    (tmp_path / "results" / "table.md").write_text("made by a report")
    assert machine._git.__wrapped__() == (commit, False)
    (tmp_path / "a.txt").write_text("2")
    assert machine._git.__wrapped__() == (commit, True)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "site-packages" / "experiments" / "environment.py"))
    assert machine._git.__wrapped__() == (None, None)
