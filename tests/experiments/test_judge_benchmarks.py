"""Reading the judge benchmarks: real rows, files of one's own, bad input, and control judges against a reference."""

from __future__ import annotations

import gzip
import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from experiments.judging.controls import CONTROLS, ControlJudge
from experiments.judging.credit import arrays
from experiments.judging.formats import FORMATS, V1_ROWS
from experiments.judging.pairs import UNPARSABLE, ask, questions, read_verdicts, write_verdicts
from experiments.judging.scores import score
from experiments.judging.table import report
from experiments.tasks.constraint_world import ConstraintBenchmark
from experiments.tasks.judge_benchmarks import Benchmark
from methods.errors import ConfigError, DataError

DATA = Path(os.environ.get("ASSAY_DATA") or "/nowhere")
real = pytest.mark.skipif(not DATA.is_dir(), reason="set ASSAY_DATA to the folder of real data")
FILES = {
    "rewardbench": "rewardbench/rewardbench.parquet",
    "rm_bench": "rm_bench/rm_bench.jsonl.gz",
    "llmbar": "llmbar/llmbar.jsonl.gz",
    "pairs": "hh_harmless/hh_harmless.jsonl.gz",
}


def verdict_file(path, benchmark, rule, form="pairs", orders="both", seed=0):
    judge = ControlJudge(rule, form=form)
    write_verdicts(path, ask(judge, questions(benchmark.stream(), seed, form, orders)), {"judge": judge.name})
    return path


def judged(tmp_path, name, rule, **how):
    file = verdict_file(tmp_path / "v.parquet", Benchmark(name, str(DATA / FILES[name]), official=False), rule, **how)
    return score(arrays(read_verdicts(file), str(file)))


