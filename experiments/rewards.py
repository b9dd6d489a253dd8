"""Rewards: an ordered list of named functions with weight and role.

A reward function takes (completions: list[str], rows: list[Row]) and returns one float or None per completion;
None and NaN mean that the reward does not apply there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.tasks import scorers
from experiments.tasks.base import Row, Task, first_line, plain
from methods.errors import AssayError, ConfigError, RunError, nearest

ROLES = ("outcome", "format", "aux")
KEYS = ("name", "function", "weight", "role", "kwargs")
RewardFn = Callable[[list[str], list[Row]], list[float | None]]


@dataclass(frozen=True)
class RewardSpec:
    """One reward. `weight` 0 means recorded only; `role` is `outcome`, `format` or `aux`."""

    name: str
    fn: RewardFn
    weight: float = 1.0
    role: str = "outcome"


def build(cfg_reward: Sequence[Mapping[str, Any]], task: Task) -> list[RewardSpec]:
    """The reward list of `reward:` in a config, in its order.

    An entry has `name`, `function` (`task`, `length`, `metric`, `thinking`, `rubric`, `reward_model`, or
    `file.py:function`; default: its name), `weight` (1), `role` (`outcome`) and `kwargs` for the function.
    Raises ConfigError for an empty list, unknown keys, functions or roles, a weight that is no finite number, and for
    names used twice.
    """
    entries = plain(cfg_reward)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            "The reward list is empty",
            where="reward",
            got=repr(entries)[:80],
            expected="a list of entries with name, function, weight and role",
            fix="use reward=task",
        )
    specs = [_spec(entry, f"reward[{place}]", task) for place, entry in enumerate(entries)]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two rewards are called '{name}'", where="reward", fix="give each entry its own name")
    if not any(spec.weight for spec in specs):
        raise ConfigError(
            "No reward has a weight, so there is nothing to learn from", where="reward", got=", ".join(names),
            expected="at least one weight that is not 0", fix="set reward.0.weight=1.0",
        )  # fmt: skip
    return specs


def from_path(spec: str) -> list[dict]:
    """The reward list for `reward=file.py:function`: this one function as outcome with weight 1.

    The file is imported to see that the function is there. Raises ConfigError.
    """
    function, name = load_function(spec), spec.rpartition(":")[2]
    del function
    return [{"name": name, "function": spec, "weight": 1.0, "role": "outcome", "kwargs": {}}]


def _spec(entry: Any, where: str, task: Task) -> RewardSpec:
    if not isinstance(entry, dict):
        raise ConfigError("A reward entry is a mapping", where=where, got=repr(entry)[:80], expected=", ".join(KEYS))
    for key in entry:
        if key not in KEYS:
            hint = nearest(str(key), KEYS) or "use one of these"
            raise ConfigError(f"Unknown key '{key}'", where=where, expected=", ".join(KEYS), fix=hint)
    function = str(entry.get("function") or entry.get("name") or "")
    name = str(entry.get("name") or function.rpartition(":")[2])
    weight, role, kwargs = entry.get("weight", 1.0), entry.get("role", "outcome"), entry.get("kwargs") or {}
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ConfigError("A weight is a finite number", where=f"{where}.weight", got=repr(weight))
    if role not in ROLES:
        raise ConfigError(f"Unknown role '{role}'", where=f"{where}.role", expected=", ".join(ROLES))
    if not isinstance(kwargs, dict):
        raise ConfigError("kwargs is a mapping", where=f"{where}.kwargs", got=repr(kwargs)[:80])
    return RewardSpec(name, _function(function, kwargs, where, task), float(weight), role)


def _function(function: str, kwargs: dict, where: str, task: Task) -> RewardFn:
    if ":" in function:
        return checked(load_function(function, kwargs), function, kwargs)
    builtin = {"task": _task, "length": _length, "metric": _metric, "thinking": _thinking, "rubric": _rubric,
               "reward_model": _reward_model}  # fmt: skip
    if function not in builtin:
        raise ConfigError(
            f"Unknown reward function '{function}'",
            where=f"{where}.function",
            expected=", ".join(builtin) + " or file.py:function",
            fix=nearest(function, builtin) or "use one of these",
        )
    made = builtin[function]
    try:
        return made(task, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"The reward '{function}' does not take these arguments",
            where=f"{where}.kwargs",
            got=first_line(error),
            expected=str(inspect.signature(made)),
        ) from error


def _task(task: Task) -> RewardFn:
    """The task's own score."""
    return lambda texts, rows: [task.score(text, row) for text, row in zip(texts, rows, strict=True)]


def _thinking(task: Task, unclosed: float = -10.0, no_answer: float = -9.5) -> RewardFn:
    r"""The task's score for a finished thinking block with a boxed answer behind it (VSRM's outcome reward).

    `unclosed` without `</think>` (the opening tag may stand in the prompt), `no_answer` without a filled `\boxed{}`.
    """

    def value(text: str, row: Row) -> float:
        if "</think>" not in text:
            return unclosed
        return task.score(text, row) if scorers.boxed(scorers.final_text(text)) else no_answer

    return lambda texts, rows: [value(text, row) for text, row in zip(texts, rows, strict=True)]


