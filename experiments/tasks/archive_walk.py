"""A walk through an archive that does not fit into the prompt: what is dropped cannot be looked up again."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, shuffled
from methods.errors import ConfigError
from methods.ziprl.forms import Document, Entry, Written, Zip
from methods.ziprl.quality import NOTHING, Scale, agreement

PAGE = 6  # pairs of a page
KEYS = tuple(f"k{i}" for i in range(4))
VALUES = tuple(f"v{i}" for i in range(4))
ENTITIES = tuple(f"e{i}" for i in range(16))
UNKNOWN = "u"
MARKS = ("l1", "l2", "l3", "l4", "l5", "q", "d", "o", "f", "error", UNKNOWN)
# A pair is one token, which says where on its page it stands.
SYMBOLS = (
    *(mark + key for mark in "?!" for key in KEYS),
    *(f"p{place}{key}{value}" for place in range(PAGE) for key in KEYS for value in VALUES),
    *ENTITIES,
    *MARKS,
)
TOKEN = re.compile(r"[?!]k\d|p\dk\dv\d|e\d+|l\d|error|[qdofu]")
PAIR = re.compile(r"p\dk\dv\d")
TURN = re.compile(r"(?:l(?P<level>\d)(?P<pairs>[^of]*))?(?:o(?P<open>e\d+)|f(?P<finish>.*))?", re.DOTALL)
SHOWN = "d"  # the name of the one page that a turn sees


@functools.lru_cache(maxsize=4096)  # the rollouts of a group see the same pages
def pairs(text: str) -> tuple[str, ...]:
    """`p0k3v2p1k0v1oe3` as `(p0k3v2, p1k0v1)`."""
    return tuple(PAIR.findall(text))


@functools.lru_cache(maxsize=4096)
def _shown(text: str) -> str:
    return "".join(pairs(text))


def key(pair: str) -> str:
    return pair[2:4]


@dataclass
class ArchiveWalk(Task):
    """`qoe5?k2`: open e5 and go from page to page until one ends the walk; which value of k2 was on the way?

    A page has six pairs of key and value, from the general to the particular: `p0k3v1` is the pair at its first place.
    It ends with the action that leads on (`oe7`) or ends the walk (`f`), and can be opened once. A turn sees what it
    kept of earlier pages, one page, and the question. It writes a zip, the level before its pairs, and the action:
    `l2p0k3v1oe7` keeps one pair and opens e7, `l1f!k2p4k2v0` keeps none and answers, `f!k2u` that it does not know. The
    asked key is on one page of the walk, once. The archive of each question is made anew.

    pages: of the walk, per tier, with the weights of the tiers in `train` as `mixture`; from 17 pages on entities come
    again with a new page. Demonstrations (`warm_rows`: one row per turn) keep the first pairs of a page, as many as the
    level allows; the level is with chance `demo_right` the lowest at which the asked pair is not lost, else random.
    They answer with what is left and in sight, and after each page with what they would if forced to.

    Differs from the sheet: pages hang together by their last line and not by relations; one key is asked; a pair is one
    token, a page has six and a prompt 20, so that the third raw page does not fit. The level that a page asks for
    follows from the place of the asked pair (`PairForm`), not from the number of asked keys. The question stands behind
    the page, and an answer repeats the key: a small model matches keys at the token that names one.
    """

    episodes_by = "ziprl_archive"

    name: str = "archive_walk"
    symbols: tuple[str, ...] | None = None
    max_prompt_tokens: int = 20
    max_completion_tokens: int = 0
    tiers: tuple[str, ...] = field(default=(), init=False)
    pages: dict[str, int] = field(default_factory=lambda: {"3": 3, "5": 5, "8": 8, "16": 16})
    mixture: dict[str, float] = field(default_factory=lambda: {"3": 1, "5": 1, "8": 0, "16": 0})
    demo_right: float = 0.4
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
            ("demo_right", [self.demo_right], 0, 1),
            ("max_prompt_tokens", [self.max_prompt_tokens], PAGE + 5, 1024),  # a page and the question at least
        ):
            if not all(low <= value <= high for value in values):
                raise ConfigError(
                    "A setting of the archive is out of range",
                    where=f"task.{name}",
                    got=getattr(self, name),
                    expected=f"{low} to {high}",
                )
        self.symbols = self.symbols or SYMBOLS
        # A whole page with its level, an answer, the end.
        self.max_completion_tokens = self.max_completion_tokens or 2 + PAGE + 2 + 1

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
        walk, asked, holder = _walk(count, rng), rng.choice(KEYS), rng.randrange(count)
        written = [_page(asked, t == holder, rng) for t in range(count)]
        answer = next(p for p in written[holder] if key(p) == asked)
        meta = {"walk": walk, "written": written, "asked": asked, "noise": rng.randrange(2**31)}
        row = Row(name, "", f"!{asked}{answer}", tier, meta=meta)
        return replace(row, prompt=PairForm(row, Scale()).ask([], [], None, False)[0])

    def warm_rows(self, seed: int) -> list[Row]:
        """The turns of scripted episodes, each with the prompt that it answers."""
        rng = random.Random(derive(seed, "archive_walk", "demonstrations"))
        return [turn for row in self.rows("train", seed) for turn in self._demonstrate(row, rng)]

    def _demonstrate(self, row: Row, rng: random.Random) -> list[Row]:
        form, archive, walk = PairForm(row, Scale()), Archive(row), row.meta["walk"]
        memory: list[Entry] = []
        turns: list[Row] = []

        def prompt(documents: Sequence[Document], last: bool = False) -> str:
            """What is shown may cost older zips a level: ask before the answer is read from memory."""
            while len(TOKEN.findall(text := "".join(form.ask(memory, documents, None, last)))) > self.max_prompt_tokens:
                _shrink(memory, form)
            return text

        def add(asked: str, completion: str) -> None:
            turns.append(Row(f"{row.id}/{len(turns)}", asked, "", row.tier, completion))

        add(prompt([]), "o" + walk[0])
        for t, entity in enumerate(walk):
            page = form.documents(archive.open(entity), t)[0]
            level = form.needed(page) if rng.random() < self.demo_right else rng.randint(1, form.scale.top)
            zipped = Zip(SHOWN, level, _text(pairs(page.text)[: form.room(level)]))
            asked = prompt([page])
            action = "o" + walk[t + 1] if t + 1 < len(walk) else "f" + form.recall(memory, page)
            add(asked, f"l{level}{zipped.text}{action}")
            memory.append(Entry("", (zipped,)))
            asked = prompt([], last=True)
            add(asked, form.recall(memory))
        return turns

    # ---- episodes ----
    def environment(self, row: Row) -> Archive:
        return Archive(row)

    def score(self, text: str, row: Row) -> float:
        """1 if the answer is the asked pair."""
        return float(text == row.answer)


def _walk(count: int, rng: random.Random) -> list[str]:
    """Entities in random order; again from the start of a new order once all were used."""
    walk: list[str] = []
    while len(walk) < count:
        order = rng.sample(ENTITIES, len(ENTITIES))
        walk += order[1:] if walk and walk[-1] == order[0] else order
    return walk[:count]


def _page(asked: str, holds: bool, rng: random.Random) -> list[str]:
    """One pair for each place; one of them is of the asked key, if the page holds it."""
    page = [rng.choice([k for k in KEYS if k != asked]) for _ in range(PAGE)]
    if holds:
        page[rng.randrange(PAGE)] = asked
    return [f"p{place}{k}{rng.choice(VALUES)}" for place, k in enumerate(page)]


def _text(page: Sequence[str]) -> str:
    return "".join(page)


def _shrink(memory: list[Entry], form: PairForm) -> None:
    """One step of the loop's own rule (methods/ziprl/loop.py): the oldest zip a level down, else gone."""
    for k, entry in enumerate(memory):
        if entry.zips[0].level > 1:
            memory[k] = entry._replace(zips=(form.coarser(entry.zips[0]),))
            return
    del memory[next(k for k, entry in enumerate(memory) if entry.zips[0].text)]


