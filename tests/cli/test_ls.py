from __future__ import annotations

import pytest

from cli import ls
from methods.errors import ConfigError


def test_every_choice_has_one_line(conf, capsys):
    ls.ls(None)
    lines = capsys.readouterr().out.splitlines()
    assert "methods:" in lines and "  beta        Beta changes little." in lines
    assert "  duel  Alpha against nothing" in lines and "  arithmetic  Chains of sums." in lines


def test_one_kind_in_singular_or_plural(conf, capsys):
    ls.ls("objectives")
    plural = capsys.readouterr().out
    ls.ls("objective")
    assert capsys.readouterr().out == plural == "grpo  GRPO.\ngspo  GSPO.\n"
    with pytest.raises(ConfigError, match="did you mean 'methods'"):
        ls.ls("metods")


def test_own_folders_are_listed_too(conf, tmp_path, capsys):
    (tmp_path / "own/task").mkdir(parents=True)
    (tmp_path / "own/task/mine.yaml").write_text("# My task.\nname: mine\n")
    ls.ls("tasks", config_dir=[tmp_path / "own"])
    assert "mine        My task." in capsys.readouterr().out


def test_the_class_speaks_for_a_method_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "plug"
    (package / "inner").mkdir(parents=True)
    body = 'raise SystemExit("imported")\nclass A:\n    """First line.\n\n    Second."""\n'
    (package / "__init__.py").write_text('raise SystemExit("imported")\n')
    (package / "inner/mod.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ls.class_line("plug.inner.mod.A") == "First line."
    assert ls.class_line("plug.inner.mod.B") == "" and ls.class_line("absent_package.A") == ""
