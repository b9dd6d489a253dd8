"""Writing files so that a kill, a full disk or a wrong folder never leaves half of one behind.

Every OSError on the way becomes one paragraph: ConfigError (exit 2) for a place that cannot be written to,
RunError (exit 1) for a write that failed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from methods.errors import AssayError, ConfigError, RunError

_WRONG_PLACE = {errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR}
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_MAKE_ROOM = "free some space or raise the file size limit, then run the same line again to go on"
# What safetensors and torch say of a full disk, as errors that are no OSError.
_LIBRARIES_SAY = ("No space left on device", "File too large", "PytorchStreamWriter failed")


def clean(obj: Any) -> Any:
    """`obj` as plain JSON values: NaN and infinities become None, numpy and torch scalars numbers, paths strings."""
    if obj is None or isinstance(obj, (bool, int, str)):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {str(key): clean(value) for key, value in obj.items()}
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if hasattr(obj, "tolist"):  # numpy and torch, scalars and arrays alike
        return clean(obj.tolist())
    if isinstance(obj, (set, frozenset)):
        return [clean(value) for value in sorted(obj, key=str)]
    if isinstance(obj, Iterable):
        return [clean(value) for value in obj]
    raise TypeError(f"{type(obj).__name__} cannot be kept in a record")


def _line(obj: Any) -> bytes:
    # ASCII only: a completion may hold lone surrogates, which UTF-8 cannot.
    return json.dumps(clean(obj), allow_nan=False).encode() + b"\n"


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into one paragraph: exit 2 for a wrong place, 1 for a failed write."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error} (errno {error.errno})"
        if error.errno in _WRONG_PLACE:
            fix = "choose a place that can be written to; results_dir=/some/other/folder moves the record of a run"
            raise ConfigError("A file cannot be written", where=str(path), got=reason, fix=fix) from error
        fix = "check the place and the disk, and run the same line again; a run goes on from its last checkpoint"
        if error.errno in _NO_ROOM:
            fix = _MAKE_ROOM
        raise RunError("Writing a file failed", where=str(path), got=reason, fix=fix) from error
    except Exception as error:
        said = " ".join(str(error).split())
        if isinstance(error, AssayError) or not any(sign in said for sign in _LIBRARIES_SAY):
            raise
        raise RunError("Writing a file failed", where=str(path), got=said[:200], fix=_MAKE_ROOM) from error


def replace(path: Path, data: bytes) -> None:
    """Put `data` at `path` as a whole or not at all; what was there before stays on failure."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os_errors(path):
        try:
            with open(tmp, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
        except BaseException:
            with contextlib.suppress(OSError):
                tmp.unlink()
            raise


def append_line(path: Path, obj: Any) -> None:
    """Add one JSON line; a write that fails half-way is taken back."""
    line = memoryview(_line(obj))
    with os_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(fd).st_size
            try:
                while line:
                    line = line[os.write(fd, line) :]
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write `obj` atomically: a temporary file in the same folder, fsync, rename.

    Raises ConfigError for a place that cannot be written to and RunError for a write that fails (no space).
    """
    replace(Path(path), json.dumps(clean(obj), indent=1, allow_nan=False).encode() + b"\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Create `path` with its parents; if the body fails, remove what was new.

    Parents go only while they are empty: a run beside this one may have begun in them meanwhile.
    """
    with os_errors(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if missing:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in missing[1:]:
                    folder.rmdir()
        raise
