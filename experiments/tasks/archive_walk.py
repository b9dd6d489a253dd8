"""A walk through an archive that does not fit into the prompt: what is dropped cannot be looked up again."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, shuffled
from methods.errors import ConfigError
from methods.ziprl.forms import Document, Entry, Written, Zip
from methods.ziprl.quality import NOTHING, Scale, agreement

ENTITIES = tuple(f"e{i}" for i in range(40))
RELATIONS = tuple(f"k{i}" for i in range(4))
ATTRIBUTES = tuple(f"k{i}" for i in range(4, 16))
VALUES = tuple(f"v{i}" for i in range(20))
SYMBOLS = (
    *(
        *ENTITIES,
        *RELATIONS,
        *ATTRIBUTES,
        "l1",
        "l2",
        "l3",
        "l4",
        "l5",
        "q",
        ":",
        "m",
        "d",
        "=",
        "z",
        "o",
        "f",
        "error",
    ),
    *(key + entity for key in RELATIONS for entity in ENTITIES),
    *(key + value for key in ATTRIBUTES for value in VALUES),
)
PAGE = 12  # pairs of a page
TOKEN = re.compile(r"k\d+[ev]\d+|k\d+|e\d+|l\d|error|[q:md=zof]")
TURN = re.compile(r"(?:z(?P<page>e\d+)l(?P<level>\d)(?P<pairs>[^of]*))?(?:o(?P<open>e\d+)|f(?P<finish>.*))?", re.DOTALL)


def pairs(text: str) -> list[str]:
    """`k4v2k9v1` as `[k4v2, k9v1]`; whatever else was written is a pair that no page has."""
    return TOKEN.findall(text)


def key(pair: str) -> str:
    return re.split("[ev]", pair)[0]


@dataclass
class ArchiveWalk(Task):
    """`qe5k2:k4k9=`: open e5, follow relation k2 from page to page until one lacks it; what are k4 and k9 on the way?

    A page has twelve pairs of key and value and can be opened once. A turn writes what it keeps of the page it sees, at
    one of five levels, and an action: `ze5l2k4v7oe17` keeps one pair and opens e17, `ze3l1fk4v7k9v1` answers with the
    asked pairs in the order in which they were met. The archive of each question is made anew.

    pages: of the walk, per tier, with the weights of the tiers in `train` as `mixture`; from 41 pages on entities come
    again with a new page. keys: asked at most (1 to 4). relevant: chance that a page has some of them. max_facts: asked
    pairs on a walk. Demonstrations (`warm_rows`: one row per turn) choose levels at random, fill them with the first
    pairs of the page, keep an asked pair with `demo_keep`, and answer with what they have.

    Differs from the sheet: one relation is followed all the way and the keys are asked on all pages, so that the
    question stays short however long the walk is; the answer names the keys beside the values. A pair is one token, so
    that a page has 14 and the prompt 56, as many pages as 160 tokens have of 38.
    """

    episodes_by = "ziprl_archive"

    name: str = "archive_walk"
    symbols: tuple[str, ...] | None = None
    max_prompt_tokens: int = 56
    max_completion_tokens: int = 0
    tiers: tuple[str, ...] = field(default=(), init=False)
    pages: dict[str, int] = field(default_factory=lambda: {"2": 2, "3": 3, "5": 5, "8": 8, "16": 16})
    mixture: dict[str, float] = field(default_factory=lambda: {"2": 1, "3": 1, "5": 1, "8": 0, "16": 0})
    keys: int = 2
    relevant: float = 0.5
    max_facts: int = 12
    demo_keep: float = 0.8
    train_rows: int = 4000
    eval_rows: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tiers = tuple(self.pages)
        if set(self.mixture) != set(self.pages) or not sum(self.mixture.values()) or min(self.mixture.values()) < 0:
            raise ConfigError(
                "The mixture needs a weight >= 0 for each tier and one above 0",
                where="task.mixture",
                got=self.mixture,
                expected="the tiers " + ", ".join(self.pages),
            )
        for name, values, low, high in (
            ("pages", self.pages.values(), 1, 512),
            ("keys", [self.keys], 1, 4),
            ("max_facts", [self.max_facts], 1, 64),
            ("relevant", [self.relevant], 0, 1),
            ("demo_keep", [self.demo_keep], 0, 1),
        ):
            if not all(low <= value <= high for value in values):
                raise ConfigError(
                    "A setting of the archive is out of range",
                    where=f"task.{name}",
                    got=getattr(self, name),
                    expected=f"{low} to {high}",
                )
        self.symbols = self.symbols or SYMBOLS
        # A whole page copied with its head, then the longest answer, then the end.
        self.max_completion_tokens = self.max_completion_tokens or PAGE + 3 + self.max_facts + 2

    # ---- rows ----
    def rows(self, split: str, seed: int) -> list[Row]:
        if split not in ("train", "eval", "test"):
            raise ConfigError("Unknown split", where="task", got=split, expected="train, eval or test")
        rng = random.Random(derive(seed, "archive_walk", split))
        total, rows = sum(self.mixture.values()), []
        for tier, count in self.pages.items():
            share = self.mixture[tier] / total * self.train_rows
            share = share if split == "train" else self.eval_rows / len(self.pages)
            rows += [self._row(f"{tier}/{split}-{i}", tier, count, rng) for i in range(round(share))]
        return shuffled(rows, seed, "archive_walk", split)

    def _row(self, name: str, tier: str, count: int, rng: random.Random) -> Row:
        walk = _walk(count, rng)
        relation, asked = rng.choice(RELATIONS), rng.sample(ATTRIBUTES, rng.randint(1, self.keys))
        held, left = [[] for _ in walk], self.max_facts
        for place in shuffled(range(count), rng.randrange(2**31)):
            # At least one page has something to remember.
            if left and (left == self.max_facts or rng.random() < self.relevant):
                held[place] = rng.sample(asked, rng.randint(1, min(left, len(asked))))
                left -= len(held[place])
        # Behind the last page there is nothing: an empty slice.
        written = [_page(walk[t + 1 : t + 2], relation, asked, held[t], rng) for t in range(count)]
        answer = "".join(pair for page in written for pair in page if key(pair) in asked)
        meta = {"walk": walk, "written": written, "relation": relation, "asked": asked, "noise": rng.randrange(2**31)}
        row = Row(name, "", answer, tier, meta=meta)
        return replace(row, prompt=PairForm(row, Scale()).ask([], [], None, False)[0])

    def warm_rows(self, seed: int) -> list[Row]:
        """The turns of scripted episodes, each with the prompt that it answers."""
        rng = random.Random(derive(seed, "archive_walk", "demonstrations"))
        turns = [turn for row in self.rows("train", seed) for turn in self._demonstrate(row, rng)]
        return [turn for turn in turns if len(TOKEN.findall(str(turn.prompt))) <= self.max_prompt_tokens]

    def _demonstrate(self, row: Row, rng: random.Random) -> list[Row]:
        form, memory, turns = PairForm(row, Scale()), [], []
        walk, written = row.meta["walk"], row.meta["written"]

        def add(documents: Sequence[Document], completion: str, last: bool = False) -> None:
            prompt, opening = form.ask(memory, documents, None, last)
            turns.append(Row(f"{row.id}/{len(turns)}", prompt + opening, "", row.tier, completion))

        add([], "o" + walk[0])
        forced = rng.randrange(len(walk))
        for t, page in enumerate(written):
            zipped = self._lossy(Document(walk[t], _text(page)), row.meta["asked"], rng)
            known = [*memory, Entry("", (zipped,))]
            facts = "".join(p for e in known for z in e.zips for p in pairs(z.text) if key(p) in row.meta["asked"])
            action = "o" + walk[t + 1] if t + 1 < len(walk) else "f" + facts
            add([Document(walk[t], _text(page))], f"z{zipped.id}l{zipped.level}{zipped.text}{action}")
            memory.append(Entry("", (zipped,)))
            if t == forced:
                add([], facts, last=True)
        return turns

    def _lossy(self, page: Document, asked: Sequence[str], rng: random.Random) -> Zip:
        level = rng.randint(1, 5)
        low, high = Scale().interval(level)
        room = rng.randint(round(low * PAGE), int(high * PAGE))
        every = pairs(page.text)
        wanted = [p for p in every if key(p) in asked and rng.random() < self.demo_keep][:room]
        others = [p for p in every if key(p) not in asked]
        kept = {*wanted, *others[: room - len(wanted)]}
        return Zip(page.id, level, _text([p for p in every if p in kept]))

    # ---- episodes ----
    def environment(self, row: Row) -> Archive:
        return Archive(row)

    def score(self, text: str, row: Row) -> float:
        """1 if the answer has exactly the asked pairs in their order."""
        return float(text == row.answer)

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        """f1: of the answer's pairs, in whatever order."""
        said, gold = (Counter(re.findall(r"k\d+v\d+", t)) for t in (text, row.answer))
        common = sum((said & gold).values())
        return {"f1": 2 * common / (sum(said.values()) + sum(gold.values())) if common else 0.0}


