"""Scalar reward models: the loss, what is read, resume, how a run is measured, and what it is good for afterwards."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest

from experiments.engines.scores import ScoreEngine, as_request
from experiments.reward_model import Measure, classifier, make_batches, pair_of, train_reward_model
from experiments.sft import SFTSettings
from experiments.tasks.base import Row, Task
from experiments.tokenizers import tiny_tokenizer
from experiments.weights import LoadedModel, export
from methods.errors import ConfigError, DataError


def row(k: int, chosen: str = "aa", rejected: str = "b", **meta) -> Row:
    return Row(str(k), f"say {k}", None, meta={"chosen": chosen, "rejected": rejected, **meta})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> LoadedModel:
    """A tiny language model in a folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer, folder = tiny_tokenizer(chat=True), tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    export(model, tokenizer, folder)
    return LoadedModel(model, tokenizer, True, "test", folder)


ROWS = [row(k, "ab" * (1 + k % 3), "ba" * (1 + k % 2)) for k in range(12)]


def train(loaded, folder, *, seed=0, callbacks=(), resume=None, **changes):
    model = classifier(loaded, seed)
    cfg = SFTSettings(
        **{"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "save_steps": 3}
        | changes
    )
    metrics = train_reward_model(model, ROWS, cfg, output_dir=folder, seed=seed, callbacks=callbacks, resume=resume)
    return model, metrics


def weights(model):
    return {k: v.clone() for k, v in model.model.state_dict().items()}


def same(a, b):
    return all(bool((a[k] == b[k]).all()) for k in a)


def test_a_pair_is_read_as_a_judge_reads_it(loaded):
    assert pair_of(ROWS[0]) == ("say 0", "ab", "ba")
    assert pair_of(Row("1", "p", "good", meta={"rejected": "bad"})) == ("p", "good", "bad")
    cfg = SFTSettings(steps=1, batch_size=12)
    batches = make_batches(ROWS, loaded, cfg, 0)
    found = {loaded.tokenizer.decode(ids) for ids in batches.dataset["chosen_ids"]}
    assert "<|user|>say 0<eos><|assistant|>ab<eos>" in found
    engine = ScoreEngine(classifier(loaded, 0).model, loaded.tokenizer)
    ids = engine._ids(as_request("say 0", "ab").messages or [])
    assert ids in batches.dataset["chosen_ids"]
    assert batches.forwarded_tokens[1] == sum(
        len(ids) for side in ("chosen_ids", "rejected_ids") for ids in batches.dataset[side]
    )
    cut = make_batches(ROWS, loaded, SFTSettings(steps=1, batch_size=12, max_length=3), 0)
    assert cut.truncated_rows == 12 and all(
        ids[-1] == loaded.tokenizer.eos_token_id for ids in cut.dataset["chosen_ids"]
    )


def test_the_loss_is_bradley_terry(loaded, tmp_path):
    model, metrics = train(loaded, tmp_path, steps=1, batch_size=12, save_steps=0, learning_rate=0.0)
    engine = ScoreEngine(model.model, model.tokenizer)
    asked = [as_request(r.prompt, r.meta[side]) for r in ROWS for side in ("chosen", "rejected")]
    scores = [float(answers[0].text) for answers in engine.generate(asked)]
    gaps = [c - r for c, r in zip(scores[::2], scores[1::2], strict=True)]
    assert metrics["loss"] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 12, abs=1e-5)


