"""An endpoint that dies in the middle: eval, judge and synth-data wait, then stop with what is done kept, and go on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cli.compose import compose
from methods.errors import RunError

NO_DIALOGUE = "No conversation passed"
ROOT = Path(__file__).resolve().parents[2]
LETTER = "Final Judgment\nWinner: Response A"


class Server(ThreadingHTTPServer):
    """Answers `lives` requests, then drops the next `dead` connections, `/models` included; then lives on."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, lives: int, dead: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lives, self.dead = lives, dead
        self.answered: Counter[str] = Counter()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def drops(self) -> bool:
        with self.lock:
            if sum(self.answered.values()) < self.lives or self.dead <= 0:
                return False
            self.dead -= 1
            return True

    def handle_error(self, *_: object) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"])).decode()
        text = LETTER if "Final Judgment" in raw else "7 turns, no dialogue"
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        self.reply({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}, raw)

    def reply(self, answer: dict, asked: str = "") -> None:
        if self.server.drops():
            self.close_connection = True
            self.connection.close()
            return
        data = json.dumps(answer).encode()
        if asked:
            with self.server.lock:
                self.server.answered[asked] += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def words(command: str, folder: Path, url: str, *more: str) -> list[str]:
    """The command's words for about 30 requests."""
    line = ["engine=openai", f"engine.url={url}", "engine.attempts=3", "engine.backoff=0.02", "engine.concurrency=2",
            f"results_dir={folder / 'results'}", *more]  # fmt: skip
    if command == "eval":
        return [*line, "task=arithmetic", "eval.items=30", "eval.max_tokens=16"]
    if command == "judge":
        rows = [{"id": k, "prompt": f"do {k}", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(15)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [*line, "benchmark=pairs", f"benchmark.path={folder / 'pairs.jsonl'}", "judge=direct",
                "judge.step=judge", "judge.by.max_tokens=16"]  # fmt: skip
    gold = "The film Amber {k} is a film directed by Lena {k}."
    rows = [{"_id": f"q{k}", "type": "bridge", "question": f"Who directed Amber {k}?", "answer": f"Lena {k}",
             "context": [[f"Amber {k}", [gold.format(k=k)]]], "supporting_facts": [[f"Amber {k}", 0]]}
            for k in range(120)]  # fmt: skip
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*line, f"input={folder / 'triples.jsonl'}", f"output={folder / 'out'}", "tools.variants=2",
            "max_tokens=16", "stages.tools=template", "stages.plan=template", "attempts=1", "window=4"]  # fmt: skip


def job(command: str, line: list[str]) -> Path:
    if command == "eval":
        from experiments.evaluate import run
    elif command == "judge":
        from experiments.judging.run import run
    else:
        from experiments.synthesis import run
    cfg = compose(command.replace("-", "_"), line)
    try:
        return run(cfg)
    except RunError as error:
        if NO_DIALOGUE in str(error):  # what is answered here is none, which the job says at its end
            return Path(cfg.output)
        raise


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "requests"


def kept(cache: Path) -> int:
    return sum(len(file.read_bytes().splitlines()) for file in cache.rglob("*.jsonl"))


COMMANDS = pytest.mark.parametrize("command", ["eval", "judge", "synth-data"])


@COMMANDS
def test_a_short_outage_is_waited_out(command, tmp_path, cache):
    server = Server(lives=6, dead=2)
    line = words(command, tmp_path, f"http://127.0.0.1:{server.server_port}/v1", "engine.attempts=6")
    assert job(command, line).exists()
    assert server.dead <= 0 and set(server.answered.values()) == {1}
    server.shutdown()


@COMMANDS
def test_a_long_outage_stops_the_job_which_then_goes_on(command, tmp_path, cache):
    server = Server(lives=6, dead=float("inf"))
    line = words(command, tmp_path, f"http://127.0.0.1:{server.server_port}/v1")
    for _ in range(2):  # still down at the second start
        with pytest.raises(RunError, match=r"endpoint does not answer.*goes on from what was answered") as error:
            job(command, line)
        assert "\n" not in str(error.value) and kept(cache) == sum(server.answered.values()) >= 6
    server.dead = 0
    assert job(command, line).exists()
    assert len(server.answered) > 12 and set(server.answered.values()) == {1}  # nothing is asked twice
    assert kept(cache) == len(server.answered)
    server.shutdown()


@pytest.mark.slow
def test_a_vllm_server_is_killed_and_started_again(tmp_path, monkeypatch):
    """All three at once against a real server; `make test-vllm` runs it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here; make test-vllm makes an environment for it")
    from experiments.bench_engines import free_port, stop, vllm_server
    from experiments.models import SmolLM2
    from experiments.tasks.base import Task

    monkeypatch.delenv("ASSAY_CACHE")  # the commands have caches of their own, the model is where it always is
    folder, port = SmolLM2().load(Task(name="any"), 0).path, free_port()
    how = ["--dtype", "float32", "--max-model-len", "4096", "--enforce-eager", "--served-model-name", "m"]
    lines = {}
    for command in ("eval", "judge", "synth-data"):
        (tmp_path / command).mkdir()
        lines[command] = words(command, tmp_path / command, f"http://127.0.0.1:{port}/v1", "engine.model=m")

    def start() -> dict[str, subprocess.Popen]:
        return {
            command: subprocess.Popen(
                [sys.executable, "-m", "assay", command, *line], stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                env=os.environ | {"ASSAY_CACHE": str(tmp_path / command / "cache"), "PYTHONPATH": str(ROOT)},
            )
            for command, line in lines.items()
        }  # fmt: skip

    with vllm_server(folder, *how, port=port) as (server, _):
        running = start()
        while any(kept(tmp_path / command / "cache") < 4 and p.poll() is None for command, p in running.items()):
            time.sleep(0.1)
        stop(server)
        said = {command: process.communicate()[1] for command, process in running.items()}
    before = {command: kept(tmp_path / command / "cache") for command in lines}
    for command, process in running.items():
        print(f"{command}: {before[command]} answers kept; {said[command].splitlines()[-1]}")
        assert process.returncode == 1 and "endpoint does not answer" in said[command].splitlines()[-1]
    with vllm_server(folder, *how, port=port):
        again = start()
        said = {command: process.communicate()[1] for command, process in again.items()}
    for command, process in again.items():
        print(f"{command}: {kept(tmp_path / command / 'cache')} answers at the end")
        assert process.returncode == 0 or NO_DIALOGUE in said[command], said[command]
        assert kept(tmp_path / command / "cache") > before[command]
