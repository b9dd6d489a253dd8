"""Local-life search in a closed vocabulary: rows, golds, readers with and without each skill, controls."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from experiments.rollout import ToolLoop
from experiments.tasks.local_life.tiny import FORM, KINDS, SYMBOLS, LocalLifeTiny
from experiments.tokenizers import tiny_tokenizer
from experiments.tools import ToolRunner
from methods.errors import ConfigError

HOP = re.compile(r"(t\d+)(\*?)")
SHOWN = re.compile(r"(q\d)(r\d)(a\d+)")


@pytest.fixture(scope="module")
def task():
    return LocalLifeTiny(size=1500, train_rows=120, eval_rows=60)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(SYMBOLS)


class Reader:
    """Plays episodes from their text alone: a Writer whose turns follow the question's plan.

    It looks around the answer before where the question says so (`forgets`: never), takes the best rank (`slot`: that
    slot always).
    """

    def __init__(self, tokenizer, forgets=False, slot=None):
        self.tokenizer, self.forgets, self.slot = tokenizer, forgets, slot
        self.text, self.chosen = {}, {}

    def write(self, appended, budget):
        written = {}
        for i, ids in appended.items():
            self.text[i] = self.text.get(i, "") + self.tokenizer.decode(ids)
            turn = self.turn(self.text[i], self.chosen.setdefault(i, []))
            written[i] = self.tokenizer(turn)["input_ids"] + [self.tokenizer.eos_token_id] * (not turn.endswith("</s>"))
            assert len(written[i]) <= budget[i]
            self.text[i] += turn
        return written

    def turn(self, text, chosen):
        prompt, results = text.partition("?")[0], re.findall("<r>(.*?)</r>", text)
        plan, place = HOP.findall(prompt), re.match(r"d\d", prompt)[0]
        if results:
            shown = SHOWN.findall(results[-1])
            _, slot, area = next(m for m in shown if (m[0] == "q0" and self.slot is None) or m[1] == (self.slot or ""))
            chosen.append(slot)
            if len(results) == len(plan):
                return f"{slot}={''.join(chosen)}"
            place = area if plan[len(results)][1] and not self.forgets else place
        return f"<s>{''.join(chosen[-1:])}{place}{plan[len(results)][0]}</s>"


def play(task, rows, tokenizer, **lacks):
    """The trajectories of a reader's episodes."""
    ends = {tokenizer.eos_token_id}
    loop = ToolLoop(tokenizer, task.tools, task.max_completion_tokens, ends, ToolRunner())
    prompts = [tokenizer(row.prompt)["input_ids"] for row in rows]
    episodes = loop.run(Reader(tokenizer, **lacks), prompts, [task.environment(row) for row in rows])
    return [e.trajectory(row, p, 0, 0) for e, row, p in zip(episodes, rows, prompts, strict=True)]


def scores(task, rows, tokenizer, **lacks):
    return [task.score(t.text, row) for t, row in zip(play(task, rows, tokenizer, **lacks), rows, strict=True)]


# ---------------------------------------------------------------- rows


def test_rows_are_the_same_for_a_seed(task):
    again = LocalLifeTiny(size=1500, train_rows=120, eval_rows=60)
    for split in ("train", "eval"):
        rows = task.rows(split, 3)
        assert rows == again.rows(split, 3) != task.rows(split, 4)
        assert len({row.id for row in rows}) == len(rows) == (120 if split == "train" else 60)
        assert [sum(row.tier == tier for row in rows) for tier in task.tiers] == [len(rows) / 2] * 2


def test_everything_said_is_made_of_symbols_and_fits(task, tokenizer):
    for row in task.rows("train", 0):
        pieces = [row.prompt, *(text for text, _ in row.meta["segments"])]
        ids = [tokenizer(piece)["input_ids"] for piece in pieces]
        assert all(
            tokenizer.unk_token_id not in i and tokenizer.decode(i) == p for i, p in zip(ids, pieces, strict=True)
        )
        assert len(ids[0]) <= task.max_prompt_tokens
        assert sum(map(len, ids[1:])) < task.max_completion_tokens
        for (_, trained), piece in zip(row.meta["segments"], ids[1:], strict=True):
            # A result stands between <r> and </r>; an answer is followed by the end of the text.
            assert (
                len(piece) < task.tools.max_turn_tokens if trained else len(piece) <= task.tools.max_result_tokens + 2
            )


def test_cities_and_merchants_of_the_splits_are_disjoint(task):
    worlds = [task.ground(split).world for split in ("train", "eval", "test")]
    for i, world in enumerate(worlds):
        for other in worlds[i + 1 :]:
            assert not set(world.cities) & set(other.cities)
            assert not set(world.merchants["poi_id"]) & set(other.merchants["poi_id"])
    for split in ("train", "eval"):
        ground = task.ground(split)
        for row in task.rows(split, 0):
            assert row.meta["city"] in ground.world.cities
            assert all(ground.world.merchant(poi).city == row.meta["city"] for poi in row.answer)


