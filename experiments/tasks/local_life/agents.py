"""Scripted agents: they know the program behind a question and lack one skill each. They measure a world's questions.

What an agent knows of merchants is what its searches returned; of events, what the web said.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from experiments.tasks.local_life.playground import Visit
from experiments.tasks.local_life.programs import Hop, Near, Program, Solver, forgetful
from experiments.tasks.local_life.questions import Question

NONE = "none"  # stands where a slot could not be filled


@dataclass
class Attempt:
    """One question in the hands of an agent with `calls` searches left."""

    question: Question
    solver: Solver
    visit: Visit
    calls: int
    rng: random.Random

    def __post_init__(self) -> None:
        assert self.question.verifier is not None
        self.program: Program = self.question.verifier
        self.seen: dict[str, None] = {}
        self.areas: dict[str, str] = {}

    def rag(self, query: str) -> list[str]:
        """The ids that a search returned; none without calls left."""
        if self.calls < 1:
            return []
        self.calls -= 1
        self.visit.call("rag", query)
        found = list(self.visit.calls[-1].found)
        self.seen |= dict.fromkeys(found)
        return found

    def web(self, event: str) -> None:
        """Learns the area of this city's coming event from the pages that a web search shows."""
        if self.calls < 1:
            return
        self.calls -= 1
        year = self.solver.world.today[:4]
        text = self.visit.call("web_search", f"{event} {year}")
        here, name = re.escape(self.program.city), re.escape(event)
        english = rf"{name} takes place in (\S+), {here}, on {year}"
        found = re.search(english, text) or re.search(rf"{name}于{year}\S+ \S+在{here}(\S+)举行", text)
        if found:
            self.areas[event] = found[1]

    # ---------------------------------------------------------------- the plan

    def follow(self, program: Program) -> list[str]:
        """Searches and chooses hop by hop, as long as there are calls; the ids, `none` for what could not be found."""
        for event in program.events:
            if event not in self.areas:
                self.web(event)
        if program.budget is not None:
            for hop in program.hops:
                self._search(program, hop, [])
            return self._ids(self._known().solve_rows(program) or [])
        rows: list[int] = []
        for hop in program.hops:
            if not self._search(program, hop, rows):
                break
            best = self._known().solve_hop(program.city, hop, rows)
            if best is None:
                break
            rows.append(best)
        return self._ids(rows)

    def _search(self, program: Program, hop: Hop, rows: list[int]) -> bool:
        """The searches of one hop; whether calls were left for all of them and each place is known."""
        for near in hop.near:
            place = self.place(program, near, rows)
            if self.calls < 1 or not place:
                return False
            chain = self.solver.chain[rows[hop.chain_of]] if hop.chain_of >= 0 else ""
            self.rag(f"{program.city} {chain or f'{place} {hop.subcategory}'}")
        return True

    def place(self, program: Program, near: Near, rows: list[int]) -> str:
        if near.of == "event":
            return self.areas.get(near.name, "")
        return near.name if near.of == "district" else self.solver.area_of(program.city, near, rows)

    def _known(self) -> Solver:
        view = self.solver.among(self.seen)
        view.event_area = {(self.program.city, event): area for event, area in self.areas.items()}
        return view

    def _ids(self, rows: list[int]) -> list[str]:
        ids = [self.solver.ids[row] for row in rows]
        return ids + [NONE] * (len(self.program.hops) - len(ids))


# ---------------------------------------------------------------- agents


def reference(attempt: Attempt) -> list[str]:
    """The right plan."""
    return attempt.follow(attempt.program)


def no_dependency(attempt: Attempt) -> list[str]:
    """The right plan, but what lies near an earlier answer is sought near the question's own place."""
    program = attempt.program
    hops = tuple(hop if hop.chain_of >= 0 else forgetful(hop, program.anchor) for hop in program.hops)
    return attempt.follow(replace(program, hops=hops))


def no_web(attempt: Attempt) -> list[str]:
    """The right plan without the web: where an event takes place is guessed."""
    areas = [p.name for p in attempt.solver.world.places if p.kind == "area" and p.city == attempt.program.city]
    attempt.areas = {event: attempt.rng.choice(areas) for event in attempt.program.events}
    return attempt.follow(attempt.program)


def one_search(attempt: Attempt) -> list[str]:
    """One search with the whole question; the best of what it shows for every slot."""
    attempt.rag(attempt.question.text)
    view, program, rows = attempt.solver.among(attempt.seen), attempt.program, []
    if program.budget is not None:
        return attempt._ids(view.solve_rows(program) or [])
    for hop in program.hops:
        best = view.solve_hop(program.city, hop, rows)
        if best is None:
            break
        rows.append(best)
    return attempt._ids(rows)


def random_in_city(attempt: Attempt) -> list[str]:
    """Any merchant of the right kind that a search for the kind in the city shows."""
    return [_any(attempt, f"{attempt.program.city} {hop.subcategory}", hop, "") for hop in attempt.program.hops]


def random_in_area(attempt: Attempt) -> list[str]:
    """Any merchant of the right kind in the right place, which is given away."""
    program, gold = attempt.program, attempt.question.gold or ()
    areas = [attempt.solver.area[attempt.solver.world.position[poi_id]] for poi_id in gold]
    hops = zip(program.hops, areas, strict=True)
    return [_any(attempt, f"{program.city} {area} {hop.subcategory}", hop, area) for hop, area in hops]


def _any(attempt: Attempt, query: str, hop: Hop, area: str) -> str:
    merchants = [attempt.solver.world.merchant(poi_id) for poi_id in attempt.rag(query)]
    fit = [m.poi_id for m in merchants if m.subcategory == hop.subcategory and area in (m.business_area, "")]
    return attempt.rng.choice(fit) if fit else NONE


AGENTS: dict[str, Callable[[Attempt], list[str]]] = {
    "reference": reference,
    "no_dependency": no_dependency,
    "no_web": no_web,
    "one_search": one_search,
    "random_in_city": random_in_city,
    "random_in_area": random_in_area,
}
