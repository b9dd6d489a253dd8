"""The file formats of the judge benchmarks: records to items.

RewardBench v1, RewardBench 2, RM-Bench, RMB (pairs and best of N), LLMBar, and plain preference pairs. The key of an
item is (benchmark, subset, id); its cluster is its prompt, for RewardBench 2's Ties the number k of `ref:k`, `tied:k`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.judging.pairs import Item
from methods.errors import DataError, nearest

Record = Mapping[str, Any]
V1_ROWS = {
    "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46, "refusals-dangerous": 100, "refusals-offensive": 100,
    "xstest-should-refuse": 154, "xstest-should-respond": 250, "donotanswer": 136, "math-prm": 447,
    **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
}  # fmt: skip
V1_PRIOR = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
V2_ROWS = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, "Ties": 102}
RM_ROWS = {"chat": 129, "math": 529, "code": 228, "safety-refuse": 284, "safety-response": 157}
RMB_ROWS = {
    "Pairwise_set/Helpfulness": 10067,
    "Pairwise_set/Harmlessness": 7064,
    "BoN_set/Helpfulness": 2109,
    "BoN_set/Harmlessness": 1677,
}
LLMBAR_ROWS = {"Natural": 100, "Adversarial_Neighbor": 134, "Adversarial_GPTInst": 92} | {
    "Adversarial_GPTOut": 47,
    "Adversarial_Manual": 46,
}
STYLES = ("concise", "detailed", "markdown")
TIES = ("tie", "0", "c", "both", "equal")  # labels that say that neither response is better


@dataclass(frozen=True)
class Format:
    """rows: the published row counts by subset (by group for RMB). hub: its hub data set and split, if official."""

    columns: tuple[str, ...]
    read: Callable[[Record, str], Item]
    rows: Mapping[str, int]
    hub: str = ""
    split: str = ""


def group(benchmark: str, subset: str) -> str:
    """The name under which published row counts list a subset: for RMB the first two parts of the category path."""
    return "/".join(subset.split("/")[:2]) if benchmark == "rmb" else subset


def cluster_of(prompt: Any) -> str:
    """A short digest of a prompt: what repeats a prompt is not independent."""
    spelled = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return hashlib.blake2b(spelled.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


# ---------------------------------------------------------------- cells


def _text(record: Record, key: str, where: str) -> str:
    if not isinstance(record[key], str):
        raise DataError("The cell is no text", where=f"{where}, column '{key}'", got=repr(record[key])[:100])
    return record[key]


def _texts(record: Record, key: str, where: str, count: int | None = None) -> list[str]:
    value = record[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value) or not value:
        got, expected = repr(value)[:100], "a list of texts"
        raise DataError("The cell is no list of texts", where=f"{where}, column '{key}'", got=got, expected=expected)
    if count is not None and len(value) != count:
        expected = f"{count}"
        raise DataError(
            "Wrong number of responses", where=f"{where}, column '{key}'", got=len(value), expected=expected
        )
    return value


def _subset(value: Any, known: Mapping[str, int], where: str, more: tuple[str, ...] = ()) -> str:
    name = str(value)
    if name not in known and name not in more:
        hint = nearest(name, known)
        raise DataError(
            "Unknown subset" + (f" ({hint})" if hint else ""), where=where, got=repr(name), expected=", ".join(known)
        )
    return name


def _item(
    benchmark: str, subset: str, name: Any, prompt: Any, better: list[str], worse: list[str], **meta: Any
) -> Item:
    grades = (1.0,) * len(better) + (0.0,) * len(worse)
    return Item(str(name), benchmark, subset, prompt, (*better, *worse), grades, cluster_of(prompt), meta)


# ---------------------------------------------------------------- the formats


def _read_v1(record: Record, where: str) -> Item:
    subset = _subset(record["subset"], V1_ROWS, where, V1_PRIOR)
    chosen, rejected = _text(record, "chosen", where), _text(record, "rejected", where)
    return _item("rewardbench", subset, record["id"], _text(record, "prompt", where), [chosen], [rejected])


def _read_v2(record: Record, where: str) -> Item:
    subset, ties = _subset(record["subset"], V2_ROWS, where), record["subset"] == "Ties"
    chosen = _texts(record, "chosen", where, None if ties else 1)
    rejected = _texts(record, "rejected", where, None if ties else 3)
    item = _item("rewardbench2", subset, record["id"], _text(record, "prompt", where), chosen, rejected)
    if not ties:
        return item
    kind, _, k = item.id.partition(":")
    if kind not in ("ref", "tied") or not k:
        raise DataError("The id of a Ties prompt", where=where, got=repr(item.id), expected="ref:<k> or tied:<k>")
    return replace(item, cluster=k)


def _read_rm(record: Record, where: str) -> Item:
    domain = _subset(record["domain"], RM_ROWS, where)
    chosen, rejected = _texts(record, "chosen", where, 3), _texts(record, "rejected", where, 3)
    return _item("rm_bench", domain, record["id"], _text(record, "prompt", where), chosen, rejected)


def _read_rmb(record: Record, where: str) -> Item:
    path = _text(record, "category_path", where)
    _subset(group("rmb", path), RMB_ROWS, f"{where}, column 'category_path'")
    best_of_n = path.startswith("BoN")
    name, better, worse = ("bon_uid", "bon_best", "loser_list") if best_of_n else ("pair_uid", "chosen", "reject")
    _need(record, (name, better, worse), where)
    turns = record["conversation_input"]
    good = (
        isinstance(turns, list) and turns and all(isinstance(t, dict) and {"role", "content"} <= set(t) for t in turns)
    )
    if not good:
        expected = "a list of {role, content}"
        raise DataError("The conversation cannot be read", where=where, got=repr(turns)[:100], expected=expected)
    prompt = [{"role": t["role"], "content": t["content"]} for t in turns]
    losers = record[worse] if best_of_n else [record[worse]]
    losers = losers if isinstance(losers, list) else []
    answers = [a.get("answer") if isinstance(a, dict) else None for a in (record[better], *losers)]
    if not all(isinstance(answer, str) for answer in answers) or len(answers) < 2:
        expected = "{llm_name, answer}, and at least one loser"
        raise DataError("An answer cannot be read", where=where, got=repr(record[worse])[:100], expected=expected)
    texts = list(map(str, answers))
    return _item("rmb", path, record[name], prompt, texts[:1], texts[1:])


def _labelled(label: Any) -> tuple[tuple[float, float], dict[str, str]]:
    """Grades of two responses by a label; equal ones, and why, where it is a tie or cannot be read."""
    said = str(label).strip().lower()
    if said in ("1", "a", "response_a"):
        return (1.0, 0.0), {}
    if said in ("2", "b", "response_b"):
        return (0.0, 1.0), {}
    return (0.0, 0.0), {"left_out": "tie label" if said in TIES else "unreadable label"}


def _read_llmbar(record: Record, where: str) -> Item:
    subset = _subset(record["subset"], LLMBAR_ROWS, where)
    prompt, outputs = (
        _text(record, "input", where),
        (_text(record, "output_1", where), _text(record, "output_2", where)),
    )
    grades, meta = _labelled(record["label"])
    return Item(str(record["id"]), "llmbar", subset, prompt, outputs, grades, cluster_of(prompt), meta)


def _read_pairs(record: Record, where: str) -> Item:
    asked = next((key for key in ("prompt", "instruction", "messages") if key in record), "prompt")
    name = next((key for key in ("id", "pair_id") if key in record), "id")
    labelled = "winner" in record
    answers = ("response_a", "response_b") if labelled else ("chosen", "rejected")
    _need(record, (name, asked, *answers), where)
    prompt = record[asked] if asked == "messages" else _text(record, asked, where)
    texts = tuple(_text(record, key, where) for key in answers)
    grades, left_out = _labelled(record["winner"]) if labelled else ((1.0, 0.0), {})
    meta = {key: record[key] for key in ("rules", "required") if key in record} | left_out
    subset = str(record.get("subset") or "all")
    return Item(str(record[name]), "pairs", subset, prompt, texts, grades, cluster_of(prompt), meta)


def _need(record: Record, columns: tuple[str, ...], where: str) -> None:
    missing = [column for column in columns if column not in record]
    if missing:
        hint = nearest(missing[0], record)
        raise DataError(
            f"The row lacks '{missing[0]}'" + (f" ({hint})" if hint else ""),
            where=where,
            got="columns " + ", ".join(map(str, record)),
            expected=", ".join(columns),
        )


FORMATS = {
    "rewardbench": Format(
        ("id", "subset", "prompt", "chosen", "rejected"),
        _read_v1,
        V1_ROWS,
        "allenai/reward-bench",
        "filtered",
    ),
    "rewardbench2": Format(
        ("id", "subset", "prompt", "chosen", "rejected"), _read_v2, V2_ROWS, "allenai/reward-bench-2", "test"
    ),
    "rm_bench": Format(
        ("id", "domain", "prompt", "chosen", "rejected"), _read_rm, RM_ROWS, "THU-KEG/RM-Bench", "train"
    ),
    "rmb": Format(("category_path", "conversation_input"), _read_rmb, RMB_ROWS),
    "llmbar": Format(("id", "subset", "input", "output_1", "output_2", "label"), _read_llmbar, LLMBAR_ROWS),
    "pairs": Format((), _read_pairs, {}),
}


def read_item(benchmark: str, record: Record, where: str) -> Item:
    """One record of a benchmark's file as an item. DataError: a column missing or of another kind, unknown subset."""
    shape = FORMATS[benchmark]
    _need(record, shape.columns, where)
    return shape.read(record, where)
