"""ToolRL's rows, API-Bank and BFCL: real rows, the sheet's reward on all of them, the AST checker, bad input."""

from __future__ import annotations

import copy
import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from experiments.tasks import bfcl_checker
from experiments.tasks.api_bank import ApiBank, ground_truth
from experiments.tasks.base import Row
from experiments.tasks.bfcl import CATEGORIES, Bfcl
from experiments.tasks.rlla import Rlla
from experiments.tasks.tool_rewards import outcome_reward
from methods.errors import DataError

# ---- a second, plain writing of the sheet's reward


def by_hand(response: str, truth: str) -> tuple[float, float]:
    """(R_format, R_correct) with the sheet's patterns and words."""
    held = truth.split("</think>", 1)[1]
    call, answer = "<tool_call>" in held, "<response>" in held
    pattern = (
        r"<think>.*?</think>" + r"\n<tool_call>\n.*?\n</tool_call>" * call + r"\n<response>.*?</response>" * answer
    )
    tags = ["tool_call"] * call + ["response"] * answer
    once = all(response.count(f"<{t}>") == 1 == response.count(f"</{t}>") for t in tags)
    fmt = float(once and re.fullmatch(pattern, response, re.DOTALL) is not None)
    if not call:
        return fmt, 0.0
    due, said = lines(truth) or [], lines(response)
    if said is None:
        return fmt, -3.0
    left, score, most = list(said), jaccard([c["name"] for c in due], [c["name"] for c in said]), 1
    for one in due:
        most += 1 + len(one["parameters"])
        best, chosen = 0.0, None
        for other in left:
            if other["name"] != one["name"]:
                continue
            if not isinstance(other.get("parameters"), dict):
                return fmt, -3.0
            values = [n in other["parameters"] and other["parameters"][n] == v for n, v in one["parameters"].items()]
            value = jaccard(list(one["parameters"]), list(other["parameters"])) + sum(values)
            if value > best:
                best, chosen = value, other
        score += best
        left = [c for c in left if c is not chosen]
    return fmt, 3.0 if due == said else -3 + 6 * score / most


def lines(text: str) -> list[dict] | None:
    rest = text.split("</think>", 1)[-1]
    if "<tool_call>" not in rest or "</tool_call>" not in rest:
        return None
    try:
        said = [json.loads(x) for x in rest.split("<tool_call>")[1].split("</tool_call>")[0].strip().split("\n")]
    except ValueError:
        return None
    return said if all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in said) else None


def jaccard(a: list, b: list) -> float:
    shared = sum((Counter(a) & Counter(b)).values())
    return shared / (len(a) + len(b) - shared) if a or b else 1.0


def variants(gold: str) -> list[str]:
    """Responses as models write them: right, spoilt in name, key, value, order, number, brackets or tags."""
    return [
        gold,
        gold + "\n",
        gold.replace('": "', '": "x', 1),
        gold.replace('"parameters": {"', '"parameters": {"x', 1),
        gold.replace('{"name": "', '{"name": "x', 1),
        gold.replace('"parameters"', '"arguments"', 1),
        gold.replace("}}", "}", 1),
        re.sub(r"<tool_call>\n(.*)\n", r"<tool_call>\n\1\n\1\n", gold, count=1),
        re.sub(r"(\{.*\})\n(\{.*\})", r"\2\n\1", gold),
        re.sub(r"(\{.*\})\n(\{.*\})", r"\2", gold),
        gold.replace("</think>", "<tool_call> </think>", 1),
        gold.partition("\n")[0],
        "<think> I reply. </think>\n<response> hello </response>",
        "",
    ]


def chat(row: Row) -> list[dict]:
    assert isinstance(row.prompt, list)
    return row.prompt


