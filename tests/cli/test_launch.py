from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli import launch
from cli.launch import arm_name, plan
from methods.errors import ConfigError, RunError


def labels(*line: str, **options) -> list[str]:
    return [job.label for job in plan("train", line, **options).jobs]


def refused(*line: str, **options) -> str:
    with pytest.raises(ConfigError) as error:
        plan("train", line, **options)
    return str(error.value)


def test_one_line_is_one_run_named_by_its_choices(conf):
    made = plan("train", ["method=[alpha,beta]", "objective=gspo", "seed=4", "model=big", "results_dir=/x/y"])
    assert [job.label for job in made.jobs] == ["method=alpha+beta,objective=gspo/seed4"]
    assert made.name == "arithmetic-big"
    assert made.folder == Path("/x/y/raw/arithmetic-big")
    assert made.jobs[0].cfg.experiment == "arithmetic-big"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "default"),
        (["method=[]"], "method=none"),
        (["method=[ha_dw,tapo]", "objective=gspo"], "method=ha_dw+tapo,objective=gspo"),
        (["objective=gspo", "method=ha_dw"], "method=ha_dw,objective=gspo"),
        (["seed=3", "results_dir=/x", "name=n", "record.max_samples=1", "trainer.save_every=5"], "default"),
        (["task=gsm8k", "model=tiny", "task.path=/a b/c.jsonl"], "task.path=ab-c.jsonl"),
        (["method.ha_dw.eta=1.5", "+x='a/b'"], "+x=a-b,method.ha_dw.eta=1.5"),
    ],
)
def test_arm_names(words, name):
    assert arm_name(words) == name


def test_an_arm_name_fits_a_file_system_and_stays_unique():
    long = [f"trainer.key_number_{i}={i}" for i in range(40)]
    name, other = arm_name(long), arm_name([*long[:-1], "trainer.key_number_39=7"])
    assert len(name) <= 160 and name != other and "/" not in name


def test_a_named_run_keeps_model_and_task_in_the_arm(conf):
    made = plan("train", ["name=try", "model=tiny,big"], multirun=True)
    assert made.name == "try"
    assert [str(job.cfg.arm) for job in made.jobs] == ["model=tiny", "model=big"]


def test_a_sweep_is_the_product_in_the_order_of_the_line(conf):
    line = ["method=[],[alpha]", "objective=grpo,gspo", "seed=range(2)", "trainer.learning_rate=choice(0.1,0.2)"]
    made = labels(*line, multirun=True)
    assert len(made) == len(set(made)) == 16
    assert made[0] == "method=none,objective=grpo,trainer.learning_rate=0.1/seed0"
    assert made[1] == "method=none,objective=grpo,trainer.learning_rate=0.2/seed0"
    assert made[-1] == "method=alpha,objective=gspo,trainer.learning_rate=0.2/seed1"


def test_a_sweep_needs_the_flag(conf):
    assert "-m" in refused("seed=0,1")
    assert "interval" in refused("trainer.learning_rate=interval(0,1)", multirun=True)


def test_the_last_of_two_values_counts(conf):
    made = plan("train", ["seed=1", "trainer.max_steps=5", "seed=2"])
    assert [job.label for job in made.jobs] == ["trainer.max_steps=5/seed2"]


def test_two_runs_in_one_folder_are_refused(conf):
    assert "same folder" in refused("trainer.schedule='a/b','a-b'", multirun=True)


def test_an_experiment_is_arms_times_seeds(conf):
    made = plan("train", ["experiment=duel"])
    assert [job.label for job in made.jobs] == [f"{arm}/seed{k}" for arm in ("plain", "alpha") for k in (0, 1, 2)]
    assert {job.cfg.trainer.max_steps for job in made.jobs} == {30}
    assert made.jobs[0].cfg.method == {} and made.jobs[3].cfg.method.alpha.k == 5
    assert {str(job.cfg.experiment) for job in made.jobs} == {"duel"} and made.name == "duel"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=7"], ["plain/seed7", "alpha/seed7"]),
        (["seeds=[1,2]", "arms=[alpha]"], ["alpha/seed1", "alpha/seed2"]),
        (["seeds=0,1", "arms=alpha"], ["alpha/seed0", "alpha/seed1"]),
        (["seeds=range(2)", "arms=plain"], ["plain/seed0", "plain/seed1"]),
        (["smoke=true"], ["plain/seed0", "plain/seed1", "alpha/seed0", "alpha/seed1"]),
    ],
)
def test_a_part_of_an_experiment(conf, words, expected):
    assert labels("experiment=duel", *words) == expected


def test_smoke_and_own_names_are_recorded_apart(conf):
    smoke = plan("train", ["experiment=duel", "smoke=true"])
    assert smoke.name == "duel-smoke" and {job.cfg.trainer.max_steps for job in smoke.jobs} == {2}
    assert plan("train", ["experiment=duel", "name=mine", "trainer.max_steps=9"]).jobs[0].cfg.trainer.max_steps == 9
    assert plan("train", ["experiment=duel", "name=mine"]).name == "mine"


