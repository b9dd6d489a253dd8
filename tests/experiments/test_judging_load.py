"""`assay judge` at size: flat memory over 10,000 pairs, and an endpoint kept busy. Slow."""

from __future__ import annotations

import json
import subprocess
import sys
import time

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
import asyncio, json

CHOICE = {"message": {"content": "Final Judgment\\nWinner: Response A"}, "finish_reason": "stop"}
BODY = json.dumps({"choices": [CHOICE], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}).encode()
ANSWER = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(BODY) + BODY

async def main():
    gate = asyncio.Semaphore(32)

    async def serve(reader, writer):
        while True:
            try:
                head = await reader.readuntil(b"\\r\\n\\r\\n")
            except asyncio.IncompleteReadError:
                return
            size = next(int(l.split(b":")[1]) for l in head.split(b"\\r\\n") if l.lower().startswith(b"content-length"))
            await reader.readexactly(size)
            async with gate:
                await asyncio.sleep(0.25)
            writer.write(ANSWER)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=64)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@pytest.mark.slow
def test_an_endpoint_is_kept_busy():
    """It admits 32 requests at once, each for 250 ms; it has a process of its own."""
    from experiments.engines.openai import OpenAIEngine
    from experiments.judging import run as running
    from experiments.judging.judges import Direct
    from experiments.judging.pairs import Item, questions

    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        engine = OpenAIEngine(f"http://127.0.0.1:{server.stdout.readline().strip()}/v1", "judge", concurrency=32)
        items = [Item(str(k), "pairs", "all", f"do {k}", ("good", "bad"), (1.0, 0.0)) for k in range(1280)]
        asked = questions(items, 0, "pairs", "seeded")
        began, used = time.monotonic(), time.process_time()
        found = list(running.in_order(Direct(engine, max_tokens=64), asked))
        seconds, used = time.monotonic() - began, time.process_time() - used
    finally:
        server.kill()
        server.wait()
    share = len(found) / seconds / (32 / 0.25)
    print(f"{share:.3f} of the endpoint's capacity, with {used / seconds:.2f} of a core")
    assert share >= 0.95