def raw(name):
    if name == "rewardbench":
        import pandas as pd

        return pd.read_parquet(DATA / FILES[name]).to_dict("records")
    with gzip.open(DATA / FILES[name], "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- control judges on real rows


def wins(rule, better, worse):
    """Credit of one pair under a rule, by the plain formula; equal lengths earn nothing."""
    if rule == "oracle":
        return 1.0
    if rule == "always_first":
        return 0.5  # over both orders
    return float(len(better) > len(worse)) if rule == "longer" else float(len(better) < len(worse))


def plain_rewardbench(rule):
    weights = V1_ROWS | {"math-prm": 984}
    credit: dict[str, list[float]] = {}
    for row in raw("rewardbench"):
        credit.setdefault(row["subset"], []).append(wins(rule, row["chosen"], row["rejected"]))
    section = {row["subset"]: row["section"] for row in raw("rewardbench")}
    sections = {}
    for part in ("chat", "chat_hard", "safety", "reasoning"):
        names = [name for name in credit if section[name] == part]
        total = sum(weights[name] for name in names)
        sections[part] = sum(weights[name] * sum(credit[name]) / len(credit[name]) for name in names) / total
    return {
        "Chat": sections["chat"],
        "Chat Hard": sections["chat_hard"],
        "Safety": sections["safety"],
        "Reasoning": sections["reasoning"],
        "Overall": sum(sections.values()) / 4,
    }


def plain_rm_bench(rule):
    cells: dict[str, list[list[list[float]]]] = {}
    for row in raw("rm_bench"):
        matrix = [[wins(rule, c, r) for r in row["rejected"]] for c in row["chosen"]]
        cells.setdefault(row["domain"].split("-")[0], []).append(matrix)
    levels = {"hard": [(0, 1), (0, 2), (1, 2)], "normal": [(0, 0), (1, 1), (2, 2)], "easy": [(1, 0), (2, 0), (2, 1)]}
    found = {}
    for domain, tables in cells.items():
        for level, places in levels.items():
            found[f"{domain} {level}"] = sum(t[i][j] for t in tables for i, j in places) / (3 * len(tables))
        found[domain] = sum(found[f"{domain} {level}"] for level in levels) / 3
    found |= {level: sum(found[f"{domain} {level}"] for domain in cells) / len(cells) for level in levels}
    return found | {"Overall": sum(found[domain] for domain in cells) / len(cells)}


def plain_llmbar(rule):
    credit: dict[str, list[float]] = {}
    for row in raw("llmbar"):
        answers = [row["output_1"], row["output_2"]]
        better, worse = answers if str(row["label"]) == "1" else answers[::-1]
        # LLMBar halves the credit of equal scores.
        value = 0.5 if rule in ("longer", "shorter") and len(better) == len(worse) else wins(rule, better, worse)
        credit.setdefault(row["subset"], []).append(value)
    means = {name: sum(values) / len(values) for name, values in credit.items()}
    hard = [value for name, value in means.items() if name.startswith("Adversarial")]
    return means | {"Adversarial": sum(hard) / len(hard), "Overall": sum(means.values()) / len(means)}


def plain_pairs(rule):
    values = [wins(rule, row["chosen"], row["rejected"]) for row in raw("pairs")]
    return {"Overall": sum(values) / len(values)}


PLAIN = {"rewardbench": plain_rewardbench, "rm_bench": plain_rm_bench, "llmbar": plain_llmbar, "pairs": plain_pairs}


@real
@pytest.mark.parametrize("rule", ["always_first", "longer", "shorter", "oracle"])
@pytest.mark.parametrize("name", FILES)
def test_control_judges_on_real_rows(tmp_path, name, rule):
    found, expected = judged(tmp_path, name, rule), PLAIN[name](rule)
    # Slots mean nothing to all but the first, which is right half of the time over both orders.
    protocol = "both" if rule == "always_first" else "official"
    assert {key: found[key][protocol].mean for key in expected} == pytest.approx(expected, abs=1e-12)
    assert all(0 <= found[key][protocol].half < 0.5 for key in expected)


@real
def test_rows_of_the_real_files():
    counts = {
        name: sum(1 for _ in Benchmark(name, str(DATA / file), official=False).stream()) for name, file in FILES.items()
    }
    assert counts == {"rewardbench": 481, "rm_bench": 225, "llmbar": 271, "pairs": 200}
    with pytest.raises(DataError, match=r"not the published rows of rm_bench.*math: 0 of 529.*official=false"):
        next(Benchmark("rm_bench", str(DATA / FILES["rm_bench"])).stream())


@real
@pytest.mark.parametrize("rule", ["longer", "oracle"])
@pytest.mark.parametrize("name", FILES)
def test_swapping_a_and_b_swaps_every_verdict_of_a_judge_that_ignores_position(name, rule):
    asked = list(questions(Benchmark(name, str(DATA / FILES[name]), official=False).stream(), 0))
    judge = ControlJudge(rule)
    straight = [verdict.choice for verdict in judge.judge(asked)]
    swapped = [verdict.choice for verdict in judge.judge([question.swapped() for question in asked])]
    turned = {0: 1, 1: 0}
    differences = sum(turned.get(a, a) != b for a, b in zip(straight, swapped, strict=True))
    assert differences == 0 and len(asked) > 300


# ---------------------------------------------------------------- controls in the made world


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_scored_from_its_file(tmp_path, name):
    """The made world written as a benchmark's file, read back by that benchmark's reader, and scored."""
    world = ConstraintBenchmark(name, count=240)
    file = world.write(tmp_path / f"{name}.jsonl")
    benchmark = Benchmark(name, str(file), official=False)
    assert list(benchmark.stream()) == list(world.stream())
    form = "all" if name == "rewardbench2" else "pairs"
    best = verdict_file(tmp_path / "oracle.parquet", benchmark, "oracle", form)
    found = score(arrays(read_verdicts(best)))
    top = 1 + 0.01 * 1 / 6 if name == "rewardbench2" else 1  # Ties go up to 1.01
    assert found["Overall"]["official"].mean == pytest.approx(top, abs=1e-9)
    if name != "rm_bench":
        return
    text = report(
        [best, verdict_file(tmp_path / "longer.parquet", benchmark, "longer", form)], tmp_path / "page"
    ).read_text()
    assert "random (trivial)" in text and "## Beside the score" in text and "longer minus oracle" in text
    assert (tmp_path / "page" / "figures" / "length.png").stat().st_size > 1000


def test_longer_wins_is_easy_before_normal_before_hard_and_relabelled_styles_swap_them(tmp_path):
    file = verdict_file(tmp_path / "v.parquet", ConstraintBenchmark("rm_bench", count=200), "longer")
    found = {name: interval["official"].mean for name, interval in score(arrays(read_verdicts(file))).items()}
    assert found["easy"] > 0.8 > 0.65 > found["normal"] > 0.25 > 0.2 > found["hard"]
    rows = read_verdicts(file, text=True).to_pylist()
    for row in rows:
        row["slots"] = [2 - k if k < 3 else 8 - k for k in row["slots"]]
    write_verdicts(file, rows)
    turned = {name: interval["official"].mean for name, interval in score(arrays(read_verdicts(file))).items()}
    assert turned["hard"] == pytest.approx(found["easy"]) and turned["easy"] == pytest.approx(found["hard"])


@pytest.mark.parametrize("rule", CONTROLS)
def test_a_control_judge_is_a_function_of_the_question(rule):
    asked = list(questions(ConstraintBenchmark("rmb", count=60).stream(), 0))
    judge = ControlJudge(rule, seed=1)
    whole = {verdict.question.key: verdict.choice for verdict in judge.judge(asked)}
    assert {v.question.key: v.choice for v in ask(judge, asked[::-1], batch=7)} == whole


@pytest.mark.parametrize("text", ['[{"category_path": "BoN_set/Helpfulness/x", "conversation_input": '
                                  '[{"role": "user", "content": "q"}], "bon_uid": "1", "bon_best": {"answer": "a"}, '
                                  '"loser_list": 5}]', "[" * 100_000])  # fmt: skip
def test_damaged_json_is_a_data_error(tmp_path, text):
    (tmp_path / "rmb.json").write_text(text)
    with pytest.raises(DataError, match=r"rmb\.json"):
        list(Benchmark("rmb", str(tmp_path / "rmb.json"), official=False).stream())


def test_pairs_of_rewardbench_2_are_refused_before_they_are_paid_for():
    with pytest.raises(ConfigError, match=r"all responses at once.*judge\.by\.form=all"):
        next(questions(ConstraintBenchmark("rewardbench2", count=4).stream(), 0))


def test_an_unknown_rule_or_benchmark_is_refused():
    with pytest.raises(ConfigError, match="always_first"):
        ControlJudge("best")
    with pytest.raises(ConfigError, match="did you mean 'rm_bench'"):
        Benchmark("rmbench")
    with pytest.raises(ConfigError, match="at least 1"):
        Benchmark(limit=0)
    with pytest.raises(DataError, match="no data set of its authors"):
        next(Benchmark("rmb").stream())


# ---------------------------------------------------------------- bad input


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = {"id": 1, "subset": "math-prm", "prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{k: v for k, v in GOOD.items() if k != "rejected"}], r"lacks 'rejected'.*row 1.*columns id, subset"),
        ([GOOD, GOOD], "id 1 twice in subset math-prm"),
        ([GOOD | {"subset": "math_prm"}], "Unknown subset .did you mean 'math-prm'"),
        ([GOOD | {"chosen": None}], "no text.*column 'chosen'"),
        ([], "has no rows"),
    ],
)
def test_bad_rows_of_rewardbench(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        list(Benchmark("rewardbench", jsonl(tmp_path / "a.jsonl", *rows), official=False).stream())


def test_an_id_may_occur_in_two_subsets(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", GOOD, GOOD | {"subset": "hep-python"})
    assert len(list(Benchmark("rewardbench", path, official=False).stream())) == 2


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "rm_bench",
            {"id": 1, "prompt": "q", "chosen": ["a"] * 3, "rejected": ["b"] * 2, "domain": "chat"},
            "number of resp",
        ),
        (
            "rm_bench",
            {"id": 1, "prompt": "q", "chosen": "abc", "rejected": ["b"] * 3, "domain": "chat"},
            "no list of texts",
        ),
        (
            "rewardbench2",
            {"id": "1", "prompt": "q", "chosen": ["a"], "rejected": ["b"], "subset": "Math"},
            "number of resp",
        ),
        ("rewardbench2", {"id": "1", "prompt": "q", "chosen": ["a"], "rejected": ["b"], "subset": "Ties"}, "ref:<k>"),
        ("rmb", {"category_path": "BoN_set/Helpfulness/x", "conversation_input": []}, "lacks 'bon_uid'"),
        ("rmb", {"category_path": "Set/Helpfulness", "conversation_input": []}, "Unknown subset"),
        ("llmbar", {"id": 1, "subset": "Natural", "input": "q", "output_1": "a", "output_2": "b"}, "lacks 'label'"),
        ("pairs", {"id": 1, "prompt": "q", "chosen": "a"}, "lacks 'rejected'"),
    ],
)
def test_bad_rows_of_the_other_formats(tmp_path, name, row, message):
    with pytest.raises(DataError, match=message):
        list(Benchmark(name, jsonl(tmp_path / "a.jsonl", row), official=False).stream())


