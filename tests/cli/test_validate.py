from __future__ import annotations

import pytest

from cli import validate
from methods.errors import ConfigError

MODULE = '''
from dataclasses import dataclass, field
from methods.base import Method

@dataclass
class Good(Method):
    """Good."""
    k: int = 1
    shares: tuple = (0.5, 0.5)
    names: list = field(default_factory=list)
    def __post_init__(self):
        if self.k < 0:
            raise ValueError("k is negative")

class Other:
    def __init__(self, k=1): ...
'''
HEAD = "# @package method.own_plug\n_target_: own_plug.Good\n"


@pytest.fixture
def own(conf, tmp_path, monkeypatch):
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "own_plug.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "own/method").mkdir(parents=True)
    return tmp_path / "own"


def verdict(own, text: str, name: str = "method/own_plug.yaml") -> tuple[bool, str]:
    file = own / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return validate.check(file, [own])


def test_a_good_method_passes(own):
    failed, text = verdict(own, HEAD + "k: 1\nshares: [0.5, 0.5]\nnames: []\n")
    assert not failed, text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("_target_: own_plug.Good\nk: 1\nshares: [0.5, 0.5]\nnames: []\n", "# @package method.own_plug"),
        (HEAD + "k: 1\nshares: [0.5, 0.5]\nnames: []\nq: 2\n", "no parameter 'q'"),
        (HEAD + "k: 2\nshares: [0.5, 0.5]\nnames: []\n", "default of 'k' differs"),
        (HEAD + "k: 1\nnames: []\n", "'shares' is missing"),
        (HEAD.replace("Good", "Goood") + "k: 1\n", "did you mean 'Good'"),
        (HEAD.replace("Good", "Other") + "k: 1\n", "is no method"),
        (HEAD.replace("own_plug.Good", "absent_plug.Good") + "k: 1\n", "cannot be imported"),
        ("# @package method.own_plug\nk: 1\n", "names no class"),
        ("k: [1\n", "no valid YAML"),
    ],
)
def test_what_is_wrong_with_a_method_is_said(own, text, part):
    failed, words = verdict(own, text)
    assert failed and part in words


def test_a_variant_may_differ_but_must_construct(own):
    variant = HEAD + "k: 5\nshares: [1.0]\nnames: []\n"
    assert not verdict(own, variant, "method/own_plug_code.yaml")[0]
    failed, words = verdict(own, variant.replace("k: 5", "k: -1"), "method/own_plug_code.yaml")
    assert failed and "k is negative" in words


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("baseline: plain", "baseline: plane", "baseline names no arm"),
        (
            "baseline: plain",
            "baseline: plain\naxis: {groups: {all: {plane: 0}}}",
            "axis.groups.all: plane names no arm",
        ),
        ("baseline: plain", "baseline: plain\nlogged: {arms: [plane]}", "logged.arms: plane names no arm"),
        ("baseline: plain", "baseline: plain\nlogged: {panels: [loss]}", "logged.panels holds names and values"),
        ("title: ", "titel: ", "no key 'titel'"),
        ("direction: higher", "direction: up", "direction"),
        ("seeds: [0, 1, 2]", "seeds: [0, 0]", "different integers"),
        ("smoke: {seeds", "smoke: {seed", "smoke has no key 'seed'"),
        ("arm: alpha}", "arm: beta}", "primary.arm names no arm"),
        ("trainer.max_steps=2]", "trainer.max_stepz=2]", "trainer.max_stepz"),
        ("method.alpha.k=5", "method.alpha.k=x", "wrong type"),
        ("method.alpha.k=5", "{a: 1}", "list of overrides"),
        ("command: train", "command: trian", "train or eval"),
    ],
)
def test_what_is_wrong_with_an_experiment_is_said(own_conf, monkeypatch, old, new, part):
    monkeypatch.setattr("cli.checks._run_check", lambda: None)
    file = own_conf / "experiment/duel.yaml"
    assert validate.check(file, [])[1] == "2 arms, 6 runs"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    failed, words = validate.check(file, [])
    assert failed and part in words


def test_nothing_to_check_is_a_mistake(tmp_path):
    with pytest.raises(ConfigError, match="no YAML file"):
        validate.find([tmp_path])
