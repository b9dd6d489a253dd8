"""Two processes (gloo) against one with the same replayed rollouts: advantages, loss, gradient, state, weights."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # five minutes on a free core

SCRIPT = Path(__file__).with_name("replay.py")
PAIR = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def replay():
    spec = spec_from_file_location("replay", SCRIPT)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = list(replay().cases())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(name) -> (one process, first of two, second of two)."""
    folder = tmp_path_factory.mktemp("replay")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    for how in ([], PAIR):
        run = subprocess.run([sys.executable, *how, str(SCRIPT), str(folder)], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
    return lambda name: [pickle.loads((folder / f"{name}.{n}").read_bytes()) for n in ("1.0", "2.0", "2.1")]


def close(a, b, path="", tolerance=1e-5):
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{path}: {text}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            close(a[k], b[k], f"{path}/{k}", tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{path}/{k}", tolerance)
    elif isinstance(a, float) and a == a:
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance), path
    else:
        assert a == b or a != a, path


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(name, results):
    one, first, second = results(name)
    for i, (rows, others) in enumerate(zip(one["advantages"], first["advantages"], strict=True)):
        assert [ids for ids, _ in rows] == [ids for ids, _ in others], f"other rows in generation {i}"
        close([a for _, a in rows], [a for _, a in others], f"advantages of generation {i}")
    close(first["advantages"], second["advantages"], tolerance=0)
    if name == "objective bnpo":  # its denominator is the micro-batch, of which each process has its own
        return
    if name != "two_updates_and_passes":  # passes after the first step see slices that each process has shuffled
        close(one["loss"], first["loss"], "loss and gradient")
        close(one["weights"], first["weights"], "weights", 1e-4)
    for kind in ("stack", "stream_position"):
        close(one["state"][kind], first["state"][kind], kind)
        close(first["state"][kind], second["state"][kind], f"{kind} of the processes", 0)
    assert one["state"]["cost"]["trained_tokens"] == first["state"]["cost"]["trained_tokens"]
    assert first["state"]["cost"] == second["state"]["cost"]


def test_the_cases_exercise_what_they_are_about(results):
    """Otherwise equal numbers would mean nothing."""
    logs = {name: results(name)[0]["logs"] for name in NAMES}
    assert all(abs(results(name)[0]["loss"][-1][1]) > 0 for name in NAMES if name != "graph_memory")
    assert logs["redrawn"]["groups/draws"] > 1 and logs["vsrm_chain"]["vsrm/steps"] > 0
    assert logs["vsrm_chain"]["vsrm/reward/abs"] > 0 and logs["awpo"]["awpo/gate"] > 0
    assert results("tapo")[0]["logs"]["tapo/frac_steps_corrected"] > 0
    memory = results("graph_memory")[0]["state"]["stack"]["methods"]["graph_memory"]
    assert memory["last"]["strategies"] > 0
