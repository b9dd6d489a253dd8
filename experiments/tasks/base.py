"""What a task is, and reading rows from files and the hub."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from experiments.seeds import derive
from experiments.tools import Tools
from methods.errors import DataError, nearest

if TYPE_CHECKING:
    from methods.base import Trajectory

T = TypeVar("T")
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".csv")


@dataclass(frozen=True)
class Row:
    """One item. `id` is unique within a split; `answer` is a JSON value; `demo` is a demonstration completion."""

    id: str
    prompt: str | list[dict]
    answer: Any
    tier: str = "all"
    demo: str | None = None
    documents: tuple[str, ...] = ()
    meta: dict = field(default_factory=dict)


@dataclass
class Task:
    """Base of all tasks; a task's fields are the keys of its YAML.

    `episodes_by` names a method without which its episodes cannot run, in training or evaluation ("": none).
    `symbols` is the vocabulary of `model=tiny` (None: printable ASCII). `max_prompt_tokens` and
    `max_completion_tokens` are budgets. `tiers` names the difficulty tiers, easy first; tasks that read their
    tiers from data fill it when `rows` is called.
    """

    episodes_by: ClassVar[str] = ""

    name: str = "task"
    symbols: tuple[str, ...] | None = None
    max_prompt_tokens: int = 512
    max_completion_tokens: int = 256
    tiers: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        for item in fields(self):
            setattr(self, item.name, plain(getattr(self, item.name)))
        self.tiers = tuple(self.tiers)
        self.symbols = None if self.symbols is None else tuple(self.symbols)

    def rows(self, split: str, seed: int) -> list[Row]:
        """Rows of `train`, `eval` or `test`; the same seed gives the same rows. Raises DataError for bad input."""
        raise NotImplementedError

    def warm_rows(self, seed: int) -> list[Row]:
        """Rows whose `demo` a tiny model is warm-started on; by default the training rows and their demonstrations."""
        return self.rows("train", seed)

    def score(self, text: str, row: Row) -> float:
        """Outcome reward in [0, 1]; the gold answer scores 1."""
        raise NotImplementedError

    @property
    def left_out(self) -> dict[str, int]:
        """Rows of the source that this task cannot score, by name, once `rows` was called; tables name them."""
        return {}

    @property
    def tools(self) -> Tools | None:
        """How episodes with tools run; None for a task that is one answer."""
        return None

    def environment(self, row: Row) -> Any:
        """What one rollout acts on, made anew for each: an object with `tools`, callables by name."""
        return None

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        """Further named values of one completion; every row of a task gives the same names."""
        return {}

    def episode_metrics(self, traj: Trajectory, row: Row) -> dict[str, float]:
        """Further named values of one rollout with tools, from its turns; every row of a task gives the same names."""
        return {}

    def measure(self, trajs: Sequence[Trajectory]) -> list[dict[str, float]]:
        """`episode_metrics` of all rollouts of an evaluation; a task that asks a judge about them asks together."""
        return [self.episode_metrics(traj, traj.row) for traj in trajs]


def plain(value: Any) -> Any:
    """Lists and dicts in place of OmegaConf containers; any other value unchanged."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple)):
        return [plain(item) for item in value]
    return value


def shuffled(rows: Iterable[T], seed: int, *names: str | int) -> list[T]:
    """A new list in the order fixed by `seed` and `names`."""
    rows = list(rows)
    random.Random(derive(seed, "shuffle", *names)).shuffle(rows)
    return rows


