"""Arms that start from the run of another arm (`model.init=arm:NAME`)."""

from __future__ import annotations

import pytest

from cli import launch
from cli.launch import plan
from methods.errors import ConfigError, RunError

STAGES = """
title: Two stages against one
command: train
common: [task=arithmetic]
arms:
  second: [model.init=arm:first, trainer.max_steps=30]
  first: [trainer.max_steps=30]
  plain: []
baseline: plain
seeds: [0, 1]
primary: {metric: eval/score, arm: second}
"""

# A run that leaves a summary and says which weights it found; seed 13 of the first stage fails.
RUNNER = """
from pathlib import Path

def run(cfg):
    raw = Path(str(cfg["results_dir"])) / "raw"
    folder = raw / str(cfg["experiment"]) / str(cfg["arm"]) / f"seed{cfg['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    if cfg["seed"] == 13 and str(cfg["arm"]).startswith("first"):
        raise ValueError("unlucky")
    init = cfg["model"]["init"]
    (folder / "found").write_text(str(init and (raw / init / f"seed{cfg['seed']}" / "summary.json").is_file()))
    (folder / "summary.json").write_text("{}")
    return folder
"""


@pytest.fixture
def staged(own_conf):
    (own_conf / "model/tiny.yaml").write_text("name: tiny\nlayers: 2\ninit: null\n")
    (own_conf / "experiment/staged.yaml").write_text(STAGES)
    return own_conf


@pytest.fixture
def runner(tmp_path, monkeypatch):
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "staged_runner.py").write_text(RUNNER)
    monkeypatch.syspath_prepend(str(folder))
    return "staged_runner:run"


def refused(*line):
    with pytest.raises(ConfigError) as error:
        plan("train", line)
    return str(error.value)


def test_the_earlier_stage_runs_first_and_is_found(staged, runner, tmp_path):
    made = plan("train", ["experiment=staged", f"results_dir={tmp_path}/r", "jobs=2"])
    first, second = ([job.label for job in stage] for stage in launch.stages(made.jobs))
    assert first == ["first/seed0", "first/seed1", "plain/seed0", "plain/seed1"]
    assert second == ["second/seed0", "second/seed1"]
    path = launch.launch(made, target=runner)
    assert [(path / label / "found").read_text() for label in second] == ["True", "True"]


def test_another_name_and_a_sweep_find_their_own_first_stage(staged):
    line = ["experiment=staged", "name=mine", "trainer.max_steps=10,20", "seeds=3"]
    inits = [str(job.cfg.model.init) for job in plan("train", line, multirun=True).jobs]
    assert inits == ["mine/first,trainer.max_steps=10", "mine/first,trainer.max_steps=20", *["None"] * 4]


def test_a_sweep_may_vary_what_an_arm_sets(staged):
    line = ["experiment=staged", "arms=[first]", "trainer.max_steps=10,20", "seeds=3"]
    assert [job.cfg.trainer.max_steps for job in plan("train", line, multirun=True).jobs] == [10, 20]
    assert "what arm 'first' is about" in refused("experiment=staged", "arms=[first]", "trainer.max_steps=10")


def test_a_first_stage_that_is_neither_asked_for_nor_there_is_refused(staged, tmp_path):
    line = ["experiment=staged", "arms=[second]", "seeds=0", f"results_dir={tmp_path}/r"]
    assert "run the arm 'first' too" in refused(*line)
    folder = tmp_path / "r/raw/staged/first/seed0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    assert [job.label for job in plan("train", line).jobs] == ["second/seed0"]


def test_a_failed_first_stage_stops_only_what_starts_from_it(staged, runner, tmp_path, capsys):
    made = plan("train", ["experiment=staged", "seeds=[0,13]", f"results_dir={tmp_path}/r", "jobs=1"])
    with pytest.raises(RunError, match="unlucky"):
        launch.launch(made, target=runner)
    found = sorted(f"{p.parent.parent.name}/{p.parent.name}" for p in (tmp_path / "r").rglob("summary.json"))
    assert found == ["first/seed0", "plain/seed0", "plain/seed13", "second/seed0"]
    assert "second/seed13 does not start: first/seed13" in capsys.readouterr().err


def test_hydra_s_launcher_keeps_the_order(staged, runner, tmp_path):
    line = ["experiment=staged", "seeds=0", f"results_dir={tmp_path}/r", "hydra/launcher=joblib"]
    path = launch.launch(plan("train", [*line, "hydra.launcher.n_jobs=1"]), target=runner)
    assert (path / "second/seed0/found").read_text() == "True"


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("arm:first", "arm:frist", "did you mean 'first'"),
        ("first: [", "first: [model.init=arm:second, ", "in a circle"),
        ("arm:first", "arm:second", "in a circle"),
    ],
)
def test_mistakes_in_the_file(staged, old, new, part):
    file = staged / "experiment/staged.yaml"
    file.write_text(file.read_text().replace(old, new))
    assert part in refused("experiment=staged")


def test_outside_an_experiment_there_are_no_arms(staged):
    assert "another arm of an experiment" in refused("model.init=arm:first")
