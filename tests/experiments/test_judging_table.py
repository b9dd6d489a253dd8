"""The page of a benchmark: trivial judges from the verdict file alone, figures' numbers, names that come from data."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.judging.bias import said
from experiments.judging.controls import ControlJudge
from experiments.judging.credit import arrays
from experiments.judging.figures import _length, by_length, confusion
from experiments.judging.outcome import pair_rows
from experiments.judging.pairs import UNPARSABLE, Item, Question, Verdict, ask, questions, read_verdicts, write_verdicts
from experiments.judging.table import markdown, measure, report, safe, trivial, with_trivial
from experiments.tasks.constraint_world import ConstraintBenchmark
from methods.errors import DataError


def table(tmp_path, rule, name="rm_bench", form="pairs", count=40):
    asked = questions(ConstraintBenchmark(name, count=count).stream(), 0, form)
    path = tmp_path / f"{rule}-{name}-{form}.parquet"
    write_verdicts(path, ask(ControlJudge(rule, form=form), asked), {"judge": rule})
    return read_verdicts(path), path


WHAT = [("rm_bench", "pairs"), ("rm_bench", "all"), ("rewardbench2", "all")]
RULES = [(*what, rule) for what in WHAT for rule in ("longer", "shorter", "always_first")]
RULES.remove(("rm_bench", "all", "always_first"))  # a choice among six says nothing about the nine pairs


@pytest.mark.parametrize(("name", "form", "rule"), RULES)
def test_trivial_judges_from_the_file_are_the_control_judges(tmp_path, name, form, rule):
    of_oracle, _ = table(tmp_path, "oracle", name, form)
    asked = measure(table(tmp_path, rule, name, form)[0], rule)
    assert measure(trivial(of_oracle, rule), rule).scores == asked.scores


def test_scores_of_responses_give_the_same_matrix_as_pairs(tmp_path):
    pairs, lists = table(tmp_path, "longer")[0], table(tmp_path, "longer", form="all")[0]
    assert lists.num_rows * 18 == pairs.num_rows
    by_pair, by_list = measure(pairs, "longer").scores, measure(lists, "longer").scores
    assert {k: v["official"] for k, v in by_pair.items()} == {k: v["official"] for k, v in by_list.items()}


def test_always_first_and_random_say_what_they_are(tmp_path):
    rows = {row.judge: row for row in with_trivial(table(tmp_path, "oracle", count=150)[0], "oracle", "file")}
    assert list(rows) == ["oracle", "random", "longer", "shorter", "always_first"]
    first = rows["always_first"]
    assert first.scores["Overall"]["both"].mean == 0.5 and first.facts["first slot"].mean == 1
    assert first.facts["consistency"].mean == 0 and first.slopes[0] > 3
    assert rows["random"].scores["Overall"]["both"].mean == pytest.approx(0.5, abs=0.05)
    assert rows["longer"].slopes[2] > 3 > abs(rows["oracle"].slopes[2]) and rows["oracle"].slopes[1] > 3


def test_the_first_of_six_is_no_row_beside_scores_of_each(tmp_path):
    rows = [row.judge for row in with_trivial(table(tmp_path, "longer", form="all")[0], "mine", "file")]
    assert rows == ["mine", "random", "longer", "shorter"]


def test_names_from_data_cannot_write_markup(tmp_path):
    assert safe("a|b\n<script>") == "a|b &lt;script&gt;"
    assert safe("[x](javascript:y)") == "&#91;x&#93;(javascript:y)"
    item = Item("1", "pairs", "x|y\n# z", "q", ("a", "b"), (1, 0))
    other = Item("2", "pairs", "plain", "q", ("a", "b"), (1, 0))
    path = tmp_path / "v.parquet"
    write_verdicts(path, [Verdict(Question(i, (0, 1)), UNPARSABLE) for i in (item, other)], {"judge": "<b>|\n"})
    page = report([path], tmp_path, left_out={"tie label": 2}).read_text()
    assert "| x\\|y # z" in page and "<b>" not in page and "Left out: 2 with tie label." in page
    assert "not one verdict could be parsed" in page and "Overall, strict" in page
    assert all(line.count("| ") > 1 for line in page.splitlines() if line.startswith("|"))


def test_any_name_of_a_judge_can_be_drawn(tmp_path):
    told = {name: said(arrays(table(tmp_path, "longer")[0])) for name in ("$a$", r"$\frac{$", "_mine")}
    legend = _length(told).axes[0].get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == list(told)
    path = tmp_path / "v.parquet"
    item = Item("1", "pairs", "all", "q", ("a", "b"), (1, 0))
    write_verdicts(path, [Verdict(Question(item, (0, 1)), 0)], {"judge": r"$\frac{$"})
    assert report([path], tmp_path / "page").is_file()


def test_two_benchmarks_are_no_table(tmp_path):
    files = [table(tmp_path, "oracle", name)[1] for name in ("rm_bench", "rmb")]
    with pytest.raises(DataError, match="rm_bench, rmb"):
        report(files, tmp_path / "page")


def test_what_the_figures_show(tmp_path):
    told = said(arrays(table(tmp_path, "longer")[0]))
    points = by_length(told)
    assert [i.mean for x, i in points if x < -0.1] == [0] * sum(x < -0.1 for x, _ in points)
    assert [i.mean for x, i in points if x > 0.1] == [1] * sum(x > 0.1 for x, _ in points)
    counts = confusion(said(arrays(table(tmp_path, "always_first")[0])))
    assert counts.tolist() == [[360, 0, 0, 0], [360, 0, 0, 0]]
    assert np.array_equal(confusion(said(arrays(table(tmp_path, "oracle")[0])))[:, :2], np.diag([360, 360]))


def test_one_page_tells_of_differences(tmp_path):
    rows = [measure(table(tmp_path, rule)[0], rule) for rule in ("longer", "oracle")]
    page = markdown(rows)
    assert "## oracle minus longer, on the same items" in page and "## Every number of longer" in page


@pytest.mark.parametrize("form", ["pairs", "all"])
def test_an_evaluation_names_the_levels_of_the_styles(tmp_path, form):
    """hard: the chosen answer is of the plainer style; the longer one wins all of the easy pairs and none of those."""
    texts = ("a", "aaa", "aaaaa", "b", "bbb", "bbbbb")
    items = [Item(f"chat/{k}", "rm_bench", "chat", f"p{k}", texts, (1, 1, 1, 0, 0, 0)) for k in range(4)]
    file = tmp_path / "verdicts.parquet"
    judge = ControlJudge("longer", form=form)
    write_verdicts(file, ask(judge, questions(items, 0, form)), {"judge": "longer"})
    frame = pair_rows(arrays(read_verdicts(file)))
    assert frame.groupby("tier")["score"].agg(["mean", "size"]).to_dict("index") == {
        "easy": {"mean": 1.0, "size": 12}, "hard": {"mean": 0.0, "size": 12},
        "normal": {"mean": 0.5 if form == "pairs" else 0.0, "size": 12},
    }  # fmt: skip
    assert frame["gap"].mean() == pytest.approx(1.0)
