"""LocalSearchBench's leaderboard: averages over questions, overall, per level and per city, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from experiments.records import Run

SCALES = {"correctness": 100.0, "completeness": 10.0, "fluency": 10.0, "faithfulness": 10.0, "safety": 10.0}
"""To per cent: correctness is 0 or 1, the others 0 to 10."""
COUNTS = ("calls", "rounds")
COLUMNS = ("calls", "rounds", "correctness", "completeness", "fluency", "faithfulness", "safety")

PUBLISHED = {
    model: dict(zip(COLUMNS, map(float, figures.split()), strict=True))
    for model, figures in {
        "Qwen3-235B-A22B, no thinking": "2.00 2.93 21.18 50.94 69.16 25.28 79.72",
        "Qwen3-235B-A22B, thinking": "2.31 3.17 30.24 71.20 71.58 26.90 81.76",
        "Qwen3-32B, no thinking": "2.78 3.11 19.76 40.96 68.50 21.38 80.76",
        "Qwen3-32B, thinking": "2.80 3.12 25.63 40.66 68.44 22.40 79.54",
        "Qwen3-14B, no thinking": "2.53 2.07 24.21 40.60 69.62 27.44 80.78",
        "Qwen3-14B, thinking": "2.57 2.12 25.17 40.98 69.32 28.40 80.44",
        "GPT-4.1": "1.73 2.42 18.47 45.37 65.93 28.76 77.38",
        "o3 (high)": "2.91 3.38 31.53 69.64 70.72 33.89 81.87",
        "Gemini-2.5-Flash": "1.84 2.51 20.97 58.44 68.04 35.72 79.70",
        "Gemini-2.5-Pro": "2.75 3.10 32.34 71.03 71.12 34.93 82.32",
        "LongCat-Flash-Chat": "2.34 3.07 25.28 52.98 69.45 27.49 83.61",
        "LongCat-Flash-Thinking": "3.04 3.20 30.68 68.83 69.07 31.47 80.10",
        "GLM-4.6, no thinking": "2.86 3.86 28.97 76.45 70.37 35.40 81.40",
        "GLM-4.6, thinking": "3.08 4.06 32.83 76.83 70.27 37.48 81.30",
        "DeepSeek-V3.2, no thinking": "3.12 4.11 32.74 77.08 70.12 35.96 81.52",
        "DeepSeek-V3.2, thinking": "3.21 4.20 35.60 77.56 70.92 39.78 81.13",
    }.items()
}
"""The table of the paper's second version: 900 questions, 1.35 M merchants, 5 rounds, another judge. No number of a
generated world is comparable with it."""


def aggregate(rows: Sequence[Mapping[str, float | None] | None], release_compat: bool = False) -> dict[str, float]:
    """Means over the judged questions: scores in per cent, calls and rounds as they are; `count` and `failed`.

    A row is None where the judge's verdict could not be had: it is left out and counted. A score that is None or NaN
    is left out of its own mean. release_compat: such rows count as zeros in every score, as the release's batch scorer
    counts a verdict that came back empty; calls and rounds are still those of the judged ones.
    Degenerate: without judged rows only the two counts are there.
    """
    judged = [row for row in rows if row is not None]
    failed = len(rows) - len(judged)
    zeros = failed if release_compat and judged else 0
    values: dict[str, float] = {"count": len(judged) + zeros, "failed": failed}
    for name in COLUMNS:
        known = [float(v) for row in judged if (v := row.get(name)) is not None and not math.isnan(v)]
        if known:
            more = zeros if name in SCALES else 0
            values[name] = SCALES.get(name, 1.0) * sum(known) / (len(known) + more)
    return values


# ---------------------------------------------------------------- from records


def scored_rows(frame: pd.DataFrame) -> list[dict[str, float] | None]:
    """The rows of `aggregate` of an evaluation: the judge's scores where there is one, else the exact ones."""
    judged = "judge_failed" in frame
    names = {name: f"judge_{name}" if judged and name in SCALES else name for name in COLUMNS}
    if not judged and "correctness" not in frame:
        names["correctness"] = "score"
    rows: list[dict[str, float] | None] = []
    for record in frame.to_dict("records"):
        failed = record["finish"] == "error" or (judged and record["judge_failed"] == 1)
        rows.append(None if failed else {k: record[v] for k, v in names.items() if v in record})
    return rows


