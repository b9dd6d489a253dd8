"""Graph memories on disk: one safetensors file with the texts as JSON in it; GraphML for other programs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.files import os_errors, replace
from methods.errors import ConfigError, DataError
from methods.graph_memory.graph import Memory, memory_of, state_of
from methods.graph_memory.induction import merge

if TYPE_CHECKING:
    import networkx

FORMAT, VERSION = "assay graph memory", "1"
TEXTS = "texts"  # the JSON part, as bytes: the header of safetensors is limited in length


def save(memory: Memory, path: str | Path) -> Path:
    """Writes the memory as one file, atomically: what was there before stays until the new file is whole."""
    import torch
    from safetensors.torch import save as to_bytes

    tensors: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for name, value in state_of(memory).items():
        parts = {f"{name}.{k}": x for k, x in value.items()} if isinstance(value, dict) else {name: value}
        for key, x in parts.items():
            (tensors if isinstance(x, torch.Tensor) else texts)[key] = x
    written = json.dumps(texts).encode()
    tensors[TEXTS] = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    return _put(path, to_bytes(tensors, metadata={"format": FORMAT, "version": VERSION}))


def load(path: str | Path) -> Memory:
    """The memory in a file. DataError for a file that is missing, cut, of another kind or version, or inconsistent."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise DataError("There is no memory file", where=str(path), fix="make one with `assay memory RUN --out FILE`")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f"{path.stat().st_size} bytes, {error}") from error
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        got = f"{about.get('format', 'no format')}, version {about.get('version', 'none')}"
        raise DataError("This is no memory file", where=str(path), got=got, expected=f"{FORMAT}, version {VERSION}")
    try:
        state: dict[str, Any] = json.loads(bytes(tensors.pop(TEXTS).tolist()))
        for key, x in tensors.items():
            name, _, column = key.partition(".")
            if column:
                state.setdefault(name, {})[column] = x
            else:
                state[name] = x
        return memory_of(state)
    except DataError as error:
        raise _damaged(path, f"{error.what}: {error.got}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _damaged(path: Path, got: str) -> DataError:
    fix = "take an older copy, or write it again with `assay memory RUN --out FILE`"
    return DataError("A memory file is damaged", where=str(path), got=got, fix=fix)


def find(target: str, seed: int = 0, results_dir: str | Path = "results") -> Memory:
    """The memory of a file, or of a run (a folder, or experiment/arm). DataError where the run has none."""
    from experiments import checkpoints
    from experiments.weights import find_init

    if Path(target).is_file() or target.endswith(".safetensors"):
        return load(target)
    try:
        folder = find_init(target, seed, results_dir)
    except ConfigError as error:
        raise ConfigError(
            "There is no such run or memory file", where="assay memory", got=target, expected=error.expected
        ) from None
    methods = {}
    if (folder / "state.json").is_file():
        methods = checkpoints.read_state(folder)["trainer"].get("stack", {}).get("methods", {})
    if "graph_memory" not in methods:
        raise DataError(
            "This run has no graph memory",
            where=str(folder),
            got=", ".join(methods) or "no methods",
            fix="name a run with method=graph_memory, such as one with objective=graph_weights",
        )
    return memory_of(methods["graph_memory"]["memory"])


def find_all(targets: Sequence[str], seed: int = 0, results_dir: str | Path = "results") -> Memory:
    """The memories of all targets, merged."""
    memory = find(targets[0], seed, results_dir)
    for target in targets[1:]:
        memory = merge(memory, find(target, seed, results_dir))
    return memory


def graph_of(memory: Memory) -> networkx.DiGraph:
    """The memory as a directed graph: nodes q0..., t0..., m0... with their texts, edges with weights and counts."""
    import networkx

    graph = networkx.DiGraph()
    asked = enumerate(map(_in_xml, memory.questions))
    graph.add_nodes_from((f"q{i}", {"layer": "question", "text": text}) for i, text in asked)
    graph.add_nodes_from((f"t{i}", {"layer": "path", "text": " > ".join(p)}) for i, p in enumerate(memory.paths))
    for i, s in enumerate(memory.strategies):
        known = {"kind": s.kind, "confidence": s.confidence, "support": s.support, "contradictions": s.contradictions}
        graph.add_node(f"m{i}", layer="strategy", text=_in_xml(s.text), **known)
    for edges, source, target in ((memory.to_paths, "q", "t"), (memory.to_strategies, "t", "m")):
        columns = (edges.source_E, edges.target_E, edges.weight_E, *edges.count_E2.T)
        for i, j, weight, won, lost in zip(*(c.tolist() for c in columns), strict=True):
            graph.add_edge(f"{source}{i}", f"{target}{j}", weight=weight, successes=won, failures=lost)
    return graph


def write_graphml(memory: Memory, path: str | Path) -> Path:
    """For Gephi, yEd, Cytoscape and networkx."""
    import networkx

    buffer = io.BytesIO()
    networkx.write_graphml(graph_of(memory), buffer)
    return _put(path, buffer.getvalue())


def _put(path: str | Path, data: bytes) -> Path:
    path = Path(path)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, data)
    return path


def _in_xml(text: str) -> str:
    """Without what XML cannot hold: control characters and lone surrogates."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "?", text)
