"""Reads `conf/experiment/<name>.yaml`: arms, seeds, and the comparison that is fixed before the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from methods.errors import ConfigError, nearest

SMOKE_KEYS = ("seeds", "overrides", "arms")
COMMANDS = ("train", "eval", "judge", "score_transfer")
SIGNS = ("lower", "higher", "equal")
FROM_ARM = "model.init=arm:"  # an arm that starts from what another arm has trained, with the same seed


@dataclass(frozen=True)
class Experiment:
    """One experiment file. The order of `arms` is the order of the table."""

    name: str
    path: Path
    title: str
    arms: dict[str, list[str]]
    command: str = "train"
    common: list[str] = field(default_factory=list)
    baseline: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    primary: dict[str, Any] = field(default_factory=dict)
    secondary: list[dict[str, Any]] = field(default_factory=list)
    controls: dict[str, str] = field(default_factory=dict)
    axis: dict[str, Any] = field(default_factory=dict)  # name, groups: {panel: {arm: place}}; drawn as curves
    logged: dict[str, Any] = field(default_factory=dict)  # name, panels: {title: key of metrics.jsonl}, arms; drawn
    budget: float | None = None
    smoke: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def pick(self, arms: Sequence[str] | None, smoke: bool) -> list[str]:
        """The arms to run, in the file's order. ConfigError for a name that is none."""
        wanted = arms if arms is not None else (self.smoke.get("arms") if smoke else None)
        for arm in wanted or []:
            if arm not in self.arms:
                raise ConfigError(
                    f"the experiment has no arm '{arm}'",
                    where=str(self.path),
                    expected=", ".join(self.arms),
                    fix=nearest(arm, self.arms),
                )
        return [arm for arm in self.arms if wanted is None or arm in wanted]

    def earlier(self, arm: str) -> str | None:
        """The arm whose run this one starts from (`model.init=arm:NAME`)."""
        words = [word for word in (*self.common, *self.arms[arm]) if word.startswith("model.init=")]
        return words[-1].removeprefix(FROM_ARM) if words and words[-1].startswith(FROM_ARM) else None

    def variant(self, smoke: bool) -> dict[str, Any]:
        """The file's own keys, for a run of it under another name; those of the smoke variant if `smoke`."""
        keys = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "path", "smoke")}
        if smoke:
            keys["common"] = [*self.common, *self.smoke["overrides"]]
            keys["arms"] = {arm: self.arms[arm] for arm in self.pick(None, smoke)}
            keys["seeds"] = self.smoke.get("seeds") or self.seeds
        return {key: value for key, value in keys.items() if value not in (None, "", {}, [])}


def names(dirs: Sequence[Path]) -> dict[str, Path]:
    """All experiments of the configuration folders; ours win over those of --config-dir."""
    found: dict[str, Path] = {}
    for root in dirs:
        for path in sorted((root / "experiment").glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def load(name: str, dirs: Sequence[Path]) -> Experiment:
    """The experiment of that name. ConfigError if there is none or its file does not make sense."""
    known = names(dirs)
    if name not in known:
        raise ConfigError(
            f"there is no experiment '{name}'",
            expected=", ".join(known) or "a file in conf/experiment",
            fix=nearest(name, known) or "list them with: assay ls experiments",
        )
    return read(known[name])


def read(path: Path) -> Experiment:
    """Parse and check one experiment file. ConfigError names the file and the key."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file is no valid YAML: {' '.join(str(error).split())}", where=str(path)) from error
    if not isinstance(data, dict):
        raise ConfigError("an experiment file holds keys and values", where=str(path), got=type(data).__name__)
    keys = [f.name for f in fields(Experiment) if f.name not in ("name", "path")]
    for key in data:
        if key not in keys:
            raise ConfigError(
                f"an experiment has no key '{key}'", where=str(path), expected=", ".join(keys), fix=nearest(key, keys)
            )
    for key in ("title", "arms"):
        if not data.get(key):
            raise ConfigError(f"the experiment lacks '{key}'", where=str(path))
    arms = {str(arm): _words(path, f"arms.{arm}", words) for arm, words in _mapping(path, "arms", data["arms"]).items()}
    data["common"] = _words(path, "common", data.get("common") or [])
    data["smoke"] = dict(_mapping(path, "smoke", data.get("smoke") or {}))
    data["smoke"]["overrides"] = _words(path, "smoke.overrides", data["smoke"].get("overrides") or [])
    spec = Experiment(path.stem, path, **{**{k: v for k, v in data.items() if v is not None}, "arms": arms})
    _check(spec)
    return spec


def _check(spec: Experiment) -> None:
    where = str(spec.path)
    if spec.command not in COMMANDS:
        raise ConfigError("command is another", where=where, got=spec.command, expected=" or ".join(COMMANDS))
    if not spec.seeds or any(not isinstance(s, int) for s in spec.seeds) or len(set(spec.seeds)) < len(spec.seeds):
        raise ConfigError("seeds is a list of different integers", where=where, got=spec.seeds)
    for key in spec.smoke:
        if key not in SMOKE_KEYS:
            raise ConfigError(f"smoke has no key '{key}'", where=where, expected=", ".join(SMOKE_KEYS))
    named = {"baseline": spec.baseline, "primary.arm": spec.primary.get("arm")}
    named |= {f"controls.{arm}": arm for arm in spec.controls}
    groups = _mapping(spec.path, "axis.groups", spec.axis.get("groups") or {})
    placed = [(name, arm) for name in groups for arm in _mapping(spec.path, f"axis.groups.{name}", groups[name])]
    named |= {f"axis.groups.{name}: {arm}": arm for name, arm in placed}
    _mapping(spec.path, "logged.panels", spec.logged.get("panels") or {})
    named |= {f"logged.arms: {arm}": arm for arm in spec.logged.get("arms") or []}
    named |= {f"smoke.arms: {arm}": arm for arm in spec.smoke.get("arms") or []}
    named |= {f"arms.{arm}: model.init": spec.earlier(arm) for arm in spec.arms}
    for key, arm in named.items():
        if arm is not None and arm not in spec.arms:
            raise ConfigError(
                f"{key} names no arm", where=where, got=arm, expected=", ".join(spec.arms), fix=nearest(arm, spec.arms)
            )
    for arm in spec.arms:
        chain = [arm]
        while (before := spec.earlier(chain[-1])) is not None:
            if before in chain:
                raise ConfigError(
                    "arms start from each other in a circle", where=where, got=" <- ".join([*chain, before])
                )
            chain.append(before)
    for metric in [spec.primary] * bool(spec.primary) + spec.secondary:
        if not isinstance(metric, dict) or not metric.get("metric"):
            raise ConfigError("primary and secondary name a metric", where=where, got=metric)
        if metric.get("direction", "higher") not in ("higher", "lower"):
            raise ConfigError("direction is higher or lower", where=where, got=metric["direction"])
    for arm, sign in spec.controls.items():
        if sign not in SIGNS:
            raise ConfigError(f"controls.{arm} is an expected sign", where=where, got=sign, expected=" or ".join(SIGNS))


def _mapping(path: Path, key: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key} holds names and values", where=str(path), got=value)
    return value


def _words(path: Path, key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or any(not isinstance(word, str) for word in value):
        raise ConfigError(
            f"{key} is a list of overrides", where=str(path), got=value, expected='["method=[ha_dw]", "trainer.beta=0"]'
        )
    return value