def splits(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The questions overall, by level (the tier) and by city (the item's id up to its first slash)."""
    parts = {"overall": frame}
    parts |= {str(level): part for level, part in frame.groupby("tier")}
    cities = frame["item_id"].map(city_of)
    return parts | {str(city): part for city, part in frame.groupby(cities) if city}


def city_of(item_id: str) -> str:
    return item_id.partition("/")[0] if "/" in item_id else ""


def lines(name: str, frame: pd.DataFrame, release_compat: bool = False) -> list[dict[str, Any]]:
    """One line of the leaderboard per split: model, split, the values of `aggregate`, and `<name>.low`, `.high`."""
    from experiments import stats

    found = []
    for split, part in splits(frame).items():
        rows = scored_rows(part)
        line: dict[str, Any] = {"model": name, "split": split, **aggregate(rows, release_compat)}
        items = part["item_id"].to_numpy()
        for column in COLUMNS:
            if column in line:
                blank = {column: 0.0} if release_compat and column in SCALES else {}
                scores = [(blank if row is None else row).get(column) for row in rows]
                known = [math.nan if v is None else SCALES.get(column, 1.0) * v for v in scores]
                interval = stats.item_interval(known, items)
                low, high = interval.low, interval.high
                if column == "correctness" and line[column] in (0.0, 100.0):
                    # No resampling shows doubt here: the exact binomial bound.
                    bound = 100 * 0.025 ** (1 / interval.items)
                    low, high = (0.0, 100 - bound) if line[column] == 0 else (bound, 100.0)
                line |= {f"{column}.low": low, f"{column}.high": high}
        found.append(line)
    return found


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The lines as a table with 95 % intervals; scores in per cent. An empty cell was not measured."""
    head = ["model", "split", "questions", "failed", *COLUMNS]
    rows = [head, ["---"] * len(head)]
    for line in table:
        cells = [escaped(line["model"]), escaped(line["split"]), f"{line['count']:.0f}", f"{line['failed']:.0f}"]
        rows.append(cells + [cell(line, column) for column in COLUMNS])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(line: Mapping[str, Any], column: str) -> str:
    if column not in line:
        return ""
    low, high = line.get(f"{column}.low", math.nan), line.get(f"{column}.high", math.nan)
    digits = 2 if column in COUNTS else 1
    span = "" if math.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{line[column]:.{digits}f}{span}"


def escaped(text: Any) -> str:
    """A name in a Markdown table: no bars, nothing that a terminal obeys."""
    return "".join(c if c.isprintable() else "?" for c in str(text)).replace("|", "\\|")


# ---------------------------------------------------------------- from a folder of records


def build(targets: Sequence[str], root: str | Path = "results", release_compat: bool = False) -> Path:
    """Writes leaderboard.md and local_life.html for the runs of task=local_life that `targets` name; prints the table.

    Both go to `<root>/<experiment>/`; the path of the page is returned. Runs of one arm are put together, and the arms
    ordered by correctness. ConfigError
    where no run of this task has been evaluated.
    """
    from experiments import browser, report
    from experiments.files import new_folder, replace

    runs, name = report.find(list(targets), root)
    arms: dict[str, list[Run]] = {}
    for run in runs:
        if is_local_life(run.config) and len(run.evals()):
            arms.setdefault(str(run.run.get("arm")), []).append(run)
    if not arms:
        raise ConfigError(
            "There is no evaluated run of task=local_life", where=", ".join(targets) or name, got=f"{len(runs)} runs",
            fix="evaluate something first, for example: assay eval model=smollm2 task=local_life eval.items=20",
        )  # fmt: skip
    boards = [lines(arm, latest(members), release_compat) for arm, members in arms.items()]
    boards.sort(key=lambda board: -board[0].get("correctness", -1.0))
    table = [line for board in boards for line in board]
    sources = sorted({source_of(run.config) for members in arms.values() for run in members})
    note = f"Source: {'; '.join(sources)}. Numbers of a generated world or of an evidence corpus are not comparable "
    note += "with the published leaderboard."
    folder = Path(root) / name
    text = "\n\n".join((f"# Leaderboard of {escaped(name)}", markdown(table), escaped(note))) + "\n"
    with new_folder(folder):
        replace(folder / "leaderboard.md", text.encode())
        content = {
            "columns": COLUMNS,
            "counts": COUNTS,
            "levels": sorted({str(t) for members in arms.values() for t in latest(members)["tier"].unique()}),
            "lines": table,
            "runs": [entry(b[0]["model"], run) for b in boards for run in arms[b[0]["model"]] if run.samples()],
        }
        page = browser.page(Path(__file__).with_name("page"), f"Local life: {name}", note, browser.embed(content))
        replace(folder / "local_life.html", page.encode())
    print(text)
    return folder / "local_life.html"


def latest(runs: Sequence[Run]) -> pd.DataFrame:
    """The last evaluation of each run, one below the other."""
    import pandas as pd

    frames = [run.evals() for run in runs]
    return pd.concat([frame[frame["step"] == frame["step"].max()] for frame in frames], ignore_index=True)


def is_local_life(config: Mapping[str, Any]) -> bool:
    """Whether a run is about these questions: the task, or a study of agents without a model."""
    study = (config.get("study") or {}).get("_target_", "")
    return "local_life" in study if study else config.get("task", {}).get("name") == "local_life"


def source_of(config: Mapping[str, Any]) -> str:
    """Which world and corpus a run's questions are about."""
    task, how = config.get("task", {}), config.get("eval", {})
    if config.get("study"):
        return "generated, a world for each seed of the study"
    if task.get("path"):
        return f"{task['path']}, corpus {task.get('corpus') or 'of its own folder or search paths'}"
    seed = (task.get("world_seeds") or {}).get(how.get("split"))
    return f"generated, seed {seed}, {task.get('size')} merchants, {task.get('cities')} cities, {task.get('language')}"


def entry(arm: str, run: Run) -> dict[str, Any]:
    """A run's transcripts for the page: those of its last recorded step."""
    frame = latest([run])
    metrics = [c for c in frame.columns if c not in ("step", "split", "item_id", "sample", "tier", "finish")]
    values = {record["item_id"]: {c: record[c] for c in metrics} for record in frame.to_dict("records")}
    samples = run.samples()
    last = max((sample["step"] for sample in samples), default=0)
    shown = []
    for sample in (s for s in samples if s["step"] == last):
        prompt = sample["prompt"]
        question = prompt[-1]["content"] if isinstance(prompt, list) else str(prompt)
        shown.append({
            "id": sample["row_id"], "level": sample["tier"], "city": city_of(sample["row_id"]), "question": question,
            "reference": sample.get("reference") or "", "score": (sample.get("rewards") or {}).get("score"),
            "finish": sample["finish"], "turns": sample.get("turns"), "completion": sample["completion"],
            "values": values.get(sample["row_id"], {}),
        })  # fmt: skip
    return {"name": f"{arm}, seed {run.run.get('seed')}", "samples": shown}
