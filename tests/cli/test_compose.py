from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cli.compose import all_keys, compose, compose_full, parse
from methods.errors import ConfigError


def refused(*line: str, dirs=()) -> str:
    with pytest.raises(ConfigError) as error:
        compose("train", line, dirs)
    text = str(error.value)
    assert error.value.exit_code == 2
    assert "\n" not in text
    assert "+" not in text.replace("[]+", ""), f"Hydra's advice is shown: {text}"
    return text


@pytest.mark.parametrize(
    ("word", "keys"),
    [("method=alpha", ["alpha"]), ("method=[beta,alpha]", ["beta", "alpha"]), ("method=[]", [])],
)
def test_a_stack_keeps_its_order(conf, word, keys):
    assert list(compose("train", [word]).method) == keys


def test_values_of_the_right_type_are_taken(conf):
    line = [
        "trainer.max_steps=7",
        "trainer.learning_rate=1",
        "trainer.rows_per_device=abc",
        "trainer.shuffle=false",
        "trainer.schedule=3",
        "trainer.steps_twice=9",
        "open.anything=1",
        "open={whole: {x: 2}}",
        "task.tiers=easy",
        "seed=null",
        "method=[alpha]",
        "method.alpha.k=9",
    ]
    cfg = compose("train", line)
    assert cfg.trainer.max_steps == 7 and cfg.trainer.learning_rate == 1 and cfg.trainer.shuffle is False
    assert cfg.open.anything == 1 and cfg.open.whole == {"x": 2}
    assert cfg.task.tiers == "easy" and cfg.seed is None and cfg.method.alpha.k == 9
    assert cfg.trainer.rows_per_device == "abc" and cfg.trainer.schedule == 3 and cfg.trainer.steps_twice == 9


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("trainer.max_steps=abc", ["trainer.max_steps", "'abc'", "an integer (default 60)"]),
        ("trainer.max_steps=1.5", ["'1.5'", "an integer"]),
        ("trainer.max_steps=true", ["'true'", "an integer"]),
        ("trainer.learning_rate=fast", ["'fast'", "a number (default 0.0003)"]),
        ("trainer.shuffle=1", ["true or false"]),
        ("trainer.schedule=[a]", ["a text"]),
        ("trainer.steps_twice=x", ["an integer (default 60)"]),
        ("trainer.max_stesp=3", ["'trainer.max_stesp'", "did you mean 'trainer.max_steps'?"]),
        ("max_steps=3", ["did you mean 'trainer.max_steps'?"]),
        ("expriment=duel", ["did you mean 'experiment'?"]),
        ("modell=tiny", ["did you mean 'model'?"]),
        ("trainer.max_steps.x=3", ["no key"]),
        ("trainer=3", ["trainer is a section", "trainer.max_steps"]),
        ("trainer={max_stops: 3}", ["trainer has no key 'max_stops'", "max_steps"]),
        ("suite=all", ["no use for suite="]),
        ("extra.x=1", ["no extra is chosen", "extra=NAME"]),
        ("~seed", ["taken away", "seed=null"]),
        ("method=alhpa", ["no method 'alhpa'", "did you mean 'alpha'"]),
        ("method=[alpha,gamma]", ["no method 'gamma'", "alpha, alpha_code, beta, loose"]),
        ("objective=ppo", ["no objective 'ppo'", "grpo, gspo"]),
        ("method.alpha.k=3", ["'alpha' is not part of this run", "method=[alpha]"]),
        ("method.zeta.k=3", ["no key 'method.zeta.k'"]),
        ("method=loose", ["loose.yaml", "# @package method.loose"]),
        ("method=[alpha,alpha_code]", ["alpha more than once"]),
        ("method=[alpha", ["cannot be read", "method=[alpha"]),
        ("alpha", ["no override", "'alpha'", "did you mean method=alpha"]),
        ("task=file", ["task.path", "must be given"]),
        ("trainer.max_steps=1,2", ["several values", "-m"]),
        ("model=tiny,big", ["several values", "-m"]),
        ("reward=nofile.py:f", ["nofile.py"]),
    ],
)
def test_a_mistake_is_one_paragraph_that_names_it(conf, word, parts):
    text = refused(word)
    for part in parts:
        assert part in text


