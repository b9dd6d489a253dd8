"""The leaderboard and its page, from records alone."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess

import pandas as pd
import pytest

from experiments.records import RunWriter
from experiments.tasks.local_life import leaderboard
from methods.errors import ConfigError

EVIL = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1"> %SCRIPT% poi_a_1'
TASK = {"name": "local_life", "path": "", "world_seeds": {"eval": 2}, "size": 400, "cities": 2, "language": "en"}
LEVELS = ("L3", "L4", "L3", "L4")


def record(root, arm, right, *, judged=False, seed=0, task=TASK):
    """A finished evaluation of four questions, of which the first `right` are answered correctly."""
    config = {"task": task, "eval": {"split": "eval"}}
    meta = {"command": "eval", "experiment": "agents", "arm": arm, "seed": seed, "pair": f"seed{seed}", "argv": []}
    writer = RunWriter.open(root / "raw" / "agents" / arm / f"seed{seed}", meta | {"config_hash": "x"}, config)
    rows = []
    for i, level in enumerate(LEVELS):
        score = float(i < right)
        row = {"split": "eval", "item_id": f"City{i // 2}/{level}-{i}", "sample": 0, "score": score, "length": 9.0}
        row |= {"tier": level, "finish": "stop", "correctness": score, "completeness": 8.0, "faithfulness": math.nan}
        row |= {"calls": 3.0, "rounds": 4.0}
        if judged:
            row |= {"judge_correctness": 1.0, "judge_fluency": 7.0, "judge_safety": 8.0, "judge_failed": float(i == 3)}
        rows.append(row)
        turns = [
            {"text": f"<rag>hotpot {EVIL}</rag>", "result": f"LocalRAG, City, 1 merchant:\n1. {EVIL}"},
            {"text": f"【Answer】poi_a_1 and poi_b_2 {EVIL}", "result": None},
        ]
        sample = {"step": 0, "row_id": row["item_id"], "group_id": "", "tier": level, "finish": "stop"}
        sample |= {"prompt": [{"role": "user", "content": f"question {i} {EVIL}"}], "completion": EVIL}
        writer.sample(sample | {"turns": turns, "reference": EVIL, "rewards": {"score": score}})
    writer.eval(pd.DataFrame(rows), step=0)
    writer.finish({"eval/score": right / 4}, {})


@pytest.fixture
def root(tmp_path):
    record(tmp_path, "good", 3)
    record(tmp_path, "bad | <b>", 1, judged=True)
    return tmp_path


def test_the_leaderboard_has_each_split_with_its_interval(root, capsys):
    page = leaderboard.build(["agents"], root)
    text = (page.parent / "leaderboard.md").read_text()
    assert text.strip() in capsys.readouterr().out and page.name == "local_life.html"
    table = [
        [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    cells = {(row[0], row[1]): dict(zip(table[0], row, strict=True)) for row in table[2:]}
    assert cells["good", "overall"]["correctness"].startswith("75.0 [")
    assert cells["good", "L3"]["correctness"] == "100.0 [15.8, 100.0]"
    assert cells["good", "City1"]["correctness"].startswith("50.0") and cells["good", "overall"]["fluency"] == ""
    assert cells["good", "overall"]["faithfulness"] == "" and cells["good", "overall"]["failed"] == "0"
    name = next(model for model, _ in cells if model.startswith("bad"))
    judged = cells[name, "overall"]
    assert (judged["questions"], judged["failed"]) == ("3", "1") and judged["correctness"].startswith("100.0")
    assert "seed 2, 400 merchants" in text and "not comparable" in text
    leaderboard.build(["agents"], root, release_compat=True)
    zeros = (page.parent / "leaderboard.md").read_text()
    assert re.search(r"\| bad \\\| <b> \| overall \| 4 \| 1 \|.*\| 75\.0", zeros)


def test_the_page_holds_everything_as_data(root):
    page = leaderboard.build(["agents"], root)
    text = page.read_text()
    assert "<img" not in text and text.count("<script") == 2
    before, found, after = re.split(r'(?<=id="data">)(.*?)(?=</script>)', text, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)\s*=", before + after) and (before + after).count("http") == 2
    data = json.loads(found)
    assert [run["name"] for run in data["runs"]] == ["bad | <b>, seed 0", "good, seed 0"]
    assert data["runs"][1]["samples"][0]["turns"][0]["result"].endswith(EVIL)
    assert data["levels"] == ["L3", "L4"] and data["runs"][1]["samples"][3]["values"]["calls"] == 3
    assert text == leaderboard.build(["agents"], root).read_text()


def test_runs_of_other_tasks_are_refused(tmp_path):
    record(tmp_path, "other", 1, task={"name": "arithmetic"})
    with pytest.raises(ConfigError, match="local_life"):
        leaderboard.build(["agents"], tmp_path)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_browser_shows_it_and_runs_nothing_of_a_record(root, tmp_path):
    page = leaderboard.build(["agents"], root)
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    line = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", profile, "--virtual-time-budget=3000"]
    done = subprocess.run([*line, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240)
    shown = done.stdout
    assert "<title>Local life: agents</title>" in shown and "1 of 4" in shown and "<img" not in shown
    assert shown.count("<rect") == 4 and "model, round 2" in shown and 'class="unseen"' in shown
