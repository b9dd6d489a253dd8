from __future__ import annotations

import pytest
import typer

from cli import doctor


def test_all_requirements_are_looked_at():
    names = " ".join(doctor.requirements())
    assert "trl" in names and "hydra-core" in names and "pytest" not in names


def test_a_version_out_of_range_fails(monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: ["typer>=999", "packaging>=20", "no-such-package>=1"])
    lines = list(doctor._versions())
    assert [line[:2] for line in lines] == [("fail", "typer"), ("fail", "no-such-package"), ("ok", "versions")]
    assert "pip install 'typer>=999'" in lines[0][2]


def test_a_check_that_breaks_is_a_failure_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    def broken():
        raise RuntimeError("driver\nlost")

    quiet = lambda: iter(())  # noqa: E731
    monkeypatch.setattr(doctor, "_torch", broken)
    monkeypatch.setattr(doctor, "_trl", quiet)
    with pytest.raises(typer.Exit) as stop:
        doctor.doctor(tmp_path)
    out = capsys.readouterr().out
    assert stop.value.exit_code == 1 and "RuntimeError: driver lost" in out and "GiB free" in out


def test_a_place_that_cannot_be_written_fails(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert next(doctor._disk(file / "results"))[0] == "fail"
    assert next(doctor._disk(tmp_path / "new/results"))[0] in ("ok", "warn")


def test_moved_trl_names_are_told(monkeypatch):
    import sys
    from types import ModuleType

    fake = ModuleType("experiments.trl_check")
    fake.self_check = lambda: ["GRPOTrainer._x is gone"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "experiments.trl_check", fake)
    line = next(doctor._trl())
    assert line[0] == "fail" and "GRPOTrainer._x is gone" in line[2] and "constraints.txt" in line[2]