def test_a_run_under_another_name_takes_the_comparison_along(conf, runner, tmp_path):
    from cli import experiment

    folder = launch.launch(plan("train", ["experiment=duel", "smoke=true", f"results_dir={tmp_path}"]), target=runner)
    kept = experiment.load("duel-smoke", [folder])
    assert kept.seeds == [0, 1] and list(kept.arms) == ["plain", "alpha"] and kept.primary["metric"] == "eval/score"
    assert kept.common[-1] == "trainer.max_steps=2"


def test_a_sweep_over_an_experiment_marks_its_arms(conf):
    made = labels("experiment=duel", "seeds=[0]", "trainer.learning_rate=0.1,0.2", multirun=True)
    assert made == [f"{arm},trainer.learning_rate={rate}/seed0" for arm in ("plain", "alpha") for rate in (0.1, 0.2)]


def test_long_swept_values_fit_a_file_system_too(conf):
    words = ["trainer.schedule=" + "a" * 300 + "," + "a" * 300 + "b"]
    made = labels("experiment=duel", "arms=[plain]", "seeds=[0]", *words, multirun=True)
    assert len(set(made)) == 2 and all(len(label) < 200 for label in made)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["experiment=duell"], "did you mean 'duel'?"),
        (["experiment=duel", "arms=[alhpa]"], "did you mean 'alpha'?"),
        (["experiment=duel", "method=[beta]"], "what arm 'plain' is about"),
        (["experiment=duel", "arms=[alpha]", "method.alpha.k=3"], "what arm 'alpha' is about"),
        (["experiment=duel", "seeds=[a]"], "a seed is an integer"),
        (["experiment=duel", "seeds=[]"], "no run at all"),
        (["experiment=duel", "smoke=abc"], "true or false"),
        (["experiment=duel", "trainer.nothing=1"], "no key 'trainer.nothing'"),
        (["experiment=duel", "method.beta.k=1"], "arm 'plain'"),
        (["arms=[alpha]"], "belongs to an experiment"),
        (["jobs=0"], "jobs"),
        (["name=a/b"], "no slash"),
        (["name=" + "x" * 300], "255 bytes"),
    ],
)
def test_mistakes_in_an_experiment_line(conf, words, part):
    assert part in refused(*words)


def test_an_experiment_of_the_other_command_says_which(own_conf):
    file = own_conf / "experiment/duel.yaml"
    file.write_text(file.read_text().replace("command: train", "command: eval"))
    assert "assay eval experiment=duel" in refused("experiment=duel")


def test_every_job_is_checked_before_the_first_starts(conf, runner, tmp_path):
    seen = []

    def check(cfg):
        seen.append(cfg.seed)
        if cfg.seed == 2:
            raise ConfigError("seed 2 cannot run")

    line = ["seed=0,1,2", f"results_dir={tmp_path}/r"]
    assert "seed 2" in refused(*line, multirun=True, check=check)
    assert seen == [0, 1, 2] and not (tmp_path / "r").exists()


def test_a_single_run_stays_in_this_process(conf, runner, tmp_path):
    path = launch.launch(plan("train", ["seed=1", f"results_dir={tmp_path}/r"]), target=runner)
    assert path == tmp_path / "r/raw/arithmetic-tiny/default/seed1"
    assert (path / "process").read_text() == str(os.getpid())


def test_several_runs_go_side_by_side(conf, runner, tmp_path):
    made = plan("train", ["experiment=duel", "jobs=2", f"results_dir={tmp_path}/r"])
    assert launch.launch(made, target=runner) == tmp_path / "r/raw/duel"
    pids = [file.read_text() for file in (tmp_path / "r").rglob("process")]
    assert len(pids) == 6 and str(os.getpid()) not in pids and len(set(pids)) <= 2


def test_hydra_s_joblib_launcher(conf, runner, tmp_path):
    from hydra.core.global_hydra import GlobalHydra

    before = GlobalHydra.instance().hydra
    line = ["seed=0,1", f"results_dir={tmp_path}/r", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]
    path = launch.launch(plan("train", line, multirun=True), target=runner)
    assert path == tmp_path / "r/raw/arithmetic-tiny"
    assert sorted(p.parent.name for p in path.rglob("process")) == ["seed0", "seed1"]
    assert GlobalHydra.instance().hydra is before  # the launcher, in this process, replaced the singleton itself
    line[0] = "seed=12,13"
    with pytest.raises(RunError, match=r"1 of 2 runs failed.*seed13: unlucky"):
        launch.launch(plan("train", line, multirun=True), target=runner)


def test_an_unknown_launcher_is_a_mistake(conf, runner, tmp_path):
    made = plan("train", ["hydra/launcher=jobliv", f"results_dir={tmp_path}/r"])
    with pytest.raises(ConfigError, match="did you mean 'joblib'"):
        launch.launch(made, target=runner)
