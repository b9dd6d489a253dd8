"""Supervised fine-tuning: which tokens are trained, determinism, resume."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest

from experiments.sft import SFTSettings, make_batches, train_sft
from experiments.tokenizers import IGNORED, encode, prompt_ids, tiny_tokenizer
from experiments.weights import LoadedModel
from methods.errors import ConfigError, DataError, RunError


def make_model(tokenizer, chat=False):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return LoadedModel(model, tokenizer, chat, "test")


@pytest.fixture(scope="module")
def plain():
    return make_model(tiny_tokenizer())


@pytest.fixture(scope="module")
def chat():
    return make_model(tiny_tokenizer(chat=True), chat=True)


def row(prompt, demo, **meta):
    return SimpleNamespace(id="r", prompt=prompt, demo=demo, meta=meta)


def trained_runs(encoded, tokenizer):
    """The texts of the trained stretches, in order."""
    runs, current = [], []
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            runs, current = ([*runs, current] if current else runs), []
        else:
            current = [*current, token]
    return [tokenizer.decode(r) for r in ([*runs, current] if current else runs)]


def test_plain_prompt_trains_exactly_the_completion_and_eos(plain):
    encoded = encode(row("1+2=", "3"), plain)
    assert plain.tokenizer.decode(encoded["input_ids"]) == "1+2=3<eos>"
    assert trained_runs(encoded, plain.tokenizer) == ["3<eos>"]


def test_plain_prompt_goes_through_the_template_of_a_chat_model(chat):
    encoded = encode(row("1+2=", "3"), chat)
    assert chat.tokenizer.decode(encoded["input_ids"]) == "<|user|>1+2=<eos><|assistant|>3<eos>"
    assert trained_runs(encoded, chat.tokenizer) == ["3<eos>"]
    assert encoded["input_ids"][: len(prompt_ids("1+2=", chat))] == prompt_ids("1+2=", chat)


def test_segments_train_the_model_and_not_the_tool(plain):
    steps = [("<call>x", True), ("<out>7", False), ("7", True)]
    encoded = encode(row("find x:", None, segments=steps), plain)
    assert plain.tokenizer.decode(encoded["input_ids"]) == "find x:<call>x<out>77<eos>"
    assert trained_runs(encoded, plain.tokenizer) == ["<call>x", "7<eos>"]


def messages(*, first_trained=True):
    return [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "look",
            "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"c": "Rome"}}}],
            "train": first_trained,
        },
        {"role": "tool", "name": "w", "content": "sun"},
        {"role": "assistant", "content": "sunny"},
    ]


def test_messages_train_the_assistant_only(chat):
    runs = trained_runs(encode({"messages": messages()}, chat), chat.tokenizer)
    call = '<tool_call>{"name": "w", "arguments": {"c": "Rome"}}</tool_call>'
    assert runs == [f"look{call}<eos>", "sunny<eos>"]


def test_a_turn_can_be_left_untrained(chat):
    whole, masked = (encode({"messages": messages(first_trained=t)}, chat) for t in (True, False))
    assert masked["input_ids"] == whole["input_ids"]
    assert trained_runs(masked, chat.tokenizer) == ["sunny<eos>"]


def test_earlier_turns_of_a_prompt_are_context(chat):
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert trained_runs(encode(row(prompt, "d"), chat), chat.tokenizer) == ["d<eos>"]


def test_text_after_the_end_of_a_turn_is_not_trained(chat):
    # The ChatML of many models: a line break follows the end-of-turn token, which no model ever generates.
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<eos>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    loaded = LoadedModel(chat.model, tokenizer, True, "chatml")
    turns = [{"role": r, "content": r[0]} for r in ("user", "assistant", "user", "assistant")]
    encoded = encode({"messages": turns}, loaded)
    assert trained_runs(encoded, tokenizer) == ["a<eos>", "a<eos>"]
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_template_that_rewrites_earlier_turns_is_refused(chat):
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if loop.last %}{{ '!' }}{% endif %}"
        "{{ m.content + '<eos>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    turns = [{"role": r, "content": r[0]} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(DataError, match="renders a turn differently"):
        encode({"messages": turns}, LoadedModel(chat.model, tokenizer, True, "rewriter"))


def test_a_template_without_stop_is_refused(chat):
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with pytest.raises(ConfigError, match="never learn to stop"):
        encode(row("a", "b"), LoadedModel(chat.model, tokenizer, True, "endless"))


def test_rows_that_cannot_be_used_are_named(plain):
    with pytest.raises(DataError, match=r"no demonstration.*model=smollm2"):
        encode(row("1", None), plain)
    with pytest.raises(DataError, match="no chat template"):
        encode(row([{"role": "user", "content": "a"}], "b"), plain)
    with pytest.raises(DataError, match="lacks a symbol"):
        encode(row("1", "é"), plain)
    with pytest.raises(DataError, match="nothing to train on"):
        make_batches([row("long prompt", "x")], plain, SFTSettings(steps=1, batch_size=1, max_length=5), 0)


def test_costs_count_what_is_forwarded_and_trained(plain):
    rows = [row("12", "3"), row("1234", "567")]  # 4 tokens with 2 trained, 8 with 4
    batches = make_batches(rows, plain, SFTSettings(steps=3, batch_size=2), seed=0)
    assert batches.forwarded_tokens == [0, 12, 24, 36]
    assert batches.trained_tokens == [0, 6, 12, 18]


def test_every_row_is_seen_once_per_epoch(plain):
    rows = [row(str(i), "0") for i in range(6)]
    batches = make_batches(rows, plain, SFTSettings(epochs=2, batch_size=4), seed=1)
    seen = [tuple(ids) for ids in batches.dataset["input_ids"]]
    assert len(seen) == 12
    assert len(set(seen[:6])) == len(set(seen[6:])) == 6
    assert seen[:6] != seen[6:]


@pytest.mark.parametrize(
    "wrong", [{}, {"steps": 1, "epochs": 1.0}, {"steps": 1, "schedule": "step"}, {"steps": 1, "rows_per_device": 48}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError):
        SFTSettings(**wrong)


def train(loaded, folder, *, rows=None, seed=0, resume=None, callbacks=(), **settings):
    loaded = LoadedModel(copy.deepcopy(loaded.model), loaded.tokenizer, loaded.chat, loaded.name)
    usual = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "save_steps": 3}
    cfg = SFTSettings(**(usual | settings))
    rows = rows or [row(f"{a}+{b}=", str(a + b)) for a in range(5) for b in range(3)]
    metrics = train_sft(
        loaded, rows, cfg, output_dir=folder, seed=seed, progress=False, resume=resume, callbacks=callbacks
    )
    return {k: v.clone() for k, v in loaded.model.state_dict().items()}, metrics


def same(a, b):
    return all(bool((a[k] == b[k]).all()) for k in a)


def test_same_seed_same_weights_and_untouched_streams(plain, tmp_path):
    import numpy as np
    import torch

    def streams():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def reset():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    reset()
    expected = streams()
    reset()
    first, metrics = train(plain, tmp_path / "a", save_steps=0)
    assert streams() == expected
    again, _ = train(plain, tmp_path / "b", save_steps=0)
    other, _ = train(plain, tmp_path / "c", seed=1, save_steps=0)
    assert same(first, again)
    assert not same(first, other)
    assert metrics["steps"] == 6 and metrics["trained_tokens"] == 6 * 4 * 2


def test_micro_batches_do_not_change_the_update(plain, tmp_path):
    whole, _ = train(plain, tmp_path / "a", steps=1, save_steps=0)
    parts, _ = train(plain, tmp_path / "b", steps=1, save_steps=0, rows_per_device=2)
    assert max(float((whole[k] - parts[k]).abs().max()) for k in whole) < 1e-5


def test_resumed_run_equals_the_uninterrupted_one(plain, tmp_path):
    from transformers import TrainerCallback

    class StopAt4(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    whole, expected = train(plain, tmp_path / "a")
    cut, half = train(plain, tmp_path / "b", callbacks=[StopAt4()])
    assert half["steps"] == 4 and not same(whole, cut)
    resumed, metrics = train(plain, tmp_path / "b", resume=tmp_path / "b" / "checkpoint-3")
    assert same(whole, resumed)
    assert metrics["trained_tokens"] == expected["trained_tokens"]


def test_logs_carry_the_exact_costs(plain, tmp_path):
    from transformers import TrainerCallback

    class Logs(TrainerCallback):
        seen: list[dict] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append({"step": state.global_step, **logs})

    _, metrics = train(plain, tmp_path, callbacks=[Logs()], logging_steps=2, save_steps=0)
    steps = [log for log in Logs.seen if "loss" in log]
    assert [log["step"] for log in steps] == [2, 4, 6]
    assert [log["cost/trained_tokens"] for log in steps] == [16, 32, 48]
    assert steps[-1]["cost/forwarded_tokens"] == metrics["forwarded_tokens"] == 6 * 4 * 6


def test_a_loss_that_is_not_finite_stops_the_run(plain, tmp_path):
    broken = LoadedModel(copy.deepcopy(plain.model), plain.tokenizer, False, "broken")
    broken.model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        train(broken, tmp_path, logging_steps=1, save_steps=0)
