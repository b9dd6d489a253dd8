"""A world with its questions as a folder of parquet files with a data card.

`python -m experiments.tasks.local_life.data FOLDER --seed 3 --size 6000` writes one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.artefacts import atomic_folder
from experiments.tasks.local_life.programs import from_json, to_json
from experiments.tasks.local_life.questions import Question
from experiments.tasks.local_life.world import FIELDS, Event, Page, Place, World, frame
from methods.errors import AssayError, ConfigError, DataError

PARTS = {"places": Place, "events": Event, "facts": Page}
TEXT = ("source", "language", "today")
CARD = """\
---
language: [{language}]
---
# Local-life world

{source}. Every name, address, phone number and price is invented by a program; nothing here describes a real business.

| file | rows | content |
|---|---|---|
| merchants.parquet | {merchants} | one merchant per row, {fields} fields |
| places.parquet | {places} | districts, areas and landmarks with their coordinates in km |
| events.parquet | {events} | events with area, date, start and end |
| facts.parquet | {facts} | pages of the offline web: events, distractors, weather, holidays |
| questions.parquet | {questions} | requests with search path, reference answer, gold ids and the program behind them |

Questions by level: {levels}; by searches that they need: {hops}; by style: {styles}.
`Hop Count`, `Difficulty`, `City`, `Question`, `Multi-hop search path` and `Answer` are LocalSearchBench's columns
(arXiv 2512.07436); the others are ours. Hours are minutes of the day in events, texts in merchants; weekdays count from
Monday = 0, -1 is none. Distances are straight lines.
"""
COLUMNS = {
    "hops": "Hop Count",
    "level": "Difficulty",
    "city": "City",
    "text": "Question",
    "path": "Multi-hop search path",
    "reference": "Answer",
}


def is_world(folder: Path) -> bool:
    return (folder / "merchants.parquet").is_file()


def save(world: World, questions: Sequence[Question], folder: str | Path) -> Path:
    """Writes the folder whole or not at all; the same world gives the same bytes. ConfigError if it is not empty."""
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("The folder is not empty", where=str(target), fix="choose a new folder")
    with atomic_folder(target) as new:
        world.merchants.to_parquet(new / "merchants.parquet", index=False)
        for name, kind in PARTS.items():
            rows = [asdict(item) for item in getattr(world, name)]
            _table(rows, kind).to_parquet(new / f"{name}.parquet", index=False)
        _questions(questions).to_parquet(new / "questions.parquet", index=False)
        pd.DataFrame([{name: getattr(world, name) for name in TEXT}]).to_parquet(new / "world.parquet", index=False)
        (new / "README.md").write_text(card(world, questions), encoding="utf-8")
    return target


def card(world: World, questions: Sequence[Question]) -> str:
    """The data card of a world."""

    def counts(values: Sequence[Any]) -> str:
        return ", ".join(f"{value} {n}" for value, n in sorted(pd.Series(values, dtype=object).value_counts().items()))

    return CARD.format(
        source=world.source[:1].upper() + world.source[1:],
        language=world.language,
        merchants=len(world),
        fields=len(FIELDS),
        **{name: len(getattr(world, name)) for name in PARTS},
        questions=len(questions),
        levels=counts([q.level for q in questions]),
        hops=counts([q.hops for q in questions]),
        styles=counts([q.style for q in questions]),
    )


def load(folder: str | Path) -> tuple[World, list[Question]]:
    """What `save` wrote. DataError for files that are missing, empty or damaged, and as `check_gold`."""
    source = Path(folder).expanduser()
    tables = {name: _read(source / f"{name}.parquet") for name in ("world", "merchants", *PARTS, "questions")}
    try:
        parts: dict[str, Any] = {
            name: [kind(**row) for row in tables[name].to_dict("records")] for name, kind in PARTS.items()
        }
        merchants = frame(tables["merchants"].to_dict("records"))
        world = World(merchants=merchants, **parts, **tables["world"].iloc[0].to_dict())
        questions = [_question(row) for row in tables["questions"].to_dict("records")]
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise DataError(
            "The world cannot be read", where=str(source), got=f"{type(error).__name__}: {error}",
            expected="a folder that experiments.tasks.local_life.data wrote",
        ) from error  # fmt: skip
    check_gold(world, questions, str(source))
    return world, questions


def check_gold(world: World, questions: Sequence[Question], where: str) -> None:
    """DataError for a question whose gold merchant is not in the world, with both ids."""
    for question in questions:
        lost = [poi_id for poi_id in question.gold or () if poi_id not in world]
        if lost:
            raise DataError(
                f"The gold merchant of question '{question.id}' is not in the corpus",
                where=where,
                got=", ".join(lost),
                fix="give the corpus that the questions were made for",
            )


def _table(rows: list[dict], kind: type) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=pd.Index(list(kind.__dataclass_fields__)))  # type: ignore[attr-defined]


def _questions(questions: Sequence[Question]) -> pd.DataFrame:
    rows = []
    for question in questions:
        row = {column: getattr(question, name) for name, column in COLUMNS.items()}
        row |= {"id": question.id, "style": question.style, "language": question.language}
        row |= {"hop_queries": list(question.hop_queries), "web_queries": list(question.web_queries)}
        row |= {"gold": None if question.gold is None else list(question.gold)}
        rows.append(row | {"verifier": None if question.verifier is None else to_json(question.verifier)})
    own = ["id", "style", "language", "hop_queries", "web_queries", "gold", "verifier"]
    return pd.DataFrame(rows, columns=pd.Index([*COLUMNS.values(), *own]))


def _question(row: dict) -> Question:
    values: dict[str, Any] = {name: row[column] for name, column in COLUMNS.items()}
    values |= {name: row[name] for name in ("id", "style", "language")}
    values |= {name: tuple(row[name]) for name in ("hop_queries", "web_queries")}
    values["gold"] = None if row["gold"] is None else tuple(row["gold"])
    values["verifier"] = None if row["verifier"] is None else from_json(row["verifier"])
    return Question(**values)


def _read(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise DataError("A file of the world is missing", where=str(file))
    try:
        return pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError("A file of the world cannot be read", where=str(file), got=got) from error


def main(arguments: Sequence[str] | None = None) -> int:
    from experiments.tasks.local_life.sources import of_seed

    parser = argparse.ArgumentParser(prog="python -m experiments.tasks.local_life.data", description=__doc__)
    parser.add_argument("folder", help="a new or empty folder")
    for name, default in (("seed", 0), ("size", 6000), ("cities", 3), ("districts", 5), ("areas", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--questions", type=int, default=300, help="how many; default 300, 0 for none")
    parser.add_argument("--language", default="en", choices=["en", "zh"])
    args = parser.parse_args(arguments)
    shape = {"cities": args.cities, "districts": args.districts, "areas": args.areas, "language": args.language}
    try:
        made = of_seed(args.seed, args.size, args.questions, **shape)
        print(save(made.world, made.questions, args.folder))
    except AssayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    kept = f"{len(made.questions)} questions out of {made.draws.counts['drawn']} draws" if made.questions else ""
    print(
        kept + (f"; the retriever finds {made.draws.retrieved:.0%} of the sound ones" if kept else ""), file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
