"""`assay ls`: what there is, one line each, read from files without importing any of it."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cli.compose import conf_dirs, groups
from cli.words import ConfigDir
from methods.errors import ConfigError, nearest

KINDS = {
    "methods": "method",
    "tasks": "task",
    "models": "model",
    "objectives": "objective",
    "experiments": "experiment",
    "engines": "engine",
    "suites": "suite",
    "rewards": "reward",
    "scales": "scale",
    "generations": "generation",
    "domains": "domains",
}


def ls(
    kind: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(KINDS)}. Default: all.")] = None,
    config_dir: ConfigDir = None,
) -> None:
    """List what can be chosen, one line each.

    \b
    Examples:
      assay ls
      assay ls methods
      assay ls experiments --config-dir my_conf
    """
    if kind is not None and kind not in KINDS:
        kind = next((plural for plural, group in KINDS.items() if group == kind), kind)
    if kind is not None and kind not in KINDS:
        raise ConfigError(
            f"there is nothing called '{kind}' to list", expected=", ".join(KINDS), fix=nearest(kind, KINDS)
        )
    found = groups(conf_dirs(config_dir or ()))
    shown = {kind: KINDS[kind]} if kind else {k: g for k, g in KINDS.items() if found.get(g)}
    for plural, group in shown.items():
        if not kind:
            typer.echo(f"{plural}:")
        entries = found.get(group, {})
        width = max((len(name) for name in entries), default=0)
        for name, path in entries.items():
            typer.echo(f"{'' if kind else '  '}{name:<{width}}  {describe(path)}".rstrip())


def describe(path: Path) -> str:
    """One sentence about a YAML file: its title, its first comment, or the docstring of its class."""
    text = path.read_text(encoding="utf-8", errors="replace")
    title = re.search(r"^title:\s*(.+?)\s*$", text, re.M)
    if title and path.parent.name == "experiment":
        return title[1].strip("'\"")
    if comment := first_comment(text.splitlines()):
        return comment
    target = re.search(r"^_target_:\s*([\w.]+)", text, re.M)
    return class_line(target[1]) if target else ""


def first_comment(lines: Sequence[str]) -> str:
    """The first comment above the first key that is not Hydra's package header."""
    for line in lines:
        if line.startswith("#") and not re.match(r"#\s*@package\b", line):
            return line.lstrip("# ").strip()
        if line.strip() and not line.startswith("#") and line.strip() != "---":
            break
    return ""


def class_line(target: str) -> str:
    """First docstring line of the class that `_target_` names, read from its source; empty if it cannot be found."""
    module, _, name = target.rpartition(".")
    file = _source(module)
    if file is None:
        return ""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n")[0].strip()
    return ""


def _source(module: str) -> Path | None:
    # importlib would run the packages above the module; only the top package is asked for, the rest are paths.
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or []:
        base = Path(folder).joinpath(*rest)
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None