def records(data: Path, name: str) -> list[dict]:
    with gzip.open(data / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_reward_on_all_rows_of_rlla_and_api_bank(data: Path):
    golds = [r["ground_truth"] for r in records(data, "rlla/rlla_rl.jsonl.gz")]
    golds += [r["output"] for r in records(data, "rlla/rlla_sft.jsonl.gz")]
    api_bank = ApiBank(path=str(data / "api_bank/api_bank.jsonl.gz"))
    golds += [ground_truth(row.answer) for row in api_bank.rows("eval", 0)]
    assert len(golds) == 48 + 200 + 260
    seen = set()
    for k, gold in enumerate(golds):
        for response in [*variants(gold), golds[k - 1]]:
            out = outcome_reward(response, gold)
            assert (out.fmt, pytest.approx(out.correct)) == by_hand(response, gold), response
            seen.add((out.fmt, round(out.correct, 3)))
    assert len(seen) > 50
    assert Counter(outcome_reward(g, g).fmt for g in golds) == {1.0: 501, 0.0: 7}  # seven quote a tag in their thinking


def test_rlla_rows(data: Path):
    task = Rlla(path=str(data / "rlla/rlla_rl.jsonl.gz"))
    rows = task.rows("train", 0) + task.rows("eval", 0)
    assert len(rows) == 48 and {r.tier for r in rows} == {"call", "response"} == set(task.tiers)
    assert all(task.score(r.answer, r) == 1 and task.metrics(r.answer, r)["exact"] == 1 for r in rows)
    assert [m["role"] for m in chat(rows[0])] == ["system", "user"]
    prefilled = Rlla(path=task.path, prefill="<think>").rows("train", 0)[0]
    assert prefilled.prompt[-1] == {"role": "assistant", "content": "<think>"}
    text = str(prefilled.answer).removeprefix("<think>")
    assert Rlla(path=task.path, prefill="<think>").score(text, prefilled) == 1 > task.score(text, prefilled)


def test_judge_pays_for_calls_and_not_for_their_absence(data: Path):
    """Every reference that calls a tool is ahead of three words of the question and "directly"."""
    task = Rlla(path=str(data / "rlla/rlla_sft.jsonl.gz"))
    rows = [row for row in task.rows("train", 0) + task.rows("eval", 0) if row.tier == "call"]
    for row in rows:
        question = str(row.prompt[-1]["content"]).rpartition("<user>")[2]
        words = " ".join(re.findall(r"[A-Za-z]{4,}", question)[:3])
        empty = f"<think> {words} directly </think>\n<response> ok </response>"
        assert task.metrics(empty, row)["reasoning"] < task.metrics(row.answer, row)["reasoning"]
    assert len(rows) == 175


def test_supervised_rows_bring_demonstrations(data: Path):
    task = Rlla(path=str(data / "rlla/rlla_sft.jsonl.gz"))
    rows = task.rows("train", 0)
    assert all(row.demo == row.answer for row in rows) and "both" not in task.tiers


def test_upstreams_columns_of_rlla(tmp_path: Path):
    gold = '<think> x </think>\n<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>\n<response> y </response>'
    record = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
              "reward_model": {"style": "rule", "ground_truth": gold}, "data_source": "rlla"}  # fmt: skip
    (row,) = Rlla(path=write(tmp_path, record), eval_fraction=0.0).rows("train", 0)
    assert row.tier == "both" and row.answer == gold and [m["content"] for m in chat(row)] == ["s", "u"]


def test_api_bank_rows(data: Path):
    task = ApiBank(path=str(data / "api_bank/api_bank.jsonl.gz"))
    rows = task.rows("eval", 0)
    assert Counter(r.tier for r in rows) == {"level 1": 170, "level 2": 32, "level 3": 58}
    assert [r.tier for r in rows[:6]] == ["level 1", "level 2", "level 3"] * 2
    for row in rows:
        (call,) = row.answer
        arguments = ", ".join(f"{k}={v!r}" for k, v in call["parameters"].items())
        for text in (ground_truth(row.answer), json.dumps(row.answer), f"[{call['name']}({arguments})]"):
            assert task.score(text, row) == 1 or not call["name"].isidentifier()
        assert task.score(ground_truth([*row.answer, call]), row) == 0
        assert task.score(ground_truth([call | {"name": "x"}]), row) == 0
        assert task.score(ground_truth([call | {"parameters": call["parameters"] | {"x": 1}}]), row) == 0
        assert task.score("I cannot.", row) == 0


# ---- BFCL


# Its accepted answer gives a parameter that the function's schema does not have (data README, trap 11).
NOT_IN_SCHEMA = "parallel_multiple_12"


def accepted_calls(answers: list[dict]) -> list[dict]:
    """The calls of an accepted answer: the first value of each parameter."""

    def first(values: list) -> Any:
        return plain(next(v for v in values if v != ""))

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: first(v) for k, v in value.items() if any(x != "" for x in v)}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return [
        {"name": name, "parameters": {k: first(v) for k, v in given.items() if any(x != "" for x in v)}}
        for answer in answers
        for name, given in answer.items()
    ]


def perturbed(calls: list[dict]) -> list[list[dict]]:
    """Another name, one call more, one less, an argument more, and for each argument another value and none."""
    name, more = copy.deepcopy(calls), copy.deepcopy(calls)
    name[0]["name"] += "x"
    more[-1]["parameters"]["not_a_parameter"] = 1
    out = [name, more, [*calls, calls[-1]], calls[:-1]]
    for k, call in enumerate(calls):
        for key, value in call["parameters"].items():
            wrong = {bool: 77, int: -98765, float: -98765.5, list: ["q?"], dict: {"q?": 1}}.get(type(value), "q? q?")
            spoilt = copy.deepcopy(calls)
            spoilt[k]["parameters"][key] = wrong
            out.append(spoilt)
    return out


