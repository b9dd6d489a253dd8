"""`assay validate`: the contract over YAML files, ours and the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cli.words import ConfigDir
from methods.errors import AssayError, ConfigError


def validate(
    paths: Annotated[list[Path] | None, typer.Argument(help="YAML files or folders. Default: all of conf/.")] = None,
    config_dir: ConfigDir = None,
) -> None:
    """Check YAML files: they parse, their class exists and accepts them, defaults agree, experiments make sense.

    \b
    Examples:
      assay validate
      assay validate conf/method/ha_dw.yaml
      assay validate --config-dir my_conf

    One line per file. Exit code 2 if any file fails.
    """
    extra = [d.expanduser().resolve() for d in config_dir or []]
    files = find(list(paths or []) or extra or [_main()])
    dirs = [*extra]
    for file in files:
        root = root_of(file)
        if root != _main() and root not in dirs:
            dirs.append(root)
    failed = 0
    for file in files:
        problem, text = check(file, dirs)
        failed += problem
        typer.echo(f"{'fail' if problem else 'ok':<4}  {_short(file)}: {text}")
    if failed:
        raise typer.Exit(2)


def find(paths: Sequence[Path]) -> list[Path]:
    """All YAML files below the paths. ConfigError for a path that holds none."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.rglob("*.yaml")) if path.is_dir() else [path] * (path.is_file() and path.suffix == ".yaml")
        if not found:
            raise ConfigError("there is no YAML file to check", got=path, expected="a file or folder of *.yaml")
        files += [f.resolve() for f in found if f.resolve() not in files]
    return files


def root_of(file: Path) -> Path:
    """The configuration folder that a file belongs to: `<root>/<group>/<name>.yaml` or `<root>/<name>.yaml`."""
    main = _main()
    if main in file.parents:
        return main
    return file.parent.parent if file.parent.parent != file.parent else file.parent


def check(file: Path, dirs: Sequence[Path]) -> tuple[bool, str]:
    """Whether the file fails, and the words for it."""
    from cli.checks import check_file

    try:
        return False, check_file(file, dirs)
    except AssayError as error:
        return True, str(error)


def _main() -> Path:
    from cli.compose import main_conf

    return main_conf()


def _short(file: Path) -> str:
    here = Path.cwd()
    return str(file.relative_to(here)) if here in file.parents else str(file)
