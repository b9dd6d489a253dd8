"""Figures of an experiment: learning curves with bands, and a forest plot of paired differences.

Colours are Okabe and Ito's (told apart with colour blindness, and in grey by the line ends' labels). The baseline is
always grey. PNG and SVG of the same figure; no dates and fixed ids, so that the same records give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import stats
from experiments.files import new_folder, replace
from experiments.readings import Reading, Spec

if TYPE_CHECKING:
    from experiments.report import Study

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BASELINE = "#6B6B6B"
INK, FAINT = "#222222", "#D9D9D9"
MOST_LINES = 7  # arms in one panel; beyond that every arm gets a panel of its own
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "assay",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A8A8A",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": INK,
    "grid.color": "#ECECEC",
    "lines.linewidth": 1.9,
}
Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # steps, mean, low, high, each (T,)


def draw(study: Study, folder: Path) -> dict[str, str]:
    """Write the figures that these records allow; their titles and paths relative to the table."""
    import matplotlib

    made = {}
    with matplotlib.rc_context(STYLE), new_folder(folder):
        for title, name, figure in (
            ("Learning curves", "learning_curves", _learning(study)),
            ("Paired differences", "differences", _forest(study)),
            ("Along the axis", "axis", _along_axis(study)),
            ("Logged values", "logged", _logged_values(study)),
        ):
            if figure is not None:
                save(figure, folder / name)
                made[title] = f"figures/{name}.png"
    return made


def save(figure: Any, path: Path) -> None:
    """Write `path`.png and `path`.svg, the same bytes for the same figure."""
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], dpi=160, metadata=metadata, facecolor="white")
        replace(path.with_suffix(suffix), buffer.getvalue())


def new_figure(width: float, height: float, rows: int, columns: int, **shared: Any):
    """A figure without a window and its (rows, columns) array of axes; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def colours(study: Study) -> dict[str, str]:
    """One colour per arm, the primary arm first, so that it has the strongest one; the baseline is grey."""
    others = sorted(study.others, key=lambda arm: arm != study.primary.arm)
    found = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(others)}
    return {arm: found.get(arm, BASELINE) for arm in study.arms}


def short(arm: str, most: int = 30) -> str:
    """A name that fits beside a plot; a sweep's arms are long lists of overrides."""
    return arm if len(arm) <= most else f"{arm[: most // 2]}…{arm[-most // 2 :]}"


# ---------------------------------------------------------------- learning curves


def _learning(study: Study):
    panels = _panels(study)
    if not panels:
        return None
    if len(study.arms) > MOST_LINES:
        return _one_panel_per_arm(study, panels[0][1])
    return _side_by_side(study, panels, _quantity(study))


def _side_by_side(study: Study, panels: Sequence[tuple[str, dict[str, Curve]]], quantity: str):
    """Titled panels with one curve per arm, the arms named beside the last one."""
    figure, axes = new_figure(2.75 * len(panels) + 1.7, 3.3, 1, len(panels), sharey=True, sharex=True)
    hues = colours(study)
    for axis, (title, curves) in zip(axes[0], panels, strict=True):
        for arm in sorted(curves, key=lambda arm: arm != study.baseline):
            _line(axis, curves[arm], hues[arm], len(curves) <= 5)
        axis.set_title(title, loc="left")
        _dress(axis)
    axes[0][0].set_ylabel(quantity)
    _direct_legend(axes[0][-1], panels[-1][1], hues)
    return figure


def _logged_values(study: Study):
    """One panel per entry of the plan's `logged`, a title and a key of metrics.jsonl, for its arms."""
    plan = study.plan.get("logged") or {}
    arms = {arm: study.arms[arm] for arm in plan.get("arms") or study.arms if arm in study.arms}
    panels = []
    for title, key in (plan.get("panels") or {}).items():
        curves = {arm: curve for arm, readings in arms.items() if (curve := _logged(readings, str(key)))}
        panels += [(str(title), curves)] if curves else []
    return _side_by_side(study, panels, str(plan.get("name", ""))) if panels else None


def _quantity(study: Study) -> str:
    spec = _spec(study)
    return f"{spec.column} ({spec.split} items)" if spec else "reward (training)"