def test_bfcl_gold_scores_one_and_perturbed_zero_in_every_category(data: Path):
    task = Bfcl(path=str(data / "bfcl/bfcl.jsonl.gz"))
    rows = task.rows("eval", 0)
    assert len(rows) == 561 and [r.tier for r in rows[:13]] == list(CATEGORIES) == list(task.tiers)
    assert task.left_out == {"multi_turn_base": 40, "multi_turn_miss_func": 20, "multi_turn_miss_param": 20}
    tried = Counter()
    for row in rows:
        if row.answer["accepted"] is None:
            none = float("irrelevance" in row.tier)
            assert (task.score("I cannot.", row), task.score("[f(a=1)]", row)) == (none, 1 - none)
            tried[row.tier] += 1
            continue
        gold = accepted_calls(row.answer["accepted"])
        assert (task.score(json.dumps(gold), row) == 1) == (row.id != NOT_IN_SCHEMA), row.id
        for calls in perturbed(gold):
            assert task.score(json.dumps(calls), row) == 0, (row.id, calls)
            tried[row.tier] += 1
    assert set(tried) == set(CATEGORIES) and tried.total() > 3000
    row = next(r for r in rows if r.tier == "parallel")
    assert task.score(json.dumps(accepted_calls(row.answer["accepted"])[::-1]), row) == 1  # any order


def fits(value: Any, accepted: list, language="python", **schema: Any) -> bool:
    return bfcl_checker.value_fits(value, accepted, schema, language)


@pytest.mark.parametrize(
    ("value", "accepted", "schema", "right"),
    [
        ("New York, NY", ["new york ny"], {"type": "string"}, True),
        ("it's", ['it"s'], {"type": "string"}, True),
        (5, [5.0], {"type": "float"}, True),
        (5.0, [5], {"type": "integer"}, False),
        (True, [1], {"type": "integer"}, False),
        ("x", ["x"], {"type": "integer"}, True),  # a variable's name
        ("X", ["x"], {"type": "integer"}, False),  # which must be exact
        (None, ["", None], {"type": "string"}, True),
        ((1, 2), [[1, 2]], {"type": "tuple", "items": {"type": "integer"}}, True),
        ((1, 2), [[1, 2]], {"type": "array", "items": {"type": "integer"}}, False),
        (["A b"], [["ab"]], {"type": "array", "items": {"type": "string"}}, True),
        ([1], [["1"]], {"type": "array", "items": {"type": "string"}}, False),
        ([], ["", ["a"]], {"type": "array", "items": {"type": "string"}}, True),
        ({"a": 1}, [{"a": [1], "b": ["", 2]}], {"type": "dict"}, True),
        ({"a": 1}, [{"a": [1], "b": [2]}], {"type": "dict"}, False),
        ({"c": 1}, [{"a": [1]}], {"type": "dict"}, False),
        ([{"a": 1}], [[{"a": [1]}]], {"type": "array", "items": {"type": "dict"}}, True),
        ([{"a": 1}, {}], [[{"a": [1]}]], {"type": "array", "items": {"type": "dict"}}, False),
        (10**400, [5.0], {"type": "float"}, False),
        ([1.5, 2], [[1.5, 2.0]], {"type": "array", "items": {"type": "float"}}, False),
        ([1.5, 2], [[1, 2.0], [1.5, 2.0]], {"type": "array", "items": {"type": "float"}}, True),  # types of the first
    ],
)
def test_values_of_python(value, accepted, schema, right):
    assert fits(value, accepted, **schema) == right


@pytest.mark.parametrize(
    ("language", "kind", "text", "value"),
    [
        ("java", "integer", "-12", -12),
        ("java", "long", "12L", 12),
        ("java", "float", "1.5f", 1.5),
        ("java", "double", "1.5e2", 150.0),
        ("java", "boolean", "true", True),
        ("java", "Array", "new int[] {1, 2}", [1, 2]),
        ("java", "ArrayList", 'new ArrayList<>(Arrays.asList("a", "b"))', ["a", "b"]),
        ("java", "ArrayList", "new ArrayList<Integer>() {{ add(1); add(2); }}", [1, 2]),
        ("java", "ArrayList", "new ArrayList<>()", []),
        ("java", "any", "new Point(1, 2)", "new Point(1, 2)"),
        ("javascript", "String", "'a'", "a"),
        ("javascript", "float", "3", 3.0),
        ("javascript", "Bigint", "3n", 3),
        ("javascript", "Boolean", "false", False),
        ("javascript", "array", "[1, 'two', true]", [1, "two", True]),
        ("javascript", "array", "new Array(1, 2)", [1, 2]),
        ("javascript", "array", "nameOfArray", "nameOfArray"),
    ],
)
def test_source_texts_of_java_and_javascript(language, kind, text, value):
    assert fits(text, [value], language, type=kind) and fits(value, [value], language, type=kind)
    assert not fits(text, ["q?"], language, type=kind) and not fits(value, ["q?"], language, type=kind)


