"""`assay judge` at size: flat memory over 10,000 pairs, and an endpoint kept busy. Slow."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

MEMORY = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from cli.compose import compose
from experiments.engines.cache import CachedEngine
from experiments.judging import run as running
from test_judging import Program

root, n = Path(sys.argv[1]), int(sys.argv[2])
class Counting(Program):
    def _stream(self, requests):
        for index, result in super()._stream(requests):
            self.asked.clear()
            yield index, result
with (root / "pairs.jsonl").open("w") as file:
    for k in range(n):
        row = {{"id": k, "prompt": f"do {{k}}", "chosen": f"good {{k}} " + "x" * 2000}}
        row["rejected"] = f"bad {{k}} " + "y" * 2000
        file.write(json.dumps(row) + "\\n")
engine = CachedEngine(Counting(), root / "cache")
running.build_engine = lambda cfg, task: engine
words = ["benchmark=pairs", f"benchmark.path={{root / 'pairs.jsonl'}}", f"results_dir={{root / 'results'}}"]
cfg = compose("judge", [*words, "judge=direct", "judge.step=judge"])
cfg.experiment, cfg.arm = "load", str(n)
path = running.run(cfg)
print(json.dumps({{"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                  "verdicts": json.loads((path / "summary.json").read_text())["metrics"]["verdicts"]}}))
"""


@pytest.mark.slow
def test_ten_thousand_pairs_in_flat_memory(tmp_path):
    found = {}
    for n in (2000, 10000):
        folder = tmp_path / str(n)
        folder.mkdir()
        script = MEMORY.format(tests=__file__.rpartition("/")[0])
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder), str(n)], capture_output=True, text=True, check=True
        )
        found[n] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found[10000]["verdicts"] == 20000
    assert found[10000]["mb"] - found[2000]["mb"] < 60  # the answers alone are 40 MB, the prompts of both orders 80 MB


class Server(BaseHTTPRequestHandler):
    """Admits 32 requests at once, each for 250 ms."""

    protocol_version = "HTTP/1.1"
    gate = threading.Semaphore(32)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.gate:
            time.sleep(0.25)
        choice = {"message": {"content": "Final Judgment\nWinner: Response A"}, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_an_endpoint_is_kept_busy(tmp_path, monkeypatch):
    from experiments.engines.openai import OpenAIEngine
    from experiments.judging import run as running
    from experiments.judging.judges import Direct
    from experiments.judging.pairs import Item, questions

    class Wide(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

    server = Wide(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    engine = OpenAIEngine(f"http://127.0.0.1:{server.server_port}/v1", "judge", concurrency=32)
    items = [Item(str(k), "pairs", "all", f"do {k}", ("good", "bad"), (1.0, 0.0)) for k in range(1280)]
    began = time.monotonic()
    found = list(running.in_order(Direct(engine, max_tokens=64), questions(items, 0, "pairs", "seeded")))
    share = len(found) / (time.monotonic() - began) / (32 / 0.25)
    server.shutdown()
    print(f"{share:.3f} of the endpoint's capacity")
    assert share >= 0.95
