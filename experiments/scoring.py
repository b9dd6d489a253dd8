"""Ask an engine, score each completion, summarise with intervals clustered by item."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.engines.base import Engine, Progress, Request, Result
from experiments.seeds import derive

if TYPE_CHECKING:
    import pandas as pd

    from experiments.tasks.base import Row, Task

COLUMNS = ("split", "item_id", "sample", "score", "length", "tier", "finish")
SOLVED = 1 - 1e-9
"""pass@k counts full scores only."""

ToRequest = Callable[["Row", Request], Request]
Metrics = Callable[[str, "Row"], Mapping[str, float]]


# ---------------------------------------------------------------- asking and scoring


def evaluate(
    engine: Engine,
    task: Task,
    rows: Sequence[Row],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    split: str = "eval",
    progress: Progress | None = None,
    to_request: ToRequest | None = None,
    metrics: Metrics | None = None,
) -> pd.DataFrame:
    """One row per item and sample: `COLUMNS`, the columns of `task.metrics`, and those of `metrics`.

    temperature 0 with samples 1 is greedy. max_tokens: None takes the task's budget. An item's random stream depends
    on `seed` and its id only, not on the other items. progress: called with the number of items just finished.
    to_request(row, request): may change what is asked, such as the prompt. metrics(text, row): further values.

    A completion that could not be had (finish "error") has NaN in score, length and metrics; the frame's
    `attrs["errors"]` counts the reasons. Raises what the engine raises.
    """
    requests = make_requests(
        task, rows, samples=samples, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed,
        to_request=to_request,
    )  # fmt: skip
    return score_results(task, rows, engine.generate(requests, progress), split=split, metrics=metrics)


def make_requests(
    task: Task,
    rows: Sequence[Row],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int | None,
    seed: int,
    to_request: ToRequest | None = None,
) -> list[Request]:
    """One request per row, with a seed of its own."""
    budget = max_tokens or task.max_completion_tokens
    requests = []
    for row in rows:
        prompt: dict[str, Any] = {"prompt" if isinstance(row.prompt, str) else "messages": row.prompt}
        request = Request(
            **prompt, n=samples, max_tokens=budget, temperature=temperature, top_p=top_p,
            seed=derive(seed, "eval", row.id),
        )  # fmt: skip
        requests.append(to_request(row, request) if to_request else request)
    return requests


def score_results(
    task: Task,
    rows: Sequence[Row],
    results: Sequence[Sequence[Result]],
    *,
    split: str = "eval",
    metrics: Metrics | None = None,
) -> pd.DataFrame:
    """The frame of `evaluate` for results that were had in any way; `results[i]` are the samples of `rows[i]`."""
    import pandas as pd

    records: list[dict[str, Any]] = []
    errors: Counter[str] = Counter()
    for row, answers in zip(rows, results, strict=True):
        for sample, result in enumerate(answers):
            record = {"split": split, "item_id": row.id, "sample": sample, "score": math.nan, "length": math.nan,
                      "tier": row.tier, "finish": result.finish}  # fmt: skip
            if result.finish == "error":
                errors[result.error or "no reason given"] += 1
            else:
                record["score"] = float(task.score(result.text, row))
                record["length"] = float(result.usage.completion_tokens if result.ids is None else len(result.ids))
                record |= task.metrics(result.text, row)
                record |= metrics(result.text, row) if metrics else {}
            records.append(record)
    frame = pd.DataFrame(records, columns=None if records else list(COLUMNS))
    frame.attrs["errors"] = dict(errors)
    return frame


# ---------------------------------------------------------------- summary


def summarise(frame: pd.DataFrame, ks: Sequence[int] = (1,)) -> dict[str, float]:
    """Named values of one evaluation (one step); `<name>.low` and `<name>.high` are 95 % intervals clustered by item.

    `score` and `score/<tier>`: mean of item means (that is avg@samples, also given as `avg@<n>` if all items have
    n > 1 samples). `pass@<k>` for k in `ks`: unbiased, over the items with at least k scored samples. `length` in
    tokens. `truncated`: share of scored completions that hit the budget. `errors`: share of completions that could not
    be had; these enter nothing else. `items`: items with a completion. Further columns: their means; one without any
    value is left out. An item whose score is NaN, because nothing here can score it, counts in no score. Where every
    item scores 0 (or 1) no resampling shows doubt, and the exact binomial bound is given.
    """
    from experiments import stats
    from experiments.tasks.base import tier_order

    scored: Any = frame[frame["finish"] != "error"]
    items = scored["split"] + "\0" + scored["item_id"]
    values: dict[str, float] = {"items": items.nunique(), "completions": len(frame)}
    values |= _with_interval("score", scored["score"], items)
    if scored["tier"].nunique() > 1:
        for tier in tier_order(scored["tier"], ("easy", "medium", "hard")):
            part = scored[scored["tier"] == tier]
            values |= _with_interval(f"score/{tier}", part["score"], items[part.index])
    known = scored["score"].notna()
    counts = (scored["score"][known] >= SOLVED).groupby(items[known]).agg(["size", "sum"])
    most = int(counts["size"].min()) if len(counts) else 0
    if most > 1 and most == counts["size"].max():
        values[f"avg@{most}"] = values["score"]
    for k in ks:
        enough = counts[counts["size"] >= k]
        if len(enough):
            chances = stats.pass_at_k(enough["size"], enough["sum"], k)
            values |= _with_interval(f"pass@{k}", chances, enough.index)
    values |= _with_interval("length", scored["length"], items)
    values |= _with_interval("truncated", scored["finish"] == "length", items)
    values["errors"] = Counter(frame["finish"])["error"] / len(frame) if len(frame) else 0.0
    for column in frame.columns:
        if column not in (*COLUMNS, "step") and scored[column].notna().any():
            values |= _with_interval(column, scored[column], items)
    return values


def _with_interval(name: str, scores: Any, items: Any) -> dict[str, float]:
    import numpy as np

    from experiments import stats

    found = stats.item_interval(scores, items)
    low, high = found.low, found.high
    known = np.asarray(scores, float)
    known = known[~np.isnan(known)]
    shares = name.startswith(("score", "pass@", "truncated"))
    if shares and len(known) and found.items and known.min() == known.max() and known[0] in (0.0, 1.0):
        bound = 0.025 ** (1 / found.items)
        low, high = (0.0, 1 - bound) if known[0] == 0 else (bound, 1.0)
    return {name: found.mean, f"{name}.low": low, f"{name}.high": high}


def powers(samples: int) -> tuple[int, ...]:
    """The k of pass@k that are shown: 1, 2, 4, ... and `samples`."""
    return tuple(sorted({2**i for i in range(samples.bit_length())} | {samples}))


def table(frame: pd.DataFrame, title: str = "") -> str:
    """The summary of a frame as text, one block per split; splits of a suite end with their mean."""
    lines = [title] if title else []
    scores = []
    for split, part in frame.groupby("split", sort=False):
        samples = Counter(part["item_id"]).most_common(1)[0][1]
        values = summarise(part, powers(samples))
        scores.append(values["score"])
        lines.append(f"{split}: {values['items']:.0f} items, {samples} sample{'s' if samples > 1 else ''} each")
        hidden = ("items", "completions", "errors")
        shown = [name for name in values if "." not in name and name not in hidden and not name.startswith("avg@")]
        width = max(20, *map(len, shown))
        for name in shown:
            low, high = values.get(f"{name}.low"), values.get(f"{name}.high")
            span = "" if low is None else "(one item)" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"
            lines.append(f"  {name:<{width}} {values[name]:>9.3f}  {span}".rstrip())
        if values["errors"]:
            lost = Counter(part["finish"])["error"]
            lines.append(f"  {lost} of {len(part)} completions could not be had; they count nowhere above")
    if len(scores) > 1:
        lines.append(f"mean of {len(scores)} tasks: {sum(scores) / len(scores):.3f}")
    return "\n".join([*lines, "[95 % intervals, clustered by item]"])
