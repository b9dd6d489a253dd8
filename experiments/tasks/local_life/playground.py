"""LocalPlayground: the tools of a local-life world, and one rollout's way through them.

LocalRAG retrieves `retrieve` candidates of one city and shows the best `show`, after an optional second stage
(arXiv 2512.07436, section 4: N = 100, K = 20). The paper's pair of embedding and reranking models stands where
`dense` and `rerank` stand here; the default is BM25 alone, one index per city.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.retrieval import Index, Passage, index_passages
from experiments.tasks.local_life.hours import DAY, WEEKDAYS, clock
from experiments.tasks.local_life.metrics import POI, Call, answer_span
from experiments.tools import ToolText
from methods.errors import check_range

if TYPE_CHECKING:
    from experiments.tasks.local_life.world import Merchant, World

TOOLS = ("rag", "web_search", "detail", "distance", "hours")
ALIASES = {"localrag_search": "rag"}  # the paper's figure writes it so
BLOCK = (
    ("category", "category"), ("address", "address"), ("city", "city"), ("district", "district"),
    ("business_area", "business area"), ("landmark", "landmark"), ("business_hours", "hours"), ("rating", "rating"),
    ("avg_price", "price"), ("specialties", "specialties"), ("products", "products"), ("tags", "tags"),
    ("description", "description"), ("facilities", "facilities"), ("promotions", "promotions"), ("phone", "phone"),
)  # fmt: skip
FURTHER = ("price_range", "review_count", "chain", "branch", "reservation", "parking", "payment")
UNSEEN = "(never retrieved)"
LONGEST = 500  # characters of a query that are searched for


class Playground:
    """The tools of one world. Same world, same question, same result.

    retrieve: candidates of the first stage. show: merchants that a search returns. pages: web pages that it returns.
    dense: a path or hub id of sentence-transformers, fused with BM25 by reciprocal rank. rerank: a cross-encoder's path
    or hub id, which orders the candidates anew. Raises ConfigError for a model that cannot be had.
    Degenerate: a query without any word of the index finds nothing (by BM25 alone; vectors are always near something);
    an unknown city or merchant is a LookupError, which a model reads as the result of its call.
    """

    def __init__(
        self, world: World, *, retrieve: int = 100, show: int = 20, pages: int = 5,
        dense: str | None = None, rerank: str | None = None, key: str = "task",
    ) -> None:  # fmt: skip
        check_range(f"{key}.show", show, 1)
        check_range(f"{key}.retrieve", retrieve, show)
        self.world, self.retrieve, self.show, self.pages = world, retrieve, show, pages
        self.dense, self.rerank, self.key = dense, rerank, key
        if rerank:
            from experiments.dense import load_reranker

            load_reranker(rerank, key)  # a wrong path is said before the first question
        self.search = functools.lru_cache(maxsize=8192)(self._search)

    @functools.cached_property
    def index(self) -> Index:
        passages = [Passage(poi, "", text, city) for city in self.world.cities for poi, text in self._documents(city)]
        return index_passages(passages, dense=self.dense, key=self.key)

    @functools.cached_property
    def web(self) -> Index:
        pages = [Passage(page.page_id, page.title, page.text) for page in self.world.facts]
        return index_passages(pages, key=self.key)

    def prepare(self) -> None:
        """Builds what the first search would build."""
        for city in self.world.cities[:1]:
            self.search("", city)
        if self.world.facts:
            self.web_search("")

    def _documents(self, city: str) -> list[tuple[str, str]]:
        return self.world.documents(city)

    def _search(self, query: str, city: str) -> tuple[tuple[str, float], ...]:
        """At most `show` (poi_id, similarity), best first; similarity is the score over that of the first.

        LookupError for a city without an index.
        """
        if city not in self.world.of_city:
            raise LookupError(f"there is no city {city[:80]!r}; there are {', '.join(self.world.cities[:20])}")
        ranked = self.index.rank(query[:LONGEST], self.retrieve, city)
        if self.rerank and ranked:
            from experiments.dense import reranked

            texts = [self.index.passages[place].text for place, _ in ranked]
            ranked = [(ranked[i][0], score) for i, score in reranked(self.rerank, query[:LONGEST], texts, self.key)]
        ranked = ranked[: self.show]
        top = ranked[0][1] if ranked else 1.0
        return tuple((self.index.passages[place].doc_id, max(0.0, score / top)) for place, score in ranked)

    def web_search(self, query: str) -> list[Passage]:
        """The pages that match; LookupError in a world without a web."""
        if not self.world.facts:
            raise LookupError("there is no web in this world")
        return [self.web.passages[place] for place, _ in self.web.rank(query[:LONGEST], self.pages)]

    def city_of(self, query: str, city: str) -> str:
        """`city` where a query names it or none, else the first city of the world that it names."""
        named = {match.lower() for match in self._cities.findall(query)}
        if not named or city.lower() in named:
            return city
        return next(name for name in self.world.cities if name.lower() in named)

    @functools.cached_property
    def _cities(self) -> re.Pattern:
        """Any city's name; one of Latin letters only as whole words."""
        names = sorted((re.escape(name) for name in self.world.cities if name), key=len, reverse=True)
        return re.compile(rf"(?<![a-z])(?:{'|'.join(names) or '(?!)'})(?![a-z])", re.IGNORECASE)

    # ---------------------------------------------------------------- calculators

    def distance(self, one: str, other: str) -> float:
        """Kilometres between two merchants of one city. LookupError if there is no such merchant or position."""
        a, b = self.world.merchant(one), self.world.merchant(other)
        if a.city != b.city:
            raise LookupError(f"{one} and {other} are in different cities")
        if any(value != value for value in (a.x, a.y, b.x, b.y)):
            raise LookupError(f"the position of {one if a.x != a.x or a.y != a.y else other} is not known")
        return ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5

    def is_open(self, poi_id: str, weekday: int, minute: int) -> bool:
        """Whether it is open then; LookupError if there is no such merchant or its hours cannot be read."""
        hours = self.world.merchant(poi_id).hours
        if hours is None:
            raise LookupError(f"the opening hours of {poi_id} are not known")
        return hours.open_at(minute, weekday)

    def rank(self, query: str, k: int, city: str) -> list[str]:
        """The ids of the k best, without the show limit, for measuring the index."""
        return [self.index.passages[place].doc_id for place, _ in self.index.rank(query, k, city)]


