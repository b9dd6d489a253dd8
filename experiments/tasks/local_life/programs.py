"""Questions as small programs over a world, and their exact solution by brute force."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from experiments.tasks.local_life.hours import Hours, read_hours
from experiments.tasks.local_life.world import World

KEYS = ("rating", "cheapest", "nearest", "latest", "earliest")
MARGINS = {"rating": 0.05, "cheapest": 3.0, "nearest": 0.1, "latest": 15.0, "earliest": 15.0}
PLANS = 400_000  # combinations that a plan under a budget may have
EPS = 1e-9


@dataclass(frozen=True)
class Condition:
    """A filter. kind and value: `price` (at most), `rating` (at least), `tag`, `product`, `open_on` (weekday), and
    `open_at`, `after_event` with (minute of the day, weekday or None)."""

    kind: str
    value: Any


@dataclass(frozen=True)
class Near:
    """Where a hop looks: an `area`, a `district`, the area of an `event` (name), or around the answer `hop`.

    km None: in the same area (or district); else within so many km of the landmark or merchant.
    """

    of: str
    name: str = ""
    hop: int = -1
    km: float | None = None


@dataclass(frozen=True)
class Hop:
    """One merchant asked for: the best by `key` among those of a subcategory in any of the places `near`.

    Several places make it a comparison. chain_of: it must be another branch of that earlier answer's chain.
    """

    subcategory: str
    near: tuple[Near, ...]
    conditions: tuple[Condition, ...] = ()
    key: str = "rating"
    chain_of: int = -1


@dataclass(frozen=True)
class Program:
    """hops in visiting order. budget: the keys give way to a plan, max sum of ratings with sum of prices <= budget."""

    city: str
    hops: tuple[Hop, ...]
    budget: float | None = None
    timed: bool = False

    @property
    def anchor(self) -> Near:
        return self.hops[0].near[0]

    @property
    def events(self) -> tuple[str, ...]:
        """Events that must be looked up on the web."""
        return tuple(dict.fromkeys(n.name for hop in self.hops for n in hop.near if n.of == "event"))

    @property
    def calls(self) -> int:
        """Searches that the reference path takes."""
        return len(self.events) + sum(len(hop.near) for hop in self.hops)

    @property
    def level(self) -> str | None:
        """L4 with a coupling (times, budget, chain) or an event and a time filter; L3 with at least two of filter,
        key, comparison and dependency; else None."""
        timed = any(c.kind in ("open_at", "after_event") for hop in self.hops for c in hop.conditions)
        chained = any(hop.chain_of >= 0 for hop in self.hops)
        if self.timed or self.budget is not None or chained or (self.events and timed):
            return "L4"
        traits = (
            any(hop.conditions for hop in self.hops),
            bool(self.hops),  # every hop has a key
            any(len(hop.near) > 1 for hop in self.hops),
            any(n.of == "hop" for hop in self.hops for n in hop.near),
        )
        return "L3" if sum(traits) >= 2 else None


class Solver:
    """Executes programs on a world by looking at every merchant of the city."""

    def __init__(self, world: World) -> None:
        self.world, self.margins = world, MARGINS
        table = world.merchants
        self.ids: list[str] = table["poi_id"].tolist()
        self.rating, self.price = table["rating"].to_numpy(float), table["avg_price"].to_numpy(float)
        self.x, self.y = table["x"].to_numpy(float), table["y"].to_numpy(float)
        self.area, self.district = table["business_area"].to_numpy(object), table["district"].to_numpy(object)
        self.chain = table["chain"].to_numpy(object)
        self.city, self.subcategory = table["city"].tolist(), table["subcategory"].tolist()
        self.kinds = table.groupby(["city", "subcategory"], sort=False).indices
        self.landmark = {(p.city, p.area): (p.x, p.y) for p in world.places if p.kind == "area"}
        self.event_area = {(e.city, e.name): e.area for e in world.events}

    @cached_property
    def hours(self) -> list[Hours | None]:
        table = self.world.merchants
        return [read_hours(t, c) for t, c in zip(table["business_hours"], table["closed_weekday"], strict=True)]

    @cached_property
    def tags(self) -> list[frozenset[str]]:
        return [frozenset(text.split(", ")) for text in self.world.merchants["tags"]]

    @cached_property
    def products(self) -> list[frozenset[str]]:
        return [frozenset(p.partition(" (")[0] for p in t.split("; ")) for t in self.world.merchants["products"]]

    # ---------------------------------------------------------------- solving

    def solve(self, program: Program) -> tuple[str, ...] | None:
        """The poi_ids in visiting order; None if a hop has no candidate or its best one is not clear by the margin."""
        rows = self.solve_rows(program)
        return None if rows is None else tuple(self.ids[row] for row in rows)

    def solve_rows(self, program: Program) -> list[int] | None:
        if program.budget is not None:
            return self._plan(program, program.budget)
        found: list[int] = []
        for hop in program.hops:
            winner = self.solve_hop(program.city, hop, found)
            if winner is None:
                return None
            found.append(winner)
        return found

    def solve_hop(self, city: str, hop: Hop, found: Sequence[int]) -> int | None:
        """The row that one hop asks for, after the answers `found`."""
        rows = self.candidates(city, hop, found)
        rows = rows[self.passes(hop, rows)]
        return self.best(rows, self.keys(city, hop, rows, found), hop.key)

    def candidates(self, city: str, hop: Hop, found: Sequence[int]) -> np.ndarray:
        """Rows of the hop's kind at its places, whatever its conditions."""
        rows = np.asarray(self.kinds.get((city, hop.subcategory), ()), dtype=np.int64)
        here = np.zeros(len(rows), dtype=bool)
        for near in hop.near:
            here |= self._at(city, near, rows, found)
        if hop.chain_of >= 0:
            other = found[hop.chain_of]
            here &= (self.chain[rows] == self.chain[other]) & (rows != other) & bool(self.chain[other])
        return rows[here]

    def _at(self, city: str, near: Near, rows: np.ndarray, found: Sequence[int]) -> np.ndarray:
        if near.km is not None:
            return self.distance(city, near, rows, found) <= near.km + EPS  # nobody without coordinates
        if near.of == "district":
            return self.district[rows] == near.name
        return self.area[rows] == self.area_of(city, near, found)

    def area_of(self, city: str, near: Near, found: Sequence[int]) -> str:
        """The area in which a place lies; "" for a district."""
        if near.of == "hop":
            return self.area[found[near.hop]]
        if near.of == "event":
            return self.event_area.get((city, near.name), "")
        return near.name if near.of == "area" else ""

    def distance(self, city: str, near: Near, rows: np.ndarray, found: Sequence[int]) -> np.ndarray:
        """Kilometres from a place's landmark or an earlier answer; NaN where a position is unknown."""
        if near.of == "hop":
            x, y = self.x[found[near.hop]], self.y[found[near.hop]]
        else:
            x, y = self.landmark.get((city, self.area_of(city, near, found)), (np.nan, np.nan))
        return np.hypot(self.x[rows] - x, self.y[rows] - y)

    def passes(self, hop: Hop, rows: np.ndarray) -> np.ndarray:
        ok = np.ones(len(rows), dtype=bool)
        for condition in hop.conditions:
            ok &= np.fromiter((self.holds(condition, int(row)) for row in rows), bool, len(rows))
        return ok

    def holds(self, condition: Condition, row: int) -> bool:
        """Whether a merchant meets a condition; what is unknown does not."""
        value, hours = condition.value, self.hours[row]
        if condition.kind == "price":
            return bool(self.price[row] <= value)
        if condition.kind == "rating":
            return bool(self.rating[row] >= value)
        if condition.kind == "tag":
            return value in self.tags[row]
        if condition.kind == "product":
            return value in self.products[row]
        if condition.kind == "open_on":
            return hours is not None and hours.open_on(value)
        return hours is not None and hours.open_at(*value)

    def keys(self, city: str, hop: Hop, rows: np.ndarray, found: Sequence[int]) -> np.ndarray:
        """What the hop minimises, per row; infinite where unknown."""
        if hop.key == "rating":
            values = -self.rating[rows]
        elif hop.key == "cheapest":
            values = self.price[rows]
        elif hop.key == "nearest":
            values = np.min([self.distance(city, near, rows, found) for near in hop.near], axis=0)
        else:
            side: Callable[[Hours], float] = (lambda h: -h.closing) if hop.key == "latest" else (lambda h: h.opening)
            values = np.array([side(h) if (h := self.hours[row]) else np.inf for row in rows], dtype=float)
        return np.where(np.isnan(values), np.inf, values)

    def best(self, rows: np.ndarray, values: np.ndarray, key: str) -> int | None:
        """The row of the smallest value; None where there is none or the next one is nearer than the margin."""
        if not len(rows) or not np.isfinite(values.min()):
            return None
        order = np.argsort(values, kind="stable")
        clear = len(rows) == 1 or values[order[1]] - values[order[0]] >= self.margins[key] - EPS
        return int(rows[order[0]]) if clear else None

    def _plan(self, program: Program, budget: float) -> list[int] | None:
        """One merchant per hop, all at the anchor: the largest sum of ratings with prices within the budget."""
        options = []
        for hop in program.hops:
            rows = self.candidates(program.city, hop, [])
            rows = rows[self.passes(hop, rows)]
            options.append(rows[~np.isnan(self.rating[rows] + self.price[rows])])
        if not np.prod([float(len(rows)) for rows in options]) or np.prod([len(r) for r in options]) > PLANS:
            return None
        ratings, prices = np.zeros(()), np.zeros(())
        for rows in options:
            ratings = np.add.outer(ratings, self.rating[rows])
            prices = np.add.outer(prices, self.price[rows])
        ratings = np.where(prices <= budget + EPS, ratings, -np.inf).ravel()
        order = np.argsort(-ratings, kind="stable")[:2]
        if not np.isfinite(ratings[order[0]]):
            return None
        if len(order) > 1 and ratings[order[0]] - ratings[order[1]] < self.margins["rating"] - EPS:
            return None
        places = np.unravel_index(order[0], prices.shape)
        return [int(rows[place]) for rows, place in zip(options, places, strict=True)]

    def among(self, poi_ids: Collection[str]) -> Solver:
        """A solver that knows these merchants only and takes the first of equally good ones: what an agent can do
        that has retrieved them."""
        kinds: dict[tuple[str, str], list[int]] = {}
        for row in sorted(self.world.position[poi_id] for poi_id in poi_ids):
            kinds.setdefault((self.city[row], self.subcategory[row]), []).append(row)
        _ = self.hours, self.tags, self.products  # once, not in every copy
        view = copy.copy(self)
        view.kinds = {kind: np.array(rows) for kind, rows in kinds.items()}
        view.margins = dict.fromkeys(MARGINS, 0.0)
        return view

    # ---------------------------------------------------------------- variants and checking

    def variants(self, program: Program) -> list[Program]:
        """The program without each of its conditions, with the anchor in place of each dependency, without budget."""
        found = []
        for i, hop in enumerate(program.hops):
            for condition in hop.conditions:
                rest = tuple(c for c in hop.conditions if c is not condition)
                found.append(_with_hop(program, i, replace(hop, conditions=rest)))
            if any(near.of == "hop" for near in hop.near):
                found.append(_with_hop(program, i, forgetful(hop, program.anchor)))
        return found + ([replace(program, budget=None)] if program.budget is not None else [])

    def checklist(self, program: Program, answer: Sequence[str]) -> dict[str, bool]:
        """What holds of an answer: count, and for every slot `slot1 type`, `place`, `price`, `time`, `other`, `key`.

        Slots are judged against the answer's own earlier slots, as a judge would.
        """
        position = self.world.position
        checks = {"count": len(answer) == len(program.hops)}
        found = [position.get(poi_id, -1) for poi_id in answer[: len(program.hops)]]
        whole = len(found) == len(program.hops) and -1 not in found
        for i, (hop, row) in enumerate(zip(program.hops, found, strict=False)):
            slot = f"slot{i + 1}"
            known = row >= 0 and all(found[n.hop] >= 0 for n in hop.near if n.of == "hop")
            known = known and (hop.chain_of < 0 or found[hop.chain_of] >= 0)
            there = self.candidates(program.city, hop, found) if known else np.empty(0, dtype=np.int64)
            fit = there[self.passes(hop, there)]
            checks[f"{slot} type"] = row >= 0 and self.subcategory[row] == hop.subcategory
            checks[f"{slot} place"] = bool(row in there)
            for name, kinds in _GROUPS.items():
                conditions = [c for c in hop.conditions if c.kind in kinds]
                if conditions:
                    checks[f"{slot} {name}"] = row >= 0 and all(self.holds(c, row) for c in conditions)
            if program.budget is None:
                keys = self.keys(program.city, hop, fit, found) if len(fit) else np.empty(0)
                checks[f"{slot} key"] = bool(len(fit)) and row == int(fit[int(np.argmin(keys))])
        if program.budget is not None:
            checks["budget"] = whole and float(self.price[found].sum()) <= program.budget + EPS
            checks["key"] = whole and list(answer) == list(self.solve(program) or ())
        return checks


