"""A world to be searched: each question has its own random knowledge base, so nothing can be memorised."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, shuffled
from experiments.tools import Tools, ToolText
from methods.errors import ConfigError

ENTITIES = tuple(f"e{i}" for i in range(40))
TYPES = tuple(f"t{i}" for i in range(8))
FORM = ToolText(call=r"<s>(?P<entity>e\d+)</s>", opening="<s>", tool="search", stop=("</s>",), result="<r>{}</r>")
SYMBOLS = (*ENTITIES, *TYPES, "<s>", "</s>", "<r>", "</r>", "?", "=", "m", ",", "error")


@dataclass
class SearchWorld(Task):
    """`e12t4?`: which is the first entity of type t4 on the way from e12? `<s>e12</s>` gives `<r>e7t2</r>`, the entity
    that follows e12 and its type; `=e20` answers.

    hops: how far the answer is, per tier, with the weights of the tiers in `train` as `mixture`; that is the gold
    depth, and searching on returns entities beyond the answer. targets: questions ask for one of so many types; a tiny
    model learns to tell two of them apart, not eight. distractors: unrelated records that each result shows behind the
    right one. memory: the chance that the prompt's remark `me9` names the right answer (0: no remark, the
    shortcut does not exist). tool_noise: the chance that a result is another entity's record.

    Demonstrations, for the warm start, of all tiers alike (a tier that `mixture` leaves out is held out of the training
    that follows): before the answer is seen they give up with `demo_early` per step (and guess), afterwards they search
    on with `demo_over`; a search goes to a random entity with `demo_noise`; with a remark they
    use it with `demo_memory` and search nothing.
    """

    name: str = "search_world"
    symbols: tuple[str, ...] | None = SYMBOLS
    max_prompt_tokens: int = 8
    max_completion_tokens: int = 0
    tiers: tuple[str, ...] = field(default=(), init=False)
    hops: dict[str, int] = field(default_factory=lambda: {"1": 1, "2": 2, "3": 3, "4": 4})
    mixture: dict[str, float] = field(default_factory=lambda: {"1": 1, "2": 1, "3": 1, "4": 0})
    targets: int = 2
    distractors: int = 0
    memory: float = 0.0
    tool_noise: float = 0.0
    max_calls: int = 4
    demo_early: float = 0.08
    demo_over: float = 0.8
    demo_noise: float = 0.0
    demo_memory: float = 0.0
    train_rows: int = 12000
    eval_rows: int = 384

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tiers = tuple(self.hops)
        if set(self.mixture) != set(self.hops) or not sum(self.mixture.values()) or min(self.mixture.values()) < 0:
            raise ConfigError(
                "The mixture needs a weight >= 0 for each tier and one above 0",
                where="task.mixture",
                got=self.mixture,
                expected="the tiers " + ", ".join(self.hops),
            )
        if not all(isinstance(k, int) and 1 <= k <= 8 for k in self.hops.values()):
            raise ConfigError("Each tier needs 1 to 8 hops", where="task.hops", got=self.hops)
        if not 1 <= self.targets <= len(TYPES):
            raise ConfigError(
                "So many types do not exist", where="task.targets", got=self.targets, expected=f"1 to {len(TYPES)}"
            )
        for key in ("memory", "tool_noise", "demo_early", "demo_over", "demo_noise", "demo_memory"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError("Not a probability", where=f"task.{key}", got=getattr(self, key), expected="0 to 1")
        # A search takes three tokens, its result four and three per distractor; the answer three.
        self.max_completion_tokens = self.max_completion_tokens or self.max_calls * (7 + 3 * self.distractors) + 6

    @property
    def tools(self) -> Tools:
        return Tools(FORM, max_calls=self.max_calls, max_turn_tokens=6, max_result_tokens=4 + 3 * self.distractors)

    # ---- rows ----
    def rows(self, split: str, seed: int) -> list[Row]:
        if split not in ("train", "eval", "test"):
            raise ConfigError("Unknown split", where="task", got=split, expected="train, eval or test")
        rng = random.Random(derive(seed, "search_world", split))
        total, rows = sum(self.mixture.values()), []
        for tier, hops in self.hops.items():
            share = (
                self.mixture[tier] / total * self.train_rows if split == "train" else self.eval_rows / len(self.hops)
            )
            rows += [self._row(f"{tier}/{split}-{i}", tier, hops, split, rng) for i in range(round(share))]
        return shuffled(rows, seed, "search_world", split)

    def warm_rows(self, seed: int) -> list[Row]:
        """Demonstrations of every tier, also of those that `mixture` leaves out."""
        return replace(self, mixture=dict.fromkeys(self.hops, 1.0)).rows("train", seed)

    def _row(self, name: str, tier: str, hops: int, split: str, rng: random.Random) -> Row:
        way = rng.sample(ENTITIES, len(ENTITIES))  # a cycle: e follows e, nothing comes twice
        target = rng.choice(TYPES[: self.targets])
        others = [t for t in TYPES if t != target]
        kinds = {e: rng.choice(TYPES) for e in way}
        kinds |= {e: rng.choice(others) for e in way[:hops]} | {way[hops]: target}
        after = dict(zip(way, way[1:] + way[:1], strict=True))
        answer, remark = way[hops], ""
        if self.memory:
            right = rng.random() < self.memory
            remark = "m" + (answer if right else rng.choice([e for e in ENTITIES if e != answer]))
        meta: dict[str, Any] = {
            "hops": hops,
            "start": way[0],
            "target": target,
            "records": {e: after[e] + kinds[after[e]] for e in way},
            "noise": rng.randrange(2**31),
        }
        row = Row(name, f"{way[0]}{target}{remark}?", answer, tier, meta=meta)
        if split == "train":
            meta["segments"] = self._demonstration(row, remark, rng)
        return row

    def _demonstration(self, row: Row, remark: str, rng: random.Random) -> list[list]:
        segments: list[list] = []
        if remark and rng.random() < self.demo_memory:
            return [["=" + remark[1:], True]]
        world, here, guess, known = World(self, row), row.meta["start"], rng.choice(ENTITIES), False
        for _ in range(self.max_calls):
            if rng.random() < (1 - self.demo_over if known else self.demo_early):
                break
            asked = rng.choice(ENTITIES) if rng.random() < self.demo_noise else here
            seen = world.search(asked)
            segments += [[f"<s>{asked}</s>", True], [f"<r>{seen}</r>", False]]
            here, kind = re.match(r"(e\d+)(t\d+)", seen).groups()  # type: ignore[union-attr]
            if kind == row.meta["target"] and not known:
                guess, known = here, True
            elif not known:
                guess = here
        return [*segments, ["=" + guess, True]]

    # ---- episodes ----
    def environment(self, row: Row) -> World:
        return World(self, row)

    def score(self, text: str, row: Row) -> float:
        """1 if the last turn is `=` and the right entity."""
        return float(text.strip() == f"={row.answer}")

    def episode_metrics(self, traj: Any, row: Row) -> dict[str, float]:
        """searches: calls carried out. excess: searches beyond the gold depth (negative: too few). seen: whether the
        answer's record was shown. waste: searches after that."""
        results = [t.result for t in traj.turns if t.result is not None]
        record = row.answer + row.meta["target"]
        shown = [i for i, result in enumerate(results) if result.startswith(record)]
        return {
            "searches": float(len(results)),
            "excess": float(len(results) - row.meta["hops"]),
            "seen": float(bool(shown)),
            "waste": float(len(results) - 1 - shown[0]) if shown else 0.0,
        }


class World:
    """One episode's tools. With noise, the k-th search of an item always meets the same noise."""

    def __init__(self, task: SearchWorld, row: Row) -> None:
        self.task, self.records = task, row.meta["records"]
        self.rng = random.Random(row.meta["noise"])
        self.tools: Mapping[str, Callable[..., str]] = {"search": self.search}

    def search(self, entity: str) -> str:
        """The record of `entity`, then the distractors."""
        if entity not in self.records:
            raise LookupError(f"there is no {entity}")
        if self.rng.random() < self.task.tool_noise:
            entity = self.rng.choice(ENTITIES)
        others = [self.records[e] for e in self.rng.sample(ENTITIES, self.task.distractors)]
        return ",".join([self.records[entity], *others])
