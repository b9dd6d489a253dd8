"""Tool calls: the sheet's numbers, readers of all forms, the reward against a plain reference, the task in small."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks import tool_parsing as parsing
from experiments.tasks.tool_calls import SYMBOLS, ToolCalls, right_facts, written
from experiments.tasks.tool_judge import judge
from experiments.tasks.tool_rewards import jaccard, outcome_reward, read_reference, well_formed
from methods.errors import ConfigError, DataError

THINK = "<think> x </think>"


def block(*calls: dict, think: str = THINK, after: str = "") -> str:
    return f"{think}\n<tool_call>\n" + "\n".join(map(json.dumps, calls)) + f"\n</tool_call>{after}"


def call(tool: str, **parameters) -> dict:
    return {"name": tool, "parameters": parameters}


WEATHER = block(call("get_weather", city="Paris", unit="C"))


@pytest.mark.parametrize(
    ("response", "fmt", "correct", "total", "norm"),
    [
        (WEATHER, 1, 3, 4, 1.0),
        (WEATHER.replace('"C"', '"F"'), 1, 1.5, 2.5, 0.785714),
        (WEATHER.replace(', "unit": "C"', ""), 1, 0.75, 1.75, 0.678571),
        (WEATHER.replace("}}", "}") + " bye", 0, -3, -3, 0.0),
    ],
)
def test_worked_rollouts(response, fmt, correct, total, norm):
    out = outcome_reward(response, WEATHER)
    assert (out.fmt, out.correct, out.total) == pytest.approx((fmt, correct, total))
    assert out.norm == pytest.approx(norm, abs=1e-6)


def test_worked_two_calls():
    gold = block(call("add", a=1, b=2), call("add", a=3, b=4))
    said = block(call("add", a=3, b=4), call("mul", a=1, b=2), call("add", a=1, c=2))
    out = outcome_reward(said, gold)
    assert out.correct == pytest.approx(1.285714, abs=1e-6) and out.names == pytest.approx(2 / 3)
    assert jaccard("aab", "abb") == 2 / 4 and jaccard("", "") == 1 and jaccard("a", "") == 0


# ---- formats


RESPONSE, BOTH = f"{THINK}\n<response> hi </response>", block(call("f", a=1), after="\n<response> hi </response>")


@pytest.mark.parametrize("text", [WEATHER, RESPONSE, BOTH, THINK, "<think></think>", "<think> a </think> b </think>"])
def test_each_form_is_its_own_format(text):
    assert outcome_reward(text, text).fmt == 1


@pytest.mark.parametrize(
    "text",
    ["", WEATHER + "\n", " " + WEATHER, WEATHER.replace("\n", "", 1), WEATHER.replace("\n<", "<"),
     WEATHER.replace("<think>", ""), WEATHER.replace("</think>", ""), RESPONSE, BOTH, WEATHER + WEATHER[18:],
     WEATHER.replace(" x ", " <tool_call> "), WEATHER.replace(" x ", " </tool_call> ")],
)  # fmt: skip
def test_not_the_format_of_a_call(text):
    assert outcome_reward(text, WEATHER).fmt == 0


def test_a_response_is_due_where_the_truth_holds_one_and_calls_do_not_count_there():
    for said, norm in ((RESPONSE, 1.0), (WEATHER, 0.0), ("hi", 0.0), (BOTH, 0.0)):
        out = outcome_reward(said, RESPONSE)
        assert out.correct == 0 and out.norm == norm and math.isnan(out.names)
    assert outcome_reward(WEATHER, BOTH).fmt == 0


PATTERNS = {
    (1, 0): r"<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>",
    (0, 1): r"<think>.*?</think>\n<response>.*?</response>",
    (1, 1): r"<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>\n<response>.*?</response>",
    (0, 0): r"<think>.*?</think>",
}
PIECES = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>", "\n", "x", "{}")


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.booleans(), st.booleans())
def test_format_against_the_sheets_patterns(pieces, calls, response):
    text = "".join(pieces)
    matched = re.fullmatch(PATTERNS[int(calls), int(response)], text, re.DOTALL) is not None
    due = ["tool_call"] * calls + ["response"] * response
    once = all(text.count(f"<{tag}>") == 1 == text.count(f"</{tag}>") for tag in due)
    assert well_formed(text, calls, response) == (matched and once)


# ---- correctness


@pytest.mark.parametrize(
    ("said", "correct"),
    [
        (RESPONSE, -3),  # no call where one is due
        (THINK + "\n<tool_call>\n\n</tool_call>", -3),
        (WEATHER.replace('"name"', '"tool"'), -3),
        (WEATHER.replace('"get_weather"', "[1]"), -3),
        (WEATHER.replace('"parameters"', '"arguments"'), -3),
        (block({"name": "get_weather", "parameters": [1]}), -3),
        (block({"name": "get_weather"}), -3),
        (block({"name": "other"}), -3),  # no name is right: S = 0, as low as unreadable
        (block({"name": "other"}, call("get_weather", city="Paris", unit="C")), -3 + 6 * 3.5 / 4),
        (WEATHER.replace("</tool_call>", ""), -3),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", -3),
    ],
)
def test_unreadable_calls(said, correct):
    assert outcome_reward(said, WEATHER).correct == pytest.approx(correct)


def test_order_is_free_and_types_are_not():
    gold = block(call("f", a=1), call("g", b="1"))
    assert outcome_reward(block(call("g", b="1"), call("f", a=1.0)), gold).correct == 3
    assert outcome_reward(block(call("f", a="1"), call("g", b=1)), gold).correct < 3


def test_a_prediction_is_used_once():
    gold = block(call("f", a=1), call("f", a=1))
    out = outcome_reward(block(call("f", a=1)), gold)
    assert out.correct == pytest.approx(-3 + 6 * (0.5 + 2) / 5)


def test_calls_without_parameters():
    gold = block(call("f"))
    assert outcome_reward(gold, gold).correct == 3
    assert outcome_reward(block(call("f", a=1)), gold).correct == pytest.approx(0)  # the name alone: 1 of 2


@pytest.mark.parametrize("think", ["", "about <tool_call>", "a <tool_call>\n{}\n</tool_call> b"])
def test_a_ground_truth_is_read_behind_its_thinking(think):
    reference = read_reference(f"<think>{think}</think>\n<tool_call>\n{json.dumps(call('f'))}\n</tool_call>")
    assert reference.calls == (call("f"),) and not reference.response
    assert read_reference(f"<think>{think}</think>\n<response>hi</response>").calls is None


def test_a_ground_truth_that_cannot_be_read():
    with pytest.raises(DataError, match="ground truth"):
        outcome_reward(WEATHER, WEATHER.replace("}}", "}"))


names, keys = st.sampled_from("fg"), st.sampled_from("abc")
made = st.builds(lambda n, p: {"name": n, "parameters": p}, names, st.dictionaries(keys, st.integers(0, 2)))


@settings(max_examples=300, deadline=None)
@given(st.lists(made, min_size=1, max_size=4), st.lists(made, min_size=1, max_size=4))
def test_correctness_against_a_plain_reference(due, said):
    out = outcome_reward(block(*said), block(*due))
    left, score, most = list(range(len(said))), 0.0, 1
    shared = sum((Counter(c["name"] for c in due) & Counter(c["name"] for c in said)).values())
    score += shared / (len(due) + len(said) - shared)
    for one in due:
        most += 1 + len(one["parameters"])
        best, chosen = 0.0, None
        for k in left:
            if said[k]["name"] == one["name"]:
                a, b = set(one["parameters"]), set(said[k]["parameters"])
                value = (len(a & b) / len(a | b) if a | b else 1.0) + sum(
                    said[k]["parameters"][n] == one["parameters"][n] for n in a & b
                )
                best, chosen = (value, k) if value > best else (best, chosen)
        if chosen is not None:
            left.remove(chosen)
            score += best
    assert out.correct == pytest.approx(3 if due == said else -3 + 6 * score / most)
    assert 0 <= out.norm <= 1 and out.fmt == 1


LONG = [
    lambda n: f"{THINK}\n<tool_call>\n" + (json.dumps(call("f", a=1)) + "\n") * (20 * n) + "</tool_call>",
    lambda n: "</think>\n<tool_call>\n" * (200 * n),
    lambda n: "<think>" + "</think>\n<response>" * (200 * n),
    lambda n: "<think>" + "get x 1 " * (50 * n) + "</think>[f(a=1)" + ", f(a=1)" * (20 * n) + "]",
]


@pytest.mark.parametrize("make", LONG)
def test_time_grows_linearly(make):
    """Sixteen times the text takes far less than 256 times as long."""

    def seconds(n: int) -> float:
        text, spent = make(n), []
        for _ in range(3):
            began = time.process_time()
            outcome_reward.__wrapped__(text, WEATHER)
            parsing.read_calls(text)
            judge("q", text)
            spent.append(time.process_time() - began)
        return min(spent)

    assert seconds(64) < 64 * seconds(4) + 0.01


# ---- the readers


CALLS = [call("f", a=1, b=["x"]), call("g.h")]
OPENAI = [
    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": ["x"]}'}},
    {"id": "c2", "type": "function", "function": {"name": "g.h", "arguments": {}}},
]


@pytest.mark.parametrize(
    "text",
    [
        block(*CALLS),
        "".join(f"<tool_call>\n{json.dumps(c)}\n</tool_call>\n" for c in CALLS),
        "<tool_call>" + json.dumps({"name": "f", "arguments": {"a": 1, "b": ["x"]}}, indent=1) + "</tool_call>"
        + '<tool_call>{"name": "g.h", "arguments": {}}</tool_call>',
        json.dumps(OPENAI),
        json.dumps({"role": "assistant", "content": None, "tool_calls": OPENAI}),
        json.dumps(CALLS),
        "[f(a=1, b=['x']), g.h()]",
        "<think> f or g? </think>\n[f(a=1, b=['x']), g.h()]",
        "f(a=1, b=['x']), g.h()",
        "```python\n[f(a=1, b=['x']), g.h()]\n```",
        "[{'f': {'a': 1, 'b': ['x']}}, {'g.h': {}}]",
        json.dumps([{"f": {"a": 1, "b": ["x"]}}, {"g.h": {}}]),
    ],
)  # fmt: skip
def test_every_form_gives_the_same_calls(text):
    assert parsing.read_calls(text) == CALLS


@pytest.mark.parametrize(
    "text",
    ["", "I cannot help.", "[1, 2]", "[f(a=1), 2]", "f()(a=1)", "[f(a=1]", "<tool_call>{}</tool_call>",
     "<tool_call>\n", '{"tool_calls": 1}', "null", "\0", "f(" * 5000, "[" * 100_000, "-" * 50_000 + "1",
     "x" * 100_000, '[{"function": 1}]', "{'a': 1}", "f(**a)[0]"],
)  # fmt: skip
def test_texts_without_readable_calls(text):
    assert not parsing.read_calls(text)


def test_values_in_pythons_syntax():
    (got,) = parsing.read_calls("f(a=-1.5, b=2*3, c=true, d=None, e=(1, 2), g={'k': [1]}, h=x.y, i=2**99999, j=h(z=1))")  # type: ignore[misc]
    assert got["parameters"] == {
        "a": -1.5, "b": 6, "c": "true", "d": None, "e": (1, 2), "g": {"k": [1]}, "h": "x.y", "i": "2 ** 99999",
        "j": {"h": {"z": 1}},
    }  # fmt: skip
    assert parsing.read_calls("[]") == []
    (long,) = parsing.read_calls(f"f(a={'9' * 400}, b=-{2**1023}, c=3 * {2**1023})")  # type: ignore[misc]
    assert long["parameters"] == {"a": "9" * 400, "b": -(2**1023), "c": f"3 * {2**1023}"}
    assert parsing.openai_calls([{"function": {"name": "f", "arguments": "{"}}]) == [{"name": "f", "parameters": None}]


# ---- the programmatic judge


DIALOGUE = [
    {"role": "system", "content": "**Available Tools**\n1. Name: get_weather\nParameters: {}\n2. Name: get_time\n"},
    {"role": "user", "content": "<user> What is the weather like in Paris today? </user>"},
]


def test_judge_orders_thoughts():
    good = "The user asks for the weather in Paris; get_weather gives it, city Paris, unit C."
    vague = "I should use the appropriate tool."
    wrong = "The user wants 99 times; get_time get_time get_time get_time get_time get_time get_time."
    grades = [judge(DIALOGUE, WEATHER.replace(" x ", thought)) for thought in (good, vague, wrong, " ")]
    assert grades[0] == 1.0 and grades == sorted(grades, reverse=True) and grades[3] == 0
    assert judge(DIALOGUE, "no thinking") == 0 and judge("plain", RESPONSE.replace(" x ", "answer directly")) > 0
    assert all(round(10 * g, 6) == round(10 * g) for g in grades)


WORDS = "weather Paris today"


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        (f"<think> {WORDS} directly </think> ok", 0.4),
        (f"<think> {WORDS} get_time </think> ok", 0.4),
        (f'<think> {WORDS} directly </think>[{{"name": "", "parameters": {{}}}}]', 0.4),
        (f"<think> {WORDS} f </think>[f()]", 0.4),  # no listed tool
        (f"<think> {WORDS}: get_time does not serve, so no tool </think> ok", 0.7),
        (f"<think> {WORDS}: for get_weather the unit is missing </think> Which unit?", 0.8),
        (f"<think> {WORDS} get_weather </think>[get_weather()]", 0.9),
        (f"<think> {WORDS} get_weather </think>[get_weather(city='Paris')]", 1.0),
    ],
)
def test_judge_without_a_call_wants_a_reason_from_the_schema(response, grade):
    assert judge(DIALOGUE, response) == pytest.approx(grade)


@pytest.mark.parametrize("value", [" * ".join(["9" * 4000] * 3), "[9" + "9" * 4299 + "]", "0x" + "f" * 5000, "1e999"])
def test_judge_of_values_that_are_long(value):
    for form in (f"[f(a={value})]", f'{{"name": "f", "parameters": {{"a": {value}}}}}'):
        assert 0 <= judge(DIALOGUE, f"<think> What is {value}? </think>\n{form}") <= 1


# ---- the task in miniature


def test_rows_gold_and_tiers():
    task = ToolCalls(train_rows=300, eval_rows=80)
    rows = task.rows("train", 0)
    assert rows == task.rows("train", 0) != task.rows("train", 1)
    assert {r.tier for r in rows} == {"easy", "medium", "hard"}
    held = task.rows("eval", 0)
    assert Counter(r.tier for r in held) == {t: 20 for t in task.tiers} and all(r.demo is None for r in held)
    assert {r.tier for r in task.warm_rows(0)} == set(task.tiers)
    for row in held:
        assert task.score(row.answer, row) == 1
        got = task.metrics(row.answer, row)
        assert got["reasoning"] == got["hackable"] == got["format"] == 1 and got["fillers"] == 0


def test_symbols_spell_every_text():
    from experiments.tokenizers import tiny_tokenizer

    tokenizer, task = tiny_tokenizer(SYMBOLS), ToolCalls(train_rows=400)
    for row in task.warm_rows(3):
        ids = tokenizer(row.demo)["input_ids"]
        assert tokenizer.decode(ids) == row.demo and tokenizer.unk_token_id not in ids
        assert len(ids) < task.max_completion_tokens and len(tokenizer(row.prompt)["input_ids"]) == 5


def test_judges_of_the_miniature():
    task = ToolCalls()
    row = next(r for r in task.rows("eval", 0) if r.tier == "hard")
    tool, facts = int(row.meta["tool"][1]), row.meta["facts"]
    off = facts | {"b": (facts["b"] + 1) % 10}
    got = task.metrics(written(tool, off, facts, fillers=2), row)
    assert got["reasoning"] == 3 / 6 and got["hackable"] == min(1, 3 / 4 + 0.5) and got["values"] == 1
    empty = task.metrics("<think>" + " hm" * 9 + written(tool, facts, facts).partition("c=")[2][1:], row)
    assert empty["reasoning"] == 0 and empty["hackable"] == 1
    assert right_facts(0, [1, 2, 3]) == {"a": 1}
    assert task.metrics("", row)["reasoning"] == 0 == task.score("", row)


@pytest.mark.parametrize("keys", [{"fact_noise": 1.5}, {"bonus": -1}, {"held_out": 8}, {"held_out": 1.5}])
def test_settings_out_of_range(keys):
    with pytest.raises(ConfigError, match=r"task\."):
        ToolCalls(**keys)
