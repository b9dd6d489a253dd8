"""Files of `assay synth-data`: triples read one by one, results appended in order, and where to go on after a kill."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.files import os_errors, write_json
from experiments.tasks.base import first_line, table_files
from methods.errors import DataError, RecordError

READABLE = (".jsonl", ".jsonl.gz", ".parquet")
RECORDS, TRAIN, REJECTED = "records.jsonl", "train.jsonl", "rejected.jsonl"
APPENDED = (RECORDS, TRAIN, REJECTED)
TOOLS, STATE = "tools.jsonl", "state.json"
MADE = (STATE, TOOLS, *APPENDED, "train.parquet", "statistics.json", "README.md", "cost.json")


# ---------------------------------------------------------------- input


def input_files(source: Any) -> list[Path]:
    """The files of `input=`: a path or a list of them; of a folder its tables. Raises DataError."""
    words = [source] if isinstance(source, str) else list(source or [])
    found: list[Path] = []
    for word in words:
        path = Path(str(word)).expanduser()
        files = [f for f in table_files(path) if f.name.endswith(READABLE)] if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            what = "The folder holds no table" if path.is_dir() else "No such data file"
            raise DataError(what, where=f"input={word}", expected="*" + ", *".join(READABLE))
        if bad := [file for file in files if not file.name.endswith(READABLE)]:
            raise DataError("Unknown kind of data file", where=str(bad[0]), expected="*" + ", *".join(READABLE))
        found += files
    if not found:
        raise DataError("No triples were given", where="input", fix="set input=FILE, or 'input=[FILE,FILE]'")
    return found


def measured(files: Sequence[Path]) -> tuple[str, int]:
    """Hash of the files' bytes, and the number of their rows."""
    digest, rows = hashlib.sha256(), 0
    for file in files:
        try:
            with file.open("rb") as data:
                while chunk := data.read(1 << 20):
                    digest.update(chunk)
            rows += _count(file)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError("The data file cannot be read", where=str(file), got=first_line(error)) from error
    return digest.hexdigest(), rows


def _count(file: Path) -> int:
    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return parquet.ParquetFile(file).metadata.num_rows
    with _open(file) as lines:
        return sum(1 for line in lines if line.strip())


def triples(files: Sequence[Path]) -> Iterator[tuple[int, dict | str]]:
    """(number from 0, record) of every row, one at a time; for a row that cannot be read, why, in place of the record.
    Raises DataError for a file that breaks off."""
    number = 0
    for file in files:
        try:
            for record in _parquet(file) if file.suffix == ".parquet" else _lines(file):
                yield number, record
                number += 1
        except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
            raise DataError(
                "The data file breaks off", where=f"{file}, row {number + 1}", got=first_line(error)
            ) from error


def _open(file: Path) -> Any:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _lines(file: Path) -> Iterator[dict | str]:
    with _open(file) as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                yield "the line is not JSON"
                continue
            yield record if isinstance(record, dict) else "the line is no JSON object"


def _parquet(file: Path) -> Iterator[dict]:
    import pyarrow.parquet as parquet

    for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
        yield from batch.to_pylist()


# ---------------------------------------------------------------- output


