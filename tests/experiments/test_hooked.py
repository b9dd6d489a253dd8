"""Evaluation through the methods' hooks, outside training too, with the state that training left."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from experiments import checkpoints, evaluate, hooked
from experiments.engines.base import Result, Usage
from experiments.tasks.base import Row
from methods.base import Context, Method
from methods.objectives.base import Objective
from methods.stack import Stack


class Engine:
    """Answers with the prompt it got."""

    def __init__(self):
        self.seeds = []

    def generate(self, requests, progress=None):
        self.seeds += [r.seed for r in requests]
        return [[Result(r.prompt, [1, 2], None, "stop", Usage(1, 2))] for r in requests]


class Rewrites(Method):
    name = "rewrites"
    word = "!"

    def prepare_rows(self, rows, ctx):
        assert ctx.mode == "eval"
        return [Row(r.id, r.prompt + self.word, r.answer) for r in rows]

    def eval_metrics(self, trajs, ctx):
        return {"marks": [float(t.text.count("!")) for t in trajs]}

    def state_dict(self):
        return {"word": self.word, "weight": torch.ones(2)}

    def load_state_dict(self, state):
        self.word = state["word"]


ROWS = [Row("a", "x", "x!"), Row("b", "y", "?")]
HOW = hooked.Sampling(samples=3, temperature=1.0, top_p=1.0, max_tokens=4, seed=0)


def test_rollouts_go_through_the_hooks_and_have_streams_of_their_own():
    engine = Engine()
    ctx = Context("eval", 0, 0, 1, services=None)
    trajs, columns = hooked.rollouts(Stack([Rewrites()], Objective()), ctx, engine, ROWS, HOW)
    assert [t.text for t in trajs] == ["x!"] * 3 + ["y!"] * 3
    assert [(t.group_id, t.sample_id) for t in trajs] == [(g, s) for g in range(2) for s in range(3)]
    assert columns == {"marks": [1.0] * 6}
    assert len(set(engine.seeds)) == 6
    assert [len(r) for r in hooked.as_results(trajs, 3)] == [3, 3]


@pytest.fixture
def trained(tmp_path):
    """The model folder of a finished run, with its methods' state."""
    (tmp_path / "config.json").write_text("{}")
    saved = Rewrites()
    saved.word = "!!"
    stack = Stack([saved], Objective())
    checkpoints.write_state(tmp_path, {"trainer": {"stack": stack.state_dict()}, "seconds": 1.0})
    return tmp_path


def test_state_of_training_is_loaded(trained, monkeypatch):
    monkeypatch.setattr("experiments.engines.build.instantiate", lambda node, **_: Rewrites())
    cfg = OmegaConf.create({"method": {"rewrites": {}}, "model": {"init": str(trained)}, "seed": 0, "results_dir": "x"})
    assert hooked.stack_of(cfg).methods[0].word == "!!"
    cfg.model.init = None
    assert hooked.stack_of(cfg).methods[0].word == "!"


def test_assay_eval_applies_them(monkeypatch):
    class Marks:
        name, max_completion_tokens = "marks", 4

        def score(self, text, row):
            return float(text == row.answer)

        def metrics(self, text, row):
            return {}

    monkeypatch.setattr("experiments.engines.build.instantiate", lambda node, **_: Rewrites())
    e = {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_tokens": None}
    cfg = OmegaConf.create({"method": {"rewrites": {}}, "model": {}, "seed": 0, "eval": e})
    rows = [Row("a", "x", "x!"), Row("b", "y", "?")]
    frame, results = evaluate._answers(cfg, Engine(), "eval", Marks(), rows, None, None)
    assert frame["score"].tolist() == [1.0, 1.0, 0.0, 0.0] and frame["marks"].tolist() == [1.0] * 4
    assert len(results) == 2
