"""Scoring, summaries, and the job behind `assay eval`, with an endpoint that is made here."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from experiments import evaluate as ev
from experiments import scoring
from experiments.engines.base import Request, Result, Usage
from experiments.engines.progress import progress_bar
from experiments.tasks.base import Row, Task
from methods.errors import ConfigError, RecordError, RunError


@dataclass
class Adding(Task):
    name: str = "adding"
    max_completion_tokens: int = 7
    tiers: tuple[str, ...] = ("easy", "hard")

    def score(self, text: str, row: Row) -> float:
        return float(text.strip() == row.answer)

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        return {"digits": float(sum(c.isdigit() for c in text))}


ROWS = [Row(f"r{i}", f"{i}+{i}=", str(2 * i), tier="easy" if i < 3 else "hard") for i in range(6)]


class Scripted:
    """Answers from a table {prompt: [text, ...]}; None is an error, a text that ends in `~` was truncated."""

    name = "scripted"

    def __init__(self, answers: dict[str, list]) -> None:
        self.answers, self.asked = answers, []

    def generate(self, requests, progress=None):
        self.asked += requests
        if progress:
            progress(len(requests))
        return [[self.result(t) for t in self.answers[r.prompt][: r.n]] for r in requests]

    def result(self, text):
        if text is None:
            return Result("", None, None, "error", Usage(), "overloaded")
        finish = "length" if text.endswith("~") else "stop"
        return Result(text, list(range(len(text))), None, finish, Usage(3, 99))

    def close(self):
        pass


def right(row: Row, n: int = 1) -> list[str]:
    return [row.answer] * n


def test_columns_scores_and_requests():
    engine = Scripted({row.prompt: right(row) if row.tier == "easy" else ["x~"] for row in ROWS})
    done = []
    frame = scoring.evaluate(engine, Adding(), ROWS, seed=3, progress=done.append)
    assert list(frame.columns) == [*scoring.COLUMNS, "digits"]
    assert frame["score"].tolist() == [1, 1, 1, 0, 0, 0]
    assert frame["length"].tolist() == [1, 1, 1, 2, 2, 2]  # ids, not the engine's own count
    assert frame["finish"].tolist() == ["stop"] * 3 + ["length"] * 3
    assert frame["item_id"].tolist() == [row.id for row in ROWS] and set(frame["split"]) == {"eval"}
    assert sum(done) == 6
    first = engine.asked[0]
    assert (first.n, first.temperature, first.max_tokens) == (1, 0.0, 7)
    assert len({request.seed for request in engine.asked}) == 6


def test_the_stream_of_an_item_depends_on_seed_and_item_only():
    settings = {"samples": 2, "temperature": 1.0, "top_p": 0.9, "max_tokens": 5}
    all_of_them = scoring.make_requests(Adding(), ROWS, **settings, seed=1)
    assert scoring.make_requests(Adding(), ROWS[3:], **settings, seed=1) == all_of_them[3:]
    assert scoring.make_requests(Adding(), ROWS[3:], **settings, seed=2) != all_of_them[3:]
    assert all_of_them[0].max_tokens == 5 and all_of_them[0].top_p == 0.9


def test_errors_are_nan_and_counted_never_zero():
    engine = Scripted({row.prompt: right(row) if row.tier == "easy" else [None] for row in ROWS})
    frame = scoring.evaluate(engine, Adding(), ROWS)
    assert frame["score"].isna().tolist() == [False] * 3 + [True] * 3
    assert frame["length"].isna().sum() == 3 and frame["digits"].isna().sum() == 3
    assert frame.attrs["errors"] == {"overloaded": 3}
    values = scoring.summarise(frame)
    assert values["score"] == 1.0 and values["errors"] == 0.5 and values["items"] == 3 and values["truncated"] == 0.0
    assert "3 of 6 completions could not be had" in scoring.table(frame)


def test_hooks_change_the_request_and_add_columns():
    import dataclasses

    engine = Scripted({f"Q {row.prompt}": right(row) for row in ROWS})
    frame = scoring.evaluate(
        engine,
        Adding(),
        ROWS,
        to_request=lambda row, request: dataclasses.replace(request, prompt=f"Q {row.prompt}"),
        metrics=lambda text, row: {"depth": 2.0},
    )
    assert frame["score"].mean() == 1.0 and frame["depth"].tolist() == [2.0] * 6


def test_messages_go_as_messages():
    row = Row("m", [{"role": "user", "content": "hi"}], "x")
    (request,) = scoring.make_requests(Adding(), [row], samples=1, temperature=0, top_p=1.0, max_tokens=None, seed=0)
    assert request.messages == row.prompt and request.prompt is None


def test_no_rows_give_an_empty_frame():
    frame = scoring.evaluate(Scripted({}), Adding(), [])
    assert list(frame.columns) == list(scoring.COLUMNS) and len(frame) == 0


def four_samples(*correct: int):
    """A frame with four samples per item, of which `correct[i]` are right."""
    answers = {row.prompt: right(row, c) + ["wrong"] * (4 - c) for row, c in zip(ROWS, correct, strict=True)}
    return scoring.evaluate(Scripted(answers), Adding(), ROWS, samples=4, temperature=1.0)


def test_summary_values():
    values = scoring.summarise(four_samples(4, 2, 0, 1, 0, 2), ks=(1, 2, 4, 8))
    assert values["score"] == values["avg@4"] == pytest.approx(9 / 24)
    assert values["score/easy"] == pytest.approx(6 / 12) and values["score/hard"] == pytest.approx(3 / 12)
    assert values["pass@1"] == pytest.approx(9 / 24)
    assert values["pass@2"] == pytest.approx((1 + 5 / 6 + 0 + 1 / 2 + 0 + 5 / 6) / 6)
    assert values["pass@4"] == pytest.approx(4 / 6)
    assert "pass@8" not in values
    assert values["completions"] == 24 and values["items"] == 6


def test_items_lost_in_part_count_with_what_is_left():
    answers = {row.prompt: ["wrong", row.answer] for row in ROWS} | {ROWS[0].prompt: [None, ROWS[0].answer]}
    frame = scoring.evaluate(Scripted(answers), Adding(), ROWS, samples=2, temperature=1.0)
    values = scoring.summarise(frame, ks=(1, 2))
    assert values["score"] == pytest.approx((1 + 5 * 0.5) / 6)  # mean of item means
    assert values["pass@2"] == 1.0 and "avg@2" not in values


def test_intervals_are_clustered_by_item():
    """Four equal samples of an item are no more evidence than one."""
    once = scoring.evaluate(
        Scripted({r.prompt: right(r) if i % 2 else ["x"] for i, r in enumerate(ROWS)}), Adding(), ROWS
    )
    often = four_samples(0, 4, 0, 4, 0, 4)
    a, b = scoring.summarise(once), scoring.summarise(often)
    assert (a["score.low"], a["score.high"]) == (b["score.low"], b["score.high"])
    assert a["score.low"] < 0.25 and a["score.high"] > 0.75


def test_a_score_of_zero_is_not_certain():
    frame = scoring.evaluate(Scripted({row.prompt: ["x"] for row in ROWS}), Adding(), ROWS)
    values = scoring.summarise(frame)
    assert values["score.low"] == 0.0 and values["score.high"] == pytest.approx(1 - 0.025 ** (1 / 6))


def test_equal_ids_of_two_splits_are_two_items():
    import pandas as pd

    engine = Scripted({row.prompt: right(row) for row in ROWS})
    parts = [scoring.evaluate(engine, Adding(), ROWS, split=name) for name in ("one", "two")]
    frame = pd.concat(parts, ignore_index=True)
    assert scoring.summarise(frame)["items"] == 12
    text = scoring.table(frame, "title")
    assert text.startswith("title\n") and "one: 6 items" in text and "mean of 2 tasks: 1.000" in text


def test_powers():
    assert scoring.powers(1) == (1,) and scoring.powers(6) == (1, 2, 4, 6) and scoring.powers(8) == (1, 2, 4, 8)


def test_progress_without_a_terminal(capsys):
    with pytest.raises(KeyError), progress_bar("title", 4, interval=0.0) as advance:
        advance(1)
        advance(2)
        raise KeyError
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[1].startswith("title: 3/4 requests") and "left" in lines[1]


# ---------------------------------------------------------------- the job


class Sums(BaseHTTPRequestHandler):
    """Adds, except where `server.broken` says otherwise."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send({"data": [{"id": "adder"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.count += 1
        status = self.server.broken(self.server.count)
        a, b = re.findall(r"\d+", body["messages"][0]["content"])
        text = str(int(a) + int(b)) if int(a) % 2 else "no idea"
        choices = [{"message": {"content": text}, "finish_reason": "stop"}] * body["n"]
        self.send({"choices": choices, "usage": {"prompt_tokens": 4, "completion_tokens": 2 * body["n"]}}, status)

    def send(self, answer, status=200):
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def adder():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Sums)
    server.count, server.broken = 0, lambda count: 200
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def job(adder, tmp_path, monkeypatch):
    """job(*overrides) -> the composed configuration of an evaluation on that server."""
    from cli.compose import compose

    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(8)))

    def make(*more: str):
        url = f"engine.url=http://127.0.0.1:{adder.server_port}/v1"
        base = ["engine=openai", url, "engine.backoff=0.01", "engine.attempts=2", "engine.concurrency=1", "task=jsonl"]
        base += [f"task.path={rows}", "task.eval_fraction=1.0", f"results_dir={tmp_path / 'results'}"]
        cfg = compose("eval", [*base, *more])
        cfg.experiment, cfg.arm = "sums", "adder"
        return cfg

    return make


