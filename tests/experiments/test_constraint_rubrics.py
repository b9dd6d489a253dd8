"""CDRRM in the constraint world: teacher, filter, the training task and the study."""

from __future__ import annotations

import random

import pytest

from experiments.judging.pairs import TIE
from experiments.judging.teacher import Teacher, discrimination, read, recovered, spell, verdict
from experiments.judging.world import case
from experiments.studies.cdrrm_filter import CdrrmFilter
from experiments.tasks.constraint_rubrics import ConstraintRubrics
from methods.errors import ConfigError

EXACT = Teacher(status=0.0, relevance=0.0)


def test_a_teacher_without_noise_names_the_broken_rules():
    for k in range(30):
        found = case(0, str(k))
        right, wrong = found.answers(True)[0], found.answers(False)[0]
        rules = EXACT.rubric(found, wrong, right, random.Random(k))
        required = [found.rules[j] for j in found.required]
        assert set(rules) == {rule for rule in required if not rule.holds(wrong)}
        assert verdict(rules, wrong, right) == 1 and verdict(rules, right, wrong) == 0
        assert (discrimination(rules, [right], [wrong]) == 1).all()
    assert verdict([], "a", "b") == TIE


def test_every_rule_can_be_written_and_read():
    for k in range(20):
        rules = list(case(1, str(k)).rules)
        assert read(spell(rules)) == rules
    assert read("has z") is None and read("") is None and read("has a; ") is None


def test_the_teacher_never_sees_the_label():
    """Random labels reach the filter only: rubrics before it are the same, and about half of them are kept."""
    true, told_nothing = (CdrrmFilter(cases=40, labels=labels).simulate(0).iloc[0] for labels in ("true", "random"))
    assert true["before"] == told_nothing["before"]
    assert true["score"] > true["before"] and abs(told_nothing["kept"] - 0.5) < 0.1 < true["kept"] - 0.5


def test_a_slip_of_the_judge_drops_good_rubrics():
    found = case(0, "a")
    right, wrong = found.answers(True)[0], found.answers(False)[0]
    rules = EXACT.rubric(found, right, wrong, random.Random(0))
    rng = random.Random(0)
    assert recovered(rules, right, wrong, 0, 0.0, 5, rng) and not recovered(rules, right, wrong, 1, 0.0, 1, rng)
    kept = sum(recovered(rules, right, wrong, 0, 0.5, 2, rng) for _ in range(400)) / 400
    assert abs(kept - 0.75**2) < 0.1


def test_rows_and_scores():
    task = ConstraintRubrics(train_rows=60, eval_rows=9)
    train = task.rows("train", 0)
    assert train == task.rows("train", 0) and 20 < len(train) < 60
    assert 0.2 < sum(row.answer == "A" for row in train) / len(train) < 0.8
    rows = task.rows("eval", 0)
    for one, back in zip(rows[::2], rows[1::2], strict=True):
        gold = one.prompt.split("\n")[0]  # the instruction itself
        assert task.score(gold, one) == task.score(gold, back) == 1
        assert {one.answer, back.answer} == {"A", "B"}
    assert task.score("nonsense", rows[0]) == 0.5 and task.metrics("nonsense", rows[0])["invalid"] == 1
    direct = ConstraintRubrics(target="winner", train_rows=9, eval_rows=9)
    assert [direct.score("A", row) for row in direct.rows("eval", 0)][:2] in ([1.0, 0.0], [0.0, 1.0])
    always_a = [direct.metrics("A", row)["slot_gap"] for row in direct.rows("eval", 0)]
    assert sum(always_a) / len(always_a) == 1


def test_chosen_first_leaks_the_label_and_is_not_the_default():
    leaky = ConstraintRubrics(target="winner", slots="chosen_first", train_rows=40).rows("train", 0)
    assert {row.demo for row in leaky} == {"A"}
    assert {row.demo for row in ConstraintRubrics(target="winner", train_rows=40).rows("train", 0)} == {"A", "B"}


def test_what_is_refused():
    for wrong in ({"filter": "twice"}, {"corrupt": 2}, {"eval_rows": 10}, {"judged_by": "me"}):
        with pytest.raises(ConfigError):
            ConstraintRubrics(**wrong)
    with pytest.raises(ConfigError):
        CdrrmFilter(cases=0)
