"""Lookup or guess: what the generator promises, how answers are scored, and the warm start that experiments need."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from experiments.rollout import ToolLoop
from experiments.tasks.lookup import FORM, Lookup
from experiments.tools import ToolRunner
from methods.base import Turn
from methods.errors import ConfigError


@pytest.fixture(scope="module")
def task():
    return Lookup(train_rows=2000, eval_rows=80)


def query_of(row):
    return row.meta["useful_calls"][0]["args"]["query"]


def kind_of(row):
    return row.prompt[:2]


def traj(row, queries, text):
    turns = [Turn(0, 0, 3, "call", [None if q is None else {"tool": "search", "args": {"query": q}}]) for q in queries]
    return SimpleNamespace(turns=[*turns, Turn(0, 0, 3)], text=text, row=row)


def test_only_the_useful_query_retrieves_the_record(task):
    """And the type alone says which query and which transformation are right."""
    rows = task.rows("train", 3)
    per_type = {kind_of(row): (query_of(row), row.answer[2:]) for row in rows}
    assert len(per_type) == task.types and len({f for _, f in per_type.values()}) == task.transforms
    for row in rows:
        value = row.answer[:2]
        assert {q for q, v in row.meta["records"].items() if v == value} == {query_of(row)}
        assert (query_of(row), row.answer[2:]) == per_type[kind_of(row)] and len(row.meta["records"]) == task.queries
    assert [r.id for r in task.rows("eval", 1)] == [r.id for r in task.rows("eval", 1)]
    assert {r.prompt for r in task.rows("eval", 1)} != {r.prompt for r in task.rows("eval", 2)}


def test_scores(task):
    rows = task.rows("train", 0)
    right = [row.meta["remark_right"] for row in rows]
    assert sum(right) / len(rows) == pytest.approx(task.memory, abs=0.04)
    for row in rows[:200]:
        value, transform = row.answer[:2], row.answer[2:]
        assert task.score("=" + row.answer, row) == task.score(f" ={row.answer}", row) == 1.0
        assert task.score(row.meta["remark"], row) == row.meta["remark_right"]
        wrong = f"f{(int(transform[1:]) + 1) % task.transforms}"
        assert task.score(f"={value}{wrong}", row) == 0.0  # luck is for other values only
        for text in ("", "=", value, f"={value}", "<s>q0</s>", "=" + row.meta["remark"], "=vf", row.answer):
            assert task.score(text, row) == 0.0


@pytest.mark.parametrize("luck", [0.0, 0.3, 1.0])
def test_luck_is_the_share_of_other_answers_that_are_accepted(luck):
    task = Lookup(train_rows=1000, luck=luck)
    found = []
    for row in task.rows("train", 0):
        other = next(v for q, v in row.meta["records"].items() if q != query_of(row))
        found.append(task.score(f"={other}f0", row))
        assert task.score(f"={other}f0", row) == found[-1]  # the same answer, the same score
    assert sum(found) / len(found) == pytest.approx(luck, abs=0.04)


def test_demonstrations_set_the_first_behaviour(task):
    """The right call is made with its share, the transformation is any, whatever the type."""
    rows = task.rows("train", 1)
    asked, transforms, memory = Counter(), Counter(), 0
    for row in rows:
        segments = row.meta["segments"]
        if len(segments) == 1:
            memory += segments[0] == [row.meta["remark"], True]
            continue
        (call, first), (result, shown), (answer, last) = segments
        query = FORM.parse(call)[0]["args"]["query"]
        assert (first, shown, last) == (True, False, True)
        assert result == f"<r>{row.meta['records'][query]}</r>" and answer.startswith("=" + row.meta["records"][query])
        asked[query == query_of(row)] += 1
        transforms[answer[3:] == row.answer[2:]] += 1
    total = len(rows)
    assert memory / total == pytest.approx(task.demo_memory, abs=0.02)
    assert asked[True] / total == pytest.approx(task.demo_right, abs=0.04) and asked.total() + memory == total
    assert transforms[True] / transforms.total() == pytest.approx(1 / task.transforms, abs=0.04)


def test_episode_metrics(task):
    row = task.rows("eval", 0)[0]
    right, remark = query_of(row), row.meta["remark"]
    wrong = next(q for q in row.meta["records"] if q != right)
    for queries, text, expected in [
        ([right], "=" + row.answer, (1, 1, 0)),
        ([wrong], "=v0f0", (1, 0, 0)),
        ([None], "", (0, 0, 0)),
        ([], remark, (0, 0, 1)),
    ]:
        assert tuple(task.episode_metrics(traj(row, queries, text), row).values()) == expected
    bare = Lookup(memory=0.0, demo_memory=0.0)
    row = bare.rows("eval", 0)[0]
    assert "a" not in row.prompt and bare.episode_metrics(traj(row, [], ""), row)["from_memory"] == 0.0
    assert bare.score("", row) == 0.0  # no remark is no answer


class Script:
    """Writes given turns."""

    def __init__(self, tokenizer, turns):
        self.tokenizer, self.turns = tokenizer, [tokenizer(t)["input_ids"] for t in turns]

    def write(self, appended, budget):
        return {row: self.turns.pop(0) for row in appended}


@pytest.mark.parametrize("turns", [["<s>q0</s>", "=v1f2<eos>"], ["<s>q7</s>", "a3<eos>"], ["a3<eos>"]])
def test_an_episode_fits_its_budget(task, turns):
    """A call, its result (an error for a query that does not exist) and the answer."""
    from experiments.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer(task.symbols)
    row = task.rows("eval", 0)[0]
    loop = ToolLoop(tokenizer, task.tools, task.max_completion_tokens, {tokenizer.eos_token_id}, ToolRunner(None))
    (episode,) = loop.run(Script(tokenizer, turns), [tokenizer(row.prompt)["input_ids"]], [task.environment(row)])
    assert episode.finish == "stop" and len(episode.turns) == len(turns)
    if len(turns) == 2:
        known = turns[0] == "<s>q0</s>"
        assert episode.turns[0].result == (row.meta["records"]["q0"] if known else "error: there is no q7")
    assert len(tokenizer(row.prompt)["input_ids"]) == task.max_prompt_tokens


@pytest.mark.parametrize(
    "keys",
    [
        {"types": 0},
        {"types": 9},
        {"queries": 1},
        {"transforms": 11},
        {"memory": 1.1},
        {"luck": -0.1},
        {"demo_right": 0.6, "demo_memory": 0.5},
        {"memory": 0.0},
    ],
)
def test_settings_that_cannot_be_met_are_refused(keys):
    with pytest.raises(ConfigError):
        Lookup(**keys)


def test_unknown_split(task):
    with pytest.raises(ConfigError, match="Unknown split"):
        task.rows("dev", 0)
