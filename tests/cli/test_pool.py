from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli import pool
from cli.board import Board, duration
from methods.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from cli import pool
if __name__ == "__main__":
    jobs = [(f"s{s}", dict(seed=s, results_dir=sys.argv[1], experiment="e", arm="a")) for s in (100, 101, 102)]
    try:
        pool.run(jobs, "fake_runner:run", 2)
    except KeyboardInterrupt as stop:
        sys.exit(128 + stop.args[0])
"""


def jobs(root: Path, *seeds: int):
    return [(f"s{s}", {"seed": s, "results_dir": str(root), "experiment": "e", "arm": "a"}) for s in seeds]


def wait_for(condition, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_keep_the_order_and_threads_are_shared_out(runner, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    paths = pool.run(jobs(tmp_path, 3, 1, 2), runner, 2)
    assert [Path(p).name for p in paths] == ["seed3", "seed1", "seed2"]
    assert (tmp_path / "raw/e/a/seed1/threads").read_text() == str(max(1, pool.cores() // 2))
    assert "OMP_NUM_THREADS" not in os.environ


def test_failed_runs_do_not_stop_the_others(runner, tmp_path, capfd):
    with pytest.raises(RunError) as error:
        pool.run(jobs(tmp_path, 13, 1, 14, 2, 3), runner, 2)
    text = str(error.value)
    assert error.value.exit_code == 1
    assert "2 of 5 runs failed" in text and "s13: ValueError: unlucky" in text and "s14" in text and "signal 9" in text
    assert sorted(p.parent.name for p in tmp_path.rglob("process")) == ["seed1", "seed2", "seed3"]
    assert "[5/5]" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_run_once(runner, tmp_path, number):
    script = tmp_path / "pool_script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'path'}"}
    process = subprocess.Popen([sys.executable, script, tmp_path], env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(tmp_path.rglob("started"))) == 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert [p.read_text() for p in tmp_path.rglob("checkpoint")] == [str(int(number))] * 2
    assert "write their checkpoints" in err
    assert not (tmp_path / "raw/e/a/seed102").exists()


def test_workers_end_with_their_parent(runner, tmp_path):
    script = tmp_path / "pool_script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'path'}"}
    process = subprocess.Popen([sys.executable, script, tmp_path], env=env, stderr=subprocess.DEVNULL)
    started = tmp_path.rglob
    wait_for(lambda: len([p for p in started("started") if p.read_text()]) == 2)
    pids = [int(p.read_text()) for p in started("started")]
    process.kill()
    process.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids))


def test_workers_follow_gpus_then_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert pool.gpus() == ["0", "3"] and pool.default_workers(8) == 2 and pool.default_workers(1) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pool.gpus() == [] and pool.default_workers(100) == min(100, pool.cores())


def test_the_board_counts_and_estimates(monkeypatch, capsys):
    board = Board("demo", ["a", "b", "c", "d"])
    board.started -= 60
    board.start("a")
    board.line("a", "a: step 3")
    assert board.running == {"a": "step 3"}
    assert "left" not in board.status()
    board.finish("a", "failed", "why")
    assert board.status() == "demo: 1/4 runs, 1 failed, 1:00 passed, about 3:00 left"
    assert "[1/4] a: failed: why" in capsys.readouterr().err
    assert duration(3700) == "1:01:40"
