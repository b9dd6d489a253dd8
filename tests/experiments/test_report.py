from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from experiments import browser, plots, table
from experiments.readings import Difference, Reading, arm_interval, common_span, difference
from experiments.records import RunWriter, load_run
from experiments.report import Goal, browse, build, find, read_study, shortened
from experiments.stats import Interval
from methods.errors import ConfigError, RecordError

TIERS = ("easy", "hard")
PLAN = """
title: Does it help?
note: Synthetic records.
command: train
arms: {grpo: ["method=[]"], good: ["method=[good]"], flipped: ["method=[good]", "method.good.sign=-1"]}
baseline: grpo
seeds: [0, 1, 2, 3, 4, 5, 6, 7]
primary: {metric: auc/score/hard, direction: higher, arm: good}
secondary: [{metric: eval/score, direction: higher}, {metric: eval/length, direction: lower}]
controls: {flipped: lower}
"""


def make_run(
    root, arm, seed, *, experiment="exp", gain=0.0, items=6, samples=2, points=(0, 10, 20), evals=True, **more
):
    """A finished run with known numbers: scores rise linearly by 0.3 + gain; seeds and items add fixed offsets."""
    rng = np.random.default_rng(1000 + seed)  # the same for every arm: seeds and items are paired
    level, noise = 0.2 + rng.normal(0, 0.03), rng.normal(0, 0.02, size=items)
    own = np.random.default_rng([seed, sum(map(ord, arm))]).normal(0, 0.01)
    meta = {"command": "train", "experiment": experiment, "arm": arm, "seed": seed, "pair": f"seed{seed}"}
    config = more.get("config", {"method": {} if arm == "grpo" else {arm: {"k": 1}}, "trainer": {"lr": 0.001}})
    writer = RunWriter.open(root / "raw" / experiment / arm / f"seed{seed}", meta, config)
    for step in points if evals else ():
        rows = [
            {
                "item_id": f"{tier}{i}",
                "tier": tier,
                "sample": k,
                "score": float(level + (0.3 + gain) * step / 20 - 0.1 * (tier == "hard") + noise[i] + own * (step > 0)),
                "length": 20.0 + step,
                "depth": 2.0,
            }
            for tier in TIERS
            for i in range(items)
            for k in range(samples)
        ]
        writer.eval(rows, step)
    for step in range(1, 21):
        tokens = step * more.get("tokens", 1000)
        values = {"reward": 0.01 * step + gain, "loss": 1 / step, "groups/dead": 0.25, "cost/generated_tokens": tokens}
        writer.log(step, values | {"time/total": 2.0 * step})
        row = {
            "step": step,
            "row_id": f"r{step}",
            "group_id": 0,
            "tier": "easy",
            "prompt": "1+1=",
            "completion": "2 ok",
        }
        writer.sample(row | {"tokens": ["2", "!"], "advantages": [0.5, -0.25], "rewards": {"right": 1.0}})
    if more.get("finish", True):
        writer.finish({"bias": 0.1 * seed}, {"generated_tokens": 20_000})
    return writer.path


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    conf = root / "conf" / "experiment"
    conf.mkdir(parents=True)
    (conf / "exp.yaml").write_text(PLAN)
    for seed in range(8):
        make_run(root, "grpo", seed)
        make_run(root, "good", seed, gain=0.2, tokens=2000)
        make_run(root, "flipped", seed, gain=-0.1)
    make_run(root, "good", 8, finish=False)
    return root


@pytest.fixture(scope="module")
def built(results):
    path = build("exp", results, conf_dirs=[results / "conf"], out=results / "first", power=True)
    return path.read_text()


def study_of(results, **options):
    return read_study("exp", results, conf_dirs=[results / "conf"], **options)


# ---------------------------------------------------------------- named values


def test_metrics_have_the_values_that_the_scores_imply(tmp_path):
    reading = Reading(load_run(make_run(tmp_path, "grpo", 0, points=(0, 10, 20))))
    last = reading.evals[reading.evals["step"] == 20]
    assert reading.value("eval/score") == pytest.approx(last["score"].mean())
    hard = reading.evals[reading.evals["tier"] == "hard"].groupby("step")["score"].mean()
    assert reading.value("auc/score/hard") == pytest.approx((hard[0] / 2 + hard[10] + hard[20] / 2) / 2)
    assert reading.value("eval/length") == 40 and reading.value("eval/depth") == 2
    assert reading.value("train/loss") == pytest.approx(1 / 20)
    assert reading.value("mean/loss") == pytest.approx(sum(1 / n for n in range(1, 21)) / 20)
    assert reading.value("bias") == 0.0
    assert math.isnan(reading.value("eval/nothing")) and math.isnan(reading.value("train/nothing"))


