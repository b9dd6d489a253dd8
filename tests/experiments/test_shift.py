"""Shifts between checkpoints: which are compared, on what, the numbers of a pair of tiny models, and the files."""

from __future__ import annotations

import copy
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.records import RunWriter
from experiments.seeds import derive
from experiments.shift import measure, page, table
from experiments.shift.checkpoints import Checkpoint, find, paths, predecessors
from experiments.shift.compare import compare
from experiments.shift.report import build
from experiments.shift.texts import Text, choose
from experiments.tokenizers import tiny_tokenizer
from experiments.weights import export
from methods.errors import ConfigError, DataError

ROWS = {"train_rows": 64, "eval_rows": 12}
TASK = {"_target_": "experiments.tasks.arithmetic.Arithmetic", "name": "arithmetic", **ROWS}
MODEL = {"_target_": "experiments.models.Tiny", "warm_start": None, "init_std": 0.2}
ITEMS = 6


def moved(loaded, amount, seed):
    """A copy of the model with noise on all of its weights."""
    other = copy.copy(loaded)
    other.model = copy.deepcopy(loaded.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight += amount * torch.randn(weight.shape, generator=generator)
    return other


def add_run(root, name, model, tokenizer, *, init=None, steps=(), experiment="exp", seed=0):
    """A run folder as training leaves it, with an export and kept checkpoints."""
    path = root / "raw" / experiment / name / f"seed{seed}"
    config = {"experiment": experiment, "arm": name, "seed": seed, "task": TASK, "model": {**MODEL, "init": init}}
    config |= {"eval": {"split": "eval", "seed": 0}}
    RunWriter.open(path, {"experiment": experiment, "arm": name, "seed": seed}, config)
    for step in steps:
        export(model, tokenizer, path / "checkpoints" / f"step_{step}")
    export(model, tokenizer, path / "model")
    return path


@pytest.fixture(scope="module")
def results(random_model, tmp_path_factory):
    """A base folder, `sft` and `grpo` from it, `second` from `sft`, `kept` with two checkpoints."""
    root, tokenizer = tmp_path_factory.mktemp("results"), random_model.tokenizer
    base = export(random_model.model, tokenizer, root / "base")
    sft = add_run(root, "sft", moved(random_model, 0.05, 1).model, tokenizer, init=str(base))
    add_run(root, "grpo", moved(random_model, 0.02, 2).model, tokenizer, init=str(base))
    add_run(root, "second", moved(random_model, 0.06, 1).model, tokenizer, init=str(sft))
    add_run(root, "kept", moved(random_model, 0.03, 3).model, tokenizer, steps=(20, 100))
    return root


# ---------------------------------------------------------------- which checkpoints


def test_words_become_checkpoints_with_short_names(results):
    found = find([str(results / "base"), "exp/sft", str(results / "raw/exp/grpo/seed0")], 0, results)
    assert [one.name for one in found] == ["base", "sft", "grpo"]
    assert found[0].config == {} and found[1].run == results / "raw/exp/sft/seed0"
    kept = find(["start", str(results / "raw/exp/kept/seed0/checkpoints"), "exp/kept"], 0, results)
    assert [one.name for one in kept] == ["start", "kept step 20", "kept step 100", "kept"]


def test_names_grow_until_they_tell_apart(results, random_model):
    add_run(results, "grpo", random_model.model, random_model.tokenizer, experiment="other")
    add_run(results, "grpo", random_model.model, random_model.tokenizer, experiment="other", seed=1)
    other = str(results / "raw/other/grpo/seed1")
    assert [one.name for one in find(["exp/grpo", other], 0, results)] == ["exp", "other"]
    three = find(["exp/grpo", "other/grpo", other], 0, results)
    assert [one.name for one in three] == ["exp grpo seed0", "other grpo seed0", "other grpo seed1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exp/sft"], "put 'start' before a run"),
        ([], "at least two checkpoints"),
        (["exp/sft", "exp/grpoo"], "did you mean 'exp/grpo'"),
        (["start", "BASE"], "there is none"),
        (["exp/sft", "start"], "there is none"),
    ],
)
def test_words_that_name_no_pair(words, message, results):
    words = [str(results / "base") if word == "BASE" else word for word in words]
    with pytest.raises(ConfigError, match=message):
        find(words, 0, results)


