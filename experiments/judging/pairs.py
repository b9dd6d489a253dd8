"""The types that judges and their benchmarks share: an item, a question about it, a verdict, and their file forms.

A question shows some responses of an item in slots 0, 1, ... (A, B, ... to a judge that reads letters). Two slots are
a pair; a question of form "all" shows every response at once, for judges that score each response or pick from a list.
A verdict names a slot, never a response: what was asked in the other order stays told apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from experiments.files import clean, new_folder, os_errors
from experiments.seeds import derive
from experiments.tasks.base import first_line
from methods.errors import ConfigError, DataError

TIE, UNPARSABLE, FAILED = -1, -2, -3
LISTS_ONLY = ("rewardbench2",)
Form = Literal["pairs", "all"]
Orders = Literal["seeded", "both"]


@dataclass(frozen=True)
class Item:
    """One prompt with its graded responses. (benchmark, subset, id) is unique: ids alone repeat in RewardBench.

    prompt: a text, or the whole conversation as chat messages. responses: the better ones first where the source
    says so. grades: one number per response, higher is better; 1 is chosen and 0 rejected where there are two grades,
    and equal grades are never compared. cluster: items of one cluster share a prompt, so their results depend on
    each other. meta: further JSON values of the source.
    Raises DataError: fewer than two responses, or not one grade each.
    """

    id: str
    benchmark: str
    subset: str
    prompt: str | list[dict[str, str]]
    responses: tuple[str, ...]
    grades: tuple[float, ...]
    cluster: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "responses", tuple(self.responses))
        object.__setattr__(self, "grades", tuple(float(grade) for grade in self.grades))
        object.__setattr__(self, "cluster", self.cluster or self.id)
        if len(self.responses) < 2 or len(self.responses) != len(self.grades):
            raise DataError(
                "An item has at least two responses and one grade for each",
                where=" / ".join(self.key),
                got=f"{len(self.responses)} responses, {len(self.grades)} grades",
            )

    @property
    def key(self) -> tuple[str, str, str]:
        return self.benchmark, self.subset, self.id

    @property
    def lengths(self) -> tuple[int, ...]:
        """Characters of each response."""
        return tuple(map(len, self.responses))

    def comparisons(self) -> list[tuple[int, int]]:
        """(better, worse) response indices of every two responses with different grades."""
        places = range(len(self.grades))
        return [(i, j) for i in places for j in places if self.grades[i] > self.grades[j]]

    def to_json(self) -> dict[str, Any]:
        return clean(vars(self))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Item:
        return cls(**record)


@dataclass(frozen=True)
class Question:
    """Responses `slots` of `item`, in the order in which a judge sees them.

    order: "seeded" where a seed drew the slots, "swapped" for the same question with the slots turned round.
    """

    item: Item
    slots: tuple[int, ...]
    order: Literal["seeded", "swapped"] = "seeded"

    @property
    def key(self) -> tuple:
        """(benchmark, subset, id, slots): unique, whatever the order was called."""
        return (*self.item.key, self.slots)

    @property
    def responses(self) -> tuple[str, ...]:
        return tuple(self.item.responses[k] for k in self.slots)

    @property
    def grades(self) -> tuple[float, ...]:
        return tuple(self.item.grades[k] for k in self.slots)

    @property
    def gold(self) -> int:
        """The slot of the best response, TIE where several share the highest grade."""
        best = max(self.grades)
        return self.grades.index(best) if self.grades.count(best) == 1 else TIE

    def swapped(self) -> Question:
        return Question(self.item, self.slots[::-1], "swapped" if self.order == "seeded" else "seeded")


@dataclass(frozen=True)
class Verdict:
    """What a judge said: the slot it prefers, TIE or UNPARSABLE; FAILED where the request could not be had.

    text: its output, raw. scores: one per slot where the judge is pointwise (NaN: no score could be had); then
    `choice` follows from them, and the benchmarks use the scores. `Verdict.of_scores` fills both.
    """

    question: Question
    choice: int
    text: str = ""
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        slots = len(self.question.slots)
        if not (FAILED <= self.choice < slots) or len(self.scores) not in (0, slots):
            raise ValueError(f"choice {self.choice} and {len(self.scores)} scores for {slots} slots")

    @classmethod
    def of_scores(cls, question: Question, scores: Sequence[float], text: str = "") -> Verdict:
        """The verdict of a pointwise judge: its highest score, TIE where that is shared, UNPARSABLE with a NaN."""
        found = tuple(map(float, scores))
        if any(map(math.isnan, found)):
            return cls(question, UNPARSABLE, text, found)
        best = max(found)
        return cls(question, found.index(best) if found.count(best) == 1 else TIE, text, found)

    def row(self) -> dict[str, Any]:
        """One flat record with all that scoring and plotting need, by slot: `SCHEMA` names the columns."""
        question, item = self.question, self.question.item
        benchmark, subset, name = item.key
        return {
            "benchmark": benchmark,
            "subset": subset,
            "id": name,
            "cluster": item.cluster,
            "order": question.order,
            "slots": list(question.slots),
            "grades": list(question.grades),
            "lengths": [item.lengths[k] for k in question.slots],
            "choice": self.choice,
            "scores": list(self.scores) or None,
            "text": self.text,
        }


@runtime_checkable
class Judge(Protocol):
    """Anything that answers questions: a prompted model, a reward model, a rubric, a rule.

    form: what it wants to be asked: "pairs", or "all" responses of an item at once (pointwise scores, lists).
    """

    name: str
    form: Form

    def judge(self, questions: Sequence[Question]) -> Iterator[Verdict]:
        """One verdict per question, as they are finished, in any order."""
        ...


def questions(items: Iterable[Item], seed: int, form: Form = "pairs", orders: Orders = "both") -> Iterator[Question]:
    """What to ask about `items`, lazily and in their order.

    pairs: every two responses with different grades, in an order drawn from (seed, benchmark, subset, id, responses),
    so neither the order of calls nor a cache changes it; orders "both" adds the same pair swapped, right behind.
    all: one question with all responses, shuffled in the same way, asked once.
    ConfigError for pairs of RewardBench 2, which is scored on lists only: nothing would be worth its calls.
    """
    for item in items:
        if form == "pairs" and item.benchmark in LISTS_ONLY:
            raise ConfigError(
                "This benchmark is asked with all responses at once, and the judge compares pairs",
                where=f"benchmark {item.benchmark}",
                got="a judge of form 'pairs'",
                fix="choose judge=rating or judge=reward_model (a control: judge.by.form=all), or another benchmark",
            )
        if form == "all":
            rng = np.random.default_rng(derive(seed, "slots", *item.key))
            yield Question(item, tuple(int(k) for k in rng.permutation(len(item.responses))))
            continue
        for better, worse in item.comparisons():
            turned = derive(seed, "slots", *item.key, better, worse) % 2
            asked = Question(item, (worse, better) if turned else (better, worse))
            yield asked
            if orders == "both":
                yield asked.swapped()


def ask(judge: Judge, asked: Iterable[Question], batch: int = 1024) -> Iterator[Verdict]:
    """The verdicts on all questions; `batch` of them are in memory at a time."""
    stream = iter(asked)
    while part := list(itertools.islice(stream, batch)):
        yield from judge.judge(part)


# ---------------------------------------------------------------- verdict files

ROW_GROUP = 4096
COLUMNS = ("benchmark", "subset", "id", "cluster", "order", "slots", "grades", "lengths", "choice", "scores", "text")


def schema(meta: Mapping[str, str] | None = None) -> Any:
    """The pyarrow schema of a verdict file, one column of `COLUMNS` each; `meta` (judge, seed) goes into its header."""
    import pyarrow as pa

    kinds = {"choice": pa.int16(), "slots": pa.list_(pa.int16()), "lengths": pa.list_(pa.int32())}
    kinds |= {"grades": pa.list_(pa.float32()), "scores": pa.list_(pa.float64())}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS], metadata=dict(meta or {}))


def write_verdicts(
    path: str | Path, verdicts: Iterable[Verdict | Mapping], meta: Mapping[str, str] | None = None
) -> int:
    """Write verdicts (or their rows) to one parquet file, whole or not at all; how many. Memory holds one row group.

    ConfigError or RunError where the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path, shape, count = Path(path), schema(meta), 0
    part = path.with_name(f".{path.name}.part")
    with new_folder(path.parent), os_errors(path):
        try:
            with parquet.ParquetWriter(part, shape, compression="zstd") as writer:
                # Rows at once: a verdict holds its item, and so the texts of all its responses.
                stream = (v.row() if isinstance(v, Verdict) else dict(v) for v in verdicts)
                while rows := list(itertools.islice(stream, ROW_GROUP)):
                    rows = [{**row, "text": _utf8(row["text"])} for row in rows]
                    writer.write_table(pa.Table.from_pylist(rows, schema=shape))
                    count += len(rows)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return count


