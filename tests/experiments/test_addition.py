"""Two-digit addition: what is demonstrated, what is asked, and what the start policy has seen."""

from __future__ import annotations

import random

import pytest

from experiments.tasks.addition import SCRATCH, Addition, everything, operands, other, problems, tier, trace
from methods.errors import ConfigError


@pytest.fixture(scope="module")
def task():
    return Addition(warm_start_rows=2000)


def test_the_trace_of_the_sheet(task):
    assert trace("58+67?") == "8+7=15,5+6+1=12:125" and tier("58+67?") == "carry"
    assert trace("12+34?") == "2+4=6,1+3+0=4:46" and tier("12+34?") == "no_carry"


def test_every_trace_is_right_and_has_the_experts_form(task):
    for problem in everything():
        row = task._row(problem)
        assert task.score(trace(problem), row) == 1 and SCRATCH.fullmatch(trace(problem))


def test_demonstrations_cover_half_of_the_rows_and_no_carry(task):
    rows = task.rows("train", 0)
    shown = [r for r in rows if r.demo is not None]
    assert len(rows) == 600 and len({r.id for r in rows}) == 600
    assert len(shown) == 300 and len({r.prompt for r in shown}) == 64
    assert {r.tier for r in shown} == {"no_carry"} and all(task.score(r.demo, r) == 1 for r in shown)
    others = [r for r in rows if r.demo is None]
    assert {r.tier for r in others} == {"carry", "no_carry"} and not {r.prompt for r in others} & {
        r.prompt for r in shown
    }
    assert task.rows("train", 0) == rows != task.rows("train", 1)


def test_no_training_prompt_of_any_seed_is_asked(task):
    asked = {r.prompt for split in ("eval", "test") for r in task.rows(split, 0)}
    assert len(asked) == 2 * 192
    for seed in range(5):
        assert not asked & {r.prompt for r in (*task.rows("train", seed), *task.warm_rows(seed))}


def test_the_warm_start_is_the_mixture_of_the_sheet(task):
    rows = task.warm_rows(0)
    direct = [r for r in rows if r.demo.startswith(":")]
    scratch = [r for r in rows if not r.demo.startswith(":")]
    assert len(direct) / len(rows) == pytest.approx(0.75, abs=0.03)
    assert sum(task.score(r.demo, r) for r in direct) / len(direct) == pytest.approx(0.4, abs=0.05)
    assert sum(task.score(r.demo, r) for r in scratch) / len(scratch) == pytest.approx(0.5, abs=0.07)
    assert all(task.metrics(r.demo, r) == {"scratch": 1.0} for r in scratch)
    assert task.metrics(direct[0].demo, direct[0]) == {"scratch": 0.0}


def test_a_start_without_a_single_right_answer():
    rows = Addition(direct=1.0, direct_wrong=1.0, warm_start_rows=500).warm_rows(0)
    assert not any(Addition().score(r.demo, r) for r in rows)


@pytest.mark.parametrize(
    ("text", "score"),
    [(":125", 1), ("8+7=15,5+6+1=12:125", 1), ("anything:9:125 ", 1), ("125", 0), (":0125", 0), (":", 0), ("", 0)],
)
def test_the_number_after_the_last_colon_counts(task, text, score):
    assert task.score(text, task._row("58+67?")) == score


def test_wrong_sums_are_wrong_and_near():
    rng = random.Random(0)
    assert all(0 <= other(125, rng) != 125 and abs(other(125, rng) - 125) <= 22 for _ in range(500))


def test_all_problems_are_there_once():
    rng = random.Random(0)
    assert len(set(everything())) == 8100 and operands("10+99?") == (10, 99)
    assert len(set(problems(rng, 2000, "train", only="no_carry"))) == 2000


@pytest.mark.parametrize("keys", [{"direct": 1.5}, {"eval_rows": 5000}, {"demo_problems": -1}])
def test_settings_that_cannot_be_met(keys):
    with pytest.raises(ConfigError, match=rf"task\.{next(iter(keys))}"):
        Addition(**keys)
    with pytest.raises(ConfigError, match="Unknown split"):
        Addition().rows("dev", 0)
