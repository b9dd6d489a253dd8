"""What a synthesis job needs before its first triple: the engine and its cache, the tool banks, gates and search."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import synthesis_files as files
from experiments.engines.base import Request
from experiments.files import replace
from methods.errors import DataError
from methods.toolforge.bundles import Search, pool_search
from methods.toolforge.domains import DOMAINS
from methods.toolforge.gate import DualGate, Embed
from methods.toolforge.items import Passage
from methods.toolforge.pipeline import Recipe, grow_by_model, without_clashes
from methods.toolforge.shapes import SHAPES
from methods.toolforge.tools import Bank, canonical_tool, template_bank

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.engines.session import Session
    from experiments.signals import StopSignals

VERSION = 2  # raise it with any change that makes other conversations from the same settings
# What does not change a single line of what is written.
NO_MATTER = ("output", "overwrite", "cache", "window", "batch_tokens", "input", "results_dir")
PATIENCE = (
    "concurrency",
    "timeout",
    "deadline",
    "attempts",
    "backoff",
    "prices",
    "batch_size",
    "device",
    "api_key_env",
)
Cost = Callable[[], dict[str, float]]


def job_key(cfg: DictConfig, content: str) -> str:
    """Hash of the triples and of every setting on which the conversations depend. Asks an endpoint for its model if
    none was named, and raises what that raises."""
    from omegaconf import OmegaConf

    from experiments.artefacts import digest

    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain = {key: value for key, value in plain.items() if key not in NO_MATTER}
    engine = plain.get("engine") or {}
    plain["engine"] = {key: value for key, value in engine.items() if key not in PATIENCE} or None
    kind = engine.get("_target_", "").split(".")[-1]
    if kind in ("", "OpenAIEngine"):  # these run no model here
        plain.pop("model", None)
    if kind == "OpenAIEngine" and engine.get("model") is None and model_stages(cfg):
        from experiments.engines.build import build_engine

        plain["engine"]["model"] = build_engine(cfg, None, cache=False).identity()["model"]
    if path := plain["tools"]["path"]:
        plain["tools"]["path"] = files.measured(files.input_files(path))[0]
    return digest({"version": VERSION, "content": content, "settings": json.loads(json.dumps(plain, default=str))})


def open_output(cfg: DictConfig, key: str) -> files.Output:
    """The folder of the job, emptied first where `overwrite` asks for it."""
    folder = Path(str(cfg.output)).expanduser()
    if cfg.overwrite:
        files.clear(folder)
    return files.Output(folder, key, {"turns": {}, "kept": {}, "seen": {}, "cost": {}})


def model_stages(cfg: DictConfig) -> list[str]:
    """The stages that the engine does."""
    return [s for s, how in cfg.stages.items() if how == "engine" or (how == "auto" and cfg.get("engine"))]


@contextlib.contextmanager
def set_up(
    cfg: DictConfig, output: files.Output, own: Bank | None, stop: StopSignals
) -> Iterator[tuple[Recipe, Session | None, Cost]]:
    """The recipe, the session with the engine (None without one), what was paid for so far. `own`: the user's bank.
    KeyboardInterrupt after a stop while a bank is made."""
    from experiments.engines.session import open_session

    stages = model_stages(cfg)
    embed = embedder(cfg)
    gate = _gate(cfg.tools, embed)
    before = dict(output.state.get("cost") or {})
    with contextlib.ExitStack() as stack:
        engine: Any = None
        if stages:
            from experiments.engines.build import build_engine

            engine = stack.enter_context(build_engine(cfg, None, cache=bool(cfg.cache)))
            inner = getattr(engine, "engine", engine)  # below the cache
            if hasattr(inner, "batch_tokens"):
                inner.batch_tokens = cfg.batch_tokens
        session = open_session(engine) if engine is not None else None
        if session is not None:
            stack.callback(session.close)

        def cost() -> dict[str, float]:
            now = engine.cost() if engine is not None else {}
            return {key: before.get(key, 0) + now.get(key, 0) for key in {**before, **now}}

        def leave(kind: type[BaseException] | None, *_: object) -> None:
            if kind is None:
                return
            # What was asked is paid for: let its answers reach the cache, unless the user will not wait.
            if session is not None and not stop.insisted:
                session.drain()
            output.note(cost=cost())

        stack.push(leave)
        banks = dict.fromkeys(cfg.languages, own) if own else {}
        banks = banks or banks_of(cfg, output.folder, gate, session if "tools" in stages else None, stop)
        recipe = Recipe(
            banks,
            model=[stage for stage in stages if stage != "tools"],
            release=cfg.rules == "release",
            gate=_gate(cfg.negatives, embed, free=0),
            search=pool_search if embed is None else lambda pool: fused_search(pool, embed),
            tries=cfg.tries,
            seed=cfg.seed,
        )
        yield recipe, session, cost


def _gate(cfg: DictConfig, embed: Embed | None, free: int = 2) -> DualGate:
    return DualGate(cfg.theta_c, cfg.theta_b, cfg.theta_max, embed, free)


def embedder(cfg: DictConfig) -> Embed | None:
    """Unit vectors of texts by the model of `dense`, each text once; None without one."""
    if cfg.dense is None:
        return None
    import functools

    from experiments.dense import load

    model = load(str(cfg.dense), "synth-data")

    @functools.lru_cache(maxsize=20_000)
    def embed(text: str) -> tuple[float, ...]:
        return tuple(float(x) for x in model.encode([text], normalize_embeddings=True)[0])

    return embed


def fused_search(pool: Sequence[Passage], embed: Embed) -> Search:
    """BM25 and cosine over an item's pool, fused by reciprocal rank."""
    from experiments.retrieval import fuse
    from methods.toolforge.text import cosine

    lexical = pool_search(pool)
    places = {passage.content: i for i, passage in enumerate(pool)}

    def search(query: str, k: int) -> list[Passage]:
        vector = embed(query)
        near = sorted(range(len(pool)), key=lambda i: -cosine(vector, embed(f"{pool[i].title}\n{pool[i].content}")))
        found = fuse([[places[p.content] for p in lexical(query, k)], near[:k]])
        return [pool[i] for i, _ in found[:k]]

    return search