def test_an_evaluation_on_the_way_has_a_name(tmp_path):
    arm, other = (Reading(load_run(make_run(tmp_path, a, 0, gain=g))) for a, g in (("good", 0.2), ("grpo", 0.0)))
    middle = arm.evals[arm.evals["step"] == 10]
    assert arm.value("eval@10/score") == pytest.approx(middle["score"].mean())
    assert arm.value("eval@10/score/hard") == pytest.approx(middle[middle["tier"] == "hard"]["score"].mean())
    assert arm.value("eval@20/score") == arm.value("eval/score") and arm.value("eval@10/length") == 30
    gap = middle["score"].mean() - other.evals[other.evals["step"] == 10]["score"].mean()
    assert difference([arm], [other], "eval@10/score").interval.mean == pytest.approx(gap)
    for name in ("eval@15/score", "eval@x/score", "auc@10/score", "eval@10/pass@1", "eval@10/nothing"):
        assert math.isnan(arm.value(name)), name


def test_tiers_are_listed_easy_first(tmp_path):
    for name, config, expected in (
        ("plain", {}, ["easy", "medium", "hard", "t2", "t10"]),
        ("task", {"task": {"tiers": ["t10", "t2", "hard"]}}, ["t10", "t2", "hard", "easy", "medium"]),
    ):
        writer = RunWriter.open(tmp_path / f"raw/e/{name}/seed0", {"arm": name, "seed": 0}, config)
        tiers = ("t10", "hard", "easy", "t2", "medium")
        writer.eval([{"item_id": tier, "tier": tier, "score": 1.0} for tier in tiers], 0)
        assert Reading(load_run(writer.path)).tiers == expected


def test_pass_at_k_is_the_mean_over_items_of_the_unbiased_estimate(tmp_path):
    writer = RunWriter.open(tmp_path / "raw/e/a/seed0", {"arm": "a", "seed": 0}, {})
    right = {"x": [1, 0, 0], "y": [1, 1, 0], "z": [0.5, 0, 0]}
    rows = [{"item_id": i, "sample": k, "score": s} for i, scores in right.items() for k, s in enumerate(scores)]
    writer.eval(rows, 0)
    reading = Reading(load_run(writer.path))
    assert reading.value("eval/pass@1") == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert reading.value("eval/pass@2") == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert math.isnan(reading.value("eval/pass@4"))


def test_a_single_seed_gets_an_interval_over_items(tmp_path):
    readings = [Reading(load_run(make_run(tmp_path, "grpo", 0)))]
    interval = arm_interval(readings, "eval/score")
    assert interval.basis == "items" and interval.low < interval.mean < interval.high


def test_a_difference_pairs_by_seed_and_item(tmp_path):
    arm = [Reading(load_run(make_run(tmp_path, "good", s, gain=0.2))) for s in (2, 1, 0)]
    base = [Reading(load_run(make_run(tmp_path, "grpo", s))) for s in (0, 1, 3)]
    found = difference(arm, base, "eval/score")
    assert found.seeds == 2 and found.interval.items == 12
    expected = [arm[2].value("eval/score") - base[0].value("eval/score")]
    expected += [arm[1].value("eval/score") - base[1].value("eval/score")]
    assert found.per_seed == pytest.approx(expected)
    assert found.interval.mean == pytest.approx(np.mean(expected))
    # what seeds and items share cancels: the interval is far narrower than the spread between items
    assert found.interval.half < 0.1


def test_items_that_differ_between_arms_are_compared_by_seed_only(tmp_path):
    for arm, prefix in (("a", "x"), ("b", "y")):
        for seed in (0, 1):
            writer = RunWriter.open(tmp_path / f"raw/e/{arm}/seed{seed}", {"arm": arm, "seed": seed}, {})
            writer.eval([{"item_id": f"{prefix}{i}", "score": i + seed + (arm == "b")} for i in range(3)], 0)
    a, b = ([Reading(load_run(tmp_path / f"raw/e/{arm}/seed{s}")) for s in (0, 1)] for arm in "ab")
    found = difference(b, a, "eval/score")
    assert found.interval.basis == "seeds" and found.interval.mean == pytest.approx(1)


