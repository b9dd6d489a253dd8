"""Judges and rewards through the real commands: kill and go on, rewards that move, no call paid twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

WORLD = '''
"""Answers of letters, a judge that follows rubrics to the letter and writes down what it is asked."""

import json
import os
import re
import time
from dataclasses import dataclass

from experiments.engines.base import BaseEngine, Result, Usage
from experiments.judging.teacher import read
from experiments.tasks.base import Row, Task


@dataclass
class Writers(Task):
    """`has a; lacks c=` -> letters; the row's rubric has both rules."""

    name: str = "writers"
    symbols: tuple = ("a", "b", "c", "d", "e", "=", "has ", "lacks ", "; ")
    max_prompt_tokens: int = 8
    max_completion_tokens: int = 6

    def rows(self, split, seed):
        return [self._row(k, "ab"[k % 2], "cd"[k // 2 % 2], split) for k in range(16)]

    def _row(self, k, has, lacks, split):
        texts = [f"has {has}", f"lacks {lacks}"]
        rules = [{"rule_id": k, "type": "must", "criterion": text, "test": text} for k, text in enumerate(texts)]
        rubric = {"hard_rules": rules, "principles": []}
        return Row(f"{split}-{k}", "; ".join(texts) + "=", texts, meta={"rubric": rubric})

    def score(self, text, row):
        return float(all(rule.holds(text) for rule in read("; ".join(row.answer))))


class RuleJudge(BaseEngine):
    name = "rules"

    def identity(self):
        return {"engine": self.name}

    def _stream(self, requests):
        for index, request in enumerate(requests):
            said = request.messages[1]["content"]
            box = dict(re.findall(r"<(\\w+)>\\n(.*?)\\n?</\\1>", said, re.S))
            named = re.findall(r"(?:\\): |\\d\\. )((?:has|lacks) \\w)", box.get("rubric", ""))
            rules = read("; ".join(named)) or []
            if "response" in box:
                text = json.dumps({"hard_rules": [{"passed": rule.holds(box["response"])} for rule in rules]})
            else:
                a, b = (self.worth(box[key], rules) for key in ("response_a", "response_b"))
                text = f"Final Judgment\\nWinner: Response {'A' if a >= b else 'B'}"
            if path := os.environ.get("PAID"):
                time.sleep(0.01)
                with open(path, "a") as file:
                    file.write(json.dumps(said) + "\\n")
            yield index, [Result(text, None, None, "stop", Usage(0, 0))]

    def worth(self, text, rules):
        return sum(rule.holds(text) for rule in rules)
'''
REWARD = """# @package _global_
# A judge that follows rubrics to the letter.
reward:
  - name: rubric
    kwargs: {mode: MODE, engine: {_target_: world.RuleJudge}}
"""
TRAIN = ["task=writers", "scale=cpu", "model.warm_start=null", "model.init_std=0.2", "trainer.prompts_per_step=8"]
TRAIN += ["trainer.rollouts_per_prompt=6", "trainer.learning_rate=3e-3", "trainer.max_steps=20", "trainer.save_every=4"]
TRAIN += ["trainer.log_every=1", "eval.every=0", "eval.items=16", "eval.samples=8", "eval.kl_probe=0", "name=rubric"]
PAIRS = ["objective=reward_model", "task=constraint_rubrics", "task.target=pair", "task.train_rows=64", "name=rm"]
PAIRS += ["task.eval_rows=9", "model.chat=true", "model.warm_start=null", "scale=cpu", "trainer.max_steps=40"]
PAIRS += [
    "trainer.prompts_per_step=8",
    "trainer.log_every=1",
    "trainer.save_every=4",
    "eval.every=0",
    "eval.items=null",
]


@pytest.fixture
def place(tmp_path):
    """A folder with the world as a module, its YAML files, and pairs to be judged."""
    (tmp_path / "world.py").write_text(WORLD)
    for folder in ("task", "reward", "engine"):
        (tmp_path / "conf" / folder).mkdir(parents=True)
    (tmp_path / "conf/task/writers.yaml").write_text("# Letters.\n_target_: world.Writers\nname: writers\n")
    (tmp_path / "conf/engine/rules.yaml").write_text("# Rules.\n_target_: world.RuleJudge\n")
    for mode in ("pointwise", "tournament"):
        (tmp_path / f"conf/reward/{mode}.yaml").write_text(REWARD.replace("MODE", mode))
    rows = [
        {"id": k, "prompt": f"p {k}", "chosen": "a" * (1 + k % 5), "rejected": "b" * (1 + k % 7)} for k in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def start(place, command, *words, out="out", paid="paid.jsonl"):
    env = os.environ | {"PYTHONPATH": f"{place}:{Path(__file__).resolve().parents[2]}", "OMP_NUM_THREADS": "1"}
    env |= {"ASSAY_CACHE": str(place / f"cache-{out}"), "PAID": str(place / paid), "HF_HUB_OFFLINE": "1"}
    line = [str(Path(sys.executable).with_name("assay")), command, *words, f"results_dir={place / out}"]
    line += ["--config-dir", str(place / "conf")]
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*args, **kwargs):
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return Path(out.strip().splitlines()[-1])


def stopped_at(process, file, lines, number):
    """Sends the signal once `file` (a glob) has so many lines."""
    deadline = time.time() + 300
    while sum(len(found.read_bytes().splitlines()) for found in file()) < lines:
        assert process.poll() is None and time.time() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    return err


def record(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    return metrics, pd.read_parquet(run / "eval.parquet"), (run / "model" / "model.safetensors").read_bytes()


def assert_same(one, other):
    for left, right in zip(record(one), record(other), strict=True):
        if isinstance(left, pd.DataFrame):
            pd.testing.assert_frame_equal(left, right, check_exact=True)
        else:
            assert left == right


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pointwise", "tournament"])
def test_a_rubric_reward_moves_and_resumes_exactly(place, mode):
    words = [*TRAIN, f"reward={mode}"]
    whole = finish(place, "train", *words)
    _, evals, _ = record(whole)
    scores = evals.groupby("step")["score"].mean()
    print(f"{mode}: eval/score {scores.iloc[0]:.3f} -> {scores.iloc[-1]:.3f}")
    assert scores.iloc[-1] > scores.iloc[0] + 0.2
    if mode == "tournament":  # the road to a checkpoint is the same one
        return
    process = start(place, "train", *words, out="cut")
    stopped_at(process, lambda: place.glob("cut/raw/*/*/seed*/metrics.jsonl"), 7, signal.SIGKILL)
    assert not list((place / "cut").rglob("summary.json"))
    assert_same(finish(place, "train", *words, out="cut"), whole)


@pytest.mark.slow
def test_a_reward_model_killed_and_gone_on_with(place):
    whole = finish(place, "train", *PAIRS)
    process = start(place, "train", *PAIRS, out="cut")
    stopped_at(process, lambda: place.glob("cut/raw/*/*/seed*/metrics.jsonl"), 9, signal.SIGKILL)
    assert not list((place / "cut").rglob("summary.json"))
    assert_same(finish(place, "train", *PAIRS, out="cut"), whole)


@pytest.mark.slow
def test_a_judge_run_interrupted_and_killed_pays_no_call_twice(place):
    words = ["judge=direct", "benchmark=pairs", f"benchmark.path={place / 'pairs.jsonl'}", "engine=rules", "name=j"]
    whole = finish(place, "judge", *words, out="whole", paid="whole.jsonl")
    paid = place / "paid.jsonl"
    for calls, number in ((20, signal.SIGINT), (60, signal.SIGKILL), (90, signal.SIGTERM)):
        err = stopped_at(start(place, "judge", *words), lambda: place.glob("paid.jsonl"), calls, number)
        assert number == signal.SIGKILL or "Interrupted" in err
        assert not list((place / "out").rglob("verdicts.parquet")) and not list((place / "out").rglob("summary.json"))
    run = finish(place, "judge", *words)
    assert (run / "verdicts.parquet").read_bytes() == (whole / "verdicts.parquet").read_bytes()
    asked = Counter(paid.read_text().splitlines())
    # What a signal hit between an answer and its line in the cache is asked again.
    assert len(asked) == 120 and sum(asked.values()) <= 121
    assert Counter(asked.keys()) == Counter((place / "whole.jsonl").read_text().splitlines())
