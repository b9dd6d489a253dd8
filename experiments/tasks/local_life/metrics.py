"""Exact metrics of an episode in the local-life world: plain functions on texts, ids and calls, without a model.

Equations and scales are those of LocalSearchBench (arXiv 2512.07436), whose answer metrics come from a judge model;
the rules below are our exact counterparts for questions that have a gold answer. Fluency and safety have none: only
a judge can give them (`judge.py`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from experiments.tasks.local_life.hours import Span, spans
from experiments.tasks.local_life.paths import NUMBER, number_of

MARK = re.compile(r"【(?:答案|Answer)】")
SECTION = re.compile(r"^[ \t]*【[^【】\n]+】", re.MULTILINE)
POI = re.compile(r"poi_[A-Za-z0-9_]*\d")
THRESHOLD = 0.72  # least similarity of a call to the hop it is matched with
CAPS = ((0.0, 10.0), (0.03, 8.0), (0.10, 6.0), (0.25, 4.0))  # largest relative deviation: cap of faithfulness
WORST_CAP, MOST_WRONG = 2.0, 3
NUMBERS = ("price", "rating")
ROUNDING = 1e-9  # 103 / 100 - 1 is a little more than 0.03


@dataclass(frozen=True)
class Call:
    """One executed tool call: its round from 1, tool, query, whether it succeeded, and the ids of the merchants that
    it returned, best first (none for web searches and calculators)."""

    tool: str
    query: str
    ok: bool = True
    found: tuple[str, ...] = ()
    round: int = 1


# ---------------------------------------------------------------- the answer


def answer_part(reply: str) -> str:
    """The text after the mark 【答案】 (or 【Answer】) up to the next section; without a mark the whole reply."""
    start, end = answer_span(reply)
    return reply[start:end]


def answer_span(reply: str) -> tuple[int, int]:
    """Where `answer_part` lies in the reply."""
    mark = MARK.search(reply)
    if mark is None:
        return 0, len(reply)
    section = SECTION.search(reply, mark.end())
    return mark.end(), section.start() if section else len(reply)


def cited(reply: str) -> list[str]:
    """The poi ids of the answer part in the order of their first mention."""
    return list(dict.fromkeys(POI.findall(answer_part(reply))))


def retrieved(calls: Sequence[Call]) -> set[str]:
    """All merchants that the searches of a trajectory returned."""
    return {poi for call in calls if call.tool == "rag" for poi in call.found}


def correctness(answer: Sequence[str], gold: Sequence[str], seen: Collection[str]) -> float:
    """1 if the cited ids are the gold ids in their order and all of them were retrieved; an id that never was is a
    veto. Degenerate: nothing cited gives 0."""
    return float(bool(answer) and list(answer) == list(gold) and all(poi in seen for poi in answer))


def slot_share(answer: Sequence[str], gold: Sequence[str]) -> float:
    """Positions that hold the right id over gold slots."""
    return sum(a == g for a, g in zip(answer, gold, strict=False)) / len(gold) if gold else 0.0


def in_context(answer: Sequence[str], seen: Collection[str]) -> float:
    """1 if something is cited and all of it was retrieved: what can be said without a gold answer."""
    return float(bool(answer) and all(poi in seen for poi in answer))


# ---------------------------------------------------------------- faithfulness


@dataclass(frozen=True)
class Claim:
    """What an answer says of a merchant: `field` is price or rating (a number, or a range (low, high)), or hours,
    address or name (a text)."""

    poi: str
    field: str
    value: Any


def cap(claimed: float, true: float) -> float:
    """10, 8, 6, 4, 2 at a relative deviation |claimed - true| / |true| of 0, 3 %, 10 %, 25 % and more."""
    if true == 0:
        return 10.0 if claimed == 0 else WORST_CAP
    deviation = abs(claimed - true) / abs(true)
    return next((score for most, score in CAPS if deviation <= most + ROUNDING), WORST_CAP)


def faithfulness(
    answer: Sequence[str], claims: Sequence[Claim], records: Mapping[str, Mapping[str, Any]], seen: Collection[str]
) -> float | None:
    """0 to 10: the lowest cap of the numeric claims, less one point per wrong text claim (three at most); 0 for a cited
    id that is unknown or was never retrieved. `records` has per id the fields of `Claim`; where the claim or the record
    is a range, the gap between the two counts, so that one that meets the other is right; hours are the spans of all
    weekdays, and a claim names some of them; a text is right where one of the two contains the other. None where
    nothing is cited; a field that the record lacks cannot be deviated from, and a claim about it counts as a wrong text
    claim."""
    if not answer:
        return None
    if any(poi not in seen or poi not in records for poi in answer):
        return 0.0
    score, wrong = 10.0, 0
    for claim in claims:
        true = records[claim.poi].get(claim.field)
        if true is None or claim.field not in NUMBERS:
            wrong += not _same_text(claim, true)
        else:
            (low, high), (least, most) = (v if isinstance(v, tuple) else (v, v) for v in (true, claim.value))
            score = min(score, cap(least, high) if least > high else cap(most, low) if most < low else 10.0)
    return max(0.0, score - min(wrong, MOST_WRONG))


def open_spans(text: str) -> frozenset[Span]:
    """The opening spans that a text names; none where it cannot be read."""
    try:
        return frozenset(spans(text))
    except ValueError:
        return frozenset()


def _same_text(claim: Claim, true: Any) -> bool:
    if true is None:
        return False
    if isinstance(true, frozenset):
        return bool(claim.value) and claim.value <= true
    said, told = normalised(claim.value), normalised(true)
    return bool(said) and (said in told or told in said)


# A price stands behind its label or sign, or is "about" a figure that is no distance, time, share or number of stars.
_UNIT = r"\s*(?:km|kilo|m\b|met|min|hour|h\b|star|percent|[%:米公千分小点星])"
PRICE = re.compile(
    rf"(?:人均|价格|均价|price|avg|average|[¥￥])(?:(?!rat|dist|评|距)\D){{0,12}}?{NUMBER}(?:\s*[-–~至]\s*[¥￥]?\s*{NUMBER})?"
    rf"|(?:about|around|约)\s*{NUMBER}(?!{_UNIT})",
    re.IGNORECASE,
)
RATING = re.compile(r"(?:评分|rating|rated)\s*[:：为is]{0,2}\s*(\d(?:\.\d+)?)(?!\d)", re.IGNORECASE)
HOURS = re.compile(r"\d{1,2}:\d{2}\s*(?:-|–|至|~)\s*(?:次日)?\s*\d{1,2}:\d{2}")
ADDRESS = re.compile(r"(?:address|地址)\s*[:：]\s*([^,，;；)）\n]+)", re.IGNORECASE)
NAME = re.compile(r"([^,，;；:：\n]+?)[\s*`_]*[(（\[]\s*$")
BULLET = re.compile(r"^[\s\-*•#>`_]*(?:\d+[.)、]\s*)?[*_`]*")


def claims_of(reply: str) -> list[Claim]:
    """What the answer part says near each cited id: from the beginning of the line of its first mention (or behind the
    id before it on that line) to the next cited id's line. A price or rating behind its label, opening hours as
    intervals, an address behind its label, and the words directly before "(poi_...)" as the name."""
    text = answer_part(reply)
    places: dict[str, tuple[int, int]] = {}
    for match in POI.finditer(text):
        places.setdefault(match.group(), match.span())
    starts = []
    before = 0
    for start, end in places.values():
        starts.append(max(before, text.rfind("\n", 0, start) + 1))
        before = end
    ends = [*starts[1:], len(text)][: len(starts)]
    claims: list[Claim] = []
    for (poi, (at, _)), start, end in zip(places.items(), starts, ends, strict=True):
        claims += _claims_in(poi, text[start:at], POI.sub(" ", text[start:end]))
    return claims


def _claims_in(poi: str, head: str, part: str) -> list[Claim]:
    found = [Claim(poi, "price", _price(m)) for m in PRICE.finditer(part)]
    found += [Claim(poi, "rating", float(m.group(1))) for m in RATING.finditer(part)]
    if hours := [re.sub(r"\s*[–至~-]\s*", "-", text) for text in HOURS.findall(part)]:
        found.append(Claim(poi, "hours", open_spans(",".join(hours))))
    found += [Claim(poi, "address", m.group(1).strip()) for m in ADDRESS.finditer(part)]
    if name := NAME.search(BULLET.sub("", head)):
        found.append(Claim(poi, "name", name.group(1).strip()))
    return found


def _price(match: re.Match) -> float | tuple[float, float]:
    low = number_of(match[1] or match[3])
    high = number_of(match[2]) if match[2] else low
    return (low, high) if high > low else low


# ---------------------------------------------------------------- the process


def completeness(reply: str, calls: Sequence[Call], slots: int, tools: Collection[str]) -> float:
    """0 to 10, of the process: the mark 3, text after it 2, no tool tag left open 1, the last call ok 2, and 2 times
    the share of slots for which an id is cited. Without any call the last one was not ok."""
    mark = MARK.search(reply)
    text = mark is not None and bool(answer_part(reply).strip())
    closed = all(reply.count(f"<{tool}>") <= reply.count(f"</{tool}>") for tool in tools)
    share = min(1.0, len(cited(reply)) / slots) if slots else 0.0
    return 3.0 * (mark is not None) + 2.0 * text + closed + 2.0 * bool(calls and calls[-1].ok) + 2.0 * share


@dataclass(frozen=True)
class HopCoverage:
    """accuracy: 1 if every hop is matched by a call that succeeded with results. ratio: share of hops that are.
    missing: hops without a call. invalid: hops whose call failed or found nothing. extra: calls that match no hop."""

    accuracy: float
    ratio: float
    missing: int
    invalid: int
    extra: int


def hop_coverage(expected: Sequence[str], calls: Sequence[Call], threshold: float = THRESHOLD) -> HopCoverage | None:
    """Each expected query in order takes the unused search of highest similarity, the first of equal ones, where that
    is at least `threshold`; web searches never match. None where nothing is expected."""
    if not expected:
        return None
    left = [i for i, call in enumerate(calls) if call.tool == "rag"]
    good = missing = invalid = 0
    for hop in expected:
        likeness = {i: similarity(hop, calls[i].query) for i in left}
        best = max(left, key=lambda i: likeness[i], default=None)
        if best is None or likeness[best] < threshold:
            missing += 1
            continue
        left.remove(best)
        valid = calls[best].ok and bool(calls[best].found)
        good += valid
        invalid += not valid
    matched = good + invalid
    share = good / len(expected)
    return HopCoverage(float(good == len(expected)), share, missing, invalid, len(calls) - matched)


def similarity(one: str, other: str) -> float:
    """1 where one normalised text contains the other, else difflib's ratio 2 M / T; 0 for an empty one."""
    one, other = normalised(one), normalised(other)
    if not one or not other:
        return 0.0
    return 1.0 if one in other or other in one else SequenceMatcher(None, one, other).ratio()