def test_seeds_micro_batches_and_resume(loaded, tmp_path):
    from transformers import TrainerCallback

    class StopAt4(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    whole, expected = train(loaded, tmp_path / "a")
    cut, half = train(loaded, tmp_path / "b", callbacks=[StopAt4()])
    assert half["steps"] == 4 and not same(weights(whole), weights(cut))
    resumed, metrics = train(loaded, tmp_path / "b", resume=tmp_path / "b" / "checkpoint-3")
    assert same(weights(whole), weights(resumed)) and metrics["trained_tokens"] == expected["trained_tokens"]
    assert not same(weights(whole), weights(train(loaded, tmp_path / "c", seed=1)[0]))
    one, parts = (
        weights(train(loaded, tmp_path / name, steps=1, save_steps=0, rows_per_device=rows)[0])
        for name, rows in (("d", None), ("e", 2))
    )
    assert max(float((one[k] - parts[k]).abs().max()) for k in one) < 1e-5


def test_a_reward_model_goes_on_from_its_own_head(loaded, tmp_path):
    model, _ = train(loaded, tmp_path / "run", save_steps=0)
    export(model.model, model.tokenizer, tmp_path / "rm")
    again = classifier(LoadedModel(loaded.model, loaded.tokenizer, True, "rm", tmp_path / "rm"), 7)
    assert same(weights(model), weights(again))
    assert not same(weights(classifier(loaded, 0)), weights(classifier(loaded, 1)))  # a new head is drawn


def test_a_tie_is_wrong_and_the_margin_is_kept(loaded):
    class Pairs(Task):
        def rows(self, split, seed):
            return [*ROWS[:4], row(4)]

        def score(self, text, row):
            return float(text == row.meta["chosen"])

        def metrics(self, text, row):
            return {"length": float(len(text))}

    model = classifier(loaded, 0)
    cfg = SimpleNamespace(
        eval={"split": "eval", "seed": 0, "items": None, "batch_size": 4}, objective=SimpleNamespace(max_length=64)
    )
    cfg.eval = type("E", (dict,), {"__getattr__": dict.__getitem__})(cfg.eval)
    frame, extra = Measure(cfg, Pairs(), model)(0)  # type: ignore[misc, arg-type]
    assert ((frame["margin"] > 0) == (frame["score"] == 1)).all() and extra["eval/score"] == frame["score"].mean()
    with __import__("torch").no_grad():
        model.model.score.weight.zero_()
    frame, _ = Measure(cfg, Pairs(), model)(0)  # type: ignore[misc, arg-type]
    assert (frame["score"] == 0).all() and (frame["margin"] == 0).all()


@pytest.mark.parametrize(
    "bad", [Row("1", "p", "a"), row(1, rejected=" "), row(1, rejected="aa"), row(1, chosen=3), row(1, rejected=None)]
)
def test_rows_that_are_no_pairs(bad, loaded):
    with pytest.raises(DataError, match="row 1"):
        pair_of(bad)


def test_a_benchmark_is_never_trained_on(loaded, tmp_path):
    """The only split of RewardBench on the hub invites it; measuring a reward model on its rows is fine."""
    from experiments.tasks.jsonl import Jsonl

    file = tmp_path / "rewardbench.jsonl"
    one = {"id": 1, "prompt": "p", "chosen": "ab", "rejected": "b", "subset": "mt-bench-hard"}
    file.write_text(json.dumps(one) + "\n" + json.dumps(one | {"id": 2}) + "\n")
    rows = Jsonl(path=str(file), answer_column="chosen", eval_fraction=0).rows("train", 0)
    assert len(rows) == 2 and pair_of(rows[0]) == ("p", "ab", "b")
    cfg = SFTSettings(steps=1, batch_size=2)
    with pytest.raises(DataError, match=r"never trained on.*mt-bench-hard"):
        make_batches(rows, loaded, cfg, 0)


def test_what_cannot_become_a_reward_model(loaded, tmp_path):
    adapter = copy.copy(loaded)
    adapter.path = tmp_path
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="trained whole"):
        classifier(adapter, 0)
    with pytest.raises(ConfigError, match="cannot become"):
        classifier(LoadedModel(loaded.model, loaded.tokenizer, True, "none", tmp_path / "none"), 0)


def test_it_scores_completions_as_a_reward(loaded, tmp_path):
    from experiments import rewards

    model, _ = train(loaded, tmp_path / "run", save_steps=0)
    export(model.model, model.tokenizer, tmp_path / "arm" / "seed0" / "model")
    entry = {"name": "rm", "function": "reward_model", "kwargs": {"model": str(tmp_path / "arm")}}
    (spec,) = rewards.build([entry], Task())
    engine = ScoreEngine(model.model, model.tokenizer)
    expected = [float(engine.generate([as_request("say 1", text)])[0][0].text) for text in ("ab", "ba")]
    assert spec.fn(["ab", "ba"], [ROWS[1]] * 2) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        rewards.build([entry | {"kwargs": {"model": str(tmp_path / "nowhere")}}], Task())
