"""The files of a scoring: result.json, table.csv, table.md, latents.html and figures, from its parts only.

Two builds from the same parts give the same bytes: no dates, fixed random streams, fixed order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import stats
from experiments.files import replace, write_json
from experiments.seeds import derive
from experiments.table import grid, number, p_value
from experiments.transfer import figures
from experiments.transfer.page import write_page
from methods.sts.correlation import Correlation, correlate
from methods.sts.scores import Selection, cosine, mixture

RANDOM = 20  # draws of random live latents
KEYS = ("act", "icl", "squares", "released")


@dataclass(frozen=True)
class Scored:
    """Everything that the files show: the source's part, a part per domain, and what they were made with."""

    title: str
    facts: dict[str, Any]
    selection: Selection
    source: dict[str, np.ndarray]
    domains: dict[str, tuple[dict[str, np.ndarray], Any]]
    suppressed: list[int] | None = None
    changes: dict[str, dict[str, Any]] | None = None
    measured: str = ""
    true_latents: list[int] | None = None


def rows(scored: Scored, seed: int, rank: str) -> list[dict[str, Any]]:
    """One row per domain, the highest `rank` first: scores with intervals over texts, baselines, measured changes.

    `tuned` is STS_act with the latents that the fine-tune shifted most: no prediction, it needs the fine-tune.
    """
    live = np.flatnonzero(sum(part["mean"] for part, _ in scored.domains.values()) > 0)
    rng = np.random.default_rng(derive(seed, "transfer", "random latents"))
    size = min(len(scored.selection.latents), len(live))
    drawn = [rng.choice(live, size, replace=False) for _ in range(RANDOM)]
    total = sum(float(part["tokens"].sum()) for part, _ in scored.domains.values())
    rms_s = np.sqrt(sum(part["square"] * part["tokens"].sum() for part, _ in scored.domains.values()) / total)
    found = []
    for name, (part, info) in scored.domains.items():
        row: dict[str, Any] = {"domain": name}
        for key, interval in zip(KEYS, intervals(part, info["clusters"]), strict=True):
            row |= {key: interval.mean, f"{key}_low": _known(interval.low), f"{key}_high": _known(interval.high)}
        row["cosine"] = cosine(torch.from_numpy(scored.source["mean"]), torch.from_numpy(part["mean"]))
        row["random"] = float(np.mean([part["mean"][one].sum() for one in drawn]))
        if scored.suppressed is not None:
            scale = np.where(rms_s > 0, rms_s, 1.0)[scored.suppressed]
            row["sts_sup"] = float((part["mean"][scored.suppressed] / scale).sum())
        if scored.true_latents is not None:
            row["tuned"] = float(part["mean"][scored.true_latents].sum())
        row |= {"texts": len(part["tokens"]), "tokens": int(part["tokens"].sum()), "skipped": info["skipped"]}
        row["left_out"] = info["left_out"]
        found.append(row | ((scored.changes or {}).get(name) or {}))
    by = _ranking(found, rank)
    return sorted(found, key=lambda row: (-row[by], row["domain"]))


def _ranking(table: Sequence[dict[str, Any]], rank: str) -> str:
    return rank if rank in table[0] else "act"  # a fine-tune that shifts nothing has no `tuned`


def intervals(part: dict[str, np.ndarray], clusters: Sequence[int]) -> list[stats.Interval]:
    """The scores `KEYS` of one domain with 95 % intervals: texts resampled whole (pieces of one text together)."""

    def scores(weight_N: np.ndarray) -> list[float]:
        tokens = float(weight_N @ part["tokens"])
        return [float(weight_N @ part[key]) / tokens if tokens else math.nan for key in KEYS]

    return stats.cluster_bootstrap(scores, np.asarray(clusters), draws=2000, rng=np.random.default_rng(0))


def _known(x: float) -> float | None:
    return None if math.isnan(x) else x


