"""A small configuration tree of its own, so that these tests do not depend on what conf/ holds today."""

from __future__ import annotations

from pathlib import Path

import pytest

FILES = {
    "train.yaml": """
defaults:
  - model: tiny
  - task: arithmetic
  - objective: grpo
  - method: []
  - _self_
seed: 0
experiment: null
arm: null
name: null
results_dir: results
method: {}
open: {}
extra: {}
trainer:
  max_steps: 60
  learning_rate: 3.0e-4
  rows_per_device: null
  shuffle: true
  schedule: constant
  steps_twice: ${trainer.max_steps}
""",
    "model/tiny.yaml": "name: tiny\nlayers: 2\n",
    "model/big.yaml": "name: big\n",
    "task/arithmetic.yaml": "# Chains of sums.\nname: arithmetic\ntiers: [easy, hard]\n",
    "task/file.yaml": "# Your own file.\nname: file\npath: ???\n",
    "suite/all.yaml": "name: all\n",
    "extra/more.yaml": "y: 1\n",
    "objective/grpo.yaml": "# GRPO.\nname: grpo\n",
    "objective/gspo.yaml": "# GSPO.\nname: gspo\n",
    "method/alpha.yaml": "# @package method.alpha\n# Alpha changes nothing.\n_target_: nowhere.Alpha\nk: 1\n",
    "method/alpha_code.yaml": "# @package method.alpha\n# Alpha as released.\n_target_: nowhere.Alpha\nk: 3\n",
    "method/beta.yaml": "# @package method.beta\n# Beta changes little.\n_target_: nowhere.Beta\nk: 2\n",
    "method/loose.yaml": "# Has no header.\n_target_: nowhere.Loose\n",
    "experiment/duel.yaml": """
title: Alpha against nothing
command: train
common: [task=arithmetic, trainer.max_steps=30]
arms:
  plain: ["method=[]"]
  alpha: ["method=[alpha]", method.alpha.k=5]
baseline: plain
seeds: [0, 1, 2]
primary: {metric: eval/score, direction: higher, arm: alpha}
smoke: {seeds: [0, 1], overrides: [trainer.max_steps=2], arms: [plain, alpha]}
""",
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip("\n"))
    return root


@pytest.fixture(scope="session")
def shared_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree") / "conf", FILES)


@pytest.fixture
def conf(shared_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tree, in the place of conf/; shared by all tests, which only read it."""
    from cli import compose

    monkeypatch.setattr(compose, "main_conf", lambda: shared_tree)
    return shared_tree


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of the test's own, to change."""
    from cli import compose

    root = write_tree(tmp_path / "conf", FILES)
    monkeypatch.setattr(compose, "main_conf", lambda: root)
    return root


RUNNER = '''
import os, signal, sys, time
from pathlib import Path

def run(cfg):
    """A run that leaves a file, fails on seed 13, dies on seed 14, and on seeds of 100 and more waits for a signal."""
    seed = cfg["seed"]
    folder = Path(str(cfg["results_dir"])) / "raw" / str(cfg["experiment"]) / str(cfg["arm"]) / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    print("step 1", file=sys.stderr, flush=True)
    if seed == 13:
        raise ValueError("unlucky")
    if seed == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed >= 100:
        def stop(number, frame):
            (folder / "checkpoint").write_text(str(number))
            raise KeyboardInterrupt(number)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        (folder / "started").write_text(str(os.getpid()))
        time.sleep(60)
    (folder / "threads").write_text(os.environ["OMP_NUM_THREADS"] if "OMP_NUM_THREADS" in os.environ else "")
    (folder / "process").write_text(str(os.getpid()))
    return folder
'''


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A target for the pool that needs no training; worker processes find it through sys.path."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "fake_runner.py").write_text(RUNNER)
    monkeypatch.syspath_prepend(str(folder))
    return "fake_runner:run"
