"""Opening hours: texts such as `11:00-14:00,18:00-02:00` as minutes of the day, and what is open when."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

DAY = 24 * 60
WEEK = 7
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_CLOCK = r"(次日|翌日|凌晨|next day\s*)?(\d{1,2})[:.](\d{2})"
_SPAN = re.compile(rf"{_CLOCK}\s*(?:-|~|至|到|to)\s*{_CLOCK}")
_ALWAYS = re.compile(r"全天|24\s*小时|24\s*hours?|24/7|always open", re.IGNORECASE)
_CHINESE = {c: i for i, c in enumerate("一二三四五六")} | {"日": 6, "天": 6}
_ENGLISH = {name[:3].lower(): i for i, name in enumerate(WEEKDAYS)}
_DAYS_ZH = re.compile(
    r"(?:周|星期|礼拜)([一二三四五六日天、,]+)(?:\s*(?:-|~|至|到)\s*(?:周|星期|礼拜)?([一二三四五六日天]))?"
)
_DAYS_EN = re.compile(
    r"\b(mon|tue|wed|thu|fri|sat|sun)[a-z]*\b(?:\s*(?:-|~|to)\s*(mon|tue|wed|thu|fri|sat|sun)[a-z]*)?"
)
_GROUPS = {"工作日": range(5), "weekdays": range(5), "周末": range(5, 7), "weekends": range(5, 7), "节假日": ()}
Span = tuple[int, int]


@dataclass(frozen=True)
class Hours:
    """The opening spans of each weekday (0 = Monday) as (start, end) in minutes; an end after midnight exceeds 1440."""

    days: tuple[tuple[Span, ...], ...]

    def open_at(self, minute: int, weekday: int | None = None) -> bool:
        """Whether it is open at a minute of the day, 0 to 1439. Without a weekday: on every day.

        The start of a span belongs to it, its end does not; the hours after midnight belong to the day before.
        """
        if weekday is None:
            return all(self.open_at(minute, day) for day in range(WEEK))
        today = any(start <= minute < end for start, end in self.days[weekday])
        return today or any(start <= minute + DAY < end for start, end in self.days[weekday - 1])

    def open_on(self, weekday: int) -> bool:
        """Whether it opens at all on that day."""
        return bool(self.days[weekday])

    @property
    def opening(self) -> int:
        """The earliest minute at which it opens on any day."""
        return min(start for spans in self.days for start, _ in spans)

    @property
    def closing(self) -> int:
        """The latest minute at which it closes on any day, above 1440 after midnight."""
        return max(end for spans in self.days for _, end in spans)


def spans(text: str) -> tuple[Span, ...]:
    """The spans of a text without weekdays: `11:00-14:00,18:00-02:00` -> ((660, 840), (1080, 1560)).

    ValueError for a text that holds none, an impossible time, or anything beside spans and separators.
    """
    plain = unicodedata.normalize("NFKC", text).strip().replace("—", "-").replace("–", "-")
    if _ALWAYS.search(plain) and not _SPAN.search(plain):
        return ((0, DAY),)
    found, rest = [_span(m) for m in _SPAN.finditer(plain)], _SPAN.sub("", plain)
    if not found or re.sub(r"营业|每天|每日|daily|[\s,;、和and/()]", "", rest):
        raise ValueError(f"no opening hours: {text[:60]!r}")
    return tuple(found)


def _span(match: re.Match) -> Span:
    marks, clocks = (match[1], match[4]), ((match[2], match[3]), (match[5], match[6]))
    start, end = (60 * int(hour) + int(minute) for hour, minute in clocks)
    if start >= DAY or end > 2 * DAY or any(int(minute) > 59 for _, minute in clocks) or marks[0]:
        raise ValueError(f"impossible time: {match[0]!r}")
    if end <= start or (marks[1] and end <= DAY):
        end += DAY
    if end - start > DAY:
        raise ValueError(f"longer than a day: {match[0]!r}")
    return start, end


@lru_cache(maxsize=1 << 16)
def read_hours(text: str, closed_weekday: int = -1) -> Hours | None:
    """The hours of a text, split by weekday or not, without those of `closed_weekday` (-1: open every day).

    None for a text that cannot be read: it is kept where it stands and counts as never open.
    """
    days: list[tuple[Span, ...] | None] = [None] * WEEK
    try:
        for which, part in _by_day(text):
            found = spans(part)
            for day in which:
                days[day] = found if days[day] is None else (*(days[day] or ()), *found)
    except ValueError:
        return None
    if 0 <= closed_weekday < WEEK:
        days[closed_weekday] = ()
    whole = tuple(day or () for day in days)
    return Hours(whole) if any(whole) else None


def _by_day(text: str) -> Iterable[tuple[Iterable[int], str]]:
    """(weekdays, text of their spans); every day where the text names none."""
    plain = unicodedata.normalize("NFKC", text).strip()
    marks = []
    for pattern, values in ((_DAYS_ZH, _CHINESE), (_DAYS_EN, _ENGLISH)):
        marks += [(m.start(), m.end(), _weekdays(m, values)) for m in pattern.finditer(plain.lower())]
    for word, group in _GROUPS.items():
        marks += [(m.start(), m.end(), group) for m in re.finditer(word, plain.lower())]
    if not marks:
        return [(range(WEEK), plain)]
    marks.sort()
    parts: list[tuple[Iterable[int], str]] = []
    waiting: list[int] = []
    for (_, end, which), following in zip(marks, [*marks[1:], (len(plain), 0, ())], strict=True):
        part = plain[end : following[0]].strip(" :,;、和")
        waiting += which
        if part:
            parts.append((sorted(set(waiting)), part))
            waiting = []
    if waiting:
        raise ValueError(f"weekdays without hours: {text[:60]!r}")
    return parts


def _weekdays(match: re.Match, values: dict[str, int]) -> list[int]:
    first, last = match[1], match[2]
    named = [values[first]] if first in values else [values[c] for c in first if c in values]
    if last is None:
        return named
    return [day % WEEK for day in range(named[-1], named[-1] + (values[last] - named[-1]) % WEEK + 1)]


def clock(minute: float) -> str:
    """`09:30`; minutes after midnight as the next day's."""
    minute = int(minute) % DAY
    return f"{minute // 60:02d}:{minute % 60:02d}"
