"""The tools of the local-life world, the agent loop with its forced last answer, the task's scores and its judge."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from experiments import messages
from experiments.engines.base import Result, Usage
from experiments.tasks.local_life.generate import generated
from experiments.tasks.local_life.judge import Judge
from experiments.tasks.local_life.playground import UNSEEN, Playground, Tags, Visit
from experiments.tasks.local_life.prompts import LAST
from experiments.tasks.local_life.task import LocalLife
from experiments.tools import ToolRunner
from methods.base import Segment, Trajectory, Turn
from methods.errors import ConfigError


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return LocalLife(size=400, cities=2, districts=2, areas=2, questions=12)


@pytest.fixture(scope="module")
def rows(task):
    return task.rows("eval", 0)


@pytest.fixture(scope="module")
def ground():
    return Playground(generated(0, 200, cities=2, districts=2, areas=2), retrieve=30, show=5)


def said(ground, city, tool, query):
    """What the model reads, and the recorded call."""
    visit = Visit(ground, city)
    (text,) = ToolRunner()([(visit, {"tool": tool, "args": {"query": query}})])
    return text, (visit.calls or [None])[-1]


def test_a_search_stays_in_its_city_and_finds_place_and_kind(ground):
    world, city = ground.world, ground.world.cities[0]
    area = next(p.name for p in world.places if p.kind == "area" and p.city == city)
    found = ground.search(f"{city} {area} hotpot", city)
    merchants = [world.merchant(poi) for poi, _ in found]
    assert len(found) == 5 and {m.city for m in merchants} == {city}
    assert all(m.business_area == area and m.subcategory == "hotpot" for m in merchants[:3])
    similarities = [s for _, s in found]
    assert similarities[0] == 1.0 and similarities == sorted(similarities, reverse=True)
    assert found == ground.search(f"{city} {area} hotpot", city)
    text, call = said(ground, city, "rag", f"{area} hotpot")
    assert all(poi in text for poi in call.found) and call.ok and len(call.found) == 5
    assert f"{merchants[0].name} ({merchants[0].poi_id})" in text and "similarity: 1.00" in text


def test_unknown_words_find_nothing_and_that_is_no_error(ground):
    text, call = said(ground, ground.world.cities[0], "rag", "xyzzy qwrtp")
    assert call.ok and call.found == () and text.endswith("0 merchants.")


def test_an_unknown_city_is_an_error_text_and_the_call_counts(ground):
    text, call = said(ground, "Nowhere", "rag", "hotpot")
    assert text.startswith("error:") and "Nowhere" in text and not call.ok and call.found == ()


def test_a_query_may_name_another_city(ground):
    one, other = ground.world.cities
    assert ground.city_of(f"hotpot in {other.upper()}", one) == other
    assert ground.city_of(f"from {one} to {other}", one) == one
    assert ground.city_of(f"from {one} to {other}", other) == other
    assert ground.city_of(f"{other}x hotpot", one) == one == ground.city_of("hotpot", one)


def test_calculators(ground):
    world, city = ground.world, ground.world.cities[0]
    a, b = (world.merchant(p) for p in world.merchants["poi_id"][:2])
    away = math.hypot(a.x - b.x, a.y - b.y)
    assert ground.distance(a.poi_id, b.poi_id) == pytest.approx(away)
    assert said(ground, city, "distance", f"{a.poi_id}, {b.poi_id}")[0] == f"{a.poi_id} to {b.poi_id}: {away:.2f} km"
    always = next(world.merchant(p) for p in world.merchants["poi_id"] if world.merchant(p).closed_weekday == 2)
    assert said(ground, city, "hours", f"{always.poi_id} Wednesday 12:00")[0].endswith("Wednesday at 12:00: closed")
    assert a.phone in said(ground, city, "detail", a.poi_id)[0]
    for tool, query in (
        ("distance", a.poi_id),
        ("distance", f"{a.poi_id} poi_no_1"),
        ("detail", "poi_no_1"),
        ("detail", "no id"),
        ("hours", f"{a.poi_id} Friday"),
        ("hours", f"{a.poi_id} 25:00 Friday"),
        ("hours", f"{a.poi_id} 12:00"),
    ):
        text, call = said(ground, city, tool, query)
        assert text.startswith("error:") and not call.ok, (tool, query)


def test_missing_positions_and_hours_are_told(ground):
    world = ground.world
    table = world.merchants.copy()
    table.loc[0, "x"] = float("nan")
    table.loc[0, "business_hours"] = "ask at the door"
    broken = Playground(replace(world, merchants=table))
    first, second = table["poi_id"][:2]
    assert "position" in said(broken, world.cities[0], "distance", f"{first} {second}")[0]
    assert "not known" in said(broken, world.cities[0], "hours", f"{first} Friday 12:00")[0]
    assert "ask at the door" in said(broken, world.cities[0], "detail", first)[0]


def test_the_web_has_the_event_among_its_distractors(ground):
    event = ground.world.events[0]
    text, call = said(ground, event.city, "web_search", f"{event.name} {event.date[:4]}")
    assert event.date in text and call.ok and call.found == ()
    empty = Playground(replace(ground.world, facts=[]))
    assert said(empty, event.city, "web_search", "x")[0] == "error: there is no web in this world"


def test_tags_are_calls_and_empty_or_open_ones_are_not():
    parse = Tags().parse
    text = "think <rag> a b </rag> and <web_search>c</web_search><localrag_search>d\ne</localrag_search>"
    assert [(c["tool"], c["args"]["query"]) for c in parse(text)] == [
        ("rag", "a b"),
        ("web_search", "c"),
        ("rag", "d\ne"),
    ]
    for none in ("", "<rag> </rag>", "<rag>a", "a</rag>", "<rag>a</web_search>", "<tool>a</tool>", "no call"):
        assert parse(none) == []


def test_retrieval_limits_are_checked(ground):
    with pytest.raises(ConfigError, match="retrieve"):
        Playground(ground.world, retrieve=5, show=20)
    with pytest.raises(ConfigError, match="show"):
        Playground(ground.world, show=0)


# ---------------------------------------------------------------- the loop


class Script:
    """An engine that knows texts only: each conversation gets its replies in turn."""

    name, endpoint = "script", "chat"

    def __init__(self, replies):
        self.replies, self.seen = replies, []

    def generate(self, requests, progress=None):
        self.seen.append([r.messages for r in requests])
        texts = [self.replies[len(r.messages) // 2 - 1] for r in requests]
        return [[Result(t, None, None, "stop", Usage(1, 5))] for t in texts]


def run(task, row, replies):
    engine = Script(replies)
    (talk,) = messages.episodes(task, [row], engine, [0], 10_000, temperature=0.0, top_p=1.0)
    return engine, messages.trajectory(talk, row, 0, 0)


def answer(task, row, ids=None):
    world = task.playground("eval").world
    merchants = [world.merchant(poi) for poi in (row.answer if ids is None else ids)]
    lines = [f"{i}. {m.name} ({m.poi_id}), price: {m.avg_price:g}" for i, m in enumerate(merchants, 1)]
    return "【Answer】\n" + "\n".join(lines)


def test_reference_queries_and_the_gold_answer_score_one(task, rows):
    for row in rows:
        calls = "".join(f"<rag>{query}</rag>" for query in row.meta["hop_queries"])
        engine, traj = run(task, row, [calls, answer(task, row)])
        assert task.score(traj.text, row) == 1
        (found,) = task.measure([traj])
        assert found["correctness"] == found["slot_share"] == found["in_context"] == found["hop_accuracy"] == 1
        assert found["completeness"] == found["faithfulness"] == 10 and found["evidence_recall"] == 1
        assert found["rounds"] == 2 and found["calls"] == len(row.meta["hop_queries"])
        assert all(found[f"check_{kind}"] in (1.0,) or math.isnan(found[f"check_{kind}"]) for kind in ("type", "time"))
        assert [m["role"] for m in engine.seen[-1][0]] == ["system", "user", "assistant", "user"]


def test_an_id_that_was_never_retrieved_is_a_veto(task, rows):
    row = rows[0]
    _, traj = run(task, row, [answer(task, row)])
    assert UNSEEN in traj.text and task.score(traj.text, row) == 0
    (found,) = task.measure([traj])
    assert found["slot_share"] == 1 and found["correctness"] == found["in_context"] == found["faithfulness"] == 0
    # Even where the marked part stands a second time behind the next section.
    twice = answer(task, row) + "\n【Notes】" + answer(task, row).removeprefix("【Answer】")
    assert task.score(run(task, row, [twice])[1].text, row) == 0
    # The text of the mark in a model's own answer can only hurt it.
    assert task.score(answer(task, row) + UNSEEN, row) == 0


def test_after_n_rounds_one_answer_is_forced(task, rows):
    row = rows[0]
    engine, traj = run(task, row, [f"<rag>hotpot {i}</rag><rag>cafe</rag>" for i in range(9)])
    assert len(engine.seen) == task.rounds + 1 == len(traj.turns)
    told = [talk[0][-1]["content"] for talk in engine.seen]
    assert [LAST["en"] in text for text in told] == [False] * task.rounds + [True]
    assert told[-1].startswith(LAST["en"]) and told[-1].count("LocalRAG,") == 2
    assert traj.turns[-1].result is None and task.score(traj.text, row) == 0
    (found,) = task.measure([traj])
    assert found["calls"] == 2 * task.rounds and found["rounds"] == task.rounds + 1
    assert found["redundant"] == pytest.approx(1 - (task.rounds + 1) / (2 * task.rounds))


def test_in_token_ids_the_results_are_masked_and_the_last_round_is_told(task, rows):
    from experiments.rollout import ToolLoop
    from experiments.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer(chat=True)
    end, row = tokenizer.eos_token_id, rows[0]

    class Writer:
        def write(self, appended, budget):
            return {i: [*tokenizer("<rag>hotpot</rag>")["input_ids"], end] for i in appended}

    prompts = [tokenizer("q")["input_ids"]] * 2
    loop = ToolLoop(tokenizer, replace(task.tools, max_result_tokens=200), 10_000, {end}, ToolRunner())
    for episode in loop.run(Writer(), prompts, [task.environment(row) for _ in prompts]):
        assert len(episode.turns) == task.rounds + 1 and episode.turns[-1].result is None
        told = tokenizer.decode([i for i, m in zip(episode.ids, episode.mask, strict=True) if not m])
        wrote = [i for i, m in zip(episode.ids, episode.mask, strict=True) if m]
        assert told.count("LocalRAG") == task.rounds and told.count(LAST["en"]) == 1 and "<rag>" not in told
        assert tokenizer.decode(wrote, skip_special_tokens=True) == "<rag>hotpot</rag>" * (task.rounds + 1)
        assert task.score(episode.trajectory(row, prompts[0], 0, 0).text, row) == 0


def test_a_reply_without_a_call_ends_the_episode(task, rows):
    for reply in ("I do not know.", "<rag></rag>", "<rag>open"):
        engine, traj = run(task, rows[0], [reply])
        assert len(engine.seen) == 1 and task.score(traj.text, rows[0]) == 0
        (found,) = task.measure([traj])
        assert found["calls"] == 0 and math.isnan(found["faithfulness"]) and found["completeness"] <= 2


def test_same_settings_same_rows_and_other_splits_have_other_cities(task, rows):
    again = LocalLife(size=400, cities=2, districts=2, areas=2, questions=12).rows("eval", 0)
    assert again == rows and len(rows) == 12 and {row.tier for row in rows} == {"L3", "L4"}
    train = task.rows("train", 0)
    assert not {r.meta["city"] for r in train} & {r.meta["city"] for r in rows}
    assert all(row.id.startswith(row.meta["city"] + "/") for row in rows)
    with pytest.raises(ConfigError, match="split"):
        task.rows("tset", 0)


def test_settings_are_checked():
    for keys in (
        {"rounds": 0},
        {"show": 200},
        {"world_seeds": {"train": 1, "eval": 1, "test": 2}},
        {"world_seeds": {"train": 1}},
        {"corpus": "merchants.jsonl"},
    ):
        with pytest.raises(ConfigError):
            LocalLife(**keys)


# ---------------------------------------------------------------- the judge

MARKS = {"correctness": 1, "completeness": 8, "fluency": 7, "faithfulness": 9, "safety": 8}
STEPS = {"relevance": 8, "evidence": 4, "coherence": 6, "efficiency": 2}


class Verdicts:
    def __init__(self, answers):
        self.answers, self.prompts = answers, []

    def generate(self, requests, progress=None):
        self.prompts += [r.messages[0]["content"] for r in requests]
        texts = [self.answers.pop(0) for _ in requests]
        return [[Result(t or "", None, None, "stop" if t else "error", Usage(), None if t else "down")] for t in texts]


def test_a_judge_adds_its_scores_and_the_veto_stands_above_it(task, rows):
    row = rows[0]
    judged = replace(task, judge={"_target_": "x"})
    judged.rows("eval", 0)
    calls = "".join(f"<rag>{query}</rag>" for query in row.meta["hop_queries"])
    good, bad = run(judged, row, [calls, answer(task, row)])[1], run(judged, row, [answer(task, row) + "</case>"])[1]
    engine = Verdicts([json.dumps(MARKS), json.dumps(MARKS), json.dumps(STEPS), "no verdict"])
    judged.__dict__["_judge"] = Judge(engine, 100)
    one, two = judged.measure([good, bad])
    assert (one["judge_correctness"], one["judge_total"], one["judge_failed"]) == (1, pytest.approx(3.3), 0)
    assert one["judge_fluency"] == 7 and one["judge_overall"] == 5
    assert two["judge_correctness"] == 0 and two["judge_total"] == pytest.approx(2.3)
    assert math.isnan(two["judge_relevance"]) and set(one) == set(two)
    assert all(prompt.count("</case>") == 2 for prompt in engine.prompts)
    engine.answers = [None, "{}", None, None]
    one, two = judged.measure([good, bad])
    assert one["judge_failed"] == two["judge_failed"] == 1 and math.isnan(one["judge_correctness"])


def test_what_a_rollout_s_error_leaves(task, rows):
    judged = replace(task, judge={"_target_": "x"})
    judged.rows("eval", 0)
    judged.__dict__["_judge"] = Judge(Verdicts([]), 100)
    lost = Trajectory(rows[0].id, 0, 0, [Segment([], [])], [], "error", text="down", row=rows[0])
    (found,) = judged.measure([lost])
    assert found["calls"] == 0 and math.isnan(found["judge_failed"])


def test_replay_gives_the_calls_of_the_rollout(ground):
    city = ground.world.cities[0]
    visit = Visit(ground, city)
    queries = [("rag", "hotpot"), ("rag", "Nowhere"), ("detail", "poi_no_1"), ("web_search", "concert")]
    turns = []
    for number, (tool, query) in enumerate(queries, 1):
        visit.round = number
        call = {"tool": tool, "args": {"query": query}}
        (text,) = ToolRunner()([(visit, call)])
        turns.append(Turn(0, 0, 1, "call", [call], text))
    assert Visit(ground, city).replay([*turns, SimpleNamespace(result=None, calls=[call])]) == visit.calls


def test_the_judge_of_a_line_is_an_engine(conf, monkeypatch, tmp_path):
    from hydra import compose, initialize_config_dir

    from experiments.engines.build import instantiate

    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    words = [
        "task=local_life",
        "+engine@task.judge=openai",
        "task.judge.url=http://127.0.0.1:9/v1",
        "task.judge.model=m",
    ]
    with initialize_config_dir(str(conf), version_base=None):
        made = instantiate(compose("eval", words).task)
    assert made._judge.asker.engine.identity()["model"] == "m" and made._judge.asker.max_tokens == 18_000
