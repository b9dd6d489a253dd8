"""A method outside the clone, as the README shows it: listed, validated, trained, its effect in the record."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def plugin(tmp_path):
    """The README's method in a package of the user's own, with its YAML folder."""
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (tmp_path / "my_methods.py").write_text(source)
    folder = tmp_path / "my_conf" / "method"
    folder.mkdir(parents=True)
    (folder / "halve.yaml").write_text("# @package method.halve\n# Halves late credit.\n_target_: my_methods.Halve\n")
    return tmp_path


def assay(folder, *words, cache):
    env = os.environ | {"PYTHONPATH": str(folder), "ASSAY_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    line = [str(Path(sys.executable).with_name("assay")), *words, "--config-dir", str(folder / "my_conf")]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=200)


def test_the_readmes_method(plugin, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    listed = assay(plugin, "ls", "methods", cache=cache)
    assert "halve" in listed.stdout and "Halves late credit." in listed.stdout
    valid = assay(plugin, "validate", cache=cache)
    assert valid.returncode == 0, valid.stdout + valid.stderr
    words = ["method=[ha_dw,halve]", "model.warm_start=null", "model.init_std=0.2", "task.train_rows=64", "scale=cpu"]
    words += ["trainer.max_steps=2", "trainer.save_every=2", "eval.every=0", "eval.items=3", "eval.kl_probe=0"]
    done = assay(plugin, "train", *words, f"results_dir={plugin / 'out'}", cache=cache)
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.strip().splitlines()[-1])
    assert "halve" in (run / "config.yaml").read_text()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("time/hook/halve" in m and "ha_dw/prior" in m for m in metrics)
    refused = assay(plugin, "train", *words, "objective=gspo", "name=b", cache=cache)
    assert refused.returncode == 2 and "gspo_token" in refused.stderr
