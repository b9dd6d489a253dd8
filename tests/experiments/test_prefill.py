"""Prefilled answers: the same ids in training, evaluation, fine-tuning and through every engine's encoder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from experiments.engines.base import Request, encode
from experiments.engines.openai import OpenAIEngine
from experiments.run import PromptWrapper
from experiments.tasks.jsonl import Jsonl
from experiments.tokenizers import chat_ids, plain_text, prefilled, prompt_ids, tiny_tokenizer
from experiments.tokenizers import encode as encode_row
from methods.errors import ConfigError

BEGUN = [{"role": "user", "content": "3+4="}, {"role": "assistant", "content": "ab"}]


def loaded(chat):
    tokenizer = tiny_tokenizer(chat=chat)
    config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
    return SimpleNamespace(tokenizer=tokenizer, chat=chat, name="x", model=SimpleNamespace(generation_config=config))


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{k}+1=", "answer": str(k + 1)}) + "\n" for k in range(20)))
    return lambda **keys: Jsonl(path=str(path), **keys)


def test_a_prefill_makes_a_chat_that_ends_in_it(task):
    row = task(prefill="<think>\n").rows("train", 0)[0]
    assert [m["role"] for m in row.prompt] == ["user", "assistant"]
    assert row.prompt[1]["content"] == "<think>\n" and prefilled(row.prompt)
    plain = task().rows("train", 0)[0]
    assert plain.prompt == row.prompt[0]["content"] and (plain.id, plain.answer) == (row.id, row.answer)


def test_a_chat_model_goes_on_with_it():
    model = loaded(chat=True)
    text = model.tokenizer.decode(chat_ids(BEGUN, model.tokenizer))
    assert text == "<|user|>3+4=<eos><|assistant|>ab"
    expected = chat_ids(BEGUN, model.tokenizer)
    assert encode(model.tokenizer, Request(messages=BEGUN), chat=True) == expected == prompt_ids(BEGUN, model)
    # Without a prefill all is as before.
    assert encode(model.tokenizer, Request(messages=BEGUN[:1]), chat=True) == prompt_ids(BEGUN[:1], model)
    assert expected[:-2] == prompt_ids("3+4=", model)


def test_a_plain_model_reads_it_behind_the_prompt():
    model = loaded(chat=False)
    expected = model.tokenizer("3+4=ab")["input_ids"]
    assert encode(model.tokenizer, Request(messages=BEGUN), chat=False) == expected == prompt_ids(BEGUN, model)
    assert PromptWrapper(False)(BEGUN) == "3+4=ab" and PromptWrapper(True)(BEGUN) == BEGUN
    assert plain_text([*BEGUN, *BEGUN]) is None
    with pytest.raises(ConfigError, match="no chat template"):
        PromptWrapper(False)(BEGUN[:1])


@pytest.mark.parametrize("chat", [True, False])
def test_a_demonstration_goes_on_with_it(chat):
    model = loaded(chat)
    row = encode_row({"prompt": BEGUN, "completion": "7"}, model)
    begun = prompt_ids(BEGUN, model)
    assert row["input_ids"] == [*begun, *model.tokenizer("7")["input_ids"], model.tokenizer.eos_token_id]
    assert row["labels"][: len(begun)] == [-100] * len(begun) and row["labels"][len(begun) :] == row["input_ids"][-2:]


@pytest.mark.parametrize("chat", [True, False])
def test_the_trainer_generates_behind_it(chat, make_trainer):
    trainer = make_trainer()
    model = loaded(chat)
    trainer.processing_class = trainer._tokenizer = model.tokenizer
    trainer.wrap_prompt = PromptWrapper(chat)
    begun, plain = trainer.tokenize([BEGUN])[0], trainer.tokenize(["3+4="])[0]
    assert begun == prompt_ids(BEGUN, model) and plain == prompt_ids("3+4=", model)
    if chat:
        assert trainer.tokenize([BEGUN, "3+4="]) == [begun, plain]


def test_an_endpoint_is_told_to_go_on():
    engine = OpenAIEngine(url="http://x/v1", model="m")
    body = engine._body(Request(messages=BEGUN))
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert "continue_final_message" not in engine._body(Request(messages=BEGUN[:1]))
