"""The command line from outside: help, exit codes, errors, completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli import main as door
from methods.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "trl", "hydra", "omegaconf", "pandas", "numpy", "rich")


def call(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        door.main(list(words))
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def outside(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "assay", *words]
    return subprocess.run(line, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def imported(code: str) -> set[str]:
    """Which heavy packages a piece of Python has imported when it is done."""
    tail = f"\nimport sys\nprint('|'.join(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(filter(None, result.stdout.splitlines()[-1].split("|")))


@pytest.mark.parametrize("words", [["--help"], ["ls"], ["train", "--help"]])
def test_light_commands_import_nothing_heavy(words):
    code = f"import assay, sys\nsys.argv = ['assay', *{words!r}]\ntry:\n    assay.main()\nexcept SystemExit:\n    pass"
    assert imported(code) == set()


def test_importing_the_facade_is_free_until_a_name_is_asked_for():
    assert imported("import assay") == set()
    assert "torch" not in imported("from assay import ConfigError")
    assert "torch" in imported("from assay import Method\nassert Method.__module__ == 'methods.base'")


def test_help_lists_every_command(capsys):
    code, out, _ = call("--help", capsys=capsys)
    assert code == 0
    assert re.findall(r"^  (\w[\w-]*)  ", out.split("Commands:")[1], re.M) == list(door.COMMANDS)


@pytest.mark.parametrize("name", list(door.COMMANDS))
def test_every_command_has_help_with_examples(name, capsys):
    if not (ROOT / f"{door.COMMANDS[name][0].replace('.', '/')}.py").exists():
        pytest.skip(f"{name} is not written yet")
    code, out, _ = call(name, "--help", capsys=capsys)
    assert code == 0 and "Examples:" in out
    # One example per line: a paragraph that was wrapped together starts only one line with the program's name.
    assert len(re.findall(rf"^ +assay {name}", out, re.M)) >= 2


def test_wrong_words_exit_2_with_the_nearest(capsys):
    code, _, err = call("trian", capsys=capsys)
    assert code == 2 and "did you mean 'train'?" in err
    code, _, err = call("train", "--no-such", capsys=capsys)
    assert code == 2 and "--no-such" in err


def test_a_config_error_is_one_line_on_stderr(conf, capsys):
    code, out, err = call("train", "method=alhpa", "--cfg", "job", capsys=capsys)
    assert code == 2 and out == ""
    assert err.startswith("assay: error:") and err.count("\n") == 1 and "did you mean 'alpha'" in err
    code, _, err = call("train", "method=alhpa", "--cfg", "job", "--debug", capsys=capsys)
    assert code == 2 and "Traceback" in err


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (RunError("no space"), 1, "assay: error: no space."),
        (KeyError("oops"), 1, "KeyError at "),
        (KeyboardInterrupt(), 130, "The same line again"),
        (KeyboardInterrupt(15), 143, "The same line again"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, part):
    def ls(kind: str = "") -> None:
        raise error

    monkeypatch.setattr("cli.ls.ls", ls)
    got, _, err = call("ls", capsys=capsys)
    assert got == code and part in err and "Traceback" not in err


def test_cfg_job_prints_what_would_run(conf, capsys):
    code, out, _ = call("train", "method=[alpha]", "trainer.max_steps=7", "--cfg", "job", capsys=capsys)
    assert code == 0 and "max_steps: 7" in out and "steps_twice: 7" in out and "arm: method=alpha" in out
    code, out, _ = call("train", "seed=0,1", "-m", "--cfg", "job", capsys=capsys)
    assert code == 0 and out.count("--- #") == 2


def test_the_sweep_flag_may_stand_anywhere(conf, capsys):
    lines = [["-m", "seed=0,1"], ["seed=0,1", "-m"], ["--multirun", "seed=0,1"]]
    outputs = {call("train", *line, "--cfg", "job", capsys=capsys)[1] for line in lines}
    assert len(outputs) == 1


def test_resume_needs_a_run(tmp_path, capsys):
    code, _, err = call("train", "--resume", str(tmp_path), capsys=capsys)
    assert code == 2 and "holds no run" in err
    code, _, err = call("train", "seed=1", "--resume", str(tmp_path), capsys=capsys)
    assert code == 2 and "leave the overrides out" in err
    (tmp_path / "config.yaml").write_text("a: [1\n")
    code, _, err = call("train", "--resume", str(tmp_path), capsys=capsys)
    assert code == 2 and "damaged" in err


def test_completion_script_and_words(conf):
    result = outside("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert result.returncode == 0 and "_ASSAY_COMPLETE" in result.stdout
    typed = outside(_ASSAY_COMPLETE="complete_bash", COMP_WORDS="assay do", COMP_CWORD="1")
    assert typed.stdout.split() == ["doctor"]
    from cli.words import complete_override

    class Context:
        params: dict = {}

    assert complete_override(Context, "me") == ["method="]
    assert complete_override(Context, "objective=g") == ["objective=grpo", "objective=gspo"]
    assert complete_override(Context, "method=[beta,alp") == ["method=[beta,alpha", "method=[beta,alpha_code"]


def test_a_folder_that_hides_a_package_is_named(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/__init__.py").write_text("")
    code = "import sys, assay\nsys.argv = ['assay', '--help']\nassay.main()"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    line = [sys.executable, "-c", code]
    result = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and str(tmp_path / "methods") in result.stderr and "Traceback" not in result.stderr


def test_a_run_goes_on_in_the_folder_it_was_started_in(tmp_path, monkeypatch, capsys):
    """Its data and reward files may be named from there, whatever folder --resume is said in."""
    from omegaconf import OmegaConf

    from experiments import run
    from experiments.recording import open_record, run_folder

    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir(), other.mkdir()
    monkeypatch.chdir(home)
    base = {"results_dir": "results", "experiment": "x", "arm": "a", "seed": 0, "model": {}}
    folder = run_folder(OmegaConf.create(base))
    open_record(folder, OmegaConf.create(base), "eval")
    seen = []
    monkeypatch.setattr(run, "check", lambda cfg: None)
    monkeypatch.setattr(run, "run", lambda cfg: seen.append((os.getcwd(), run_folder(cfg).resolve())) or folder)
    monkeypatch.chdir(other)
    code, _, _ = call("train", "--resume", f"../home/{folder}", capsys=capsys)
    assert code == 0 and seen == [(str(home), home / folder)]