# ---------------------------------------------------------------- tool banks


def banks_of(
    cfg: DictConfig, folder: Path, gate: DualGate, session: Session | None, stop: StopSignals
) -> dict[str, Bank]:
    """The bank of each language, written to `tools.jsonl` when first made and read from there afterwards."""
    target = folder / files.TOOLS
    if not target.exists():
        rows: list[dict] = []
        for language in cfg.languages:
            if session is None:
                bank = template_bank(language, cfg.tools.variants, gate, cfg.seed, cfg.tools.attempts)
            else:
                bank = engine_bank(cfg, language, gate, session, stop)
            rows += [
                {"language": language, "virtual_tool": name, "tool": schema}
                for name, variants in bank.tools.items()
                for schema in variants
            ]
        replace(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    rows = list(files.read_lines(target))
    return {name: Bank.from_rows(row for row in rows if row["language"] == name) for name in cfg.languages}


def own_bank(cfg: DictConfig) -> Bank | None:
    """The user's bank, if one is given; says so where it lacks the general tool. Raises DataError for schemas that are
    none and names that clash."""
    if not cfg.tools.path:
        return None
    bank = Bank.from_rows(_rows(cfg.tools.path))
    if bank.general not in bank.tools:
        lost = ", ".join(shape.name for shape in SHAPES.values() if shape.fallback)
        print(f"{cfg.tools.path} has no tool '{bank.general}': no dialogues of the shapes {lost}", file=sys.stderr)
    return bank


def _rows(path: str) -> Iterator[dict]:
    for number, row in files.triples(files.input_files(path)):
        if isinstance(row, str):
            raise DataError("A row of the tool bank cannot be read", where=f"{path}, row {number + 1}", got=row)
        yield row


def engine_bank(cfg: DictConfig, language: str, gate: DualGate, session: Session, stop: StopSignals) -> Bank:
    """Variants of every tool by the engine, all tools side by side; a tool for which none passes keeps its own self.
    KeyboardInterrupt after a stop."""
    from experiments.synthesis import text_of

    count, attempts = cfg.tools.variants, cfg.tools.attempts * cfg.tools.variants
    canonical = {name: canonical_tool(domain, language) for name, domain in DOMAINS.items()}
    talks = {
        name: grow_by_model(tool, gate, count, attempts, language, i * attempts)
        for i, (name, tool) in enumerate(canonical.items())
    }
    found: dict[str, list] = {}
    rejected: dict[str, int] = {}

    def go_on(name: str, text: str | None) -> None:
        try:
            ask = talks[name].send(text)
        except StopIteration as end:
            found[name], reasons = end.value
            for reason, number in reasons.items():
                rejected[reason] = rejected.get(reason, 0) + number
            return
        request = Request(messages=ask.messages, max_tokens=cfg.max_tokens, temperature=ask.temperature,
                          seed=cfg.seed + ask.seed)  # fmt: skip
        session.submit(name, request)

    for name in talks:
        go_on(name, None)
    while len(found) < len(talks):
        if stop.received is not None:
            raise KeyboardInterrupt(stop.received)
        tag, results = session.get()
        go_on(str(tag), text_of(results))
    tools = {name: found[name] or [canonical[name]] for name in talks}
    made = sum(map(len, found.values()))
    print(f"tool bank ({language}): {made} variants by the engine, rejected: {rejected or 'none'}", file=sys.stderr)
    return Bank(without_clashes(tools))
