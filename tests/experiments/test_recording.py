"""One writer per run folder, and arm names that keep a minus sign."""

from __future__ import annotations

import pytest

from cli.launch import _slug
from experiments.recording import only_writer
from methods.errors import RecordError


def test_a_second_writer_is_refused_and_the_folder_is_free_again(tmp_path):
    path = tmp_path / "raw" / "x" / "arm" / "seed0"
    with only_writer(path), pytest.raises(RecordError, match="another process is writing"), only_writer(path):
        pass
    with only_writer(path), only_writer(path.with_name("seed1")):
        pass


def test_a_minus_sign_makes_another_arm():
    assert _slug("-1") == "-1" and _slug("1") == "1" and _slug("[]") == "none" and _slug("[a,b]") == "a+b"
