"""The release's own text forms: search paths with their merchants, and boxed answers; read and written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.tasks.local_life.hours import DAY, clock, spans

if TYPE_CHECKING:
    from experiments.tasks.local_life.world import Merchant

INFORMATION = "得到的信息："
_ORDINALS = "一二三四五六七八九十"
_HOP = re.compile(rf"第(?:[{_ORDINALS}]+|\d+)跳\s*[:：]")
_QUOTED = re.compile(r"[“\"「『](.*?)[”\"」』]", re.DOTALL)
_OPEN, _CLOSE = "（(", "）)"
_RATING = re.compile(r"(?:评分|rating)\s*[:：]?\s*(\d+(?:\.\d+)?)", re.IGNORECASE)
NUMBER = r"(\d{1,3}(?:,\d{3})++(?:\.\d++)?+|\d++(?:\.\d++)?+)"
"""A price in a text, perhaps with a comma between its thousands; never a part of a longer number."""
_PRICE = re.compile(
    rf"(?:人均|均价|门票|价格|每小时|per person)\s*[:：]?\s*[￥¥]?\s*{NUMBER}(?:\s*[-~至]\s*[￥¥]?\s*{NUMBER})?"
    rf"|[￥¥]\s*{NUMBER}|{NUMBER}\s*元"
)
_FREE = re.compile(r"免费|free", re.IGNORECASE)
_ALWAYS = re.compile(r"全天|24\s*小时|24\s*hours?", re.IGNORECASE)
_HOURS = re.compile(r"(?:营业(?:时间)?|开放(?:时间)?|hours)\s*[:：]?\s*(.*)", re.IGNORECASE)
_TIME = re.compile(r"\d{1,2}:\d{2}")
_BOX = re.compile(r"\\boxed\s*\{")


@dataclass(frozen=True)
class Mention:
    """A merchant as a path tells of it; price is (low, high), (0, 0) if free; None and "" where nothing is said."""

    name: str
    address: str = ""
    rating: float | None = None
    price: tuple[float, float] | None = None
    hours: str = ""
    note: str = ""


@dataclass(frozen=True)
class PathHop:
    """One hop: its query and the merchants found; `other` are found lines that tell of no merchant."""

    query: str
    found: tuple[Mention, ...]
    other: tuple[str, ...] = ()


def read_path(text: str) -> list[PathHop]:
    """The hops of a search path; an empty list for a text that holds none."""
    starts = list(_HOP.finditer(text))
    ends = [m.start() for m in starts[1:]] + [len(text)]
    return [_hop(text[m.end() : end]) for m, end in zip(starts, ends, strict=False)]


def _hop(text: str) -> PathHop:
    head, _, body = text.partition("得到的信息")
    quoted = _QUOTED.search(head)
    query = (quoted[1] if quoted else head.strip()).strip()
    pieces = [p.strip().rstrip("。.") for p in _split(body.lstrip(":： \n"), "；;\n") if p.strip()]
    read = [(piece, mention(piece)) for piece in pieces]
    return PathHop(query, tuple(m for _, m in read if m is not None), tuple(p for p, m in read if m is None))


def _split(text: str, separators: str) -> list[str]:
    """Parts between separators that stand outside all brackets; a bracket that never closes holds nothing together."""
    depth, parts, start = 0, [], 0
    unclosed = sum(text.count(c) for c in _OPEN) != sum(text.count(c) for c in _CLOSE)
    for i, c in enumerate(text):
        depth = max(0, depth + (c in _OPEN) - (c in _CLOSE))
        if c in separators and (depth == 0 or (unclosed and c == "\n")):
            parts.append(text[start:i])
            start, depth = i + 1, 0
    return [*parts, text[start:]]


def mention(text: str) -> Mention | None:
    """`name（address，评分4.5，人均￥80-150，营业10:00-22:00，note）`; None without details in brackets.

    A name may carry a branch in brackets: the details are the last group of brackets at the top level.
    """
    groups, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in _OPEN:
            start, depth = (i if depth == 0 else start), depth + 1
        elif c in _CLOSE and depth:
            depth -= 1
            if depth == 0:
                groups.append((start, i))
    if depth:  # cut off: what follows the last opening bracket
        groups.append((start, len(text)))
    if not groups or text[groups[-1][1] + 1 :].strip("。. "):
        return None
    start, end = groups[-1]
    name, details = text[:start].strip(), [d.strip() for d in _split(text[start + 1 : end], "，")]
    # One bracket without a figure is a branch or a remark.
    return _details(name, details) if name and (len(groups) > 1 or len(details) > 1) else None


def _details(name: str, parts: list[str]) -> Mention:
    rating, price, hours, rest = None, None, [], []
    latest = -1  # the part that told of hours last: those of other weekdays, or of the evening, may follow it
    for place, part in enumerate(parts):
        plain = unicodedata.normalize("NFKC", part)
        if rating is None and (m := _RATING.search(plain)):
            rating = float(m[1])
        elif (not hours or latest == place - 1) and (found := _hours(plain)):
            hours.append(found)
            latest = place
        elif price is None and (m := _PRICE.search(plain)):
            low = number_of(next(g for g in (m[1], m[3], m[4]) if g))
            price = (low, number_of(m[2]) if m[2] else low)
        elif price is None and _FREE.search(plain) and len(plain) <= 12:
            price = (0.0, 0.0)
        else:
            rest.append(part)
    return Mention(name, rest[0] if rest else "", rating, price, ",".join(hours), "，".join(rest[1:]))


def number_of(text: str) -> float:
    """The value of what `NUMBER` matches."""
    return float(text.replace(",", ""))


def _hours(text: str) -> str:
    labelled = _HOURS.search(text)
    if _TIME.search(text):
        return (labelled[1] if labelled else text).strip()
    return "00:00-24:00" if _ALWAYS.search(text) and len(text) <= 16 else ""


def boxed(answer: str) -> tuple[str, ...]:
    """The names in the last `\\boxed{A→B→C}`."""
    starts = [m.end() for m in _BOX.finditer(answer)]
    if not starts:
        return ()
    depth, text = 1, ""
    for c in answer[starts[-1] :]:
        depth += (c == "{") - (c == "}")
        if depth == 0:
            break
        text += c
    return tuple(name.strip() for name in re.split(r"→|->|⟶", text) if name.strip())


# ---------------------------------------------------------------- writing


def search_path(steps: Sequence[tuple[str, Sequence[Merchant | str]]]) -> str:
    """A path in the release's form from (query, merchants or lines)."""
    hops = []
    for i, (query, found) in enumerate(steps):
        lines = "；".join(f if isinstance(f, str) else written(f) for f in found)
        hops.append(f"第{_ORDINALS[i]}跳:“{query}”\n{INFORMATION}{lines}")
    return "\n".join(hops)