def recorded(tmp_path, arm, seeds=(0, 1), items=range(3), task="t", commit="a" * 40):
    for seed in seeds:
        config = {"task": {"name": task}, "method": {} if arm == "a" else {arm: 1}}
        meta = {"arm": arm, "seed": seed, "experiment": "e"}
        writer = RunWriter.open(tmp_path / f"raw/e/{arm}/seed{seed}", meta, config)
        writer.eval([{"item_id": f"x{i}", "score": i + seed} for i in items], 0)
        (writer.path / "env.json").write_text(json.dumps({"commit": commit, "dirty": False}))
        writer.finish({})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, ""),
        ({"seeds": (1, 2)}, "Not the same seeds.*`b` and `a` share 1 of 2 and 2"),
        ({"items": range(1, 4)}, "Not the same items.*`b` and `a` share 2 of 3 and 3"),
        ({"items": range(5, 8)}, "Not the same items.*share none; .*different questions"),
        ({"items": range(5, 8), "task": "u"}, "Not the same items.*share none, and their tasks differ.*not compared"),
        ({"commit": "b" * 40}, "Not the same code.*`a` on aaaaaaaaaa; `b` on bbbbbbbbbb"),
    ],
)
def test_arms_that_are_not_alike_are_named_before_any_number(tmp_path, other, said):
    recorded(tmp_path, "a")
    recorded(tmp_path, "b", **other)
    text = build("e", tmp_path).read_text()
    care = text.partition("## Read with care")[2].partition("## Means")[0]
    assert re.search(said, care) if said else not care
    row = next(line for line in text.splitlines() if line.startswith("| eval/score | b"))
    assert (row.split("|")[3].strip() == "-") == ("not compared" in said), "two tasks have no difference"
    assert "not compared" not in said or "(one seed)" not in text


def test_a_second_stage_counts_what_the_first_has_spent(tmp_path):
    path = make_run(tmp_path, "second", 0)
    record = json.loads((path / "run.json").read_text())
    before = {"step": 30, "cost/generated_tokens": 500, "time/total": 7.0}
    (path / "run.json").write_text(json.dumps(record | {"before": before}))
    reading, alone = Reading(load_run(path)), Reading(load_run(make_run(tmp_path, "alone", 0)))
    spec = alone.spec("eval/score")
    assert reading.curve(spec)[0].tolist() == [30, 40, 50] and reading.steps == 50
    assert reading.cost("tokens", np.array([30.0, 40, 50])).tolist() == [500, 10_500, 20_500]
    assert reading.value("train/time/total") == 47 and reading.value("train/reward") == alone.value("train/reward")
    assert reading.value("auc/score") == pytest.approx(alone.value("auc/score"), abs=0.02)


def test_equal_tokens_compares_at_the_smallest_common_budget(tmp_path):
    arm = [Reading(load_run(make_run(tmp_path, "good", 0, gain=0.2, tokens=2000)))]
    base = [Reading(load_run(make_run(tmp_path, "grpo", 0, tokens=1000)))]
    spec = arm[0].spec("eval/score")
    assert common_span(arm, base, spec, "steps") == (0, 20)
    span = common_span(arm, base, spec, "tokens")
    assert span == (0, 20_000)  # the arm reaches it at step 10, half-way
    scores = arm[0].evals.groupby("step")["score"].mean()
    assert arm[0].at_budget(spec, "tokens", span).mean() == pytest.approx(scores[10])
    assert arm[0].at_budget(spec, "tokens", (0, 30_000)).mean() == pytest.approx((scores[10] + scores[20]) / 2)


# ---------------------------------------------------------------- the study and its table


def test_the_plan_decides_what_is_compared(results):
    study = study_of(results)
    assert list(study.arms) == ["grpo", "good", "flipped"] and study.baseline == "grpo"
    assert study.registered and study.pairs == 8
    primary = study.find("auc/score/hard", "good")
    assert math.isnan(primary.adjusted) and primary.p == pytest.approx(2 / 256)
    rest = [d for d in study.differences if d is not primary]
    assert all(d.adjusted >= d.p for d in rest) and len(rest) == 5
    # five differences and one control make the family: the smallest p is multiplied by 6
    assert min(d.adjusted for d in rest) == pytest.approx(6 * 2 / 256)
    assert study.controls["flipped"][1].interval.mean < 0