def validation(table: Sequence[dict[str, Any]], extremes: int | None) -> dict[str, Correlation]:
    """Each score and baseline against the size of the change, over all domains (`extremes`: labelled)."""
    names = [k for k in ("act", "icl", "released", "cosine", "random", "sts_sup", "tuned") if k in table[0]]
    changes = [row["change"] for row in table]
    return {name: correlate([row[name] for row in table], changes, extremes_only=extremes) for name in names}


def write(
    folder: Path, scored: Scored, seed: int, rank: str, budget: int | None = None, extremes: int | None = None
) -> None:
    """Write all files of a scoring into `folder`; domains are ranked, and a budget is shared, by the score `rank`."""
    table = rows(scored, seed, rank)
    advice = mixture([row[_ranking(table, rank)] for row in table], budget) if budget else None
    checks = validation(table, None) if scored.changes else {}
    chosen = validation(table, extremes) if scored.changes and extremes else {}
    able = [row for row in table if not str(row.get("note")).startswith("near 0")]
    without = validation(able, None) if scored.changes and 0 < len(able) < len(table) else {}
    result = {
        **scored.facts,
        "N": len(scored.selection.latents),
        "D_N": scored.selection.latents,
        "delta": scored.selection.shifts,
        "concentration": scored.selection.concentration,
        "note": scored.selection.note,
        "scores": {row["domain"]: {k: v for k, v in row.items() if k != "domain"} for row in table},
        "validation": {name: asdict(check) for name, check in checks.items()},
    }
    if without:
        result["validation_of_domains_that_can_drop"] = {name: asdict(check) for name, check in without.items()}
    if chosen:
        result["validation_of_extremes"] = {name: asdict(check) for name, check in chosen.items()}
    if scored.true_latents is not None:
        shared = set(scored.selection.latents) & set(scored.true_latents)
        result["overlap"] = len(shared) / len(scored.selection.latents)
        result["overlap_chance"] = len(scored.selection.latents) / len(scored.source["delta"])
    if advice is not None:
        result["mixture"] = {row["domain"]: count for row, count in zip(table, advice, strict=True)}
    write_json(folder / "result.json", result)
    drawn = figures.draw(table, folder / "figures", scored.measured if scored.changes else "")
    replace(folder / "table.csv", _csv(table).encode())
    replace(folder / "table.md", _markdown(scored, table, (checks, without, chosen), advice, result, drawn).encode())
    _page(folder / "latents.html", scored)


def figures_of(folder: Path, rank: str) -> dict[str, float]:
    """The record's metrics; `eval/score` is r of the score `rank`."""
    result = json.loads((folder / "result.json").read_text())
    found = {"eval/latents": float(result["N"]), "eval/share": result["concentration"]}
    for name, check in result["validation"].items():
        found |= {f"eval/r/{name}": check["r"], f"eval/spearman/{name}": check["spearman"]}
    if rank in result["validation"]:
        found |= {"eval/score": found[f"eval/r/{rank}"], "eval/spearman": found[f"eval/spearman/{rank}"]}
    if "overlap" in result:
        found["eval/overlap"] = result["overlap"]
    return {name: math.nan if value is None else value for name, value in found.items()}


def _csv(table: Sequence[dict[str, Any]]) -> str:
    import pandas as pd

    return pd.DataFrame(list(table)).to_csv(index=False, float_format="%.10g", lineterminator="\n")