def _length(task: Task, unit: str = "characters") -> RewardFn:
    """The length of the completion in `characters` or `words`."""
    if unit not in ("characters", "words"):
        raise ConfigError("Unknown unit of length", where="reward length", got=unit, expected="characters or words")
    return lambda texts, rows: [float(len(text) if unit == "characters" else len(text.split())) for text in texts]


def _rubric(task: Task, **kwargs: Any) -> RewardFn:
    """A judge's grades by rubrics (`experiments.rubric_reward`)."""
    from experiments.rubric_reward import RubricReward

    return RubricReward(**kwargs)


def _reward_model(task: Task, **kwargs: Any) -> RewardFn:
    """The scores of a trained reward model (`experiments.reward_model.reward`)."""
    from experiments.reward_model import reward

    return reward(**kwargs)  # type: ignore[return-value]


def _metric(task: Task, key: str) -> RewardFn:
    """One of the task's further values, e.g. `exact_format`; None where the task does not give it."""
    return lambda texts, rows: [task.metrics(text, row).get(key) for text, row in zip(texts, rows, strict=True)]


def load_function(spec: str, kwargs: Mapping[str, Any] | None = None) -> Callable:
    """The function named by `file.py:function`, imported under a module name of its own.

    The name comes from path and content, so that two files of one name live side by side and a changed file is
    loaded anew. Raises ConfigError naming `spec`: no file, does not import, no such function, or a function that
    cannot be called with (completions, rows, **kwargs).
    """
    file, _, name = spec.rpartition(":")
    where = f"reward={spec}"
    if not file or not name:
        raise ConfigError("Not a reward function", where=where, expected="path/to/file.py:function")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"No such file: {file}", where=where, fix="give the path from the current folder")
    module = _import(path, where)
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise ConfigError(
            f"{file} has no function '{name}'",
            where=where,
            got="functions " + (", ".join(own) or "none"),
            fix=nearest(name, own) or "name one of these",
        )
    first = next(iter(inspect.signature(function).parameters), "")
    if first == "prompts":  # TRL's order; it would be given the completions for prompts
        raise ConfigError(
            f"The function '{name}' takes prompts first",
            where=where,
            got=f"{name}{inspect.signature(function)}",
            expected="function(completions: list[str], rows: list[Row], **kwargs), with the prompt in row.prompt",
        )
    try:
        inspect.signature(function).bind([], [], **(kwargs or {}))
    except TypeError as error:
        raise ConfigError(
            f"The function '{name}' cannot be called with (completions, rows, **kwargs)",
            where=where,
            got=f"{name}{inspect.signature(function)}: {first_line(error)}",
            expected="function(completions: list[str], rows: list[Row], **kwargs) -> list[float | None]",
        ) from error
    return function


def _import(path: Path, where: str) -> ModuleType:
    content = path.read_bytes()
    digest = hashlib.blake2b(str(path.resolve()).encode() + b"\0" + content, digest_size=8).hexdigest()
    name = f"assay_reward_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ConfigError("Not a Python file", where=where, expected="a name ending in .py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        # Not the loader's exec_module: its bytecode is told apart by size and whole seconds, and an edit can keep both.
        exec(compile(content, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # a file that calls exit() would end the command, in silence
        del sys.modules[name]
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(error, path)
        raise ConfigError(
            "The reward file cannot be imported", where=f"{where} ({path}:{line})", got=first_line(error)
        ) from error
    return module


def checked(function: Callable, spec: str, kwargs: Mapping[str, Any]) -> RewardFn:
    """`function` with its result checked: one float, None or NaN per completion; NaN becomes None.

    The wrapper raises RunError naming `spec` if the function raises, or returns a wrong count, something that is no
    number, or an infinite one.
    """

    def reward(texts: list[str], rows: list[Row]) -> list[float | None]:
        try:
            values = function(list(texts), list(rows), **kwargs)
        except AssayError:
            raise
        except Exception as error:
            line = _line_in(error, Path(spec.rpartition(":")[0]))
            raise RunError(
                "The reward function raised an exception",
                where=f"{spec}, line {line}",
                got=first_line(error),
                fix="mend the function; --debug shows the whole traceback",
            ) from error
        if values is None:
            raise RunError(
                "The reward function returned None", where=spec, expected="a list", fix="end it with `return ...`"
            )
        try:
            values = list(values)
        except TypeError:
            values = [values]
        if len(values) != len(texts):
            raise RunError(
                "The reward function returned a wrong number of values",
                where=spec,
                got=len(values),
                expected=f"a list of {len(texts)}, one per completion",
            )
        return [_value(value, place, spec) for place, value in enumerate(values)]

    return reward


def _value(value: Any, place: int, spec: str) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # numpy and torch scalars
        value = value.item()
    if not isinstance(value, numbers.Real) or math.isinf(value):
        raise RunError(
            "The reward function returned something that is no finite number",
            where=f"{spec}, completion {place}",
            got=repr(value)[:80],
            expected="a float, or None where the reward does not apply",
        )
    return None if math.isnan(value) else float(value)


def _line_in(error: BaseException, path: Path) -> int | str:
    """The last line of `path` in the traceback of `error`."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    return lines[-1] if lines and lines[-1] is not None else "?"
