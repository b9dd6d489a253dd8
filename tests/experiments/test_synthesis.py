"""assay synth-data: the same files however often it is stopped, no answer paid twice, a misbehaving endpoint."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TextIO

import pytest

from experiments import synthesis, synthesis_files
from experiments.engines.base import Request
from methods.errors import ConfigError, DataError, RecordError, RunError
from methods.toolforge.asks import _FLOW
from methods.toolforge.checks import check

TOPICS = ("Oslo", "Bergen", "Turin", "Lima", "Perth", "Quito")


def triple(i: int) -> dict:
    """A question of two hops (every third: of one), with distractors."""
    town, film, person = TOPICS[i % 6], f"Amber Road {i}", f"Lena Falk {i}"
    gold = [[film, [f"{film} is a film directed by {person}."]], [person, [f"{person} was born in {town}."]]]
    others = [
        [f"Green Lane {k}", [f"The film of lane {k} was directed by somebody born in town {k}."]] for k in range(30)
    ]
    facts = [[film, 0], [person, 0]] if i % 3 else [[person, 0]]
    question = f"Where was the director of {film} born?" if i % 3 else f"Where was {person} born?"
    return {"_id": f"q{i}", "type": "bridge", "question": question, "answer": town, "context": gold + others,
            "supporting_facts": facts}  # fmt: skip


def write_triples(path: Path, count: int = 30) -> Path:
    path.write_text("".join(json.dumps(triple(i)) + "\n" for i in range(count)))
    return path


@pytest.fixture
def job(tmp_path, monkeypatch):
    """job(*overrides) -> folder; its input is 30 triples unless given."""
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))

    def run(*words, output="out"):
        from cli.compose import compose

        line = [f"output={tmp_path / output}", "tools.variants=3", *words]
        if not any(word.startswith("input=") for word in words):
            line.append(f"input={write_triples(tmp_path / 'triples.jsonl')}")
        return synthesis.run(compose("synth_data", line))

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that must not depend on interruptions; the cost does."""
    left_out = ("cost.json", "state.json")
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name not in left_out and f.suffix != ".lock"}


def read(folder: Path, name: str = "train.jsonl") -> list[dict]:
    return list(synthesis_files.read_lines(folder / name))


# ---------------------------------------------------------------- an endpoint that writes by the book


def scripted(body: dict) -> str:
    """What a careful model would answer: a judge's [1], or the turns that the flow asks for."""
    prompt = body["messages"][0]["content"]
    if prompt.startswith("Rate"):
        return "fine\n[1]"
    blocks = [json.loads(b) for b in re.findall(r"^===\n(.*?)\n===$", prompt, re.DOTALL | re.MULTILINE)]
    _, tools, planned, others, _ = blocks
    required = {tool["name"]: tool["parameters"]["required"] for tool in tools}

    def call(name: str, query: str) -> dict:
        return {"name": name, "arguments": dict.fromkeys(required[name], "x") | {"query": query}}

    turns = []
    for line in re.findall(r"^\d+\. Round .*$", prompt, re.MULTILINE):
        number = int(re.search(r"Round (\d)", line)[1])
        mistake = next(m for m, text in _FLOW.items() if line.endswith(text))
        calls = [call(c["name"], c["query"]) for c in planned[number - 1]]
        if "arguments" in mistake:
            calls[0]["arguments"]["query"] += " elsewhere"
        if "tool" in mistake:
            calls = [call(others["wrong"][0], c["query"]) for c in planned[number - 1]]
        if mistake == "general":
            calls = [call(others["general"], "all of it")]
        named = ", ".join(sorted({c["name"] for turn in turns for c in turn["calls"]} | {"query"}))
        turns.append({"think": f"Not {named}; now this.", "calls": calls})
    answer = json.loads(re.search(r"answer with exactly: (.*)$", prompt, re.MULTILINE)[1])
    return json.dumps({"turns": [*turns, {"think": "So it is.", "answer": answer}]})


