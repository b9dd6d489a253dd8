"""table.md: what was compared, means with intervals, paired differences, controls, equal budgets, power."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import stats
from experiments.caveats import caveats
from experiments.readings import AXES, Difference, Reading, Spec, arm_interval, common_span, difference

if TYPE_CHECKING:
    from experiments.report import Goal, Study

UNKNOWN = "-"
ALPHA = 0.05
LEAST = 6  # pairs below which no sign-flip test can get below ALPHA: 2 / 2^5 = 0.0625
ENOUGH = 8  # paired seeds below which a comparison is a demonstration, not a test
CAPTIONS = {
    "Learning curves": "Learning curves: mean over seeds with a 95 % band (t over seeds; over items for one seed).",
    "Paired differences": "Paired differences with 95 % intervals; a filled mark: the interval excludes zero.",
    "Along the axis": "Each arm at its place on the axis, one curve per tier: mean over seeds with a 95 % band.",
    "Logged values": "Values logged during training: mean over seeds with a 95 % band (t over seeds).",
}
DEMONSTRATION = "a demonstration, not a test"
_PRIVATE = {"seed", "arm", "name", "experiment", "results_dir", "pair", "jobs", "hydra", "config_hash"}
_COSTS = {
    "generated tokens": "train/cost/generated_tokens",
    "trained tokens": "train/cost/trained_tokens",
    "forwarded tokens": "train/cost/forwarded_tokens",
    "judge calls": "train/cost/judge_calls",
    "seconds": "train/time/total",
    "dead groups": "mean/groups/dead",
}


def markdown(study: Study, power: bool = False, figures: Mapping[str, str] | None = None) -> str:
    """The whole of table.md; `power` adds the full power table, `figures` (title: path) are linked at the end."""
    sections = [
        _head(study),
        _compared(study),
        _care(study),
        _arms(study),
        _differences(study),
        _controls(study),
        _budgets(study),
        _costs(study),
        _power(study, power),
        _left_out(study),
        "\n\n".join(f"![{title}]({path})\n\n{CAPTIONS[title]}" for title, path in (figures or {}).items()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# ---------------------------------------------------------------- formatting


def number(x: float, sign: bool = False) -> str:
    """Three decimals for scores, fewer for large values, a dash for what is not known."""
    if math.isnan(x):
        return UNKNOWN
    if math.isinf(x):
        return "inf"
    x = 0.0 if abs(x) < stats.ROUNDING else x
    size = abs(x)
    digits = 0 if size >= 10 and x == round(x) else 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    if 0 < size < 0.0005:
        return f"{x:+.1e}" if sign else f"{x:.1e}"
    return f"{x:{'+' if sign else ''},.{digits}f}"


def p_value(p: float) -> str:
    if math.isnan(p):
        return UNKNOWN
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def bounds(interval: stats.Interval, sign: bool = False) -> str:
    if math.isnan(interval.low):
        return UNKNOWN if math.isnan(interval.mean) else "(one seed)"
    return f"[{number(interval.low, sign)}, {number(interval.high, sign)}]"


def cell(interval: stats.Interval) -> str:
    return UNKNOWN if math.isnan(interval.mean) else f"{number(interval.mean)} {bounds(interval)}"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns also line up in a terminal."""
    rows = [[entry.replace("|", "\\|") for entry in row] for row in rows]
    widths = [max(len(entry) for entry in column) for column in zip(header, *rows, strict=True)]
    lines = [list(header), ["-" * max(3, width) for width in widths], *rows]
    padded = [[entry.ljust(max(3, w)) for entry, w in zip(row, widths, strict=True)] for row in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


def _join(names: Sequence[str]) -> str:
    return ", ".join(names)


# ---------------------------------------------------------------- sections


def _head(study: Study) -> str:
    lines = [f"# {study.plan.get('title') or study.name}"]
    if note := str(study.plan.get("note") or "").strip():
        lines.append("\n".join(f"> {line}" for line in note.splitlines()))
    if study.others and study.pairs < ENOUGH:
        least = number(stats.smallest_p(study.pairs))
        count = "1 paired seed" if study.pairs == 1 else f"{study.pairs} paired seeds"
        floor = f": a two-sided sign-flip test on them cannot get below p = {least}" if study.pairs else ""
        lines.append(f"**{DEMONSTRATION.capitalize()}** ({count}{floor}).")
    lines.append(_primary(study))
    return "\n\n".join(line for line in lines if line)


def _primary(study: Study) -> str:
    if not study.others:
        return ""
    if not study.registered:
        return (
            "**Primary comparison:** none was fixed before these runs, so every p value below is corrected "
            "for the number of comparisons (Holm)."
        )
    found = study.find(study.primary.metric, study.primary.arm)
    if found is None or not found.seeds:
        return f"**Primary comparison:** {study.primary.arm} and {study.baseline} share no finished seeds or no task."
    better = f"{study.primary.direction} is better"
    return (
        f"**Primary comparison:** `{found.arm}` against `{found.other}` in {found.metric} ({better}), "
        f"{found.seeds} paired seed{'s' if found.seeds > 1 else ''}: {number(found.interval.mean, True)} "
        f"{bounds(found.interval, True)}, sign-flip p = {p_value(found.p)}. {verdict(found, study.primary)}"
    )


def verdict(found: Difference, goal: Goal) -> str:
    """One honest sentence: separated or not, in which direction, and whether this can be called a test at all."""
    good = (found.interval.mean > 0) == (goal.direction == "higher")
    side = f"in favour of `{found.arm}`" if good else f"against `{found.arm}`"
    if found.seeds < ENOUGH:
        return f"It does not count as separated: with {found.seeds} of at least {ENOUGH} seeds it is {DEMONSTRATION}."
    clear = found.interval.low > 0 or found.interval.high < 0
    if found.p < ALPHA and clear:
        return f"**It separates, {side}.**"
    if found.p < ALPHA:
        return f"**It does not clearly separate**: the test points {side}, but the interval includes zero."
    return "**It does not separate.**"


def _compared(study: Study) -> str:
    overrides = _overrides(study)
    rows = []
    for arm, readings in study.arms.items():
        role = "baseline" if arm == study.baseline else "primary" if arm == study.primary.arm else ""
        role = role or ("control" if arm in study.controls else "")
        steps = sorted({reading.steps for reading in readings})
        span = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        rows.append([arm, role, str(len(readings)), span, overrides[arm] or UNKNOWN])
    text = "## What was compared\n\n" + grid(["arm", "role", "seeds", "steps", "settings"], rows)
    text += f"\n\nIn every arm: {' '.join(f'`{part}`' for part in study.shared)}." if study.shared else ""
    return text + _environment(study)


def _environment(study: Study) -> str:
    envs = [reading.run.env for arm in study.arms.values() for reading in arm]
    named = [env for env in envs if env.get("commit")]
    commits = sorted({env["commit"][:10] + (" (with changes)" if env.get("dirty") else "") for env in named})
    devices = sorted({str(env.get("gpu") or env.get("cpu")) for env in envs if env})
    torch = sorted({str((env.get("packages") or {}).get("torch")) for env in envs if env})
    labelled = (("commit ", commits), ("torch ", torch), ("on ", devices))
    parts = [label + _join(found) for label, found in labelled if found]
    return "\n\nRecorded: " + ", ".join(parts) + "." if parts else ""


def _care(study: Study) -> str:
    found = caveats(study.arms, study.baseline)
    return "## Read with care\n\n" + "\n".join(f"* {text}" for text in found) if found else ""


def _overrides(study: Study) -> dict[str, str]:
    """Per arm: its overrides from the experiment's YAML, else the configuration keys in which the arms differ."""
    planned = study.plan.get("arms") or {}
    configs = {arm: _flat(_summed(readings[0].run.config)) for arm, readings in study.arms.items()}
    shared = set.intersection(*map(set, configs.values()))
    varying = [key for key in sorted(shared) if len({json.dumps(c[key], default=str) for c in configs.values()}) > 1]
    found = {}
    for arm, config in configs.items():
        listed = planned.get(arm)
        if listed is None:
            listed = [f"{key}={config[key]}" for key in varying]
            listed = [*listed[:6], *([f"and {len(listed) - 6} more"] if len(listed) > 6 else [])]
        found[arm] = " ".join(f"`{entry}`" for entry in listed)
    return found


def _summed(config: Mapping) -> dict[str, Any]:
    """The configuration without what every run has of its own, and with the method stack as a list of names."""
    rest = {key: value for key, value in config.items() if key not in _PRIVATE}
    if isinstance(rest.get("method"), Mapping):
        rest["methods"] = "[" + ",".join(rest["method"]) + "]"
    return rest | {"methods": rest.get("methods", "[]")}


def _flat(config: Mapping, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _arms(study: Study) -> str:
    rows, lonely = [], False
    for arm, readings in study.arms.items():
        cells = [arm_interval(readings, metric) for metric in study.metrics]
        lonely = lonely or any(interval.basis == "items" for interval in cells)
        rows.append([arm, str(len(readings)), *map(cell, cells)])
    text = "## Means with 95 % intervals\n\n" + grid(["arm", "seeds", *study.metrics], rows)
    text += "\n\nIntervals: Student's t over seeds (symmetric, so that of a share near 0 or 1 can pass it)."
    if lonely:
        text += " An arm with one seed has an interval over its items only: it says nothing about another seed."
    return text


def _differences(study: Study) -> str:
    if not study.differences:
        return ""
    rows = []
    for d in study.differences:
        primary = study.registered and (d.arm, d.metric) == (study.primary.arm, study.primary.metric)
        corrected = "primary" if primary else p_value(d.adjusted)
        shown = number(d.interval.mean, True)
        rows.append([d.metric, d.arm, shown, bounds(d.interval, True), p_value(d.p), corrected, str(d.seeds)])
    header = ["metric", "arm", "difference", "95 % interval", "p", "Holm p", "pairs"]
    text = f"## Paired differences to `{study.baseline}`\n\n" + grid(header, rows)
    bases = sorted({d.interval.basis for d in study.differences} - {""})
    text += (
        f"\n\nIntervals: paired bootstrap over {' / '.join(bases) or 'nothing (one value each)'}; p: sign-flip test."
    )
    if "items" in bases:
        text += " With one seed only items are resampled, and there is no test: another seed may differ."
    return text


def _controls(study: Study) -> str:
    if not study.controls:
        return ""
    rows = []
    for arm, (expected, d) in study.controls.items():
        gap = f"{number(d.interval.mean, True)} {bounds(d.interval, True)}"
        rows.append([arm, expected, gap, p_value(d.p), p_value(d.adjusted), held(expected, d)])
    header = ["control", "expected", "difference", "p", "Holm p", "held?"]
    title = f"## Controls against `{study.primary.arm}` in {study.primary.metric}"
    return f"{title}\n\n" + grid(header, rows)


def held(expected: str, d: Difference) -> str:
    """Whether a control's sign came out as expected; a sign alone is not called held."""
    if not d.seeds:
        return "no pairs"
    inside = d.interval.low <= 0 <= d.interval.high
    if expected == "equal":
        within = f"no difference seen (this rules out more than {number(max(-d.interval.low, d.interval.high))})"
        return within if inside else "no: it differs"
    right = d.interval.mean < 0 if expected == "lower" else d.interval.mean > 0
    if d.seeds < ENOUGH:
        return f"sign as expected, {DEMONSTRATION}" if right else f"sign not as expected, {DEMONSTRATION}"
    if d.p < ALPHA and not inside:
        return "yes" if right else "no: the opposite"
    return "sign as expected, not separated" if right else "no: not separated, other sign"


def _budgets(study: Study) -> str:
    base = study.arms[study.baseline]
    spec = base[0].spec(study.primary.metric) or base[0].spec("eval/score")
    if not study.others or spec is None or base[0].points < 2:
        return ""
    spec = Spec("final", base[0].splits[0], spec.column if "@" not in spec.column else "score", spec.tier)
    rows = [row for arm in study.others for axis in AXES if (row := _budget(study.arms[arm], base, spec, axis))]
    if not rows:
        return ""
    name = "/".join(part for part in (spec.column, spec.tier) if part)
    header = ["arm", "equal", "budget", "difference there", "95 % interval", "difference in area", "95 % interval"]
    text = f"## {name} at equal steps, generated tokens and seconds, against `{study.baseline}`\n\n" + grid(
        header, rows
    )
    return text + (
        "\n\nBudget: the smallest that any paired run of the two arms spent; curves are interpolated up to it. "
        "Area: mean height of the curve up to the budget. Seconds depend on what else the machine did."
    )


def _budget(arm: Sequence[Reading], base: Sequence[Reading], spec: Spec, axis: str) -> list[str] | None:
    span = common_span(arm, base, spec, axis)
    if span is None:
        return None
    area = Spec("area", spec.split, spec.column, spec.tier)
    at_end = difference(arm, base, "", lambda reading: reading.at_budget(spec, axis, span)).interval
    mean = difference(arm, base, "", lambda reading: reading.at_budget(area, axis, span)).interval
    shown = [number(at_end.mean, True), bounds(at_end, True), number(mean.mean, True), bounds(mean, True)]
    return [arm[0].arm, axis, number(span[1]), *shown]


def _costs(study: Study) -> str:
    found = {
        arm: {name: arm_interval(readings, metric) for name, metric in _COSTS.items()}
        for arm, readings in study.arms.items()
    }
    names = [name for name in _COSTS if any(abs(row[name].mean) > 0 for row in found.values())]
    if not names:
        return ""
    rows = [[arm, *(cell(row[name]) for name in names)] for arm, row in found.items()]
    text = "## Cost and dead groups\n\n" + grid(["arm", *names], rows)
    if "dead groups" in names:
        text += "\n\nDead groups: mean share over the run of groups whose rewards are all equal (no learning signal)."
    return text


def _power(study: Study, full: bool) -> str:
    if not study.differences:
        return ""
    chosen = study.find(study.primary.metric, study.primary.arm)
    chosen = chosen or max(study.differences, key=lambda d: d.seeds)
    text = "## Power\n\n" + _power_line(chosen)
    if not full:
        return text
    rows = []
    for d in study.differences:
        effects = [stats.detectable(d.sd, d.seeds, target) for target in (0.8, 0.9)]
        needed = [stats.seeds_needed(d.interval.mean, d.sd, target) for target in (0.8, 0.9)]
        shown = [number(d.interval.mean, True), number(d.sd), *map(number, effects), *map(_seeds, needed)]
        rows.append([d.metric, d.arm, str(d.seeds), *shown])
    header = ["metric", "arm", "pairs", "observed", "sd", "MDE 80 %", "MDE 90 %", "seeds for 80 %", "seeds for 90 %"]
    text += "\n\n" + grid(header, rows)
    if not math.isnan(chosen.sd):
        sizes = (3, 5, 8, 12, 16, 24, 32)
        row = [number(stats.detectable(chosen.sd, n)) for n in sizes]
        text += (
            f"\n\nSmallest effect of `{chosen.arm}` in {chosen.metric} seen with 80 % power, by number of seeds:\n\n"
        )
        text += grid([f"{n} seeds" for n in sizes], [row])
    return text + (
        "\n\nMDE: minimum detectable effect, the mean difference at which a two-sided paired t test at level 0.05 has "
        "the stated power: P(|T| > t(0.975; n-1)) with T noncentral t(n-1, effect sqrt(n) / sd)."
    )


def _power_line(d: Difference) -> str:
    where = f"`{d.arm}` against `{d.other}` in {d.metric}"
    if math.isnan(d.sd):
        return (
            f"{where}: with {d.seeds} paired seed{'s' * (d.seeds != 1)} the spread between seeds is not known, so no "
            "minimum detectable effect can be given."
        )
    mde, needed = stats.detectable(d.sd, d.seeds), stats.seeds_needed(d.interval.mean, d.sd)
    return (
        f"{where}: {d.seeds} paired seeds see a difference of {number(mde)} with 80 % power (paired t test, sd of the "
        f"differences {number(d.sd)}). The observed {number(d.interval.mean, True)} would need {_seeds(needed)} seeds"
        + (f", the fewest with which a sign-flip test can get below {ALPHA}." if needed < LEAST else ".")
    )


def _seeds(needed: float) -> str:
    if math.isinf(needed):
        return "more than 10,000"
    return UNKNOWN if math.isnan(needed) else str(max(LEAST, int(needed)))


def _left_out(study: Study) -> str:
    if not study.left_out:
        return ""
    shown = [*study.left_out[:40], *([f"and {len(study.left_out) - 40} more"] if len(study.left_out) > 40 else [])]
    count = "1 run" if len(study.left_out) == 1 else f"{len(study.left_out)} runs"
    return f"## Not in the tables\n\n{count}: {_join(shown)}."
