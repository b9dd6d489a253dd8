"""Words to configuration: Hydra composes, and every mistake becomes one paragraph with the nearest name.

Hydra composes the chosen groups first (cached per choice); plain overrides are then checked against what that
gave, key by key and type by type, and applied by Hydra's own code. So the defaults are known, a sweep of many
jobs is checked quickly, and Hydra's advice to add misspelt keys with `+` is never shown.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.errors import ConfigError, nearest

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

# Set by the launcher after composing; `experiment` is also a folder of conf/, which Hydra would take for a group.
LATE_KEYS = ("experiment",)
# Groups of which a run may have none; `extra` folders of a user are theirs to judge.
OPTIONAL = ("method", "suite", "study", "extra")
# `reward=file.py:function` is short for this one function as the outcome reward.
_REWARD = re.compile(r"reward=['\"]?[^\[{]*\.py:\w+['\"]?$")
_HEADER = re.compile(r"#\s*@package\s+method\.(\w+)\s*$")
# Type of the default, words for it, types that are taken: a bool is an int in Python, but not for a user; an integer
# may stand for a number, and anything plain for a text (name=7).
_TYPES: tuple[tuple[type, str, tuple[type, ...]], ...] = (
    (bool, "true or false", (bool,)),
    (int, "an integer", (int,)),
    (float, "a number", (int, float)),
    (str, "a text", (str, int, float, bool)),
)


@dataclass(frozen=True)
class Composed:
    """A composed configuration and which file was chosen in each group."""

    cfg: DictConfig
    choices: dict[str, str]


def main_conf() -> Path:
    """The clone's `conf/`, else the copy inside the wheel."""
    home = Path(__file__).resolve().parent
    clone = home.parent / "conf"
    return clone if (home.parent / "pyproject.toml").is_file() and clone.is_dir() else home / "conf"


def conf_dirs(config_dirs: Sequence[str | Path] = ()) -> tuple[Path, ...]:
    """All configuration folders, ours first. Raises ConfigError for one that does not exist."""
    extra = [Path(d).expanduser().resolve() for d in config_dirs]
    for path in extra:
        if not path.is_dir():
            raise ConfigError("the folder given by --config-dir does not exist", got=path)
    return (main_conf(), *extra)


