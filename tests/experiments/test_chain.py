"""The chain task: gold, splits, what a re-check does; and the reward for a finished thinking block."""

from __future__ import annotations

import random

import pytest

from experiments import rewards
from experiments.tasks.base import Row
from experiments.tasks.chain import STEP, WAIT, Chain
from experiments.tasks.gsm8k import Gsm8k
from experiments.tokenizers import tiny_tokenizer
from methods.errors import ConfigError


def test_gold_scores_and_every_text_is_made_of_symbols():
    task = Chain(train_rows=60, eval_rows=12, corruption=0.0)
    tokenizer = tiny_tokenizer(task.symbols)
    for row in task.rows("train", 0):
        assert task.score(row.demo, row) == 1.0 and row.prompt.endswith("=<think>")
        ids = tokenizer(row.prompt + row.demo)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == row.prompt + row.demo
        assert len(tokenizer(row.demo)["input_ids"]) < task.max_completion_tokens
        assert row.demo.count(STEP) == len(row.meta["totals"])


def test_splits_are_disjoint_and_rows_repeat():
    task = Chain(train_rows=300, eval_rows=30)
    assert task.rows("train", 1) == task.rows("train", 1) != task.rows("train", 2)
    splits = [{row.prompt for row in task.rows(split, seed)} for split in ("train", "eval", "test") for seed in (0, 1)]
    assert not splits[0] & (splits[2] | splits[3] | splits[4]) and not splits[2] & splits[4]
    assert all(row.demo is None for row in task.rows("eval", 0))


def last_right(task, n=4000):
    """Share of demonstrations that end right, by number of re-checks."""
    rng, found = random.Random(0), {}
    for _ in range(n):
        demo = task._demo("3+4=", 7, rng)
        found.setdefault(demo.count(WAIT), []).append(demo.endswith("boxed{7}"))
    return {k: sum(v) / len(v) for k, v in found.items()}


def test_a_recheck_corrupts_and_repairs_as_it_says():
    shares = last_right(Chain(corruption=0.25, repair=0.1))
    assert sorted(shares) == [0, 1, 2, 3, 4] and shares[0] == 1.0
    right = 1.0
    for k in range(1, 5):
        right = right * 0.75 + (1 - right) * 0.1
        assert shares[k] == pytest.approx(right, abs=0.05)
    assert set(last_right(Chain(corruption=0.0), 200).values()) == {1.0}


def test_helpful_rechecks_mend_a_noisy_first_pass():
    shares = last_right(Chain(corruption=0.0, repair=0.5, demo_noise=0.5))
    assert shares[0] == pytest.approx(0.5, abs=0.05) and shares[4] == pytest.approx(1 - 0.5**5, abs=0.04)


def test_metrics_count_rechecks():
    task, row = Chain(), Row("a", "3 +4=<think>", "7")
    assert task.metrics(f"{STEP}7{WAIT}7{WAIT}7</think>", row) == {"rechecks": 2.0}


@pytest.mark.parametrize("setting", [{"corruption": 1.5}, {"repair": -0.1}, {"max_rechecks": -1}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ConfigError, match=r"task\."):
        Chain(**setting)


THINKING = [
    ("no block at all", -10.0),
    ("<think>never closed \\boxed{7}", -10.0),
    ("a</think>seven", -9.5),
    ("\\boxed{7}</think>seven", -9.5),
    ("a</think>\\boxed{}", -9.5),
    ("a</think>\\boxed{8}", 0.0),
    ("<think>a</think>so \\boxed{7}", 1.0),
]


@pytest.mark.parametrize("task", [Chain(), Gsm8k()])
def test_thinking_reward(task):
    (spec,) = rewards.build([{"name": "outcome", "function": "thinking"}], task)
    texts = [text for text, _ in THINKING]
    assert spec.fn(texts, [Row("a", "x", "7")] * len(texts)) == [value for _, value in THINKING]


def test_thinking_penalties_are_settings():
    kwargs = {"unclosed": -1.0, "no_answer": -0.5}
    (spec,) = rewards.build([{"name": "outcome", "function": "thinking", "kwargs": kwargs}], Chain())
    assert spec.fn(["a", "a</think>b"], [Row("a", "x", "7")] * 2) == [-1.0, -0.5]