@pytest.mark.parametrize(("language", "right"), [("python", True), ("java", False), ("javascript", False)])
def test_a_whole_number_serves_as_a_float_of_python_alone(language, right):
    assert fits(5, [5.0], language, type="float") == right


@pytest.mark.parametrize(
    ("language", "kind", "text"),
    [("java", "HashMap", 'new HashMap<String, Object>() {{ put("a", 1); put("b", "x"); }}'),
     ("javascript", "dict", "{a: 1, 'b': 'x'}"), ("javascript", "dict", '{"a": 1, "b": "x"}')],
)  # fmt: skip
def test_maps_in_source_text(language, kind, text):
    assert fits(text, [{"a": [1], "b": ["x"]}], language, type=kind)
    assert not fits(text, [{"a": [2], "b": ["x"]}], language, type=kind)


def test_upstreams_folder(tmp_path: Path):
    question = [[{"role": "user", "content": "go"}]]
    functions = [{"name": "f", "parameters": {"type": "dict", "properties": {"a": {"type": "integer"}}}}]
    rows = {"simple_python": {"id": "s0", "question": question, "function": functions},
            "irrelevance": {"id": "i0", "question": question, "function": functions},
            "multi_turn_base": {"id": "m0", "question": question * 2}}  # fmt: skip
    (tmp_path / "possible_answer").mkdir()
    for category, row in rows.items():
        (tmp_path / f"BFCL_v4_{category}.json").write_text(json.dumps(row) + "\n")
    gold = tmp_path / "possible_answer" / "BFCL_v4_simple_python.json"
    gold.write_text(json.dumps({"id": "s0", "ground_truth": [{"f": {"a": [1]}}]}))
    task = Bfcl(path=str(tmp_path))
    simple, none = task.rows("eval", 0)
    assert task.score("f(a=1)", simple) == 1 == task.score("no", none) and task.left_out == {"multi_turn_base": 1}
    gold.write_text("{not JSON")
    with pytest.raises(DataError, match=r"BFCL_v4_simple_python\.json:1"):
        task.rows("eval", 0)


# ---- input that is bad


def write(folder: Path, *rows: dict) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


F = {"name": "f", "parameters": {"properties": {}}}


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        (Rlla, {"user": "u", "ground_truth": "<think></think>\n<tool_call>\nno\n</tool_call>"}, "ground truth"),
        (Rlla, {"user": "", "ground_truth": "x"}, "user text"),
        (Rlla, {"user": "u", "ground_truth": ""}, "ground truth"),
        (Rlla, {"user": "u", "ground_truth": 3}, "ground truth"),
        (Rlla, {"user": "u", "other": 1}, "no answer column"),
        (Rlla, {"prompt": [{"role": "user"}], "ground_truth": "x"}, "another form"),
        (ApiBank, {"user": "u", "answer": [], "system": "s", "level": 1}, "no calls"),
        (ApiBank, {"user": "u", "answer": [{"name": "f"}], "system": "s", "level": 1}, "no calls"),
        (ApiBank, {"user": "u", "answer": "{", "system": "s", "level": 1}, "another form"),
        (ApiBank, {"user": "u", "answer": {"name": "f", "parameters": {}}, "level": 1}, "another form"),
        (Bfcl, {"question": [[]], "function": [], "ground_truth": [], "category": "new"}, "Unknown category"),
        (Bfcl, {"question": "q", "function": [], "ground_truth": [], "category": "parallel"}, "another form"),
        (Bfcl, {"question": [[]], "function": {}, "ground_truth": [], "category": "parallel"}, "no list of functions"),
        (Bfcl, {"question": [[]], "function": [F], "ground_truth": None, "category": "parallel"}, "accepted values"),
        (Bfcl, {"question": [[]], "function": [F], "ground_truth": [{"f": {"a": 1}}], "category": "parallel"},
         "accepted values"),
        (Bfcl, {"question": [[]], "ground_truth": [], "category": "multi_turn_base"}, "one turn"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read(task, row, says, tmp_path):
    with pytest.raises(DataError, match=says) as refusal:
        made = task(path=write(tmp_path, row), eval_fraction=1.0)
        made.rows("eval", 0)
    assert str(tmp_path) in str(refusal.value)
