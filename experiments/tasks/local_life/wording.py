"""Programs as a user would put them: English and Chinese, plain, chatty or with words that no document holds."""

from __future__ import annotations

import random

from experiments.tasks.local_life.catalogue import CATALOGUE
from experiments.tasks.local_life.hours import WEEKDAYS, clock
from experiments.tasks.local_life.programs import Condition, Hop, Near, Program

STYLES = ("plain", "chatty", "paraphrase")
_ZH_DAYS = tuple("一二三四五六日")

_TEXT = {
    "en": {
        "rating": "the best rated {kind}",
        "cheapest": "the cheapest {kind}",
        "nearest": "the nearest {kind}",
        "latest": "the {kind} that closes latest",
        "earliest": "the {kind} that opens earliest",
        "plan": "one {kind}",
        "chain": "the nearest other branch of the chain of the {other}",
        "area": "in {name}",
        "area_km": "within {km:g} km of the landmark of {name}",
        "district": "in the district {name}",
        "event": "in the area where the {name} takes place",
        "event_km": "within {km:g} km of the landmark of the area where the {name} takes place",
        "hop": "in the same area as the {other}",
        "hop_km": "within {km:g} km of the {other}",
        "or": " or ",
        "from_area": ", seen from the landmark",
        "from_hop": ", seen from the {other}",
        "price": "with an average price of at most {0:g} yuan",
        "rating_floor": "rated at least {0:g}",
        "tag": "tagged {0}",
        "product": "with {0} on offer",
        "open_on": "open on {day}",
        "open_at": "open at {time}{on}",
        "after_event": "still open thirty minutes after the event ends",
        "on": " on {day}",
        "ordinals": ["First", "Second", "Third", "Fourth", "Fifth"],
        "step": "{ordinal}: {what}.",
        "with": ", {0}",
        "and": " and ",
        "plain": "I am in {city}. Please find, in this order:",
        "chatty": [
            "Hi! My cousin is visiting {city} and I promised to plan something, though the buses never come in time.",
            "We have been looking forward to this trip to {city} since the exams ended, and it might rain a little.",
            "I just moved to {city} with far too much luggage, and I deserve a treat.",
        ],
        "asks": "So here is what I would like, in this order:",
        "close": "Thanks a lot, and do not mind my chatter!",
        "plain_end": "Give the poi_id of each place in visiting order.",
        "budget": "Together they may cost at most {0:g} yuan (the sum of their average prices), and the sum of their "
        "ratings must be as high as possible.",
        "timed": "Each place must be open when I arrive.",
    },
    "zh": {
        "rating": "评分最高的{kind}",
        "cheapest": "人均最低的{kind}",
        "nearest": "最近的{kind}",
        "latest": "关门最晚的{kind}",
        "earliest": "开门最早的{kind}",
        "plan": "一家{kind}",
        "chain": "离那家{other}最近的同连锁其他分店",
        "area": "{name}商圈内",
        "area_km": "{name}商圈地标{km:g}公里以内",
        "district": "{name}区内",
        "event": "{name}举办地所在商圈内",
        "event_km": "{name}举办地所在商圈的地标{km:g}公里以内",
        "hop": "与那家{other}同一商圈",
        "hop_km": "距那家{other}{km:g}公里以内",
        "or": "或",
        "from_area": "（从地标算起）",
        "from_hop": "（从那家{other}算起）",
        "price": "人均不超过{0:g}元",
        "rating_floor": "评分不低于{0:g}",
        "tag": "标签含{0}",
        "product": "提供{0}",
        "open_on": "{day}营业",
        "open_at": "{on}{time}营业",
        "after_event": "活动结束半小时后仍营业",
        "on": "{day}",
        "ordinals": ["第一", "第二", "第三", "第四", "第五"],
        "step": "{ordinal}：{what}。",
        "with": "，{0}",
        "and": "、",
        "plain": "我在{city}，请按顺序找到：",
        "chatty": [
            "你好！表妹要来{city}玩，我答应安排一下，虽然班车总是晚点。",
            "考完试以后我们就盼着这次{city}之行，听说可能下点雨。",
            "我刚带着一大堆箱子搬到{city}，想犒劳一下自己。",
        ],
        "asks": "想请你按顺序帮我找：",
        "close": "多谢，别嫌我话多！",
        "plain_end": "请按到访顺序给出每个地点的poi_id。",
        "budget": "人均合计不超过{0:g}元，且评分之和尽可能高。",
        "timed": "每家都要在我到达时营业。",
    },
}


def request(program: Program, style: str, language: str, rng: random.Random) -> str:
    """The user's words for a program."""
    text = _TEXT[language]
    names = [_kind(hop.subcategory, style, language, rng) for hop in program.hops]
    steps = []
    for i, hop in enumerate(program.hops):
        what = _what(hop, names, i, program, language)
        steps.append(text["step"].format(ordinal=text["ordinals"][i], what=what[:1].upper() + what[1:]))
    ends = [text["budget"].format(program.budget)] if program.budget is not None else []
    ends += [text["timed"]] if program.timed else []
    if style == "chatty":
        opening = [rng.choice(text["chatty"]).format(city=program.city), text["asks"]]
        ends.append(text["close"])
    else:
        opening = [text["plain"].format(city=program.city)]
    return ("" if language == "zh" else " ").join([*opening, *steps, *ends, text["plain_end"]])


def _kind(subcategory: str, style: str, language: str, rng: random.Random) -> str:
    kind = CATALOGUE.kind(subcategory)
    if style != "paraphrase" or kind is None:
        return subcategory
    return rng.choice(kind.synonyms).of(language)


def _what(hop: Hop, names: list[str], place: int, program: Program, language: str) -> str:
    text = _TEXT[language]
    if hop.chain_of >= 0:
        what = text["chain"].format(other=names[hop.chain_of])
    else:
        key = "plan" if program.budget is not None else hop.key
        what = text[key].format(kind=names[place])
        where = text["or"].join(_where(near, names, text) for near in hop.near)
        what = f"{where}，{what}" if language == "zh" else f"{what} {where}"
        if key == "nearest":
            what += text["from_hop" if hop.near[0].of == "hop" else "from_area"].format(
                other=names[hop.near[0].hop] if hop.near[0].of == "hop" else ""
            )
    if hop.conditions:
        what += text["with"].format(text["and"].join(_condition(c, language) for c in hop.conditions))
    return what


def _where(near: Near, names: list[str], text: dict) -> str:
    other = names[near.hop] if near.of == "hop" else ""
    return text[near.of + ("" if near.km is None else "_km")].format(name=near.name, km=near.km or 0, other=other)


def _condition(condition: Condition, language: str) -> str:
    text, kind, value = _TEXT[language], condition.kind, condition.value
    if kind == "open_on":
        return text[kind].format(day=_day(value, language))
    if kind in ("open_at", "after_event"):
        minute, weekday = value
        on = "" if weekday is None else text["on"].format(day=_day(weekday, language))
        return text[kind].format(time=clock(minute), on=on)
    return text["rating_floor" if kind == "rating" else kind].format(value)


def _day(weekday: int, language: str) -> str:
    return f"周{_ZH_DAYS[weekday]}" if language == "zh" else WEEKDAYS[weekday]