def test_a_run_is_recorded_and_skipped_the_second_time(job, adder, tmp_path, capsys):
    from experiments.records import load_run

    path = ev.run(job())
    assert path == tmp_path / "results" / "raw" / "sums" / "adder" / "seed0"
    run = load_run(path)
    assert run.finished and run.run["command"] == "eval"
    assert run.summary["metrics"]["eval/score"] == 0.5 and run.summary["metrics"]["eval/length"] == 2.0
    assert run.summary["cost"]["requests"] == adder.count == 8
    assert run.evals()["score"].sum() == 4 and set(run.evals()["step"]) == {0}
    assert len(run.samples()) == 8 and {s["completion"] for s in run.samples()} > {"no idea"}
    assert "8/8 requests" in capsys.readouterr().err
    assert ev.run(job()) == path
    assert adder.count == 8 and "skipped" in capsys.readouterr().err


def test_an_interrupted_evaluation_goes_on_where_it_was(job, adder):
    from experiments.records import load_run

    adder.broken = lambda count: 429 if count > 5 else 200
    with pytest.raises(RunError):
        ev.run(job())
    cfg = job()
    from experiments.run import run_folder

    assert load_run(run_folder(cfg)).run["status"] == "failed"
    asked, adder.broken = adder.count, lambda count: 200
    path = ev.run(cfg)
    assert adder.count - asked == 3
    assert load_run(path).summary["cost"]["cached"] == 5
    assert load_run(path).summary["metrics"]["eval/score"] == 0.5


