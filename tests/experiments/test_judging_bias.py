"""The bias metrics on the worked numbers of the CDRRM sheet (examples 4 to 6)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.judging.bias import Said, facts, length_gap, longer_bias, regression
from experiments.judging.credit import arrays, both_orders
from experiments.judging.pairs import UNPARSABLE, Item, Question, Verdict, schema


def table(verdicts):
    import pyarrow as pa

    return pa.Table.from_pylist([verdict.row() for verdict in verdicts], schema=schema())


def asked(first: str, second: str, lengths=(5, 3)):
    """Verdicts on pairs whose chosen answer stands in A first, in B then; `-` is unparsable."""
    found = []
    for k, (one, two) in enumerate(zip(first, second, strict=True)):
        item = Item(f"{k}", "pairs", "all", f"q{k}", ("x" * lengths[0], "y" * lengths[1]), (1, 0))
        question = Question(item, (0, 1))
        found.append(Verdict(question, "AB".find(one) if one != "-" else UNPARSABLE))
        found.append(Verdict(question.swapped(), "AB".find(two) if two != "-" else UNPARSABLE))
    return arrays(table(found))


def test_worked_verdicts_in_both_orders():
    verdicts = asked("AAAABAB-", "BBAAABBB")
    found = facts(verdicts)
    assert found["consistency"].mean == 0.5
    assert found["first slot"].mean - 0.5 == pytest.approx(0.033333, abs=1e-6)
    assert found["unparsable"].mean == 1 / 16
    pairs = verdicts.pairs
    assert np.mean((pairs.seeded_N == 0) & (pairs.swapped_N == 0)) == 0.375
    assert (np.mean(pairs.seeded_N == 0), np.mean(pairs.swapped_N == 0)) == (0.625, 0.625)


@pytest.mark.parametrize(("one", "two", "credit"), [("A", "B", 1), ("B", "A", 0), ("A", "A", 0.5), ("A", "-", 0.5)])
def test_credit_of_both_orders(one, two, credit):
    assert both_orders(asked(one, two).pairs).tolist() == [credit]


def verbosity():
    correct = np.array([1, 1, 1, 0, 0, 1, 0, 1], float)
    chosen, rejected = np.array([90, 80, 70, 60, 30, 20, 25, 50]), np.array([40, 30, 60, 20, 80, 70, 90, 50])
    return Said(correct, np.ones(8, bool), chosen, rejected, np.arange(8))


def test_worked_verbosity():
    told = verbosity()
    apart = told.length_first_V != told.length_second_V
    assert longer_bias(told)[apart].mean() == pytest.approx(0.142857, abs=1e-6)
    assert length_gap(told).mean == pytest.approx(0.416667, abs=1e-6)


def test_worked_regression():
    def numbers(text):
        return np.array(text.split(), float)

    told = Said(
        numbers("1 1 0 0 1 0 0 1 1 1 1 0"),
        numbers("1 1 0 0 1 0 1 0 1 0 0 1").astype(bool),
        numbers("90 50 80 30 40 60 20 70 45 25 55 35"),
        numbers("45 60 40 60 30 50 80 35 50 75 30 40"),
        np.arange(12),
    )
    assert regression(told) == pytest.approx((0.399812, 0.479664, 0.997705), abs=1e-6)


def test_one_sided_and_unparsable_judges_do_not_break_the_regression():
    told = verbosity()
    ones = Said(np.ones(8), told.gold_first_V, told.length_first_V, told.length_second_V, told.cluster_V)
    assert regression(ones)[0] > 2 and all(map(math.isfinite, regression(ones)))
    nothing = Said(np.full(8, np.nan), told.gold_first_V, told.length_first_V, told.length_second_V, told.cluster_V)
    assert all(map(math.isnan, regression(nothing)))


def test_equal_lengths_and_a_single_order_leave_facts_unknown():
    found = facts(asked("AB", "BA", lengths=(4, 4)))
    assert math.isnan(found["longer bias"].mean) and math.isnan(found["length gap"].mean)
    item = Item("1", "pairs", "all", "q", ("long", "s"), (1, 0))
    once = facts(arrays(table([Verdict(Question(item, (0, 1)), 0)])))
    assert math.isnan(once["consistency"].mean) and once["first slot"].mean == 1
    assert math.isnan(once["length gap"].mean), "one length side only"


def test_always_first():
    found = facts(asked("AAAA", "AAAA"))
    assert found["first slot"].mean == 1 and found["consistency"].mean == 0
    scored = Verdict.of_scores(Question(Item("1", "pairs", "all", "q", ("a", "bb"), (1, 0)), (0, 1)), (1, 2))
    assert math.isnan(facts(arrays(table([scored])))["first slot"].mean), "a pointwise judge has no slots"