def bucket(text: str, count: int) -> int:
    """The bucket of `text` in [0, count): the same on every machine and for every seed, so splits by it never mix."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % count


def tier_order(tiers: Iterable[str], first: Sequence[str] = ()) -> tuple[str, ...]:
    """The tiers that occur: those of `first` in its order, then the rest by their text and numbers."""
    found = set(tiers)
    rest = sorted(
        found - set(first), key=lambda t: [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", t)]
    )
    return tuple(t for t in first if t in found) + tuple(rest)


def is_hub_id(source: str) -> bool:
    """Whether `source` names a hub data set (`owner/name`) and no file or folder of that name exists here."""
    shape = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is not None
    return shape and not source.endswith(SUFFIXES) and not Path(source).exists()


def split_files(folder: Path, split: str) -> list[Path]:
    """Table files below `folder` with the word `split` in their path, such as `main/train-00000-of-00001.parquet`."""
    return [f for f in table_files(folder) if split in re.split(r"[\W_]+", str(f.relative_to(folder)).lower())]


def table_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name.endswith(SUFFIXES))


def read_table(
    source: str,
    split: str | None = None,
    columns: Sequence[str] = (),
    where: Mapping[str, Any] | None = None,
    *,
    subset: str | None = None,
    key: str = "task",
) -> list[dict]:
    """Records of a parquet, jsonl, jsonl.gz or csv file, a folder of such files, or a hub data set.

    `split` chooses the hub's split, or in a folder the files named after it (all files if none is); a single file
    has no splits. `where` keeps records whose column equals a value or one of a list, compared as text.
    `subset` is the hub's configuration name and `key` the config group that error texts name (`task`, `suite.arc_c`).
    Raises DataError: no such source, unreadable or empty file, bad line, missing column, nothing left after `where`.
    """
    path = Path(source).expanduser()
    if not source:
        raise DataError("No data file was given", where=f"{key}.path", fix=f"set {key}.path=FILE, a folder or a hub id")
    if path.is_dir():
        files = (split_files(path, split) if split else []) or table_files(path)
        if not files:
            raise DataError("The folder holds no table", where=source, expected="files named *" + ", *".join(SUFFIXES))
        records = [record for file in files for record in read_file(file)]
    elif path.exists():
        records = read_file(path)
    elif is_hub_id(source):
        records = read_hub(source, split, subset, key)
    else:
        raise DataError("No such data file", where=source, fix=f"set {key}.path= to a file, a folder or a hub id")
    if not records:
        raise DataError("The data file has no rows", where=source, fix=f"set {key}.path= to a file with rows")
    return filtered(records, columns, where or {}, source, key)


def filtered(records: list[dict], columns: Sequence[str], where: Mapping, source: str, key: str) -> list[dict]:
    """The records that match `where`, after a check that all `columns` exist. Raises DataError."""
    found = columns_of(records)
    for column in (*columns, *where):
        if column not in found:
            raise missing_column(column, found, source, key)
    for column, wanted in where.items():
        accept = {str(v) for v in (wanted if isinstance(wanted, (list, tuple)) else [wanted])}
        kept = [r for r in records if str(r.get(column)) in accept]
        if not kept:
            values = sorted({str(r.get(column)) for r in records})
            shown = ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")
            raise DataError(
                f"No row has {column} = {' or '.join(sorted(accept))}",
                where=f"{source}, column '{column}'",
                got=shown,
                fix=f"choose one of these values in {key}.where or {key}.splits",
            )
        records = kept
    return records


def columns_of(records: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def missing_column(column: str, found: Sequence[str], source: str, key: str) -> DataError:
    hint = nearest(column, found)
    return DataError(
        f"The data has no column '{column}'" + (f" ({hint})" if hint else ""),
        where=source,
        got="columns " + ", ".join(found),
        fix=f"name the columns, as in {key}.prompt_column=NAME {key}.answer_column=NAME",
    )


def read_file(path: Path) -> list[dict]:
    """All records of one file, see `stream_file`."""
    return list(stream_file(path))


def stream_file(path: Path) -> Iterator[dict]:
    """The records of one file, one after the other. Raises DataError naming the file, and the line if there is one."""
    if not path.name.endswith(SUFFIXES):
        raise DataError("Unknown kind of data file", where=str(path), expected="*" + ", *".join(SUFFIXES))
    readers: dict[str, Callable[[Path], Iterator[dict]]] = {".parquet": _parquet, ".csv": _csv}
    reader = readers.get(path.suffix, _jsonl)
    try:
        yield from reader(path)
    except DataError:
        raise
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError("The data file cannot be read", where=str(path), got=first_line(error)) from error


def _parquet(path: Path) -> Iterator[dict]:
    import pyarrow.parquet as parquet

    if path.stat().st_size == 0:
        return
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
        yield from batch.to_pylist()


def _csv(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines), start=2):
            if None in record or None in record.values():
                raise DataError("The row has another number of cells than the header", where=f"{path}, row {number}")
            yield record


def _jsonl(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                raise DataError("The line is not JSON", where=f"{path}:{number}", got=str(error)) from error
            if not isinstance(record, dict):
                raise DataError(
                    "The line is no JSON object",
                    where=f"{path}:{number}",
                    got=type(record).__name__,
                    expected='one object per line, such as {"prompt": "2+2=", "answer": "4"}',
                )
            yield record


def read_hub(source: str, split: str | None, subset: str | None, key: str) -> list[dict]:
    """A hub data set as records. Raises DataError when it cannot be had (offline, gated, no such set or split)."""
    import datasets

    try:
        data = datasets.load_dataset(source, subset, split=split or "train")
    except Exception as error:  # datasets raises a dozen kinds here: no network, gated, no such set, subset or split
        gated = "gated" in str(error).lower()
        what = f"The hub data set '{source}' " + ("is gated" if gated else "could not be loaded")
        fix = f"set {key}.path= to a local parquet, jsonl or csv file or a folder of them"
        if gated:
            fix = f"accept its terms on huggingface.co/datasets/{source} and run `hf auth login`, or {fix}"
        raise DataError(
            what,
            where=f"{key}.path={source}, subset {subset or 'default'}, split {split or 'train'}",
            got=first_line(error),
            fix=fix,
        ) from error
    return [dict(record) for record in data]  # type: ignore[union-attr]


def first_line(error: BaseException) -> str:
    """The kind and the first line of an exception's text, without its final full stop."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')[:300]}" if lines else type(error).__name__
