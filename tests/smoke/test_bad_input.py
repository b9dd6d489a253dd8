"""Wrong input ends in one clear paragraph, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    "name=bad",
    "scale=cpu",
    "model.warm_start=null",
    "model.init_std=0.2",
    "task.train_rows=64",
    "trainer.prompts_per_step=4",
    "trainer.rollouts_per_prompt=4",
    "trainer.max_steps=4",
    "trainer.save_every=2",
    "eval.every=2",
    "eval.items=6",
    "eval.samples=1",
    "eval.kl_probe=0",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def assay(cache, tmp_path):
    """assay(*words) -> (exit code, stderr); records go to tmp_path/results."""
    environment = os.environ | {"ASSAY_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def call(*words, limit=None, small=True):
        line = [str(Path(sys.executable).with_name("assay")), "train", *(SMALL if small else [])]
        line += [f"results_dir={tmp_path / 'results'}", *words]
        before = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=200, preexec_fn=before)
        return done.returncode, done.stderr

    return call


def paragraph(stderr):
    """The error itself: one line, no traceback."""
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("assay: error:")]
    assert len(errors) == 1, stderr
    return errors[0]


COMPOSED = {
    "unknown method": (["method=[ha_dv]"], "did you mean 'ha_dw'"),
    "misspelt key": (["trainer.max_stps=3"], "trainer.max_steps"),
    "wrong type": (["trainer.max_steps=abc"], "an integer"),
    "batch not divisible": (["trainer.rows_per_device=7"], "trainer.rows_per_device"),
    "refused stack": (["method=[ha_dw]", "objective=reinforce_pp"], "objective=grpo"),
    "save off a boundary": (["trainer.updates_per_generation=3"], "a multiple of 3"),
}


@pytest.mark.parametrize("case", COMPOSED)
def test_refused_before_anything_is_written(case, assay, tmp_path):
    words, message = COMPOSED[case]
    code, err = assay(*words)
    assert code == 2 and message in paragraph(err)
    assert not (tmp_path / "results").exists()


def test_a_sweep_is_checked_whole_before_its_first_run(assay, tmp_path):
    code, err = assay("-m", "objective=grpo,reinforce_pp", "method=[ha_dw]")
    assert code == 2 and "reinforce_pp" in paragraph(err)
    assert not (tmp_path / "results").exists()


FILES = {
    "empty file": ("", "empty"),
    "missing column": ('{"prompt": "1+1", "answr": "2"}\n', "did you mean 'answr'"),
    "bad line": ('{"prompt": "1+1", "answer": "2"}\n{"prompt": \n', ":2"),
    "too few rows": ('{"prompt": "1+1=", "answer": "2"}\n', "1 row"),
}


@pytest.mark.parametrize("case", FILES)
def test_task_files(case, assay, tmp_path):
    text, message = FILES[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    words = [w for w in SMALL if not w.startswith("task.")]
    code, err = assay(*words, "task=jsonl", f"task.path={path}", small=False)
    assert code == 2 and message in paragraph(err)
    assert not list(tmp_path.rglob("metrics.jsonl")) or not next(iter(tmp_path.rglob("metrics.jsonl"))).read_text()


DEMOS = {
    "missing column": ({"demos": "2"}, "did you mean 'demos'"),
    "no text": ({"demo": 7}, "row 1, column 'demo'"),
    "empty everywhere": ({"demo": ""}, "no training row has one"),
    "symbols that the tokenizer lacks": ({"demo": "2é"}, "does not give a demonstration back"),
}


def demonstration_run(assay, path, records, *words):
    path.write_text("".join(json.dumps({"prompt": f"{k}+1=", "answer": "2"} | r) + "\n" for k, r in enumerate(records)))
    small = [w for w in SMALL if not w.startswith("task.")]
    line = ["task=jsonl", f"task.path={path}", "task.demo_column=demo", "task.max_completion_tokens=8", "method=[srft]"]
    return assay(*small, *line, *words, small=False)


@pytest.mark.parametrize("case", DEMOS)
def test_demonstration_files(case, assay, tmp_path):
    record, message = DEMOS[case]
    code, err = demonstration_run(assay, tmp_path / "rows.jsonl", [record] * 40)
    assert code == 2 and message in paragraph(err)
    assert not list(tmp_path.rglob("checkpoints/*"))


def test_wrong_long_and_missing_demonstrations_are_left_out_and_counted(assay, tmp_path):
    records = [{"demo": demo} for demo in ("2", "3", "2" * 30, None)] * 10
    code, err = demonstration_run(assay, tmp_path / "rows.jsonl", records)
    assert code == 0, err
    lines = [json.loads(line) for line in next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()]
    counts = {k: sum(line[f"srft/{k}"] for line in lines) for k in ("demos", "demo_rejected", "demo_too_long")}
    assert 16 > counts["demos"] > counts["demo_rejected"] > 0 and counts["demo_too_long"] > 0


def test_a_group_of_one_and_a_group_of_demonstrations_only(assay):
    code, err = assay("method=[srft]", "trainer.rollouts_per_prompt=1")
    assert code == 2 and "at least two rollouts" in paragraph(err)
    code, err = assay("method=[srft]", "method.srft.n_demo=4")
    assert code == 2 and "no slot is left for rollouts" in paragraph(err)


def test_nan_reward(assay, tmp_path):
    source = tmp_path / "mine.py"
    source.write_text("def reward(completions, rows, **kw):\n    return [float('nan')] * len(completions)\n")
    code, err = assay(f"reward={source}:reward")
    assert code == 1 and "NaN" in paragraph(err)
    (run,) = tmp_path.rglob("run.json")
    assert json.loads(run.read_text())["status"] == "failed"


def test_parent_is_a_file(assay, tmp_path):
    (tmp_path / "file").write_text("")
    code, err = assay(f"results_dir={tmp_path / 'file' / 'deep'}")
    assert code == 2 and str(tmp_path / "file") in paragraph(err)


def test_no_space_fails_and_resumes(assay, tmp_path):
    code, err = assay(limit=200_000)  # the weights alone are larger
    assert code == 1 and "space" in paragraph(err)
    assert not list(tmp_path.rglob("summary.json"))
    code, err = assay()
    assert code == 0, err
    assert len(list(tmp_path.rglob("summary.json"))) == 1


def run_folder(tmp_path):
    return next(tmp_path.rglob("run.json")).parent


def stopped_run(assay, tmp_path):
    """A run that was killed after its checkpoint of step 2."""
    source = tmp_path / "mine.py"
    source.write_text(
        "import os\ncalls = []\n\n\ndef reward(completions, rows, **kw):\n"
        "    calls.append(1)\n    if len(calls) > 3 and not os.environ.get('GO_ON'):\n        os._exit(9)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    code, _ = assay(f"reward={source}:reward")
    assert code == 9
    return source, next(tmp_path.rglob("step_2"))


def test_a_checkpoint_cut_in_half(assay, tmp_path):
    source, checkpoint = stopped_run(assay, tmp_path)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    code, err = assay(f"reward={source}:reward")
    assert code == 2 and "model.safetensors" in paragraph(err) and "delete" in err


def test_a_record_of_another_version_or_configuration(assay, tmp_path):
    code, err = assay()
    assert code == 0, err
    path = run_folder(tmp_path) / "run.json"
    config = path.with_name("config.yaml")  # as a version with another default would have left it
    config.write_text(config.read_text().replace("learning_rate: 0.0003", "learning_rate: 0.0001"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_hash": "of another default"}))
    code, err = assay()
    assert code == 2 and "trainer.learning_rate=0.0001 there, 0.0003 here" in paragraph(err) and "overwrite=true" in err
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    code, err = assay()
    assert code == 2 and "schema 99" in paragraph(err)
