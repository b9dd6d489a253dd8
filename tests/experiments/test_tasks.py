"""Tasks: determinism, gold scores 1, tiers, generators against their formulas, reading files, error paragraphs."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.seeds import derive
from experiments.tasks import arithmetic as arith
from experiments.tasks import suite
from experiments.tasks.arithmetic import Arithmetic
from experiments.tasks.base import Row, bucket, read_table, shuffled, tier_order
from experiments.tasks.gsm8k import Gsm8k
from experiments.tasks.jsonl import Jsonl
from experiments.tasks.math import Math
from experiments.tasks.reasoning_gym import ReasoningGym, extract
from experiments.tasks.table import TableTask, read_choices
from methods.errors import ConfigError, DataError

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def data() -> Path:
    if not os.environ.get("ASSAY_DATA"):
        pytest.skip("set ASSAY_DATA to the folder with the real data sets")
    return Path(os.environ["ASSAY_DATA"])


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def records(count: int = 40) -> list[dict]:
    return [{"prompt": f"{k}+1=", "answer": str(k + 1), "level": k % 3} for k in range(count)]


# Seeds


def test_seeds_are_stable_and_depend_on_order_and_type():
    assert derive(0, "a", 1) == 1532760995434174994  # the same on every machine
    streams = [derive(0), derive(1), derive(0, "a", 1), derive(0, 1, "a"), derive(0, "a", "1"), derive(0, "a1")]
    assert len(set(streams)) == len(streams)
    assert all(0 <= s < 2**63 for s in streams)
    with pytest.raises(TypeError, match="float"):
        derive(0, 1.0)  # type: ignore[arg-type]


# Arithmetic


def by_hand(prompt: str) -> list[int]:
    totals, total = [], int(prompt[0])
    for k in range(1, len(prompt) - 1, 2):
        total = eval(f"({total}) {prompt[k]} {prompt[k + 1]}") % 10
        totals.append(total)
    return totals


def test_arithmetic_worked_example():
    assert arith.running_totals("7+5-3=") == [2, 9]
    assert arith.running_totals("2-5*3=") == [7, 1]  # left to right, not 2 - 15


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 12))
def test_arithmetic_demo_without_noise_is_right(seed: int, steps: int):
    rng = random.Random(seed)
    prompt = arith.expression(rng, steps)
    written = arith.demonstration(prompt, rng, 0.0)
    assert written == by_hand(prompt) and len(written) == steps
    row = Row(id="x", prompt=prompt, answer=str(written[-1]), meta={"totals": "".join(map(str, written))})
    task, text = Arithmetic(), row.meta["totals"]
    assert task.score(text, row) == 1
    assert task.metrics(text, row) == {"exact_format": 1.0, "steps_right": 1.0}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 10), st.floats(0, 1))
def test_arithmetic_pass_rate_of_noisy_demos(seed: int, steps: int, noise: float):
    rng = random.Random(seed)
    prompts = [arith.expression(rng, steps) for _ in range(50)] * 30
    right = sum(arith.demonstration(p, rng, noise)[-1] == arith.running_totals(p)[-1] for p in prompts)
    rate, count = arith.pass_rate(steps, noise), len(prompts)
    assert abs(right / count - rate) <= 5 * math.sqrt(max(0, rate * (1 - rate)) / count) + 5 / count


def test_arithmetic_pass_rate_counts_the_way_back():
    """One step back to the right digit has chance noise/9: right-right plus wrong-right over two steps."""
    assert arith.pass_rate(1, 0.2) == pytest.approx(0.8)
    assert arith.pass_rate(2, 0.2) == pytest.approx(0.8**2 + 0.2 * 0.2 / 9)


def test_arithmetic_errors_persist():
    """Every operation is a bijection of the digits, so without further slips a wrong total never comes back."""
    for operator in "+-*":
        for operand in arith.FACTOR if operator == "*" else arith.OPERAND:
            assert len({arith.apply(total, operator, operand) for total in range(10)}) == 10


def test_arithmetic_rows_same_seed_same_rows():
    task = Arithmetic(train_rows=300, eval_rows=60)
    for split in ("train", "eval", "test"):
        assert task.rows(split, 1) == task.rows(split, 1)
        assert task.rows(split, 1) != task.rows(split, 2)


def test_arithmetic_tiers_and_splits():
    task = Arithmetic(train_rows=3000, eval_rows=300)
    train, held = task.rows("train", 0), task.rows("eval", 5)
    for rows, each in ((train, 1000), (held, 100)):
        assert [sum(r.tier == t for r in rows) for t in task.tiers] == [each] * 3
        assert len({r.id for r in rows}) == len(rows)
    assert all(len(r.meta["totals"]) == task.steps[r.tier] for r in train + held)
    assert task.tiers == ("easy", "medium", "hard")
    for tier in ("medium", "hard"):  # also across seeds
        assert not {str(r.prompt) for r in train if r.tier == tier} & {str(r.prompt) for r in held if r.tier == tier}
    assert len({str(r.prompt) for r in held}) == 300
    assert all(r.demo is None for r in held) and all(r.demo for r in train)
    rate = sum(task.score(r.demo or "", r) for r in train if r.tier == "hard") / 1000
    assert abs(rate - arith.pass_rate(8, 0.2)) < 0.07
    assert max(len(str(r.prompt)) for r in train) <= task.max_prompt_tokens
    assert all(set(str(r.prompt)) <= set(task.symbols or ()) for r in train)


def test_arithmetic_mixture():
    task = Arithmetic(train_rows=100, mixture={"easy": 0, "medium": 3, "hard": 1})
    assert [sum(r.tier == t for r in task.rows("train", 0)) for t in task.tiers] == [0, 75, 25]


@pytest.mark.parametrize(
    ("text", "score", "exact", "steps"),
    [
        ("29", 1, 1, 1),
        (" 29\n", 1, 1, 1),
        ("9", 1, 0, 0),
        ("09", 1, 1, 0.5),
        ("20", 0, 1, 0.5),
        ("", 0, 0, 0),
        ("2+9", 0, 0, 0.5),
        ("299", 1, 0, 1),
        ("x9", 0, 0, 0.5),
        ("\u0669", 0, 0, 0),
    ],
)
def test_arithmetic_score_is_of_the_outcome_only(text: str, score: float, exact: float, steps: float):
    row = Row(id="x", prompt="7+5-3=", answer="9", meta={"totals": "29"})
    task = Arithmetic()
    assert task.score(text, row) == score
    assert task.metrics(text, row) == {"exact_format": exact, "steps_right": steps}


def test_arithmetic_in_words():
    task = Arithmetic(instructions=True, train_rows=30, eval_rows=30, demo_noise=0)
    row = task.rows("train", 0)[0]
    assert task.score(row.demo or "", row) == 1 and "left to right" in row.prompt
    other = str((int(row.answer) + 1) % 10)
    assert task.score(f"3, {other}\nAnswer: {row.answer}.", row) == 1
    assert task.score(f"Answer: {row.answer}, or rather {other}", row) == 0
    assert task.score(f"Answer: 1{row.answer}", row) == 0
    assert task.score("I do not know", row) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": {"a": 0}, "mixture": {"a": 1}}, "task.steps"),
        ({"mixture": {"easy": 1}}, "task.mixture"),
        ({"demo_noise": 1.5}, "task.demo_noise"),
        ({"eval_rows": 3000}, "too few prompts"),
    ],
)
def test_arithmetic_refuses(change: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        Arithmetic(**change)


# reasoning-gym


@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "countdown", "number_sorting", "sudoku"])
def test_reasoning_gym_gold_scores_one(name: str):
    task = ReasoningGym(name=name, train_rows=5, eval_rows=5)
    train, held = task.rows("train", 3), task.rows("eval", 3)
    assert train == task.rows("train", 3) != held
    for row in train:
        gold = row.answer if row.answer is not None else row.meta["entry"]["metadata"]["solution"]
        assert task.score(f"<answer>no</answer> Rather:\n<answer>{gold}</answer>", row) == 1
        assert task.score(f"I think so.\n\n{gold}", row) == 1
        assert task.score("<answer>no idea</answer>", row) < 0.2
        assert row.tier in task.tiers


def test_reasoning_gym_tiers_config_and_order():
    task = ReasoningGym(name="chain_sum", config={"min_terms": 2, "max_terms": 3}, train_rows=30)
    assert {r.tier for r in task.rows("train", 0)} == {"num_terms=2", "num_terms=3"}
    assert task.tiers == ("num_terms=2", "num_terms=3")
    assert tier_order(["n=10", "n=9", "hard", "easy"], ("easy", "hard")) == ("easy", "hard", "n=9", "n=10")


def test_reasoning_gym_extraction():
    assert extract("a\nb\n", "x") == "b"
    assert extract("so:\n1 2\n3 4", "5 6\n7 8") == "1 2\n3 4"
    assert extract("<answer>1</answer><answer> 2 </answer> 3", "x") == "2"
    assert extract("", "x") == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "chain_sun"}, "did you mean 'chain_sum'"),
        ({"config": {"min_term": 2}}, "did you mean 'min_terms'"),
        ({"config": {"min_terms": 9, "max_terms": 2}}, "refuses its settings"),
    ],
)
def test_reasoning_gym_refuses(change: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        ReasoningGym(**change)


# Tables


def test_every_kind_of_file_reads_alike(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    rows = [{"prompt": f"p{k}", "answer": f"a,{k}"} for k in range(5)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(r) for r in rows) + "\n\n")
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv"):
        assert read_table(str(tmp_path / name)) == rows
    assert len(read_table(str(tmp_path))) == 20
    assert read_table(str(tmp_path / "a.csv"), where={"prompt": ["p1", "p3"]}) == [rows[1], rows[3]]


def test_folder_with_splits(tmp_path: Path):
    (tmp_path / "main").mkdir()
    write_jsonl(tmp_path / "main" / "train-00000-of-00001.jsonl", records(6))
    write_jsonl(tmp_path / "main" / "test-00000-of-00001.jsonl", records(9)[6:])
    task = Jsonl(path=str(tmp_path))
    assert (len(task.rows("train", 0)), len(task.rows("eval", 0))) == (6, 3)


def test_file_without_splits_is_split_by_question(tmp_path: Path):
    rows = records(400) + records(400)[:50]  # repeated questions must stay on one side
    task = Jsonl(path=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    train, held = task.rows("train", 0), task.rows("eval", 0)
    assert len(train) + len(held) == 450
    assert not {str(r.prompt) for r in train} & {str(r.prompt) for r in held}
    assert 50 < len(held) < 130
    assert {r.id for r in train} == {r.id for r in task.rows("train", 1)}
    assert [r.id for r in train] != [r.id for r in task.rows("train", 1)]
    assert len({r.id for r in train}) == len(train)
    assert train == task.rows("train", 0)


def test_split_column_and_eval_path(tmp_path: Path):
    rows = [{**r, "split": "train" if k < 30 else "test"} for k, r in enumerate(records())]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    task = Jsonl(path=str(file))
    assert (len(task.rows("train", 0)), len(task.rows("eval", 0))) == (30, 10)
    with pytest.raises(DataError, match=r"No row has split = dev.*test, train.*task\.splits\.eval="):
        Jsonl(path=str(file), splits={"train": "train", "eval": "dev"}).rows("eval", 0)
    other = write_jsonl(tmp_path / "b.jsonl", records(7))
    assert len(Jsonl(path=str(file), eval_path=str(other)).rows("eval", 0)) == 7


def with_demo(tmp_path: Path, demo: object) -> Jsonl:
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "1+1=", "answer": "2", "way": demo}])
    return Jsonl(path=str(file), demo_column="way", eval_fraction=0.0)


@pytest.mark.parametrize(
    ("cell", "demo"),
    [
        ("1+1 is 2", "1+1 is 2"),
        ([{"role": "assistant", "content": "<think>\nwell</think>2"}, {"role": "user"}], "<think>\nwell</think>2"),
        (["first", "second"], "first"),
        ("", None),
        (None, None),
        ([], None),
    ],
)
def test_what_a_demonstration_cell_may_hold(tmp_path: Path, cell: object, demo: str | None):
    (row,) = with_demo(tmp_path, cell).rows("train", 0)
    assert row.demo == demo and row.meta == ({"demos": cell} if cell == ["first", "second"] else {})


@pytest.mark.parametrize("cell", [7, {"content": "x"}, [1, 2], [{"role": "assistant"}]])
def test_a_demonstration_cell_of_another_kind_is_refused(tmp_path: Path, cell: object):
    with pytest.raises(DataError, match=r"demonstration is no text.*row 1, column 'way'"):
        with_demo(tmp_path, cell).rows("train", 0)


def test_a_missing_demonstration_column_is_refused_for_training_only(tmp_path: Path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"{k}+1=", "answer": "2", "wya": "x"} for k in range(20)])
    task = Jsonl(path=str(file), demo_column="way", eval_fraction=0.5)
    with pytest.raises(DataError, match=r"no column 'way'.*did you mean 'wya'"):
        task.rows("train", 0)
    assert task.rows("eval", 0)


def test_openr1_layout(tmp_path: Path):
    """Chat prompt, the trace as the first message of `target`, the answer inside a mapping."""
    prompt = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is half of 1?"}]
    record = {"prompt": prompt, "target": [{"role": "assistant", "content": "<think>\nhm</think>\\boxed{1/2}"}]}
    record |= {"reward_model": {"ground_truth": "\\frac{1}{2}", "style": "rule"}, "data_source": "numina"}
    task = Math(
        path=str(write_jsonl(tmp_path / "o.jsonl", [record])),
        demo_column="target",
        answer_column="reward_model",
        suffix="",
        eval_fraction=0.0,
    )
    (row,) = task.rows("train", 0)
    assert row.prompt == prompt and row.answer == "\\frac{1}{2}" and row.demo.startswith("<think>\nhm")
    assert task.score(row.demo, row) == 1 and row.meta["data_source"] == "numina"


def test_user_file_with_columns_tiers_and_demos(tmp_path: Path):
    rows = [{"q": f"q{k}", "gold": k, "kind": ["b", "a"][k % 2], "way": f"w{k}", "note": k} for k in range(20)]
    task = Jsonl(
        path=str(write_jsonl(tmp_path / "a.jsonl", rows)),
        prompt_column="q",
        answer_column="gold",
        tier_column="kind",
        demo_column="way",
        tiers=("b", "a"),
        suffix="Go.",
        scorer="number",
        eval_fraction=0.5,
    )
    train, held = task.rows("train", 0), task.rows("eval", 0)
    assert task.tiers == ("b", "a")
    assert all(r.demo == f"w{r.answer}" and r.meta["note"] == r.answer for r in train)
    assert all(r.demo is None for r in held)
    assert train[0].prompt == f"q{train[0].answer}\n\nGo."
    assert all(task.score(f"is {r.answer}", r) == 1 and task.score(f"is {r.answer + 1}", r) == 0 for r in train)


def test_choices_are_lettered():
    assert read_choices('["A)45", "B) 48"]') == (["45", "48"], [])
    assert read_choices(["A cat", "B flat"]) == (["A cat", "B flat"], [])
    assert read_choices({"text": ["x", "y"], "label": ["1", "2"]}) == (["x", "y"], ["1", "2"])
    assert read_choices(None) == ([], [])


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["u", "v", "w"], "C", "C"),
        (["u", "v", "w"], 1, "B"),
        (["u", "v", "w"], "w", "C"),
        ({"text": ["u", "v"], "label": ["1", "2"]}, "2", "B"),
        (["3", "1", "2"], "1", "B"),
    ],
)
def test_gold_letter(tmp_path: Path, choices: object, answer: object, letter: str):
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q?", "choices": choices, "answer": answer}])
    task = TableTask(path=str(file), eval_fraction=1.0)
    (row,) = task.rows("eval", 0)
    assert row.answer == letter
    assert "\nB. " in row.prompt and "Answer: X" in row.prompt
    assert task.score(f"Answer: {letter}", row) == 1
    assert task.score("Answer: " + ("A" if letter != "A" else "B"), row) == 0


def test_gold_that_is_no_option(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q?", "choices": ["u", "v"], "answer": "D"}])
    with pytest.raises(DataError, match=r"none of the options.*row 1"):
        TableTask(path=str(file), eval_fraction=1.0).rows("eval", 0)


def test_wrong_columns_are_mixed_with_the_answer(tmp_path: Path):
    rows = [{"Q": f"Q{k}", "right": f"r{k}", "w1": "x", "w2": "y"} for k in range(40)]
    task = TableTask(
        path=str(write_jsonl(tmp_path / "a.jsonl", rows)),
        prompt_column="Q",
        answer_column="right",
        wrong_columns=["w1", "w2"],
        scorer="choice",
        eval_fraction=1.0,
    )
    found = task.rows("eval", 0)
    assert {r.answer for r in found} == {"A", "B", "C"}
    assert all(r.meta["lettered"]["ABC".index(r.answer)] == str(r.prompt).split()[0].replace("Q", "r") for r in found)
    assert {r.id: r.answer for r in found} == {r.id: r.answer for r in task.rows("eval", 9)}


def test_chat_prompts_keep_their_messages(tmp_path: Path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": chat, "answer": "x"}])
    (row,) = Jsonl(path=str(file), eval_fraction=1.0, suffix="Go.").rows("eval", 0)
    assert row.prompt == [chat[0], {"role": "user", "content": "u\n\nGo."}]


# Error paragraphs


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "", r"has no rows.*a\.jsonl"),
        ("a.parquet", "", r"has no rows.*a\.parquet"),
        ("a.jsonl", '{"prompt": "x", "answer": "1"}\n{"prompt": \n', r"not JSON.*a\.jsonl:2"),
        ("a.jsonl", "[1]\n", r"no JSON object.*a\.jsonl:1"),
        ("a.jsonl", '{"promt": "x", "answer": "1"}\n', r"no column 'prompt'.*did you mean 'promt'.*promt, answer"),
        ("a.jsonl", '{"prompt": "x", "answer": null}\n', r"answer is empty.*row 1"),
        ("a.jsonl", '{"prompt": 5, "answer": 1}\n', r"neither text nor chat messages"),
        ("a.csv", "prompt,answer\nx,1,2\n", r"another number of cells.*row 2"),
        ("a.parquet", "not parquet", r"cannot be read.*a\.parquet"),
        ("a.jsonl.gz", "not gzip", r"cannot be read.*a\.jsonl\.gz"),
        ("a.txt", "x", r"Unknown kind of data file.*\.parquet"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, says: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        Jsonl(path=str(tmp_path / name), eval_fraction=1.0).rows("eval", 0)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_other_bad_sources(tmp_path: Path):
    with pytest.raises(DataError, match=r"No data file was given.*task\.path"):
        Jsonl().rows("train", 0)
    with pytest.raises(DataError, match=r"No such data file.*missing\.jsonl"):
        Jsonl(path=str(tmp_path / "missing.jsonl")).rows("train", 0)
    with pytest.raises(DataError, match="holds no table"):
        Jsonl(path=str(tmp_path)).rows("train", 0)
    file = str(write_jsonl(tmp_path / "a.jsonl", records()))
    with pytest.raises(DataError, match="No row is left for the split 'train'"):
        Jsonl(path=file, eval_fraction=1.0).rows("train", 0)
    with pytest.raises(DataError, match=r"No row has level = 9.*0, 1, 2"):
        Jsonl(path=file, where={"level": 9}).rows("train", 0)
    with pytest.raises(DataError, match=r"no column 'levle'.*did you mean 'level'"):
        Jsonl(path=file, where={"levle": 1}).rows("train", 0)
    with pytest.raises(ConfigError, match="did you mean 'math_verify'"):
        Jsonl(path=file, scorer="math_verfy")
    words = str(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "x", "answer": "many"}]))
    with pytest.raises(DataError, match=r"does not suit the scorer 'number'.*row 1"):
        Jsonl(path=words, scorer="number", eval_fraction=1.0).rows("eval", 0)


def test_hub_set_without_a_network(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to the hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"'openai/gsm8k' could not be loaded.*no route.*task\.path=") as caught:
        Gsm8k().rows("train", 0)
    assert "\n" not in str(caught.value)


def test_hub_set_is_asked_for_its_split(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"question": f"Q{k}", "answer": "work <<1+1=2>>2\n#### 1,000"} for k in range(3)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = Gsm8k().rows("eval", 0)
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert len(rows) == 3 and {r.answer for r in rows} == {"1000"} and {r.tier for r in rows} == {"easy"}


# Real data


def test_real_gsm8k(data: Path):
    task = Gsm8k(path=str(data / "gsm8k" / "gsm8k.parquet"))
    train, held = task.rows("train", 0), task.rows("eval", 0)
    assert (len(train), len(held)) == (400, 300)
    for row in train + held:
        assert row.answer == row.meta["final_answer"]
        assert task.score(f"So it is \\boxed{{{row.answer}}}.", row) == 1
        assert task.score(f"So it is \\boxed{{{int(row.answer) + 1}}}.", row) == 0
    assert all(task.score(r.demo or "", r) == 1 and "<<" not in (r.demo or "") for r in train)
    assert {r.tier for r in train} == set(task.tiers) == {"easy", "medium", "hard"}


def test_real_olympiadbench_and_mmlu_pro_as_suite_members(data: Path):
    cfg = {
        "olympiadbench": {
            "_target_": "experiments.tasks.table.TableTask",
            "path": str(data / "math_suite" / "math_suite.parquet"),
            "where": {"set": "olympiadbench"},
            "scorer": "math_verify",
            "eval_fraction": 1.0,
        },
        "mmlu_pro": {
            "_target_": "experiments.tasks.table.TableTask",
            "path": str(data / "mmlu_pro" / "mmlu_pro.parquet"),
            "scorer": "choice",
            "tier_column": "category",
            "eval_fraction": 1.0,
        },
        "gone": {"_target_": "experiments.tasks.table.TableTask", "path": "missing.jsonl"},
        "dropped": None,
    }
    loaded = suite.load(suite.members(cfg), "eval", 0)
    assert {name: len(rows) for name, rows in loaded.rows.items()} == {"olympiadbench": 120, "mmlu_pro": 840}
    assert "suite.gone.path=" in loaded.left_out["gone"] and loaded.note().startswith("left out: gone: No such data")
    for row in loaded.rows["mmlu_pro"]:
        assert loaded.tasks["mmlu_pro"].score(f"Answer: {row.answer}", row) == 1
    assert len(loaded.tasks["mmlu_pro"].tiers) == 14


# Suites


@pytest.mark.parametrize("name", ["math", "ood"])
def test_shipped_suites(name: str):
    yaml = pytest.importorskip("yaml")
    cfg = yaml.safe_load((CONF / "suite" / f"{name}.yaml").read_text())
    tasks = suite.members(cfg)
    assert [t.name for t in tasks] == list(cfg)
    assert len(tasks) == {"math": 6, "ood": 3}[name]


def test_suite_member_errors():
    good = {"_target_": "experiments.tasks.table.TableTask"}
    with pytest.raises(ConfigError, match="no members"):
        suite.members({})
    with pytest.raises(ConfigError, match=r"Unknown key 'pth'.*suite\.m.*did you mean 'path'"):
        suite.members({"m": {**good, "pth": "x"}})
    with pytest.raises(ConfigError, match="No such task class"):
        suite.members({"m": {"_target_": "experiments.tasks.table.Nothing"}})
    with pytest.raises(DataError, match=r"No member of the suite.*m.*missing\.jsonl"):
        suite.load(suite.members({"m": {**good, "path": "missing.jsonl"}}), "eval", 0)


# Shipped YAML


@pytest.mark.parametrize("name", ["arithmetic", "lookup", "reasoning_gym", "gsm8k", "math", "jsonl"])
def test_yaml_holds_every_field_with_its_default(name: str):
    yaml = pytest.importorskip("yaml")
    import importlib
    from dataclasses import fields

    text = (CONF / "task" / f"{name}.yaml").read_text()
    cfg = yaml.safe_load(text)
    module, _, cls = cfg.pop("_target_").rpartition(".")
    task = getattr(importlib.import_module(module), cls)
    assert text.startswith("# ") and text.split("\n")[0].endswith(".")
    assert set(cfg) == {f.name for f in fields(task) if f.init}
    assert task(**cfg) == task()


def test_small_helpers():
    assert shuffled(range(50), 1) != shuffled(range(50), 2) and sorted(shuffled(range(50), 1)) == list(range(50))
    assert bucket("a", 10) == bucket("a", 10) and len({bucket(str(k), 10) for k in range(100)}) == 10
    assert Math().tier_of("Level 5", {}) == Math().tier_of(5, {}) == "level 5"
