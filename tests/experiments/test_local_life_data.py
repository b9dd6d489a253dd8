"""Local-life data in files: search paths, parquet folders, the public release, VitaBench; and the scripted agents."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from experiments.tasks.local_life import data, paths, release
from experiments.tasks.local_life.agents import AGENTS, Attempt
from experiments.tasks.local_life.metrics import correctness, retrieved
from experiments.tasks.local_life.paths import Mention, boxed, mention, read_path
from experiments.tasks.local_life.playground import Playground, Visit
from experiments.tasks.local_life.sources import of_path, of_seed
from methods.errors import ConfigError, DataError

PATH = """第一跳:“河湾 火锅店”
得到的信息：铜锅记（东店）（河湾路2号，评分4.8，人均150元，营业17:00-次日2:00，夜宵）；辣院（河湾路9号，评分4.5，人均￥80-150）
第二跳：“青石广场 公园”
得到的信息：青石公园（湖滨路1号，免费，全天开放）"""


@pytest.fixture(scope="module")
def source():
    return of_seed(5, 1200, 36, cities=3)


# ---------------------------------------------------------------- search paths


def test_the_path_of_the_sheet():
    first, second = read_path(PATH)
    assert (first.query, second.query) == ("河湾 火锅店", "青石广场 公园")
    assert first.found[0] == Mention("铜锅记（东店）", "河湾路2号", 4.8, (150, 150), "17:00-次日2:00", "夜宵")
    assert first.found[1].price == (80, 150) and first.found[1].hours == ""
    assert second.found == (Mention("青石公园", "湖滨路1号", None, (0, 0), "00:00-24:00", ""),)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A（路1号，评分4.5）", Mention("A", "路1号", 4.5)),
        ("A(Road 1，评分4.5，营业周一至周五10:00-22:00，周末10:00-23:00)",
         Mention("A", "Road 1", 4.5, None, "周一至周五10:00-22:00,周末10:00-23:00")),
        ("B（路1号，营业11:00-14:00，17:00-次日2:00，人均￥1,280，夜宵11:00起）",
         Mention("B", "路1号", None, (1280, 1280), "11:00-14:00,17:00-次日2:00", "夜宵11:00起")),
        ("健身房（路3号，人均￥60，营业24小时）", Mention("健身房", "路3号", None, (60, 60), "00:00-24:00")),
        ("台球（路4号，每小时38元，11:00-14:00,17:00-22:00）",
         Mention("台球", "路4号", None, (38, 38), "11:00-14:00,17:00-22:00")),
        ("断了（路5号，评分4.1，营业", Mention("断了", "路5号", 4.1, None, "", "营业")),
        ("没有细节", None),
        ("分店（东店）", None),
        ("", None),
    ],
)  # fmt: skip
def test_mentions(text, expected):
    assert mention(text) == expected


@pytest.mark.parametrize("text", ["", "nonsense", "第一跳", "得到的信息：A（b，c）"])
def test_a_text_without_hops(text):
    assert all(not hop.found or isinstance(hop.query, str) for hop in read_path(text))


def test_boxed_names():
    assert boxed(r"prose \boxed{A（东店）→B->C}") == ("A（东店）", "B", "C")
    assert boxed("no box") == () and boxed(r"\boxed{A{x}→B") == ("A{x}", "B")


def test_generated_paths_and_answers_are_read_back(source):
    for question in source.questions:
        hops = read_path(question.path)
        assert len(hops) == question.hops and [h.query for h in hops] == [*question.web_queries, *question.hop_queries]
        assert all(not h.found and h.other for h in hops[: len(question.web_queries)])
        merchants = [source.world.merchant(poi) for poi in question.gold]
        assert boxed(question.reference) == tuple(m.name for m in merchants)
        told = {m.name: m for h in hops for m in h.found}
        for merchant in merchants:
            got = told[merchant.name]
            assert (got.address, got.rating) == (merchant.address, merchant.rating)
            assert got.price == (merchant.avg_price,) * 2
            assert paths.spans(got.hours) == paths.spans(merchant.business_hours)


# ---------------------------------------------------------------- folders


def test_a_folder_gives_everything_back_and_the_same_bytes(source, tmp_path):
    first, second = (data.save(source.world, source.questions, tmp_path / name) for name in ("a", "b"))
    sums = [
        {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()} for folder in (first, second)
    ]
    assert sums[0] == sums[1] and "README.md" in sums[0]
    loaded = of_path(str(first))
    assert loaded.questions == source.questions and loaded.world.merchants.equals(source.world.merchants)
    assert (loaded.world.events, loaded.world.facts) == (source.world.events, source.world.facts)
    splits = [{q.city for q in loaded.of_split(split)} for split in ("train", "eval", "test")]
    assert all(splits) and not set.intersection(*splits) and len(set.union(*splits)) == 3
    with pytest.raises(ConfigError, match="merchants of its own"):  # and not silently those of the folder
        of_path(str(first), "merchants.jsonl")
    with pytest.raises(ConfigError, match="not empty"):
        data.save(source.world, source.questions, first)


def test_a_gold_merchant_that_is_not_there_is_refused_with_its_id(source, tmp_path):
    bad = [replace(source.questions[0], gold=("poi_gone_1",)), *source.questions[1:]]
    folder = data.save(source.world, bad, tmp_path / "w")
    with pytest.raises(DataError, match=f"'{bad[0].id}' is not in the corpus.*poi_gone_1"):
        of_path(str(folder))


@pytest.mark.parametrize("name", ["questions.parquet", "places.parquet", "world.parquet"])
@pytest.mark.parametrize("content", [None, b"", b"junk", "wrong"])
def test_damaged_folders(source, tmp_path, name, content):
    folder = data.save(source.world, source.questions[:3], tmp_path / "w")
    if content is None:
        (folder / name).unlink()
    elif content == "wrong":
        pd.DataFrame({"x": [1]}).to_parquet(folder / name)
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=r"missing|cannot be read"):
        of_path(str(folder))


def test_the_command_that_writes_a_folder(tmp_path, capsys):
    line = [
        str(tmp_path / "w"),
        "--size",
        "400",
        "--cities",
        "1",
        "--questions",
        "6",
        "--seed",
        "2",
        "--language",
        "zh",
    ]
    assert data.main(line) == 0 and (tmp_path / "w" / "questions.parquet").is_file()
    assert data.main(line) == 2 and "not empty" in capsys.readouterr().err
    assert data.main([str(tmp_path / "v"), "--size", "3"]) == 2 and "size" in capsys.readouterr().err


# ---------------------------------------------------------------- the public release


def _row(**changes):
    return {"Hop Count": 2, "Difficulty": "L3", "City": "武汉", "Question": "去哪吃？", "Multi-hop search path": PATH,
            "Answer": r"\boxed{铜锅记（东店）→青石公园}"} | changes  # fmt: skip


def _write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["q.parquet", "q.jsonl"])
def test_the_release_and_its_evidence_corpus(tmp_path, name):
    source = of_path(_write(tmp_path / name, [_row(), _row(Question="还有？")]))
    assert [q.hops for q in source.questions] == [2, 2] and source.questions[0].gold is None
    assert source.questions[0].hop_queries == ("河湾 火锅店", "青石广场 公园")
    assert len(source.world) == 3 and "evidence corpus" in source.name  # the same merchant in both paths is one
    merchant = source.world.merchant(source.world.merchants["poi_id"][0])
    assert (merchant.name, merchant.avg_price, merchant.hours.open_at(60)) == ("铜锅记（东店）", 150, True)
    assert re.fullmatch(r"poi_[A-Za-z0-9_]*\d", merchant.poi_id)
    assert len(source.of_split("eval")) == 2
    with pytest.raises(DataError, match="public"):
        source.of_split("train")


def test_the_first_version_has_neither_hop_count_nor_difficulty(tmp_path):
    row = {name: value for name, value in _row().items() if name not in ("Hop Count", "Difficulty")}
    question = of_path(_write(tmp_path / "v1.jsonl", [row])).questions[0]
    assert (question.hops, question.level) == (2, "all")


def test_a_hop_count_may_be_empty_but_is_no_word(tmp_path):
    rows = [_row(**{"Hop Count": None, "Difficulty": None}), _row(**{"Hop Count": 3})]  # a column of floats with a NaN
    questions = of_path(_write(tmp_path / "q.parquet", rows)).questions
    assert [(q.hops, q.level) for q in questions] == [(2, "all"), (3, "L3")]
    for i, count in enumerate((math.nan, "three", -2, [1])):
        path = _write(tmp_path / f"{i}.jsonl", [_row(), _row(**{"Hop Count": count})])
        if count != count:
            assert of_path(path).questions[1].hops == 2
            continue
        with pytest.raises(DataError, match=r"whole number.*row 2"):
            of_path(path)


def test_a_merchant_file_keeps_what_is_malformed(tmp_path, capsys):
    odd = {"name": "铜锅记", "avg_price": "￥1,280/人", "business_hours": "看心情", "tags": ["a", "b"]}
    plain = {"name": "B", "rating": 4.5, "x": "1.5", "y": 2, "business_hours": "10:00-22:00"}
    rows = [{"id": f"poi_wh_{i}", "city": "武汉"} | row for i, row in ((1, odd), (2, plain))]
    world = of_path(_write(tmp_path / "q.jsonl", [_row()]), _write(tmp_path / "m.jsonl", rows)).world
    first = world.merchant("poi_wh_1")
    assert (first.avg_price, first.business_hours, first.tags, first.hours) == (1280.0, "看心情", "a, b", None)
    assert world.unreadable_hours == ["poi_wh_1"] and world.without_coordinates == ["poi_wh_1"]
    said = capsys.readouterr().err
    assert "opening hours cannot be read (never open): poi_wh_1" in said
    assert "without coordinates (near nothing): poi_wh_1" in said
    assert world.merchant("poi_wh_2").x == 1.5 and world.raw["poi_wh_1"]["avg_price"] == "￥1,280/人"
    with pytest.raises(DataError, match="no city"):
        release.merchants_of(_write(tmp_path / "n.jsonl", [{"id": "poi_1", "name": "A"}]))


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([], "no rows"),
        ([{"a": 1}], "no column 'City'"),
        ([_row(Question=None)], "empty cell"),
        ([_row(**{"Multi-hop search path": "nothing"})], "No search path tells of a merchant"),
        ([{"id": 1, "environment": {}, "instructions": "x", "evaluation_criteria": {}}], "no VitaBench task"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, rows, reason):
    with pytest.raises(DataError, match=reason):
        of_path(_write(tmp_path / "q.jsonl", rows))


def test_junk_and_missing_files(tmp_path):
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    for name in ("junk.parquet", "missing.jsonl"):
        with pytest.raises(DataError):
            of_path(str(tmp_path / name))


# ---------------------------------------------------------------- VitaBench


def test_vitabench_without_loss():
    if not os.environ.get("ASSAY_DATA"):
        pytest.skip("ASSAY_DATA is not set")
    file = Path(os.environ["ASSAY_DATA"]) / "vitabench" / "vitabench.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    source = of_path(str(file))
    assert [q.meta["record"] for q in source.questions] == rows
    for row, question in zip(rows, source.questions, strict=True):
        stores = row["environment"].get("stores", {}) | row["environment"].get("shops", {})
        ids = [source.world.merchants["poi_id"][i] for i in source.world.of_city[row["id"]]]
        assert [source.world.raw[poi] for poi in ids] == list(stores.values())
        for poi, store in zip(ids, stores.values(), strict=True):
            merchant = source.world.merchant(poi)
            assert merchant.name == store.get("name", store.get("shop_name")) and merchant.rating == store["score"]
            assert len(merchant.products.split("; ")) >= len(store["products"]) and merchant.x == merchant.x
        assert question.gold and set(question.gold) <= set(ids) and question.text == row["instructions"]
    assert len(source.world) == 836


# ---------------------------------------------------------------- agents


def _scores(source, playground, agent, calls=5, **keep):
    found = {}
    for question in source.questions:
        visit = Visit(playground, question.city)
        answer = AGENTS[agent](Attempt(question, source.solver, visit, calls, random.Random(0)))
        found[question.id] = correctness(answer, question.gold, retrieved(visit.calls))
        assert len(visit.calls) <= calls
    return found


def test_what_each_scripted_agent_can_do(source):
    playground = Playground(source.world)
    hops = {q.id: q.hops for q in source.questions}
    assert set(_scores(source, playground, "reference").values()) == {1.0}
    for calls in (3, 4):
        scores = _scores(source, playground, "reference", calls)
        assert all(scores[i] for i, h in hops.items() if h <= calls)
        assert sum(scores[i] for i, h in hops.items() if h > calls) <= 1  # a search may show what the next would find
    assert not any(_scores(source, playground, "reference", 1).values())
    events = {q.id: bool(q.web_queries) for q in source.questions}
    blind = _scores(source, playground, "no_web")
    assert all(blind[i] for i, event in events.items() if not event)
    assert sum(blind[i] for i, event in events.items() if event) <= 2
    means = {name: sum(_scores(source, playground, name).values()) / len(hops) for name in AGENTS}
    assert means["random_in_city"] <= 0.1 and means["one_search"] <= 0.3
    assert 0.2 <= means["no_dependency"] <= 0.9
