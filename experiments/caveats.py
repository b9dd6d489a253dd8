"""What a reader must know before trusting a difference: other seeds, other items, other code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.readings import Reading, tasks_differ


def caveats(arms: Mapping[str, Sequence[Reading]], baseline: str) -> list[str]:
    """One sentence per reason why an arm's difference to the baseline is not over the same seeds, items and code."""
    base = arms[baseline]
    others = [(name, readings) for name, readings in arms.items() if name != baseline]
    found = [text for name, readings in others for text in (_seeds(name, readings, baseline, base),) if text]
    found += [text for name, readings in others for text in (_items(name, readings, baseline, base),) if text]
    return found + _code(arms) if others else []


def _seeds(name: str, arm: Sequence[Reading], baseline: str, base: Sequence[Reading]) -> str:
    mine, theirs = {r.pair for r in arm}, {r.pair for r in base}
    if mine == theirs:
        return ""
    share = f"{len(mine & theirs)} of {len(mine)} and {len(theirs)}" if mine & theirs else "none"
    return f"**Not the same seeds**: `{name}` and `{baseline}` share {share}; differences use shared seeds only."


def _items(name: str, arm: Sequence[Reading], baseline: str, base: Sequence[Reading]) -> str:
    partner = {r.pair: r for r in base}
    worst: tuple[int, int, int] | None = None
    for reading in arm:
        other = partner.get(reading.pair)
        mine, theirs = (set(r.last_items) if r is not None else set() for r in (reading, other))
        common = len(mine & theirs)
        if mine and theirs and mine != theirs and (worst is None or common < worst[0]):
            worst = (common, len(mine), len(theirs))
    if worst is None:
        return ""
    common, mine, theirs = worst
    head = f"**Not the same items**: `{name}` and `{baseline}` share"
    if common:
        return f"{head} {common} of {mine} and {theirs}; their differences are over shared items, the means over all."
    if any(tasks_differ(reading, partner[reading.pair]) for reading in arm if reading.pair in partner):
        return f"{head} none, and their tasks differ; they are not compared."
    return f"{head} none; their differences are between the means of different questions."


def _code(arms: Mapping[str, Sequence[Reading]]) -> list[str]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, readings in arms.items():
        envs = [r.run.env for r in readings if r.run.env.get("commit")]
        commits = {env["commit"][:10] + (" with changes" if env.get("dirty") else "") for env in envs}
        if commits:
            groups.setdefault(tuple(sorted(commits)), []).append(f"`{name}`")
    if len(groups) < 2:
        return []
    shown = "; ".join(f"{', '.join(names)} on {' and '.join(commits)}" for commits, names in groups.items())
    return [f"**Not the same code**: {shown}. Whether what changed between them matters is not known here."]
