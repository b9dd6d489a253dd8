"""generation=vllm_*: TRL's options, the factor of the importance-sampling correction, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from cli.compose import compose
from experiments import generation
from methods.errors import ConfigError
from methods.objectives.policy_gradient import Grpo
from methods.stack import Stack


def asked(name="vllm_colocate", *words):
    return compose("train", [f"generation={name}", *words]).generation


class NoTools:
    tools, name = None, "arithmetic"


def options(mode="sequence_mask", *words):
    return generation.arguments(asked("vllm_colocate", f"generation.correction={mode}", *words), NoTools)


# ---------------------------------------------------------------- TRL's options


def test_the_options_are_trl_s(tmp_path):
    from trl import GRPOConfig

    plain = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert generation.arguments(asked("transformers"), NoTools) == {}
    found = GRPOConfig(**plain, **options("token_truncate", "generation.clip_max=2", "generation.sleep=true"))
    assert found.use_vllm and found.vllm_mode == "colocate" and found.vllm_enable_sleep_mode
    assert found.vllm_importance_sampling_correction and found.vllm_importance_sampling_mode == "token_truncate"
    assert found.vllm_importance_sampling_clip_max == 2.0 and found.vllm_gpu_memory_utilization == 0.3
    server = asked("vllm_server", "generation.url=http://node7:8000", "generation.correction=none")
    found = GRPOConfig(**plain, **generation.arguments(server, NoTools))
    assert found.vllm_mode == "server" and found.vllm_server_base_url == "http://node7:8000"
    assert not found.vllm_importance_sampling_correction and found.vllm_group_port == 51216
    assert not generation.needs(found)


# ---------------------------------------------------------------- the correction


def test_what_the_sampler_did_not_say_has_factor_one(fake_context):
    from types import SimpleNamespace

    from experiments.collect import Meter
    from methods.base import Segment, Trajectory

    said = [[-1.0, -1.0], None, [None, -1.0], [-1.0, -3.0]]
    trajs = [Trajectory("a", 0, k, [Segment([5], [6, 7], logprobs)]) for k, logprobs in enumerate(said)]
    batch = fake_context(trajs).batch
    batch.old_logps_ST = torch.full((4, 2), -1.5)
    args = SimpleNamespace(**options("sequence_mask", "generation.clip_max=2"))
    trainer = SimpleNamespace(args=args, meter=Meter())
    generation.attach(trainer, batch)
    factor = batch.extras[generation.RATIO]
    assert factor.tolist() == pytest.approx([math.exp(-1.0), 1.0, math.exp(-0.5), 0.0])  # exp(1) is above 2
    shown = {key.rpartition("/")[2]: float(value[0]) for key, value in trainer.meter.items() if "ratio" in key}
    assert shown["cut"] == 0.25 and shown["max"] == 1.0 and shown["min"] == 0.0
    inputs = {"advantages": torch.ones(4, 2), f"extra/{generation.RATIO}": factor}
    assert generation.weighted(inputs)[:, 0].tolist() == factor.tolist()
    del inputs[f"extra/{generation.RATIO}"]
    assert generation.weighted(inputs) is inputs["advantages"]


# ---------------------------------------------------------------- refusals


def refused(words):
    from experiments.run import check

    with pytest.raises(ConfigError) as error:
        check(compose("train", words))
    return str(error.value)


def test_refusals(monkeypatch):
    monkeypatch.setattr(generation, "find_spec", lambda name: name)
    assert "one ratio per row" in refused(
        ["generation=vllm_colocate", "generation.correction=token_mask", "objective=gspo"]
    )
    assert "sequence_truncate" in refused(["generation=vllm_colocate", "generation.correction=bad"])
    for bound in (-1, 0):
        assert "clip_max" in refused(["generation=vllm_server", f"generation.clip_max={bound}"])
    for method, task in (("srft", "addition"), ("graph_memory", "procedures")):
        assert method in refused(["generation=vllm_server", f"method=[{method}]", f"task={task}"])
    monkeypatch.setattr(generation, "find_spec", lambda name: None)
    for name in ("vllm_colocate", "vllm_server"):
        said = refused([f"generation={name}"])
        assert "vLLM is not installed here" in said and "generation=transformers" in said and "\n\n" not in said


def test_a_task_with_tools_is_refused():
    from types import SimpleNamespace

    with pytest.raises(ConfigError, match=r"task lookup.*generation=transformers"):
        generation.arguments(asked(), SimpleNamespace(tools=1, name="lookup"))


def test_a_stack_of_no_vllm_needs_nothing():
    generation.check(None, Stack([], Grpo()))
    generation.check(asked("transformers"), Stack([], Grpo()))