def _spec(study: Study) -> Spec | None:
    first = next(iter(study.arms.values()))[0]
    if not first.splits:
        return None
    wanted = first.spec(study.primary.metric)
    column = wanted.column if wanted and "@" not in wanted.column else "score"
    return Spec("final", first.splits[0], column, None)


def _panels(study: Study) -> list[tuple[str, dict[str, Curve]]]:
    """Titled sets of curves: all items, then each tier; or the training reward if nothing was evaluated twice."""
    first = next(iter(study.arms.values()))[0]
    spec = _spec(study)
    if spec is None or first.points < 2:
        curves = {arm: curve for arm, rs in study.arms.items() if (curve := _logged(rs, "reward"))}
        return [("training reward", curves)] if curves else []
    tiers = [None]
    if 1 < len(first.tiers) <= 5 and len(study.arms) <= MOST_LINES:
        tiers += first.tiers
    panels = []
    for tier in tiers:
        at = Spec(spec.kind, spec.split, spec.column, tier)
        curves = {arm: curve for arm, readings in study.arms.items() if (curve := _evaluated(readings, at))}
        panels.append((tier or "all items", curves))
    return panels


def _evaluated(readings: Sequence[Reading], spec: Spec) -> Curve | None:
    frames = [frame for _, frame in (reading.curve(spec) for reading in readings) if frame.size]
    if not frames:
        return None
    steps = sorted(set.intersection(*(set(frame.index) for frame in frames)))
    if len(frames) == 1:
        bands = [stats.bootstrap(frames[0].loc[step].to_numpy(float)[None, :], draws=1000) for step in steps]
    else:
        bands = [stats.mean_interval([frame.loc[step].mean() for frame in frames]) for step in steps]
    return _curve(steps, bands)


def _logged(readings: Sequence[Reading], key: str) -> Curve | None:
    series = [r.metrics.set_index("step")[key].dropna() for r in readings if key in r.metrics]
    series = [one for one in series if len(one)]
    if not series:
        return None
    steps = sorted(set.intersection(*(set(one.index) for one in series)))
    return _curve(steps, [stats.mean_interval([one.loc[step] for one in series]) for step in steps]) if steps else None


def _curve(steps: Sequence[float], bands: Sequence[stats.Interval]) -> Curve:
    columns = (steps, [b.mean for b in bands], [b.low for b in bands], [b.high for b in bands])
    steps_T, mean_T, low_T, high_T = (np.asarray(column, float) for column in columns)
    return steps_T, mean_T, low_T, high_T


def _line(axis: Any, curve: Curve, colour: str, band: bool = True) -> None:
    steps, mean, low, high = curve
    if band and not np.isnan(low).all():
        axis.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
    axis.plot(steps, mean, color=colour, solid_capstyle="round")


