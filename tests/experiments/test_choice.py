"""The choice task: the verifier sees the letter only, luck is measured apart, splits never mix."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks.arithmetic import running_totals
from experiments.tasks.choice import Choice, letter
from methods.errors import ConfigError


def small(**keys):
    return Choice(**({"train_rows": 300, "eval_rows": 60} | keys))


def test_rows_are_the_same_for_a_seed_and_splits_are_disjoint():
    task = small()
    assert task.rows("train", 3) == task.rows("train", 3) != task.rows("train", 4)
    prompts = {split: {r.prompt for s in range(3) for r in task.rows(split, s)} for split in ("train", "eval", "test")}
    assert not prompts["train"] & prompts["eval"] and not prompts["eval"] & prompts["test"]
    rows = task.rows("eval", 0)
    assert len({r.id for r in rows}) == len(rows) == 60 and all(r.demo is None for r in rows)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_gold_scores_one_and_its_working_is_right(seed):
    row = small(train_rows=1).rows("train", seed)[0]
    gold = row.meta["totals"] + row.answer
    assert row.meta["totals"] == "".join(map(str, running_totals(row.prompt)))
    assert small().score(gold, row) == 1
    assert small().metrics(gold, row) == {"both": 1, "lucky": 0, "working": 1}


def test_luck_is_a_right_letter_under_wrong_working():
    row = small().rows("eval", 0)[0]
    totals, right = row.meta["totals"], row.answer
    wrong = str((int(totals[0]) + 1) % 10) + totals[1:]
    other = next(x for x in "ABCD" if x != right)
    expected = {
        totals + other: (0, 0, 0, 1),
        wrong + right: (1, 0, 1, 0),
        wrong + other: (0, 0, 0, 0),
        right: (1, 0, 1, 0),
        totals: (0, 0, 0, 0),
        "": (0, 0, 0, 0),
        totals[:-1] + "é" + right: (1, 0, 1, 0),
    }
    for text, (score, both, lucky, working) in expected.items():
        assert small().score(text, row) == score, text
        assert small().metrics(text, row) == {"both": both, "lucky": lucky, "working": working}, text


def test_a_guess_is_right_about_one_time_in_four():
    task = small(guess=1.0, train_rows=4000)
    rows = task.rows("train", 0)
    found = [task.metrics(r.demo, r) for r in rows]
    wrong = [r for r, m in zip(rows, found, strict=True) if not m["working"]]
    assert len(wrong) > 3900
    assert sum(task.score(r.demo, r) for r in wrong) / len(wrong) == pytest.approx(0.25, abs=0.03)


def test_without_noise_demonstrations_are_gold():
    task = small(guess=0.0, demo_noise=0.0)
    assert all(r.demo == r.meta["totals"] + r.answer for r in task.rows("train", 0))


def test_every_symbol_is_one_token_and_budgets_suffice():
    from experiments.tokenizers import tiny_tokenizer

    task = small()
    tokenizer = tiny_tokenizer(list(task.symbols or ()), False)
    row = random.Random(0).choice(task.rows("train", 0))
    assert len(tokenizer(row.prompt)["input_ids"]) <= task.max_prompt_tokens
    ids = tokenizer(row.demo, add_special_tokens=False)["input_ids"]
    assert len(ids) == task.steps + 1 < task.max_completion_tokens and tokenizer.decode(ids) == row.demo


def test_letters():
    assert "".join(letter(t) for t in range(10)) == "ABCDABCDAB"


@pytest.mark.parametrize("keys", [{"guess": 1.5}, {"demo_noise": -0.1}, {"steps": 1}, {"steps": 0}])
def test_settings_that_cannot_be_met(keys):
    with pytest.raises(ConfigError, match="task\\."):
        Choice(**keys)
    with pytest.raises(ConfigError, match="Unknown split"):
        small().rows("valid", 0)
