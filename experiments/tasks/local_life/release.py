"""Public data: LocalSearchBench's question file with a merchant file or the evidence corpus, and VitaBench's rows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.tasks.base import bucket, read_table
from experiments.tasks.local_life.paths import NUMBER, Mention, PathHop, boxed, number_of, read_path
from experiments.tasks.local_life.questions import Question
from experiments.tasks.local_life.world import FIELDS, Page, World, frame
from methods.errors import DataError

# The release's columns (v2); v1 has no hop count and no difficulty. Converted copies write them in small letters.
COLUMNS = {
    "hops": ("Hop Count", "hop_count", "hops"),
    "level": ("Difficulty", "difficulty", "level"),
    "city": ("City", "city"),
    "text": ("Question", "question"),
    "path": ("Multi-hop search path", "Multi-hop Search Path", "multi_hop_search_path", "search_path"),
    "reference": ("Answer", "answer"),
}
NEEDED = ("city", "text", "path", "reference")
VITA = ("environment", "instructions", "evaluation_criteria")
DEGREE = 111.32  # km of a degree of latitude


def read(path: str, corpus: str | None = None) -> tuple[World, list[Question]]:
    """The world and questions of a public file. DataError for a file that is neither, is empty or is damaged."""
    records = read_table(path)
    if all(column in records[0] for column in VITA):
        return vitabench(records, path)
    return benchmark(records, path, corpus)


# ---------------------------------------------------------------- LocalSearchBench


def benchmark(records: Sequence[Mapping], source: str, corpus: str | None) -> tuple[World, list[Question]]:
    """Rows in the layout of v1 or v2. Without a merchant file the corpus is what the search paths tell of."""
    names = {what: next((c for c in usual if c in records[0]), None) for what, usual in COLUMNS.items()}
    lost = [COLUMNS[what][0] for what in NEEDED if names[what] is None]
    if lost:
        raise DataError(
            f"The question file has no column '{lost[0]}'", where=source, got="columns " + ", ".join(records[0]),
            expected="LocalSearchBench's columns, or VitaBench's rows",
        )  # fmt: skip
    questions, evidence = [], {}
    for number, record in enumerate(records):
        cells: dict[str, Any] = {what: record.get(name) if name else None for what, name in names.items()}
        if not all(isinstance(cells[what], str) and cells[what] for what in NEEDED):
            raise DataError("A question has an empty cell", where=f"{source}, row {number + 1}", got=repr(cells)[:120])
        path = read_path(cells["path"])
        questions.append(_question(cells, path, number, source))
        for hop in path:
            for mention in hop.found:
                merchant = _merchant(cells["city"], mention)
                evidence.setdefault(merchant["poi_id"], merchant)
    world = merchants_of(corpus) if corpus else _evidence(list(evidence.values()), source)
    return world, questions


def _question(cells: Mapping[str, Any], path: Sequence[PathHop], number: int, source: str) -> Question:
    hops, level = (None if cells[name] != cells[name] else cells[name] for name in ("hops", "level"))
    if hops is not None and not re.fullmatch(r"\d+(\.0)?", str(hops)):
        raise DataError("A hop count is a whole number", where=f"{source}, row {number + 1}", got=repr(hops)[:60])
    return Question(
        id=f"q{number}",
        city=cells["city"],
        level=str(level or "all"),
        hops=int(hops or len(path)),
        text=cells["text"],
        hop_queries=tuple(hop.query for hop in path),
        reference=cells["reference"],
        path=cells["path"],
        style="release",
        language="zh",
        meta={"boxed": boxed(cells["reference"])},
    )


def _merchant(city: str, mention: Mention) -> dict[str, Any]:
    low, high = mention.price or (math.nan, math.nan)
    key = f"{city}|{mention.name}|{mention.address}"
    return {
        "poi_id": f"poi_e{bucket(key, 10**12):012d}",
        "name": mention.name,
        "address": mention.address,
        "city": city,
        "business_hours": mention.hours,
        "rating": math.nan if mention.rating is None else mention.rating,
        "avg_price": (low + high) / 2,
        "price_range": "" if mention.price is None else f"{low:g}-{high:g}",
        "description": mention.note,
    }


def _evidence(merchants: list[dict], source: str) -> World:
    if not merchants:
        raise DataError(
            "No search path tells of a merchant", where=source, fix="give a merchant file: task.corpus=FILE"
        )
    name = f"{source}, evidence corpus of {len(merchants)} merchants (far easier than the release's own)"
    return World(name, frame(merchants), language="zh")


def merchants_of(path: str) -> World:
    """A merchant file with the release's field names. What is malformed is kept and can be listed
    (`World.unreadable_hours`, `without_coordinates`). DataError for rows without id, name or city."""
    records = read_table(path)
    rows = []
    for number, record in enumerate(records, start=1):
        row = {name: record[name] for name in FIELDS if record.get(name) is not None}
        row["poi_id"] = str(row.get("poi_id") or record.get("id") or "")
        for name in ("poi_id", "name", "city"):
            if not row.get(name):
                raise DataError(f"A merchant has no {name}", where=f"{path}, row {number}", got=repr(record)[:120])
        rows.append({name: _cell(name, value) for name, value in row.items()})
    raw = {row["poi_id"]: dict(record) for row, record in zip(rows, records, strict=True)}
    language = "zh" if re.search("[\u4e00-\u9fff]", rows[0]["name"]) else "en"
    return World(f"{path}, {len(rows)} merchants", frame(rows), language=language, raw=raw)


def _cell(name: str, value: Any) -> Any:
    """A cell in our type; what cannot be a number is unknown."""
    if name in ("rating", "avg_price", "x", "y"):
        found = re.search(rf"-?{NUMBER}", str(value))
        return number_of(found[0]) if found else math.nan
    if name in ("review_count", "closed_weekday"):
        return int(value) if str(value).lstrip("-").isdigit() else {"review_count": 0, "closed_weekday": -1}[name]
    if name in ("reservation", "parking"):
        return str(value).lower() in ("true", "1", "yes", "是")
    if isinstance(value, (list, tuple)):
        return ("; " if name == "products" else ", ").join(map(str, value))
    return str(value)


# ---------------------------------------------------------------- VitaBench


def vitabench(records: Sequence[Mapping], source: str) -> tuple[World, list[Question]]:
    """VitaBench's tasks: each is a city of its own with its stores or shops.

    gold: the shops of the required orders, bookings and reservations in their order. What has no field here stays
    whole in `World.raw` (stores) and `Question.meta["record"]` (everything else). Positions are km east and north of
    the task's first location.
    """
    rows, raw, pages, questions = [], {}, [], []
    for number, record in enumerate(records, start=1):
        try:
            city, environment = str(record["id"]), record["environment"]
            prefix = "poi_" + re.sub(r"\W", "_", city)
            stores = environment.get("stores", {}) | environment.get("shops", {})
            origin = (environment.get("location") or [store["location"] for store in stores.values()])[0]
            for store_id, store in stores.items():
                rows.append(_store(store, f"{prefix}_{store_id}", city, origin))
                raw[rows[-1]["poi_id"]] = dict(store)
            for day, sky in enumerate(environment.get("weather", ())):
                text = f"{sky['category']}, {sky['temperature'][0]} to {sky['temperature'][1]} degrees."
                title = f"Weather in {sky['city']} on {sky['datetime']}"
                pages.append(Page(f"weather-{number}-{day}", title, text, city, "weather"))
            questions.append(_task(record, prefix, set(stores)))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            got = f"{type(error).__name__}: {error}"
            raise DataError("The row is no VitaBench task", where=f"{source}, row {number}", got=got) from error
    language = str(records[0].get("lang", "en"))
    return World(
        f"{source}, {len(questions)} VitaBench tasks", frame(rows), facts=pages, language=language, raw=raw
    ), questions


def _store(store: Mapping, poi_id: str, city: str, origin: Mapping) -> dict[str, Any]:
    where, prices = store["location"], [p["price"] for p in store["products"] if p.get("price") is not None]
    shrink = math.cos(math.radians(origin["latitude"]))
    return {
        "poi_id": poi_id,
        "name": store.get("name") or store["shop_name"],
        "category": store.get("category", "delivery"),
        "address": where["address"],
        "city": city,
        "rating": float(store["score"]),
        "avg_price": sum(prices) / len(prices) if prices else math.nan,
        "price_range": f"{min(prices):g}-{max(prices):g}" if prices else "",
        "products": "; ".join(f"{p['name']} ({p['price']:g})" if p.get("price") is not None else p["name"]
                              for p in store["products"]),
        "tags": ", ".join(store["tags"]),
        "x": round((where["longitude"] - origin["longitude"]) * DEGREE * shrink, 4),
        "y": round((where["latitude"] - origin["latitude"]) * DEGREE, 4),
        "reservation": bool(store.get("enable_reservation")),
    }  # fmt: skip


def _task(record: Mapping, prefix: str, stores: set[str]) -> Question:
    criteria = record["evaluation_criteria"]
    orders = [order for state in criteria["expected_states"] or () for order in state["required_orders"]]
    wanted = list(dict.fromkeys(str(order.get("store_id") or order.get("shop_id")) for order in orders))
    lost = [store_id for store_id in wanted if store_id not in stores]
    if lost:
        raise DataError(
            f"The gold merchant of question '{record['id']}' is not in the corpus", where="VitaBench", got=lost[0]
        )
    return Question(
        id=str(record["id"]),
        city=str(record["id"]),
        level=str(record.get("domain", "all")),
        hops=len(wanted),
        text=record["instructions"],
        hop_queries=(),
        gold=tuple(f"{prefix}_{store_id}" for store_id in wanted) or None,
        reference="\n".join(criteria["overall_rubrics"]),
        style="vitabench",
        language=str(record.get("lang", "en")),
        meta={"record": dict(record)},
    )