def _walk(count: int, rng: random.Random) -> list[str]:
    """Entities in random order; again from the start of a new order once all were used."""
    walk: list[str] = []
    while len(walk) < count:
        order = rng.sample(ENTITIES, len(ENTITIES))
        walk += order[1:] if walk and walk[-1] == order[0] else order
    return walk[:count]


def _page(following: list[str], relation: str, asked: Sequence[str], held: list[str], rng: random.Random) -> list[str]:
    """Twelve pairs: the relations (the followed one only if the walk goes on), the asked keys `held`, others.

    Eleven on a last page of four asked keys that holds none of them: there are not more other keys.
    """
    to = {r: rng.choice(ENTITIES) for r in RELATIONS}
    to = to | {relation: following[0]} if following else {r: e for r, e in to.items() if r != relation}
    free = [a for a in ATTRIBUTES if a not in asked]
    others = rng.sample(free, min(len(free), PAGE - len(to) - len(held)))
    page = [r + e for r, e in to.items()] + [a + rng.choice(VALUES) for a in (*held, *others)]
    rng.shuffle(page)
    return page


def _text(page: Sequence[str]) -> str:
    return "".join(page)


class Archive:
    """One episode's tools: each page can be opened once; pages beside the walk hold nothing that was asked."""

    def __init__(self, row: Row) -> None:
        self.row, self.visits = row, Counter()
        self.tools: Mapping[str, Callable[..., str]] = {"open": self.open}

    def form(self, scale: Scale) -> PairForm:
        return PairForm(self.row, scale)

    def open(self, entity: str) -> str:
        if entity not in ENTITIES:
            raise LookupError(f"there is no {entity}")
        meta, visit = self.row.meta, self.visits[entity]
        places = [t for t, e in enumerate(meta["walk"]) if e == entity]
        if visit >= max(1, len(places)):
            raise LookupError(f"{entity} was opened before")
        self.visits[entity] += 1
        if places:
            return f"{entity}:{_text(meta['written'][places[visit]])}"
        rng = random.Random(derive(meta["noise"], entity))
        return f"{entity}:{_text(_page([rng.choice(ENTITIES)], meta['relation'], meta['asked'], [], rng))}"