def _markdown(
    scored: Scored, table: Sequence[dict[str, Any]], validated: Any, advice: Any, result: Any, drawn: dict[str, str]
) -> str:
    facts, (checks, without, chosen) = scored.facts, validated
    lines = [f"# {scored.title}", *(f"**Warning:** {w}." for w in facts["warnings"])]
    lines.append(
        f"{len(scored.selection.latents)} of {len(scored.source['delta'])} latents hold "
        f"{scored.selection.concentration:.1%} of the shift that {facts['demos']} demonstrations of {facts['source']} "
        f"make on {facts['source_tokens']} tokens. Scores are comparable across the domains of this table only, and "
        "say how much a domain will change, never in which direction. Intervals: texts resampled."
    )
    if left := facts["left_out"] + sum(row["left_out"] for row in table):
        lines.append(f"Left out as attention sinks (score.longest): {left} tokens.")
    header = ["domain", "STS_act", "STS_ICL", "released", "cosine", "random latents"]
    header += ["sts_sup"] * (scored.suppressed is not None) + ["tuned latents"] * (scored.true_latents is not None)
    header += ["texts", "tokens"]
    header += [f"change of {scored.measured}", "note"] if scored.changes else []
    header += ["examples to add"] if advice is not None else []
    body = []
    for k, row in enumerate(table):
        cells = [row["domain"], *(_with_interval(row, key) for key in ("act", "icl", "released"))]
        cells += [number(row["cosine"]), number(row["random"])]
        cells += [number(row[key]) for key in ("sts_sup", "tuned") if key in row]
        cells += [str(row["texts"]), str(row["tokens"])]
        cells += [_change(row), row.get("note") or ""] if scored.changes else []
        body.append(cells + ([str(advice[k])] if advice is not None else []))
    lines.append(grid(header, [[_plain(cell) for cell in cells] for cells in body]))
    if checks:
        lines += ["## Scores against the size of the measured change", _checks(checks)]
        if "overlap" in result:
            lines.append(
                f"Overlap of the predicted latents with those that training shifted most: {result['overlap']:.2f} "
                f"(chance {result['overlap_chance']:.3f})."
            )
    if without:
        lines += ["## Without domains near 0 or chance before training, which cannot drop", _checks(without)]
    if chosen:
        lines += ["## Selected domains only", "Chosen by the outcome, as in the paper: r is inflated.", _checks(chosen)]
    lines += [f"![{title}]({path})" for title, path in drawn.items()]
    return "\n\n".join(lines) + "\n"


def _plain(cell: str) -> str:
    """A cell in one line without control characters: names come from data."""
    return "".join(c if c.isprintable() else " " for c in cell)


def _with_interval(row: dict[str, Any], key: str) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return number(row[key]) if low is None else f"{number(row[key])} [{number(low)}, {number(high)}]"


def _change(row: dict[str, Any]) -> str:
    low, high = row.get("change_low"), row.get("change_high")
    bounds = f" [{number(low, True)}, {number(high, True)}]" if low is not None and high is not None else ""
    return number(row["change"], True) + bounds


def _checks(checks: dict[str, Correlation]) -> str:
    body, notes = [], []
    for name, c in checks.items():
        low, high = c.range
        body.append([name, str(c.domains), number(c.r), f"[{number(c.low)}, {number(c.high)}]", number(c.r2),
                     number(c.spearman), p_value(c.p), f"{number(low)} to {number(high)}"])  # fmt: skip
        notes += [f"{name}: r is not given, {c.reason}." if c.reason else "", *(f"{note}." for note in c.notes)]
    header = ["score", "domains", "r", "95 % interval", "R2", "Spearman", "permutation p", "leave-one-out r"]
    return "\n\n".join([grid(header, body), *dict.fromkeys(note for note in notes if note)])


def _page(path: Path, scored: Scored) -> None:
    entries = []
    for place, (latent, shift) in enumerate(zip(scored.selection.latents, scored.selection.shifts, strict=True)):
        texts = [
            {"domain": name, **text} for name, (_, info) in scored.domains.items() for text in info["shown"][place]
        ]
        texts.sort(key=lambda text: (-text["value"], text["domain"]))
        share = shift / float(scored.source["delta"].sum())
        entries.append({"latent": latent, "shift": shift, "share": share, "texts": texts[:8]})
    intro = [
        f"Latents whose features demonstrations of {scored.facts['source']} shift most, with the texts of all domains "
        "that excite them most. The marked token is where the latent fires most strongly; the number is its feature.",
        f"SAE: {scored.facts['sae']['name']}, layer {scored.facts['sae']['layer']}, "
        f"{len(scored.source['delta'])} latents. Model: {scored.facts['model']}.",
    ]
    write_page(path, f"{scored.title}: latents", intro, entries)
