"""Facade of assay: the console entry and the names that a plug-in author imports.

``from assay import Method`` works without naming the package that holds it. The packages `cli`,
`methods` and `experiments` have generic names, so a folder of the same name in the user's own
tree can hide them; `check_packages` notices that before anything of them is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from methods.base import *  # noqa: F403

PACKAGES = ("cli", "methods", "experiments")
_SOURCES = ("methods.errors", "methods.base")  # the light one first


def check_packages(home: Path | None = None) -> str:
    """An empty string if the three packages lie beside this file, else the paragraph that says what hides them."""
    home = home or Path(__file__).resolve().parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None:
            return f"assay cannot find its package '{name}' beside {home}: the installation is incomplete."
        origins = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
        found = Path(origins[0]).resolve() if origins else Path("?")
        if home not in found.parents:
            return (
                f"assay needs its own package '{name}' in {home}, but Python finds {found} first. "
                "Rename that file or folder, leave its folder out of PYTHONPATH, or run assay from somewhere else."
            )
    return ""


def main() -> None:
    """Entry point of the console script."""
    problem = check_packages()
    if problem:
        print(f"assay: {problem}", file=sys.stderr)
        raise SystemExit(2)
    from cli.main import main as run

    run()


def __getattr__(name: str) -> object:
    if not name.startswith("_"):
        for source in _SOURCES:
            module = importlib.import_module(source)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'assay' has no attribute '{name}'")


if __name__ == "__main__":
    main()