def test_another_configuration_in_the_same_place(job, adder):
    ev.run(job())
    with pytest.raises(RecordError, match=r"eval\.items=200 there, 3 here"):
        ev.run(job("eval.items=3"))
    path = ev.run(job("eval.items=3", "overwrite=true"))
    from experiments.records import load_run

    assert len(load_run(path).evals()) == 3 and adder.count == 8  # all from the cache


def test_lost_completions_are_told_and_if_all_are_lost_the_run_fails(job, adder, capsys):
    adder.broken = lambda count: 400 if count == 2 else 200
    path = ev.run(job("eval.cache=false"))
    from experiments.records import load_run

    assert load_run(path).summary["metrics"]["eval/errors"] == 0.125
    assert "1 of 8 completions could not be had: status 400" in capsys.readouterr().err
    adder.broken = lambda count: 400
    with pytest.raises(RunError, match="status 400"):
        ev.run(job("eval.cache=false", "overwrite=true"))
    assert load_run(path).run["status"] == "failed"


def test_a_suite_is_recorded_by_split(job, tmp_path):
    from omegaconf import open_dict

    from experiments.records import load_run

    cfg = job("eval.samples=2", "eval.temperature=1.0")
    with open_dict(cfg):
        cfg.suite = {"first": cfg.task, "second": {**cfg.task, "scorer": "contains"}}
    metrics = load_run(ev.run(cfg)).summary["metrics"]
    assert metrics["first/score"] == metrics["first/pass@2"] == 0.5
    assert metrics["suite/score"] == (metrics["first/score"] + metrics["second/score"]) / 2


