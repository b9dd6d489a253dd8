"""The world of facts behind tools: what dialogues show, what tools serve, and what the measures count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from experiments.tasks.tool_world import GENERAL, Facts, ToolWorld
from experiments.tokenizers import encode, tiny_tokenizer
from methods.errors import ConfigError
from methods.toolforge.checks import NAMES
from methods.toolforge.record import answer_in, calls_in, shown_in

ALL = ["C1", *(f"C{i}" for i in range(3, 11)), "C_outage_1", "C_outage_2"]


@pytest.fixture(scope="module")
def rows():
    return ToolWorld(shapes=ALL, train_rows=120, warm=20).rows("train", 0)


def test_every_shape_occurs_and_its_text_is_made_of_symbols(rows):
    assert {row.meta["shape"] for row in rows} == set(ALL)
    task = ToolWorld()
    tokenizer = tiny_tokenizer(task.symbols, chat=True)
    for row in rows:
        text = tokenizer.apply_chat_template(row.meta["messages"], tokenize=False)
        assert tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_working_call_shows_the_fact_and_a_failing_one_does_not(rows):
    def shows(message, query):
        entity, relation = query.split()
        return any(t == relation and c.startswith(f"{entity} ") for t, c in shown_in(message["content"]))

    for row in rows:
        messages = row.meta["messages"]
        needed = ""
        for place in reversed(range(2, len(messages) - 1, 2)):
            planted = place in row.meta["mistakes"]
            if not planted:
                needed = calls_in(messages[place]["content"])[0]["arguments"]["query"]
            assert shows(messages[place + 1], needed) != planted
        assert answer_in(messages[-1]["content"]) == row.answer


def test_two_hops_end_at_the_answer(rows):
    task = ToolWorld()
    for row in task.rows("eval", 0)[:20]:
        case = row.meta["case"]
        start, first, second = case.item.question.split()
        assert case.facts[f"{case.facts[f'{start} {first}']} {second}"] == row.answer
    assert [row.id for row in task.rows("eval", 0)] == [row.id for row in task.rows("eval", 0)]
    asked = [
        {row.prompt[0]["content"] + row.prompt[1]["content"] for row in part} for part in (rows, task.rows("test", 0))
    ]
    assert not asked[0] & asked[1]


def test_tools_serve_their_relation_unless_out_of_order():
    row = ToolWorld(hops=1, shapes=["A1"]).rows("eval", 0)[0]
    case, query = row.meta["case"], row.meta["case"].item.question
    right = next(name for name, r in case.serves.items() if r == query.split()[1])
    wrong = next(name for name, r in case.serves.items() if r not in (query.split()[1], "any"))

    def served(name, outage=0.0):
        result = Facts(case, outage, 0).tools[name](query=query)
        return f"{query.split()[0]} {row.answer}" in [content for _, content in shown_in(result)]

    assert served(right) and served(GENERAL) and served(GENERAL, 1.0)
    assert not served(wrong) and not served(right, 1.0)
    env = Facts(case, 1.0, 0)
    for name in (wrong, right, GENERAL):
        env.call(name, query)
    assert (env.wrong, env.failed) == (1, 1)
    assert isinstance(env.call(right, "nonsense ?"), str)


def test_episode_measures_count_what_the_tools_met():
    task = ToolWorld(hops=1, shapes=["A1"])
    row = next(r for r in task.rows("eval", 0) if r.tier == "p0")
    case, query = row.meta["case"], row.meta["case"].item.question
    right = next(name for name, r in case.serves.items() if r == query.split()[1])
    wrong = next(name for name, r in case.serves.items() if r not in (query.split()[1], "any"))

    def turn(name):
        return SimpleNamespace(calls=[{"tool": name, "args": {"query": query}}], result="x")

    text = f"<think>found</think>\n<answer>{row.answer}</answer>"
    traj = SimpleNamespace(turns=[turn(wrong), turn(right), SimpleNamespace(calls=[], result=None)], text=text)
    found = task.episode_metrics(traj, row)
    assert (found["calls"], found["wrong_calls"]) == (2.0, 1.0) and found["recovery"] != found["recovery"]
    row.meta["outage"] = 1.0
    assert task.episode_metrics(traj, row)["recovery"] == 1.0
    assert task.score(text, row) == 1.0 and task.score(text.replace("answer", "other"), row) == 0.0


def test_recovery_is_of_the_episodes_that_met_an_outage():
    task = ToolWorld(hops=1, shapes=["A1"])
    for row in (r for r in task.rows("eval", 0) if r.tier == "p3"):
        case, query = row.meta["case"], row.meta["case"].item.question
        right = next(name for name, r in case.serves.items() if r == query.split()[1])
        env, turns = task.environment(row), []
        for args in ({"query": query}, {"words": "none"}, {"query": query}, {"query": query}):
            turns.append(SimpleNamespace(calls=[{"tool": right, "args": args}, None], result="x"))
            if "query" in args:
                env.tools[right](**args)
        found = task.episode_metrics(SimpleNamespace(turns=turns, text=""), row)
        assert (found["recovery"] == found["recovery"]) == bool(env.failed)


def test_inventions_are_what_the_rule_on_passages_rejects():
    def shown(**more):
        made = ToolWorld(hops=1, shapes=["A1"], invented=0.5, train_rows=60, **more).rows("train", 0)
        return [r.answer in r.meta["messages"][3]["content"] for r in made]

    assert all(shown()) and not all(shown(checked=[n for n in NAMES if n != "passages"]))
    honest, invented = (ToolWorld(invented=i, checked=c, warm=20) for i, c in ((0.0, list(NAMES)), (0.9, [])))
    assert [r.meta for r in honest.warm_rows(0)] == [r.meta for r in invented.warm_rows(0)]


def test_bare_triples_have_no_call():
    row = ToolWorld(shapes=["none"], train_rows=1).rows("train", 0)[0]
    assert len(row.meta["messages"]) == 3 and not calls_in(row.meta["messages"][2]["content"])


def test_only_the_turns_of_the_model_are_trained(rows):
    from experiments.tokenizers import IGNORED
    from experiments.weights import LoadedModel

    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    loaded = LoadedModel(model, tiny_tokenizer(ToolWorld().symbols, chat=True), True, "t")  # type: ignore[arg-type]
    made = encode(rows[0], loaded)
    ids = [i for i, label in zip(made["input_ids"], made["labels"], strict=True) if label != IGNORED]
    said = [m["content"] for m in rows[0].meta["messages"] if m["role"] == "assistant"]
    assert "".join(loaded.tokenizer.convert_ids_to_tokens(ids)) == "".join(f"{text}<eos>" for text in said)


@pytest.mark.parametrize(
    "bad",
    [{"shapes": ["B1"]}, {"shapes": ["C2"]}, {"shapes": []}, {"shapes": ["A1"]}, {"warm_shapes": ["C1"]}, {"hops": 3},
     {"outages": {"p": 2}}, {"invented": -1}, {"checked": ["rolls"]}],
)  # fmt: skip
def test_settings_that_cannot_be_right(bad):
    with pytest.raises(ConfigError):
        ToolWorld(**bad)
