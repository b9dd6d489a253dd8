"""Things that take long to make and are shared by many runs: warm starts, converted models, earlier stages.

An artefact is a folder `<cache>/<kind>/<hash>` named by the hash of everything that determines its content.
It is built in a sibling folder under a file lock and appears under its name in one rename, so that a reader
finds a whole artefact or none; what a killed build leaves behind is removed by the next build.
The cache root is `$ASSAY_CACHE`, else `~/.cache/assay`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from methods.errors import ConfigError

KEY_FILE = "artefact.json"
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}
_PATIENCE_S = 2.0  # silent wait for another process before saying so


def cache_root() -> Path:
    """The folder that holds all artefacts; it need not exist yet."""
    return Path(os.environ.get("ASSAY_CACHE") or Path.home() / ".cache" / "assay").expanduser()


def digest(key: Any) -> str:
    """Hash of a JSON value (64 hex digits), independent of the order of its keys; TypeError if it is not JSON."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def artefact(kind: str, key: dict, build: Callable[[Path], None]) -> Path:
    """The folder of the artefact `key` (a JSON object); `build(folder)` fills an empty folder if it does not exist.

    Safe among processes: one builds, the others wait and use its result. An exception in `build` passes through
    and leaves nothing behind. ConfigError if the cache cannot be written.
    """
    from filelock import FileLock, Timeout

    final = cache_root() / kind / digest(key)[:20]
    if _complete(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{final}.lock")
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            print(f"waiting for another process that builds {final}", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise _no_cache(final, error) from error
    with lock:
        if not _complete(final):
            for left in final.parent.glob(f".{final.name}-*"):  # under the lock, so nobody is writing there
                shutil.rmtree(left, ignore_errors=True)
            with atomic_folder(final) as folder:
                build(folder)
                (folder / KEY_FILE).write_text(json.dumps(key, indent=1, sort_keys=True) + "\n")
    return final


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final` that takes its name (and place) at the end, or is removed if the body raises.

    ConfigError if the folder cannot be made or written (no space, no right, a file of that name).
    """
    if final.exists() and not final.is_dir():
        raise _no_cache(final, NotADirectoryError("a file of that name exists"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    except OSError as error:
        raise _no_cache(final, error) from error
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private, but a cache or an export may be shared
        for path in (p for p in folder.rglob("*") if p.is_file()):
            _sync(path)
        if final.exists():  # os.replace cannot replace a folder that is not empty
            old = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
            os.replace(final, old / "old")
            os.replace(folder, final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(folder, final)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if _is_refusal(error):
            raise _no_cache(final, error) from error
        raise


def _is_refusal(error: BaseException) -> bool:
    # safetensors raises its own class, in which only the text tells that the disk refused.
    if type(error).__name__ == "SafetensorError":
        return "os error" in str(error)
    return isinstance(error, OSError) and error.errno in _REFUSALS


def _complete(folder: Path) -> bool:
    return (folder / KEY_FILE).is_file()


def _sync(path: Path) -> None:
    # Without this a power cut after the rename could leave the name of a whole artefact on empty files.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_cache(path: Path, error: BaseException) -> ConfigError:
    return ConfigError(
        "A folder could not be written",
        where=str(path),
        got=getattr(error, "strerror", None) or str(error),
        expected="a place with write permission and free space",
        fix="free some space, or point the environment variable ASSAY_CACHE to another folder",
    )