def test_golds_are_the_best_rated_of_the_table(task):
    """By another way: the data frame of the world, filtered and sorted."""
    ground = task.ground("eval")
    for row in task.rows("eval", 0):
        table = ground.world.merchants.query("city == @row.meta['city']")
        district, found = ground.places[row.meta["city"]][row.prompt[:2]], []
        for kind, dependent in HOP.findall(row.prompt):
            here = table[table["subcategory"] == KINDS[int(kind[1:])]]
            around = here[here["district"] == district]
            if dependent:
                here = here[here["business_area"] == found[-1]["business_area"]]
                assert len(around) > 1
            else:
                here = around
            found.append(here.sort_values("rating").iloc[-1])
        assert [merchant["poi_id"] for merchant in found] == row.answer


# ---------------------------------------------------------------- readers


def test_a_reader_of_the_text_solves_all_and_one_without_dependencies_no_dependent_question(task, tokenizer):
    rows = task.rows("eval", 0)
    assert scores(task, rows, tokenizer) == [1.0] * len(rows)
    dependent = ["*" in row.prompt for row in rows]
    assert 0.6 < sum(dependent) / len(rows) < 1
    assert scores(task, rows, tokenizer, forgets=True) == [float(not d) for d in dependent]
    assert sum(scores(task, rows, tokenizer, slot="r0")) < 0.4 * len(rows)


@pytest.mark.parametrize("rounds, right", [(1, ()), (2, ("2",)), (3, ("2", "3"))])
def test_so_many_rounds_so_many_hops(task, tokenizer, rounds, right):
    short = replace(task, rounds=rounds, max_completion_tokens=0)
    rows = task.rows("eval", 0)
    trajs = play(short, rows, tokenizer)
    assert [short.score(t.text, row) for t, row in zip(trajs, rows, strict=True)] == [
        float(r.tier in right) for r in rows
    ]
    searches = [short.episode_metrics(t, row)["searches"] for t, row in zip(trajs, rows, strict=True)]
    assert searches == [min(rounds, float(row.tier)) for row in rows]


def test_answers_are_slots_of_the_searches_in_order(task):
    row = task.rows("eval", 0)[0]
    errand = task.environment(row)
    for kind in ("t0", "t1"):
        errand.rag("d0", kind)
    one, other = errand.found
    assert errand.resolve("r1=r1r0") == f"{one[1]} {other[0]}" and errand.resolve("=r0") == one[0]
    for text in ("", "=", "r1r0", "r1=r0r0r0", "=r9", "<s>d0t0</s>", "r1=r1 and r0"):
        assert errand.resolve(text) == ""
    # Citing all that was shown is no answer.
    assert task.score(" ".join(one + other), replace(row, answer=[one[0], other[0]])) == 0
    with pytest.raises(LookupError):
        errand.rag("a99", "t0")


# ---------------------------------------------------------------- controls


@pytest.mark.parametrize("results", ["random", "blind"])
def test_controls_break_the_link_between_question_and_result_in_training_only(task, tokenizer, results):
    control = replace(task, results=results, max_completion_tokens=0)
    rows = task.rows("train", 0)
    assert control.rows("train", 0) == rows and control.warm_rows(0) == task.warm_rows(0)
    assert scores(control, task.rows("eval", 0), tokenizer) == [1.0] * 60
    assert scores(task, rows, tokenizer) == [1.0] * len(rows) and sum(scores(control, rows, tokenizer)) < len(rows) / 4
    same = there = searches = alike = 0
    for row in rows:
        real, false, other = task.environment(row), control.environment(row), control.environment(row)
        for kind, _ in HOP.findall(row.prompt):
            true, shown = real.rag(row.prompt[:2], kind), false.rag(row.prompt[:2], kind)
            assert re.sub(r"\d+", "0", true) == re.sub(r"\d+", "0", shown)  # the same form
            assert sorted(m[0] for m in SHOWN.findall(true)) == sorted(m[0] for m in SHOWN.findall(shown))
            # Another question gets the same text, if it is as long: it says nothing about what was asked.
            asked = other.rag("d4", "t0")
            assert asked == shown or len(other.found[-1]) != len(false.found[-1])
            alike += asked == shown
            same, there, searches = same + (true == shown), there + (real.found[-1] == false.found[-1]), searches + 1
    assert alike > searches / 4
    assert same < searches / 10
    assert there == (searches if results == "blind" else 0)


@pytest.mark.parametrize(
    "wrong", [{"results": "rnadom"}, {"demo_slip": 1.5}, {"rounds": 0}, {"hops": {"9": 9}}, {"demo_forget": -1}]
)
def test_wrong_settings_are_said(wrong):
    with pytest.raises(ConfigError):
        LocalLifeTiny(**wrong)


def test_an_unknown_split_is_said(task):
    with pytest.raises(ConfigError, match="split"):
        task.rows("dev", 0)


def test_a_call_names_place_and_kind_with_or_without_the_slot_chosen():
    assert (
        FORM.parse("<s>d1t2</s>")
        == FORM.parse("<s>r2d1t2</s>")
        == [{"tool": "rag", "args": {"place": "d1", "kind": "t2"}}]
    )
    assert FORM.parse("<s>t2d1</s>") == [None] and FORM.parse("r0=r0") == []
