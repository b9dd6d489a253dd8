from __future__ import annotations

import math

import pytest

from experiments.judging.pairs import (
    TIE,
    UNPARSABLE,
    Item,
    Question,
    Verdict,
    questions,
    read_verdicts,
    write_verdicts,
)
from methods.errors import DataError

ITEM = Item("7", "rewardbench", "hep-go", "say hi", ("hi", "no way"), (1, 0), meta={"model": "m"})


def test_an_item_survives_its_json_form():
    assert Item.from_json(ITEM.to_json()) == ITEM
    assert ITEM.cluster == "7" and ITEM.lengths == (2, 6) and ITEM.comparisons() == [(0, 1)]


@pytest.mark.parametrize(("responses", "grades"), [(("a",), (1,)), (("a", "b"), (1,))])
def test_an_item_without_a_grade_for_each_response_is_refused(responses, grades):
    with pytest.raises(DataError, match="hep-go / 7"):
        Item("7", "rewardbench", "hep-go", "q", responses, grades)


def test_both_orders_are_the_same_pair_turned_round_and_the_seed_draws_which_comes_first():
    items = [Item(str(k), "b", "s", "q", ("x", "y"), (1, 0)) for k in range(200)]
    asked = list(questions(items, seed=3))
    assert len(asked) == 400
    for first, second in zip(asked[::2], asked[1::2], strict=True):
        assert second == first.swapped() and second.swapped() == first and first.slots == second.slots[::-1]
    chosen_first = sum(question.gold == 0 for question in asked[::2])
    assert 70 < chosen_first < 130
    again = {q.key: q.order for q in questions(items[::-1], seed=3)}
    assert again == {q.key: q.order for q in asked}, "the order of the items must not change what is asked"
    assert [q.slots for q in questions(items, seed=4, orders="seeded")] != [q.slots for q in asked[::2]]


def test_all_responses_at_once_are_shuffled_and_equal_grades_are_never_compared():
    item = Item("1", "b", "s", "q", tuple("abcd"), (1, 0, 0, 0))
    (asked,) = questions([item], seed=0, form="all")
    assert sorted(asked.slots) == [0, 1, 2, 3] and asked.responses[asked.gold] == "a"
    assert [q.slots for q in questions([item], seed=0)] and len(list(questions([item], 0))) == 6
    assert list(questions([Item("2", "b", "s", "q", ("x", "y"), (1, 1))], 0)) == []


@pytest.mark.parametrize(("scores", "choice"), [((1, 2), 1), ((2, 2), TIE), ((math.nan, 2), UNPARSABLE), ((3, 1), 0)])
def test_scores_make_a_verdict(scores, choice):
    assert Verdict.of_scores(Question(ITEM, (1, 0)), scores).choice == choice


def test_a_choice_outside_the_slots_is_refused():
    with pytest.raises(ValueError, match="choice 2"):
        Verdict(Question(ITEM, (0, 1)), 2)


def test_verdicts_survive_their_file(tmp_path):
    asked = list(questions([ITEM], seed=0))
    said = [Verdict(asked[0], 0, "A \ud800"), Verdict.of_scores(asked[1], (0.1, math.nan))]
    path = tmp_path / "new" / "verdicts.parquet"
    assert write_verdicts(path, said, {"judge": "me"}) == 2
    rows = read_verdicts(path, text=True).to_pylist()
    assert rows[0] == said[0].row() | {"text": "A \\ud800"}
    assert rows[1]["choice"] == UNPARSABLE and rows[1]["lengths"] == [ITEM.lengths[k] for k in asked[1].slots]
    assert [p.name for p in path.parent.iterdir()] == ["verdicts.parquet"]


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_file_that_is_no_verdict_file_is_one_paragraph(tmp_path, content):
    path = tmp_path / "v.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"v\.parquet"):
        read_verdicts(path)


def test_a_file_of_other_columns_or_without_rows_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"id": ["1"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no benchmark, subset"):
        read_verdicts(tmp_path / "other.parquet")
    write_verdicts(tmp_path / "none.parquet", [])
    with pytest.raises(DataError, match="holds no verdict"):
        read_verdicts(tmp_path / "none.parquet")
