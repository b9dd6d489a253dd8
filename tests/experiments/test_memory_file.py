"""Memory files: whole or refused, merged, exported, drawn, listed; and the command that does it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as plain_tensors

from experiments import checkpoints, memory_file, memory_report
from methods.errors import ConfigError, DataError, RunError
from methods.graph_memory.graph import Memory, state_of
from methods.graph_memory.induction import absorb, plant
from methods.graph_memory.machine import ANALYSIS, ANSWER, TOOL

DIRECT, ONCE = (ANSWER,), (TOOL, ANALYSIS, ANSWER)


@pytest.fixture
def memory():
    m = Memory()
    vectors = np.array([[1, 0], [0.9, 0.1], [0, 1]], np.float32)
    won = [[(ONCE, True), (DIRECT, False)]] * 2 + [[(ONCE, False), (DIRECT, True)]]
    absorb(m, ["who\x0b?", "when $5?", "wo \udcff"], vectors, won, born=3, neighbours=2)
    plant(m, ["Be polite."])
    m.to_strategies.weight_E[0] = 2.5
    return m


def same(a, b):
    def flat(state, path=""):
        if isinstance(state, dict):
            return {k: v for name, x in state.items() for k, v in flat(x, f"{path}/{name}").items()}
        return {path: state.tolist() if hasattr(state, "tolist") else state}

    return flat(state_of(a)) == flat(state_of(b))


def test_a_file_is_the_memory(memory, tmp_path):
    path = memory_file.save(memory, tmp_path / "new/folder/m.safetensors")
    assert same(memory_file.load(path), memory)
    assert same(memory_file.find_all([str(path)]), memory)
    assert memory_file.find_all([str(path)] * 2).sizes == memory.sizes
    assert same(memory_file.load(memory_file.save(Memory(), tmp_path / "empty.safetensors")), Memory())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_file_cut_short_is_one_clear_error(memory, tmp_path, share):
    path = memory_file.save(memory, tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"memory file is damaged.*m\.safetensors"):
        memory_file.load(path)


def test_a_write_that_fails_keeps_the_previous_file(memory, tmp_path, monkeypatch):
    path = memory_file.save(memory, tmp_path / "m.safetensors")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunError, match="No space left"):
            memory_file.save(Memory(), path)
    assert same(memory_file.load(path), memory) and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_other_files_and_inconsistent_ones_are_refused(memory, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(DataError, match="no memory file"):
        memory_file.load(path)
    path.write_bytes(plain_tensors({"x": np.zeros(3)}))
    with pytest.raises(DataError, match="This is no memory file"):
        memory_file.load(path)
    memory.to_strategies.target_E[-1] = 99
    memory_file.save(memory, path)
    with pytest.raises(DataError, match=r"damaged.*leads to a node that does not exist: node 99"):
        memory_file.load(path)
    with pytest.raises(ConfigError, match="no such run or memory file"):
        memory_file.find("nothing/here")


def test_a_run_without_a_memory_says_so(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    checkpoints.write_state(tmp_path / "model", {"trainer": {"stack": {"methods": {"ha_dw": {}}}}})
    with pytest.raises(DataError, match=r"no graph memory.*ha_dw"):
        memory_file.find(str(tmp_path))


def test_graphml_and_drawing(memory, tmp_path):
    import networkx

    graph = networkx.read_graphml(memory_file.write_graphml(memory, tmp_path / "m.graphml"))
    assert len(graph) == sum(memory.sizes) and graph.number_of_edges() == 6 + len(memory.to_strategies)
    assert graph.nodes["q0"]["text"] == "who??" and graph.edges["t0", "m0"]["weight"] == 2.5
    assert graph.edges["q0", "t0"] == {"weight": 1.0, "successes": 1, "failures": 0}
    png = memory_report.draw(memory, tmp_path / "m.png")
    assert png == tmp_path / "m.png" and png.stat().st_size > 5000 and png.with_suffix(".svg").is_file()


def test_the_listing_can_be_read(memory):
    text = memory_report.listing(memory)
    assert "3 questions, 2 paths, 3 strategies" in text
    best = next(line for line in text.splitlines() if "contrast" in line)
    wanted = "1.75 100% 2:1 contrast After Start prefer ToolExecution over AnswerGeneration."
    assert " ".join(best.split()) == wanted
    _, _, told = text.partition("2 questions were answered by Tool > Analysis > Answer; of them are told\n")
    assert [" ".join(line.split()) for line in told.splitlines()[:3]] == [
        "100% After Start prefer ToolExecution over AnswerGeneration.",
        "100% After Start prefer AnswerGeneration over ToolExecution.",
        "100% Be polite.",
    ]
    memory.strategies[0].text = "After\x1b[2J Start"
    assert "After?[2J Start" in memory_report.listing(memory)  # a terminal would obey it
    assert memory_report.listing(Memory()) == "0 questions, 0 paths, 0 strategies"


def test_the_command(memory, tmp_path):
    path = memory_file.save(memory, tmp_path / "m.safetensors")
    assay = Path(sys.executable).with_name("assay")
    line = [str(assay), "memory", str(path), str(path), "--out", str(tmp_path / "both.safetensors")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "both.safetensors") and "Be polite." in done.stdout
    assert memory_file.load(tmp_path / "both.safetensors").strategies[0].support == 4
    before = (tmp_path / "both.safetensors").read_bytes()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and "damaged" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "both.safetensors").read_bytes() == before
