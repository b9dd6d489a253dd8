"""Training an SAE: it learns, it goes on to the bit, it is made once, and what cannot be trained is refused."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import random
import signal
import time

import pytest
import torch

from experiments.artefacts import cache_root
from experiments.capture import Passage, pieces
from experiments.sae_files import SAEFolder, read_sae, write_sae
from experiments.sae_training import Ready, SAETraining, Stream, Texts, Trainer, split
from experiments.saes import cross_entropy, fitted, quality, trained_sae, warnings, weights_digest
from experiments.tokenizers import tiny_tokenizer
from experiments.weights import LoadedModel
from methods.errors import ConfigError, DataError, RecordError, RunError
from methods.sts.sae import SAE

SETTINGS = SAETraining(
    steps=24, batch=64, buffer=512, passes=2, latents=64, k=4, learning_rate=3e-3, warmup=2, dead_after=500,
    context=32, eval_tokens=500, save_every=7,
)  # fmt: skip


def texts_of(count=40, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choice("abcdefgh ij") for _ in range(rng.randint(0, 120))) for _ in range(count)]


def load(seed=0, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LoadedModel(LlamaForCausalLM(config).eval().to(dtype), tokenizer, False, "tiny")


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture
def documents(loaded):
    return Texts(texts_of(), loaded.tokenizer, 32)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


class Stop:
    """Asks to stop at the n-th look."""

    def __init__(self, after):
        self.left = after

    @property
    def received(self):
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None


def test_it_learns_and_folds_its_scale_in(loaded, documents, tmp_path):
    trainer = Trainer(loaded, documents, dataclasses.replace(SETTINGS, steps=80), tmp_path)
    seen = []
    sae = trainer.run(lambda step, total, metrics: seen.append(metrics.get("loss")))
    losses = [x for x in seen if x is not None]
    assert losses[-1] < 0.5 * losses[0]
    assert torch.allclose(sae.W_dec.norm(dim=1) * trainer.scale, torch.ones(64), atol=1e-4)
    found = quality(sae, loaded.model, documents, trainer.held_out, 500)
    assert found["fvu"] < 0.6 and 0 < found["l0"] <= 4 and 0 <= found["dead"] < 0.9
    recovered = (found["ce_mean"] - found["ce_sae"]) / (found["ce_mean"] - found["ce"])
    assert found["loss_recovered"] == pytest.approx(recovered, nan_ok=True) or found["ce_mean"] <= found["ce"]


@pytest.mark.parametrize("after, revived", [(0, True), (10**6, False)])
def test_latents_that_have_not_fired_for_long_are_trained_by_aux(loaded, documents, tmp_path, after, revived):
    seen = []
    settings = dataclasses.replace(SETTINGS, steps=4, dead_after=after)
    Trainer(loaded, documents, settings, tmp_path).run(lambda step, total, metrics: seen.append(metrics.get("aux", 0)))
    assert any(seen) is revived


def test_the_gradient_of_a_decoder_row_has_no_part_along_it(loaded, documents, tmp_path):
    trainer = Trainer(loaded, documents, dataclasses.replace(SETTINGS, steps=1, learning_rate=1e-9), tmp_path)
    rows = torch.nn.functional.normalize(trainer.run().W_dec, dim=1)
    moment = trainer.optimizer.state[trainer.sae.W_dec]["exp_avg"]
    assert moment.norm() > 0 and (moment * rows).sum(1).abs().max() < 1e-4 * moment.norm()


@pytest.mark.parametrize("keys", [{}, {"dtype": "bfloat16"}, {"save_every": 8, "passes": 1}])
@pytest.mark.parametrize("after", [0, 5, 20])
def test_a_stopped_training_goes_on_to_the_bit(loaded, documents, tmp_path, keys, after):
    settings = dataclasses.replace(SETTINGS, **keys)
    whole = Trainer(loaded, documents, settings, tmp_path / "whole").run()
    stopped = 0
    while True:
        torch.manual_seed(stopped)  # the global stream does not matter
        try:
            sae = Trainer(loaded, documents, settings, tmp_path / "parts").run(
                stop=Stop(after) if stopped < 3 else None
            )
            break
        except KeyboardInterrupt as stop:
            assert stop.args == (signal.SIGTERM,)
            stopped += 1
    assert stopped and same(whole, sae)


def test_a_stop_while_a_block_is_read_leaves_out_no_text(loaded, documents, tmp_path):
    whole = Trainer(loaded, documents, SETTINGS, tmp_path / "whole").run()
    # The blocks end at steps 16 and 32: looks 17 and 18 are behind step 16 and while the second block is read.
    for after in (16, 17, 18):
        with pytest.raises(KeyboardInterrupt):
            Trainer(loaded, documents, SETTINGS, tmp_path / f"{after}").run(stop=Stop(after))
        assert same(whole, Trainer(loaded, documents, SETTINGS, tmp_path / f"{after}").run())


def test_a_checkpoint_of_something_else_is_refused(loaded, documents, tmp_path):
    def start(settings, key, stop=None):
        Trainer(loaded, documents, settings, tmp_path, key).run(stop=stop)

    with pytest.raises(KeyboardInterrupt):
        start(SETTINGS, "a", Stop(12))
    for settings, key in ((SETTINGS, "b"), (dataclasses.replace(SETTINGS, seed=1), "a")):
        with pytest.raises(RecordError, match="another SAE"):
            start(settings, key)
    (state,) = tmp_path.glob("checkpoints/step_*/state.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(RecordError, match="damaged"):
        start(SETTINGS, "a")


def test_it_is_made_once_and_goes_on_in_the_cache(loaded, documents, cache, capsys):
    class AtOnce(Stop):
        def __init__(self):
            super().__init__(12)

    with pytest.raises(KeyboardInterrupt):
        trained_sae(loaded, documents, SETTINGS, stop=AtOnce())
    assert list(cache_root().glob("sae/*.work/checkpoints/step_*"))
    found = trained_sae(loaded, documents, SETTINGS)
    assert not list(cache_root().glob("sae/*.work"))
    assert found.metadata["quality"]["tokens"] > 0 and found.metadata["training"]["steps"] == 24
    capsys.readouterr()
    again = trained_sae(loaded, documents, dataclasses.replace(SETTINGS, save_every=3))
    assert again.path == found.path and same(again.sae, found.sae) and "step" not in capsys.readouterr().err
    other = trained_sae(loaded, Texts(texts_of(seed=1), loaded.tokenizer, 32), SETTINGS)
    assert other.path != found.path
    assert weights_digest(loaded.model) == weights_digest(load().model) != weights_digest(load(1).model)


def test_from_a_bfloat16_model(tmp_path):
    loaded = load(dtype=torch.bfloat16)
    documents = Texts(texts_of(), loaded.tokenizer, 32)
    sae = Trainer(loaded, documents, dataclasses.replace(SETTINGS, dtype="bfloat16"), tmp_path).run()
    found = quality(sae, loaded.model, documents, range(8), 300)
    assert sae.W_dec.dtype == torch.float32 and math.isfinite(found["fvu"])


def test_blocks_are_the_texts_in_an_order_of_each_epoch(loaded, documents):
    from experiments.capture import Capture

    chosen, _ = split(documents, SETTINGS)
    stream = Stream(Capture(loaded.model, 1), documents, chosen, SETTINGS)
    tokens = sum(p.tokens for i in chosen for p in documents.passages(i))
    read = list(stream._next_passages())
    assert sum(p.tokens for p in read) >= 512 and stream.cursor != (0, 0, 0)
    # Two epochs further every text has been read the same number of times.
    counts: dict[tuple, int] = {}
    stream.cursor = (0, 0, 0)
    while stream.cursor[0] < 2:
        for p in stream._next_passages():
            counts[tuple(p.ids)] = counts.get(tuple(p.ids), 0) + 1
    assert set(counts) == {tuple(p.ids) for i in chosen for p in documents.passages(i)} and tokens > 1000
    assert max(counts.values()) <= 4


def test_texts_longer_than_the_context_are_cut(loaded):
    documents = Texts(["a" * 1000, "b" * 10], loaded.tokenizer, 32)
    assert [p.tokens for p in documents.passages(0)] == [31] * 32 + [8]
    assert SETTINGS.of(loaded.model).context == 32 and SAETraining(context=999).of(loaded.model).context == 64


def test_what_follows_the_model(loaded):
    found = SAETraining().of(loaded.model)
    assert (found.layer, found.latents, found.k, found.k_aux) == (1, 128, 2, 8)
    assert found.learning_rate == pytest.approx(2e-4 / math.sqrt(128 / 2**14))


@pytest.mark.parametrize(
    "keys",
    [
        {"steps": 0}, {"batch": 0}, {"k": 0}, {"latents": 0}, {"layer": -1}, {"learning_rate": 0.0},
        {"learning_rate": math.nan}, {"aux": -1}, {"decay": 1.5}, {"held_out": 0.0}, {"dtype": "float8"},
        {"batch": 9, "buffer": 8}, {"warmup": -1}, {"eval_tokens": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range(keys):
    with pytest.raises(ConfigError, match=r"sae\."):
        SAETraining(**keys)


@pytest.mark.parametrize("keys", [{"layer": 3}, {"latents": 4, "k": 5}])
def test_settings_that_do_not_fit_the_model(loaded, keys):
    with pytest.raises(ConfigError, match=r"sae\."):
        SAETraining(**keys).of(loaded.model)


@pytest.mark.parametrize("texts", [[], ["a"], ["", ""], [""] * 5])
def test_texts_without_tokens(loaded, tmp_path, texts):
    with pytest.raises(DataError, match=r"texts"):
        Trainer(loaded, Texts(texts, loaded.tokenizer, 32), SETTINGS, tmp_path).run()


def test_nan_activations_name_layer_and_dtype(documents, tmp_path):
    broken = load(dtype=torch.bfloat16)
    with torch.no_grad():
        broken.model.model.layers[0].mlp.down_proj.weight[0, 0] = math.inf
    with pytest.raises(DataError, match=r"NaN or infinity.*layer 1, bfloat16"):
        Trainer(broken, documents, SETTINGS, tmp_path).run()


def test_equal_vectors_have_no_variance_to_explain(loaded, tmp_path):
    same_token = Ready([Passage([3, 5], [(1, 2)])] * 40)
    with pytest.raises(DataError, match="all the same"):
        Trainer(loaded, same_token, SETTINGS, tmp_path).run()


def test_a_loss_that_is_not_finite_stops_the_run(loaded, documents, tmp_path):
    with pytest.raises(RunError, match=r"not finite.*learning_rate"):
        Trainer(loaded, documents, dataclasses.replace(SETTINGS, learning_rate=1e30, aux=0.0), tmp_path).run()


def test_an_sae_of_another_model_is_refused(loaded, tmp_path):
    def folder(width, layer):
        tensors = {"W_enc": torch.ones(width, 4), "b_enc": torch.ones(4), "W_dec": torch.ones(4, width)}
        return read_sae(
            write_sae(SAE("relu", tensors | {"b_dec": torch.ones(width)}, layer=layer), tmp_path / f"{width}_{layer}")
        )

    assert isinstance(fitted(folder(16, 2), loaded.model), SAEFolder)
    with pytest.raises(ConfigError, match=r"does not fit the model.*width 8, model 16"):
        fitted(folder(8, 2), loaded.model)
    with pytest.raises(ConfigError, match=r"layer 3 of a model with layers 0 to 2"):
        fitted(folder(16, 3), loaded.model)


def test_a_bad_sae_is_said_to_be_one():
    assert warnings({"fvu": 0.2, "dead": 0.1}) == [] and len(warnings({"fvu": 0.7, "dead": 0.8})) == 2
    assert len(warnings({"fvu": math.nan, "dead": 0.1})) == 1 and warnings({}) == []


def test_cross_entropy_is_that_of_the_model(loaded):
    ids = loaded.tokenizer("abcabc fgh", add_special_tokens=False)["input_ids"]
    (passage,) = pieces(ids, 32, [1])
    with torch.no_grad():
        expected = loaded.model(torch.tensor([passage.ids]), labels=torch.tensor([[-100, -100, *ids[1:]]])).loss
    assert cross_entropy(loaded.model, 1, [passage]) == pytest.approx(float(expected), abs=1e-5)
    assert cross_entropy(loaded.model, 1, [passage, passage], lambda z: z) == pytest.approx(float(expected), abs=1e-5)
    assert math.isnan(cross_entropy(loaded.model, 1, []))


def test_killed_and_started_again_it_gives_the_same_bits(loaded, cache, tmp_path, monkeypatch):
    """kill -9 at three places; the processes are forks, which need no second to start."""
    documents = Texts(texts_of(200), loaded.tokenizer, 32)
    settings = dataclasses.replace(SETTINGS, steps=160, save_every=10)

    def start() -> multiprocessing.Process:
        process = multiprocessing.get_context("fork").Process(target=trained_sae, args=(loaded, documents, settings))
        process.start()
        return process

    killed = 0
    for place in (10, 50, 90):
        process, until = start(), time.time() + 300
        while process.is_alive() and time.time() < until:
            steps = [int(p.name[5:]) for p in cache_root().glob("sae/*.work/checkpoints/step_*")]
            if steps and max(steps) >= place:
                process.kill()
            time.sleep(0.01)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed == 3 and not list(cache_root().glob("sae/*/cfg.json"))
    parts = trained_sae(loaded, documents, settings)
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "other"))
    whole = trained_sae(loaded, documents, settings)
    assert same(whole.sae, parts.sae) and whole.metadata == parts.metadata and whole.path != parts.path
