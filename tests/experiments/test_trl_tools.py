"""TRL's own `tools=` and `environment_factory=` below the methods."""

from __future__ import annotations

import copy

import pytest

from experiments.rewards import RewardSpec
from experiments.run import PromptWrapper
from methods.base import Method
from methods.errors import ConfigError
from methods.objectives.policy_gradient import Grpo
from methods.stack import Stack

RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}
CALL = '<tool_call>{{"name": "{}", "arguments": {{"a": {}, "b": 4}}}}</tool_call><eos>'


def multiply(a: int, b: int) -> str:
    """Multiplies.

    Args:
        a: One factor.
        b: The other.
    """
    return str(a * b)


class Scales:
    """Remembers what its episode is about."""

    def reset(self, **row):
        self.row = row
        return " weigh!"

    def add(self, a: int, b: int) -> str:
        """Adds.

        Args:
            a: One summand.
            b: The other.
        """
        return f"{self.row['answer']}:{a + b}"


class Scored(Scales):
    def get_reward(self) -> float:
        return 1.0


class Watch(Method):
    """Keeps the trajectories that a method sees."""

    name = "watch"

    def rewards(self, trajs, ctx):
        self.trajs = trajs


@pytest.fixture(scope="module")
def chat_model(arithmetic):
    from experiments.models import Tiny
    from experiments.tasks.arithmetic import Arithmetic

    loaded = Tiny(warm_start=None, chat=True).load(Arithmetic(symbols=None), 0)
    loaded.tokenizer.response_template = RESPONSE
    return loaded


@pytest.fixture
def make(chat_model, arithmetic, tmp_path):
    def build(script, **kw):
        """A trainer whose model writes `script[turn](row)` in each turn, and the method that watches."""
        from omegaconf import OmegaConf
        from trl import GRPOConfig

        from experiments.run import device_arguments
        from experiments.trainer import AssayTrainer

        watch, tokenizer = Watch(), chat_model.tokenizer
        args = GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_steps=1, logging_steps=1,
            max_completion_length=120, save_strategy="no", report_to="none", disable_tqdm=True, loss_type="grpo",
            dataloader_pin_memory=False, beta=0.0,
            **device_arguments(OmegaConf.create({"device": "cpu", "bf16": False, "gradient_checkpointing": False})),
        )  # fmt: skip
        trainer = AssayTrainer(
            stack=Stack([watch], Grpo()), rows=arithmetic.rows("train", 0), task=arithmetic, seed=0, args=args,
            rewards=[RewardSpec("task", lambda texts, rows: [float(len(t)) for t in texts], 1.0, "outcome")],
            wrap_prompt=kw.pop("wrap", PromptWrapper(True)), model=copy.deepcopy(chat_model.model),
            processing_class=tokenizer, **kw,
        )  # fmt: skip
        left = iter(script)

        def turn(prompt_ids, *_, **__):
            texts = next(left)
            return [tokenizer(texts[k % len(texts)])["input_ids"] for k in range(len(prompt_ids))], None

        trainer._generate_single_turn = turn
        trainer.attach(type("Nothing", (__import__("transformers").TrainerCallback,), {})(), lambda sample: None)
        return trainer, watch

    return build


def test_functions_are_called_and_methods_see_the_turns(make, chat_model):
    trainer, watch = make([[CALL.format("multiply", 3), "no<eos>", CALL.format("divide", 3)], ["12<eos>", "?<eos>"]],
                          tools=[multiply])  # fmt: skip
    trainer.train()
    called, plain, unknown, _ = watch.trajs
    assert [t.kind for t in called.turns] == ["call", "answer"]
    assert called.turns[0].calls == [{"tool": "multiply", "args": {"a": 3, "b": 4}}] and called.turns[0].result == "12"
    assert (called.text, called.finish, called.group_id, called.sample_id) == ("12", "stop", 0, 0)
    assert (plain.text, [t.kind for t in plain.turns], plain.sample_id) == ("no", ["answer"], 1)
    assert "not found" in unknown.turns[0].result and unknown.group_id == 1
    segment, tokenizer = called.segments[0], chat_model.tokenizer
    tool = [i for i, own in zip(segment.completion_ids, segment.model_mask, strict=True) if not own]
    assert tokenizer.decode(tool) == "<|tool|>multiply: 12<eos><|assistant|>"
    written = [segment.completion_ids[t.start : t.end] for t in called.turns]
    assert [tokenizer.decode(ids) for ids in written] == [CALL.format("multiply", 3), "12<eos>"]
    assert any("loss" in line for line in trainer.state.log_history)


def test_environments_are_reset_with_the_row_and_called(make, arithmetic, chat_model):
    trainer, watch = make([[CALL.format("add", 3)], ["7<eos>"]], environment_factory=Scales)
    trainer.train()
    rows = {row.id: row for row in arithmetic.rows("train", 0)}
    for traj in watch.trajs:
        assert traj.turns[0].result == f"{rows[traj.row_id].answer}:7" and traj.text == "7"
        assert "weigh!" in chat_model.tokenizer.decode(traj.segments[0].prompt_ids)


def test_what_is_not_offered_is_refused(make):
    trainer, _ = make([["7<eos>"]], environment_factory=Scored)
    with pytest.raises(ConfigError, match="get_reward"):
        trainer.train()
    trainer, _ = make([["7<eos>"]], tools=[multiply], wrap=PromptWrapper(False))
    with pytest.raises(ConfigError, match="chat prompts"):
        trainer.train()
