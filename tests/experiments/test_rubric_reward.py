"""reward=rubric: grades and tournaments over an engine that answers by rule."""

from __future__ import annotations

import json

import pytest

from experiments import rewards
from experiments.engines.base import BaseEngine, Result
from experiments.rubric_reward import RubricReward
from experiments.tasks.base import Row
from methods.errors import ConfigError, DataError

RUBRIC = {
    "hard_rules": [
        {"rule_id": "1", "type": "must", "criterion": "has a", "test": "look"},
        {"rule_id": "2", "type": "forbid", "criterion": "has b", "test": "look"},
    ],
    "principles": [{"principle_id": "p", "description": "short"}],
}


class Grader(BaseEngine):
    """Grades by letters; as a judge it prefers the answer with more `a`, and slot A where they are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def identity(self):
        return {"engine": "grader"}

    def _stream(self, requests):
        for index, request in enumerate(requests):
            self.asked += 1
            content = request.messages[1]["content"]
            yield index, [Result(self.answer(content), None, None, "stop")]

    def answer(self, content: str) -> str:
        if "<response>" in content:
            text = content.split("<response>\n")[1].split("\n</response>")[0]
            if text == "?":
                return "I cannot say"
            rules = [{"passed": letter in text} for letter in "ab"]
            return json.dumps({"hard_rules": rules, "principles": [{"grade": 1.0 if len(text) < 3 else 0.0}]})
        a, b = (content.split(f"<response_{slot}>\n")[1].split("\n</")[0].count("a") for slot in "ab")
        return f"Winner: Response {'A' if a >= b else 'B'}"


def row(name: str, **meta) -> Row:
    return Row(name, "write a", "", meta=meta)


def test_each_answer_is_graded_by_the_rubric_of_its_row():
    rows = [row("x", rubric=RUBRIC)] * 2 + [row("y", rubric=json.dumps(RUBRIC))] * 3
    found = RubricReward("pointwise", Grader())(["a", "b", "aaa", "ab", "?"], rows)
    assert found == [pytest.approx(v) if v is not None else None for v in (1.0, 0.2, 0.8, 0.6, None)]


def test_a_tournament_in_both_orders():
    engine = Grader()
    rows = [row("x")] * 4 + [row("y")] * 2
    found = RubricReward("tournament", engine)(["aaa", "a", "a", "b", "same", "same"], rows)
    # "a" meets itself without being asked; the two orders of equal counts name different answers
    assert found == pytest.approx([1.0, 0.5, 0.5, 0.0, 0.5, 0.5])
    assert engine.asked == 4 * 3 - 2


def test_a_verdict_for_the_slot_is_worth_one_half():
    """The judge says A in both orders, or cannot be read in one: neither answer has won."""

    class Halting(Grader):
        def answer(self, content: str) -> str:
            return "hm" if "<response_a>\nmute" in content else super().answer(content)

    meet = RubricReward("tournament", Halting())
    assert meet(["ac", "ca"], [row("x")] * 2) == [0.5, 0.5]
    assert meet(["aa", "mute"], [row("x")] * 2) == [0.5, 0.5]


def test_a_grading_that_is_cut_off_or_failed_is_no_reward():
    class Ended(Grader):
        def __init__(self, finish: str) -> None:
            super().__init__()
            self.finish = finish

        def _stream(self, requests):
            for index, results in super()._stream(requests):
                yield index, [Result(results[0].text if self.finish == "length" else "", None, None, self.finish)]

    for finish in ("length", "error"):
        assert RubricReward("pointwise", Ended(finish))(["a"], [row("x", rubric=RUBRIC)]) == [None]


def test_what_is_refused():
    with pytest.raises(DataError, match="no valid rubric"):
        RubricReward("pointwise", Grader())(["a"], [row("x")])
    with pytest.raises(ConfigError, match="at most 8"):
        RubricReward("tournament", Grader())(list("abcdefghi"), [row("x")] * 9)
    for kwargs in ({"mode": "best"}, {}, {"max_tokens": 0}):
        with pytest.raises(ConfigError):
            RubricReward(**({"engine": Grader()} | kwargs if kwargs else {}))


def test_the_configuration_builds_it():
    from experiments.tasks.base import Task

    kwargs = {"mode": "tournament", "engine": {"_target_": f"{__name__}.Grader"}}
    entry = {"name": "rubric", "function": "rubric", "kwargs": kwargs}
    (spec,) = rewards.build([entry], Task())
    assert spec.fn(["aa", "b"], [row("x")] * 2) == [1.0, 0.0]
    with pytest.raises(ConfigError, match="does not take these arguments"):
        rewards.build([entry | {"kwargs": {"modus": 1}}], Task())
