"""What a user reads when a library, or code of their own, fails on the way."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from experiments.engines.build import instantiate
from experiments.files import os_errors
from experiments.run import build_stack
from methods.errors import ConfigError, RunError, raised_at


def test_the_place_is_the_users_own_line_and_not_the_librarys(tmp_path):
    source = "import json\n\ndef advantages():\n    return json.loads('{')\n"
    names: dict = {}
    exec(compile(source, str(tmp_path / "mine.py"), "exec"), names)
    with pytest.raises(ValueError) as raised:
        names["advantages"]()
    assert raised_at(raised.value) == f"{tmp_path / 'mine.py'}:4 in advantages"


def test_a_full_disk_reads_alike_whichever_library_met_it(tmp_path):
    with pytest.raises(RunError, match=r"Writing a file failed.*free some space"), os_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="another"), os_errors(tmp_path):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    "target, said",
    [
        ("my_metods.Halve", r"No module named 'my_metods'.*PYTHONPATH"),
        ("methods.base.Metod", "methods.base.Metod"),
    ],
)
def test_a_class_that_is_not_found_says_what_python_said(target, said):
    with pytest.raises(ConfigError, match=said) as raised:
        instantiate(OmegaConf.create({"_target_": target}))
    assert "HYDRA_FULL_ERROR" not in str(raised.value)


def test_a_stack_takes_methods_only():
    node = {"_target_": "builtins.dict"}
    objective = {"_target_": "methods.objectives.policy_gradient.Grpo"}
    cfg = OmegaConf.create({"method": {"mine": node}, "objective": objective})
    with pytest.raises(ConfigError, match=r"no method.*builtins.dict.*subclass"):
        build_stack(cfg)
