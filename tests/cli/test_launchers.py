"""Hydra's launchers: the presets, the cap on runs at once, equal records through each, the batch script for Slurm."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli import hydra_launcher, launch
from methods.errors import ConfigError, RunError

ROOT = Path(__file__).resolve().parents[2]
TINY = ["task=arithmetic", "model.warm_start=null", "trainer.max_steps=2", "trainer.prompts_per_step=2",
        "trainer.rollouts_per_prompt=4", "trainer.save_every=0", "eval.every=0", "eval.items=4", "eval.samples=1",
        "eval.kl_probe=0", "name=six"]  # fmt: skip
BATCH_SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-5%3
#SBATCH --cpus-per-task=8
#SBATCH --error=FOLDER/.launcher/.submitit/%A_%a/%A_%a_0_log.err
#SBATCH --gpus-per-node=1
#SBATCH --job-name=assay
#SBATCH --mem=64GB
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/.launcher/.submitit/%A_%a/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --signal=USR2@300
#SBATCH --time=720
#SBATCH --wckey=submitit

# setup
source /lab/assay/.venv/bin/activate

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/.launcher/.submitit/%A_%a/%A_%a_%t_log.out --error \
FOLDER/.launcher/.submitit/%A_%a/%A_%a_%t_log.err PYTHON -u -m submitit.core._submit FOLDER/.launcher/.submitit/%j
"""


def plugin(name: str) -> None:
    try:
        importlib.import_module(f"hydra_plugins.hydra_{name}_launcher")
    except ImportError:
        pytest.skip(f"the launcher {name} is an extra that is not installed here")


@pytest.fixture
def seen(monkeypatch):
    """Composed launcher settings and the batches that a stand-in for the plugin was given; run 3 fails."""
    from hydra.core.utils import JobReturn, JobStatus

    seen = SimpleNamespace(config=None, batches=[])

    class Launcher:
        def launch(self, jobs, initial_job_idx):
            seen.batches.append((initial_job_idx, len(jobs)))
            numbers = range(initial_job_idx, initial_job_idx + len(jobs))
            return [JobReturn(status=JobStatus.FAILED if n == 3 else JobStatus.COMPLETED,
                              _return_value=ValueError("unlucky") if n == 3 else "path") for n in numbers]  # fmt: skip

    def instantiate(wanted, *, config, **_):
        seen.config = config.hydra.launcher
        return Launcher()

    monkeypatch.setattr(hydra_launcher, "_instantiate", instantiate)
    return seen


def sweep(tmp_path, launcher, *words):
    line = ["seed=0,1,2,3,4,5", f"results_dir={tmp_path}", f"hydra/launcher={launcher}", *words]
    return launch.launch(launch.plan("train", line, multirun=True))


@pytest.mark.parametrize(
    ("launcher", "key"),
    [
        ("joblib", "n_jobs"),
        ("submitit_slurm", "array_parallelism"),
        ("ray", "ray.init.num_cpus"),
        ("submitit_local", ""),
    ],
)
def test_jobs_is_the_cap_of_every_launcher(launcher, key, seen, tmp_path):
    from omegaconf import OmegaConf

    with pytest.raises(RunError, match=r"1 of 6 runs failed.*seed3: unlucky"):
        sweep(tmp_path, launcher, "jobs=4")
    if launcher == "submitit_local":
        assert seen.batches == [(0, 4), (4, 2)]
    else:
        assert seen.batches == [(0, 6)] and OmegaConf.select(seen.config, key) == 4
    assert "hydra_plugins" in seen.config._target_


def test_the_user_s_own_settings_win(seen, tmp_path):
    with pytest.raises(RunError):
        sweep(tmp_path, "submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=60")
    assert seen.config.partition == "gpu" and seen.config.timeout_min == 60 and seen.config.array_parallelism == 8


def test_a_launcher_that_breaks_is_one_paragraph(monkeypatch, tmp_path):
    def launch(jobs, initial_job_idx):
        raise OSError("no cluster\nat this address")

    monkeypatch.setattr(hydra_launcher, "_instantiate", lambda *_, **__: SimpleNamespace(launch=launch))
    with pytest.raises(RunError, match=r"launcher 'ray' failed.*OSError: no cluster at this address"):
        sweep(tmp_path, "ray")


def test_a_missing_plugin_says_which_extra(tmp_path, monkeypatch):
    from hydra.core.plugins import Plugins

    def missing(self, **_):
        raise RuntimeError("Unknown plugin class")

    monkeypatch.setattr(Plugins, "instantiate_launcher", missing)
    with pytest.raises(ConfigError, match=r"submitit_slurm.*assay\[slurm\]"):
        sweep(tmp_path, "submitit_slurm")


# ---------------------------------------------------------------- for real


def records(folder: Path) -> dict[str, dict]:
    """Per run everything in its metrics and summary but times."""
    found = {}
    for file in sorted(folder.rglob("summary.json")):
        lines = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
        lines.append(json.loads(file.read_text())["metrics"])
        found[file.parent.relative_to(folder).as_posix()] = [
            {key: value for key, value in line.items() if not key.startswith("time")} for line in lines
        ]
    return found


def assay(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ASSAY_CACHE": str(tmp_path / "cache"),
                        "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
    line = [sys.executable, "-m", "assay", "train", "-m", "seed=range(6)", *TINY, *words]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=1500, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "ray"])
def test_six_runs_give_equal_records(tmp_path, launcher):
    """Against joblib, whose records are made once."""
    plugin("submitit" if launcher == "submitit_local" else launcher)
    folders = {}
    for name in ("joblib", launcher):
        words = [f"hydra/launcher={name}", "jobs=2", f"results_dir={tmp_path / name}"]
        done = assay(tmp_path, *words)
        assert done.returncode == 0, done.stderr[-2000:]
        folders[name] = Path(done.stdout.splitlines()[-1])
    assert len(records(folders["joblib"])) == 6
    assert records(folders["joblib"]) == records(folders[launcher])


@pytest.mark.slow
def test_the_batch_script_for_slurm(tmp_path):
    """`sbatch` is a stand-in that keeps the script and refuses."""
    plugin("submitit")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sbatch", "srun"):
        (tools / name).write_text(f"#!/bin/sh\ncp $1 {tmp_path}/{name}.sh\necho 'no queue here' >&2\nexit 1\n")
        (tools / name).chmod(0o755)
    os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    try:
        done = assay(tmp_path, "hydra/launcher=submitit_slurm", "jobs=3", f"results_dir={tmp_path / 'r'}",
                     "hydra.launcher.partition=gpu", "hydra.launcher.account=lab",
                     "hydra.launcher.setup=['source /lab/assay/.venv/bin/activate']")  # fmt: skip
    finally:
        os.environ["PATH"] = os.environ["PATH"].partition(os.pathsep)[2]
    assert done.returncode == 1 and "no queue here" in done.stderr and "Traceback" not in done.stderr
    shown = (
        (tmp_path / "sbatch.sh")
        .read_text()
        .replace(str(tmp_path / "r/raw/six"), "FOLDER")
        .replace(sys.executable, "PYTHON")
    )
    assert re.sub(r"\n+$", "\n", shown) == BATCH_SCRIPT