# ---------------------------------------------------------------- one rollout


@dataclass(frozen=True)
class Tags(ToolText):
    """Calls as `<rag>query</rag>`, `<web_search>query</web_search>` and so on; all results come in one user message.

    A tag with an empty query, or one that is not closed, is no call: a reply with only such tags is the answer.
    """

    call: str = ""
    opening: str = "<rag>"
    chat: bool = True
    role: str = "user"

    def parse(self, text: str) -> list[dict[str, Any] | None]:
        names = "|".join((*TOOLS, *ALIASES))
        found = re.finditer(rf"<({names})>(.*?)</\1>", text, re.DOTALL)
        called = [(ALIASES.get(m.group(1), m.group(1)), m.group(2).strip()) for m in found]
        return [{"tool": tool, "args": {"query": query}} for tool, query in called if query]


class Visit:
    """The tools of one rollout in `city`. `calls` keeps each executed call with what it returned.

    Whatever a tool refuses is an exception here and a text that begins with `error:` for the model.
    """

    def __init__(self, playground: Playground, city: str) -> None:
        self.playground, self.city = playground, city
        self.calls: list[Call] = []
        self.round = 0
        self.tools: Mapping[str, Callable[..., str]] = {name: functools.partial(self.call, name) for name in TOOLS}

    def call(self, tool: str, query: str) -> str:
        """What a tool answers. LookupError and ValueError for what it refuses; the call counts all the same."""
        try:
            text, found = getattr(self, f"_{tool}")(str(query).strip())
        except Exception:
            self.calls.append(Call(tool, str(query), ok=False, round=self.round))
            raise
        self.calls.append(Call(tool, str(query), found=found, round=self.round))
        return text

    def replay(self, turns: list[Any]) -> list[Call]:
        """The calls of a rollout from its turns: a tool answers the same each time."""
        for number, turn in enumerate(turns, start=1):
            self.round = number
            for call in turn.calls if turn.result is not None else ():
                try:
                    self.call(call["tool"], call["args"]["query"])
                except (LookupError, ValueError):
                    continue
        return self.calls

    def resolve(self, text: str) -> str:
        """A reply for the verifier: ids in its answer that no search of this rollout has returned are marked so."""
        seen = {poi for call in self.calls for poi in call.found}
        start, end = answer_span(text)
        marked = POI.sub(lambda m: m.group() if m.group() in seen else f"{m.group()} {UNSEEN}", text[start:end])
        return text[:start] + marked + text[end:]

    # ---------------------------------------------------------------- tools

    def _rag(self, query: str) -> tuple[str, tuple[str, ...]]:
        city = self.playground.city_of(query, self.city)
        found = self.playground.search(query, city)
        lines = [f"LocalRAG, {city}, {query!r}: {len(found)} merchants" + (":" if found else ".")]
        for number, (poi, similarity) in enumerate(found, start=1):
            lines.append(f"{number}. {block(self.playground.world.merchant(poi))}; similarity: {similarity:.2f}")
        return "\n".join(lines), tuple(poi for poi, _ in found)

    def _web_search(self, query: str) -> tuple[str, tuple[str, ...]]:
        pages = self.playground.web_search(query)
        lines = [f"Web, {query!r}: {len(pages)} pages" + (":" if pages else ".")]
        lines += [f"{i}. page:{p.doc_id} | {p.title} | {p.text}" for i, p in enumerate(pages, start=1)]
        return "\n".join(lines), ()

    def _detail(self, query: str) -> tuple[str, tuple[str, ...]]:
        merchant = self.playground.world.merchant(_id(query))
        more = [f"{name.replace('_', ' ')}: {value}" for name in FURTHER if (value := getattr(merchant, name))]
        return "; ".join([block(merchant), *more]), ()

    def _distance(self, query: str) -> tuple[str, tuple[str, ...]]:
        ids = POI.findall(query)
        if len(ids) != 2:
            raise ValueError(f"distance needs two poi_ids, such as poi_a_1, poi_a_2; got {query[:80]!r}")
        return f"{ids[0]} to {ids[1]}: {self.playground.distance(*ids):.2f} km", ()

    def _hours(self, query: str) -> tuple[str, tuple[str, ...]]:
        poi, when = _id(query), re.search(r"(\d{1,2}):(\d{2})", query)
        day = next(
            (i for i, name in enumerate(WEEKDAYS) if name[:3].lower() in query.lower().split(poi.lower())[-1]), None
        )
        if when is None or day is None or (minute := 60 * int(when[1]) + int(when[2])) >= DAY or int(when[2]) > 59:
            raise ValueError(
                f"hours needs a poi_id, a weekday and a time, such as poi_a_1 Friday 21:30; got {query[:80]!r}"
            )
        state = "open" if self.playground.is_open(poi, day, minute) else "closed"
        return f"{poi} on {WEEKDAYS[day]} at {clock(minute)}: {state}", ()


def _id(query: str) -> str:
    found = POI.search(query)
    if found is None:
        raise ValueError(f"there is no poi_id in {query[:80]!r}")
    return found.group()


def block(merchant: Merchant) -> str:
    """One merchant on one line: name, poi_id, then its fields with their labels; what is not known is left out."""
    parts = [f"{merchant.name} ({merchant.poi_id})"]
    for name, label in BLOCK:
        value: Any = getattr(merchant, name)
        if name == "category":
            value = "/".join(v for v in (value, merchant.subcategory) if v)
        elif isinstance(value, float):
            value = "" if value != value else f"{value:g}"
        elif name == "business_hours" and value and merchant.closed_weekday >= 0:
            value = f"{value}, closed on {WEEKDAYS[merchant.closed_weekday]}"
        if value:
            parts.append(f"{label}: {value}")
    if merchant.x == merchant.x:
        parts.append(f"location: {merchant.x:.2f}, {merchant.y:.2f}")
    return "; ".join(parts)