def test_the_table_says_what_was_found(built):
    assert built.startswith("# Does it help?\n\n> Synthetic records.")
    assert "in favour of `good`" in built and "demonstration" not in built
    assert re.search(r"\| flipped +\| lower +\| -0\.\d+ \[.*\| yes", built)
    assert "good/seed8 (running)" in built
    assert re.search(r"\| good +\| tokens +\| 20,000 ", built)
    assert re.search(r"\| grpo .*0\.250 \[0\.250, 0\.250\]", built)  # dead groups
    assert "8 paired seeds see a difference of" in built and "MDE 80 %" in built
    assert "method.good.sign=-1" in built


def test_every_mean_and_difference_has_an_interval(built):
    assert "(one seed)" not in built and "nan" not in built
    means = built.split("## Means")[1].split("##")[0]
    for line in means.splitlines():
        if line.startswith("| g"):
            assert all("[" in entry for entry in line.strip("| ").split(" | ")[2:])


def test_no_effect_does_not_separate(tmp_path):
    conf = tmp_path / "conf/experiment"
    conf.mkdir(parents=True)
    (conf / "exp.yaml").write_text(PLAN)
    for seed in range(8):
        for arm in ("grpo", "good", "flipped"):
            make_run(tmp_path, arm, seed, points=(0, 20), samples=1)
    study = read_study("exp", tmp_path, conf_dirs=[tmp_path / "conf"])
    text = table.markdown(study)
    assert "**It does not separate.**" in text
    assert re.search(r"\| flipped +\| lower .*(not separated)", text)


def test_a_worse_arm_is_not_praised(results):
    study = study_of(results)
    d = study.find("eval/score", "flipped")
    assert table.verdict(d, study.goals[1]) == "**It separates, against `flipped`.**"
    longer = study.goals[2]
    assert longer.direction == "lower"
    assert "in favour" in table.verdict(d, longer)  # the same sign, where lower is better


@pytest.mark.parametrize(
    ("expected", "low", "high", "p", "words"),
    [
        ("lower", -0.3, -0.1, 0.01, "yes"),
        ("higher", -0.3, -0.1, 0.01, "no: the opposite"),
        ("higher", 0.1, 0.3, 0.01, "yes"),
        ("lower", -0.3, 0.1, 0.2, "sign as expected, not separated"),
        ("lower", -0.3, -0.1, 0.06, "sign as expected, not separated"),
        ("higher", -0.3, 0.1, 0.2, "no: not separated, other sign"),
        ("equal", -0.3, 0.1, 0.2, "no difference seen (this rules out more than 0.300)"),
        ("equal", 0.1, 0.3, 0.01, "no: it differs"),
    ],
)
def test_a_control_holds_only_if_it_separates_as_expected(expected, low, high, p, words):
    gap = Interval((low + high) / 2, low, high, 8, 1, "seeds")
    assert table.held(expected, Difference("control", "arm", "m", gap, (0.0,) * 8, p)) == words
    few = table.held(expected, Difference("control", "arm", "m", gap, (0.0,) * 3, p))
    assert expected == "equal" or few.endswith("a demonstration, not a test")


@pytest.mark.parametrize(
    ("low", "p", "start"),
    [(0.1, 0.01, "**It separates, in favour"), (0.1, 0.06, "**It does not s"), (-0.1, 0.01, "**It does not clearly")],
)
def test_a_verdict_needs_both_the_test_and_the_interval(low, p, start):
    found = Difference("a", "b", "m", Interval(0.2, low, 0.3, 8, 1, "seeds"), (0.2,) * 8, p)
    assert table.verdict(found, Goal("m", "higher", "a")).startswith(start)


def test_few_seeds_are_a_demonstration(tmp_path):
    for seed in range(3):
        make_run(tmp_path, "grpo", seed)
        make_run(tmp_path, "good", seed, gain=0.3)
    text = table.markdown(read_study("exp", tmp_path, conf_dirs=[]))
    assert "A demonstration, not a test** (3 paired seeds" in text and "p = 0.250" in text
    assert "separates" not in text


def test_one_seed_says_that_its_interval_is_over_items(tmp_path):
    make_run(tmp_path, "grpo", 0)
    make_run(tmp_path, "good", 0, gain=0.3)
    text = table.markdown(read_study("exp", tmp_path, conf_dirs=[]))
    assert "over its items only" in text and "With one seed only items are resampled" in text
    assert "(one seed)" not in text.split("## Cost")[0] and "(one seed)" in text


