"""Every YAML in conf/ composes; every experiment's arms compose and are allowed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from methods.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
FILES = sorted(p.relative_to(CONF).as_posix() for p in CONF.rglob("*.yaml"))
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES)
def test_first_comment_is_one_sentence(file):
    """`assay ls` shows it."""
    lines = (CONF / file).read_text().splitlines()
    sentence = next(line for line in lines if not line.startswith("# @package"))
    assert sentence.startswith("# ") and sentence.endswith((".", "?")) and len(sentence) <= 130, sentence


def test_validate_passes_on_the_whole_tree(capsys):
    from cli.validate import validate

    try:
        validate([])
    except SystemExit as leave:
        assert not leave.code, capsys.readouterr().out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_holds_to_the_rules_of_evidence(name):
    """Eight paired seeds or called a demonstration; the primary comparison is fixed; a smoke variant or a recipe.

    A recipe without a baseline trains the models of one system and compares nothing.
    """
    import yaml

    spec = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
    if name.endswith("_paper") and "baseline" not in spec:
        assert "primary" not in spec and "controls" not in spec
        return
    assert spec["primary"]["arm"] in spec["arms"] and spec["primary"]["arm"] != spec["baseline"]
    assert set(spec.get("controls", {})) <= set(spec["arms"])
    if len(spec["seeds"]) < 8:
        assert "demonstration" in spec["note"].lower()
    assert name.endswith("_paper") or "smoke" in spec


COMMANDS = {"train": [], "eval": [], "judge": [], "synth_data": ["input=x"], "score_transfer": ["domains.path=x"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_configuration(name, capsys):
    module = importlib.import_module(f"cli.{name}")
    command = getattr(module, {"eval": "eval_"}.get(name, name))
    command(COMMANDS[name], cfg="job")
    assert "seed: 0" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--cfg"):
        command(COMMANDS[name], cfg="hydra")