class Endpoint(ThreadingHTTPServer):
    """`fault(body, number of times it was asked)` may answer (status, headers, bytes), "drop", "cut" or "hang".
    `log` gets a line for every answer that has left."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, log: TextIO | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.log = log
        self.asked: dict[str, int] = {}
        self.answered: dict[str, int] = {}
        self.fault = lambda body, count: None
        self.delay = 0.0
        self.models = ["fake"]
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def words(self) -> list[str]:
        return ["engine=openai", f"engine.url=http://127.0.0.1:{self.server_port}/v1", "engine.model=fake",
                "engine.backoff=0.01", "engine.concurrency=8", "stages.plan=template", "window=16"]  # fmt: skip

    def handle_error(self, *_: object) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_GET(self) -> None:
        self.reply(200, {}, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body, key = json.loads(raw), raw.decode()
        with self.server.lock:
            self.server.asked[key] = count = self.server.asked.get(key, 0) + 1
        time.sleep(self.server.delay)
        verdict = self.server.fault(body, count)
        if verdict == "hang":
            time.sleep(1.0)
            verdict = "drop"
        if verdict == "drop":
            self.close_connection = True
            return self.connection.close()
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        answer = {"choices": [{"finish_reason": "stop", "message": {"content": scripted(body)}}], "usage": usage}
        data = json.dumps(answer).encode()
        if verdict == "cut":
            self.reply(200, {"Content-Length": str(len(data))}, data[: len(data) // 2])
            self.close_connection = True
            return self.connection.close()
        if verdict is None:
            with self.server.lock:
                self.server.answered[key] = self.server.answered.get(key, 0) + 1
        self.reply(*(verdict or (200, {}, data)))
        if self.server.log is not None:
            with self.server.lock:
                self.server.log.write(hashlib.sha256(raw).hexdigest() + "\n")
                self.server.log.flush()

    def reply(self, status: int, headers: dict, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------- what is written


def test_files_hold_together(job):
    folder = job()
    rows, records = read(folder), read(folder, "records.jsonl")
    assert len(rows) == len(records) >= 28
    # 13 shapes of the two routes that occur; the last ones from triples that are tried again at the end.
    assert {row["shape"] for row in rows} == {"A1", "A2", "A3", "A4", "C1", *(f"C{i}" for i in range(3, 11))}
    for row, record in zip(rows, records, strict=True):
        assert row["id"] == record[0]["uuid"] and set(check(record).values()) == {1}
        assert row["messages"][1:] == record[1]["messages"][1:]
        assert [t["function"] for t in json.loads(row["tools"])] == record[5]["argument_tool_bank"]
        assert all(row["messages"][i]["role"] == "assistant" for i in row["mistakes"])
    import datasets

    table = datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(folder.parent / "hf"))
    assert table.to_list() == rows
    found = json.loads((folder / "statistics.json").read_text())
    assert found["conversations"] == len(rows) and sum(found["shapes"].values()) == len(rows)
    assert 0.5 < found["case_entropy"] < 1 and found["diversity_of_turns"]["distinct_2"] > 0
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlanguage:\n- en\n") and "| C10 |" in card


def test_the_same_line_again_does_nothing_and_another_is_refused(job, capfd):
    folder = job()
    before = contents(folder)
    assert job() == folder and contents(folder) == before and "finished earlier" in capfd.readouterr().err
    with pytest.raises(RecordError, match="another job"):
        job("seed=1")
    assert contents(job("seed=1", "overwrite=true")) != before


def test_another_model_is_another_job(endpoint):
    from cli.compose import compose
    from experiments.synthesis_setup import job_key

    def key(*words):
        return job_key(compose("synth_data", ["input=x", "model=hf", *words]), "")

    assert key("engine=vllm", "model.path=a") != key("engine=vllm", "model.path=b")
    assert key("model.path=a", "results_dir=r") == key("model.path=b")
    served = [*endpoint.words, "engine.model=null"]
    endpoint.models = ["one"]
    assert key(*served) == key(*served, "model.path=b") == key(*endpoint.words, "engine.model=one")
    endpoint.models = ["two"]
    assert key(*served) == key(*endpoint.words, "engine.model=two")


def test_window_and_order_of_answers_change_nothing(job, endpoint):
    one = contents(job(*endpoint.words, "window=1", "cache=false", output="one"))
    endpoint.fault = lambda body, count: time.sleep(hash(str(body)) % 5 / 100)
    assert contents(job(*endpoint.words, "window=64", "cache=false", output="two")) == one


def test_as_many_as_wanted(job, endpoint):
    assert len(read(job("conversations=7"))) == 7
    endpoint.fault = lambda body, count: time.sleep(0.3 if len(endpoint.asked) > 9 else 0)
    folder = job(*endpoint.words, "conversations=3", "window=256", output="paid")
    endpoint.fault = lambda body, count: None
    assert len(read(folder)) == 3 and sum(endpoint.asked.values()) <= 2 * 2 * 3
    spent = json.loads((folder / "cost.json").read_text())["requests"]
    assert spent == sum(endpoint.asked.values())  # those under way when enough was kept, too
    folder = job(*endpoint.words, "conversations=29", "window=256", output="all")  # by shapes that were missing
    assert len(read(folder)) == 29 and sum(endpoint.asked.values()) <= 2 * (30 + 1)


def test_chinese_tools(job):
    folder = job("languages=[zh]")
    assert all(row["language"] == "zh" for row in read(folder))


def test_all_stages_by_an_endpoint_and_its_cost(job, endpoint):
    folder = job(*endpoint.words, "engine.prices.prompt=1.0", "engine.prices.completion=2.0")
    assert len(read(folder)) >= 28 and not read(folder, "rejected.jsonl")
    cost = json.loads((folder / "cost.json").read_text())
    assert cost["requests"] == sum(endpoint.answered.values()) == 2 * len(read(folder))
    assert cost["usd"] == pytest.approx(cost["requests"] * 120e-6)
    from experiments.synthesis_report import summary

    assert "US dollars" in summary(folder)


def test_a_model_in_this_process_is_asked(job, tmp_path, monkeypatch, capfd):
    """It writes nonsense, which the rules count; the job itself runs, says how far it is, and keeps every batch."""
    from experiments.engines import progress, transformers
    from experiments.models import Tiny
    from experiments.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer(chat=True)
    Tiny(chat=True, warm_start=None, max_length=8192).new(tokenizer, 0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(progress.progress_bar.__wrapped__, "__defaults__", (0.0, "requests", str))
    words = [f"input={write_triples(tmp_path / 'three.jsonl', 3)}", "engine=transformers", "model=hf",
             f"model.path={tmp_path / 'model'}", "max_tokens=4", "tries=1", "stages.write=template",
             "stages.judge=template", "batch_tokens=2000"]  # fmt: skip
    batch, calls = transformers.TransformersEngine._batch, []

    def dies_at_the_third(self, jobs, setting):
        calls.append(len(jobs))
        if len(calls) == 3:
            raise OSError("killed")
        return batch(self, jobs, setting)

    monkeypatch.setattr(transformers.TransformersEngine, "_batch", dies_at_the_third)
    with pytest.raises(OSError, match="killed"):
        job(*words)
    assert "0/3 triples" in (said := capfd.readouterr().err) and ", 2 answers" in said
    with pytest.raises(RunError, match="cannot be read: 3"):
        job(*words)
    assert calls == [1, 1, 1, 1]  # two answers were on disk
    found = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert found["conversations"] == 0 and found["rejections"] == {"label: the engine's answer cannot be read": 3}


# ---------------------------------------------------------------- going on


def test_stopped_at_any_row_it_ends_in_the_same_files(job, monkeypatch):
    whole = contents(job(output="whole"))
    monkeypatch.setattr(synthesis, "SAVE_SECONDS", 0.0)
    emit, calls = synthesis._emit, [0]
    for stop_at in (1, 2, 13, 30, 31):
        calls[0] = 0

        def dies(*args, stop_at=stop_at):
            calls[0] += 1
            if calls[0] == stop_at:
                raise OSError("killed")
            emit(*args)

        monkeypatch.setattr(synthesis, "_emit", dies)
        with contextlib.suppress(OSError):
            job(output=f"cut{stop_at}")
        monkeypatch.setattr(synthesis, "_emit", emit)
        assert contents(job(output=f"cut{stop_at}")) == whole, stop_at


def test_a_stop_while_the_bank_is_made_keeps_what_was_paid_for(job, endpoint, monkeypatch):
    from experiments.signals import StopSignals

    words = [*endpoint.words, "stages.tools=engine", "stages.write=template", "stages.judge=template",
             "tools.variants=1", "tools.attempts=2"]  # fmt: skip
    monkeypatch.setitem(globals(), "scripted", lambda body: "no tool")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StopSignals, "received", property(lambda self: 2 if endpoint.answered else None, lambda *_: None),
                      raising=False)  # fmt: skip
        job(*words)
    stopped = dict(endpoint.asked)
    folder = job(*words)
    assert 0 < len(stopped) < 44 <= len(endpoint.asked) and set(endpoint.asked.values()) == {1}
    assert json.loads((folder / "cost.json").read_text())["requests"] == len(endpoint.asked)


def test_a_stop_before_the_first_row_can_go_on(job, monkeypatch):
    whole = contents(job(output="whole"))
    with monkeypatch.context() as patch, contextlib.suppress(OSError):

        def dies(self, **state):
            raise OSError("killed")

        patch.setattr(synthesis_files.Output, "save", dies)
        job(output="cut")
    assert contents(job(output="cut")) == whole


def test_a_file_that_lost_rows_is_not_filled_up(job):
    folder = job()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"finished": False}))
    (folder / "train.jsonl").unlink()
    with pytest.raises(RecordError, match="lost rows"):
        job()
    assert len(read(job("overwrite=true"))) >= 28


@pytest.mark.parametrize("name", ["records.jsonl", "tools.jsonl"])
def test_what_a_job_left_without_its_state_is_thrown_away_on_request_and_nothing_else(job, tmp_path, name):
    (tmp_path / "out").mkdir()
    for file in (name, "mine.txt"):
        (tmp_path / "out" / file).write_text("x")
    with pytest.raises(RecordError, match="another job"):
        job()
    folder = job("overwrite=true")
    assert len(read(folder)) >= 28 and (folder / "mine.txt").read_text() == "x"


def start(tmp_path, words, output):
    line = [str(Path(sys.executable).with_name("assay")), "synth-data", f"input={tmp_path / 'triples.jsonl'}",
            f"output={tmp_path / output}", "tools.variants=3", *words]  # fmt: skip
    env = os.environ | {"ASSAY_CACHE": str(tmp_path / f"cache-{output}"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_answer_is_paid_twice(tmp_path, endpoint, number):
    """After SIGINT and SIGTERM nothing is asked twice; after SIGKILL only what was under way at that moment."""
    write_triples(tmp_path / "triples.jsonl")
    done = start(tmp_path, endpoint.words, "whole")
    assert done.wait(120) == 0, done.stderr.read()
    needed = set(endpoint.answered)
    endpoint.asked, endpoint.answered, endpoint.delay = {}, {}, 0.15
    kills = 0
    for _ in range(3):
        before = len(endpoint.answered)
        running = start(tmp_path, endpoint.words, "cut")
        deadline = time.monotonic() + 60
        while len(endpoint.answered) < before + 4 and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        running.send_signal(number)
        code = running.wait(60)
        kills += 1
        assert code in (-9, 128 + number), running.stderr.read()
    last = start(tmp_path, endpoint.words, "cut")
    assert last.wait(120) == 0, last.stderr.read()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    twice = sum(count - 1 for count in endpoint.asked.values())
    assert set(endpoint.asked) == needed
    assert twice <= (8 * kills if number == signal.SIGKILL else 0), twice


def serve(tmp_path, log, port=0):
    """An endpoint in a process of its own, and its port."""
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[1]); import test_synthesis as t\n"
        "server = t.Endpoint(int(sys.argv[3]), open(sys.argv[2], 'a')); server.delay = 0.1\n"
        "print(server.server_port, flush=True); threading.Event().wait()"
    )
    line = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / log), str(port)]
    server = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, int(server.stdout.readline())


@pytest.mark.slow
@pytest.mark.parametrize("attempts", [2, 30], ids=["stops and is started again", "waits"])
def test_a_server_that_is_killed_and_started_again(tmp_path, attempts):
    """Whether the job ends meanwhile or not: the files of an uninterrupted one, and no answer that came is asked for
    again."""
    write_triples(tmp_path / "triples.jsonl")

    def words(port):
        return ["engine=openai", f"engine.url=http://127.0.0.1:{port}/v1", "engine.model=fake", "engine.backoff=0.1",
                "engine.concurrency=4", "stages.plan=template", "window=16", f"engine.attempts={attempts}"]  # fmt: skip

    def answered(log):
        return (tmp_path / log).read_text().split()

    server, port = serve(tmp_path, "whole.log")
    done = start(tmp_path, words(port), "whole")
    assert done.wait(300) == 0, done.stderr.read()
    server.kill()
    server, port = serve(tmp_path, "cut.log")
    running = start(tmp_path, words(port), "cut")
    while len(answered("cut.log")) < 20 and running.poll() is None:
        time.sleep(0.01)
    server.kill()
    server.wait()
    before = len(answered("cut.log"))
    if attempts == 2:
        assert running.wait(300) == 1 and "endpoint does not answer" in running.stderr.read()
    else:
        time.sleep(2.0)
        assert running.poll() is None
    server, _ = serve(tmp_path, "cut.log", port)
    if attempts == 2:
        running = start(tmp_path, words(port), "cut")
    assert running.wait(300) == 0, running.stderr.read()
    server.kill()
    server.wait()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    needed, got = answered("whole.log"), answered("cut.log")
    assert 20 <= before < len(needed) and len(set(got)) == len(got) and set(got) <= set(needed)
    shards = (tmp_path / "cache-cut").rglob("requests/*/*.jsonl")
    assert sum(len(shard.read_bytes().splitlines()) for shard in shards) == len(needed)
    print(f"{before} of {len(needed)} answers before the kill, {len(got) - before} after it, none twice")


# ---------------------------------------------------------------- an endpoint that misbehaves

FAULTS = {
    "429 with Retry-After": (429, {"Retry-After": "0.05"}, b"slow down"),
    "500": (500, {}, b"oops"),
    "dropped": "drop",
    "cut stream": "cut",
    "hangs": "hang",
    "malformed JSON": (200, {}, b"{ not json"),
    "wrong schema": (200, {}, b'{"choices": 7}'),
    "no choice": (200, {}, b'{"choices": []}'),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_passing_faults_are_tried_again_and_nothing_is_lost(job, endpoint, fault):
    whole = contents(job(*endpoint.words, "cache=false", output="whole"))
    endpoint.fault = lambda body, count: fault if count == 1 and hash(str(body)) % 3 == 0 else None
    endpoint.asked = {}
    folder = job(*endpoint.words, "cache=false", "engine.timeout=0.6", output="faulty")
    assert contents(folder) == whole
    assert json.loads((folder / "cost.json").read_text())["retries"] > 0


def test_requests_that_are_refused_are_counted(job, endpoint):
    endpoint.fault = lambda body, count: (400, {}, b"too long") if "Amber Road 1 " in str(body) else None
    folder = job(*endpoint.words)
    assert [(r["stage"], r["reason"]) for r in read(folder, "rejected.jsonl")] and len(read(folder)) >= 26
    assert {r["reason"] for r in read(folder, "rejected.jsonl")} == {"the engine gave no answer"}


def test_answers_that_are_no_dialogue_are_counted(job, endpoint, monkeypatch):
    monkeypatch.setitem(globals(), "scripted", lambda body: "I cannot do that.")
    with pytest.raises(RunError, match="cannot be read"):
        job(*endpoint.words)


def test_an_endpoint_that_stays_down_stops_the_job_and_the_rest_is_kept(job, endpoint):
    def down(body, count):
        return (503, {}, b"maintenance") if len(endpoint.answered) >= 20 else None

    endpoint.fault = down
    before = Handler.do_GET
    try:
        Handler.do_GET = lambda self: self.reply(503, {}, b"")
        with pytest.raises(RunError, match="does not answer"):
            job(*endpoint.words, "engine.attempts=2")
    finally:
        Handler.do_GET = before
    endpoint.fault = lambda body, count: None
    paid = dict(endpoint.answered)
    folder = job(*endpoint.words, "engine.attempts=2")
    assert len(read(folder)) >= 28
    assert not [key for key in paid if endpoint.answered[key] > 1]


def test_a_session_over_an_engine_that_answers_lists():
    from experiments.engines.base import BaseEngine, Result
    from experiments.engines.session import open_session

    class Echo(BaseEngine):
        def _stream(self, requests):
            for i, request in enumerate(requests):
                yield i, [Result(str(request.prompt), None, None, "stop")]

    session = open_session(Echo())
    with pytest.raises(LookupError):
        session.get()
    for word in "abc":
        session.submit(word, Request(prompt=word * 2))
    first = session.get()
    session.submit("d", Request(prompt="dd"))
    got = dict([first, session.get(), session.get(), session.get()])
    assert {tag: r[0].text for tag, r in got.items()} == {c: c * 2 for c in "abcd"}
    assert session.drain() == 0
    session.close()


def test_a_stop_keeps_the_rest_of_a_batch_and_begins_no_other(tmp_path):
    from experiments.engines.cache import CachedEngine
    from experiments.engines.session import open_session
    from experiments.engines.transformers import TransformersEngine
    from experiments.models import Tiny
    from experiments.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    engine = TransformersEngine(Tiny(warm_start=None, max_length=16).new(tokenizer, 0), tokenizer, batch_size=3)
    session = open_session(CachedEngine(engine, tmp_path))
    for k in range(7):
        session.submit(k, Request(prompt="ab=", max_tokens=2, seed=k))
    session.get()
    assert session.drain() == 2
    session.close()
    assert sum(len(shard.read_bytes().splitlines()) for shard in tmp_path.glob("*.jsonl")) == 3


def test_a_live_session_wakes_its_loop_once_for_all_that_gathers(endpoint, monkeypatch):
    from experiments.engines.openai import OpenAIEngine
    from experiments.engines.session import LiveSession

    monkeypatch.setitem(globals(), "scripted", lambda body: body["messages"][0]["content"].upper())
    session, woken = LiveSession(OpenAIEngine(f"http://127.0.0.1:{endpoint.server_port}/v1", "fake")), []
    for words, wakes in (("abc", 1), ("d", 2)):  # after a look it is woken again
        with monkeypatch.context() as patch:
            patch.setattr(session._loop, "call_soon_threadsafe", woken.append)
            for word in words:
                session.submit(word, Request(prompt=word))
        assert len(woken) == wakes
        session._loop.call_soon_threadsafe(woken[-1])
        assert {tag: r[0].text for tag, r in (session.get() for _ in words)} == {c: c.upper() for c in words}
    session.close()


# ---------------------------------------------------------------- what users get wrong


def test_rows_that_cannot_be_used_are_counted(job, tmp_path):
    rows = [triple(1), triple(2) | {"context": []}, triple(4) | {"answer": "Atlantis"}, triple(5) | {"answer": "yes"}]
    rows += [triple(7) | {"answer": "Atlantis", "type": "comparison"}, {"question": "?"}]
    lines = [json.dumps(row) for row in rows]
    lines[3:3] = ["{ not json", "[1, 2]", "", "\x00"]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    folder = job(f"input={tmp_path / 'mixed.jsonl'}")
    assert {row["source_id"] for row in read(folder)} == {"q1", "q5", "q7"}
    reasons = {r["reason"] for r in read(folder, "rejected.jsonl") if r["stage"] == "item"}
    assert reasons == {"a supporting fact is not in the context", "answer not in context", "no answer",
                       "the line is not JSON", "the line is no JSON object"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "error", "says"),
    [
        ("missing.jsonl", None, DataError, "No such data file"),
        ("junk.parquet", b"junk", DataError, "cannot be read"),
        ("junk.jsonl.gz", b"junk", DataError, "cannot be read"),
        ("damaged.jsonl.gz", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 9, DataError, "cannot be read"),
        ("empty.jsonl", b"", ConfigError, "no rows"),
        ("table.xlsx", b"x", DataError, "Unknown kind"),
        ("useless.jsonl", b'{"question": "?"}\n', RunError, "no answer"),
    ],
)
def test_inputs_that_cannot_be_used(job, tmp_path, name, data, error, says):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=says):
        job(f"input={tmp_path / name}")


def test_a_file_that_breaks_off(job, tmp_path):
    whole = gzip.compress("".join(json.dumps(triple(i)) + "\n" for i in range(9)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) - 40])
    with pytest.raises(DataError, match="cannot be read"):
        job(f"input={tmp_path / 'cut.jsonl.gz'}")


@pytest.mark.parametrize(
    "word",
    ["attempts=0", "window=0", "tools.variants=0", "languages=[fr]", "languages=[]", "languages=en",
     "stages.write=engine", "rules=lax",
     "stages.plan=maybe", "tools.theta_c=3", "tools.theta_c=nan", "negatives.theta_b=-1", "conversations=0", "seeed=1"],
)  # fmt: skip
def test_settings_that_cannot_be_right(job, word):
    with pytest.raises(ConfigError):
        job(word)


def test_a_bank_with_clashing_names(job, tmp_path):
    schema = {"name": "look", "description": "d", "parameters": {
        "type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}}  # fmt: skip
    bank = tmp_path / "bank.jsonl"
    bank.write_text("".join(json.dumps({"virtual_tool": t, "tool": schema}) + "\n" for t in ("one", "two")))
    with pytest.raises(DataError, match="Two virtual tools have the name 'look'"):
        job(f"tools.path={bank}")
    for row in ({"tool": 3}, {"virtual_tool": "one", "tool": "{bad json"}):
        bank.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match="cannot be read"):
            job(f"tools.path={bank}")


def test_dense_needs_its_package(job):
    pytest.importorskip("httpx")
    with contextlib.suppress(ImportError):
        import sentence_transformers  # noqa: F401

        pytest.skip("sentence-transformers is installed")
    with pytest.raises(ConfigError, match="sentence-transformers"):
        job("dense=some/model")


def test_real_tools_and_triples(job, data, capfd):
    folder = job(f"input={data / 'multihop_qa' / 'hotpotqa.jsonl.gz'}", "conversations=20",
                 f"tools.path={data / 'toolforge_tools' / 'toolforge_tools.jsonl.gz'}", "languages=[zh]")  # fmt: skip
    assert len(read(folder)) == 20 and "A4, B6, C9, C10, D9, D10" in capfd.readouterr().err
    assert all(set(check(record).values()) == {1} for record in read(folder, "records.jsonl"))


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    """Ten times the rows take no more memory."""
    peaks = []
    for count in (300, 3000):
        write_triples(tmp_path / "triples.jsonl", count)
        code = (
            "import resource, sys; from cli.main import main\n"
            "try: main(sys.argv[1:])\n"
            "except SystemExit: pass\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        line = [sys.executable, "-c", code, "synth-data", f"input={tmp_path / 'triples.jsonl'}",
                f"output={tmp_path / str(count)}", "tools.variants=3"]  # fmt: skip
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] < 1.15 * peaks[0] + 20_000, peaks


# ---------------------------------------------------------------- training on it


def test_held_out_questions_are_replayed(job, tmp_path):
    from experiments.tasks.toolforge import ToolForge

    task = ToolForge(path=str(job()), eval_fraction=0.3)
    train, held = task.rows("train", 0), task.rows("eval", 0)
    questions = [{row.prompt[1]["content"] for row in rows} for rows in (train, held)]
    assert train and held and not questions[0] & questions[1]
    row = held[0]
    assert task.score(row.meta["messages"][-1]["content"], row) == 1.0
    assert task.score(row.meta["messages"][2]["content"], row) == 0.0
    env = task.environment(row)
    schema = row.meta["schemas"][0]
    full = dict.fromkeys(schema["parameters"]["required"], row.answer)
    assert row.answer in env.tools[schema["name"]](**full)
    for bad in ({}, full | {"colour": "red"}):
        with pytest.raises(ValueError, match="parameter"):
            env.tools[schema["name"]](**bad)
    assert {r.meta["messages"][0]["content"][-8:] for r in train} == {"</tools>"}
    (tmp_path / "junk.jsonl").write_text('{"messages": 1, "tools": 2, "mistakes": 3, "shape": 4, "question": "a",'
                                         ' "answer": "b", "documents": 5}\n')  # fmt: skip
    with pytest.raises(DataError, match="no conversation of assay synth-data"):
        ToolForge(path=str(tmp_path / "junk.jsonl")).rows("train", 0)


def test_planted_mistakes_can_be_left_out_of_the_loss(job):
    from experiments.supervised import demonstrated
    from experiments.tasks.toolforge import ToolForge
    from experiments.tokenizers import IGNORED, PRINTABLE, encode, tiny_tokenizer
    from experiments.weights import LoadedModel

    class Model:
        class generation_config:
            eos_token_id = None

    rows = [r for r in ToolForge(path=str(job()), eval_fraction=0).rows("train", 0) if r.meta["mistakes"]]
    loaded: LoadedModel = LoadedModel(Model, tiny_tokenizer(PRINTABLE, chat=True), True, "t")  # type: ignore[arg-type]
    row = rows[0]

    def trained(train_mistakes):
        made = encode(demonstrated([row], train_mistakes)[0], loaded)
        ids = [i for i, label in zip(made["input_ids"], made["labels"], strict=True) if label != IGNORED]
        return "".join(loaded.tokenizer.convert_ids_to_tokens(ids))

    turns = [m["content"] for m in row.meta["messages"] if m["role"] == "assistant"]
    assert trained(True) == "".join(turn + "<eos>" for turn in turns)
    kept = [
        m["content"]
        for i, m in enumerate(row.meta["messages"])
        if m["role"] == "assistant" and i not in row.meta["mistakes"]
    ]
    assert trained(False) == "".join(turn + "<eos>" for turn in kept) and len(kept) < len(turns)


@pytest.mark.slow
def test_trl_trains_on_the_files_as_they_are(job, tmp_path):
    import datasets
    from trl import SFTConfig, SFTTrainer

    from experiments.models import Tiny
    from experiments.tokenizers import tiny_tokenizer

    folder = job("conversations=6")
    tokenizer = tiny_tokenizer(chat=True)
    model = Tiny(chat=True, warm_start=None, max_length=4096).new(tokenizer, 0)
    for file in ("train.parquet", "train.jsonl"):
        kind = "parquet" if file.endswith("parquet") else "json"
        rows = datasets.load_dataset(kind, data_files=str(folder / file), split="train", cache_dir=str(tmp_path / "hf"))
        args = SFTConfig(output_dir=str(tmp_path / "t"), max_steps=1, per_device_train_batch_size=2, max_length=3000,
                         assistant_only_loss=True, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
                         gradient_checkpointing=False)  # fmt: skip
        trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        assert trainer.train().training_loss > 0