def _dress(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.grid(axis="y")
    axis.set_xlabel("optimiser steps")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.margins(x=0.02)


def _direct_legend(axis: Any, curves: Mapping[str, Curve], hues: Mapping[str, str]) -> None:
    """Names of the arms to the right of the last panel, each at the height of its line's end, pushed apart."""
    low, high = axis.get_ylim()
    ends = {arm: (float(curve[1][-1]) - low) / (high - low) for arm, curve in curves.items()}
    order = sorted(ends, key=lambda arm: ends[arm])
    heights = _spread([ends[arm] for arm in order], 0.075)
    for arm, height in zip(order, heights, strict=True):
        axis.annotate(
            short(arm),
            xy=(1.0, ends[arm]),
            xytext=(1.07, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=hues[arm],
            va="center",
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": hues[arm], "lw": 0.8, "alpha": 0.6, "shrinkA": 2, "shrinkB": 0},
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed so that neighbours are at least `gap` apart, centred."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    excess = (placed[-1] - heights[-1]) / 2 if placed else 0.0
    return [height - excess for height in placed]


def _one_panel_per_arm(study: Study, curves: Mapping[str, Curve]):
    arms = [arm for arm in study.others if arm in curves]
    columns = min(4, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure, axes = new_figure(2.5 * columns + 0.6, 2.2 * rows + 0.5, rows, columns, sharey=True, sharex=True)
    for axis in axes.flat[len(arms) :]:
        axis.remove()
    for i, (axis, arm) in enumerate(zip(axes.flat, arms, strict=False)):
        if study.baseline in curves:
            _line(axis, curves[study.baseline], BASELINE)
        _line(axis, curves[arm], COLOURS[0] if arm != study.primary.arm else COLOURS[1])
        axis.set_title(
            short(arm), loc="left", fontsize=10, color=COLOURS[0] if arm != study.primary.arm else COLOURS[1]
        )
        _dress(axis)
        axis.set_xlabel("optimiser steps" if i + columns >= len(arms) else "")
        axis.tick_params(labelbottom=i + columns >= len(arms))
    figure.supylabel(_quantity(study), fontsize=10)
    figure.suptitle(f"each arm against {short(study.baseline)} (grey)", fontsize=10, color=BASELINE, x=0.01, ha="left")
    return figure


# ---------------------------------------------------------------- arms along an axis


def _along_axis(study: Study):
    """One panel per group of the plan's `axis`, one curve per tier: the evaluated column against the arms' places."""
    axis_plan, spec = study.plan.get("axis") or {}, _spec(study)
    groups = {
        str(title): {arm: float(place) for arm, place in places.items() if arm in study.arms}
        for title, places in (axis_plan.get("groups") or {}).items()
    }
    groups = {title: places for title, places in groups.items() if len(places) > 1}
    if not groups or spec is None:
        return None
    tiers = next(iter(study.arms.values()))[0].tiers
    hues = dict(zip(tiers, COLOURS, strict=False))
    figure, axes = new_figure(3.2 * len(groups) + 1.2, 3.3, 1, len(groups), sharey=True, sharex=True)
    curves: dict[str, Curve] = {}
    for axis, (title, places) in zip(axes[0], groups.items(), strict=True):
        for tier in hues:
            metric = f"{spec.split}/{spec.column}/{tier}"
            bands = [stats.mean_interval([r.value(metric) for r in study.arms[arm]]) for arm in places]
            curves[tier] = _curve(list(places.values()), bands)
            _line(axis, curves[tier], hues[tier])
        axis.set_title(title, loc="left")
        _dress(axis)
        axis.set_xlabel(str(axis_plan.get("name", "")))
    axes[0][0].set_ylabel(_quantity(study))
    _direct_legend(axes[0][-1], curves, hues)
    return figure


# ---------------------------------------------------------------- forest plot


def _forest(study: Study):
    """One panel per tested metric, one row per arm: the paired difference to the baseline with its interval."""
    metrics = [goal.metric for goal in study.goals]
    metrics = [m for m in metrics if any(d.metric == m and d.seeds for d in study.differences)][:4]
    if not metrics:
        return None
    arms = study.others
    figure, axes = new_figure(
        2.7 * len(metrics) + 0.1 * max(len(short(arm)) for arm in arms) + 0.4,
        0.42 * len(arms) + 1.35,
        1,
        len(metrics),
        sharey=True,
    )
    hues = colours(study) if len(study.arms) <= MOST_LINES else {arm: COLOURS[0] for arm in arms}
    directions = {goal.metric: goal.direction for goal in study.goals}
    for axis, metric in zip(axes[0], metrics, strict=True):
        axis.axvline(0, color=BASELINE, lw=1, zorder=1)
        for row, arm in enumerate(arms):
            found = study.find(metric, arm)
            if found and found.seeds:
                _whisker(axis, row, found.interval, hues[arm])
        axis.set_title(metric, loc="left")
        arrow = "right" if directions[metric] == "higher" else "left"
        axis.set_xlabel(f"difference to {short(study.baseline)}\n(better to the {arrow})", fontsize=9)
        axis.grid(axis="x")
        axis.locator_params(axis="x", nbins=4)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0][0].set_yticks(range(len(arms)), [short(arm) for arm in arms])
    axes[0][0].set_ylim(len(arms) - 0.4, -0.6)
    for label, arm in zip(axes[0][0].get_yticklabels(), arms, strict=True):
        label.set_color(hues[arm])
        label.set_fontweight("bold" if arm == study.primary.arm else "normal")
    return figure


def _whisker(axis: Any, row: int, interval: stats.Interval, colour: str) -> None:
    clear = interval.low > 0 or interval.high < 0
    if not math.isnan(interval.low):
        axis.plot([interval.low, interval.high], [row, row], color=colour, lw=2.2, solid_capstyle="butt", zorder=2)
    face = colour if clear else "white"
    axis.plot([interval.mean], [row], "o", ms=6.5, mfc=face, mec=colour, mew=1.6, zorder=3)
