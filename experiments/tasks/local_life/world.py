"""What a local-life world is: merchants, places, events and the web's pages, whichever source they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from experiments.tasks.local_life.hours import WEEKDAYS, Hours, read_hours
from methods.errors import DataError

NUMBERS = ("rating", "avg_price", "x", "y")  # NaN where unknown


@dataclass(frozen=True, slots=True)
class Merchant:
    """One merchant's 29 fields. Texts are "" and numbers NaN where nothing is known.

    The first 20 are those of the public code; the others are ours. rating: 0 to 5. avg_price: per person or night, in
    yuan. products: `name (price); ...`. tags and facilities: `a, b`. x, y: km in the plane of the city. closed_weekday:
    0 = Monday, -1 = none. chain, branch: of a merchant that shares its name with others.
    """

    poi_id: str
    name: str
    category: str = ""
    subcategory: str = ""
    address: str = ""
    city: str = ""
    district: str = ""
    business_area: str = ""
    landmark: str = ""
    business_hours: str = ""
    rating: float = float("nan")
    avg_price: float = float("nan")
    price_range: str = ""
    specialties: str = ""
    products: str = ""
    tags: str = ""
    description: str = ""
    facilities: str = ""
    promotions: str = ""
    phone: str = ""
    x: float = float("nan")
    y: float = float("nan")
    review_count: int = 0
    closed_weekday: int = -1
    chain: str = ""
    branch: str = ""
    reservation: bool = False
    parking: bool = False
    payment: str = ""

    @property
    def hours(self) -> Hours | None:
        """None where the text cannot be read."""
        return read_hours(self.business_hours, self.closed_weekday)


FIELDS = tuple(f.name for f in fields(Merchant))


@dataclass(frozen=True, slots=True)
class Place:
    """A district, area or landmark of a city. kind: `district`, `area` or `landmark`; district: the one it lies in."""

    name: str
    kind: str
    city: str
    x: float
    y: float
    district: str = ""
    area: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that takes place in an area; date `2026-03-07`, start and end in minutes of that day."""

    name: str
    city: str
    area: str
    date: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Page:
    """One short document of the web corpus: kind `event`, `weather`, `holiday` or `distractor`."""

    page_id: str
    title: str
    text: str
    city: str = ""
    kind: str = ""


@dataclass
class World:
    """Merchants with what lies around them. `merchants` has one row per merchant and the columns `FIELDS`.

    source: where it comes from, such as `generated seed 0 size 6000`; it belongs into every report. raw: records of a
    file by poi_id, whole, where a field has no column here.
    DataError for a merchant without an id and for an id that occurs twice.
    """

    source: str
    merchants: pd.DataFrame
    places: list[Place] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    facts: list[Page] = field(default_factory=list)
    language: str = "en"
    today: str = ""
    raw: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = self.merchants["poi_id"].tolist()
        if not all(ids):
            raise DataError("A merchant has no poi_id", where=self.source, fix="give every merchant an id")
        if len(set(ids)) < len(ids):
            twice = next(poi_id for poi_id, n in Counter(ids).items() if n > 1)
            raise DataError("Two merchants have the same poi_id", where=self.source, got=twice)

    def __len__(self) -> int:
        return len(self.merchants)

    def __contains__(self, poi_id: object) -> bool:
        return poi_id in self.position

    @cached_property
    def position(self) -> dict[str, int]:
        """Row of each poi_id."""
        return {poi_id: i for i, poi_id in enumerate(self.merchants["poi_id"])}

    @cached_property
    def cities(self) -> tuple[str, ...]:
        """The cities in the order in which they first occur."""
        return tuple(dict.fromkeys(self.merchants["city"]))

    @cached_property
    def of_city(self) -> dict[str, np.ndarray]:
        """Rows of each city's merchants."""
        groups = self.merchants.groupby("city", sort=False).indices
        return {str(city): np.asarray(rows) for city, rows in groups.items()}

    def merchant(self, poi_id: str) -> Merchant:
        """Raises LookupError for an id that is not there."""
        if poi_id not in self.position:
            raise LookupError(f"there is no merchant {poi_id!r}")
        row = self.position[poi_id]
        return Merchant(**{name: column[row] for name, column in self._columns.items()})

    @cached_property
    def _columns(self) -> dict[str, list]:
        return {name: self.merchants[name].tolist() for name in FIELDS}

    def documents(self, city: str) -> list[tuple[str, str]]:
        """(poi_id, text) of a city's merchants: labelled fields in fixed order, identity and place first."""
        if city not in self.of_city:
            raise LookupError(f"there is no city {city!r}; there are {', '.join(self.cities[:10])}")
        rows = self.of_city[city]
        columns = {name: [self._columns[name][i] for i in rows] for name in (*DOCUMENT, *_EXTRA)}
        texts = [document(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
        return list(zip(columns["poi_id"], texts, strict=True))

    @cached_property
    def unreadable_hours(self) -> list[str]:
        """poi_ids whose opening hours cannot be read; they stay in the world and count as never open."""
        pairs = zip(self._columns["business_hours"], self._columns["closed_weekday"], strict=True)
        bad = [bool(text) and read_hours(text, closed) is None for text, closed in pairs]
        return self.merchants["poi_id"][bad].tolist()

    @cached_property
    def without_coordinates(self) -> list[str]:
        """poi_ids that have no position; they are never near anything."""
        missing = self.merchants[["x", "y"]].isna().any(axis=1)
        return self.merchants["poi_id"][missing].tolist()


DOCUMENT = {
    "name": "name",
    "category": "category",
    "address": "address",
    "city": "city",
    "district": "district",
    "business_area": "business area",
    "landmark": "landmark",
    "business_hours": "hours",
    "rating": "rating",
    "avg_price": "price",
    "tags": "tags",
    "products": "products",
}
_EXTRA = ("poi_id", "subcategory", "closed_weekday", "x", "y")


def document(values: Mapping[str, Any]) -> str:
    """The text that is indexed, `name: ... - category: dining/hotpot - ...`; what is not known is left out."""
    parts = []
    for name, label in DOCUMENT.items():
        value = values[name]
        if name == "category":
            value = "/".join(v for v in (value, values["subcategory"]) if v)
        elif name == "business_hours" and value and values["closed_weekday"] >= 0:
            value = f"{value} except {WEEKDAYS[values['closed_weekday']]}"
        elif name in NUMBERS:
            value = "" if value != value else f"{value:g}"
        if value:
            parts.append(f"{label}: {value}")
    if values["x"] == values["x"]:
        parts.append(f"location: {values['x']:.2f}, {values['y']:.2f}")
    return " - ".join(parts)


def frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Records with some of the fields as a frame with all of them."""
    empty = Merchant("", "")
    columns = {name: [r.get(name, getattr(empty, name)) for r in records] for name in FIELDS}
    table = pd.DataFrame(columns)
    for name in NUMBERS:
        table[name] = np.asarray(pd.to_numeric(table[name], errors="coerce"), dtype=float)
    return table