@pytest.mark.parametrize(
    ("file", "content"), [("a.parquet", b"junk"), ("a.jsonl.gz", b"junk"), ("a.json", b"{}"), ("a.txt", b"x")]
)
def test_a_junk_file_is_one_paragraph(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=file):
        list(Benchmark("pairs", str(tmp_path / file)).stream())
    with pytest.raises(DataError, match="No such data file"):
        list(Benchmark("pairs", str(tmp_path / "none")).stream())


def test_tie_labels_are_counted_and_never_asked_about(tmp_path):
    rows = [
        {"id": k, "instruction": "q", "response_a": "a", "response_b": "b", "winner": w}
        for k, w in enumerate(("A", "tie", "B", "?"))
    ]
    benchmark = Benchmark("pairs", jsonl(tmp_path / "a.jsonl", *rows))
    items = list(benchmark.stream())
    assert benchmark.left_out == {"tie label": 1, "unreadable label": 1}
    assert len(list(questions(items, 0))) == 4 and [item.grades for item in items[::2]] == [(1, 0), (0, 1)]
    with pytest.raises(DataError, match=r"No item says which response is better.*1 tie label"):
        list(Benchmark("pairs", jsonl(tmp_path / "b.jsonl", rows[1])).stream())


def test_the_authors_own_json_files_are_read(tmp_path):
    """RM-Bench and LLMBar come as JSON lists; LLMBar's rows have neither id nor subset."""
    row = {"input": "q", "output_1": "a", "output_2": "b", "label": 2}
    for folder, prompt in (("Natural", "p"), ("Adversarial/Neighbor", "q")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "dataset.json").write_text(json.dumps([row | {"input": prompt}]))
    items = list(Benchmark("llmbar", str(tmp_path), official=False).stream())
    assert [item.key[1:] for item in items] == [("Adversarial_Neighbor", "0"), ("Natural", "0")]
    assert items[0].grades == (0, 1) and items[0].prompt == "q"


