"""The outcome reward of tool calls: format, and how far names, keys and values match (ToolRL, arXiv 2504.13958)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from experiments.tasks.tool_parsing import CLOSE, OPEN, Call, after_thinking, line_calls
from methods.errors import DataError

THINK, UNTHINK = "<think>", "</think>"
ANSWER, UNANSWER = "<response>", "</response>"
WORST, BEST = -3.0, 4.0  # of the whole reward where the ground truth holds a call


@dataclass(frozen=True)
class Reference:
    """What a ground truth holds after its thinking: calls (None: no call), and whether a response."""

    calls: tuple[Call, ...] | None
    response: bool


@dataclass(frozen=True)
class Outcome:
    """The parts of the reward of one response.

    fmt: 0 or 1. correct: in [-3, 3], 0 where no call is due. total = fmt + correct. norm: total scaled to [0, 1], from
    [-3, 4] where a call is due, else from [0, 1]. names, keys, values: matched shares in [0, 1], NaN where none is due.
    """

    fmt: float
    correct: float
    total: float
    norm: float
    names: float
    keys: float
    values: float


@lru_cache(maxsize=256)  # score and metrics ask for the same text, one after the other
def outcome_reward(response: str, ground_truth: str) -> Outcome:
    """R_out = R_format + R_correct of a response against a ground truth such as

        <think>..</think>
        <tool_call>
        {"name": "f", "parameters": {"a": 1}}
        </tool_call>

    followed by `<response>..</response>`, or that alone. R_correct = -3 + 6 S / S_max with S = J(names) + sum over the
    ground truth's calls of their greedy matches J(keys) + equal values, S_max = 1 + sum (1 + number of keys), J the
    multiset Jaccard index. -3 for a response without both call tags, with a line that is no JSON object with a name, or
    whose call of a due name has no parameters. Values compare with `==` on parsed JSON. DataError for a ground truth
    that cannot be read.

    Differs from ToolRL: in both texts only what follows the first `</think>` holds calls; ToolRL takes the first block
    of the whole text, be it one that the thinking quotes. Format is judged alike.
    """
    reference = read_reference(ground_truth)
    fmt = float(well_formed(response, reference.calls is not None, reference.response))
    if reference.calls is None:
        nan = float("nan")
        return Outcome(fmt, 0.0, fmt, fmt, nan, nan, nan)
    correct, *shares = correctness(line_calls(response), reference.calls)
    total = fmt + correct
    return Outcome(fmt, correct, total, (total - WORST) / (BEST - WORST), *shares)


@lru_cache(maxsize=4096)
def read_reference(ground_truth: str) -> Reference:
    """The calls and the response of a ground truth; tags inside its thinking count for nothing. Raises DataError."""
    rest = after_thinking(ground_truth)
    if OPEN not in rest:
        return Reference(None, ANSWER in rest)
    calls = line_calls(ground_truth)
    if calls is None or any(call["parameters"] is None for call in calls):
        raise DataError(
            "The ground truth's calls cannot be read",
            got=rest[:200],
            expected='<tool_call>, one {"name": ..., "parameters": {...}} per line, </tool_call>',
        )
    return Reference(tuple(calls), ANSWER in rest.partition(CLOSE)[2])


def well_formed(text: str, call: bool, response: bool) -> bool:
    """Whether the whole text is `<think>..</think>`, then the block of calls and the response, as far as each is due.

    Line breaks are exact: one before each block, one inside each end of the call block. A tag that is due opens and
    closes exactly once in the whole text, the thinking included.
    """
    due = [tag for on, tags in ((call, (OPEN, CLOSE)), (response, (ANSWER, UNANSWER))) if on for tag in tags]
    if any(text.count(tag) != 1 for tag in due) or not text.startswith(THINK):
        return False
    if response:
        text, _, said = text.partition("\n" + ANSWER)
        if not said.endswith(UNANSWER):
            return False
    if call:
        text, _, block = text.partition("\n" + OPEN)
        inner = block.removesuffix(CLOSE)
        if inner == block or len(inner) < 2 or not (inner.startswith("\n") and inner.endswith("\n")):
            return False
    return text.endswith(UNTHINK) and len(text) >= len(THINK) + len(UNTHINK)


def correctness(said: Sequence[Call] | None, due: Sequence[Call]) -> tuple[float, float, float, float]:
    """(R_correct, matched shares of names, keys, values) of the calls said (None: unreadable) for at least one due."""
    names = {call["name"] for call in due}
    if said is None or any(call["name"] in names and call["parameters"] is None for call in said):
        return WORST, 0.0, 0.0, 0.0
    r_name = jaccard([call["name"] for call in due], [call["name"] for call in said])
    keys, values = _greedy(said, due)
    s_max = 1 + sum(1 + len(call["parameters"]) for call in due)
    score = r_name + sum(keys) + sum(values)
    wanted = sum(len(call["parameters"]) for call in due)
    hits = sum(values) / wanted if wanted else sum(keys) / len(due)
    correct = 3.0 if list(said) == list(due) else -3 + 6 * score / s_max
    return correct, r_name, sum(keys) / len(due), hits


def _greedy(said: Sequence[Call], due: Sequence[Call]) -> tuple[list[float], list[int]]:
    """For each call that is due, J(keys) and the number of equal values of the best unused call of its name."""
    free: dict[str, list[Mapping]] = {}
    for call in said:
        free.setdefault(call["name"], []).append(call["parameters"])
    keys, values = [], []
    for call in due:
        wanted, candidates = call["parameters"], free.get(call["name"], [])
        scores = [(jaccard(wanted, got), _equal_values(wanted, got)) for got in candidates]
        best = max(range(len(scores)), key=lambda k: sum(scores[k]), default=None)  # the first of equals
        if best is not None and sum(scores[best]) > 0:
            candidates.pop(best)
        shared, equal = scores[best] if best is not None else (0.0, 0)
        keys.append(shared)
        values.append(equal)
    return keys, values


def _equal_values(wanted: Mapping, got: Mapping) -> int:
    return sum(key in got and got[key] == value for key, value in wanted.items())


def jaccard(a: Iterable[str], b: Iterable[str]) -> float:
    """|a and b| / |a or b| of two multisets; 1 for two empty ones."""
    left, right = Counter(iter(a)), Counter(iter(b))  # the keys of a mapping, not its counts
    shared = (left & right).total()
    union = left.total() + right.total() - shared
    return shared / union if union else 1.0
