"""A generated local-life world: cities, districts, areas, merchants, events, weather and holidays from one seed.

Every stream of random numbers is named by seed, city and field, so that a larger world begins, city by city, with the
merchants of the smaller one, and a further city changes none of those before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
import pandas as pd

from experiments.seeds import derive
from experiments.tasks.local_life import catalogue
from experiments.tasks.local_life.catalogue import CATALOGUE, HOURS, Words
from experiments.tasks.local_life.hours import DAY, clock
from experiments.tasks.local_life.names import CITY_BITS, PLACES, Namer
from experiments.tasks.local_life.world import FIELDS, Event, Page, Place, World
from methods.errors import ConfigError

TODAY = date(2026, 3, 2)  # a Monday
SIDE = 20.0  # km
SPREAD = 0.6  # km, of merchants around their landmark
ZIPF = 0.7  # weight of the area of rank r: r ** -ZIPF
GUARANTEED = ("hotpot", "cafe", "gym", "bookstore", "hotel")  # at least three in every area
CHAINS, CHAIN_SHARE = 2, 0.15  # chains per kind and city, merchants in one
STREETS = 3  # of an area
EVENTS = 8  # of a city
DAYS = 60  # of weather


def generated(
    seed: int, size: int = 6000, *, cities: int = 3, districts: int = 5, areas: int = 3, language: str = "en"
) -> World:
    """The world of a seed: `size` merchants in `cities` cities of `districts` districts of `areas` areas each.

    language: of all texts, `en` or `zh`. The same arguments give the same bytes. ConfigError for a setting out of
    range; each city needs 15 merchants per area (three of each of five common kinds).
    """
    least = cities * districts * areas * 3 * len(GUARANTEED)
    most = cities * ((1 << CITY_BITS) - PLACES)
    for name, value, low, high in (
        ("cities", cities, 1, 60),
        ("districts", districts, 1, 40),
        ("areas", areas, 1, 20),
        ("size", size, least, most),
    ):
        if not low <= value <= high:
            raise ConfigError(
                "A setting of the generated world is out of range", where=name, got=value, expected=f"{low} to {high}"
            )
    if language not in ("en", "zh"):
        raise ConfigError("Unknown language", where="language", got=language, expected="en or zh")
    namer = Namer(seed, language)
    names = [namer.city(c) for c in range(cities)]
    parts = [City(seed, c, names, namer, language, districts, areas) for c in range(cities)]
    counts = [size // cities + (c < size % cities) for c in range(cities)]
    tables = [part.merchants(count) for part, count in zip(parts, counts, strict=True)]
    columns = {name: [value for table in tables for value in table[name]] for name in FIELDS}
    return World(
        source=f"generated, seed {seed}, {size} merchants, {cities} cities, {language}",
        merchants=pd.DataFrame(columns),
        places=[place for part in parts for place in part.places],
        events=[event for part in parts for event in part.events],
        facts=[page for part in parts for page in part.pages()] + _holidays(language),
        language=language,
        today=TODAY.isoformat(),
    )


@dataclass
class City:
    """One city of a world; all that it draws depends on the seed and its own number only."""

    seed: int
    number: int
    names: list[str]
    namer: Namer
    language: str
    district_count: int
    area_count: int

    def __post_init__(self) -> None:
        self.name = self.names[self.number]
        self._used = 0
        self._centres = self._layout()
        self.districts = [self._new() for _ in range(self.district_count)]
        self.areas = [self._new() for _ in range(len(self._centres))]
        marks = self.rng("landmarks").integers(len(catalogue.LANDMARKS), size=len(self.areas))
        self.landmarks = [self._joined(self._new(), catalogue.LANDMARKS[m]) for m in marks]
        self.streets = [[self._new() for _ in range(STREETS)] for _ in self.areas]
        self.chains = [[self._new() for _ in range(CHAINS)] for _ in CATALOGUE.kinds]
        self.places = self._places()
        self.events = self._events()

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng(derive(self.seed, "local_life", self.number, name))

    def _new(self) -> str:
        self._used += 1
        return self.namer.place(self.number, self._used)

    def _joined(self, name: str, words: Words) -> str:
        return f"{name}{words.zh}" if self.language == "zh" else f"{name} {words.en}"

    # ---------------------------------------------------------------- the map

    def _layout(self) -> np.ndarray:
        """Centres of all areas, district by district: each nearer to its own district's centre than to any other."""
        rng = self.rng("map")
        middles = rng.uniform(2, SIDE - 2, (self.district_count, 2))
        self._middles = middles
        centres = np.empty((0, 2))
        for d in range(self.district_count):
            tries = rng.normal(middles[d], 2.0, (4096, 2)).clip(0.5, SIDE - 0.5)
            own = np.argmin(((tries[:, None] - middles[None]) ** 2).sum(-1), axis=1) == d
            tries = tries[own] if own.sum() >= self.area_count else np.vstack([tries[own], tries[~own]])
            for _ in range(self.area_count):  # the farthest of the first 8 from all areas so far
                some, tries = tries[:8], tries[8:]
                gaps = ((some[:, None] - centres[None]) ** 2).sum(-1).min(1) if len(centres) else np.zeros(len(some))
                centres = np.vstack([centres, some[[int(gaps.argmax())]]])
        return centres

    def _places(self) -> list[Place]:
        found = [
            Place(name, "district", self.name, round(x, 3), round(y, 3), name)
            for name, (x, y) in zip(self.districts, self._middles.tolist(), strict=True)
        ]
        for a, (x, y) in enumerate(self._centres.tolist()):
            where = (self.name, round(x, 3), round(y, 3), self.districts[a // self.area_count], self.areas[a])
            found += [Place(self.areas[a], "area", *where), Place(self.landmarks[a], "landmark", *where)]
        return found

    def _events(self) -> list[Event]:
        rng = self.rng("events")
        found = []
        for _ in range(EVENTS):
            kind, area, day = (int(rng.integers(n)) for n in (len(catalogue.EVENTS), len(self.areas), DAYS - 1))
            start, length = 18 * 60 + 15 * int(rng.integers(11)), 90 + 15 * int(rng.integers(7))
            when = (TODAY + timedelta(days=1 + day)).isoformat()
            name = self._joined(self._new(), catalogue.EVENTS[kind])
            found.append(Event(name, self.name, self.areas[area], when, start, start + length))
        return found

    # ---------------------------------------------------------------- the merchants

    def merchants(self, count: int) -> dict[str, list]:
        """`count` merchants, column by column; the first ones fulfil the guarantee."""
        kinds, areas = self._kinds_and_areas(count)
        columns = self._numbers(count, kinds, areas)
        columns |= self._identity(count, kinds, areas)
        columns |= self._offers(count, kinds, columns["avg_price"])
        columns |= self._descriptions(columns)
        return columns

    def _kinds_and_areas(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        names = [kind.name.en for kind in CATALOGUE.kinds]
        common = np.array([names.index(name) for name in GUARANTEED])
        first = np.array([(k, a) for a in range(len(self.areas)) for k in common for _ in range(3)])
        weights = []
        for category in CATALOGUE.categories.values():
            inside = [kind for kind in CATALOGUE.kinds if kind.category is category[0]]
            own = np.arange(1, len(inside) + 1) ** -0.5
            weights += (category[1] * own / own.sum()).tolist()
        rest = max(0, count - len(first))
        zipf = self.rng("zipf").permutation(len(self.areas)) + 1.0
        zipf **= -ZIPF
        kinds = _choice(self.rng("kinds"), weights, rest)
        areas = _choice(self.rng("areas"), zipf / zipf.sum(), rest)
        return np.concatenate([first[:, 0], kinds])[:count], np.concatenate([first[:, 1], areas])[:count]

    def _numbers(self, count: int, kinds: np.ndarray, areas: np.ndarray) -> dict[str, Any]:
        spread = self.rng("position").normal(0, SPREAD, (count, 2))
        xy = (self._centres[areas] + spread).round(3)
        rating = self.rng("rating").normal(4.2, 0.5, count).clip(1, 5).round(2)
        median = np.array([kind.price for kind in CATALOGUE.kinds])[kinds]
        price = np.maximum(5, (median * np.exp(self.rng("price").normal(0, 0.35, count))).round())
        reviews = np.exp(self.rng("reviews").normal(5, 1.2, count)).astype(int)
        closed = np.where(self.rng("closed").random(count) < 0.10, self.rng("weekday").integers(7, size=count), -1)
        pays = [words.of(self.language) for words in catalogue.PAYMENTS]
        return {
            "x": xy[:, 0].tolist(),
            "y": xy[:, 1].tolist(),
            "rating": rating.tolist(),
            "avg_price": price.tolist(),
            "price_range": [f"{0.7 * p:.0f}-{1.4 * p:.0f}" for p in price.tolist()],
            "review_count": reviews.tolist(),
            "business_hours": self._hours(count, kinds),
            "closed_weekday": closed.tolist(),
            "reservation": (self.rng("reservation").random(count) < 0.5).tolist(),
            "parking": (self.rng("parking").random(count) < 0.4).tolist(),
            "payment": [pays[i] for i in self.rng("payment").integers(len(pays), size=count).tolist()],
        }

    def _hours(self, count: int, kinds: np.ndarray) -> list[str]:
        """5 % never close, 10 % close between 0:30 and 4:00, the others when their kind usually does."""
        fate = self.rng("hours").random(count).tolist()
        shift = (15 * self.rng("shifts").integers(-4, 5, (count, 2))).tolist()
        late = (30 * self.rng("late").integers(1, 9, count)).tolist()
        usual = [HOURS[kind.hours] for kind in CATALOGUE.kinds]
        texts = []
        for kind, which, (a, b), night in zip(kinds.tolist(), fate, shift, late, strict=True):
            if which < 0.05:
                texts.append("00:00-24:00")
                continue
            spans = [list(span) for span in usual[kind]]
            spans[0][0] += a
            spans[-1][1] = DAY + night if which < 0.15 else spans[-1][1] + b
            texts.append(",".join(f"{clock(start)}-{clock(end)}" for start, end in spans))
        return texts

    def _identity(self, count: int, kinds: np.ndarray, areas: np.ndarray) -> dict[str, list]:
        zh = self.language == "zh"
        own = self.namer.merchants(self.number, count)
        chained = self.rng("chains").random(count) < CHAIN_SHARE
        which = self.rng("which").integers(CHAINS, size=count)
        street = self.rng("streets").integers(STREETS, size=count).tolist()
        number = self.rng("numbers").integers(1, 400, size=count).tolist()
        phones = self.rng("phones").integers(10_000_000, 100_000_000, size=count).tolist()
        code = f"{Namer(self.seed, 'en').city(self.number)[:4].lower()}{self.number}"
        names, chains, branches, seen = [], [], [], {}
        for i, (kind, area) in enumerate(zip(kinds.tolist(), areas.tolist(), strict=True)):
            word = CATALOGUE.kinds[kind].name
            word = word.zh if zh else f" {word.en.title()}"
            chain = self.chains[kind][which[i]] if chained[i] else ""
            if chain:
                seen[chain] = seen.get(chain, 0) + 1
                branches.append(f"{self.areas[area]}{seen[chain]}店" if zh else f"{self.areas[area]} {seen[chain]}")
                names.append(f"{chain}{word}（{branches[-1]}）" if zh else f"{chain}{word} ({branches[-1]})")
            else:
                branches.append("")
                names.append(f"{own[i]}{word}")
            chains.append(f"{chain}{word}" if chain else "")
        places = [(self.streets[a][s], n) for a, s, n in zip(areas.tolist(), street, number, strict=True)]
        district = [self.districts[a // self.area_count] for a in range(len(self.areas))]
        return {
            "poi_id": [f"poi_{code}_{i:06d}" for i in range(count)],
            "name": names,
            "chain": chains,
            "branch": branches,
            "address": [f"{s}路{n}号" if zh else f"{n} {s} Road" for s, n in places],
            "city": [self.name] * count,
            "district": [district[a] for a in areas],
            "business_area": [self.areas[a] for a in areas],
            "landmark": [self.landmarks[a] for a in areas],
            "phone": [f"0{self.number:02d}-{phone}" for phone in phones],
        }

    def _offers(self, count: int, kinds: np.ndarray, prices: list[float]) -> dict[str, list]:
        language, all_kinds = self.language, CATALOGUE.kinds
        words = [[p.of(language) for p in kind.products] for kind in all_kinds]
        order = self.rng("products").random((count, 5)).argsort(1).tolist()
        many = self.rng("how many").integers(2, 6, count).tolist()
        share = self.rng("product prices").uniform(0.2, 0.9, (count, 5)).tolist()
        products, first = [], []
        for kind, row, n, shares, price in zip(kinds.tolist(), order, many, share, prices, strict=True):
            names = words[kind]
            products.append("; ".join(f"{names[j]} ({max(1, price * shares[j]):.0f})" for j in row[:n]))
            first.append(names[row[0]])
        categories = {c[0].en: [w.of(language) for w in c[2]] for c in CATALOGUE.categories.values()}
        tags = [categories[kind.category.en] for kind in all_kinds]
        some = self.rng("tags").random((count, 6))
        facilities = [w.of(language) for w in catalogue.FACILITIES]
        has = self.rng("facilities").random((count, len(facilities)))
        promotions = [w.of(language) for w in catalogue.PROMOTIONS]
        return {
            "category": [all_kinds[k].category.of(language) for k in kinds],
            "subcategory": [all_kinds[k].name.of(language) for k in kinds],
            "products": products,
            "specialties": first,
            "tags": [_some(tags[k], row) for k, row in zip(kinds.tolist(), some.tolist(), strict=True)],
            "facilities": [_some(facilities, row) for row in has.tolist()],
            "promotions": [
                promotions[i] for i in self.rng("promotions").integers(len(promotions), size=count).tolist()
            ],
        }

    def _descriptions(self, columns: dict[str, list]) -> dict[str, list[str]]:
        text = "{}的{}，招牌是{}。" if self.language == "zh" else "A {1} in {0}, known for its {2}."
        rows = zip(columns["business_area"], columns["subcategory"], columns["specialties"], strict=True)
        return {"description": [text.format(*row) for row in rows]}

    # ---------------------------------------------------------------- the web

    def pages(self) -> list[Page]:
        """Events with three distractors each (another year or city), and the weather of the coming days."""
        zh, rng, found = self.language == "zh", self.rng("pages"), []
        for e, event in enumerate(self.events):
            found.append(_event_page(f"event-{self.number}-{e}", event, "event", zh))
            for d in range(3):
                area = self.areas[int(rng.integers(len(self.areas)))]
                start = event.start + 15 * int(rng.integers(-4, 5))
                when, city = date.fromisoformat(event.date), self.name
                if d < 2:
                    when = when.replace(year=when.year - 1 - d, day=1 + int(rng.integers(28)))
                else:  # a city outside the world, so that a further city of the world changes nothing
                    city, area = (self.namer.place(self.number, PLACES - 2 * e - i) for i in (1, 2))
                other = Event(event.name, city, area, when.isoformat(), start, start + event.end - event.start)
                found.append(_event_page(f"event-{self.number}-{e}-{d}", other, "distractor", zh))
        skies, low = rng.integers(len(catalogue.SKIES), size=DAYS).tolist(), rng.integers(-2, 15, DAYS).tolist()
        for day, (sky, least) in enumerate(zip(skies, low, strict=True)):
            when, word = (TODAY + timedelta(days=day)).isoformat(), catalogue.SKIES[sky].of(self.language)
            title = f"{self.name}{when}天气" if zh else f"Weather in {self.name} on {when}"
            text = f"{word}，{least}到{least + 8}度。" if zh else f"{word}, {least} to {least + 8} degrees."
            found.append(Page(f"weather-{self.number}-{day}", title, text, self.name, "weather"))
        return found


def _event_page(page_id: str, event: Event, kind: str, zh: bool) -> Page:
    form = "{0}于{3} {4}在{2}{1}举行。" if zh else "The {} takes place in {}, {}, on {}, {}."
    span = f"{clock(event.start)}-{clock(event.end)}"
    text = form.format(event.name, event.area, event.city, event.date, span)
    return Page(page_id, f"{event.name} {event.date[:4]}", text, event.city, kind)


def _holidays(language: str) -> list[Page]:
    found = []
    for i, (words, when) in enumerate(zip(catalogue.HOLIDAYS, ("2026-02-17", "2026-04-05", "2026-05-01"), strict=True)):
        name = words.of(language)
        text = f"2026年{name}在{when}。" if language == "zh" else f"In 2026 {name} is on {when}."
        found.append(Page(f"holiday-{i}", name, text, "", "holiday"))
    return found


def _choice(rng: np.random.Generator, weights: Any, count: int) -> np.ndarray:
    edges = np.cumsum(weights)
    return np.searchsorted(edges / edges[-1], rng.random(count), side="right")


def _some(words: list[str], draws: list[float]) -> str:
    """The words whose draw is below 0.3; at least the one of the smallest."""
    chosen = [w for w, draw in zip(words, draws, strict=False) if draw < 0.3]
    return ", ".join(chosen) or words[min(range(len(words)), key=draws.__getitem__)]
