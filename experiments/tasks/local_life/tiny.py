"""task=local_life_tiny: multi-hop local search in a closed vocabulary, small enough for a policy of 0.08 M weights."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, shuffled
from experiments.tasks.local_life.generate import generated
from experiments.tasks.local_life.playground import Playground
from experiments.tasks.local_life.programs import Hop, Near, Solver
from experiments.tools import Tools, ToolText
from methods.errors import ConfigError, check_range, nearest

SHOWN = 3  # merchants of a result
LEAST = 2  # candidates of a hop
DEPENDENT = 0.7  # chance that a hop looks around the answer before it
CITIES, DISTRICTS, AREAS = 6, 5, 3
WORLDS = {"train": 11, "eval": 12, "test": 13}  # a world, so its cities, for each split
RESULTS = ("found", "random", "blind")
KINDS = ("hotpot", "cafe", "barbecue", "ramen", "gym", "spa", "barber", "bookstore", "supermarket", "florist", "hotel",
         "hostel")  # fmt: skip
FORM = ToolText(
    call=r"<s>(r\d)?(?P<place>[ad]\d+)(?P<kind>t\d+)</s>",
    opening="<s>",
    tool="rag",
    stop=("</s>",),
    result="<r>{}</r>",
)
SYMBOLS = (
    *(f"d{i}" for i in range(DISTRICTS)),
    *(f"a{i}" for i in range(DISTRICTS * AREAS)),
    *(f"t{i}" for i in range(len(KINDS))),
    *(f"{letter}{i}" for letter in "qr" for i in range(SHOWN)),
    *("<s>", "</s>", "<r>", "</r>", "*", "?", "=", "error"),
)
ANSWER = re.compile(r"(?:r\d)?=((?:r\d)+)")


class Ground:
    """A generated world behind the default retriever, with places, kinds and results as symbols."""

    def __init__(self, seed: int, size: int) -> None:
        self.world = generated(seed, size, cities=CITIES, districts=DISTRICTS, areas=AREAS)
        self.solver = Solver(self.world)
        self.search = Playground(self.world, show=20).search
        self.places: dict[str, dict[str, str]] = {}
        for city in self.world.cities:
            for letter, kind in (("d", "district"), ("a", "area")):
                names = [p.name for p in self.world.places if p.city == city and p.kind == kind]
                self.places.setdefault(city, {}).update({f"{letter}{i}": name for i, name in enumerate(names)})
        self.symbol = {(city, name): s for city, names in self.places.items() for s, name in names.items()}
        self.shown = functools.cache(self._shown)
        self.winner = functools.cache(self._winner)

    def _shown(self, city: str, place: str, kind: str) -> tuple[str, ...]:
        """The first merchants of that kind at that place that a search finds. LookupError for no such place."""
        if place not in self.places[city] or int(kind[1:]) >= len(KINDS):
            raise LookupError("")
        name, wanted = self.places[city][place], KINDS[int(kind[1:])]
        where = self.solver.district if place[0] == "d" else self.solver.area
        ids = [poi for poi, _ in self.search(f"{city} {name} {wanted}", city)]
        rows = [(poi, self.world.position[poi]) for poi in ids]
        fit = [poi for poi, row in rows if where[row] == name and self.solver.subcategory[row] == wanted]
        return tuple(fit[:SHOWN])

    def _winner(self, city: str, place: str, kind: str) -> str | None:
        """The clearly best rated of its kind at a place; None if there is none or no search shows it."""
        near = Near("district" if place[0] == "d" else "area", self.places[city][place])
        hop = Hop(KINDS[int(kind[1:])], (near,))
        best = self.solver.solve_hop(city, hop, [])
        if best is None or len(self.solver.candidates(city, hop, [])) < LEAST:
            return None
        return self.solver.ids[best] if self.solver.ids[best] in self.shown(city, place, kind) else None

    def area(self, city: str, poi: str) -> str:
        return self.symbol[city, self.solver.area[self.world.position[poi]]]

    def best(self, ids: tuple[str, ...]) -> int:
        """The slot of the best rated, the first of equals."""
        return max(range(len(ids)), key=lambda i: self.solver.rating[self.world.position[ids[i]]])


def written(areas: list[str], ratings: list[float]) -> str:
    """`q0r0a3q1r1a4...`: per merchant its rank by rating among those shown, its slot and its area."""
    order = sorted(range(len(ratings)), key=lambda i: -ratings[i])
    return "".join(f"q{order.index(i)}r{i}{area}" for i, area in enumerate(areas))


@dataclass
class LocalLifeTiny(Task):
    """`d2t5t9*?`: in district d2 the best rated merchant of kind 5, then that of kind 9 in the same area as the first
    (`*`; without it, in d2). `<s>d2t5</s>` shows up to three merchants with rank, slot and area; the next call begins
    with the slot chosen, such as `<s>r2a7t9</s>`; `r0=r2r0` chooses the last one and answers with every slot in order.

    Merchants, retrieval and golds are those of generated worlds; the worlds, so the cities, of the splits differ.
    hops: merchants asked for, per tier. rounds: searches that an episode may make. results: what a search shows in
    training: what it `found`, or as controls `random` merchants of the city, or the merchants found with the ranks and
    areas of random ones (`blind`: a right answer can be guessed, not read). Demonstrations look in the question's
    district where an earlier answer counts (`demo_forget`), take a random slot (`demo_slip`), or answer before the last
    search (`demo_stop`), each with that chance. The score is correctness: the ids in visiting order.
    """

    name: str = "local_life_tiny"
    symbols: tuple[str, ...] | None = SYMBOLS
    max_prompt_tokens: int = 8
    max_completion_tokens: int = 0
    tiers: tuple[str, ...] = field(default=(), init=False)
    hops: dict[str, int] = field(default_factory=lambda: {"2": 2, "3": 3})
    rounds: int = 5
    results: str = "found"
    demo_forget: float = 0.6
    demo_slip: float = 0.2
    demo_stop: float = 0.05
    size: int = 6000
    train_rows: int = 4000
    eval_rows: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tiers = tuple(self.hops)
        for tier, hops in self.hops.items():
            check_range(f"task.hops.{tier}", hops, 1, 3)
        for key in ("demo_forget", "demo_slip", "demo_stop"):
            check_range(f"task.{key}", getattr(self, key), 0, 1)
        check_range("task.rounds", self.rounds, 1)
        if self.results not in RESULTS:
            raise ConfigError(
                "Unknown kind of results", where="task.results", got=self.results,
                expected=", ".join(RESULTS), fix=nearest(str(self.results), RESULTS),
            )  # fmt: skip
        # A search takes five tokens and two brackets, a result three per merchant; the answer six and the end.
        self.max_completion_tokens = self.max_completion_tokens or self.rounds * (7 + 3 * SHOWN) + 7
        self._grounds: dict[str, Ground] = {}

    @property
    def tools(self) -> Tools:
        return Tools(FORM, max_calls=self.rounds, max_turn_tokens=7, max_result_tokens=3 * SHOWN)

    def ground(self, split: str) -> Ground:
        if split not in WORLDS:
            raise ConfigError("Unknown split", where="task", got=split, expected=", ".join(WORLDS))
        if split not in self._grounds:
            self._grounds[split] = Ground(WORLDS[split], self.size)
        return self._grounds[split]

    # ---------------------------------------------------------------- rows

    def rows(self, split: str, seed: int) -> list[Row]:
        ground, rows = self.ground(split), []
        rng = random.Random(derive(seed, "local_life_tiny", split))
        total = self.train_rows if split == "train" else self.eval_rows
        for tier, hops in self.hops.items():
            wanted = round(total / len(self.hops))
            while wanted:
                row = self._row(f"{tier}/{split}-{wanted}", tier, hops, split, ground, rng)
                if row is not None:
                    rows.append(row)
                    wanted -= 1
        return shuffled(rows, seed, "local_life_tiny", split)

    def _row(self, name: str, tier: str, hops: int, split: str, ground: Ground, rng: random.Random) -> Row | None:
        """A question whose every hop has one clear answer that its search shows, and whose dependent hops have another
        one in the district; None where this draw is none."""
        city, district = rng.choice(ground.world.cities), f"d{rng.randrange(DISTRICTS)}"
        kinds = rng.sample(range(len(KINDS)), hops)
        plan = [(f"t{kind}", i > 0 and rng.random() < DEPENDENT) for i, kind in enumerate(kinds)]
        gold: list[str] = []
        for kind, dependent in plan:
            winner = ground.winner(city, ground.area(city, gold[-1]) if dependent else district, kind)
            around = ground.shown(city, district, kind)
            if winner is None or (dependent and (not around or around[ground.best(around)] == winner)):
                return None
            gold.append(winner)
        prompt = district + "".join(kind + "*" * dependent for kind, dependent in plan) + "?"
        meta: dict[str, Any] = {"city": city, "split": split, "noise": rng.randrange(2**31)}
        row = Row(name, prompt, gold, tier, meta=meta)
        if split == "train":
            meta["segments"] = self._demonstration(city, district, plan, ground, rng)
        return row

    def _demonstration(self, city: str, district: str, plan: list, ground: Ground, rng: random.Random) -> list[list]:
        """What the searches really find, whatever `results` says: all arms start from the same policy."""
        segments: list[list] = []
        chosen, area = [], district
        for kind, dependent in plan:
            place = area if dependent and rng.random() >= self.demo_forget else district
            shown = ground.shown(city, place, kind)
            if not shown or (chosen and rng.random() < self.demo_stop):
                break
            segments += [
                [f"<s>{''.join(chosen[-1:])}{place}{kind}</s>", True],
                [f"<r>{described(ground, city, shown)}</r>", False],
            ]
            slot = rng.randrange(len(shown)) if rng.random() < self.demo_slip else ground.best(shown)
            chosen.append(f"r{slot}")
            area = ground.area(city, shown[slot])
        return [*segments, [f"{chosen[-1]}={''.join(chosen)}", True]]

    # ---------------------------------------------------------------- episodes

    def environment(self, row: Row) -> Errand:
        return Errand(self, row)

    def score(self, text: str, row: Row) -> float:
        """1 if the last turn, with its slots resolved to ids, is the gold answer."""
        return float(text == " ".join(row.answer))

    def episode_metrics(self, traj: Any, row: Row) -> dict[str, float]:
        """searches: those carried out. slot_share: positions of the answer that hold the right id. cited: ids in the
        answer over those asked for (above 1: more than asked)."""
        said = (traj.text or "").split()
        right = sum(a == b for a, b in zip(said, row.answer, strict=False))
        results = [t.result for t in traj.turns if t.result is not None]
        asked = len(row.answer)
        return {"searches": float(len(results)), "slot_share": right / asked, "cited": len(said) / asked}


def described(ground: Ground, city: str, ids: tuple[str, ...]) -> str:
    ratings = [ground.solver.rating[ground.world.position[poi]] for poi in ids]
    return written([ground.area(city, poi) for poi in ids], ratings)


class Errand:
    """One episode's tool. `resolve` turns the slots of an answer into the ids that they stood for."""

    def __init__(self, task: LocalLifeTiny, row: Row) -> None:
        self.ground, self.city = task.ground(row.meta["split"]), row.meta["city"]
        self.results = task.results if row.meta["split"] == "train" else "found"
        self.rng = random.Random(row.meta["noise"])  # the k-th search of an item always meets the same noise
        self.found: list[tuple[str, ...]] = []
        self.tools: Mapping[str, Callable[..., str]] = {"rag": self.rag}

    def rag(self, place: str, kind: str) -> str:
        """The first merchants that a search returns."""
        shown = looks = self.ground.shown(self.city, place, kind)
        if self.results != "found":
            rows = self.rng.sample(self.ground.world.of_city[self.city].tolist(), SHOWN)
            looks = tuple(self.ground.solver.ids[row] for row in rows)[: len(shown)]
        if self.results == "random":
            shown = looks
        self.found.append(shown)
        return described(self.ground, self.city, looks)

    def resolve(self, text: str) -> str:
        """`r1=r3r1` as the ids of slot 3 of the first search and slot 1 of the second; "" for anything else."""
        match = ANSWER.fullmatch(text.strip())
        slots = [int(slot) for slot in re.findall(r"r(\d)", match[1])] if match else []
        if not slots or len(slots) > len(self.found):
            return ""
        pairs = list(zip(slots, self.found, strict=False))
        return " ".join(ids[slot] for slot, ids in pairs) if all(slot < len(ids) for slot, ids in pairs) else ""
