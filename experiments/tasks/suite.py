"""Evaluation suites: several tasks under one name (`suite=math`), each read from the hub or a local file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from experiments.tasks.base import Row, Task, plain
from methods.errors import ConfigError, DataError, nearest


@dataclass
class Loaded:
    """What `load` could read: rows per member, and for each member left out the paragraph that says why."""

    tasks: dict[str, Task] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def note(self) -> str:
        """One line per member left out, for printing under a table; empty if all are there."""
        return "\n".join(f"left out: {name}: {why}" for name, why in self.left_out.items())


def members(cfg_suite: Mapping) -> list[Task]:
    """The tasks of a suite config `{member: {_target_: ..., field: value}}`, named by member; nothing is read yet.

    A member set to null is dropped. Raises ConfigError for an empty suite, an unknown class or an unknown key.
    """
    suite = {name: node for name, node in plain(cfg_suite).items() if node is not None}
    if not suite:
        raise ConfigError("The suite has no members", where="suite", fix="choose one with suite=math or suite=ood")
    return [member(str(name), node) for name, node in suite.items()]


def member(name: str, node: object) -> Task:
    """One task of a suite. Raises ConfigError."""
    key = f"suite.{name}"
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(
            "A suite member is a task",
            where=key,
            got=repr(node)[:80],
            expected="a mapping with _target_ and the fields of that task",
        )
    module, _, cls_name = str(node["_target_"]).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), cls_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("No such task class", where=f"{key}._target_", got=node["_target_"]) from error
    known = {f.name for f in fields(cls) if f.init}
    values = {k: v for k, v in node.items() if k != "_target_"}
    for field_name in values:
        if field_name not in known:
            raise ConfigError(
                f"Unknown key '{field_name}'",
                where=key,
                expected=", ".join(sorted(known)),
                fix=nearest(field_name, known) or "use one of these",
            )
    task = cls(**{"name": name, **values})
    task.config_key = key
    return task


def load(tasks: Sequence[Task], split: str, seed: int) -> Loaded:
    """Rows of all members that can be read. A member that cannot (gated, no network, no such file) is left out
    with its reason. Raises DataError if none is left."""
    loaded = Loaded()
    for task in tasks:
        try:
            rows = task.rows(split, seed)
        except DataError as error:
            loaded.left_out[task.name] = str(error)
            continue
        loaded.tasks[task.name], loaded.rows[task.name] = task, rows
    if not loaded.tasks:
        first = next(iter(loaded.left_out.values()))
        raise DataError(
            "No member of the suite could be read",
            where="suite",
            got=", ".join(loaded.left_out),
            fix=f"see the reason of the first one: {first}",
        )
    return loaded
