"""What a record says about the machine and the code that made it. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = (
    *("accelerate", "datasets", "hydra-core", "math-verify", "numpy", "pandas", "peft", "pyarrow", "reasoning-gym"),
    *("safetensors", "scipy", "tokenizers", "torch", "transformers", "trl", "vllm"),
)


def environment() -> dict:
    """Versions, commit and dirty flag, processor, cores, threads, GPU; null where something cannot be known."""
    commit, dirty = _git()
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit,
        "dirty": dirty,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        **_torch(),
    }


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> dict:
    torch = sys.modules.get("torch")  # never imported from here: `assay report` and `assay ls` must stay quick
    if torch is None or not hasattr(torch, "get_num_threads"):
        return {"torch_threads": None, "gpu": None}
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"torch_threads": torch.get_num_threads(), "gpu": gpu}


def _cpu() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


@cache
def _git() -> tuple[str | None, bool | None]:
    """Commit of the clone this file lies in and whether it has changes outside results/; (None, None) outside one.

    An installed copy may sit inside somebody else's repository, whose commit would be a lie: the top folder must be
    the one that holds the three packages.
    """
    root = Path(__file__).resolve().parent.parent
    if _run_git(root, "rev-parse", "--show-toplevel") != str(root):
        return None, None
    changes = _run_git(root, "status", "--porcelain", "--", ".", ":!results")
    return _run_git(root, "rev-parse", "--verify", "HEAD"), None if changes is None else bool(changes)


def _run_git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