class Archive:
    """One episode's tools: each page can be opened once; pages beside the walk hold nothing that was asked."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.visits: dict[str, int] = {}
        self.tools: Mapping[str, Callable[..., str]] = {"open": self.open}

    def form(self, scale: Scale) -> PairForm:
        return PairForm(self.row, scale)

    def open(self, entity: str) -> str:
        if entity not in ENTITIES:
            raise LookupError(f"there is no {entity}")
        meta, visit = self.row.meta, self.visits.get(entity, 0)
        walk = meta["walk"]
        places = [t for t, e in enumerate(walk) if e == entity]
        if visit >= max(1, len(places)):
            raise LookupError(f"{entity} was opened before")
        self.visits[entity] = visit + 1
        if places:
            t = places[visit]
            return _text(meta["written"][t]) + ("o" + walk[t + 1] if t + 1 < len(walk) else "f")
        rng = random.Random(derive(meta["noise"], entity))
        return _text(_page(meta["asked"], False, rng)) + "o" + rng.choice(ENTITIES)


@functools.lru_cache(maxsize=4096)  # the rollouts of a group often write the same
def _written(text: str) -> Written:
    found = TURN.match(text)
    assert found is not None  # everything in it is optional
    zips = (Zip(SHOWN, int(found["level"]), found["pairs"]),) if found["level"] else ()
    if found["open"]:
        return Written(zips, ("open", found["open"]))
    return Written(zips, None if found["finish"] is None else ("finish", found["finish"]))


def _room(level: int, scale: Scale) -> int:
    """Pairs of a page that a level permits at most."""
    return int(scale.interval(level)[1] * PAGE + 1e-9)


@functools.lru_cache(maxsize=4096)
def _wanted(page: str, asked: str, scale: Scale) -> tuple[int, frozenset[str]]:
    """l* of a page, and its asked pairs."""
    places = {i: p for i, p in enumerate(pairs(page)) if key(p) == asked}
    last, levels = max(places, default=-1), range(1, scale.top + 1)
    level = next((k for k in levels if _room(k, scale) > last), scale.top) if places else 1
    return level, frozenset(places.values())


@functools.lru_cache(maxsize=4096)  # the rollouts of a group often write the same of the same page
def _quality(text: str, level: int, written: str, key_asked: str, scale: Scale) -> Mapping[str, float]:
    page, kept = pairs(text), TOKEN.findall(written)
    if not page:
        return NOTHING | {"relevance": 0.0}
    needed, asked = _wanted(text, key_asked, scale)
    info = len(asked & set(kept)) / len(asked) if asked else max(0.0, 1 - len(kept) / len(page))
    sem = sum([p in page for p in kept]) / len(kept) if kept else 1.0
    ratio = scale.fit(len(kept) / len(page), level, len(page))
    fit = agreement(level, needed, scale.top)
    return scale.combine(ratio, fit, info, sem) | {"relevance": float(needed)}


@dataclass
class PairForm:
    """The language of the archive, and a symbolic Q_com in which question and page say what is relevant.

    With a = asked pairs on the page and k = pairs written:
        ratio = as for texts, on the number of pairs;  level = 1 - |l - l*| / 4
        l*    = the lowest level that has room for all pairs up to the last asked one; 1 if there is none
        info  = share of the page's asked pairs that were kept (1 - k/6 if a = 0)
        sem   = share of the written pairs that are pairs of the page (1 if none was written)
    Relevance is l*. An empty page gives 0 for everything, as it does for texts.
    """

    row: Row
    scale: Scale

    def ask(
        self, memory: Sequence[Entry], documents: Sequence[Document], level: int | None, last: bool
    ) -> tuple[str, str]:
        meta = self.row.meta
        # Of earlier pages only pairs are shown: what was compressed to nothing costs no prompt, and one action is left.
        known = "".join([self._zip(z, entry) for entry in memory for z in entry.zips])
        shown = "".join([f"{SHOWN}{d.text}" for d in documents])
        start = "" if memory or documents else "o" + meta["walk"][0]
        prompt = f"q{known}{shown}{start}?{meta['asked']}"
        if last:
            return prompt, "f"
        return prompt, f"l{level}" if level is not None and documents else ""

    @staticmethod
    def _zip(zipped: Zip, entry: Entry) -> str:
        if zipped.text.startswith("error"):
            return "".join(re.findall(r"e\d+", entry.action)) + "error"
        return _shown(zipped.text)

    def parse(self, text: str) -> Written:
        return _written(text)

    def documents(self, result: str, first: int) -> list[Document]:
        return [Document(SHOWN, result)]

    def needed(self, document: Document) -> int:
        """l*."""
        return _wanted(document.text, self.row.meta["asked"], self.scale)[0]

    def room(self, level: int) -> int:
        return _room(level, self.scale)

    def recall(self, memory: Sequence[Entry], page: Document | None = None) -> str:
        """The answer as far as it is in memory, or on the page."""
        texts = [z.text for entry in memory for z in entry.zips] + ([page.text] if page else [])
        asked = self.row.meta["asked"]
        return f"!{asked}" + next((p for text in texts for p in pairs(text) if key(p) == asked), UNKNOWN)

    def quality(self, document: Document, zipped: Zip) -> Mapping[str, float]:
        return _quality(document.text, zipped.level, zipped.text, self.row.meta["asked"], self.scale)

    def coarser(self, zipped: Zip) -> Zip:
        kept = pairs(zipped.text)
        if zipped.level <= 1:
            return zipped
        return zipped._replace(level=zipped.level - 1, text=_text(kept[: self.scale.shorter(len(kept), zipped.level)]))

    def cut(self, document: Document) -> Document:
        """Half of its pairs, and the action behind them."""
        page = pairs(document.text)
        action = document.text[len(_text(page)) :]
        return document._replace(text=_text(page[: max(1, len(page) // 2)]) + action)

    def length(self, text: str) -> int:
        return len(pairs(text))

    def answer(self, argument: str) -> str:
        return argument