@pytest.mark.parametrize(
    ("name", "split"), [("rewardbench", "filtered"), ("rewardbench2", "test"), ("rm_bench", "train")]
)
def test_without_a_path_the_authors_hub_set_is_read(monkeypatch, name, split):
    asked = []

    def read_hub(source, found_split, subset, key):
        asked.append((source, found_split))
        return list(ConstraintBenchmark(name, count=12).records())

    monkeypatch.setattr("experiments.tasks.judge_benchmarks.read_hub", read_hub)
    assert len(list(Benchmark(name, official=False).stream())) == 12
    assert set(asked) == {(FORMATS[name].hub, split)}


def test_a_sample_is_the_same_whatever_the_order_of_the_file(tmp_path):
    rows = [GOOD | {"id": k} for k in range(50)]
    there = {i.id for i in Benchmark("rewardbench", jsonl(tmp_path / "a.jsonl", *rows), limit=10).stream()}
    again = {i.id for i in Benchmark("rewardbench", jsonl(tmp_path / "b.jsonl", *rows[::-1]), limit=10).stream()}
    assert there == again and len(there) == 10
    other = {i.id for i in Benchmark("rewardbench", str(tmp_path / "a.jsonl"), limit=10, seed=1).stream()}
    assert other != there


# ---------------------------------------------------------------- size


@pytest.mark.slow
def test_ten_thousand_pairs_in_flat_memory(tmp_path):
    """40 MB of answers pass through; what is held does not grow with them."""

    def write(count):
        with gzip.open(tmp_path / f"{count}.jsonl.gz", "wt", compresslevel=1) as file:
            for k in range(count):
                row = {"id": k, "prompt": f"q{k}", "chosen": f"{k} " * 400, "rejected": f"{k}" * 300}
                file.write(json.dumps(row) + "\n")
        return Benchmark("pairs", str(tmp_path / f"{count}.jsonl.gz"))

    peaks = {}
    for count in (2500, 10_000):
        benchmark = write(count)
        tracemalloc.start()
        file = verdict_file(tmp_path / f"{count}.parquet", benchmark, "longer")
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    print(f"peak {peaks[2500] / 2**20:.1f} MB for 2,500 pairs, {peaks[10_000] / 2**20:.1f} MB for 10,000")
    # What grows is the set of keys by which a row that occurs twice is found.
    assert peaks[10_000] < peaks[2500] + 6 * 2**20 < 30 * 2**20 and read_verdicts(file).num_rows == 20_000
    found = score(arrays(read_verdicts(file)))
    assert found["Overall"]["both"].items == 10_000


@pytest.mark.slow
def test_a_hundred_thousand_verdicts_in_under_a_second(tmp_path):
    rng = np.random.default_rng(0)
    names = list(V1_ROWS)
    rows = [
        {"benchmark": "rewardbench", "subset": names[k % len(names)], "id": str(k), "cluster": str(k // 2),
         "order": order, "slots": slots, "grades": [1 - slots[0], slots[0]], "lengths": [k % 90, 50],
         "choice": int(choice), "scores": None, "text": ""}
        for k, (one, two) in enumerate(rng.choice([0, 1, UNPARSABLE], p=[0.6, 0.35, 0.05], size=(50_000, 2)))
        for order, slots, choice in (("seeded", [0, 1], one), ("swapped", [1, 0], two))
    ]  # fmt: skip
    write_verdicts(tmp_path / "v.parquet", rows)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        found = score(arrays(read_verdicts(tmp_path / "v.parquet")))
        took.append(time.perf_counter() - start)
    print(f"100,000 verdicts read and scored in {min(took):.2f} s")
    assert min(took) < 1 and found["Overall"]["both"].mean == pytest.approx(0.5, abs=0.02)