def test_paths_follow_the_records(results):
    siblings = find([str(results / "base"), "exp/sft", "exp/grpo"], 0, results)
    assert paths(siblings) == [[0, 1], [0, 2]]
    stages = find(["start", "exp/sft", "exp/second", "exp/grpo"], 0, results)
    assert paths(stages) == [[0, 1, 2], [0, 3]]
    inside = find(["start", str(results / "raw/exp/kept/seed0/checkpoints"), "exp/kept"], 0, results)
    assert predecessors(inside) == [0, 0, 1, 2] and paths(inside) == [[0, 1, 2, 3]]


def test_without_records_the_order_given_is_the_path(results, tmp_path):
    plain = [Checkpoint(str(i), tmp_path / str(i), None, {}, tmp_path) for i in range(3)]
    assert paths(plain) == [[0, 1, 2]]
    elsewhere = find([str(results / "base"), "exp/sft", "exp/kept"], 0, results)  # kept began neither at base nor sft
    assert paths(elsewhere) == [[0, 1], [0, 2]]


# ---------------------------------------------------------------- texts


def demos(random_model, results):
    return choose("demos", random_model, find(["start", "exp/sft"], 0, results), {"task": TASK}, ITEMS, 0)


def test_demonstrations_are_of_prompts_that_no_run_has_seen(random_model, results, arithmetic):
    found = demos(random_model, results)
    seen = {row.prompt for row in arithmetic.rows("train", 0)}
    shown = [random_model.tokenizer.decode(row.prompt) for row in found.rows]
    assert len(set(shown)) == ITEMS and not seen & set(shown)
    fresh = {row.prompt: row.demo for row in arithmetic.rows("train", derive(0, "shift"))}
    everything = choose("demos", random_model, find(["start", "exp/sft"], 0, results), {"task": TASK}, 64, 0)
    assert len(everything.rows) == len(set(fresh) - seen) < len(fresh)
    for prompt, row in zip(shown, found.rows, strict=True):
        assert random_model.tokenizer.decode([row.ids[i] for i in row.positions]) == fresh[prompt] + "<eos>"


def test_samples_and_greedy_responses_are_the_base_s_own(random_model, results):
    found = find(["start", "exp/sft"], 0, results)
    config = {"task": TASK, "eval": {"split": "eval", "seed": 0}}
    greedy, again = (choose("greedy", random_model, found, config, ITEMS, 0) for _ in range(2))
    assert greedy.rows == again.rows and greedy.sampled and greedy.by == "greedy responses of start"
    (_, ids, logits), *_ = measure.logits(random_model.model, greedy.rows[:1])
    assert torch.equal(logits.argmax(-1), ids)
    assert choose("samples", random_model, found, config, ITEMS, 0).rows != greedy.rows
    assert (
        choose("samples", random_model, found, config, ITEMS, 1).rows
        != choose("samples", random_model, found, config, ITEMS, 0).rows
    )


def test_a_file_of_texts(random_model, results, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": "7+5=", "completion": "2"}\n{"prompt": "1+1=", "completion": "%s"}\n' % ("2" * 2000))
    found = choose(str(path), random_model, [], {}, ITEMS, 0)
    assert (len(found.rows), found.left_out, found.tokens) == (1, 1, 2)  # the other is longer than the context


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "1+1="}\n', "row 1"),
        ('{"prompt": "1+1=", "completion": ""}\n', "lacks its prompt or its completion"),
        ('{"prompt": "1+1=", "completion": "zz"}\n', "lacks a symbol"),
        ("", "no rows"),
        ("nonsense\n", ":1"),
    ],
)
def test_files_that_hold_no_texts(lines, message, random_model, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=message):
        choose(str(path), random_model, [], {}, ITEMS, 0)


def test_no_source_of_texts(random_model, tmp_path):
    with pytest.raises(ConfigError, match="add a task"):
        choose("auto", random_model, [], {}, ITEMS, 0)
    with pytest.raises(ConfigError, match="no file with texts"):
        choose(str(tmp_path / "none.jsonl"), random_model, [], {}, ITEMS, 0)