def test_a_sweep_without_a_plan_makes_one_table(tmp_path, monkeypatch):
    for method in ("none", "ha_dw"):
        for i, objective in enumerate(("grpo", "gspo", "sapo")):
            for seed in (0, 1):
                methods = {} if method == "none" else {method: {"k": 1}}
                config = {"method": methods, "objective": {"name": objective}, "seed": seed, "trainer": {"lr": 0.001}}
                make_run(tmp_path, f"{method}-{objective}", seed, gain=0.05 * i, config=config)
    monkeypatch.setattr(plots, "draw", lambda *_: {})
    path = build(None, tmp_path, conf_dirs=[])
    text = path.read_text()
    assert path == tmp_path / "exp/table.md"
    assert "`methods=[ha_dw]`" in text and "`objective.name=gspo`" in text and "seed=" not in text
    assert "Paired differences to `none-grpo`" in text
    assert "none was fixed before these runs" in text
    rows = list(csv.DictReader((path.parent / "runs.csv").open()))
    assert len(rows) == 12 and {"experiment", "arm", "seed", "eval/score", "cost/generated_tokens"} <= set(rows[0])


def test_arms_of_a_sweep_are_named_by_what_differs(tmp_path):
    """A long line makes long folder names; the table shows what tells them apart, and says the rest once."""
    for method, tail in (("none", "trainer.prompts_per_step=2"), ("ha_dw", "trainer.prompts_p~0123456789ab")):
        make_run(tmp_path, f"eval.items=4,method={method},trainer.max_steps=9,{tail}", 0)
    study = read_study("exp", tmp_path, [tmp_path], baseline="method=none,trainer.prompts_per_step=2")
    assert list(study.arms) == ["method=ha_dw", "method=none,trainer.prompts_per_step=2"]
    assert "In every arm: `eval.items=4` `trainer.max_steps=9`." in table.markdown(study)
    by_folder = "eval.items=4,method=ha_dw,trainer.max_steps=9,trainer.prompts_p~0123456789ab"
    assert read_study("exp", tmp_path, [tmp_path], baseline=by_folder).baseline == "method=ha_dw"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a=1,b=2"], {}),
        (["x", "y"], {"x": "x", "y": "y"}),
        (["e/a=1,b=2", "f/a=1,b=2"], {"e/a=1,b=2": "e", "f/a=1,b=2": "f"}),
        (["a=1,b~0", "a=1,b~1"], {"a=1,b~0": "b~0", "a=1,b~1": "b~1"}),
        (["a=1", "a=1,b=2"], {}),
    ],
)
def test_short_names_stay_apart_and_are_never_empty(names, short):
    assert shortened(names)[0] == short


def test_more_arms_than_one_panel_can_hold(tmp_path):
    for k in range(9):
        make_run(tmp_path, f"arm{k}", 0, gain=k / 50, items=3, config={"method": {"m": {"k": k}}})
    path = build("exp", tmp_path, conf_dirs=[], baseline="arm3")
    assert (path.parent / "figures/learning_curves.png").stat().st_size > 10_000
    assert "`method.m.k=4`" in path.read_text()


def test_runs_without_evaluations_are_compared_by_their_training_metrics(tmp_path):
    for seed in range(2):
        make_run(tmp_path, "grpo", seed, evals=False)
        make_run(tmp_path, "good", seed, evals=False, gain=0.1)
    path = build("exp", tmp_path, conf_dirs=[])
    text = path.read_text()
    assert "train/reward" in text and "bias" in text
    assert (path.parent / "figures/learning_curves.svg").exists()


def test_runs_csv_holds_every_run_with_its_metrics_and_costs(results, built):
    rows = list(csv.DictReader((results / "first/runs.csv").open()))
    assert len(rows) == 24
    good = next(row for row in rows if row["arm"] == "good" and row["seed"] == "3")
    reading = Reading(load_run(results / "raw/exp/good/seed3"))
    assert float(good["auc/score/hard"]) == pytest.approx(reading.value("auc/score/hard"))
    assert float(good["cost/generated_tokens"]) == 40_000 and float(good["time/total"]) == 40