@pytest.mark.parametrize(
    "wrong, key",
    [
        ("eval.samples=4", "eval.samples"),
        ("eval.items=0", "eval.items"),
        ("eval.temperature=-1.0", "eval.temperature"),
        ("engine.url=null", "engine.url"),
        ("engine.endpoint=chatter", "engine.endpoint"),
        ("engine.api_key_env=sk-123", "engine.api_key_env"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(job, tmp_path, wrong, key):
    with pytest.raises(ConfigError, match=re.escape(key)):
        ev.run(job(wrong))
    assert not (tmp_path / "results").exists()


def test_a_missing_engine_is_told_before_a_model_is_made(monkeypatch):
    import sys

    from cli.compose import compose

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install"):
        ev.check(compose("eval", ["engine=vllm"]))


def test_a_live_model_from_the_configuration(tmp_path, monkeypatch):
    from cli.compose import compose
    from experiments.records import load_run

    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    line = ["model=tiny", "model.warm_start=null", "task=arithmetic", "eval.items=6", f"results_dir={tmp_path}"]
    costs, frames = [], []
    for more in ([], ["overwrite=true"]):
        run = load_run(ev.run(compose("eval", [*line, *more])))
        costs.append(run.summary["cost"])
        frames.append(run.evals())
    assert costs[0]["requests"] == costs[1]["cached"] == 6 and costs[1]["requests"] == 0
    assert frames[0].equals(frames[1]) and len(frames[0]) == 6


def test_the_command_prints_a_table_and_ends_with_the_path(job, capsys):
    from cli.main import main

    cfg = job()
    line = [f"engine.url={cfg.engine.url}", f"task.path={cfg.task.path}", f"results_dir={cfg.results_dir}"]
    words = ["eval", "engine=openai", "task=jsonl", "task.eval_fraction=1.0", "name=sums", *line]
    with pytest.raises(SystemExit) as stop:
        main(words)
    out = capsys.readouterr().out.splitlines()
    assert not stop.value.code
    assert any(re.search(r"score +0\.500 +\[0\.\d+, 0\.\d+\]", text) for text in out)
    assert out[-1].startswith(f"{cfg.results_dir}/raw/sums/") and out[-1].endswith("/seed0")


def test_nan_scores_of_a_task_stay_nan():
    class Broken(Adding):
        def score(self, text, row):
            return math.nan

    frame = scoring.evaluate(Scripted({row.prompt: right(row) for row in ROWS}), Broken(), ROWS)
    assert frame["score"].isna().all()
    assert math.isnan(scoring.summarise(frame)["score"])


def test_request_is_what_engines_get():
    engine = Scripted({row.prompt: right(row) for row in ROWS})
    scoring.evaluate(engine, Adding(), ROWS)
    assert all(isinstance(request, Request) for request in engine.asked)


def test_one_item_has_no_interval_and_says_so():
    import pandas as pd

    row = {"split": "eval", "item_id": "a", "sample": 0, "score": 1.0, "length": 8.0, "tier": "all", "finish": "stop"}
    text = scoring.table(pd.DataFrame([row]))
    assert re.search(r"length +8\.000  \(one item\)", text) and "nan" not in text