class Output:
    """The folder of one job: three files that only grow, in the order of the input, and the state to go on from.

    `state["position"]` rows of the input are wholly in the files; what lies behind `state["sizes"]` is cut off when the
    folder is opened. Raises RecordError for a folder of another job and for a file that has lost rows, ConfigError and
    RunError as `files.os_errors`.
    """

    def __init__(self, folder: Path, key: str, fresh: dict[str, Any]) -> None:
        self.folder = folder
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.state = self._state(key) or {"key": key, "finished": False, "position": 0, **fresh}
        sizes = self.state.get("sizes", {})
        if self.finished:
            return
        self.note()  # first of all the folder says whose it is: a stop at any point can go on
        self.files = {}
        for name in APPENDED:
            with os_errors(folder / name):
                file = self.files[name] = (folder / name).open("ab")
                if (found := file.tell()) < sizes.get(name, 0):
                    raise _shorter(folder / name, found, sizes[name])
                file.truncate(sizes.get(name, 0))

    @property
    def finished(self) -> bool:
        return bool(self.state["finished"])

    def _state(self, key: str) -> dict[str, Any] | None:
        file = self.folder / STATE
        if not file.exists():
            if left := remains(self.folder):
                raise _other(self.folder, f"{left[0]} without {STATE}")
            return None
        try:
            state = json.loads(file.read_text())
            found = state["key"]
        except (OSError, ValueError, KeyError, TypeError):
            raise _other(self.folder, f"a {STATE} that cannot be read") from None
        if found != key:
            raise _other(self.folder, "other triples or settings")
        return state

    def write(self, name: str, record: Any) -> None:
        """Appends one JSON line, as text that people can read (no escapes but those that JSON needs)."""
        with os_errors(self.folder / name):
            self.files[name].write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")

    def save(self, **state: Any) -> None:
        """Makes all that was written part of the state. The files reach the disk before the state does."""
        for name, file in self.files.items():
            with os_errors(self.folder / name):
                file.flush()
                os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self.files.items()}
        self.note(**state, sizes=sizes)

    def note(self, **state: Any) -> None:
        """Changes the state, but not what of the files belongs to it."""
        self.state |= json.loads(json.dumps(state))  # a copy: the caller goes on counting
        write_json(self.folder / STATE, self.state)

    def close(self) -> None:
        for file in getattr(self, "files", {}).values():
            file.close()


def remains(folder: Path) -> list[str]:
    """The files of a job, whole or not, that are in a folder."""
    return [name for name in (STATE, TOOLS, *APPENDED) if (folder / name).exists()]


def clear(folder: Path) -> None:
    """Throws away what a job left in a folder, and nothing else. Raises ConfigError and RunError."""
    for name in MADE if remains(folder) else ():
        with os_errors(folder / name):
            (folder / name).unlink(missing_ok=True)


def _shorter(file: Path, got: int, expected: int) -> RecordError:
    return RecordError(
        "A file of this job has lost rows",
        where=str(file),
        got=f"{got} bytes",
        expected=f"at least {expected}, as {STATE} says",
        fix="put the file back, or start again with overwrite=true",
    )


def _other(folder: Path, got: str) -> RecordError:
    return RecordError(
        "This folder holds another job's data",
        where=f"output={folder}",
        got=got,
        fix="give another output=FOLDER, or overwrite=true to throw these files away",
    )


def read_lines(file: Path) -> Iterator[dict]:
    """The records of a file that this module wrote."""
    with file.open("rb") as lines:
        for line in lines:
            yield json.loads(line)


def to_parquet(source: Path, target: Path) -> None:
    """The rows of a training file as parquet, a few hundred at a time, under its name only when whole."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    text, number = arrow.string(), arrow.int64()
    message = arrow.struct([("role", text), ("content", text)])
    passage = arrow.struct([("title", text), ("content", text)])
    lists = {"messages": arrow.list_(message), "mistakes": arrow.list_(number), "documents": arrow.list_(passage)}
    names = ("id", "messages", "tools", "mistakes", "shape", "route", "language", "question", "answer", "type",
             "source_id", "documents")  # fmt: skip
    schema = arrow.schema([(name, lists.get(name, text)) for name in names])
    tmp = target.with_name(f".{target.name}.tmp")
    with os_errors(target):
        with parquet.ParquetWriter(tmp, schema, compression="zstd") as writer:
            batch: list[dict] = []
            for row in read_lines(source):
                batch.append(row)
                if len(batch) == 256:
                    writer.write_table(arrow.Table.from_pylist(batch, schema=schema))
                    batch = []
            if batch:
                writer.write_table(arrow.Table.from_pylist(batch, schema=schema))
        os.replace(tmp, target)
