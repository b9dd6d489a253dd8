r"""Scorers: how a completion is compared with a gold answer. Each takes (text, answer, options) and returns 0 or 1
(`f1`: a share).

All look at the final text first (`final_text`). A scorer never raises because of what a model wrote.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from experiments.tasks import algebra
from methods.errors import ConfigError, nearest

MAX_CHARS = 400  # of a text that is one number
_NUMBER = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+\.\d+|\.\d+|\d+"
NUMBER = re.compile(
    rf"(?<![A-Za-z0-9_.])(?:(?<![\w)\]}}])-\s?)?\$?(?:{_NUMBER})(?:[eE][+-]?\d+)?(?:\s?/\s?\d+(?!\.?\d))?"
)
MARKER = re.compile(  # the last alternative is Chinese for "the answer is"
    r"\banswer(?:\s+is\b\s*:?|\s*[:=])|^\s*A:|\u7b54\u6848(?:\u662f|\u4e3a|\u70ba)?\s*[:\uff1a]?",
    re.IGNORECASE | re.MULTILINE,
)
_TEX = re.compile(r"\\(?:text|mathrm|mathbf|textbf|boldsymbol|operatorname)\s*\{([^{}]*)\}")
CLAUSE = re.compile(r"[)\]*_`]*,?\s+(?:is|are|was|can|cannot|does|and|or)\b", re.IGNORECASE)  # `(A) is wrong, so ...`
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{?(-?\d+)\}?\{?(\d+)\}?")
_ANSWER_LINE = re.compile(r"^\W*(?:the\s+)?(?:final\s+)?answer\W*:[*_\s]*(\S.*?)[*_]*$", re.IGNORECASE | re.MULTILINE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LOOKALIKES = {0x2212: "-", 0xFF0D: "-", **{0xFF10 + digit: str(digit) for digit in range(10)}}  # minus, full width


def final_text(text: str) -> str:
    """What a completion says in the end: after the last `</think>`, inside the last `<answer>`, stripped."""
    text = text.rpartition("</think>")[2]
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return (tagged[-1] if tagged else text).strip()


def boxed(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}` (braces balanced), or None."""
    for start in reversed([m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                return text[start:end].strip()
    return None


def announced(text: str) -> str | None:
    """The rest of the line after the last `####`, or else after the last `answer is`, `Answer:` or `A:`; or None."""
    if "####" in text:
        text = text.rpartition("####")[2]
    else:
        marks = list(MARKER.finditer(text))
        if not marks:
            return None
        text = text[marks[-1].end() :]
    return text.strip(" \t:*").split("\n", 1)[0].strip()


def to_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number: `-1,234.50`, `$18`, `3/4`, `\frac{3}{4}`, `50%`; else None."""
    if len(text) > MAX_CHARS:
        return None
    text = _commas(text.translate(_LOOKALIKES)).replace("\\$", "$").strip().strip("$").rstrip(".").strip()
    text = re.sub(r"\\[!, ]", "", text)
    text = _FRACTION.sub(r"\g<1>\2/\3", text).removesuffix("%").removesuffix("\\")
    if re.fullmatch(rf"-?\s?\$?(?:{_NUMBER})(?:[eE][+-]?\d{{1,3}})?(?:\s?/\s?\d+)?", text) is None:
        return None
    top, _, bottom = re.sub(r"[\s,$]", "", text).partition("/")
    below = int(bottom or 1)
    return Fraction(top) / below if below else None


def last_number(text: str) -> str | None:
    """The last number written in `text`, or None. A minus after a digit, letter or bracket is a subtraction."""
    found = NUMBER.findall(text.translate(_LOOKALIKES))
    return found[-1] if found else None


def same_number(a: Fraction, b: Fraction) -> bool:
    """Equal, or, where one is not whole, equal to six digits after the point or six digits at all of a small value."""
    if a == b or (a.denominator == 1 and b.denominator == 1):
        return a == b
    return abs(a - b) <= Fraction(1, 10**6) * min(1, max(abs(a), abs(b)))


def exact(text: str, answer: Any, options: Sequence[str] = ()) -> float:
    """The text is the answer (or one of a list of answers), case kept, runs of white space counted as one."""
    return float(" ".join(final_text(text).split()) in {" ".join(str(a).split()) for a in _alternatives(answer)})


def contains(text: str, answer: Any, options: Sequence[str] = ()) -> float:
    """The answer (or one of a list) occurs in the text as whole words, whatever the case. Empty answers never do."""
    text = " ".join(final_text(text).casefold().split())
    wanted = [" ".join(str(a).casefold().split()) for a in _alternatives(answer)]
    return float(any(a and re.search(rf"(?<!\w){re.escape(a)}(?!\w)", text) for a in wanted))


def number(text: str, answer: Any, options: Sequence[str] = ()) -> float:
    r"""The number in the last `\boxed{}`, else in the announced answer, else the last one of the text."""
    gold = to_number(str(answer))
    text = final_text(text)
    for part in (boxed(text), announced(text), text):
        if part is None:
            continue
        said = to_number(part)
        if said is None:
            said_text = _number_in(part, first=part is not text)
            said = None if said_text is None else to_number(said_text)
        if said is not None:
            return float(gold is not None and same_number(said, gold))
    return 0.0


def _number_in(part: str, first: bool) -> str | None:
    """`18 dollars for 3 people` -> 18 if an answer was announced there; `3 + 4 = 7` -> 7; else the last number."""
    part = _FRACTION.sub(r"\g<1>\2/\3", _commas(part))
    if not first or "=" in part:
        return last_number(part)
    found = NUMBER.search(part.translate(_LOOKALIKES))
    return found.group() if found else None


def math_verify(text: str, answer: Any, options: Sequence[str] = ()) -> float:
    r"""Mathematical equivalence by math-verify: of the last `\boxed{}`, else of the announced answer or the last line.

    A list (also as JSON text, as in OlympiadBench) holds values that must all be given, in any order. A comma
    between groups of three digits may part thousands or values: either reading counts. Where no expression can be
    parsed, the last number of the text is taken. What `algebra` refuses (long, deep, huge) is
    compared as text only.
    """
    gold = gold_text(answer)
    text = final_text(text)
    if not text or not gold:
        return 0.0
    if _normal(text) == _normal(gold):
        return 1.0
    inside = boxed(text)
    if inside is not None:
        return float(equivalent(gold, inside))
    part = announced(text) or text.rstrip().rpartition("\n")[2]
    if equivalent(gold, part):
        return 1.0
    prose = re.search(r"[\\^_{}<>]", part.replace("\\$", "")) is None
    return number(text, gold) if prose and to_number(gold) is not None else 0.0


def gold_text(answer: Any) -> str:
    """One text for a gold answer: the values of a list, or of a list written as JSON text, joined by commas."""
    if isinstance(answer, str) and answer.strip().startswith('["'):
        try:
            answer = json.loads(answer)
        except json.JSONDecodeError:
            return answer
    return ", ".join(str(a) for a in answer) if isinstance(answer, (list, tuple)) else str(answer)


def equivalent(gold: str, said: str) -> bool:
    """Whether two short mathematical texts mean the same; symmetric up to math-verify's treatment of `x = 3`."""
    if not said.strip():
        return False
    if "=" not in gold or "=" not in said:
        gold, said = (re.sub(r"^\s*\$?\s*[A-Za-z](?:\([a-z]\))?\s*=([^=,;]*)$", r"\1", text) for text in (gold, said))
    if _normal(gold) == _normal(said):
        return True
    golds, saids = _readings(gold), _readings(said)
    values = [(to_number(g), to_number(s)) for g in golds for s in saids]
    if all(g is not None and s is not None for g, s in values):
        return any(same_number(s, g) for g, s in values if g is not None and s is not None)
    return any(algebra.same(one, other) for one in golds for other in saids)


def _commas(text: str) -> str:
    r"""LaTeX's ways of writing a thousands comma (`{,}`, `,\!`) as a plain one."""
    return re.sub(r",\\!\s*|\{,\}", ",", text)


def _readings(text: str) -> list[str]:
    """The text as it is, and, if a comma could part thousands or values, with it read as a part of a list."""
    text = _commas(text.translate(_LOOKALIKES)).strip().rstrip(".\u3002")
    spread = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", ", ", text)
    return [text] if spread == text else [text, spread]


def _normal(text: str) -> str:
    r"""A text without dollar signs, `\text{}`, white space, case and final stop, for comparing as text."""
    text = _TEX.sub(r"\1", text).replace("\\left", "").replace("\\right", "")
    return re.sub(r"[\s$]|\\[,;! ]", "", text).rstrip(".\u3002").casefold()


def choice(text: str, answer: Any, options: Sequence[str] = ()) -> float:
    """The letter chosen is the gold letter. `options` are the texts behind the letters (empty: A to J, no texts)."""
    return float(chosen_letter(text, options) == str(answer).strip().upper())


def chosen_letter(text: str, options: Sequence[str] = ()) -> str | None:
    r"""The option letter that a completion settles on, or None.

    In this order: the last `\boxed{C}`, an announced `answer is (C)`, a last line that is a letter or starts with
    `C.` or `(C)` (not `(C) is wrong`), an option quoted in full as the whole answer, the last `(C)`, the last capital
    letter on its own (`A` and `I` only where they cannot be words). Letters beyond the options do not count.
    """
    text = _TEX.sub(r"\1", final_text(text))
    letters = string.ascii_uppercase[: len(options) or 10]
    one = rf"[(\[*_`\"']*\s*([{letters}])(?![A-Za-z0-9'\u2019]|\s*\^)"
    inside, said = boxed(text), announced(text)
    for part in (inside, said, text.rpartition("\n")[2] if text else None):
        if part is None:
            continue
        bare = re.fullmatch(rf"{one}[)\]*_`\"'.:\s]*", part, re.IGNORECASE)
        lead = re.match(rf"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is)?\s*:?\s*)?{one}", part, re.I)
        if lead and not bare and (_is_word(part, lead.start(1)) or CLAUSE.match(part, lead.end())):
            lead = None
        match = bare or lead
        if match:
            return match.group(1).upper()
        quoted = [letter for letter, option in zip(letters, options, strict=False) if _normal(option) == _normal(part)]
        if len(quoted) == 1:
            return quoted[0]
    for pattern in (rf"\(([{letters}])\)", rf"(?<![A-Za-z0-9'\u2019]){one}"):
        found = [m for m in re.finditer(pattern, text) if not _is_word(text, m.start(1))]
        if found:
            return found[-1].group(1)
    return None


def _is_word(text: str, at: int) -> bool:
    """Whether the single letter at `at` reads as a word (`A cat`, `I think`, `a cat`) rather than as an option."""
    rest = text[at + 1 :]
    return text[at].islower() or (text[at] in "AI" and re.match(r"\s+[a-z]", rest) is not None)


def em(text: str, answer: Any, options: Sequence[str] = ()) -> float:
    """Exact match: the short answer equals the gold (or one of several) in SQuAD's normal form.

    Nothing said is never right, also where the normal form of the gold is empty (`The The`, `A`, `+`): such a gold is
    compared as it stands, whatever the case.
    """
    said = short_answer(text)
    form = squad_form(said)
    for gold in map(str, _alternatives(answer)):
        wanted = squad_form(gold)
        same = form == wanted if wanted else said.casefold() == gold.strip().casefold()
        if said and same:
            return 1.0
    return 0.0


def f1(text: str, answer: Any, options: Sequence[str] = ()) -> float:
    """F1 of the words of the short answer against the gold's, as bags in SQuAD's normal form; the highest over golds.

    A gold whose normal form is empty counts as in `em`.
    """
    if em(text, answer):
        return 1.0
    said = Counter(squad_form(short_answer(text)).split())
    best = 0.0
    for gold in _alternatives(answer):
        wanted = Counter(squad_form(str(gold)).split())
        shared = (said & wanted).total()
        if shared:
            best = max(best, 2 * shared / (said.total() + wanted.total()))
    return best


def short_answer(text: str) -> str:
    """What a completion gives as its short answer: the last `<answer>...</answer>` after the last `</think>`, else the
    rest of the last line that begins with `Answer:`, else the whole stripped text (after the last `</think>`)."""
    text = final_text(text)
    marked = _ANSWER_LINE.findall(text)
    return (marked[-1] if marked else text).strip()


def squad_form(text: str) -> str:
    """The normal form of SQuAD's evaluation: lower case, no ASCII punctuation, no a/an/the, single spaces."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def _alternatives(answer: Any) -> list:
    return list(answer) if isinstance(answer, (list, tuple)) else [answer]


SCORERS: dict[str, Callable[[str, Any, Sequence[str]], float]] = {
    f.__name__: f for f in (exact, number, math_verify, choice, contains, em, f1)
}


def scorer(name: str, key: str = "task") -> Callable[[str, Any, Sequence[str]], float]:
    """The scorer called `name`. Raises ConfigError with the nearest names."""
    if name not in SCORERS:
        raise ConfigError(
            f"Unknown scorer '{name}'",
            where=f"{key}.scorer",
            expected="one of " + ", ".join(SCORERS),
            fix=nearest(name, SCORERS) or "choose one, or write your own with reward=file.py:function",
        )
    return SCORERS[name]
