"""The cost model: counts against real models, every formula against numbers worked out by hand, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments import cost
from experiments.cost import MACHINES, SHAPES, Job, Machine, Shape
from methods.errors import ConfigError

TOY = Shape(layers=2, hidden=4, heads=2, kv_heads=1, head_dim=2, feed_forward=8, vocab=10)
JOB = Job(rows=8, prompt=10, written=30, rows_per_device=2)


def test_weights_are_counted_as_they_are(random_model):
    model = random_model.model
    shape = Shape.of(model.config)
    norms = 2 * shape.head_dim * shape.layers  # of queries and keys, which the formula leaves out
    assert shape.weights + norms == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name, billions", [
    ("Qwen3-0.6B", 0.60), ("Qwen3-1.7B", 1.72), ("Qwen3-4B", 4.02), ("Qwen3-8B", 8.19), ("Qwen2.5-1.5B", 1.54),
    ("Qwen2.5-3B", 3.09), ("Qwen2.5-Math-7B", 7.62), ("Llama-3.2-3B", 3.21), ("DeepSeek-R1-Distill-Qwen-1.5B", 1.78),
])  # fmt: skip
def test_published_sizes(name, billions):
    assert SHAPES[name].weights / 1e9 == pytest.approx(billions, abs=0.006)


def test_a_toy_by_hand():
    assert TOY.layer_weights == 2 * 4 * 2 * 3 + 3 * 4 * 8 + 8 == 152
    assert TOY.weights == 2 * 152 + 4 + 40 and TOY.multiplied == 2 * 152 + 40
    assert TOY.cache(2) == 2 * 2 * 1 * 2 * 2 and TOY.forward(3, 5) == 3 * (2 * 344 + 4 * 2 * 2 * 2 * 5)
    parts = cost.memory(TOY, JOB)
    n = TOY.weights
    assert (parts["weights"], parts["gradients"], parts["optimiser"]) == (2 * n, 2 * n, 4 * n)
    assert parts["activations"] == 80 * 4 * (17 + 2) * 2 and parts["cache"] == 8 * 40 * 16
    plain = cost.memory(TOY, replace(JOB, checkpointing=False, reference=True, critic=True, trained=0.5))
    assert plain["activations"] == 80 * 4 * 34 * 2 and plain["optimiser"] == 2 * n
    assert (plain["reference"], plain["critic"]) == (2 * n, 16 * n)


def test_sharding_divides_what_it_is_said_to(n=TOY.weights):
    def shards(kind):
        parts = cost.memory(TOY, replace(JOB, processes=4, sharding=kind))
        return tuple(parts[k] for k in ("weights", "gradients", "optimiser", "whole weights"))

    assert shards("zero2") == (2 * n, 2 * n / 4, 12 * n / 4, 0)
    assert shards("zero3") == (2 * n / 4, 2 * n / 4, 12 * n / 4, 2 * n)
    assert shards("fsdp2") == (n, n, 2 * n, 2 * n)
    assert shards("none") == (2 * n, 2 * n, 4 * n, 0)


def test_seconds_by_hand():
    slow = Machine(flops=1000.0, bandwidth=100.0, memory=1e9, computes=0.5, reads=0.5, overhead=1.0)
    step = max((344 * 2 + 8 * 25 * 16) / 50, TOY.forward(8, 25) / 500)
    expected = TOY.forward(80, 5) / 500 + 30 * (step + 1.0)
    assert cost.generation_seconds(TOY, JOB, slow) == pytest.approx(expected)
    assert cost.training_seconds(TOY, JOB, slow) == pytest.approx(4 * TOY.forward(320, 20) / 500)
    more = replace(JOB, checkpointing=False, old_logps=True, reference=True, iterations=2)
    assert cost.training_seconds(TOY, more, slow) == pytest.approx(8 * TOY.forward(320, 20) / 500)


def test_rows_without_room_wait():
    room = cost.phases(cost.memory(TOY, JOB))[1] + 2 * 40 * 16  # for two of eight rows
    tight = Machine(1e3, 1e2, room, 1.0, 1.0, 1.0)
    wide = replace(tight, memory=1e9)
    assert cost.generation_seconds(TOY, JOB, tight) > 30 * 4 > cost.generation_seconds(TOY, JOB, wide) - 30 * 100


def test_more_processes_never_need_more_memory_or_time():
    shape, machine = SHAPES["Qwen3-4B"], MACHINES["h100"]
    for kind in ("none", "zero2", "zero3", "fsdp2"):
        jobs = [Job(1024, 512, 2048, 4, processes=n, sharding=kind) for n in (1, 2, 8, 64)]
        needs = [max(cost.phases(cost.memory(shape, job))) for job in jobs]
        times = [cost.generation_seconds(shape, j, machine) + cost.training_seconds(shape, j, machine) for j in jobs]
        assert needs == sorted(needs, reverse=True) and times == sorted(times, reverse=True)


def test_the_longest_name_wins_and_an_unknown_model_is_named():
    assert cost.shape_of("Elliott/Qwen2.5-Math-7B-16k-think") == SHAPES["Qwen2.5-Math-7B"]
    assert cost.shape_of("Qwen/Qwen3-VL-4B-Instruct") == SHAPES["Qwen3-VL-4B"]
    with pytest.raises(ConfigError, match="no shape is known"):
        cost.shape_of("gpt2")


def test_one_recipe_as_a_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cost", "ha_dw_paper", "--written", "1500", "--scale", "zero3"])
    cost.main()
    head, *_, row = capsys.readouterr().out.splitlines()
    assert head.startswith("8 x h100, scale zero3") and row.startswith("ha_dw_paper")
    size, tokens, device = map(float, row.split()[1:4])
    assert size == 4.02 and tokens == pytest.approx(16 * 8 * 2012 / 1e6, abs=0.01) and device < 80
    for words in (["nothing_paper"], ["ha_dw_paper", "--processes", "0"]):
        monkeypatch.setattr("sys.argv", ["cost", *words])
        with pytest.raises(SystemExit) as stop:
            cost.main()
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_formulas_are_of_the_right_size_on_this_machine():
    from experiments.bench_cost import CHECKS, check

    text = check(CHECKS[0])
    for line in text.splitlines()[1:]:
        told, found = float(line.split("formula")[1].split()[0]), float(line.split("measured")[1])
        assert 0.02 < told / found < 20, text