def groups(dirs: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """`{group: {choice: file}}` of all folders; the first folder that has a choice wins, as in Hydra."""
    found: dict[str, dict[str, Path]] = {}
    for root in dirs:
        for path in sorted(root.rglob("*.yaml")):
            group = path.parent.relative_to(root).as_posix()
            if group != ".":
                found.setdefault(group, {}).setdefault(path.stem, path)
    return found


def compose(config_name: str, overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> DictConfig:
    """The configuration that `overrides` give on top of `<config_name>.yaml`.

    `method=a`, `method=[b,a]` and `method=[]` all work, and the order is kept. Raises ConfigError (exit code 2)
    for a syntax error, an unknown choice or key, a wrong type, a value that must be given and is not.
    """
    return compose_full(config_name, overrides, config_dirs).cfg


def compose_full(config_name: str, overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> Composed:
    """As `compose`, with the group choices."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    dirs = conf_dirs(config_dirs)
    known = groups(dirs)
    rewards = [word for word in overrides if _REWARD.match(word)]
    parsed = parse([word for word in overrides if word not in rewards], known)
    chosen = [o for o in parsed if _is_choice(o, known)]
    values = [o for o in parsed if not _is_choice(o, known)]
    for override in chosen:
        _check_choice(override, known)
    base = _compose_choices(config_name, tuple(str(o.input_line) for o in chosen), dirs)
    cfg, choices = copy.deepcopy(base.cfg), dict(base.choices)
    _check_headers(chosen, known)
    for override in parse(rewards):
        from experiments.rewards import from_path

        OmegaConf.update(cfg, "reward", from_path(str(override.value())), merge=False, force_add=True)
    for override in values:
        is_open = _check_value(override, base.cfg, known)
        try:
            with open_dict(cfg) if is_open else contextlib.nullcontext():
                ConfigLoaderImpl._apply_overrides_to_config([override], cfg)
        except (HydraException, OmegaConfBaseException) as error:
            raise _plain(error, where=str(override.input_line)) from error
    missing = [re.sub(r"\[(\d+)\]", r".\1", key) for key in sorted(OmegaConf.missing_keys(cfg))]
    if missing:
        raise ConfigError(f"{missing[0]} has no default and must be given", fix=f"add {missing[0]}=VALUE to the line")
    return Composed(cfg, choices)


def parse(words: Sequence[str], known: dict[str, dict[str, Path]] | None = None) -> list[Override]:
    """Overrides parsed by Hydra's grammar; ConfigError with the word for one that cannot be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for word in map(_quote_path, words):
        if "=" not in word and not word.startswith("~"):
            owners = [group for group, names in (known or {}).items() if word in names]
            fix = f"did you mean {owners[0]}={word}?" if owners else ""
            raise ConfigError("a word of the line is no override", got=f"'{word}'", expected="key=value", fix=fix)
        try:
            parsed.append(parser.parse_override(word))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            fix = "close every bracket and quote; put quotes around values with brackets, commas or spaces, as in"
            raise ConfigError(
                f"the override cannot be read ({reason})", got=word, expected="key=value", fix=f"{fix} 'method=[a,b]'"
            ) from error
    return parsed


def _quote_path(word: str) -> str:
    """A word quoted where Hydra's grammar would trip over its value: an existing path (`reward=` with its function)
    over `=` or `,`, and letters beyond ASCII."""
    key, _, value = word.partition("=")
    if not value or value[0] in "'\"[{":
        return word
    path = Path(re.sub(r"(?<=\.py):\w+$", "", value)).expanduser()
    letters = not value.isascii() and re.fullmatch(r"[\w./~:+-]+", value)
    # os.path: Path.exists raises for what is too long for a name, such as a hundred seeds
    if not letters and not (re.search(r"[=,\s()\[\]{}'\"]", value) and os.path.exists(path)):
        return word
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def hint(word: str, names: Sequence[str]) -> str:
    """Nearest name; a name that ends in the very word comes first, so `max_steps` finds `trainer.max_steps`."""
    leaf = word.rsplit(".", 1)[-1]
    ends = [n for n in names if n.rsplit(".", 1)[-1] == leaf][:3]
    if ends:
        return "did you mean " + " or ".join(f"'{n}'" for n in ends) + "?"
    by_leaf = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
    close = nearest(word, names, limit=1) or nearest(leaf, by_leaf, limit=1)
    for short, full in by_leaf.items():
        close = close.replace(f"'{short}'", f"'{full}'")
    return close


def all_keys(cfg: DictConfig) -> list[str]:
    """Every dotted key of a configuration, sections included."""
    from omegaconf import DictConfig as Section

    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            keys.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, Section) and not _is_special(child):
                walk(child, f"{prefix}{key}.")

    walk(cfg, "")
    return keys


def _is_special(node: Any) -> bool:
    return node._is_none() or node._is_missing() or node._is_interpolation()


@contextlib.contextmanager
def hydra_for(dirs: Sequence[Path]) -> Iterator[Hydra]:
    """Hydra with our folders as its search path; the global state is put back afterwards."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra
    from hydra.version import setbase

    state = GlobalHydra.instance()
    before = state.hydra
    setbase("1.3")
    path = create_config_search_path(str(dirs[0]))
    # Before Hydra's own last entry, which it wants to stay last; reversed, because each goes right after ours.
    for folder in reversed(dirs[1:]):
        path.append("config-dir", f"file://{folder}", anchor=SearchPathQuery("main", None))
    state.clear()
    try:
        yield Hydra.create_main_hydra2("assay", path)
    finally:
        # Asked for again: a joblib launcher in this process replaces all of Hydra's singletons by copies.
        GlobalHydra.instance().hydra = before


@functools.lru_cache(maxsize=256)
def _compose_choices(config_name: str, words: tuple[str, ...], dirs: tuple[Path, ...]) -> Composed:
    import yaml
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    if not any((d / f"{config_name}.yaml").is_file() for d in dirs):
        raise ConfigError(f"there is no {config_name}.yaml", where=", ".join(map(str, dirs)))
    try:
        with hydra_for(dirs) as hydra:
            cfg = hydra.compose_config(config_name, list(words), RunMode.RUN, from_shell=False)
    except yaml.YAMLError as error:
        raise ConfigError(f"a configuration file is no valid YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _plain(error, where=f"{config_name}.yaml with {' '.join(words) or 'its defaults'}") from error
    choices = {str(k): str(v) for k, v in OmegaConf.to_container(cfg.hydra.runtime.choices).items()}  # type: ignore
    with open_dict(cfg):
        del cfg["hydra"]
    return Composed(cfg, {k: v for k, v in choices.items() if not k.startswith("hydra/")})


def _is_choice(override: Override, known: dict[str, dict[str, Path]]) -> bool:
    key, value = override.key_or_group, override.value()
    written_out = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
    return key in known and key not in LATE_KEYS and not written_out


def _check_choice(override: Override, known: dict[str, dict[str, Path]]) -> None:
    value, group = override.value(), override.key_or_group
    if override.is_sweep_override():
        raise ConfigError("several values for one run", where=str(override.input_line), fix="add -m to sweep over them")
    if value in (None, []) and group not in OPTIONAL:
        choices = ", ".join(sorted(known[group]))
        raise ConfigError(f"a run needs a {group}", where=str(override.input_line), expected=choices)
    for name in value if isinstance(value, list) else [value]:
        if name is None or str(name).removesuffix(".yaml") in known[group]:
            continue
        choices = ", ".join(sorted(known[group]))
        fix = nearest(str(name), known[group]) or f"list them with: assay ls {group}s"
        if group == "reward" and str(name).endswith(".py"):
            fix = f"name the function in it: reward={name}:FUNCTION"
        raise ConfigError(f"there is no {group} '{name}'", where=str(override.input_line), expected=choices, fix=fix)


def method_key(path: Path) -> str:
    """Where a method's file puts its keys, from its first line `# @package method.<key>`. ConfigError without one.

    A variant of a method (`ha_dw_official_code.yaml`) shares the key of the method itself (`ha_dw`).
    """
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    match = _HEADER.match(first.strip())
    if not match or not path.stem.startswith(match[1]):
        fix = f"let the first line be: # @package method.{path.stem}"
        raise ConfigError("a method's file lacks its package header", where=str(path), got=f"'{first}'", fix=fix)
    return match[1]


def _check_headers(chosen: Sequence[Override], known: dict[str, dict[str, Path]]) -> None:
    # Hydra would merge two methods of one key, or without a key, into each other, silently.
    for override in chosen:
        if override.key_or_group == "method":
            value = override.value()
            names = [str(v).removesuffix(".yaml") for v in (value if isinstance(value, list) else [value]) if v]
            keys = [method_key(known["method"][name]) for name in names]
            for name, key in zip(names, keys, strict=True):
                if keys.count(key) > 1:
                    what = f"the stack has {key} more than once"
                    raise ConfigError(what, where=str(override.input_line), fix=f"keep one of them, such as '{name}'")


def _check_value(override: Override, defaults: DictConfig, known: dict[str, dict[str, Path]]) -> bool:
    """Check key and type of one plain override; True if it may add a key (an empty section takes any)."""
    if override.is_sweep_override():
        raise ConfigError("several values for one run", where=str(override.input_line), fix="add -m to sweep over them")
    if override.is_delete():
        key = override.key_or_group
        raise ConfigError("keys cannot be taken away", where=str(override.input_line), fix=f"set it: {key}=null")
    if override.is_add() or override.is_force_add():
        return False
    key = override.key_or_group
    node, is_open = _find(key, defaults, known)
    if node is not None:
        _check_type(key, override, node)
    return is_open or (_is_empty(node) and key not in known)


def _is_empty(node: Any) -> bool:
    """Whether a default is an empty section, which takes any keys."""
    from omegaconf import DictConfig as Section

    return isinstance(node, Section) and not _is_special(node) and len(node) == 0


def _find(key: str, defaults: DictConfig, known: dict[str, dict[str, Path]]) -> tuple[Any, bool]:
    """The default's node and whether the key is new inside an empty section."""
    from omegaconf import DictConfig as Section
    from omegaconf import ListConfig
    from omegaconf._utils import split_key

    node: Any = defaults
    path = ""
    for part in split_key(key):
        special = isinstance(node, Section | ListConfig) and _is_special(node)
        if isinstance(node, ListConfig) and not special and part.isdigit() and int(part) < len(node):
            node, path = node._get_node(int(part)), f"{path}.{part}"
            continue
        if not isinstance(node, Section) or special:
            raise _unknown(key, defaults, known)
        if part in list(node.keys()):  # `in node` is false for a value that must still be given (???)
            node, path = node._get_node(part), f"{path}.{part}".lstrip(".")
            continue
        if part in known.get(path, {}) and path == "method":
            there = f" (it has {', '.join(map(str, node))})" if len(node) else ""
            fix = f"add 'method=[{part}]', or name a method that the run has{there}"
            raise ConfigError(f"method '{part}' is not part of this run, so {key} means nothing", fix=fix)
        if len(node) == 0 and path and path not in known:
            return None, True
        if len(node) == 0 and path in known and path != "method":
            choices = ", ".join(known[path])
            raise ConfigError(f"no {path} is chosen, so {key} means nothing", expected=choices, fix=f"add {path}=NAME")
        raise _unknown(key, defaults, known)
    return node, False


def _unknown(key: str, defaults: DictConfig, known: dict[str, dict[str, Path]]) -> ConfigError:
    names = [*all_keys(defaults), *known, "experiment", "arms", "seeds", "smoke", "report", "jobs"]
    return ConfigError(f"there is no key '{key}'", fix=hint(key, names) or "print all keys with: assay train --cfg job")


def _check_type(key: str, override: Override, node: Any) -> None:
    from omegaconf import Container, OmegaConf
    from omegaconf import DictConfig as Section

    value = override.value()
    if isinstance(node, Container):
        switched_off = value is None and "." in key  # such as model.warm_start=null
        if _is_empty(node) and "." in key and not isinstance(value, dict) and not switched_off:
            raise ConfigError(
                f"{key} is a section",
                where=str(override.input_line),
                expected=f"keys and values, as in '{key}={{a: 1}}'",
            )
        if isinstance(node, Section) and len(node) and not isinstance(value, dict) and not switched_off:
            keys = ", ".join(f"{key}.{name}" for name in list(node)[:6])
            where = str(override.input_line)
            raise ConfigError(f"{key} is a section", where=where, expected=f"one of its keys: {keys}")
        if isinstance(node, Section) and len(node) and isinstance(value, dict):
            stray = [str(name) for name in value if str(name) not in map(str, node)]
            if stray:
                names = list(map(str, node))
                fix = hint(stray[0], names) or f"use one of {', '.join(names[:12])}"
                raise ConfigError(f"{key} has no key '{stray[0]}'", where=str(override.input_line), fix=fix)
        return
    default = node._value()
    if isinstance(default, str) and "${" in default:
        default = OmegaConf.select(node._get_root(), key, throw_on_resolution_failure=False)
    if default is None or default == "???" or value is None or (isinstance(value, str) and "${" in value):
        return
    kind, words, accepted = next((t for t in _TYPES if isinstance(default, t[0])), (object, "", (object,)))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind in (int, float)):
        got = str(override.input_line).partition("=")[2]
        raise ConfigError(f"{key} has the wrong type", got=f"'{got}'", expected=f"{words} (default {default})")


def _plain(error: Exception, where: str) -> ConfigError:
    """Hydra's own message without its advice to add keys with a plus sign and without its search path."""
    stray = re.match(r"Could not override '(\w+)'. No match in the defaults list", str(error))
    if stray:
        return ConfigError(f"this subcommand has no use for {stray[1]}=", where=where, fix="leave it out")
    lines = []
    for line in str(error).splitlines():
        if line.startswith("Config search path"):
            break
        if "use +" not in line and "prefix" not in line and line.strip() not in ("full_key:", "object_type=dict"):
            lines.append(line.strip())
    return ConfigError(" ".join(" ".join(lines).split()) or type(error).__name__, where=where)
