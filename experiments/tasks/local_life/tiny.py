"""task=local_life_tiny: multi-hop local search in a closed vocabulary, small enough for a policy of 0.08 M weights."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, shuffled
from experiments.tasks.local_life.generate import generated
from experiments.tasks.local_life.playground import Playground
from experiments.tasks.local_life.programs import Hop, Near, Solver
from experiments.tools import Tools, ToolText
from methods.errors import ConfigError, check_range

SHOWN = 3  # merchants of a result
LEAST = 2  # candidates of a hop
DEPENDENT = 0.7  # chance that a hop looks around the answer before it
CITIES, DISTRICTS, AREAS = 6, 5, 3
KINDS = ("hotpot", "cafe", "barbecue", "ramen", "gym", "spa", "barber", "bookstore", "supermarket", "florist", "hotel",
         "hostel")  # fmt: skip
FORM = ToolText(
    call=r"<s>(?P<place>[ad]\d+)(?P<kind>t\d+)</s>", opening="<s>", tool="rag", stop=("</s>",), result="<r>{}</r>"
)
SYMBOLS = (
    *(f"d{i}" for i in range(DISTRICTS)),
    *(f"a{i}" for i in range(DISTRICTS * AREAS)),
    *(f"t{i}" for i in range(len(KINDS))),
    *(f"{letter}{i}" for letter in "rq" for i in range(SHOWN)),
    *("<s>", "</s>", "<r>", "</r>", "*", "?", "=", "error"),
)
ANSWER = re.compile(r"(?:r\d)?=((?:r\d)+)")


class Ground:
    """A generated world behind the default retriever, with places, kinds and results as symbols."""

    def __init__(self, seed: int, size: int) -> None:
        world = generated(seed, size, cities=CITIES, districts=DISTRICTS, areas=AREAS)
        self.world, self.solver = world, Solver(world)
        self.search = Playground(world, show=20).search
        self.places: dict[str, dict[str, str]] = {}
        for city in world.cities:
            for letter, kind in (("d", "district"), ("a", "area")):
                names = [p.name for p in world.places if p.city == city and p.kind == kind]
                self.places.setdefault(city, {}).update({f"{letter}{i}": name for i, name in enumerate(names)})
        self.symbol = {(city, name): s for city, names in self.places.items() for s, name in names.items()}
        self._shown: dict[tuple[str, str, str], list[str]] = {}
        self._won: dict[tuple[str, str, str], int | None] = {}

    def shown(self, city: str, place: str, kind: str) -> list[str]:
        """The first merchants of that kind at that place that a search finds. LookupError for no such place."""
        if place not in self.places[city] or int(kind[1:]) >= len(KINDS):
            raise LookupError("nothing")
        if (city, place, kind) not in self._shown:
            name, wanted = self.places[city][place], KINDS[int(kind[1:])]
            where = self.solver.district if place[0] == "d" else self.solver.area
            ids = [poi for poi, _ in self.search(f"{city} {name} {wanted}", city)]
            rows = [(poi, self.world.position[poi]) for poi in ids]
            fit = [poi for poi, row in rows if where[row] == name and self.solver.subcategory[row] == wanted]
            self._shown[city, place, kind] = fit[:SHOWN]
        return self._shown[city, place, kind]

    def text(self, city: str, ids: list[str]) -> str:
        """`r0a3q1...`: per merchant its slot, its area, and its rank by rating among those shown."""
        rows = [self.world.position[poi] for poi in ids]
        by_rating = sorted(rows, key=lambda row: -self.solver.rating[row])
        areas = [self.symbol[city, self.solver.area[row]] for row in rows]
        pairs = enumerate(zip(rows, areas, strict=True))
        return "".join(f"r{i}{area}q{by_rating.index(row)}" for i, (row, area) in pairs)

    def winner(self, city: str, place: str, kind: str) -> int | None:
        """The slot of the clearly best rated among its kind and place; None if there is none or no search shows it."""
        at = (city, place, kind)
        if at not in self._won:
            near = Near("district" if place[0] == "d" else "area", self.places[city][place])
            hop = Hop(KINDS[int(kind[1:])], (near,), ())
            best = self.solver.solve_hop(city, hop, [])
            found = self.shown(city, place, kind)
            enough = len(self.solver.candidates(city, hop, [])) >= LEAST
            here = best is not None and enough and self.solver.ids[best] in found
            self._won[at] = found.index(self.solver.ids[best]) if here and best is not None else None
        return self._won[at]

    def area(self, city: str, poi: str) -> str:
        return self.symbol[city, self.solver.area[self.world.position[poi]]]


@dataclass
class LocalLifeTiny(Task):
    """`d2t5t9*?`: in district d2 the best rated merchant of kind 5, then that of kind 9 in the same area as the first
    (`*`; without it, in d2). `<s>d2t5</s>` shows up to three merchants with area and rank; the next turn begins with
    the slot chosen, such as `r2<s>a7t9</s>`; `r0=r2r0` answers with the slot of each search in order.

    Merchants, retrieval and golds are those of generated worlds; the worlds, so the cities, of train and eval differ.
    hops: merchants asked for, per tier. rounds: searches that an episode may make. random_results: in training, a
    search shows random merchants of the city in place of those it found, a control. Demonstrations look in the
    question's district where an earlier answer counts (`demo_forget`), take a random slot (`demo_slip`), or answer
    before the last search (`demo_stop`), each with that chance. The score is correctness: the ids in visiting order.
    """

    name: str = "local_life_tiny"
    symbols: tuple[str, ...] | None = SYMBOLS
    max_prompt_tokens: int = 8
    max_completion_tokens: int = 0
    tiers: tuple[str, ...] = field(default=(), init=False)
    hops: dict[str, int] = field(default_factory=lambda: {"2": 2, "3": 3})
    rounds: int = 5
    random_results: bool = False
    demo_forget: float = 0.6
    demo_slip: float = 0.2
    demo_stop: float = 0.05
    size: int = 6000
    train_rows: int = 2000
    eval_rows: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tiers = tuple(self.hops)
        for tier, hops in self.hops.items():
            check_range(f"task.hops.{tier}", hops, 1, 5)
        for key in ("demo_forget", "demo_slip", "demo_stop"):
            check_range(f"task.{key}", getattr(self, key), 0, 1)
        check_range("task.rounds", self.rounds, 1)
        self.max_completion_tokens = self.max_completion_tokens or self.rounds * (7 + 3 * SHOWN) + 8
        self._grounds: dict[str, Ground] = {}

    @property
    def tools(self) -> Tools:
        return Tools(FORM, max_calls=self.rounds, max_turn_tokens=8, max_result_tokens=3 * SHOWN)

    def ground(self, split: str) -> Ground:
        seeds = {"train": 11, "eval": 12, "test": 13}
        if split not in seeds:
            raise ConfigError("Unknown split", where="task", got=split, expected=", ".join(seeds))
        if split not in self._grounds:
            self._grounds[split] = Ground(seeds[split], self.size)
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

    def warm_rows(self, seed: int) -> list[Row]:
        """Demonstrations with what the searches really find."""
        return replace(self, random_results=False).rows("train", seed)

    def _row(self, name: str, tier: str, hops: int, split: str, ground: Ground, rng: random.Random) -> Row | None:
        """A question whose every hop has one clear answer that its search shows; None where this draw has not."""
        city, district = rng.choice(ground.world.cities), f"d{rng.randrange(DISTRICTS)}"
        kinds = rng.sample(range(len(KINDS)), hops)
        plan = [(f"t{kind}", i > 0 and rng.random() < DEPENDENT) for i, kind in enumerate(kinds)]
        gold: list[str] = []
        for kind, dependent in plan:
            place = ground.area(city, gold[-1]) if dependent else district
            slot = ground.winner(city, place, kind)
            if slot is None:
                return None
            gold.append(ground.shown(city, place, kind)[slot])
        prompt = district + "".join(kind + "*" * dependent for kind, dependent in plan) + "?"
        meta: dict[str, Any] = {"city": city, "split": split, "noise": rng.randrange(2**31), "hops": hops}
        row = Row(name, prompt, gold, tier, meta=meta)
        if split == "train":
            meta["segments"] = self._demonstration(row, district, plan, ground, rng)
        return row

    def _demonstration(self, row: Row, district: str, plan: list, ground: Ground, rng: random.Random) -> list[list]:
        segments: list[list] = []
        chosen, area, city = [], district, row.meta["city"]
        for i, (kind, dependent) in enumerate(plan):
            if i and rng.random() < self.demo_stop:
                break
            place = area if dependent and rng.random() >= self.demo_forget else district
            shown = ground.shown(city, place, kind)
            if not shown:
                break
            segments += [
                [f"{''.join(chosen[-1:])}<s>{place}{kind}</s>", True],
                [f"<r>{ground.text(city, shown)}</r>", False],
            ]
            chosen.append(self._slot(ground, city, shown, rng))
            area = ground.area(city, shown[int(chosen[-1][1:])])
        return [*segments, [f"{chosen[-1]}={''.join(chosen)}", True]]

    def _slot(self, ground: Ground, city: str, shown: list[str], rng: random.Random) -> str:
        if rng.random() < self.demo_slip:
            return f"r{rng.randrange(len(shown))}"
        found = re.search(r"(r\d)a\d+q0", ground.text(city, shown))
        assert found is not None
        return found[1]

    # ---------------------------------------------------------------- episodes

    def environment(self, row: Row) -> Errand:
        return Errand(self, row)

    def score(self, text: str, row: Row) -> float:
        """1 if the last turn, with its slots resolved to ids, is the gold answer."""
        return float(text == " ".join(row.answer))

    def episode_metrics(self, traj: Any, row: Row) -> dict[str, float]:
        """searches: those carried out. slot_share: positions of the answer that hold the right id."""
        said = (traj.text or "").split()
        right = sum(a == b for a, b in zip(said, row.answer, strict=False))
        results = [t.result for t in traj.turns if t.result is not None]
        return {"searches": float(len(results)), "slot_share": right / len(row.answer)}


class Errand:
    """One episode's tool. `resolve` turns the slots of an answer into the ids that they stood for."""

    def __init__(self, task: LocalLifeTiny, row: Row) -> None:
        self.ground, self.city = task.ground(row.meta["split"]), row.meta["city"]
        self.random = random.Random(row.meta["noise"]) if task.random_results and row.meta["split"] == "train" else None
        self.found: list[list[str]] = []
        self.tools: Mapping[str, Callable[..., str]] = {"rag": self.rag}

    def rag(self, place: str, kind: str) -> str:
        """The first three merchants that a search returns."""
        shown = self.ground.shown(self.city, place, kind)
        if self.random is not None:
            rows = self.ground.world.of_city[self.city].tolist()
            shown = [self.ground.solver.ids[row] for row in self.random.sample(rows, SHOWN)]
        self.found.append(shown)
        return self.ground.text(self.city, shown)

    def resolve(self, text: str) -> str:
        """`r1=r3r1` as the ids of slot 3 of the first search and slot 1 of the second; "" for anything else."""
        match = ANSWER.fullmatch(text.strip())
        slots = re.findall(r"r(\d)", match[1]) if match else []
        if not slots or len(slots) > len(self.found):
            return ""
        pairs = list(zip(map(int, slots), self.found, strict=False))
        return " ".join(ids[slot] for slot, ids in pairs) if all(slot < len(ids) for slot, ids in pairs) else ""