# ---------------------------------------------------------------- numbers


def plain_log_probs(model, row):
    """One row alone, without padding: (T, V) at its measured tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
    return torch.log_softmax(logits[[i - 1 for i in row.positions]].double(), -1)


@pytest.mark.parametrize("cells", [2**25, 1])
def test_every_token_against_a_plain_reference(random_model, results, monkeypatch, cells):
    monkeypatch.setattr(measure, "CELLS", cells)  # 1: every row in a batch of its own
    rows, new = demos(random_model, results).rows, moved(random_model, 0.05, 1)
    assert len({len(row.ids) for row in rows}) > 1
    calls = []
    found = measure.compare(random_model.model, new.model, rows, calls.append)
    at = 0
    for i, row in enumerate(rows):
        log_p, log_q = plain_log_probs(random_model.model, row), plain_log_probs(new.model, row)
        ids, T = torch.tensor([row.ids[k] for k in row.positions]), len(row.positions)
        p, q = (x.gather(1, ids[:, None])[:, 0].exp().numpy() for x in (log_p, log_q))
        expected = {"p_base": p, "p_new": q, "dp": q - p, "dlogp": np.log(q / p), "token_id": ids.numpy()}
        expected |= {"entropy": -(log_p.exp() * log_p).sum(-1).numpy(), "position": np.arange(T)}
        expected |= {"kl": (log_p.exp() * (log_p - log_q)).sum(-1).numpy(), "response": np.full(T, i)}
        for name, value in expected.items():
            assert found[name][at : at + T] == pytest.approx(value, abs=2e-5), name
        sums = measure.cross_entropy(new.model, rows, calls.append)
        assert sums[i] == pytest.approx(-np.log(q).sum(), abs=1e-4)
        at += T
    assert at == len(found["dp"]) and calls[: len(rows)] == [1] * len(rows)


def test_a_model_against_itself_has_moved_nothing(random_model, results):
    rows = demos(random_model, results).rows
    found = measure.compare(random_model.model, random_model.model, rows, lambda n: None)
    assert not found["dp"].any() and not found["kl"].any() and not found["dlogp"].any()


def test_different_vocabularies_are_refused(random_model):
    wider = SimpleNamespace(
        model=random_model.model, tokenizer=SimpleNamespace(get_vocab=lambda: {"<pad>": 0, "other": 1})
    )
    with pytest.raises(ConfigError, match="different vocabularies"):
        measure.same_vocabulary(random_model, wider, ("base", "new"))


def test_different_vocabularies_are_refused_before_anything_is_sampled(random_model, results, tmp_path, capsys):
    other = export(random_model.model, tiny_tokenizer(("a", "b")), tmp_path / "other")
    with pytest.raises(ConfigError, match="different vocabularies"):
        build(["exp/sft", str(other)], results, out=tmp_path)
    assert "responses" not in capsys.readouterr().err and not (tmp_path / "shift").exists()


def test_the_tax_of_two_stages_and_none_for_siblings(results):
    stages = find(["start", "exp/sft", "exp/second"], 0, results)
    found = compare(stages, stages[-1:], stages[1].config, "demos", ITEMS, 0)
    (numbers,) = found.dynamics.trajectories
    points = np.array([[x.mean for x in row] for row in found.dynamics.points])
    f, s = points[1] - points[0], points[2] - points[1]
    assert numbers["tax/1"].mean == pytest.approx(-(s @ f) / (f @ f)) and set(numbers) >= {"turning/1"}
    assert found.dynamics.distance[2].mean == pytest.approx(np.linalg.norm(points[2] - points[0]))
    assert found.dynamics.sets == ["samples of start", "demonstrations", "samples of second"]
    assert numbers["net"].low < numbers["net"].mean < numbers["net"].high
    siblings = find(["start", "exp/sft", "exp/grpo"], 0, results)
    both = compare(siblings, siblings[-1:], siblings[1].config, "demos", ITEMS, 0)
    assert all(set(n) == {"net", "path", "straightness"} for n in both.dynamics.trajectories)
    assert both.shift[0]["mean"].mean > both.shift[1]["mean"].mean > 0  # more noise moves more
    gap = both.difference[0]["mean"]
    assert gap.mean == pytest.approx(both.shift[1]["mean"].mean - both.shift[0]["mean"].mean) and gap.high < 0


# ---------------------------------------------------------------- files


def test_files_agree_and_two_builds_are_equal(results, tmp_path, capsys):
    words = ["start", "exp/sft", "exp/second"]
    path = build(words, results, items=ITEMS, out=tmp_path / "a")
    text = path.read_text()
    assert capsys.readouterr().out == text and path == tmp_path / "a" / "shift" / "table.md"
    assert "**Learning tax** of `start` → `sft` → `second`" in text
    tokens = pd.read_parquet(path.parent / "tokens.parquet")
    assert list(tokens.columns) == ["checkpoint", "id", *measure.COLUMNS, "token"]
    sft = tokens[tokens.checkpoint == "sft"]
    share = f"{(sft.dp.abs() > 0.1).mean():.3f}"
    assert re.search(rf"^\| sft +\| \S+ \[[^|]*\| {share} \[", text, re.M)
    for link in re.findall(r"\]\((figures/\w+\.png)\)", text):
        assert (path.parent / link).stat().st_size > 5000
    again = build(words, results, items=ITEMS, out=tmp_path / "b")
    for name in ("table.md", "tokens.parquet", "shift.html", "figures/dynamics.svg", "figures/heat.svg"):
        assert (path.parent / name).read_bytes() == (again.parent / name).read_bytes(), name


def test_the_page_holds_every_token_and_no_markup_of_a_text(results, tmp_path):
    found = find(["start", "exp/sft"], 0, results)
    result = compare(found, found[-1:], found[1].config, "demos", 2, 0)
    result.prompts[0] = "</script><img src=x onerror=alert(1)>"
    text = page.write(result, tmp_path / "shift.html").read_text()
    assert "<img" not in text and text.count("</script>") == 2
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["names"] == ["sft"] and data["texts"][0]["prompt"] == result.prompts[0]
    assert [e["tokens"] for e in data["texts"]] == result.pieces
    assert [x for e in data["texts"] for x in e["dp"][0]] == pytest.approx(result.tokens[0]["dp"], abs=1e-4)


def test_one_response_has_no_interval(results, tmp_path):
    found = find(["start", "exp/sft"], 0, results)
    text = table.markdown(compare(found, found[-1:], found[1].config, "demos", 1, 0), {})
    rows = [line for line in text.splitlines() if line.startswith("| sft ")]
    assert len(rows) == 2 and "[" not in rows[1]  # the first names its weights
    with pytest.raises(ConfigError, match="at least one response"):
        build(["start", "exp/sft"], results, items=0, out=tmp_path)


def test_a_text_has_a_prompt_before_its_first_measured_token():
    text = Text("a", [5, 6, 7, 8], [-100, -100, 7, 8])
    assert (text.positions, text.prompt) == ([2, 3], [5, 6])
    assert Text("b", [5, 6], [5, 6]).positions == [1]  # nothing predicts the first token


def test_a_run_that_keeps_several_checkpoints_keeps_them_at_its_end(random_model, tmp_path, monkeypatch):
    from experiments import run, weights

    monkeypatch.setattr(weights, "export", lambda model, tokenizer, folder, weights: folder)
    monkeypatch.setattr(run.checkpoints, "write_state", lambda folder, state: None)
    for keep in (1, 3):
        (tmp_path / str(keep) / "checkpoints" / "step_20").mkdir(parents=True)
        writer = SimpleNamespace(path=tmp_path / str(keep), update=lambda **k: None, finish=lambda *a: None)
        recorder = SimpleNamespace(keep=keep, total_seconds=0.0, last_logs={}, step=20)
        run.finish(writer, random_model, None, recorder, {}, {})
        assert (writer.path / "checkpoints" / "step_20").exists() == (keep > 1)


def test_numbers_that_no_text_can_give_are_a_dash():
    from experiments.stats import Interval

    shown = [table.cell(Interval(mean, math.nan, math.nan)) for mean in (math.nan, 0.5)]
    assert shown == ["-", "0.500"]
