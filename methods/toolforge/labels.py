"""Stage 2 by rule: how many rounds and calls an item takes, and which tool answers each call.

The structure comes from the decomposition where a set gives one (MuSiQue: `#1` in a step's question is the answer of
step 1), else from titles: a gold article that another one names, and the question does not, is found through it. What
the first round asks for is in the question: a title that is not stays hidden until a result shows it.

    one article, or articles with no link between them    case1 (A)
    all articles named by the question                     case2 (B)
    two rounds, one call each                              case3 (C)
    two rounds, one of them at least with several calls    case4 (D)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from methods.toolforge.domains import DOMAINS
from methods.toolforge.items import Item, Skip
from methods.toolforge.text import folded, words
from methods.toolforge.tools import Bank

_STOP_WORDS = """
a an and are as at be been both by did do does for from had has have he her his in is it its of on or she that the their
there they this to was were what when where which who whom whose will with how many much same than
"""
_STOP = set(_STOP_WORDS.split())


@dataclass(frozen=True)
class Call:
    """A planned call: canonical tool, query, what it is about, the gold passages that it must find (places in
    `Item.gold`). arguments: all of them where a model planned the call; None lets the writer fill them in."""

    tool: str
    query: str
    topic: str
    passages: tuple[int, ...]
    arguments: Mapping[str, object] | None = None


Rounds = tuple[tuple[Call, ...], ...]


@dataclass(frozen=True)
class Label:
    """Route `case1` to `case4`, canonical tools in order of use (no repeats), the labeller's reasoning."""

    route: str
    tools: tuple[str, ...]
    reasoning: str


def by_rule(item: Item, bank: Bank) -> tuple[Label, Rounds]:
    """Label and plan of an item without a model. Raises Skip for a question that takes three rounds."""
    groups = _from_hops(item) if item.hops else _from_titles(item)
    rounds = tuple(tuple(_call(item, bank, group) for group in level) for level in groups)
    several = any(len(level) > 1 for level in rounds)
    route = ("case2" if several else "case1") if len(rounds) == 1 else ("case4" if several else "case3")
    tools = tuple(dict.fromkeys(call.tool for level in rounds for call in level))
    topics = "; then ".join(" and ".join(call.topic for call in level) for level in rounds)
    return Label(route, tools, f"The question needs {topics}."), rounds


@dataclass(frozen=True)
class _Group:
    topic: str
    passages: tuple[int, ...]
    query: str = ""


def _from_hops(item: Item) -> list[list[_Group]]:
    depth: list[int] = []
    levels: list[list[_Group]] = []
    for hop in item.hops:
        before = [int(n) for n in re.findall(r"#(\d+)", hop.question) if 0 < int(n) <= len(depth)]
        at = max((depth[n - 1] + 1 for n in before), default=0)
        query = re.sub(r"#(\d+)", lambda m: item.hops[min(int(m[1]), len(item.hops)) - 1].answer, hop.question)
        depth.append(at)
        levels.extend([] for _ in range(at + 1 - len(levels)))
        query, title = query.replace(" >> ", ": "), item.gold[hop.gold[0]].title
        known = folded(" ".join([item.question, *(item.hops[n - 1].answer for n in before)]))
        levels[at].append(
            _Group(title if _bare(title) and _bare(title) in known else query.rstrip("?？"), hop.gold, query)
        )
    return _two_at_most(levels)


def _from_titles(item: Item) -> list[list[_Group]]:
    places: dict[str, list[int]] = {}
    for i, passage in enumerate(item.gold):
        places.setdefault(passage.title, []).append(i)
    question = folded(item.question)
    names = {title: _bare(title) for title in places}
    text = {title: folded(" ".join(item.gold[i].content for i in at)) for title, at in places.items()}
    asked = {title for title in places if names[title] and names[title] in question}
    parents = {
        title: [other for other in places if other != title and names[title] and names[title] in text[other]]
        for title in places
        if title not in asked
    }
    if len(places) == 1 or not (asked or any(parents.values())):
        return [[_whole(item, asked, range(len(item.gold)))]]
    depth = dict.fromkeys(asked, 0)
    # A title that nothing leads to is asked for at once; two that name each other must begin somewhere.
    for title in places:
        if title not in depth and not parents[title]:
            depth[title] = 0
    if not depth:
        depth[next(iter(places))] = 0
    while len(depth) < len(places):
        known = [t for t in places if t not in depth and any(p in depth for p in parents[t])]
        if not known:
            known = [next(t for t in places if t not in depth)]
        reached = {t: 1 + min((depth[p] for p in parents[t] if p in depth), default=-1) for t in known}
        depth |= reached
    levels: list[list[_Group]] = [[] for _ in range(max(depth.values()) + 1)]
    for title, at in places.items():
        if depth[title] or title in asked:
            levels[depth[title]].append(_Group(title, tuple(at)))
    if hidden := sorted(i for title, at in places.items() if not depth[title] and title not in asked for i in at):
        levels[0].append(_whole(item, asked, hidden))
    if len(levels) == 1 and hidden:
        return [[_whole(item, asked, range(len(item.gold)))]]
    return _two_at_most(levels)


def _whole(item: Item, asked: Iterable[str], places: Iterable[int]) -> _Group:
    """A call with the question itself, for passages whose titles it does not name: those are for the result to tell."""
    at = tuple(places)
    title = item.gold[at[0]].title
    said = " ".join(keywords(item.question)) or item.question
    return _Group(title if title in asked else said, at, item.question)


def _two_at_most(levels: list[list[_Group]]) -> list[list[_Group]]:
    if len(levels) > 2:
        raise Skip("label", "needs more than two rounds")
    return levels


def _bare(title: str) -> str:
    """A title as texts write it: without what stands in brackets behind it."""
    return folded(re.sub(r"\s*[(（].*?[)）]\s*$", "", title))


def _call(item: Item, bank: Bank, group: _Group) -> Call:
    text = " ".join(f"{item.gold[i].title} {item.gold[i].content}" for i in group.passages)
    query = group.query or " ".join([group.topic, *keywords(item.question, text, group.topic)])
    return Call(domain_of(text, bank), query, group.topic, group.passages)


def keywords(question: str, text: str = "", without: str = "", most: int = 5) -> list[str]:
    """Words of the question that say something, those that `text` has too first; none of those in `without`."""
    left_out, shared = {*_STOP, *words(without)}, set(words(text))
    found = [word for word in dict.fromkeys(words(question)) if word not in left_out]
    return sorted(found, key=lambda word: word not in shared)[:most]


def _telling(known: Iterable[str]) -> set[str]:
    """Those of the words that a tool is known by which tell something."""
    return set(known) - _STOP | ({"he", "she"} & set(known))


_KNOWN = {name: _telling(domain.keywords) for name, domain in DOMAINS.items()}


def domain_of(text: str, bank: Bank) -> str:
    """The specialist tool whose domain shares most words with a text; the general one if none shares any."""
    counts = Counter(words(text))
    best, most = "", 0.0
    for name, variants in bank.tools.items():
        if name == bank.general:
            continue
        known = _KNOWN[name] if name in _KNOWN else _telling(words(variants[0]["description"]))
        # Diminishing returns: a text that says `film` five times is no more about films than one that says it twice.
        score = sum(min(counts[word], 2) for word in known & counts.keys())
        if score > most:
            best, most = name, score
    return best or (bank.general if bank.general in bank.tools else next(iter(bank.tools)))
