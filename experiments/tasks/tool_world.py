"""A world of facts behind four specialised tools and a general one, for models trained on ToolForge's dialogues.

Each episode has its own facts and its own assignment of tools to relations, so that nothing can be memorised: what a
tool is for stands in the prompt, and what is true only in results. Dialogues are made and checked by
`methods.toolforge` itself; only the thoughts have a few words, so that a tiny model can write them.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, shuffled
from experiments.tools import HERMES, Tools
from methods.errors import ConfigError, RunError
from methods.toolforge.bundles import Search, merged, pool_search
from methods.toolforge.checks import NAMES, check
from methods.toolforge.draft import Draft, Offer, draft
from methods.toolforge.items import Item, Passage
from methods.toolforge.labels import Call, Label
from methods.toolforge.record import ASK, INSTRUCTIONS, answer_in, assemble, shown_text, turn_text
from methods.toolforge.shapes import SHAPES, Shape, make_shape
from methods.toolforge.tools import Schema

ENTITIES = tuple(f"e{i}" for i in range(20))
RELATIONS = tuple(f"r{i}" for i in range(4))
SPECIALISTS, GENERAL = tuple(f"t{i}" for i in range(4)), "g"
HITS = 2  # unrelated facts in a result; six for the three failures of a ladder
# The right specialist is out of order, and the general tool serves: a shape of this world beside the 29.
OUTAGES = {
    "A_outage": make_shape("A_outage", "b1:insufficient g1:general", "extra"),
    "C_outage_1": make_shape("C_outage_1", "b1:insufficient g1:general g2", "extra"),
    "C_outage_2": make_shape("C_outage_2", "g1 b2:insufficient g2:general", "extra"),
}
THOUGHTS = {
    "": "need ",
    "tool": "wrong tool for ",
    "arguments": "wrong query for ",
    "insufficient": "nothing found on ",
}
_PARAMETERS = (
    '", "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}}\n'
)
SYMBOLS = (
    *ENTITIES, *RELATIONS, *SPECIALISTS, GENERAL, "any", " ", *THOUGHTS.values(), "found",
    INSTRUCTIONS["en"] + '\n\n<tools>\n{"description": "', 'any", "name": "g', _PARAMETERS + '{"description": "',
    # One token says what a tool serves and its name (which of the sixteen a prompt has changes with each episode), one
    # what a thought needs and that a call follows: two layers then suffice to look a tool up.
    *(f'{r}", "name": "{t}' for r in RELATIONS for t in SPECIALISTS),
    *(f'{r}</think>\n<tool_call>{{"name": "' for r in RELATIONS), _PARAMETERS + "</tools>", ASK["en"].format(""),
    "<think>", '", "arguments": {"query": "', '"}}</tool_call>',
    "</think>\n<answer>", "</answer>", "\n**1**\ntitle: ", "\ncontent: ",
    *(f"{'' if i == 1 else chr(10)}**{i}**\ntitle: " for i in range(1, 9)), "error: ", "nothing",
)  # fmt: skip


@dataclass
class ToolWorld(Task):
    """`e5 r1 r3`: what is r3 of the r1 of e5?

    The prompt lists five tools, one per relation and `g` for any; a call asks
    for one fact, such as `e5 r1`. A result shows two facts that the query has words in common with, and if the tool
    serves that relation and is not out of order, the fact itself.

    shapes: those of the training dialogues, alike often unless named twice (of family A or C, as `hops` is 1 or 2;
    `none` is the bare triple: the question and its answer, without a tool). warm_shapes: of the dialogues that a tiny
    model is warm-started on, always of one hop. outages: chance that a specialist's call is out of order, per tier of
    the evaluation. invented: chance that a result of a training dialogue shows the asked fact with another value (a
    writer that invents). checked: rules that a dialogue must pass; one that fails is left out, as in the pipeline.
    """

    name: str = "tool_world"
    symbols: tuple[str, ...] | None = None
    max_prompt_tokens: int = 40
    max_completion_tokens: int = 260
    tiers: tuple[str, ...] = field(default=(), init=False)
    hops: int = 2
    shapes: list[str] = field(default_factory=lambda: ["C1"])
    warm_shapes: list[str] = field(default_factory=lambda: ["A1"])
    outages: dict[str, float] = field(default_factory=lambda: {"p0": 0.0, "p3": 0.3, "p6": 0.6})
    invented: float = 0.0
    checked: list[str] = field(default_factory=lambda: list(NAMES))
    train_rows: int = 3000
    warm: int = 3000
    eval_rows: int = 384
    max_calls: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.symbols = self.symbols or tuple(dict.fromkeys(SYMBOLS))
        self.tiers = tuple(self.outages)
        for key, names in (("shapes", self.shapes), ("warm_shapes", self.warm_shapes)):
            for name in names:
                if name != "none" and name not in OUTAGES and (name not in SHAPES or name[0] in "BD"):
                    raise ConfigError(
                        "No such shape in this world",
                        where=f"task.{key}",
                        got=name,
                        expected="none, A1 to A4, C1 to C10 without C2, " + ", ".join(OUTAGES),
                    )
                if name[0] in "AC" and (name[0] == "C") != (self.hops == 2 and key == "shapes"):
                    raise ConfigError("The shape has another number of rounds", where=f"task.{key}", got=name)
            if not names:
                raise ConfigError("There is no shape", where=f"task.{key}", got=names, expected="one or more")
        shares = {**{f"outages.{k}": v for k, v in self.outages.items()}, "invented": self.invented}
        for key, value in shares.items():
            if not 0 <= value <= 1:
                raise ConfigError("Not a probability", where=f"task.{key}", got=value, expected="0 to 1")
        if unknown := [name for name in self.checked if name not in NAMES]:
            raise ConfigError("No such rule", where="task.checked", got=unknown[0], expected=", ".join(NAMES))
        if self.hops not in (1, 2):
            raise ConfigError("Out of range", where="task.hops", got=self.hops, expected="1 or 2")

    @property
    def tools(self) -> Tools:
        return Tools(HERMES, max_calls=self.max_calls, max_turn_tokens=15, max_result_tokens=40)

    # ---- rows ----
    def rows(self, split: str, seed: int) -> list[Row]:
        if split not in ("train", "eval", "test"):
            raise ConfigError("Unknown split", where="task", got=split, expected="train, eval or test")
        if split == "train":
            return self._dialogues(self.shapes, self.hops, self.train_rows, derive(seed, "tool_world", "train"))
        rows = []
        for tier, outage in self.outages.items():
            for i in range(self.eval_rows // len(self.outages)):
                rng = random.Random(derive(seed, "tool_world", split, tier, i))
                case = Case.draw(rng, self.hops)
                meta = {"case": case, "outage": outage, "noise": rng.randrange(2**31)}
                rows.append(Row(f"{tier}/{split}-{i}", case.prompt(), case.item.answer, tier, meta=meta))
        return shuffled(rows, seed, "tool_world", split)

    def warm_rows(self, seed: int) -> list[Row]:
        """Dialogues of one hop, by a writer that invents nothing."""
        honest = replace(self, invented=0.0, checked=list(NAMES))
        return honest._dialogues(self.warm_shapes, 1, self.warm, derive(seed, "tool_world", "warm"))

    def _dialogues(self, shapes: Sequence[str], hops: int, count: int, seed: int) -> list[Row]:
        """So many dialogues that passed the checks. RunError where hardly any passes."""
        rows: list[Row] = []
        for i in range(20 * count):
            if len(rows) == count:
                return rows
            rng = random.Random(derive(seed, i))
            name = rng.choice(shapes)
            case = Case.draw(rng, hops)
            made = case.bare() if name == "none" else case.dialogue(SHAPES.get(name) or OUTAGES[name], self, rng)
            if made is not None:
                rows.append(Row(f"train-{i}", case.prompt(), case.item.answer, meta={"shape": name, **made}))
        raise RunError("Hardly any dialogue passes the checks", where="task.shapes", got=f"{len(rows)} of {20 * count}")

    # ---- episodes ----
    def environment(self, row: Row) -> Facts:
        return Facts(row.meta["case"], row.meta.get("outage", 0.0), row.meta.get("noise", 0))

    def score(self, text: str, row: Row) -> float:
        """EM of the last answer block."""
        return float((answer_in(text) or "").strip() == row.answer)

    def episode_metrics(self, traj: Any, row: Row) -> dict[str, float]:
        """calls; wrong_calls: to a specialist that is not for the relation asked for; recovery: EM of an episode that
        met an outage (NaN: met none)."""
        env = self.environment(row)
        calls = [call for turn in traj.turns for call in turn.calls if call and turn.result is not None]
        for call in calls:
            # The whole call: its results are shuffled by the numbers that the next outage is drawn from.
            with contextlib.suppress(Exception):  # of arguments that no tool takes
                env.tools[call["tool"]](**call["args"])
        return {
            "calls": float(len(calls)),
            "wrong_calls": float(env.wrong),
            "recovery": self.score(traj.text, row) if env.failed else float("nan"),
        }


@dataclass
class Case:
    """One episode's facts, tools and question."""

    item: Item
    relations: tuple[str, ...]
    facts: dict[str, str]
    serves: dict[str, str]
    schemas: tuple[Schema, ...]
    search: Search

    @classmethod
    def draw(cls, rng: random.Random, hops: int) -> Case:
        way = rng.sample(ENTITIES, hops + 1)
        relations = tuple(rng.sample(RELATIONS, hops))
        facts = {f"{e} {r}": rng.choice(ENTITIES) for e in ENTITIES for r in RELATIONS}
        facts |= {f"{e} {r}": after for e, r, after in zip(way, relations, way[1:], strict=False)}
        gold = tuple(_passage(f"{e} {r}", facts) for e, r in zip(way, relations, strict=False))
        keys = [key for key in facts if key.split()[0] not in way[:hops]]
        pool = tuple(merged([_passage(key, facts) for key in rng.sample(keys, len(keys))]))
        serves = dict(zip(SPECIALISTS, rng.sample(RELATIONS, len(RELATIONS)), strict=True)) | {GENERAL: "any"}
        schemas = tuple(_schema(name, serves[name]) for name in rng.sample(list(serves), len(serves)))
        item = Item("", " ".join([way[0], *relations]), way[-1], "bridge", gold, pool)
        return cls(item, relations, facts, serves, schemas, pool_search(pool))

    def prompt(self) -> list[dict]:
        from methods.toolforge.record import system_text

        question = ASK["en"].format(self.item.question)
        return [{"role": "system", "content": system_text(self.schemas)}, {"role": "user", "content": question}]

    def bare(self) -> dict:
        """The triple itself: the answer at once."""
        said = turn_text({"think": "found", "answer": self.item.answer})
        return {"messages": [*self.prompt(), {"role": "assistant", "content": said}], "mistakes": []}

    def dialogue(self, shape: Shape, task: ToolWorld, rng: random.Random) -> dict | None:
        """Messages of one dialogue and the places of its planted mistakes; None if a rule rejects it."""
        by_name = {schema["name"]: schema for schema in self.schemas}
        tool_of = {relation: tool for tool, relation in self.serves.items()}
        topics = [gold.content.split()[0] for gold in self.item.gold]
        queries = [f"{topic} {r}" for topic, r in zip(topics, self.relations, strict=True)]
        rounds = tuple(
            (Call(tool_of[r], query, topic, (i,)),)
            for i, (r, query, topic) in enumerate(zip(self.relations, queries, topics, strict=True))
        )
        label = Label("case1" if len(rounds) == 1 else "case3", tuple(tool_of[r] for r in self.relations), "")
        mapping = {name: by_name[name] for name in label.tools}
        wrong = tuple(by_name[name] for name in SPECIALISTS if name not in mapping)
        offer = Offer(self.schemas, mapping, by_name[GENERAL], wrong)
        plan = draft(
            self.item, label, shape, rounds, offer, rng, self.search, hits=((HITS, HITS), (3 * HITS, 3 * HITS))
        )
        shown = [shown_text(bundle) for bundle in plan.bundles]
        for i, step in enumerate(shape.steps):
            if rng.random() < task.invented:
                shown[i] = self._invented(shown[i], plan.gold[step.round - 1][0], rng)
        record = assemble(
            self.item, shape, label, uuid="", turns=_turns(plan, queries, rng), bundles=plan.bundles, shown=shown,
            gold=plan.gold, schemas=self.schemas, mapping={name: name for name in mapping},
        )  # fmt: skip
        scores = check(record, shape=shape)
        if not all(scores[name] for name in task.checked):
            return None
        return {"messages": record[1]["messages"], "mistakes": [2 + 2 * i for i in shape.mistakes]}

    def _invented(self, shown: str, fact: Passage, rng: random.Random) -> str:
        """A tool message in which a fact that the tool does not know has the asked fact's name and a wrong value."""
        entity, value = fact.content.split()
        other = f"{entity} {rng.choice([e for e in ENTITIES if e != value])}"
        if fact.content in shown:
            return shown.replace(
                f"title: {fact.title}\ncontent: {fact.content}", f"title: {fact.title}\ncontent: {other}"
            )
        head, _, _ = shown.partition("\n**2**")
        return f"{head}\n**2**\ntitle: {fact.title}\ncontent: {other}"


