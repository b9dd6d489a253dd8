"""One writer per run folder, and arm names that keep a minus sign."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from cli.launch import _slug
from experiments.recording import already_done, only_writer, open_record, run_folder
from methods.errors import ConfigError, RecordError


def test_a_second_writer_is_refused_and_the_folder_is_free_again(tmp_path):
    path = tmp_path / "raw" / "x" / "arm" / "seed0"
    with only_writer(path), pytest.raises(RecordError, match="another process is writing"), only_writer(path):
        pass
    with only_writer(path), only_writer(path.with_name("seed1")):
        pass


def test_a_minus_sign_makes_another_arm():
    assert _slug("-1") == "-1" and _slug("1") == "1" and _slug("[]") == "none" and _slug("[a,b]") == "a+b"


def settings(tmp_path, **more):
    base = {"results_dir": str(tmp_path), "experiment": "x", "arm": "a", "seed": 0, "overwrite": False, "model": {}}
    return OmegaConf.create(base | more)


def test_a_finished_run_of_a_reward_or_data_file_that_has_changed_is_not_called_done(tmp_path):
    reward, rows = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    reward.write_text("def f(c, r): return [0.0]")
    rows.write_text("{}")
    cfg = settings(tmp_path, reward=[{"function": f"{reward}:f"}], task={"path": str(rows)})
    path = run_folder(cfg)
    writer = open_record(path, cfg, "eval")
    reward.write_text("def f(c, r): return [1.0]")
    assert not already_done(path, cfg), "an unfinished run goes on with the mended function"
    writer.finish({})
    with pytest.raises(RecordError, match=r"changed since.*mine\.py:f.*overwrite=true"):
        already_done(path, cfg)
    open_record(path, cfg, "eval").finish({})
    assert already_done(path, cfg)
    rows.write_text("{} ")
    with pytest.raises(RecordError, match=r"changed since.*rows\.jsonl"):
        already_done(path, cfg)
    rows.unlink()  # the record may be read where the data is not
    assert already_done(path, cfg)


def test_a_folder_name_that_is_too_long_is_a_wrong_place(tmp_path):
    with pytest.raises(ConfigError, match="name too long"):
        already_done(tmp_path / ("x" * 300), settings(tmp_path))