_GROUPS = {"price": ("price",), "time": ("open_at", "open_on", "after_event"), "other": ("rating", "tag", "product")}


def _with_hop(program: Program, place: int, hop: Hop) -> Program:
    return replace(program, hops=(*program.hops[:place], hop, *program.hops[place + 1 :]))


def forgetful(hop: Hop, anchor: Near) -> Hop:
    """The hop with the anchor in place of every earlier answer that it depends on."""
    return replace(hop, near=tuple(replace(anchor, km=n.km) if n.of == "hop" else n for n in hop.near))


def shape(program: Program) -> str:
    """The program with its names replaced by their order: equal for two questions that differ in names only."""
    names = list(dict.fromkeys(near.name for hop in program.hops for near in hop.near))

    def plain(hop: Hop) -> Hop:
        return replace(hop, near=tuple(replace(n, name=str(names.index(n.name))) for n in hop.near))

    return repr(replace(program, city="", hops=tuple(plain(hop) for hop in program.hops)))


def to_json(program: Program) -> str:
    return json.dumps(asdict(program), ensure_ascii=False)


def from_json(text: str) -> Program:
    """Raises ValueError, KeyError or TypeError for a text that holds no program."""
    values = json.loads(text)
    hops = tuple(
        Hop(
            hop["subcategory"],
            tuple(Near(**near) for near in hop["near"]),
            tuple(Condition(c["kind"], _value(c["value"])) for c in hop["conditions"]),
            hop["key"],
            hop["chain_of"],
        )
        for hop in values["hops"]
    )
    return Program(values["city"], hops, values["budget"], values["timed"])


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