def _turns(plan: Draft, queries: list[str], rng: random.Random) -> list[str]:
    """The assistant's turns in this world's few words."""
    turns, before = [], ""
    for step in plan.shape.steps:
        call = plan.calls(step.round)[0]
        name, query = call.tool, queries[step.round - 1]
        if step.mistake == "general":
            name = GENERAL
        elif step.mistake == "tool":
            name = rng.choice(plan.offer.wrong)["name"]
        elif step.mistake == "arguments":
            query = f"{rng.choice([e for e in ENTITIES if e != call.topic])} {query.split()[1]}"
        turns.append(
            turn_text(
                {"think": THOUGHTS[before] + query.split()[1], "calls": [{"name": name, "arguments": {"query": query}}]}
            )
        )
        before = "" if step.works else step.mistake
    return [*turns, turn_text({"think": "found", "answer": plan.item.answer})]


def _passage(key: str, facts: Mapping[str, str]) -> Passage:
    entity, relation = key.split()
    return Passage(relation, f"{entity} {facts[key]}")


def _schema(name: str, serves: str) -> Schema:
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    return {"description": serves, "name": name, "parameters": parameters}


class Facts:
    """One episode's tools. The k-th call of an item always meets the same outage."""

    def __init__(self, case: Case, outage: float, noise: int) -> None:
        self.case, self.outage, self.rng = case, outage, random.Random(noise)
        self.wrong = self.failed = 0
        self.tools: Mapping[str, Callable[..., str]] = {name: partial(self.call, name) for name in case.serves}

    def note(self, tool: str, query: str) -> bool:
        """Whether a call is served; counts wrong tools and outages."""
        relation, out = query.rpartition(" ")[2], self.rng.random() < self.outage
        if tool == GENERAL:
            return True
        right = self.case.serves[tool] == relation
        self.wrong += not right
        self.failed += right and out
        return right and not out

    def call(self, tool: str, query: str) -> str:
        """The facts that a tool returns for a query such as `e5 r1`, in random order."""
        found = self.case.search(query, HITS)
        if self.note(tool, query) and query in self.case.facts:
            found = [_passage(query, self.case.facts), *found]
        self.rng.shuffle(found)
        return shown_text(found) or "nothing"
