"""Search and service of the local-life world: python -m experiments.bench_local_life [index] [serve], by default both.

index   building and searching 1,000, 20,000 and 150,000 merchants of three cities: seconds, memory, latency, queries
        per second and recall@20 on plain queries ("city area kind") and on paraphrased ones, whose word for the kind no
        document holds; beside rank-bm25 and tantivy, on the same texts and queries in one run. All engines have one
        index per city. rank-bm25 and tantivy are no dependencies: what is not installed is skipped, and named.
serve   `assay playground` on loopback, asked by 64 clients for 60 s; every answer is compared with that of the tool in
        this process.

Options: --sizes 1000,20000  --queries 300  --clients 64  --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from experiments.tasks.local_life.world import World

SIZES = (1_000, 20_000, 150_000)
TOP = 20
ENGINES = ("bm25s", "tantivy", "rank-bm25")
SLOW = 40  # queries of rank-bm25 at 150,000 merchants, which takes most of a second each
Query = tuple[str, str, frozenset[str]]  # text, city, relevant ids


# ---------------------------------------------------------------- questions with known answers


def queries(world: World, count: int, seed: int = 0) -> dict[str, list[Query]]:
    """Plain and paraphrased queries, each with the merchants of that area and kind."""
    from experiments.tasks.local_life.catalogue import CATALOGUE

    table = world.merchants
    groups = table.groupby(["city", "business_area", "subcategory"], sort=False)["poi_id"].agg(frozenset)
    found: Any = groups.items()
    kept = [(*key, ids) for key, ids in found if len(ids) >= 3]
    chosen = random.Random(seed).sample(kept, min(count, len(kept)))
    synonyms = {kind.name.of(world.language): kind.synonyms[0].of(world.language) for kind in CATALOGUE.kinds}
    plain = [(f"{city} {area} {kind}", city, ids) for city, area, kind, ids in chosen]
    other = [(f"{city} {area} {synonyms[kind]}", city, ids) for city, area, kind, ids in chosen]
    return {"plain": plain, "paraphrased": other}


def recall(found: Sequence[Sequence[str]], asked: Sequence[Query]) -> float:
    """Mean of the relevant merchants among the first 20, over the most that 20 places can hold."""
    shares = [
        len(set(ids[:TOP]) & right) / min(TOP, len(right)) for ids, (_, _, right) in zip(found, asked, strict=True)
    ]
    return statistics.mean(shares)


# ---------------------------------------------------------------- engines


def bm25s_engine(world: World) -> Callable[[str, str], list[str]]:
    """Ours: the index of the playground, built anew and memory-mapped."""
    from experiments.tasks.local_life.playground import Playground

    ground = Playground(world, retrieve=100, show=TOP)
    ground.prepare()
    return lambda text, city: ground.rank(text, TOP, city)


def rank_bm25_engine(world: World) -> Callable[[str, str], list[str]]:
    import numpy as np
    from rank_bm25 import BM25Okapi  # pyright: ignore[reportMissingImports]

    from experiments.retrieval import tokens

    parts = {}
    for city in world.cities:
        ids, texts = zip(*world.documents(city), strict=True)
        parts[city] = (ids, BM25Okapi([tokens(text) for text in texts]))

    def search(text: str, city: str) -> list[str]:
        ids, index = parts[city]
        scores = index.get_scores(tokens(text))
        return [ids[i] for i in np.argsort(-scores, kind="stable")[:TOP] if scores[i] > 0]

    return search


def tantivy_engine(world: World) -> Callable[[str, str], list[str]]:
    import tantivy  # pyright: ignore[reportMissingImports]

    from experiments.retrieval import tokens

    parts = {}
    for city in world.cities:
        schema = tantivy.SchemaBuilder()
        schema.add_text_field("poi_id", stored=True, tokenizer_name="raw")
        schema.add_text_field("text", stored=False, tokenizer_name="whitespace")
        index = tantivy.Index(schema.build())
        writer = index.writer(heap_size=128_000_000, num_threads=1)
        for poi_id, text in world.documents(city):
            writer.add_document(tantivy.Document(poi_id=poi_id, text=" ".join(tokens(text))))
        writer.commit()
        writer.wait_merging_threads()
        index.reload()
        parts[city] = (index, index.searcher())

    def search(text: str, city: str) -> list[str]:
        index, searcher = parts[city]
        asked, _ = index.parse_query_lenient(" ".join(tokens(text)), ["text"])
        return [searcher.doc(place)["poi_id"][0] for _, place in searcher.search(asked, TOP).hits]

    return search


BUILD = {"bm25s": bm25s_engine, "rank-bm25": rank_bm25_engine, "tantivy": tantivy_engine}


# ---------------------------------------------------------------- one measurement, in a process of its own


def measure(engine: str, size: int, count: int) -> dict[str, Any]:
    """Figures of one engine at one size. Memory: what building and searching add to the process's peak, in MB."""
    from experiments.tasks.local_life.generate import generated

    world = generated(0, size)
    for city in world.cities:
        world.documents(city)
    asked = queries(world, count if engine != "rank-bm25" or size < 100_000 else min(count, SLOW))
    before, began = peak(), time.process_time()
    try:
        search = BUILD[engine](world)
    except ImportError as error:
        return {"engine": engine, "size": size, "skipped": str(error)}
    values: dict[str, Any] = {"engine": engine, "size": size, "build": time.process_time() - began}
    for name, some in asked.items():
        wall, cpu, found = [], [], []
        for text, city, _ in some:
            start, used = time.perf_counter(), time.process_time()
            found.append(search(text, city))
            cpu.append(time.process_time() - used)
            wall.append(time.perf_counter() - start)
        if name == "plain":
            values |= {"p50": quantile(cpu, 0.5), "p99": quantile(cpu, 0.99), "per_second": len(cpu) / sum(cpu)}
            values |= {"wall_p50": quantile(wall, 0.5), "wall_p99": quantile(wall, 0.99), "queries": len(wall)}
        values[f"recall_{name}"] = recall(found, some)
    return values | {"memory": peak() - before}