def test_two_builds_give_the_same_bytes(results, built):
    build("exp", results, conf_dirs=[results / "conf"], out=results / "second", power=True)
    files = sorted(p.relative_to(results / "first") for p in (results / "first").rglob("*") if p.is_file())
    assert {p.name for p in files} >= {"table.md", "runs.csv", "samples.html", "differences.svg", "learning_curves.png"}
    for name in files:
        assert (results / "first" / name).read_bytes() == (results / "second" / name).read_bytes(), name


def test_run_folders_can_be_named_one_by_one(results, tmp_path):
    other = tmp_path / "elsewhere"
    make_run(other, "grpo", 0, experiment="other", gain=0.1)
    paths = [str(results / "raw/exp/grpo/seed0"), str(other / "raw/other/grpo")]
    study = read_study(paths, results, conf_dirs=[])
    assert study.name == "selected" and list(study.arms) == ["exp/grpo", "other/grpo"]
    runs, name = find([str(results / "raw/exp")], results)
    assert name == "exp" and len(runs) == 25


# ---------------------------------------------------------------- what a user can get wrong


def test_an_experiment_in_another_results_folder_keeps_its_comparison(results, tmp_path, monkeypatch):
    """A copied results folder, reported by its path from somewhere else: not a nameless selection of runs."""
    shutil.copytree(results / "raw", tmp_path / "copy" / "raw")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = build([str(tmp_path / "copy/raw/exp")], "results", [results / "conf"])
    assert path == tmp_path / "copy/exp/table.md" and "# Does it help?" in path.read_text()
    assert not list((tmp_path / "here").iterdir())


def test_unknown_names_are_answered_with_the_nearest(results):
    with pytest.raises(ConfigError, match="did you mean 'exp'"):
        build("expp", results)
    with pytest.raises(ConfigError, match="did you mean 'good'"):
        study_of(results, baseline="goood")
    with pytest.raises(ConfigError, match="did you mean 'eval/score'"):
        study_of(results, metrics=["eval/scores"])
    with pytest.raises(ConfigError, match="no runs to report"):
        build(None, results / "nowhere")


def test_nothing_finished_is_an_error_that_names_the_runs(tmp_path):
    make_run(tmp_path, "grpo", 0, finish=False)
    with pytest.raises(ConfigError, match=r"grpo/seed0 \(running\)"):
        build("exp", tmp_path)


def test_a_record_of_another_version_stops_the_report(tmp_path):
    path = make_run(tmp_path, "grpo", 0)
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(run | {"schema": 99}))
    with pytest.raises(RecordError, match=r"Got: schema 99\. Expected: schema 1"):
        build("exp", tmp_path)


