"""The 29 reasoning shapes as one table, from which role patterns, bundles, flows and checks are derived.

A shape is a list of steps, one per tool message. A step is written `<kind><round>[:mistake]`:

    g    the call that works: hits and the gold passages of its round
    b    a call that fails: hits only
    x y z    three failures, ever closer: the worst, the middle and the best third of the hits

and a mistake is `arguments` (right tools, wrong arguments in every call of the turn), `one_arguments` (in one call),
`tool` (every tool wrong), `one_tool`, `insufficient` (a right call that finds too little) or, on a call that works,
`general` (the catch-all tool in place of the specialists). Families: A one round with one call, B one round with
several, C two rounds with one call each, D two rounds, one of them at least with several calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Window = tuple[int, int]
MISTAKES = ("arguments", "one_arguments", "tool", "one_tool", "insufficient")

# shapes that share a row; steps; tool policy of check 8; retry window of check 6
_TABLE = (
    ("A1 B1", "g1", "exact", None),
    ("A2 B2", "b1:arguments g1", "exact", (0, 1)),
    ("B3", "b1:one_arguments g1", "exact", (0, 1)),
    ("A3 B4", "b1:tool g1", "extra", None),
    ("B5", "b1:one_tool g1", "extra", None),
    ("A4 B6", "x1:tool y1:arguments z1:insufficient g1:general", "extra", (1, 2)),
    ("C1 D1", "g1 g2", "exact", None),
    ("D2", "g1", "fewer", None),
    ("C3 D3", "g1 b2:tool g2", "extra", None),
    ("C4 D4", "g1 b2:arguments g2", "exact", (1, 2)),
    ("C5 D5", "b1:arguments g1 b2:arguments g2", "exact", (0, 3)),
    ("C6 D6", "b1:tool g1 b2:tool g2", "extra", None),
    ("C7 D7", "b1:tool g1 g2", "extra", None),
    ("C8 D8", "b1:arguments g1 g2", "exact", (0, 1)),
    ("C9 D9", "g1 x2:tool y2:arguments z2:insufficient g2:general", "extra", (2, 3)),
    ("C10 D10", "x1:tool y1:arguments z1:insufficient g1:general g2", "extra", (1, 2)),
)
ROUTES = {"case1": "A", "case2": "B", "case3": "C", "case4": "D"}


@dataclass(frozen=True)
class Step:
    """One tool turn: `kind` (g b x y z), `round` from 1, and the mistake that is planted in its call or ""."""

    kind: str
    round: int
    mistake: str = ""

    @property
    def works(self) -> bool:
        return self.kind == "g"


@dataclass(frozen=True)
class Shape:
    """One shape. policy: exact | extra (further tools may be called) | fewer. window: of check 6, None: no retries."""

    name: str
    steps: tuple[Step, ...]
    policy: str
    window: Window | None

    @property
    def family(self) -> str:
        return self.name[0]

    @property
    def roles(self) -> tuple[str, ...]:
        """system, user, (assistant, tool) for each bundle, assistant."""
        return ("system", "user", *("assistant", "tool") * len(self.steps), "assistant")

    @property
    def rounds(self) -> int:
        return max(step.round for step in self.steps)

    @property
    def fallback(self) -> bool:
        """Whether the general tool ends a ladder of three failures."""
        return any(step.mistake == "general" for step in self.steps)

    @property
    def mistakes(self) -> tuple[int, ...]:
        """Assistant turns, from 0, with a planted mistake."""
        return tuple(i for i, step in enumerate(self.steps) if step.mistake in MISTAKES)

    def retry_window(self, release: bool = False) -> Window | None:
        """The window of check 6; the first release never had one for C8 and D8."""
        return None if release and self.name in ("C8", "D8") else self.window


def _step(text: str) -> Step:
    place, _, mistake = text.partition(":")
    return Step(place[0], int(place[1:]), mistake)


def make_shape(name: str, steps: str, policy: str, window: Window | None = None) -> Shape:
    """A shape from steps as in the table, such as "b1:tool g1"."""
    return Shape(name, tuple(map(_step, steps.split())), policy, window)


def _order(name: str) -> tuple[str, int]:
    return name[0], int(name[1:])


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in sorted(
        (make_shape(name, steps, policy, window) for names, steps, policy, window in _TABLE for name in names.split()),
        key=lambda shape: _order(shape.name),
    )
}


def of_route(route: str) -> tuple[Shape, ...]:
    """The shapes of `case1` to `case4`; KeyError for another route."""
    return tuple(shape for shape in SHAPES.values() if shape.family == ROUTES[route])


def case_entropy(names: Iterable[str]) -> float:
    """Entropy of the shapes' shares divided by ln 29; 1 is an even mix, 0 a single shape (or none)."""
    found = list(names)
    shares = [found.count(name) / len(found) for name in sorted(set(found))]
    return abs(sum(p * math.log(p) for p in shares)) / math.log(len(SHAPES))