def test_own_folders_add_choices_and_cannot_hide_ours(conf, tmp_path):
    own = tmp_path / "own dir"
    (own / "method").mkdir(parents=True)
    (own / "method/mine.yaml").write_text("# @package method.mine\n_target_: x.Y\nz: 1\n")
    (own / "method/alpha.yaml").write_text("# @package method.alpha\n_target_: x.Y\nk: 99\n")
    cfg = compose("train", ["method=[mine,alpha]", "method.mine.z=4"], [own])
    assert cfg.method.mine.z == 4 and cfg.method.alpha.k == 1
    assert "--config-dir" in refused("seed=1", dirs=[tmp_path / "absent"])


def test_a_broken_yaml_file_is_named(own_conf):
    (own_conf / "task/broken.yaml").write_text("name: [1\n")
    assert "broken.yaml" in refused("task=broken")


def test_compositions_do_not_share_state(conf):
    first = compose("train", ["method=[alpha]"])
    first.trainer.max_steps = 1
    first.method.alpha.k = 77
    second = compose("train", ["method=[alpha]"])
    assert second.trainer.max_steps == 60 and second.method.alpha.k == 1


def test_hydra_s_global_state_is_left_as_it_was(conf):
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    compose("train", [])
    assert not GlobalHydra.instance().is_initialized()


def test_choices_are_known(conf):
    choices = compose_full("train", ["model=big"]).choices
    assert choices["model"] == "big" and choices["task"] == "arithmetic"


def test_a_reward_function_of_the_user_replaces_the_list(conf, tmp_path):
    file = tmp_path / "own_reward.py"
    file.write_text("def score(completions, rows):\n    return [1.0 for _ in completions]\n")
    cfg = compose("train", [f"reward={file}:score"])
    assert len(cfg.reward) == 1 and cfg.reward[0].name == "score" and cfg.reward[0].role == "outcome"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.integers(-5, 10**6), rate=st.floats(1e-8, 10, allow_nan=False), flag=st.booleans())
def test_written_values_come_back(conf: Path, steps: int, rate: float, flag: bool):
    line = [f"trainer.max_steps={steps}", f"trainer.learning_rate={rate}", f"trainer.shuffle={str(flag).lower()}"]
    cfg = compose("train", line)
    assert (cfg.trainer.max_steps, cfg.trainer.learning_rate, cfg.trainer.shuffle) == (steps, rate, flag)


def test_all_keys_skip_no_section():
    cfg = OmegaConf.create({"a": {"b": 1, "c": {"d": None}}, "e": "${a.b}"})
    assert all_keys(cfg) == ["a", "a.b", "a.c", "a.c.d", "e"]


@pytest.mark.parametrize("name", ["a=b,c=[d]", "with space", "it's", "plain"])
def test_an_existing_path_needs_no_quotes(conf, tmp_path, name):
    """Run folders hold `=` and `,`, which Hydra's grammar does not take in a value."""
    path = tmp_path / name
    path.mkdir()
    assert compose("train", ["task=file", f"task.path={path}"]).task.path == str(path)
    with pytest.raises(ConfigError):
        compose("train", ["task=file", f"task.path={path}=missing,x"])


@pytest.mark.parametrize("name", ["a=b,c.py", "with space.py", "it's.py", "größe.py"])
def test_the_path_of_a_reward_file_needs_no_quotes_either(conf, tmp_path, name):
    (tmp_path / name).write_text("def score(completions, rows):\n    return [1.0 for _ in completions]\n")
    assert compose("train", [f"reward={tmp_path / name}:score"]).reward[0].function == f"{tmp_path / name}:score"


def test_letters_beyond_ascii_need_no_quotes(conf):
    assert compose("train", ["name=größe", "task=file", "task.path=数据/файл.csv"]).name == "größe"


def test_a_long_list_of_values_is_no_path(conf):
    parsed = parse(["seed=" + ",".join(map(str, range(100)))])
    assert len(list(parsed[0].sweep_iterator())) == 100


def test_a_reward_file_without_its_function_says_how_to_name_it(conf):
    (conf / "reward").mkdir()
    (conf / "reward" / "task.yaml").write_text("[]")
    with pytest.raises(ConfigError, match=r"reward=mine\.py:FUNCTION"):
        compose("train", ["reward=mine.py"])
