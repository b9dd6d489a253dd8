"""The synthetic bandit: the project's scheduler on rollouts of known worth, and a study without a model."""

from __future__ import annotations

import pytest

from experiments.studies.bandit_synthetic import BanditSynthetic


def stages(**keys):
    frame = BanditSynthetic(**keys).simulate(1)
    return frame, frame.groupby("tier")[["score", "regret", "floor"]].mean()


def test_the_scheduler_finds_harmful_rollouts_and_shuffled_labels_do_not():
    frame, ours = stages()
    _, random = stages(policy="random")
    _, shuffled = stages(shuffled=True)
    assert len(frame) == 200 and (frame["regret"] >= -1e-6).all()
    assert random.loc["last", "score"] == pytest.approx(0.35, abs=0.02)
    assert ours.loc["last", "score"] < 0.15 < 0.2 < shuffled.loc["last", "score"]
    assert ours.loc["last", "regret"] < ours.loc["first", "regret"]
    # All arms of a seed see the same rounds.
    assert ours["floor"].tolist() == random["floor"].tolist() == shuffled["floor"].tolist()


def test_noise_drawn_per_rollout_leaves_the_literal_loss_nothing_to_learn_from():
    _, shared = stages(loss="shared_label", exploration="gumbel")
    assert shared.loc["last", "score"] > 0.25


def test_it_is_a_function_of_its_seed():
    first, again, other = (BanditSynthetic(rounds=150).simulate(s) for s in (3, 3, 4))
    assert first.equals(again) and not first.equals(other)


def test_a_study_without_a_model_builds_none(monkeypatch, tmp_path):
    import pandas as pd

    from cli import launch
    from experiments import evaluate

    def never(*_, **__):
        raise AssertionError("an engine was built")

    monkeypatch.setattr(evaluate, "build_engine", never)
    line = ["study=bandit_synthetic", "study.rounds=150", "study.policy=random", f"results_dir={tmp_path}"]
    (job,) = launch.plan("eval", line).jobs
    path = evaluate.run(job.cfg)
    assert len(pd.read_parquet(path / "eval.parquet")) == 150 and (path / "summary.json").is_file()
