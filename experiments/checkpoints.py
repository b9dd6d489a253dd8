"""Checkpoints that are whole or absent: method state beside TRL's files, a manifest, and an atomic rename.

TRL writes into `checkpoint-<n>`; `seal` adds the state and the manifest and renames the folder to `step_<n>`. So a
`step_*` folder is complete, a `checkpoint-*` folder is the rest of a killed save, and a file changed afterwards is
found by its digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.files import os_errors, write_json
from methods.errors import RecordError

VERSION = 1
_TENSOR = "__tensor__"


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors)}:{path}"  # numbered, because a key may hold a slash
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        if bad := [k for k in value if not isinstance(k, str)]:
            raise TypeError(f"state keys must be strings, got {bad[0]!r} at {path or 'the top'}")
        return {k: _flatten(v, f"{path}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"method state may hold tensors and JSON values, got {type(value).__name__} at {path}")


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value[_TENSOR]] if _TENSOR in value else {k: _restore(v, tensors) for k, v in value.items()}
    return [_restore(v, tensors) for v in value] if isinstance(value, list) else value


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """`state` (nested dicts and lists of tensors and JSON values) as state.json and state.safetensors."""
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, "", tensors)
    with os_errors(folder):
        (folder / "state.json").write_text(json.dumps({"version": VERSION, "state": skeleton}))
        save_file(tensors or {"empty": torch.zeros(1)}, folder / "state.safetensors")


def read_state(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "state.json").read_text())
    if found.get("version") != VERSION:
        raise RecordError(
            "this checkpoint is of another version",
            where=str(folder / "state.json"),
            got=f"version {found.get('version')}",
            expected=f"version {VERSION}",
            fix="use the version of assay that wrote it, or start again with overwrite=true",
        )
    return _restore(found["state"], load_file(folder / "state.safetensors"))


def refuse_other_team(folder: Path, state: dict[str, Any], processes: int) -> None:
    """RecordError for a checkpoint of another number of processes: random streams and shards are one per process."""
    made_by = state.get("processes", 1)
    if made_by != processes:
        raise RecordError(
            "this checkpoint is of another number of processes",
            where=str(folder),
            got=f"{made_by} processes there, {processes} here",
            fix=f"go on with scale.num_processes={made_by}, or start from its weights: model.init=RUN name=...",
        )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def seal(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Completes TRL's `checkpoint-<n>`: state, manifest, rename to `step_<n>`; older ones beyond `keep` go."""
    write_state(folder, state)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "digest": _digest(p)} for p in files}
    write_json(folder / "manifest.json", manifest)
    final = folder.with_name("step_" + folder.name.rpartition("-")[2])
    with os_errors(final):
        if final.exists():
            shutil.rmtree(final)
        os.rename(folder, final)
    for old in all_steps(folder.parent)[:-keep]:
        shutil.rmtree(old)
    return final


def all_steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, verified; leftovers of killed saves are removed. RecordError if damaged."""
    for leftover in folder.glob("checkpoint-*"):
        shutil.rmtree(leftover)
    steps = all_steps(folder)
    if not steps:
        return None
    verify(steps[-1])
    return steps[-1]


def verify(checkpoint: Path) -> None:
    """Compares every file with the manifest; RecordError names the first that differs."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint / "manifest.json", str(error), "a readable manifest") from error
    for name, entry in manifest.items():
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            raise _damaged(path, "no file" if size is None else f"{size} bytes", f"{entry['bytes']} bytes")
        if _digest(path) != entry["digest"]:
            raise _damaged(path, "other content", "the content that was written")


def _damaged(path: Path, got: str, expected: str) -> RecordError:
    return RecordError(
        "a checkpoint is damaged",
        where=str(path),
        got=got,
        expected=expected,
        fix=f"delete {path.parent} to go on from an earlier checkpoint or from the start",
    )
