"""Options that several subcommands share, and shell completion of overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ConfigDir = Annotated[
    list[Path] | None,
    typer.Option("--config-dir", help="Your own YAML files, in a folder laid out like conf/; may be repeated."),
]
ShowJob = Annotated[str | None, typer.Option(metavar="job", help="Print the resolved configuration and stop.")]
Multirun = Annotated[bool, typer.Option("-m", "--multirun", help="Sweep: one run per combination.")]


def complete_override(ctx: Any, incomplete: str) -> list[str]:
    """`me` -> `method=`; `method=ha` -> `method=ha_dw`; reads folder names only."""
    from cli.compose import conf_dirs, groups

    known = groups(conf_dirs(ctx.params.get("config_dir") or ()))
    key, equals, value = incomplete.partition("=")
    if not equals:
        return [f"{group}=" for group in known if group.startswith(key)]
    # Inside `method=[a,` the name after the last comma or bracket is the one being typed.
    cut = max(value.rfind(","), value.rfind("[")) + 1
    return [f"{key}={value[:cut]}{name}" for name in known.get(key, {}) if name.startswith(value[cut:])]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the configuration.", autocompletion=complete_override),
]
