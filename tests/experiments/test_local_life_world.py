"""Local-life worlds, opening hours, question programs and the rules by which questions are kept."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.retrieval import tokens
from experiments.tasks.local_life import catalogue, wording
from experiments.tasks.local_life import questions as questions_module
from experiments.tasks.local_life.catalogue import CATALOGUE
from experiments.tasks.local_life.generate import GUARANTEED, generated
from experiments.tasks.local_life.hours import DAY, read_hours, spans
from experiments.tasks.local_life.names import CHARACTERS, Namer
from experiments.tasks.local_life.programs import (
    Condition,
    Hop,
    Near,
    Program,
    Solver,
    forgetful,
    from_json,
    shape,
    to_json,
)
from experiments.tasks.local_life.questions import Drawer, Draws, cells, make_questions
from experiments.tasks.local_life.sources import index_of
from experiments.tasks.local_life.world import FIELDS, Place, World, frame
from methods.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def world():
    return generated(7, 1000)


@pytest.fixture(scope="module")
def made(world):
    search = index_of(world).search
    return (*make_questions(world, 30, 7, search), search)


# ---------------------------------------------------------------- hours


def test_hours_of_the_sheet():
    assert spans("11:00-14:00,18:00-02:00") == ((660, 840), (1080, 1560))
    night = read_hours("17:00-02:00")
    assert [night.open_at(m) for m in (0, 119, 120, 1019, 1020)] == [True, True, False, False, True]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("17:00-次日2:00", ((1020, 1560),)),
        ("24小时", ((0, DAY),)),
        ("00:00-24:00", ((0, DAY),)),
        ("10:00至22:00", ((600, 1320),)),
        ("营业10:00～14:00、17:00～21:30", ((600, 840), (1020, 1290))),
    ],
)
def test_spans(text, expected):
    assert spans(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "25:00-26:00", "10:70-11:00", "10:00-22:00 maybe", "10:00", "9-5"])
def test_hours_that_cannot_be_read(text):
    with pytest.raises(ValueError):
        spans(text)
    assert read_hours(text) is None


def test_hours_by_weekday():
    hours = read_hours("周一至周五10:00-22:00；周六周日09:00-23:00")
    assert hours.days[0] == ((600, 1320),) and hours.days[6] == ((540, 1380),)
    assert read_hours("Mon-Fri 09:00-18:00, Sat 10:00-14:00").days[5] == ((600, 840),)
    assert not read_hours("Mon-Fri 09:00-18:00, Sat 10:00-14:00").open_on(6)
    assert read_hours("工作日 10:00-20:00 周末 11:00-21:00").days[4:6] == (((600, 1200),), ((660, 1260),))


def test_the_closed_weekday_and_the_night_after_it():
    hours = read_hours("17:00-02:00", closed_weekday=0)
    assert not hours.open_on(0) and not hours.open_at(1100, 0) and hours.open_at(60, 0) and not hours.open_at(60, 1)
    assert (hours.opening, hours.closing) == (1020, 1560)


@given(st.integers(0, DAY - 1), st.integers(1, DAY), st.integers(0, DAY - 1))
def test_an_open_minute_is_a_minute_of_the_span(start, length, minute):
    end = (start + length) % DAY
    text = f"{start // 60:02d}:{start % 60:02d}-{end // 60:02d}:{end % 60:02d}"
    open_minutes = {(start + k) % DAY for k in range(length)}
    assert read_hours(text).open_at(minute) == (minute in open_minutes)


# ---------------------------------------------------------------- the world


def test_a_seed_gives_the_same_world_and_a_larger_one_begins_with_it(world):
    again, larger = generated(7, 1000), generated(7, 2200, cities=4)
    assert again.merchants.equals(world.merchants) and again.facts == world.facts
    assert not generated(8, 1000).merchants.equals(world.merchants)
    for city in world.cities:
        small, large = (w.merchants.iloc[w.of_city[city]].reset_index(drop=True) for w in (world, larger))
        assert large.iloc[: len(small)].equals(small)
    assert larger.events[: len(world.events)] == world.events


def test_fields_and_guarantee(world):
    table = world.merchants
    assert tuple(table.columns) == FIELDS and len(FIELDS) == 29
    assert len(world) == 1000 and table["name"].is_unique and not world.unreadable_hours
    assert table["rating"].between(1, 5).all() and (table["avg_price"] >= 5).all()
    common = table[table["subcategory"].isin(GUARANTEED)].groupby(["business_area", "subcategory"]).size()
    assert len(common) == 3 * 15 * len(GUARANTEED) and common.min() >= 3
    merchant = world.merchant(table["poi_id"].iloc[3])
    assert re.fullmatch(r"poi_[A-Za-z0-9_]*\d", merchant.poi_id) and merchant.hours is not None


def test_laws_of_a_larger_world():
    table = generated(1, 8000).merchants
    shares = table["category"].value_counts(normalize=True)
    wanted = {name: share for name, (_, share, _) in CATALOGUE.categories.items()}
    assert all(abs(shares[name] - share) < 0.03 for name, share in wanted.items())
    assert abs((table["chain"] != "").mean() - 0.15) < 0.02
    assert abs((table["closed_weekday"] >= 0).mean() - 0.10) < 0.02
    assert abs((table["business_hours"] == "00:00-24:00").mean() - 0.05) < 0.01
    hours = [read_hours(text) for text in table["business_hours"]]
    overnight = [h.closing > DAY for h in hours if h is not None]
    assert len(overnight) == len(table) and abs(np.mean(overnight) - 0.10) < 0.01


def test_places_lie_in_their_district(world):
    middles = {p.name: (p.x, p.y) for p in world.places if p.kind == "district"}
    areas = [p for p in world.places if p.kind == "area"]
    assert len(middles) == 15 and len(areas) == 45
    own = [p for p in areas if p.district == min(
        (d.name for d in world.places if d.kind == "district" and d.city == p.city),
        key=lambda name: np.hypot(middles[name][0] - p.x, middles[name][1] - p.y))]  # fmt: skip
    assert len(own) >= 43  # a district squeezed between others may be too small for its areas


def test_events_have_distractors(world):
    event = world.events[0]
    about = [page for page in world.facts if event.name in page.title]
    true = [p for p in about if event.date in p.text and event.area in p.text and event.city in p.text]
    assert len(about) == 4 and [p.kind for p in true] == ["event"]


def test_names_are_unique_and_no_words():
    namer = Namer(3, "en")
    names = namer.merchants(0, 20_000) + namer.merchants(1, 20_000) + [namer.place(0, i) for i in range(1, 500)]
    assert len(set(names)) == len(names) and {len(name) for name in names} == {8}
    words = {t for kind in CATALOGUE.kinds for w in (kind.name, *kind.products, *kind.synonyms) for t in w.en.split()}
    assert not [w for w in words if re.fullmatch("([bdfghjklmnprtvwz][aiou]){4}", w)]
    text = str(wording._TEXT["zh"]) + catalogue.KINDS + catalogue.CATEGORIES
    assert len(set(CHARACTERS)) == 64 and not [c for c in CHARACTERS if c in text]


def test_synonyms_and_templates_share_no_word_with_documents():
    kinds, tags = CATALOGUE.kinds, [w for _, _, tags in CATALOGUE.categories.values() for w in tags]
    own = [w for kind in kinds for w in (kind.name, kind.category, *kind.products)] + tags + list(catalogue.LANDMARKS)
    held = {t for words in own for t in tokens(words.en)}
    said = {t for kind in kinds for words in kind.synonyms for t in tokens(words.en)}
    assert not said & held
    texts = [t for v in wording._TEXT["en"].values() for t in (v if isinstance(v, list) else [v])]
    assert not {t for text in texts for t in tokens(re.sub(r"\{[^}]*\}", " ", text))} & held


@pytest.mark.parametrize("wrong", [{"size": 100}, {"cities": 0}, {"areas": 99}, {"language": "fr"}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ConfigError):
        generated(0, **{"size": 6000} | wrong)


def test_a_world_needs_ids_and_keeps_what_is_malformed():
    rows = [{"poi_id": "poi_a_1", "name": "A", "city": "X", "business_hours": "sometimes"}, {"poi_id": "poi_a_2"}]
    world = World("a test", frame(rows))
    assert world.unreadable_hours == ["poi_a_1"] and world.without_coordinates == ["poi_a_1", "poi_a_2"]
    assert world.documents("X") == [("poi_a_1", "name: A - city: X - hours: sometimes")]
    solver = Solver(world)
    assert solver.solve(Program("X", (Hop("", (Near("area", ""),), (Condition("open_on", 0),)),))) is None
    for bad in ([{"poi_id": ""}], [{"poi_id": "poi_1"}, {"poi_id": "poi_1"}]):
        with pytest.raises(DataError):
            World("a test", frame(bad))


# ---------------------------------------------------------------- programs


def seven():
    """Seven merchants around a tower."""
    usual = {"city": "T", "business_area": "Tower", "business_hours": "10:00-22:00"}
    rows = [
        ("001", "hotpot", 4.5, 110, 0.5, 0.0, {}),
        ("002", "hotpot", 4.7, 180, 1.0, 0.0, {}),
        ("003", "hotpot", 4.9, 90, 2.0, 0.0, {}),
        ("004", "cafe", 4.6, 40, 0.6, 0.0, {}),
        ("005", "cafe", 4.0, 35, 0.9, 0.0, {"business_hours": "10:00-23:30"}),
        ("006", "hotel", 4.2, 230, 0.9, 0.3, {"tags": "budget"}),
        ("007", "hotel", 4.2, 250, 0.9, 0.1, {"tags": "river view"}),
    ]
    table = frame(
        [
            usual
            | {"poi_id": f"poi_tv_{i}", "name": i, "subcategory": s, "rating": r, "avg_price": p, "x": x, "y": y}
            | m
            for i, s, r, p, x, y, m in rows
        ]
    )
    return Solver(World("seven", table, places=[Place("Tower", "area", "T", 0.0, 0.0, "", "Tower")]))


def test_the_solver_on_the_sheet_example():
    solver, tower = seven(), Near("area", "Tower", km=1.5)
    cap = Condition("price", 120)
    first = Hop("hotpot", (tower,), (cap,))
    cafe = Hop("cafe", (Near("hop", hop=0, km=5.0),), (Condition("open_at", (22 * 60 + 30, None)),), "nearest")
    hotel = Hop("hotel", (Near("hop", hop=1, km=5.0),), (Condition("tag", "budget"),), "nearest")
    program = Program("T", (first, cafe, hotel))
    assert solver.solve(program) == ("poi_tv_001", "poi_tv_005", "poi_tv_006")
    assert solver.solve(replace(program, hops=(replace(first, conditions=()), cafe, hotel)))[0] == "poi_tv_002"
    plan = Program("T", (Hop("hotpot", (tower,)), Hop("hotel", (tower,))), budget=420)
    assert solver.solve(plan) == ("poi_tv_002", "poi_tv_006")
    assert solver.solve(replace(plan, budget=430)) is None  # two plans of 8.9
    assert solver.solve(replace(plan, budget=300)) is None


def test_margins_decide_what_is_unique():
    solver, tower = seven(), Near("area", "Tower", km=3.0)
    cheap = Program("T", (Hop("cafe", (tower,), key="cheapest"),))
    assert solver.solve(cheap) == ("poi_tv_005",)
    solver.price = solver.price.copy()
    solver.price[3] = 37.9  # 2.9 dearer than the cheapest
    assert solver.solve(cheap) is None
    solver.price[3] = 38.0
    assert solver.solve(cheap) == ("poi_tv_005",)
    assert solver.solve(Program("T", (Hop("sushi", (tower,)),))) is None


def test_checklist_of_right_and_wrong_answers():
    solver, tower = seven(), Near("area", "Tower", km=1.5)
    program = Program("T", (Hop("hotpot", (tower,), (Condition("price", 120),)),
                            Hop("cafe", (Near("hop", hop=0, km=5.0),), (), "nearest")))  # fmt: skip
    right = solver.solve(program)
    assert right == ("poi_tv_001", "poi_tv_004") and all(solver.checklist(program, right).values())
    dear = solver.checklist(program, ["poi_tv_002", "poi_tv_004"])
    assert not dear["slot1 price"] and not dear["slot1 key"] and dear["slot1 type"] and dear["slot1 place"]
    short = solver.checklist(program, ["poi_tv_005"])
    assert not short["count"] and not short["slot1 type"] and "slot2 key" not in short


def plain_solution(solver: Solver, program: Program, table: list[dict]) -> list[str] | None:
    """The same without arrays: every merchant is looked at, one after the other."""
    marks = {p.area: p for p in solver.world.places if p.kind == "area" and p.city == program.city}
    areas = {e.name: e.area for e in solver.world.events if e.city == program.city}
    found: list[dict] = []

    def at(near, m):
        where = areas.get(near.name, near.name)
        if near.of == "hop":
            x, y, where = (found[near.hop][k] for k in ("x", "y", "business_area"))
        elif near.of != "district":
            x, y = marks[where].x, marks[where].y
        if near.km is not None:
            return ((m["x"] - x) ** 2 + (m["y"] - y) ** 2) ** 0.5 <= near.km
        return m["district" if near.of == "district" else "business_area"] == where

    def meets(c, m):
        hours = read_hours(m["business_hours"], m["closed_weekday"])
        return {
            "price": lambda: m["avg_price"] <= c.value,
            "rating": lambda: m["rating"] >= c.value,
            "tag": lambda: c.value in m["tags"].split(", "),
            "product": lambda: c.value in [p.split(" (")[0] for p in m["products"].split("; ")],
            "open_on": lambda: hours.open_on(c.value),
        }.get(c.kind, lambda: hours.open_at(*c.value))()

    def key(hop, m):
        hours = read_hours(m["business_hours"], m["closed_weekday"])
        if hop.key == "nearest":
            near = hop.near[0]
            where = areas.get(near.name, near.name)
            x, y = (
                (found[near.hop]["x"], found[near.hop]["y"]) if near.of == "hop" else (marks[where].x, marks[where].y)
            )
            return ((m["x"] - x) ** 2 + (m["y"] - y) ** 2) ** 0.5
        return {
            "rating": -m["rating"],
            "cheapest": m["avg_price"],
            "latest": -hours.closing,
            "earliest": hours.opening,
        }[hop.key]

    for hop in program.hops:
        fit = [m for m in table if m["city"] == program.city and m["subcategory"] == hop.subcategory]
        fit = [m for m in fit if any(at(near, m) for near in hop.near) and all(meets(c, m) for c in hop.conditions)]
        if hop.chain_of >= 0:
            one = found[hop.chain_of]
            fit = [m for m in fit if m["chain"] == one["chain"] != "" and m["poi_id"] != one["poi_id"]]
        if not fit:
            return None
        found.append(min(fit, key=lambda m: key(hop, m)))
    return [m["poi_id"] for m in found]


# ---------------------------------------------------------------- questions


def test_a_question_that_names_an_answer_is_not_kept(world, made, monkeypatch):
    question, search = made[0][0], made[2]
    drawer = Drawer(world, Solver(world), question.city, random.Random(0))
    rows = [world.position[poi_id] for poi_id in question.gold]
    asked = (question.verifier, rows, "q", "plain", search)
    assert drawer.question(*asked).gold == question.gold
    name = world.merchant(question.gold[-1]).name
    monkeypatch.setattr(questions_module, "request", lambda *_: f"Not {name}, please.")
    assert drawer.question(*asked) is None


def test_kept_questions_obey_the_rules(world, made):
    questions, draws, search = made
    solver, table = Solver(world), world.merchants.to_dict("records")
    assert len(questions) == 30 and 0 < draws.retrieved <= 1
    assert len({shape(q.verifier) for q in questions}) == 30 and len({q.id for q in questions}) == 30
    for q in questions:
        program = q.verifier
        assert solver.solve(program) == q.gold and program.calls == q.hops == len(q.hop_queries) + len(q.web_queries)
        assert any(solver.solve(other) != q.gold for other in solver.variants(program))
        assert q.level == program.level
        returned = {poi for query in q.hop_queries for poi, _ in search(query, 20, q.city)}
        assert set(q.gold) <= returned
        assert not any(world.merchant(poi).name in q.text for poi in q.gold)
        assert all(solver.checklist(program, q.gold).values())
        rows = [world.position[poi] for poi in q.gold]
        for i, hop in enumerate(program.hops if program.budget is None else ()):
            there = solver.candidates(program.city, hop, rows)
            keys = dict(zip(there.tolist(), solver.keys(program.city, hop, there, rows), strict=True))
            assert len(there) >= 3 and (not hop.conditions or min(keys.values()) < keys[rows[i]])
        if program.budget is None:
            assert plain_solution(solver, program, table) == list(q.gold)


def test_quotas_per_cell(made):
    questions, _, _ = made
    assert sum(q.hops == 3 for q in questions) == 18 and sum(q.level == "L3" for q in questions) == 21
    assert cells(100, {3: 0.6, 4: 0.3, 5: 0.1}, {"L3": 2, "L4": 1}) == {
        (3, "L3"): 40, (3, "L4"): 20, (4, "L3"): 20, (4, "L4"): 10, (5, "L3"): 7, (5, "L4"): 3,
    }  # fmt: skip
    assert {q.style for q in questions} == {"plain", "chatty", "paraphrase"}


def test_the_same_seed_gives_the_same_questions(world, made):
    questions, _, search = made
    assert make_questions(world, 30, 7, search)[0] == questions
    assert make_questions(world, 30, 8, search)[0] != questions


def test_gold_that_the_retriever_does_not_find_is_not_asked_for(world, monkeypatch):
    monkeypatch.setattr(questions_module, "TRIES", 50)

    def blind(query, k, city):
        return []

    with pytest.raises(ConfigError, match="No question of 3"):
        make_questions(world, 3, 0, blind)


def test_programs_survive_json(made):
    for question in made[0]:
        assert from_json(to_json(question.verifier)) == question.verifier
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_json("{}")


def test_forgetting_a_dependency_puts_the_anchor_in_its_place():
    hop = Hop("cafe", (Near("hop", hop=0, km=1.0),), (), "nearest")
    assert forgetful(hop, Near("event", "E")).near == (Near("event", "E", km=1.0),)


def test_levels():
    area, event = Near("area", "A"), Near("event", "E")
    plain = Hop("cafe", (area,))
    late = Condition("after_event", (60, 1))
    cases = [
        (Program("X", (plain,)), None),
        (Program("X", (plain, Hop("hotel", (Near("hop", hop=0),)))), "L3"),
        (Program("X", (Hop("cafe", (area, Near("area", "B"))),)), "L3"),
        (Program("X", (Hop("cafe", (event,), (late,)),)), "L4"),
        (Program("X", (plain,), budget=5.0), "L4"),
        (Program("X", (plain, Hop("cafe", (Near("hop", hop=0, km=9.0),), (), "nearest", 0))), "L4"),
    ]
    assert [program.level for program, _ in cases] == [level for _, level in cases]


def test_wording_in_both_languages_names_every_part():
    near, friday = Near("area", "Aba", km=1.5), Condition("open_at", (22 * 60 + 30, 4))
    first = Hop("hotpot", (near,), (Condition("price", 120.0),), "nearest")
    program = Program("Xiba", (first, Hop("cafe", (Near("hop", hop=0),), (friday,), "latest")))
    text = wording.request(program, "plain", "en", random.Random(0))
    assert all(part in text for part in ("Xiba", "Aba", "1.5 km", "120 yuan", "hotpot", "22:30 on Friday", "same area"))
    other = wording.request(program, "paraphrase", "en", random.Random(0))
    assert "hotpot" not in other and "cafe" not in other
    zh = replace(
        program, hops=tuple(replace(h, subcategory=CATALOGUE.kind(h.subcategory).name.zh) for h in program.hops)
    )
    assert all(part in wording.request(zh, "chatty", "zh", random.Random(0)) for part in ("火锅", "周五22:30", "120元"))


def test_draws_count_nothing():
    assert Draws().retrieved != Draws().retrieved