def written(merchant: Merchant) -> str:
    """A merchant as `mention` reads it."""
    parts = [merchant.address]
    parts += [f"评分{merchant.rating:g}"] if merchant.rating == merchant.rating else []
    parts += [f"人均￥{merchant.avg_price:g}"] if merchant.avg_price == merchant.avg_price else []
    parts += [f"营业{next_day(merchant.business_hours)}"] if merchant.business_hours else []
    return f"{merchant.name}（{'，'.join(parts)}，{merchant.subcategory}）"


def next_day(hours: str) -> str:
    """Hours with an end after midnight written as `次日2:00`; unreadable ones as they are."""
    try:
        found = spans(hours)
    except ValueError:
        return hours
    return ",".join(
        f"{clock(start)}-" + (f"次日{clock(end).lstrip('0') if clock(end) >= '01' else clock(end)}" if end > DAY else
                              "24:00" if end == DAY else clock(end))
        for start, end in found
    )  # fmt: skip


def reference(merchants: Sequence[Merchant], language: str) -> str:
    """Prose per merchant, then the names in visiting order."""
    form = "{}：{}，评分{:g}，人均{:g}元。" if language == "zh" else "{}: {}, rated {:g}, {:g} yuan on average."
    lines = [form.format(m.name, m.address, m.rating, m.avg_price) for m in merchants]
    return "\n".join([*lines, "\\boxed{" + "→".join(m.name for m in merchants) + "}"])
