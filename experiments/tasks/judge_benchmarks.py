"""The judge benchmarks as data: RewardBench v1 and 2, RM-Bench, RMB, LLMBar, and preference pairs of one's own."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.judging.formats import FORMATS, Format, group, read_item
from experiments.judging.pairs import Item
from experiments.seeds import derive
from experiments.tasks.base import first_line, is_hub_id, read_hub, stream_file, table_files
from methods.errors import ConfigError, DataError, nearest


@dataclass
class Benchmark:
    """One benchmark and where its rows are; `stream` reads them twice and holds none but the current one.

    name: a key of `FORMATS`. path: a parquet, jsonl, jsonl.gz, csv or json file, a folder of them, or a hub data set;
    "" is the authors' own hub set. official: the rows must be exactly the published ones, as many in each subset;
    false takes what is there by the same formulas, which is not comparable with published numbers. limit: a sample of
    so many items, drawn by a hash of (seed, subset, id); it is never official.
    After `stream` has begun, `left_out` counts items that no question asks about (tie labels, unreadable labels).
    """

    name: str = "rewardbench"
    path: str = ""
    split: str | None = None
    official: bool = True
    limit: int | None = None
    seed: int = 0
    left_out: Counter = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            hint = nearest(self.name, FORMATS)
            raise ConfigError(
                "There is no such benchmark" + (f"; {hint}" if hint else ""),
                where="benchmark.name",
                got=self.name,
                expected=", ".join(FORMATS),
            )
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise ConfigError(
                "A number of items", where="benchmark.limit", got=self.limit, expected="at least 1, or null"
            )
        if not self.format.rows or self.limit is not None:
            self.official = False

    @property
    def format(self) -> Format:
        return FORMATS[self.name]

    def stream(self) -> Iterator[Item]:
        """The items in the order of the files.

        DataError: no such source, a bad row (with its place), a key that occurs twice, no item that can be asked
        about, and with `official` other row counts than the published ones.
        """
        chosen = self._survey()
        for item in self._items():
            if chosen is None or item.key in chosen:
                yield item

    def _survey(self) -> set[tuple] | None:
        """Checks everything once, before a judge is paid for anything; the keys of the sample, None for all."""
        self.left_out.clear()
        seen: set[tuple] = set()
        counts: Counter = Counter()
        for item in self._items():
            if item.key in seen:
                got = f"id {item.id} twice in subset {item.subset}"
                raise DataError("An item occurs twice", where=self.source, got=got, fix="remove one of the two rows")
            seen.add(item.key)
            counts[group(self.name, item.subset)] += 1
            if not item.comparisons():
                self.left_out[item.meta.get("left_out", "equal grades")] += 1
        if not seen:
            raise DataError(
                "The data file has no rows", where=self.source, fix="set benchmark.path= to a file with rows"
            )
        if sum(self.left_out.values()) == len(seen):
            reasons = ", ".join(f"{count} {why}" for why, count in self.left_out.items())
            raise DataError("No item says which response is better", where=self.source, got=reasons)
        if self.official:
            check_rows(self.name, counts, self.source)
        if self.limit is None:
            return None
        return set(heapq.nsmallest(self.limit, seen, key=lambda key: (derive(self.seed, "sample", *key), key)))

    def _items(self) -> Iterator[Item]:
        for record, where in records(self.source, self.split or self.format.split):
            yield read_item(self.name, record, where)

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every file that the rows come from, by name; {} for a hub data set. DataError."""
        path, found = Path(self.source).expanduser(), {}
        folder = path if path.is_dir() else path.parent
        try:
            for file in _files(path) if path.is_dir() else [path] if path.is_file() else []:
                with file.open("rb") as data:
                    content = hashlib.file_digest(data, "sha256").hexdigest()
                found[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": content}
        except OSError as error:
            raise DataError("The data file cannot be read", where=str(path), got=first_line(error)) from error
        return found

    @property
    def source(self) -> str:
        """The file, folder or hub id that the rows come from."""
        if not self.path and not self.format.hub:
            raise DataError(
                f"The benchmark {self.name} has no data set of its authors on the hub",
                where="benchmark.path",
                fix="set benchmark.path= to a file or folder of it",
            )
        return str(self.path or self.format.hub)


def check_rows(name: str, counts: Mapping[str, int], where: str) -> None:
    """DataError unless the rows by subset (RMB: by group) are as many as published."""
    published = FORMATS[name].rows
    found = {subset: count for subset, count in counts.items() if subset in published}
    wrong = [f"{s}: {found.get(s, 0)} of {n}" for s, n in published.items() if found.get(s, 0) != n]
    if wrong:
        raise DataError(
            f"These are not the published rows of {name}",
            where=where,
            got="; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""),
            fix="give the whole benchmark, or set benchmark.official=false: the same formulas on the rows that are "
            "there, not comparable with published scores",
        )


def records(source: str, split: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    """(record, where it stands) of a file, a folder or a hub data set, one after the other."""
    path = Path(source).expanduser()
    if not path.exists():
        if not is_hub_id(source):
            raise DataError(
                "No such data file", where=source, fix="set benchmark.path= to a file, a folder or a hub id"
            )
        for number, record in enumerate(read_hub(source, split or None, None, "benchmark"), start=1):
            yield record, f"{source}, row {number}"
        return
    files = _files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(
            "The folder holds no table", where=source, expected="parquet, jsonl, jsonl.gz, csv or json files"
        )
    for file in files:
        found = _json(file) if file.suffix == ".json" else stream_file(file)
        for number, record in enumerate(found, start=1):
            yield _named(record, file, number), f"{file}, row {number}"


def _files(folder: Path) -> list[Path]:
    return table_files(folder) or sorted(file for file in folder.rglob("*.json") if file.is_file())


def _json(path: Path) -> Iterator[dict]:
    """The objects of a JSON list: the authors' own form of RM-Bench, RMB and LLMBar. Read as a whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("The data file cannot be read", where=str(path), got=first_line(error)) from error
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        got = type(found).__name__
        raise DataError("The file is no list of objects", where=str(path), got=got, expected='[{"prompt": ...}, ...]')
    yield from found


def _named(record: dict, file: Path, number: int) -> dict:
    # LLMBar's own files have neither: its rows are numbered, its subset is the folder (Adversarial/Neighbor).
    if "output_1" not in record:
        return record
    place = file.parent
    subset = f"Adversarial_{place.name}" if place.parent.name == "Adversarial" else place.name
    return {"id": number - 1, "subset": subset, **record}
