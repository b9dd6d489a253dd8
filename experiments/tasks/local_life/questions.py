"""Questions about a world: what one is, and drawing ones whose answer is unique, needed and findable."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date

from experiments.seeds import derive
from experiments.tasks.local_life import paths
from experiments.tasks.local_life.catalogue import CATALOGUE
from experiments.tasks.local_life.hours import DAY
from experiments.tasks.local_life.programs import Condition, Hop, Near, Program, Solver, shape
from experiments.tasks.local_life.wording import STYLES, request
from experiments.tasks.local_life.world import World
from methods.errors import ConfigError

Search = Callable[[str, int, str], Sequence[tuple[str, float]]]  # (query, k, city) -> (poi_id, score), best first
HOPS = {3: 0.6, 4: 0.3, 5: 0.1}
LEVELS = {"L3": 2 / 3, "L4": 1 / 3}
TOP = 20  # results of a search in which the gold merchant must be
LEAST = 3  # candidates of a hop before its conditions
HOP_TRIES, TRIES = 12, 3000  # draws of one hop; of programs for one place in a cell
ANCHORS = {"area": 0.4, "district": 0.3, "event": 0.3}
DEPENDENT = 0.5  # chance that a hop depends on the one before it
COMPARED = 0.15  # chance that the first hop compares two places
DISTANCES = (0.5, 1.0, 1.5, 2.0)
KEYS = {"rating": 0.4, "cheapest": 0.25, "nearest": 0.15, "latest": 0.1, "earliest": 0.1}
FILTERS = {"price": 0.25, "rating": 0.15, "tag": 0.15, "product": 0.15, "open_at": 0.2, "open_on": 0.1}


@dataclass(frozen=True)
class Question:
    """One request of a user. hops: searches that the reference path takes, the web's included.

    hop_queries: its LocalRAG queries in order; web_queries: those to the web. gold: the poi_ids in visiting order, None
    where only a judge can score. reference: the answer in the release's form, with `\\boxed{A→B→C}`. path: the search
    path in the release's form. verifier: the program whose solution gold is.
    """

    id: str
    city: str
    level: str
    hops: int
    text: str
    hop_queries: tuple[str, ...]
    web_queries: tuple[str, ...] = ()
    gold: tuple[str, ...] | None = None
    reference: str = ""
    path: str = ""
    verifier: Program | None = None
    style: str = "plain"
    language: str = "en"
    meta: dict = field(default_factory=dict)


@dataclass
class Draws:
    """What became of the programs that were drawn: `counts` of each fate, and the rule 4 share before filtering."""

    counts: Counter = field(default_factory=Counter)

    @property
    def retrieved(self) -> float:
        """Share of otherwise good programs whose gold merchants are all in the retriever's first results."""
        good = self.counts["kept"] + self.counts["not retrieved"]
        return self.counts["kept"] / good if good else float("nan")


def make_questions(
    world: World,
    count: int,
    seed: int,
    search: Search,
    *,
    cities: Sequence[str] | None = None,
    hops: Mapping[int, float] | None = None,
    levels: Mapping[str, float] | None = None,
) -> tuple[list[Question], Draws]:
    """About `count` questions over `cities` (None: all), in equal parts per city and by the weights of hops and levels.

    Kept are programs (1) with one clear solution, (2) whose hops have at least three candidates and whose filters each
    reject a candidate with a better key, (3) whose answer changes with at least one condition or dependency left
    out, (4) whose gold merchants `search` finds within 20 results for the reference queries, (5) of a shape that did
    not occur before, (6) whose text does not name the answers. ConfigError where a cell cannot be filled.
    """
    chosen, draws, kept = tuple(cities or world.cities), Draws(), []
    solver, shapes = Solver(world), set()
    for city in chosen:
        rng = random.Random(derive(seed, "local_life", "questions", city))
        drawer = Drawer(world, solver, city, rng)
        for (h, level), number in cells(count / len(chosen), hops or HOPS, levels or LEVELS).items():
            for i in range(number):
                name = f"{level}-{h}-{city}-{i}"
                kept.append(_one(drawer, h, level, name, STYLES[i % len(STYLES)], search, shapes, draws))
    return kept, draws


def cells(count: float, hops: Mapping[int, float], levels: Mapping[str, float]) -> dict[tuple[int, str], int]:
    """How many questions each cell of (hops, level) gets: largest remainders."""
    total = sum(hops.values()) * sum(levels.values())
    exact = {(int(h), level): count * a * b / total for h, a in hops.items() for level, b in levels.items()}
    found = {cell: int(share) for cell, share in exact.items()}
    left = round(count) - sum(found.values())
    for cell in sorted(exact, key=lambda c: found[c] - exact[c])[: max(0, left)]:
        found[cell] += 1
    return found


