"""The procedures task: gold, splits, that procedures exclude each other, and that demonstrations follow strategies."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from experiments.tasks.procedures import (
    ASK,
    FAMILIES,
    GO_ON,
    GUESS,
    KINDS,
    MAX_CALLS,
    NEVER_STOP,
    ROOTS,
    STOP,
    TELL,
    USELESS,
    Procedures,
    World,
    calls_of,
)
from experiments.tokenizers import tiny_tokenizer
from methods.errors import ConfigError
from methods.graph_memory.machine import canonical_path, strategy


@pytest.fixture(scope="module")
def task():
    return Procedures(train_rows=90, eval_rows=60, demos=400)


def result_of(row, calls):
    here = row.meta["start"]
    for k in range(calls):
        here = World(row).use(KINDS[k % 2], here)
    return here


def test_only_the_family_s_own_procedure_is_right(task):
    for row in task.rows("train", 0) + task.rows("eval", 0):
        right = FAMILIES[row.tier.removesuffix("_new")]
        scores = {calls: task.score(f"={result_of(row, calls)}", row) for calls in FAMILIES.values()}
        assert scores == {calls: float(calls == right) for calls in FAMILIES.values()}


def test_splits_and_words(task):
    rows = {split: task.rows(split, 0) for split in ("train", "eval", "test")}
    assert rows["train"] == task.rows("train", 0) != task.rows("train", 1)
    prompts = {split: {r.prompt for r in found} for split, found in rows.items()}
    assert [len(p) for p in prompts.values()] == [90, 60, 60]
    assert not prompts["train"] & (prompts["eval"] | prompts["test"]) and not prompts["eval"] & prompts["test"]
    assert Counter(r.tier for r in rows["train"]) == dict.fromkeys(FAMILIES, 30)
    assert Counter(r.tier for r in rows["eval"]) == dict.fromkeys(task.tiers, 10)
    for row in rows["train"] + rows["eval"]:
        endings = {word[3] for word in row.prompt.split()[:-1]}
        assert endings <= set("uy") if row.tier.endswith("_new") else endings <= set("aeio")
    own = [word[:3] == ROOTS[r.tier] for r in rows["train"] for word in r.prompt.split()[:-1]]
    assert sum(own) / len(own) == pytest.approx(0.8, abs=0.07)  # 0.7, and a third of the rest by chance


def test_every_text_is_made_of_symbols(task):
    tokenizer = tiny_tokenizer(task.symbols)
    for row in task.warm_rows(0):
        ids = tokenizer(row.prompt)["input_ids"]
        written = [i for text, _ in row.meta["segments"] for i in tokenizer(text)["input_ids"]]
        assert tokenizer.unk_token_id not in ids + written
        assert len(ids) <= task.max_prompt_tokens and len(written) < task.max_completion_tokens
    seen = ["tool_call", "tool_result"] * 3
    for success, failure in (([*seen, "answer"], seen), (["answer"], ["odd"])):
        text = strategy(canonical_path(success), canonical_path(failure))
        assert len(tokenizer(text)["input_ids"]) == 1


def shares(*told):
    rng = random.Random(0)
    counts = Counter(calls_of(told, rng) for _ in range(3000))
    return {calls: n / 3000 for calls, n in counts.items()}


def test_what_strategies_make_of_an_obedient_agent():
    third = pytest.approx(1 / 3, abs=0.04)
    assert shares() == shares(*USELESS) == {0: third, 1: third, 3: third}
    assert shares(TELL) == shares(TELL, ASK, STOP) == {0: 1.0}
    assert shares(ASK) == {1: pytest.approx(0.5, abs=0.04), 3: pytest.approx(0.5, abs=0.04)}
    assert shares(ASK, STOP) == shares(STOP, ASK, GO_ON) == {1: 1.0} and shares(GO_ON, ASK) == {3: 1.0}
    assert shares(GO_ON) == {0: third, 3: pytest.approx(2 / 3, abs=0.04)}
    assert shares(ASK, NEVER_STOP) == {MAX_CALLS: 1.0} and shares(GUESS) == {0: 1.0}


def test_demonstrations_know_no_family(task):
    rows = [r for r in Procedures(demos=6000, obey=1.0).warm_rows(1) if r.prompt.count("\n") == 0]
    by_family = {f: Counter(len(r.meta["segments"]) // 2 for r in rows if r.tier == f) for f in FAMILIES}
    for counts in by_family.values():
        assert all(n / counts.total() == pytest.approx(1 / 3, abs=0.1) for n in counts.values())


@pytest.mark.parametrize("setting", [{"own_words": 1.5}, {"obey": -0.1}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ConfigError, match=r"task\."):
        Procedures(**setting)
