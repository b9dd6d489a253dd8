"""Imports run one way, and files stay small: walked over the syntax tree of every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "assay.py", *sorted(p for top in ("cli", "experiments", "methods") for p in (ROOT / top).rglob("*.py"))]
OURS = ("assay", "cli", "experiments", "methods")
# What each part may import of ours. `assay.py` is the facade and may import all.
ALLOWED = {"cli": ("cli", "experiments", "methods"), "experiments": ("experiments", "methods"), "methods": ("methods",)}
# Shared by all plug-ins; anything else in methods/ is a plug-in and may import none of its siblings.
SHARED = ("base", "batch", "errors", "numerics", "stack", "controls", "demonstrations", "__init__")
TOOLS = ("toolforge", "cdrrm", "sts")
MODULE, METHOD, FUNCTION = 400, 250, 60
# Light modules: they are imported by commands that must start at once.
NO_TORCH = ("experiments/stats.py", "experiments/records.py")
HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate")
LATE_IN_CLI = (*HEAVY, "hydra", "omegaconf", "pandas", "numpy", "rich", "yaml", "matplotlib", "experiments")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, *, top_level: bool = False) -> list[str]:
    """Dotted names that a module imports; with `top_level` only those that run on import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno} imports relatively"
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        children = node.orelse if top_level and isinstance(node, ast.If) and typing_only else ast.iter_child_nodes(node)
        for child in children:
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_one_way(path):
    part = name(path).split("/")[0]
    for imported in imports(path):
        top = imported.split(".")[0]
        if top in OURS and part in ALLOWED:
            # The doctor asks the facade whether the packages lie where they should.
            assert top in ALLOWED[part] or (name(path), top) == ("cli/doctor.py", "assay"), f"{part} imports {imported}"


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "methods")], ids=name)
def test_plug_ins_import_neither_trl_nor_each_other(path):
    parts = path.relative_to(ROOT / "methods").with_suffix("").parts
    if parts[0] in TOOLS:
        return
    found = imports(path)
    assert not [i for i in found if i.split(".")[0] in ("trl", "transformers", "datasets")]
    if parts[0] in SHARED:
        return
    for imported in found:
        if imported.startswith("methods."):
            sibling = imported.split(".")[1]
            # An objective may build on another of its family; a method that is a folder on its own modules.
            assert sibling in SHARED or sibling == parts[0], f"a plug-in imports {imported}"


@pytest.mark.parametrize("path", [p for p in FILES if name(p) in NO_TORCH], ids=name)
def test_records_and_statistics_are_light(path):
    assert not [i for i in imports(path) if i.split(".")[0] in HEAVY]


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "cli")], ids=name)
def test_the_command_line_imports_late(path):
    assert not [i for i in imports(path, top_level=True) if i.split(".")[0] in LATE_IN_CLI]


def test_only_the_trainer_builds_on_trl_s_grpo_trainer():
    users = {
        name(p) for p in FILES if any(i.startswith(("trl.GRPOTrainer", "trl.trainer.grpo_trainer")) for i in imports(p))
    }
    # The bench runs TRL's own trainer as it is, to compare with it; the check only looks at its signatures.
    bench = {"experiments/bench.py", "experiments/bench_rollout.py"}
    assert users <= {"experiments/trainer.py", "experiments/trl_check.py", *bench}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    plug_in = path.parent == ROOT / "methods" and path.stem not in SHARED
    assert lines <= (METHOD if plug_in else MODULE), f"{name(path)} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION, f"{name(path)}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_annotations_are_postponed(path):
    text = path.read_text(encoding="utf-8")
    assert "from __future__ import annotations" in text or not ast.parse(text).body[1:]