def test_a_failed_build_leaves_no_new_folder(results, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build("exp", results, conf_dirs=[results / "conf"], out=tmp_path / "new/folder")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- figures


def test_labels_are_pushed_apart_but_stay_in_order():
    spread = plots._spread([0.1, 0.11, 0.5], 0.1)
    assert all(b - a >= 0.1 - 1e-12 for a, b in itertools.pairwise(spread))
    assert plots._spread([0.1, 0.5], 0.1) == [0.1, 0.5]


def test_colours_are_distinct_and_the_baseline_is_grey(results):
    hues = plots.colours(study_of(results))
    assert hues["grpo"] == plots.BASELINE and hues["good"] == plots.COLOURS[0] and len(set(hues.values())) == 3


def test_arms_along_an_axis_are_one_curve_per_tier(results):
    study = study_of(results)
    assert plots._along_axis(study) is None
    study.plan["axis"] = {
        "name": "gain",
        "groups": {"all": {"flipped": -0.1, "grpo": 0.0, "good": 0.2}, "one": {"x": 0}},
    }
    (panel,) = plots._along_axis(study).axes
    lines = [line for line in panel.lines if len(line.get_xdata()) == 3]
    assert panel.get_xlabel() == "gain" and len(lines) == len(TIERS)
    for tier, line in zip(TIERS, lines, strict=True):
        means = [
            np.mean([r.value(f"eval/score/{tier}") for r in study.arms[arm]]) for arm in ("flipped", "grpo", "good")
        ]
        assert list(line.get_xdata()) == [-0.1, 0.0, 0.2] and list(line.get_ydata()) == pytest.approx(means)


def test_logged_values_are_drawn_for_the_arms_named(results):
    study = study_of(results)
    assert plots._logged_values(study) is None
    panels = {"A reward": "reward", "nothing": "unknown"}
    study.plan["logged"] = {"name": "height", "panels": panels, "arms": ["good", "flipped", "gone"]}
    (panel,) = plots._logged_values(study).axes
    assert panel.get_title(loc="left") == "A reward" and panel.get_ylabel() == "height" and len(panel.lines) == 2
    series = [r.metrics.set_index("step")["reward"] for r in study.arms["good"]]
    assert list(panel.lines[0].get_ydata()) == pytest.approx(list(sum(series) / len(series)))
    assert set(table.CAPTIONS) >= {"Logged values"}


# ---------------------------------------------------------------- the sample browser

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>%SCRIPT% & \u2028 \ud800"


def evil_run(root, evil=EVIL) -> Path:
    writer = RunWriter.open(root / "raw/e/a/seed0", {"experiment": "e", "arm": evil, "seed": 0}, {})
    for tokens in ([evil, "!"], []):
        row = {"step": 1, "row_id": evil, "tier": evil, "prompt": evil, "completion": evil, "tokens": tokens}
        writer.sample(row | {"advantages": [1.0, -2.0] if tokens else [], "rewards": {evil: 1.0}, "finish": evil})
    return writer.path


def test_a_completion_cannot_become_markup(tmp_path):
    page = browse([str(evil_run(tmp_path))], tmp_path).read_text()
    assert "<img" not in page and page.count("</script>") == 2 and page.count("<script") == 2
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data[0]["samples"][0]["tokens"][0] == EVIL and data[0]["scale"] == 2.0


def test_the_page_needs_no_network_and_its_policy_matches_its_script(tmp_path):
    page = browse([str(evil_run(tmp_path))], tmp_path).read_text()
    shell = page.split('id="data">')[0]
    assert not re.search(r"https?://|src=|href=|@import|url\(", shell + page.split("</script>", 1)[1])
    script = page.rsplit("<script>", 1)[1].split("</script>")[0]
    assert f"script-src 'sha256-{browser._digest(script)}'" in shell
    style = page.split("<style>")[1].split("</style>")[0]
    assert f"style-src 'sha256-{browser._digest(style)}'" in shell


def test_the_page_keeps_to_its_size_and_covers_the_whole_run(tmp_path):
    for arm in ("a", "b"):
        writer = RunWriter.open(tmp_path / f"raw/e/{arm}/seed0", {"experiment": "e", "arm": arm, "seed": 0}, {})
        for step in range(100):
            writer.sample({"step": step, "prompt": "p", "completion": "word " * 400})
    runs, _ = find(["e"], tmp_path)
    page = browser.write(runs, tmp_path / "page.html", "e", limit=60_000).read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(page) < 60_000 + 15_000 and [run["name"] for run in data] == ["a / seed 0", "b / seed 0"]
    steps = [sample["step"] for sample in data[0]["samples"]]
    assert len(steps) >= 10 and steps[0] == 0 and steps[-1] > 85
    assert f"{2 * len(steps)} of 200 recorded samples" in page


@pytest.mark.slow
def test_in_a_real_browser_the_text_is_inert_and_shown(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    page = browse([str(evil_run(tmp_path, EVIL.replace("\ud800", "")))], tmp_path)  # --dump-dom cannot print it
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [chromium, *flags.split(), "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
    assert "owned" not in done.stdout.split("<title>")[1].split("</title>")[0]
    assert 'title="advantage +1"' in done.stdout and "1 of 2" in done.stdout
    assert re.search(r'<pre id="completion"><span[^>]*>&lt;/script&gt;&lt;img', done.stdout)


# ---------------------------------------------------------------- the command


def test_the_command_prints_the_table_and_then_its_path(results, capsys, monkeypatch):
    from cli.report import report

    monkeypatch.setattr(plots, "draw", lambda *_: {})
    report(["exp"], results_dir=str(results), metric=["eval/score"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# exp" and Path(lines[-1]) == results / "exp/table.md" and Path(lines[-1]).exists()
    report([str(results / "raw/exp/good/seed8")], results_dir=str(results), browse=True)
    assert capsys.readouterr().out.strip() == str(results / "raw/exp/good/seed8/samples.html")


def test_numbers_say_what_is_zero_and_what_is_small():
    assert [table.number(x, True) for x in (6.9e-18, -2e-17, 4.8e-4)] == ["+0.000", "+0.000", "+4.8e-04"]
    known = {math.nan: "-", math.inf: "inf", 0.1234: "0.123", 12.345: "12.35", 5120.4: "5,120"}
    assert [table.number(x) for x in known] == list(known.values())
