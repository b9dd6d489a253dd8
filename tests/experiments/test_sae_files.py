"""SAEs on disk: both layouts give the sheet's features, a written one comes back, others are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.sae_files import layer_of, read_sae, write_sae
from methods.errors import ConfigError, DataError
from methods.sts.sae import SAE, SHAPES

W = torch.tensor([[1, 0, 0, 0.6, -0.8, 0.8], [0, 1, 0, 0.8, 0.6, 0.6], [0, 0, 1, 0, 0, 0]])
B_ENC, B_DEC = torch.tensor([0, -0.1, 0, -0.3, 0.05, -0.7]), torch.tensor([0.1, -0.2, 0.3])
Z = torch.tensor([[1.1, 0.8, 0.3], [-0.9, 1.8, 0.3], [0.1, -1.2, 2.3], [2.1, -0.2, 1.3]])
H = torch.tensor([[1, 0, 0, 1.1, 0, 0], [0, 1.9, 0, 0, 2.05, 0], [0, 0, 2, 0, 0, 0], [2, 0, 1, 0, 0, 0]])
TENSORS = {"W_enc": W, "b_enc": B_ENC, "W_dec": W.T.contiguous(), "b_dec": B_DEC}
SIX = {
    "architecture": "topk",
    "d_in": 3,
    "d_sae": 6,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "k": 2,
    "rescale_acts_by_decoder_norm": False,
    "metadata": {"hook_name": "blocks.4.hook_resid_post", "model_name": "m", "sae_lens_version": "6.54.12"},
}
FIVE = {
    "architecture": "standard",
    "d_in": 3,
    "d_sae": 6,
    "hook_name": "blocks.4.hook_resid_post",
    "hook_layer": 4,
    "hook_head_index": None,
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": 2},
    "normalize_activations": False,
    "finetuning_scaling_factor": False,
}
SPARSIFY = {"activation": "topk", "expansion_factor": 2, "num_latents": 0, "k": 2, "d_in": 3, "transcode": False}


def saelens(folder, config, tensors=TENSORS):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(dict(tensors), folder / "sae_weights.safetensors")
    return folder


def sparsify(folder, config=SPARSIFY, **tensors):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    found = {"encoder.weight": W.T.contiguous(), "encoder.bias": B_ENC, "W_dec": W.T.contiguous().clone()}
    save_file(found | {"b_dec": B_DEC} | tensors, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("config", [SIX, FIVE, FIVE | {"hook_point": FIVE["hook_name"], "hook_name": None}])
def test_saelens_folders_give_the_worked_features(tmp_path, config):
    found = read_sae(saelens(tmp_path / "sae", config))
    assert torch.allclose(found.sae.encode(Z), H, atol=1e-6)
    assert (found.sae.architecture, found.sae.layer, found.hook) == ("topk", 4, "blocks.4.hook_resid_post")


def test_sparsify_folders_give_the_worked_features(tmp_path):
    found = read_sae(sparsify(tmp_path / "layers.7"))
    assert torch.allclose(found.sae.encode(Z), H, atol=1e-6)
    assert (found.sae.layer, found.sae.latents, found.sae.k) == (7, 6, 2)
    assert read_sae(sparsify(tmp_path / "model.layers.3", SPARSIFY | {"num_latents": 6})).sae.layer == 3


def test_bfloat16_weights_are_read_as_float32(tmp_path):
    folder = saelens(tmp_path / "sae", SIX, {k: v.bfloat16() for k, v in TENSORS.items()})
    assert torch.allclose(read_sae(folder).sae.encode(Z), H, atol=0.02)


@pytest.mark.parametrize("architecture", list(SHAPES))
@pytest.mark.parametrize("keys", [{}, {"centred": False}, {"normalisation": "layer_norm"}])
def test_what_is_written_is_read_back(tmp_path, architecture, keys):
    sizes = {"d": 3, "s": 8}
    tensors = {name: torch.randn([sizes[a] for a in axes]) for name, axes in SHAPES[architecture].items()}
    k = 2 if architecture == "topk" else None
    sae = SAE(architecture, tensors, k=k, layer=5, **keys)
    found = read_sae(write_sae(sae, tmp_path / "sae", {"model_name": "m", "quality": {"fvu": float("nan")}}))
    assert torch.equal(found.sae.encode(Z), sae.encode(Z)) and found.sae.layer == 5
    assert torch.equal(found.sae.reconstruct(Z)[1], sae.reconstruct(Z)[1])
    assert found.metadata["model_name"] == "m" and found.metadata["quality"] == {"fvu": None}
    assert set(load_file(tmp_path / "sae" / "sae_weights.safetensors")) == set(SHAPES[architecture])


def test_batch_topk_is_saved_as_jumprelu_and_read_so(tmp_path):
    config = {k: v for k, v in SIX.items() if k not in ("k", "rescale_acts_by_decoder_norm")}
    config["architecture"] = "jumprelu"
    found = read_sae(saelens(tmp_path / "sae", config, TENSORS | {"threshold": torch.full((6,), 1.0)}))
    pre = torch.relu((Z - B_DEC) @ W + B_ENC)
    assert torch.allclose(found.sae.encode(Z), torch.where(pre > 1.0, pre, 0.0), atol=1e-6)


def test_the_scale_of_expected_average_is_taken_as_folded_in(tmp_path, capsys):
    for value in ("expected_average_only_in", True):
        found = read_sae(saelens(tmp_path / "sae", SIX | {"normalize_activations": value}))
        assert found.sae.normalisation == "none" and "folded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.25.hook_resid_post", 25),
        ("blocks.25.hook_resid_pre", 24),
        ("model.layers.25", 25),
        ("layers.25", 25),
        ("transformer.h.3", 3),
        ("resid_post_layer_25", 25),
    ],
)
def test_hook_names(hook, layer):
    assert layer_of(hook) == layer


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.2.attn.hook_z",
        "blocks.2.hook_mlp_out",
        "blocks.0.hook_resid_pre",
        "layers.2.mlp",
        "blocks.2.ln2.hook_normalized",
        "",
        "blocks.2.hook_resid_post (head 3)",
    ],
)
def test_other_hooks_are_refused(hook):
    with pytest.raises(DataError, match="does not read the residual stream"):
        layer_of(hook)


def junk_cases(tmp_path):
    six = dict(SIX)
    yield tmp_path / "missing", "no folder"
    empty = tmp_path / "empty"
    empty.mkdir()
    yield empty, "configuration of an SAE cannot be read"
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "cfg.json").write_text("{}")
    (tmp_path / "weightless" / "ae.pt").write_bytes(b"pickle")
    yield tmp_path / "weightless", "only safetensors are read"
    for name, config, words in (
        ("json", "{junk", "no JSON"),
        ("list", "[]", "JSON object"),
        ("transcoder", six | {"architecture": "transcoder"}, "architecture"),
        ("activation", FIVE | {"activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ("width", six | {"d_in": 5}, "d_in"),
        ("latents", six | {"d_sae": 7}, "d_sae"),
        ("reshape", six | {"reshape_activations": "hook_z"}, "hook_z"),
        ("k", six | {"k": 9}, "keeps k features"),
        ("norm", six | {"normalize_activations": "weird"}, "weird"),
        ("metadata", six | {"metadata": {}}, "residual stream"),
        ("mlp", six | {"metadata": {"hook_name": "blocks.1.hook_mlp_out"}}, "hook_mlp_out"),
        ("scaling", FIVE | {"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
    ):
        yield saelens(tmp_path / name, config), words
    broken = saelens(tmp_path / "broken", six)
    (broken / "sae_weights.safetensors").write_bytes(b"junk")
    yield broken, "weights of an SAE cannot be read"
    yield saelens(tmp_path / "nan", six, TENSORS | {"b_dec": B_DEC * float("nan")}), "NaN"
    yield saelens(tmp_path / "lacking", six, {"W_dec": W.T.contiguous()}), "lacks tensors"
    yield sparsify(tmp_path / "layers.1", SPARSIFY | {"transcode": True}), "transcode"
    yield sparsify(tmp_path / "layers.2", SPARSIFY | {"activation": "groupmax"}), "groupmax"
    yield sparsify(tmp_path / "layers.3.mlp"), "residual stream"
    yield sparsify(tmp_path / "layers.4", SPARSIFY | {"expansion_factor": 4}), "d_sae"


def test_what_cannot_be_used_is_refused_in_one_paragraph(tmp_path):
    count = 0
    for folder, words in junk_cases(tmp_path):
        with pytest.raises((ConfigError, DataError)) as error:
            read_sae(folder)
        assert words in str(error.value) and "\n" not in str(error.value), folder
        count += 1
    assert count == 22


def test_an_sae_without_a_layer_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="hook name"):
        write_sae(SAE("topk", TENSORS, k=2), tmp_path / "sae")
    assert not (tmp_path / "sae").exists()