@dataclass
class PairForm:
    """The language of the archive, and a symbolic Q_com in which the question itself says what is relevant.

    With a = asked keys on the page and k = pairs written:
        ratio = as for texts, on the number of pairs;  level = 1 - |l - l*| / 4, l* = 1 + min(4, a)
        info  = share of the page's asked pairs that were kept (1 - k/12 if a = 0)
        sem   = share of the written pairs that are pairs of the page (1 if none was written)
    An empty page gives 0 for everything, as it does for texts.
    """

    row: Row
    scale: Scale

    def ask(
        self, memory: Sequence[Entry], documents: Sequence[Document], level: int | None, last: bool
    ) -> tuple[str, str]:
        meta = self.row.meta
        # What was compressed to nothing leaves nothing in the prompt, so that irrelevant pages cost nothing later.
        known = "".join(self._zip(z, entry) for entry in memory for z in entry.zips if z.text)
        shown = "".join(f"d{d.id}{d.text}" for d in documents)
        prompt = f"q{meta['walk'][0]}{meta['relation']}:{''.join(meta['asked'])}{known}{shown}="
        if last:
            return prompt, "f"
        return prompt, f"z{documents[0].id}l{level}" if level is not None and documents else ""

    @staticmethod
    def _zip(zipped: Zip, entry: Entry) -> str:
        if zipped.text.startswith("error"):
            return "m" + "".join(re.findall(r"e\d+", entry.action)) + "error"
        return f"m{zipped.id}{zipped.text}"

    def parse(self, text: str) -> Written:
        found = TURN.match(text)
        assert found is not None  # everything in it is optional
        zips = [Zip(found["page"], int(found["level"]), found["pairs"])] if found["page"] else []
        if found["open"]:
            return Written(zips, ("open", found["open"]))
        return Written(zips, None if found["finish"] is None else ("finish", found["finish"]))

    def documents(self, result: str, first: int) -> list[Document]:
        entity, text = result.split(":")
        return [Document(entity, text)]

    def quality(self, document: Document, zipped: Zip) -> dict[str, float]:
        page, kept = pairs(document.text), pairs(zipped.text)
        if not page:
            return NOTHING | {"relevance": 0.0}
        asked = {p for p in page if key(p) in self.row.meta["asked"]}
        info = len(asked & set(kept)) / len(asked) if asked else max(0.0, 1 - len(kept) / len(page))
        sem = sum(p in page for p in kept) / len(kept) if kept else 1.0
        ratio = self.scale.fit(len(kept) / len(page), zipped.level, len(page))
        fit = agreement(zipped.level, 1 + min(4, len(asked)), self.scale.top)
        return self.scale.combine(ratio, fit, info, sem) | {"relevance": float(len(asked))}

    def coarser(self, zipped: Zip) -> Zip:
        kept = pairs(zipped.text)
        if zipped.level <= 1:
            return zipped
        return replace(zipped, level=zipped.level - 1, text=_text(kept[: self.scale.shorter(len(kept), zipped.level)]))

    def cut(self, document: Document) -> Document:
        page = pairs(document.text)
        return replace(document, text=_text(page[: max(1, len(page) // 2)]))

    def length(self, text: str) -> int:
        return len(pairs(text))

    def answer(self, argument: str) -> str:
        return argument