def _one(drawer, calls, level, name, style, search: Search, shapes: set, draws: Draws) -> Question:
    for _ in range(TRIES):
        draws.counts["drawn"] += 1
        drawn = drawer.draw(calls, level)
        if drawn is None:
            draws.counts["no clear answer or decoration"] += 1
            continue
        program, rows = drawn
        if all(drawer.solver.solve_rows(other) == rows for other in drawer.solver.variants(program)):
            draws.counts["nothing matters"] += 1
        elif shape(program) in shapes:
            draws.counts["duplicate"] += 1
        else:
            question = drawer.question(program, rows, name, style, search)
            draws.counts["kept" if question else "not retrieved"] += 1
            if question:
                shapes.add(shape(program))
                return question
    raise ConfigError(
        f"No question of {calls} hops and level {level} could be found in {drawer.city}",
        where="the generated world",
        got=f"{TRIES} draws",
        fix="use more merchants",
    )


@dataclass
class Drawer:
    """Draws programs on one city, hop by hop."""

    world: World
    solver: Solver
    city: str
    rng: random.Random

    def __post_init__(self) -> None:
        self.areas = [p.name for p in self.world.places if p.kind == "area" and p.city == self.city]
        self.districts = [p.name for p in self.world.places if p.kind == "district" and p.city == self.city]
        self.events = {e.name: e for e in self.world.events if e.city == self.city}
        language = self.world.language
        self.kinds = {k.name.of(language): len(self.solver.kinds.get((self.city, k.name.of(language)), ()))
                      for k in CATALOGUE.kinds}  # fmt: skip

    def _pick(self, weights: Mapping) -> str:
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def draw(self, calls: int, level: str) -> tuple[Program, list[int]] | None:
        """A program of so many searches and its solution; None where this draw gave none."""
        coupling = self._pick({"times": 1, "budget": 1, "chain": 1, "event": 1}) if level == "L4" else ""
        kind = {"budget": "area", "event": "event"}.get(coupling) or self._pick(ANCHORS)
        anchors = [self._anchor(kind)]
        if kind != "event" and not coupling and self.rng.random() < COMPARED:
            anchors.append(self._anchor(kind))
        if len(set(anchors)) < len(anchors):
            return None
        count = calls - (kind == "event") - (len(anchors) - 1)
        kinds = self._sample_kinds(count)
        if coupling == "budget":
            found = self._plan(kinds, anchors[0])
        else:
            found = self._chain_of_hops(kinds, tuple(anchors), coupling)
        return found if found is not None and (found[0].level, found[0].calls) == (level, calls) else None

    def _anchor(self, kind: str) -> Near:
        km = self.rng.choice(DISTANCES) if kind != "district" and self.rng.random() < 0.25 else None
        names = {"area": self.areas, "district": self.districts, "event": list(self.events)}[kind]
        return Near(kind, self.rng.choice(names), km=km)

    def _sample_kinds(self, count: int) -> list[str]:
        kinds: list[str] = []
        while len(kinds) < count:
            kind = self._pick(self.kinds)
            kinds += [kind] * (kind not in kinds)
        return kinds

    # ---------------------------------------------------------------- hops, one after the other

    def _chain_of_hops(self, kinds: list[str], anchors: tuple[Near, ...], coupling: str):
        program, rows = Program(self.city, (), timed=coupling == "times"), []
        start, weekday = 60 * self.rng.randint(9, 17), self.rng.randrange(7)
        branch = self.rng.randrange(1, len(kinds)) if coupling == "chain" else -1
        for i, kind in enumerate(kinds):
            for _ in range(HOP_TRIES):
                if i == branch:
                    around = Near("hop", hop=i - 1, km=99.0)  # anywhere in the city
                    hop = Hop(program.hops[i - 1].subcategory, (around,), (), "nearest", i - 1)
                else:
                    parallel = i == 0 or (len(anchors) == 1 and self.rng.random() >= DEPENDENT)
                    near = anchors if parallel else (self._around(i - 1),)
                    hop = self._hop(kind, near, i, coupling, (start + 90 * i, weekday))
                won = self._winner(hop, rows)
                if won is not None and won not in rows:
                    break
            else:
                return None
            program, rows = replace(program, hops=(*program.hops, hop)), [*rows, won]
        return program, rows

    def _around(self, hop: int) -> Near:
        return Near("hop", hop=hop, km=self.rng.choice(DISTANCES) if self.rng.random() < 0.5 else None)

    def _hop(self, kind: str, near: Sequence[Near], place: int, coupling: str, arrival: tuple[int, int]) -> Hop:
        key = self._pick(KEYS)
        if key == "nearest" and (near[0].of == "district" or len(near) > 1):
            key = "rating"
        conditions = []
        if coupling == "times":
            conditions.append(Condition("open_at", arrival))
        elif coupling == "event" and place == 0:
            event = self.events[near[0].name]
            moment = event.end + 30
            weekday = (date.fromisoformat(event.date).weekday() + moment // DAY) % 7
            conditions.append(Condition("after_event", (moment % DAY, weekday)))
        elif self.rng.random() < 0.5:
            allowed = {k: v for k, v in FILTERS.items() if k != {"rating": "rating", "cheapest": "price"}.get(key)}
            if near[0].of == "event":  # a time filter would make it L4
                allowed = {k: v for k, v in allowed.items() if k != "open_at"}
            conditions.append(self._condition(self._pick(allowed), kind))
        return Hop(kind, tuple(near), tuple(conditions), key)

    def _condition(self, kind: str, subcategory: str) -> Condition:
        own, language, rng = CATALOGUE.kind(subcategory), self.world.language, self.rng
        assert own is not None
        if kind == "price":
            step = 5 if own.price < 100 else 20
            return Condition(kind, float(step * round(own.price * rng.uniform(0.7, 1.3) / step)))
        if kind == "rating":
            return Condition(kind, rng.choice((3.8, 4.0, 4.2, 4.4)))
        if kind == "tag":
            return Condition(kind, rng.choice(CATALOGUE.categories[own.category.en][2]).of(language))
        if kind == "product":
            return Condition(kind, rng.choice(own.products).of(language))
        weekday = rng.randrange(7)
        return Condition(kind, weekday if kind == "open_on" else (30 * rng.randint(16, 47), weekday))

    def _winner(self, hop: Hop, rows: list[int]) -> int | None:
        """The row that solves a hop; None where rules 1 or 2 fail."""
        solver = self.solver
        there = solver.candidates(self.city, hop, rows)
        if len(there) < LEAST:
            return None
        keys = solver.keys(self.city, hop, there, rows)
        ok = solver.passes(hop, there)
        best = solver.best(there[ok], keys[ok], hop.key)
        if best is None or not hop.conditions:
            return best
        # A filter that removes no better one is decoration.
        mine = keys[list(there).index(best)]
        return best if (keys[~ok] < mine).any() else None

    # ---------------------------------------------------------------- plans under a budget

    def _plan(self, kinds: list[str], anchor: Near):
        hops = tuple(Hop(kind, (anchor,)) for kind in kinds)
        if any(len(self.solver.candidates(self.city, hop, [])) < LEAST for hop in hops):
            return None
        prices = [self.solver.price[self.solver.candidates(self.city, hop, [])] for hop in hops]
        low, high = (sum(float(f(p)) for p in prices) for f in (min, max))
        budget = 10.0 * round((low + self.rng.uniform(0.1, 0.6) * (high - low)) / 10)
        program = Program(self.city, hops, budget=budget)
        rows = self.solver.solve_rows(program)
        # Without the budget the best rated ones would be it: then it would be decoration.
        return None if rows is None or rows == self.solver.solve_rows(replace(program, budget=1e9)) else (program, rows)

    # ---------------------------------------------------------------- the finished question

    def question(self, program: Program, rows: list[int], name: str, style: str, search: Search) -> Question | None:
        """The question of a solved program; None where `search` does not find its answers or the text names one."""
        table, ids = self.world.merchants, self.solver.ids
        queries, found = reference_queries(self.solver, program, rows), []
        for place, query in queries:
            result = [poi_id for poi_id, _ in search(query, TOP, self.city)]
            found.append((place, query, result))
        for place, row in enumerate(rows):
            if not any(ids[row] in result for p, _, result in found if p == place):
                return None
        text = request(program, style, self.world.language, random.Random(derive(0, name, shape(program))))
        if any(table["name"].iat[row] in text for row in rows):
            return None
        gold = tuple(ids[row] for row in rows)
        merchants = [self.world.merchant(poi_id) for poi_id in gold]
        return Question(
            id=name,
            city=self.city,
            level=str(program.level),
            hops=program.calls,
            text=text,
            hop_queries=tuple(query for _, query in queries),
            web_queries=tuple(f"{event} {self.events[event].date[:4]}" for event in program.events),
            gold=gold,
            reference=paths.reference(merchants, self.world.language),
            path=paths.search_path(self._steps(program, found, gold)),
            verifier=program,
            style=style,
            language=self.world.language,
        )

    def _steps(self, program: Program, found: list, gold: tuple[str, ...]) -> list[tuple[str, list]]:
        """(query, up to three merchants or the event's line) of the reference path."""
        steps: list[tuple[str, list]] = []
        for name in program.events:
            event = self.events[name]
            steps.append((f"{name} {event.date[:4]}", [f"{name}: {event.area}, {event.date}"]))
        for place, query, result in found:
            first = [gold[place]] if gold[place] in result else []
            shown = first + [poi_id for poi_id in result if poi_id not in first][: 3 - len(first)]
            steps.append((query, [self.world.merchant(poi_id) for poi_id in shown]))
        return steps


def reference_queries(solver: Solver, program: Program, rows: Sequence[int]) -> list[tuple[int, str]]:
    """(hop, query) of the path that finds the solution `rows`: city, place and subcategory, or the chain's name."""
    queries = []
    for i, hop in enumerate(program.hops):
        for near in hop.near:
            if hop.chain_of >= 0:
                queries.append((i, f"{program.city} {solver.chain[rows[hop.chain_of]]}"))
                continue
            place = near.name if near.of == "district" else solver.area_of(program.city, near, rows)
            queries.append((i, f"{program.city} {place} {hop.subcategory}"))
    return queries