def _utf8(text: str) -> str:
    # A model's output may hold lone surrogates, which parquet refuses.
    return text.encode("utf-8", "backslashreplace").decode()


def read_verdicts(path: str | Path, text: bool = False) -> Any:
    """The verdicts of one file as a pyarrow table, without the raw texts unless `text`.

    DataError: no such file, no parquet, a column missing, or no verdict at all.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = Path(path)
    wanted = [name for name in COLUMNS if text or name != "text"]
    try:
        found = parquet.read_schema(path).names
        missing = [name for name in wanted if name not in found]
        if missing:
            raise DataError("The verdict file lacks columns", where=str(path), got=f"no {', '.join(missing)}")
        table = parquet.read_table(path, columns=wanted).cast(schema_of(wanted))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            "The verdict file cannot be read",
            where=str(path),
            got=first_line(error),
            expected="a parquet file that `assay judge` wrote",
        ) from error
    if not table.num_rows:
        raise DataError("The verdict file holds no verdict", where=str(path))
    return table


def judge_of(path: str | Path) -> str:
    """The judge's name in the header of a verdict file, else the file's own name."""
    import pyarrow.parquet as parquet

    named = (parquet.read_schema(path).metadata or {}).get(b"judge", b"").decode("utf-8", "replace")
    return named or Path(path).stem


def schema_of(columns: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.schema([schema().field(name) for name in columns])
