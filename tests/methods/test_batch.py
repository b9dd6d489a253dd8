"""Trajectories to padded tensors and back: padding, whole trajectories, extras, turns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.base import Segment, Trajectory, Turn, assemble

PAD = 0


@st.composite
def trajectories(draw):
    out = []
    for i in range(draw(st.integers(1, 5))):
        segments, turns = [], []
        for j in range(draw(st.integers(1, 3))):
            prompt = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
            completion = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
            mask = draw(st.none() | st.lists(st.integers(0, 1), min_size=len(completion), max_size=len(completion)))
            segments.append(Segment(prompt, completion, model_mask=mask))
            turns.append(Turn(j, 0, len(completion)))
        out.append(Trajectory(f"r{i}", i // 2, i % 2, segments, turns))
    return out


def rows(batch):
    """What each row holds, without padding."""
    out = []
    for s in range(batch.rows):
        p, c = batch.prompt_mask_SP[s].bool(), batch.completion_mask_ST[s].bool()
        out.append(
            (batch.prompt_ids_SP[s][p].tolist(), batch.completion_ids_ST[s][c].tolist(), int(batch.extras["id"][s]))
        )
    return out


def with_ids(batch, offset=0):
    batch.extras["id"] = torch.arange(batch.rows) + offset
    batch.extras["tokens"] = batch.completion_ids_ST.float()
    return batch


@given(trajectories())
def test_assemble_keeps_every_token_in_order(trajs):
    batch = with_ids(assemble(trajs, PAD))
    flat = [(s.prompt_ids, s.completion_ids) for t in trajs for s in t.segments]
    assert [(p, c) for p, c, _ in rows(batch)] == flat
    masks = [s.model_mask or [1] * len(s.completion_ids) for t in trajs for s in t.segments]
    width = batch.completion_ids_ST.shape[1]
    assert batch.model_mask_ST.tolist() == [m + [0] * (width - len(m)) for m in masks]
    assert batch.prompt_mask_SP[:, -1].all() and batch.completion_mask_ST[:, 0].all()
    assert ((batch.turn_ST >= 0) == batch.completion_mask_ST.bool()).all()


@given(trajectories(), st.data())
def test_take_moves_whole_trajectories_with_their_extras(trajs, data):
    batch = with_ids(assemble(trajs, PAD))
    chosen = data.draw(st.lists(st.integers(0, len(trajs) - 1), min_size=1, max_size=8))
    taken = batch.take(chosen)
    first_row = [0]
    for t in trajs:
        first_row.append(first_row[-1] + len(t.segments))
    expected = [r for i in chosen for r in rows(batch)[first_row[i] : first_row[i + 1]]]
    assert rows(taken) == expected
    assert [taken.trajs[i].row_id for i in taken.traj_S.tolist()] == [
        f"r{i}" for i in chosen for _ in trajs[i].segments
    ]
    assert torch.equal(taken.extras["tokens"], taken.completion_ids_ST.float())


@given(trajectories(), trajectories())
def test_concat_then_trim_keeps_rows(a, b):
    left, right = with_ids(assemble(a, PAD)), with_ids(assemble(b, PAD), 100)
    both = left.concat(right).trim()
    assert rows(both) == rows(left) + rows(right)
    assert both.traj_S.tolist() == left.traj_S.tolist() + [i + len(a) for i in right.traj_S.tolist()]
    on = both.completion_mask_ST.bool()
    assert torch.equal(both.extras["tokens"][on], both.completion_ids_ST[on].float())
    assert both.completion_mask_ST.sum(1).max() == both.completion_ids_ST.shape[1]


def test_concat_refuses_different_tensors():
    t = [Trajectory("r", 0, 0, [Segment([1], [2])])]
    with pytest.raises(ValueError, match="extra/id"):
        with_ids(assemble(t, PAD)).concat(assemble(t, PAD))


@pytest.mark.parametrize(
    "segments, turns, message",
    [
        ([Segment([1], [])], [], "empty completion"),
        ([Segment([1], [2, 3], model_mask=[1])], [], "differ in length"),
        ([Segment([1], [2, 3])], [Turn(0, 1, 3)], "outside"),
    ],
)
def test_what_would_shift_credit_is_refused(segments, turns, message):
    with pytest.raises(ValueError, match=message):
        assemble([Trajectory("r", 0, 0, segments, turns)], PAD)
