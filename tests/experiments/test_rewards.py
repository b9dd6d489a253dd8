"""Rewards: the list, built-in functions, user files and their error paragraphs."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest

from experiments import rewards
from experiments.tasks.arithmetic import Arithmetic
from methods.errors import ConfigError, RunError

CONF = Path(__file__).parents[2] / "conf" / "reward"


@pytest.fixture
def task() -> Arithmetic:
    return Arithmetic(train_rows=6, eval_rows=6, demo_noise=0)


def user_file(folder: Path, body: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(body)
    return folder / name


def one(entry: dict, task) -> rewards.RewardSpec:
    return rewards.build([entry], task)[0]


def test_list_keeps_order_weights_and_roles(task):
    specs = rewards.build(
        [
            {"name": "length", "weight": 0, "role": "aux"},
            {"name": "task"},
            {"name": "tidy", "function": "metric", "weight": 0.5, "role": "format", "kwargs": {"key": "exact_format"}},
        ],
        task,
    )
    assert [(s.name, s.weight, s.role) for s in specs] == [
        ("length", 0.0, "aux"),
        ("task", 1.0, "outcome"),
        ("tidy", 0.5, "format"),
    ]
    rows = task.rows("train", 0)
    texts = [str(r.demo) for r in rows[:3]] + ["", rows[4].answer + "x", "x"]
    assert specs[0].fn(texts, rows) == [float(len(t)) for t in texts]
    assert specs[1].fn(texts, rows) == [1, 1, 1, 0, 0, 0]
    assert specs[2].fn(texts, rows) == [1, 1, 1, 0, 0, 0]


def test_length_in_words(task):
    spec = one({"name": "length", "kwargs": {"unit": "words"}}, task)
    assert spec.fn(["a b  c", ""], task.rows("train", 0)[:2]) == [3.0, 0.0]


def test_metric_that_the_task_does_not_give_does_not_apply(task):
    spec = one({"name": "metric", "kwargs": {"key": "unheard_of"}}, task)
    assert spec.fn(["1"], task.rows("train", 0)[:1]) == [None]


@pytest.mark.parametrize("name", ["task", "task_length", "task_format"])
def test_shipped_yaml(name: str, task):
    yaml = pytest.importorskip("yaml")
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ")
    specs = rewards.build(yaml.safe_load(text)["reward"], task)
    assert (specs[0].name, specs[0].weight, specs[0].role) == ("task", 1.0, "outcome")


def test_user_file(tmp_path: Path, task):
    file = user_file(tmp_path, "def tens(texts, rows, k=1):\n    return [k * len(t) for t in texts]\n")
    (entry,) = rewards.from_path(f"{file}:tens")
    assert (entry["name"], entry["weight"], entry["role"]) == ("tens", 1.0, "outcome")
    assert one(entry, task).fn(["ab", ""], task.rows("train", 0)[:2]) == [2.0, 0.0]
    assert one({**entry, "kwargs": {"k": 3}}, task).fn(["ab"], task.rows("train", 0)[:1]) == [6.0]


def test_user_function_sees_completions_and_rows(tmp_path: Path, task):
    body = "def f(completions, rows):\n    return [float(c == r.answer) for c, r in zip(completions, rows)]\n"
    spec = rewards.from_path(f"{user_file(tmp_path, body)}:f")
    rows = task.rows("train", 0)[:2]
    assert rewards.build(spec, task)[0].fn([rows[0].answer, "x"], rows) == [1.0, 0.0]


def test_none_and_nan_mean_that_a_reward_does_not_apply(tmp_path: Path, task):
    body = "import numpy\ndef f(t, r):\n    return [None, float('nan'), numpy.float32(0.5), True]\n"
    spec = rewards.from_path(f"{user_file(tmp_path, body)}:f")
    assert rewards.build(spec, task)[0].fn(["a"] * 4, task.rows("train", 0)[:4]) == [None, None, 0.5, 1.0]


def test_files_of_one_name_and_changed_files_are_told_apart(tmp_path: Path, task, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = [user_file(tmp_path / d, f"def f(t, r):\n    return [{k}.0] * len(t)\n") for k, d in enumerate("ab")]
    rows = task.rows("train", 0)[:1]
    assert [rewards.build(rewards.from_path(f"{f}:f"), task)[0].fn(["x"], rows) for f in files] == [[0.0], [1.0]]
    before = Path(files[0]).stat()
    user_file(tmp_path / "a", "def f(t, r):\n    return [7.0] * len(t)\n")
    os.utime(files[0], (before.st_atime, before.st_mtime))  # an edit of the same length within one second
    assert rewards.build(rewards.from_path(f"{files[0]}:f"), task)[0].fn(["x"], rows) == [7.0]


@pytest.mark.parametrize(
    ("body", "spec", "says"),
    [
        ("", "{dir}/none.py:f", "No such file"),
        ("def f(t, r): ...\ndef score(t, r): ...\n", "{dir}/mine.py:scor", r"no function 'scor'.*f, score.*'score'"),
        ("f = 3\n", "{dir}/mine.py:f", "no function 'f'"),
        ("def f(t): ...\n", "{dir}/mine.py:f", r"cannot be called with.*f\(t\)"),
        ("x = 1\ndef f(:\n", "{dir}/mine.py:f", r"cannot be imported.*mine\.py:2.*SyntaxError"),
        ("x = 1\n\n1 / 0\n", "{dir}/mine.py:f", r"cannot be imported.*mine\.py:3.*ZeroDivisionError"),
        ("import sys\nsys.exit()\n", "{dir}/mine.py:f", r"cannot be imported.*mine\.py:2.*SystemExit"),
        ("def f(prompts, completions, **kw): ...\n", "{dir}/mine.py:f", r"takes prompts first.*row\.prompt"),
        ("", "mine", "Not a reward function"),
        ("", "{dir}/mine.py:", "Not a reward function"),
    ],
)
def test_user_file_errors(tmp_path: Path, body: str, spec: str, says: str):
    user_file(tmp_path, body)
    spec = spec.format(dir=tmp_path)
    with pytest.raises(ConfigError, match=says) as caught:
        rewards.from_path(spec)
    assert spec in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def f(t, r):\n    return [1.0]\n", r"wrong number of values.*Got: 1.*list of 2"),
        ("def f(t, r):\n    return 1.0\n", "wrong number of values"),
        ("def f(t, r):\n    t == r\n", "returned None"),
        ("def f(t, r):\n    return [1.0, 'good']\n", r"no finite number.*completion 1.*'good'"),
        ("def f(t, r):\n    return [1.0, float('inf')]\n", r"no finite number.*completion 1.*inf"),
        ("def f(t, r):\n\n    return [{}['k'], 1]\n", r"raised an exception.*line 3.*KeyError"),
    ],
)
def test_user_function_errors(tmp_path: Path, task, body: str, says: str):
    spec = f"{user_file(tmp_path, body)}:f"
    fn = rewards.build(rewards.from_path(spec), task)[0].fn
    with pytest.raises(RunError, match=says) as caught:
        fn(["a", "b"], task.rows("train", 0)[:2])
    assert spec in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([], "list is empty"),
        ({"name": "task"}, "list is empty"),
        (["task"], r"mapping.*reward\[0\]"),
        ([{"name": "tsk"}], "did you mean 'task'"),
        ([{"name": "task", "wieght": 1}], "did you mean 'weight'"),
        ([{"name": "task", "weight": "1"}], "finite number"),
        ([{"name": "task", "weight": math.nan}], "finite number"),
        ([{"name": "task", "weight": True}], "finite number"),
        ([{"name": "task", "role": "main"}], "Unknown role"),
        ([{"name": "task"}, {"name": "task", "weight": 0}], "Two rewards are called 'task'"),
        ([{"name": "metric"}], "does not take these arguments"),
        ([{"name": "task", "kwargs": {"k": 1}}], "arguments"),
        ([{"name": "length", "kwargs": {"unit": "miles"}}], "Unknown unit"),
    ],
)
def test_list_errors(task, entries, says: str):
    with pytest.raises(ConfigError, match=says):
        rewards.build(entries, task)