def normalised(text: str) -> str:
    """NFKC, lower case, letters, digits and CJK characters only."""
    return "".join(c for c in unicodedata.normalize("NFKC", str(text)).lower() if c.isalnum())


def redundant_share(calls: Sequence[Call]) -> float:
    """Calls that repeat an earlier one (same tool, same normalised query) over calls; 0 without calls."""
    keys = [(call.tool, normalised(call.query)) for call in calls]
    return 1 - len(set(keys)) / len(keys) if keys else 0.0


# ---------------------------------------------------------------- retrieval


def recall(gold: Collection[str], found: Sequence[str], k: int) -> float:
    """Share of the gold ids among the first k found; 0 without gold."""
    return len(set(gold) & set(found[:k])) / len(set(gold)) if gold else 0.0


def evidence(gold: Sequence[str], calls: Sequence[Call], ks: Sequence[int] = (1, 5, 20)) -> dict[str, float]:
    """evidence_recall: gold merchants that any search of the trajectory returned, over slots. recall@k: those that a
    search had among its first k. mrr: mean over the slots of 1 / the best rank, 0 for one that was never found."""
    ranks = {poi: rank_of(poi, calls) for poi in dict.fromkeys(gold)}
    count = max(len(ranks), 1)
    values = {"evidence_recall": sum(rank is not None for rank in ranks.values()) / count}
    values |= {f"recall@{k}": sum(rank is not None and rank <= k for rank in ranks.values()) / count for k in ks}
    return values | {"mrr": sum(1 / rank for rank in ranks.values() if rank is not None) / count}


def rank_of(poi: str, calls: Sequence[Call]) -> int | None:
    """The best rank from 1 at which a search returned `poi`; None if none did."""
    return min((c.found.index(poi) + 1 for c in calls if c.tool == "rag" and poi in c.found), default=None)