def quantile(seconds: Sequence[float], q: float) -> float:
    return sorted(seconds)[int(q * (len(seconds) - 1))]


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def index(sizes: Sequence[int], count: int) -> None:
    print("index and search, one index per city, three cities; times of the processor, and of the clock in brackets;")
    print("recall@20 over the merchants of that area and kind")
    print(f"  {'engine':<10}{'merchants':>10}{'build s':>9}{'MB':>7}{'p50 ms':>17}{'p99 ms':>18}{'1/s':>8}"
          f"{'plain':>8}{'paraphrased':>13}{'queries':>9}")  # fmt: skip
    for size in sizes:
        for engine in ENGINES:
            got = elsewhere("measure", engine, str(size), str(count))
            if "skipped" in got:
                print(f"  {engine:<10}{size:>10}  skipped: {got['skipped']}")
                continue
            p50, p99 = (f"{1000 * got[k]:.2f} ({1000 * got['wall_' + k]:.2f})" for k in ("p50", "p99"))
            print(f"  {engine:<10}{size:>10}{got['build']:>9.2f}{got['memory']:>7.0f}{p50:>17}{p99:>18}"
                  f"{got['per_second']:>8.0f}{got['recall_plain']:>8.3f}{got['recall_paraphrased']:>13.3f}"
                  f"{got['queries']:>9}", flush=True)  # fmt: skip


def elsewhere(*words: str) -> dict[str, Any]:
    """A measurement in a fresh process with a fresh cache, so that no engine inherits another's memory or index."""
    with tempfile.TemporaryDirectory() as cache:
        line = [sys.executable, "-m", "experiments.bench_local_life", *words]
        done = subprocess.run(line, env=os.environ | {"ASSAY_CACHE": cache}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the service under load


def serve(size: int, clients: int, seconds: float) -> None:
    """Starts the service on a free port of this machine, asks it, and compares every answer."""
    from experiments.tasks.local_life.generate import generated
    from experiments.tasks.local_life.playground import Playground

    words = ["playground", "--port", "0", "--rate", "0", f"task.size={size}"]
    words += ["task.world_seeds={train: 8, eval: 0, test: 9}"]
    ground = Playground(generated(0, size))
    asked = [(text, city) for some in queries(ground.world, 200).values() for text, city, _ in some]
    right = {ask: [[poi, round(s, 6)] for poi, s in ground.search(*ask)] for ask in asked}
    server = subprocess.Popen(
        [sys.executable, "-c", "from assay import main; main()", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        first = (server.stdout.readline() if server.stdout else "") or ""
        address = re.search(r"http://127\.0\.0\.1:\d+", first)
        if address is None:
            raise SystemExit(f"the service did not start: {first}")
        before = spent(server.pid)
        latencies, wrong, errors = asyncio.run(load(address.group(), asked, right, clients, seconds))
        used = spent(server.pid) - before
    finally:
        server.terminate()
        server.wait(20)
    if not latencies:
        raise SystemExit(f"no answer at all; {errors} errors")
    p50, p99 = (1000 * quantile(latencies, q) for q in (0.5, 0.99))
    print(f"service, {size} merchants, {clients} clients for {seconds:g} s on loopback: {len(latencies)} answers, "
          f"{len(latencies) / seconds:.0f} per second, {errors} errors, {wrong} unlike the tool in process, "
          f"p50 {p50:.0f} ms, p99 {p99:.0f} ms; {1000 * used / len(latencies):.1f} ms of processor time per answer, "
          f"load average {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores")  # fmt: skip


def spent(pid: int) -> float:
    """Seconds of processor time that a process has used; NaN where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(url: str, asked: Sequence[tuple[str, str]], right: dict, clients: int, seconds: float):
    """(latencies, answers unlike the right ones, errors) of clients that ask one request after the other."""
    import httpx

    latencies: list[float] = []
    bad = {"wrong": 0, "errors": 0}
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=60) as session:
            while time.perf_counter() < end:
                query, city = rng.choice(asked)
                start = time.perf_counter()
                try:
                    reply = await session.post("/search", json={"query": query, "city": city})
                except httpx.HTTPError:
                    bad["errors"] += 1
                    continue
                latencies.append(time.perf_counter() - start)
                if reply.status_code != 200:
                    bad["errors"] += 1
                else:
                    found = [[r["poi_id"], r["similarity"]] for r in reply.json()["results"]]
                    bad["wrong"] += found != right[query, city]

    await asyncio.gather(*(client(i) for i in range(clients)))
    return latencies, bad["wrong"], bad["errors"]


def main(words: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["measure"]:  # a child of `index`
        print(json.dumps(measure(words[1], int(words[2]), int(words[3]))))
        return
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_local_life", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("part", nargs="*", help="index, serve; default: both")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="merchants of `index`")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--size", type=int, default=20_000, help="merchants of `serve`")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args(words)
    parts = args.part or ["index", "serve"]
    if set(parts) - {"index", "serve"}:
        parser.error(f"there are the parts index and serve, not {', '.join(parts)}")
    if "index" in parts:
        index([int(size) for size in args.sizes.split(",")], args.queries)
    if "serve" in parts:
        serve(args.size, args.clients, args.seconds)


if __name__ == "__main__":
    main()
