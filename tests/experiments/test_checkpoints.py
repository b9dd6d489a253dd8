"""A checkpoint is whole or absent, and every part of the state comes back."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import checkpoints
from methods.errors import RecordError

leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
tensor = st.lists(st.floats(-1, 1, width=32), max_size=4).map(torch.tensor)
states = st.recursive(
    leaf | tensor, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=4), s, max_size=3)
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b and type(a) is type(b)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(st.text(max_size=4), states, max_size=4))
def test_state_round_trip(state, tmp_path):
    checkpoints.write_state(tmp_path, state)
    assert same(checkpoints.read_state(tmp_path), state)


def test_state_of_other_kinds_is_refused(tmp_path):
    with pytest.raises(TypeError, match="object"):
        checkpoints.write_state(tmp_path, {"a": object()})


def save(folder, step, value=1.0, keep=2):
    raw = folder / f"checkpoint-{step}"
    raw.mkdir(parents=True)
    (raw / "weights").write_bytes(b"x" * 1000)
    return checkpoints.seal(raw, {"value": torch.tensor(value)}, keep)


def test_newest_complete_checkpoint_is_found_and_old_ones_go(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    for step in (5, 10, 100):
        save(tmp_path, step, float(step))
    assert [p.name for p in checkpoints.all_steps(tmp_path)] == ["step_10", "step_100"]
    newest = checkpoints.latest(tmp_path)
    assert checkpoints.step_of(newest) == 100
    assert checkpoints.read_state(newest)["value"] == 100.0


def test_the_rest_of_a_killed_save_is_not_seen(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "weights").write_bytes(b"half")
    assert checkpoints.latest(tmp_path).name == "step_5"
    assert not (tmp_path / "checkpoint-10").exists()


@pytest.mark.parametrize("damage", ["half", "other", "gone", "manifest"])
def test_damage_is_named(damage, tmp_path):
    path = save(tmp_path, 5)
    weights = path / "weights"
    if damage == "half":
        weights.write_bytes(b"x" * 500)
    elif damage == "other":
        weights.write_bytes(b"y" * 1000)
    elif damage == "gone":
        weights.unlink()
    else:
        (path / "manifest.json").write_text("{")
    with pytest.raises(RecordError, match=r"weights|manifest") as caught:
        checkpoints.latest(tmp_path)
    assert "delete" in caught.value.fix


def test_another_version_is_refused(tmp_path):
    checkpoints.write_state(tmp_path, {})
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state | {"version": 99}))
    with pytest.raises(RecordError, match="version 99"):
        checkpoints.read_state(tmp_path)
