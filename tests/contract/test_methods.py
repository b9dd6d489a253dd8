"""The contract of every method in conf/method: names, docs, state, evaluation, and two steps on every objective."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from methods.base import Method
from methods.errors import ConfigError
from methods.stack import Stack

CONF = Path(__file__).resolve().parents[2] / "conf"
METHODS = sorted(p.stem for p in (CONF / "method").glob("*.yaml"))
OBJECTIVES = sorted(p.stem for p in (CONF / "objective").glob("*.yaml") if "_target_" in p.read_text())


def config(group, name):
    return OmegaConf.load(CONF / group / f"{name}.yaml")


def method(name) -> Method:
    return instantiate(config("method", name))


@pytest.mark.parametrize("name", METHODS)
def test_name_header_and_docs(name):
    text = (CONF / "method" / f"{name}.yaml").read_text()
    header = re.match(r"# @package method\.(\w+)\n# \S.*\.\n|# @package method\.(\w+)\n# \S.*\?\n", text)
    assert header, "the first two lines are the package header and one sentence"
    assert method(name).name == (header[1] or header[2]) and name.startswith(method(name).name)
    doc = get_class(config("method", name)._target_).__doc__
    assert doc and doc.splitlines()[0].endswith((".", "?"))


@pytest.mark.parametrize("name", METHODS)
def test_every_key_is_in_the_yaml_with_its_default(name):
    import inspect

    cls = get_class(config("method", name)._target_)
    assert set(inspect.signature(cls).parameters) == set(config("method", name)) - {"_target_"}


@pytest.mark.parametrize("name", METHODS)
def test_imports_only_the_hook_contract(name):
    """Training plug-ins import methods.base, methods.numerics, methods.errors and pure libraries."""
    module = get_class(config("method", name)._target_).__module__
    tree = ast.parse((CONF.parent / (module.replace(".", "/") + ".py")).read_text())
    allowed = {"methods.base", "methods.numerics", "methods.errors", "methods.demonstrations"}
    pure = {"__future__", "collections", "dataclasses", "json", "math", "re", "typing", "warnings"}
    pure |= {"torch", "numpy", "scipy", "rapidfuzz"}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for imported in names:
            own = imported.startswith("methods.") and module.startswith(imported.rsplit(".", 1)[0] + ".")
            assert imported in allowed or imported.split(".")[0] in pure or own, imported


def objective_of(made: Method):
    """The first objective that the method runs on; None for any."""
    return instantiate(config("objective", made.objectives[0])) if made.objectives else None


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_state_and_evaluation(name, make_trainer, tmp_path):
    """Two steps train; the state survives a checkpoint; evaluation changes none of it."""
    from experiments import checkpoints
    from experiments.measure import of_trainer

    trainer = make_trainer([method(name)], objective_of(method(name)))
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert len(losses) == 2 and all(map(torch.isfinite, map(torch.tensor, losses)))
    state = trainer.state_dict()
    checkpoints.write_state(tmp_path, state)
    fresh = make_trainer([method(name)], objective_of(method(name)))
    fresh.load_state_dict(checkpoints.read_state(tmp_path))
    assert same(fresh.state_dict(), json_like(state))
    before = copy.deepcopy(trainer.state_dict())
    random_state = torch.random.get_rng_state()
    cfg = OmegaConf.create({"seed": 0, "eval": EVAL})
    measure = of_trainer(trainer, cfg, tmp_path)
    measure.prepare()
    spent = dict(trainer.cost), dict(trainer.stack.seconds)
    frame, extra = measure(2)
    assert spent == (trainer.cost, trainer.stack.seconds)  # evaluation is not a cost of the method
    assert len(frame) == 12 and set(extra) == {"eval/score", "kl/start"}
    assert same(trainer.state_dict(), before)
    assert torch.equal(random_state, torch.random.get_rng_state())


EVAL = {"split": "eval", "seed": 0, "items": 6, "samples": 2, "temperature": 1.0, "top_p": 1.0}
EVAL |= {"batch_size": 64, "kl_probe": 2}


def json_like(state):
    """What JSON makes of a state without tensors; tensors stay."""
    if isinstance(state, dict):
        return {k: json_like(v) for k, v in state.items()}
    return state if isinstance(state, torch.Tensor) else json.loads(json.dumps(state))


MAIN = [m for m in METHODS if "controls" not in config("method", m)._target_]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MAIN)
def test_every_method_on_every_objective_or_refused(name, objective, make_trainer):
    chosen = instantiate(config("objective", objective))
    try:
        Stack([method(name)], chosen)
    except ConfigError as refusal:
        assert refusal.fix.startswith("choose objective=")
        return
    trainer = make_trainer([method(name)], chosen, updates_per_generation=2, rows_per_device=8)
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert torch.isfinite(after).all() and torch.equal(before, after) == chosen.frozen
