"""`assay report --shift` from the command line: words to settings, the last line, and wrong input."""

from __future__ import annotations

import re

import pytest

from cli import main as door
from cli.report import _amended, _is_override
from experiments.records import RunWriter
from experiments.weights import export
from methods.errors import ConfigError

TASK = {"_target_": "experiments.tasks.arithmetic.Arithmetic", "name": "arithmetic", "train_rows": 64, "eval_rows": 12}
MODEL = {"_target_": "experiments.models.Tiny", "warm_start": None, "init_std": 0.2, "init": None}


@pytest.fixture(scope="module")
def results(random_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    config = {"experiment": "exp", "arm": "grpo", "seed": 0, "task": {**TASK, "demo_noise": 0.2}, "model": MODEL}
    path = root / "raw" / "exp" / "grpo" / "seed0"
    RunWriter.open(path, {"experiment": "exp", "arm": "grpo", "seed": 0}, {**config, "eval": {"split": "eval"}})
    export(random_model.model, random_model.tokenizer, path / "model")
    return root


@pytest.fixture
def assay(results, capsys):
    """assay(*words) -> (exit code, stdout, stderr) of `assay report` on these results."""

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            door.main(["report", "--results-dir", str(results), *words])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_the_last_line_is_the_path(assay, results):
    code, out, _ = assay("--shift", "start", "exp/grpo", "--items", "4", "task.demo_noise=0")
    path = results / "exp" / "shift" / "table.md"
    assert code == 0 and out.splitlines()[-1] == str(path) and path.is_file()
    assert re.search(r"on 4 responses with \d+ tokens: demonstrations of task arithmetic", out)
    assert "| grpo       | 0.000 [0.000, 0.000]" in out  # the export is the start itself


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shift", "exp/grpo"], "put 'start' before a run"),
        (["--shift", "start", "exp/gpro"], "did you mean 'exp/grpo'"),
        (["--shift", "start", "exp/grpo", "--texts", "nowhere.jsonl"], "no file with texts"),
        (["--shift", "start", "exp/grpo", "task.demo_nose=0"], "did you mean 'task.demo_noise'"),
        (["--shift", "start", "exp/grpo", "trainer.max_steps=3"], "settings of the task"),
        (["--shift", "start", "exp/grpo", "--power"], "do not go with --shift"),
        (["--shift", "start", "exp/grpo", "--items", "0"], "at least one response"),
        (["exp", "--texts", "greedy"], "add --shift"),
    ],
)
def test_wrong_input_is_one_paragraph(words, message, assay, results):
    code, out, err = assay(*words)
    assert code == 2 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("assay: error:")]
    assert message in line and not out
    assert not (results / "selected").exists()


def test_overrides_change_the_run_s_settings():
    stored = {"task": dict(TASK, demo_noise=0.2), "eval": {"split": "eval", "seed": 0}, "model": MODEL}
    amended = _amended(stored, ["task.demo_noise=0", "eval.split=test"], ())
    assert amended["task"] == {**TASK, "demo_noise": 0} and amended["eval"] == {"split": "test", "seed": 0}
    assert stored["task"]["demo_noise"] == 0.2
    other = _amended({}, ["task=arithmetic", "task.eval_rows=6"], ())
    assert other["task"]["eval_rows"] == 6 and other["eval"]["split"] == "eval"
    with pytest.raises(ConfigError, match="task=NAME"):
        _amended({}, ["task.eval_rows=6"], ())


def test_a_folder_whose_name_looks_like_an_override_is_a_folder(tmp_path):
    (tmp_path / "raw" / "trainer.max_steps=3").mkdir(parents=True)
    assert not _is_override("trainer.max_steps=3", str(tmp_path))
    assert _is_override("task.demo_noise=0", str(tmp_path)) and not _is_override("exp/grpo", str(tmp_path))
