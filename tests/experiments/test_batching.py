"""The three batch words: what they give, and what is refused."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from experiments import batching, collect
from methods.errors import ConfigError

WORDS = {
    "max_steps": 60,
    "prompts_per_step": 16,
    "rollouts_per_prompt": 8,
    "rows_per_device": None,
    "updates_per_generation": 1,
    "iterations": 1,
    "log_every": None,
    "save_every": 20,
    "keep_checkpoints": 1,
}


def plan(world=1, **words):
    return batching.plan(OmegaConf.create(WORDS | words), world=world)


def test_defaults_are_one_batch():
    p = plan()
    assert (p.rows_per_device, p.accumulation, p.slices, p.period, p.prompts_per_generation) == (128, 1, 1, 1, 16)


def test_everything_at_once():
    p = plan(world=2, rows_per_device=8, updates_per_generation=4, iterations=2)
    assert (p.accumulation, p.slices, p.period, p.prompts_per_generation) == (8, 32, 8, 64)
    assert "16 prompts x 8 rollouts = 8 x 8 rows x 2 devices" in str(p)


@pytest.mark.parametrize(
    "words, key",
    [
        ({"rows_per_device": 7}, "trainer.rows_per_device"),
        ({"rollouts_per_prompt": 1}, "trainer.rollouts_per_prompt"),
        ({"prompts_per_step": 0}, "trainer.prompts_per_step"),
        ({"world": 3}, "trainer.prompts_per_step"),
        ({"world": 2, "prompts_per_step": 1}, "scale.num_processes"),
        ({"world": 2, "prompts_per_step": 3}, "trainer.prompts_per_step"),
    ],
)
def test_refused(words, key):
    with pytest.raises(ConfigError) as caught:
        plan(**words)
    assert caught.value.where == key


def log_every(**words):
    t = WORDS | {k: v for k, v in words.items() if k != "eval"}
    cfg = OmegaConf.create({"trainer": t, "eval": {"every": words.get("eval", 20)}})
    return batching.log_every(cfg, batching.plan(cfg.trainer, world=1).period)


def test_boundaries():
    assert log_every() == 1
    assert log_every(updates_per_generation=2, iterations=2) == 4


@pytest.mark.parametrize(
    "words, fix",
    [
        ({"updates_per_generation": 3}, "trainer.save_every=21"),
        ({"log_every": 7}, "trainer.save_every=21"),
        ({"max_steps": 61, "log_every": 2}, "trainer.max_steps=60"),
        ({"iterations": 4, "eval": 10}, "eval.every=8"),
        ({"log_every": 4, "eval": 10}, "eval.every=8"),
    ],
)
def test_saves_off_a_generation_boundary_are_refused(words, fix):
    with pytest.raises(ConfigError) as caught:
        log_every(**words)
    assert caught.value.fix == fix


def test_a_chunk_takes_the_longest_rows_first_and_no_column_that_is_padding_in_all_of_them():
    prompts, written = torch.tensor([1, 3, 2]), torch.tensor([2, 1, 1])
    prompt_mask = (torch.arange(3) >= 3 - prompts.unsqueeze(1)).long()
    completion_mask = (torch.arange(4) < written.unsqueeze(1)).long()
    inputs = {
        "prompt_ids": prompt_mask * 7,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_mask * torch.tensor([[10], [20], [30]]),
        "completion_mask": completion_mask,
        "tool_mask": completion_mask,
        "row_weight": torch.tensor([1.0, 2.0, 3.0]),
        "num_items_in_batch": torch.tensor(4.0),
    }
    first, second, third = (collect.row_slice(inputs, start, start + 2) for start in (0, 2, 4))
    assert first["row_weight"].tolist() == [2, 1] and second["row_weight"].tolist() == [3]
    assert first["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]] and second["prompt_mask"].tolist() == [[1, 1]]
    assert first["completion_ids"].tolist() == [[20, 0], [10, 10]] and second["completion_ids"].tolist() == [[30]]
    assert first["num_items_in_batch"] == 4 and not third["tool_mask"].any() and third["row_weight"].tolist() == [0]


def test_a_resumed_run_goes_on_in_the_order_of_its_epoch():
    from trl.trainer.utils import RepeatSampler

    def sampler():
        return RepeatSampler(range(10), mini_repeat_count=2, batch_size=4, repeat_count=3, seed=0)

    whole = sampler()
    epochs = [list(whole) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for rounds, epoch in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)):  # two generations an epoch
        assert list(batching.caught_up(sampler(), rounds)) == epochs[epoch]
