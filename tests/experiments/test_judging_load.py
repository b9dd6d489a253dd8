"""`assay judge` at size: flat memory over 10,000 pairs; judge and synth-data keep an endpoint busy. Slow."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request

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


SERVER = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
from test_synthesis import scripted

def answer(body):
    judged = "Final Judgment" in str(body)
    choice = {"message": {"content": "Winner: Response A" if judged else scripted(body)}, "finish_reason": "stop"}
    data = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}).encode()
    return b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(data) + data

async def main():
    gate = asyncio.Semaphore(32)
    loop, times = asyncio.get_running_loop(), []

    async def serve(reader, writer):
        while True:
            try:
                head = await reader.readuntil(b"\\r\\n\\r\\n")
            except asyncio.IncompleteReadError:
                return
            if head.startswith(b"GET"):
                busy = json.dumps([len(times) // 2, max(times) - min(times)]).encode()
                writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(busy) + busy)
                continue
            size = next(int(l.split(b":")[1]) for l in head.split(b"\\r\\n") if l.lower().startswith(b"content-length"))
            body = json.loads(await reader.readexactly(size))
            times.append(loop.time())
            async with gate:
                await asyncio.sleep(0.25)
            times.append(loop.time())
            writer.write(answer(body))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=64)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture
def endpoint():
    """(its address, a function: share of its capacity used between the first request and the last answer).

    It admits 32 requests at once, each for 250 ms, and has a process of its own.
    """
    folder = __file__.rpartition("/")[0]
    server = subprocess.Popen([sys.executable, "-c", SERVER, folder], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"

    def used() -> float:
        with urllib.request.urlopen(url) as said:
            answered, seconds = json.loads(said.read())
        return answered / seconds / (32 / 0.25)

    yield url, used
    server.kill()
    server.wait()


# With as many under way as the server admits, each place stands empty until its next request has come.
BUSY = pytest.mark.parametrize(("concurrency", "least"), [(32, 0.8), (64, 0.95)])


@pytest.mark.slow
@BUSY
def test_judging_keeps_an_endpoint_busy(endpoint, concurrency, least):
    from experiments.engines.openai import OpenAIEngine
    from experiments.judging import run as running
    from experiments.judging.judges import Direct
    from experiments.judging.pairs import Item, questions

    url, share = endpoint
    engine = OpenAIEngine(url, "judge", concurrency=concurrency)
    items = [Item(str(k), "pairs", "all", f"do {k}", ("good", "bad"), (1.0, 0.0)) for k in range(1920)]
    began, used = time.monotonic(), time.process_time()
    found = list(running.in_order(Direct(engine, max_tokens=64), questions(items, 0, "pairs", "seeded")))
    seconds, used = time.monotonic() - began, time.process_time() - used
    print(f"{concurrency} under way: {share():.3f} of the endpoint's capacity, with {used / seconds:.2f} of a core")
    assert len(found) == 1920 and share() >= least


@pytest.mark.slow
@BUSY
def test_synthesis_keeps_an_endpoint_busy(endpoint, concurrency, least, tmp_path, monkeypatch):
    """Beside its own work on each answer, which is several times that of the request. The last triples of the window
    leave slots empty, so there are many."""
    sys.path.insert(0, __file__.rpartition("/")[0])
    from test_synthesis import write_triples

    from cli.compose import compose
    from experiments import synthesis

    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    url, share = endpoint
    line = [f"input={write_triples(tmp_path / 'triples.jsonl', 1500)}", f"output={tmp_path / 'out'}", "engine=openai",
            f"engine.url={url}", "engine.model=fake", f"engine.concurrency={concurrency}", "tools.variants=3",
            "stages.tools=template", "stages.plan=template"]  # fmt: skip
    began, used = time.monotonic(), time.process_time()
    synthesis.run(compose("synth_data", line))
    seconds, used = time.monotonic() - began, time.process_time() - used
    print(f"{concurrency} under way: {share():.3f} of the endpoint's capacity, with {used / seconds:.2f} of a core")
    assert share() >= least
