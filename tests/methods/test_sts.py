"""STS: the sheet's worked example, its degenerate cases, and what must always hold."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from methods.errors import ConfigError, DataError
from methods.sts.loss import project_gradient, topk_loss, unit_rows
from methods.sts.sae import SAE, SHAPES, Quality
from methods.sts.scores import (
    FeatureSums,
    PairSums,
    concentration,
    cosine,
    count_for_share,
    mixture,
    overlap,
    pooled,
    released,
    select,
    shift,
    sts_act,
    sts_act_squared,
    sts_icl,
    sts_sup,
)

W = torch.tensor([[1, 0, 0, 0.6, -0.8, 0.8], [0, 1, 0, 0.8, 0.6, 0.6], [0, 0, 1, 0, 0, 0]])
Z = torch.tensor([[1.1, 0.8, 0.3], [-0.9, 1.8, 0.3], [0.1, -1.2, 2.3], [2.1, -0.2, 1.3]])
H0 = torch.tensor([[1, 0, 0, 2, 0.5, 0], [0, 0, 1.5, 2, 0, 0], [0.5, 0, 0, 2.2, 0, 0.3], [0, 1, 0, 1.8, 0, 0]])
H1 = torch.tensor(
    [[1, 2, 0, 2, 0.5, 0.4], [0, 1, 1.5, 2.1, 0, 0.8], [0.5, 1.5, 0, 2, 0, 0.3], [0, 1, 0.2, 1.8, 0, 0.9]]
)
DOMAINS = {  # features without and with the domain's own demonstrations
    "A": ([[0, 1.2, 0, 2, 0, 0.6], [0, 0.8, 0, 1.9, 0, 0.2]], [[0, 2.2, 0, 2, 0, 1.1], [0, 1.5, 0, 1.9, 0, 0.6]]),
    "B": ([[0, 0.7, 0, 2.1, 0, 0.3], [0, 0.5, 0, 2.2, 0.1, 0.1]],
          [[0, 1.1, 0, 2.1, 0, 0.7], [0, 0.9, 0, 2.2, 0.1, 0.4]]),
    "C": ([[0.9, 0.2, 0, 2, 0, 0], [0.4, 0.1, 0, 2.1, 0, 0.2]], [[0.9, 0.6, 0, 2, 0, 0.1], [0.4, 0.3, 0, 2.1, 0, 0.2]]),
    "D": ([[0, 0, 1.1, 2.3, 0, 0], [0, 0.1, 1, 2.4, 0, 0]], [[0, 0.2, 1.1, 2.3, 0, 0], [0, 0.1, 1.2, 2.4, 0, 0.1]]),
    "E": ([[0, 0, 0, 1.7, 1.3, 0.4], [0, 0, 0, 1.8, 1.1, 0.3]],
          [[0, 0.1, 0, 1.7, 1.3, 0.2], [0, 0.3, 0, 1.8, 1.1, 0.3]]),
}  # fmt: skip


def worked_sae(**keys):
    b_enc, b_dec = torch.tensor([0, -0.1, 0, -0.3, 0.05, -0.7]), torch.tensor([0.1, -0.2, 0.3])
    return SAE("topk", {"W_enc": W, "b_enc": b_enc, "W_dec": W.T, "b_dec": b_dec}, **{"k": 2} | keys)


def random_sae(architecture="relu", width=5, latents=12, seed=0, **keys):
    generator = torch.Generator().manual_seed(seed)
    size = {"d": width, "s": latents}
    tensors = {
        name: torch.randn([size[axis] for axis in axes], generator=generator)
        for name, axes in SHAPES[architecture].items()
    }
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    return SAE(architecture, tensors, **({"k": 3} if architecture == "topk" else {}) | keys)


# ---------------------------------------------------------------- the SAE


def test_worked_encoding_reconstruction_and_quality():
    sae = worked_sae()
    h, z_hat = sae.reconstruct(Z)
    expected = [[1, 0, 0, 1.1, 0, 0], [0, 1.9, 0, 0, 2.05, 0], [0, 0, 2, 0, 0, 0], [2, 0, 1, 0, 0, 0]]
    assert torch.allclose(h, torch.tensor(expected), atol=1e-6)
    expected = [[1.76, 0.68, 0.3], [-1.54, 2.93, 0.3], [0.1, -0.2, 2.3], [2.1, -0.2, 1.3]]
    assert torch.allclose(z_hat, torch.tensor(expected), atol=1e-6)
    quality = Quality(sae)
    quality.add(Z[:1], h[:1], z_hat[:1])
    quality.add(Z[1:], h[1:], z_hat[1:])
    found = quality.metrics()
    assert found == pytest.approx({"fvu": 0.246, "l0": 1.75, "dead": 1 / 6, "tokens": 4}, abs=1e-6)
    assert (sae.width, sae.latents) == (3, 6)


def test_worked_ablation_keeps_the_error():
    expected = [[-0.56, -0.08, 0.3], [-0.9, 1.8, 0.3], [0.1, -1.2, 2.3], [0.1, -0.2, 1.3]]
    assert torch.allclose(worked_sae().ablate(Z, [0, 3]), torch.tensor(expected), atol=1e-6)


def test_worked_loss():
    loss = topk_loss(worked_sae(), Z, torch.tensor([False] * 5 + [True]), k_aux=1)
    assert loss.fvu.item() == pytest.approx(0.246, abs=1e-6)
    assert loss.aux.item() == pytest.approx(0.398031, abs=1e-6)
    assert loss.fired_s.tolist() == [True] * 5 + [False]
    assert topk_loss(worked_sae(), Z, torch.zeros(6, dtype=torch.bool), 1).aux.item() == 0


def test_few_dead_latents_weigh_less():
    dead = torch.tensor([False] * 5 + [True])
    one, many = (topk_loss(worked_sae(), Z, dead, k).aux.item() for k in (1, 4))
    assert many == pytest.approx(one / 4)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_encoders_against_plain_formulas(architecture):
    sae, z = random_sae(architecture), torch.randn(7, 5)
    x = (z - sae.b_dec) @ sae.W_enc
    if architecture == "gated":
        expected = (x + sae.b_gate > 0) * ((z - sae.b_dec) @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag).clamp(min=0)
    else:
        pre = x + sae.b_enc
        expected = pre.clamp(min=0) * (pre > (sae.threshold if architecture == "jumprelu" else 0))
    assert torch.allclose(sae.encode(z), expected, atol=1e-5)
    assert torch.allclose(sae.decode(expected), expected @ sae.W_dec + sae.b_dec, atol=1e-5)


@pytest.mark.parametrize("architecture", list(SHAPES))
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_features_are_never_negative_and_ablating_all_leaves_the_error(architecture, normalisation):
    sae = random_sae(architecture, normalisation=normalisation)
    z = torch.randn(9, 5) * 3
    h, z_hat = sae.reconstruct(z)
    assert (h >= 0).all() and torch.equal(h, sae.encode(z))
    if normalisation == "none":
        gone = sae.ablate(z, range(12))
        assert torch.allclose(gone, z - z_hat + sae.b_dec, atol=1e-4)
    assert torch.allclose(sae.ablate(z, []), z)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_a_vector_without_length_or_spread_has_finite_features(normalisation):
    z = torch.zeros(2, 5)
    h, z_hat = random_sae(normalisation=normalisation).reconstruct(z)
    assert torch.isfinite(h).all() and torch.allclose(z_hat, z, atol=1e-4)


def test_uncentred_input():
    sae, z = random_sae(centred=False), torch.randn(4, 5)
    assert torch.allclose(sae.encode(z), (z @ sae.W_enc + sae.b_enc).clamp(min=0), atol=1e-5)


@pytest.mark.parametrize("architecture", list(SHAPES))
def test_folding_keeps_what_it_says(architecture):
    z = torch.randn(6, 5)
    sae, scaled = random_sae(architecture), random_sae(architecture)
    scaled.fold_scale(2.5)
    assert torch.allclose(scaled.encode(z), sae.encode(2.5 * z), atol=1e-4)
    assert torch.allclose(scaled.reconstruct(z)[1], sae.reconstruct(2.5 * z)[1] / 2.5, atol=1e-4)
    if architecture == "topk":
        with pytest.raises(ConfigError, match="norms"):
            sae.fold_decoder_norms()
        unit_rows(sae)
    folded = random_sae(architecture)
    if architecture == "topk":
        unit_rows(folded)
    folded.fold_decoder_norms()
    assert torch.allclose(folded.reconstruct(z)[1], sae.reconstruct(z)[1], atol=1e-4)
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(12), atol=1e-5)
    assert torch.allclose(folded.encode(z), sae.encode(z) * sae.W_dec.norm(dim=1), atol=1e-4)


def test_ranking_by_decoder_norm():
    sae, z = random_sae("topk"), torch.randn(6, 5)
    pre = ((z - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)
    expected = torch.zeros_like(pre).scatter(1, pre.topk(3).indices, pre.topk(3).values.clamp(min=0))
    recon = expected / sae.W_dec.norm(dim=1) @ sae.W_dec + sae.b_dec
    sae.rank_by_decoder_norm()
    assert torch.allclose(sae.encode(z), expected, atol=1e-5)
    assert torch.allclose(sae.reconstruct(z)[1], recon, atol=1e-4)


def test_gradients_do_not_lengthen_decoder_rows():
    sae = random_sae("topk").requires_grad_(True)
    unit_rows(sae)
    topk_loss(sae, torch.randn(8, 5), torch.zeros(12, dtype=torch.bool), 4).fvu.backward()
    project_gradient(sae)
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-5
    assert sae.W_dec.grad.abs().max() > 1e-3


def test_what_does_not_fit_is_refused():
    sae = worked_sae(layer=7)
    with pytest.raises(ConfigError, match=r"does not fit the model.*size 4.*width 3"):
        sae.encode(torch.zeros(2, 4))
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match=r"layer 7, bfloat16.*1 of 2 token"):
            sae.encode(torch.tensor([[0.0, bad, 0.0], [0.0, 0.0, 0.0]], dtype=torch.bfloat16))
    good = {name: p.detach() for name, p in sae.named_parameters()}
    for change, words in (
        ({"b_enc": torch.zeros(5)}, "b_enc of shape"),
        ({"W_enc": good["W_enc"].T}, "W_enc of shape"),
        ({"b_dec": torch.full((3,), math.nan)}, "NaN"),
        ({"b_dec": torch.zeros(3, dtype=torch.int64)}, "int64"),
        ({"W_dec": torch.zeros(0, 3)}, "matrix"),
    ):
        with pytest.raises(ConfigError, match=words):
            SAE("topk", good | change, k=2)
    for k in (None, 0, 7, 1.5):
        with pytest.raises(ConfigError, match="keeps k features"):
            SAE("topk", good, k=k)
    with pytest.raises(ConfigError, match="kind"):
        SAE("crosscoder", good)
    with pytest.raises(ConfigError, match="no threshold"):
        SAE("jumprelu", good)
    with pytest.raises(ConfigError, match="normalisation"):
        SAE("relu", good, normalisation="batch_norm")


def test_quality_without_tokens_or_variance():
    sae = worked_sae()
    quality = Quality(sae)
    assert math.isnan(quality.metrics()["fvu"])
    same = Z[:1].expand(3, 3)
    quality.add(same, *sae.reconstruct(same))
    assert math.isnan(quality.metrics()["fvu"])


# ---------------------------------------------------------------- which latents shift


def test_worked_shift():
    pair = PairSums().add(H0[:3], H1[:3]).merge(PairSums().add(H0[3:], H1[3:]))
    assert pair.delta_s.tolist() == pytest.approx([0, 1.8125, 0.01, 0.0125, 0, 0.4025], abs=1e-6)
    assert torch.allclose(shift(H0, H1), pair.delta_s)
    found = select(pair.delta_s, 2)
    assert found.latents == [1, 5] and found.concentration == pytest.approx(0.989944, abs=1e-6)
    assert found.note == "" and found.asked == 2
    unaligned = [0.34375, 1.625, 0.81625, 0.0325, 0.09375, 0.3575]
    assert pair.unaligned_s.tolist() == pytest.approx(unaligned, abs=1e-6)
    assert select(pair.unaligned_s, 2).latents == [1, 2]


def test_suppressed_latents_are_those_switched_off():
    assert select(PairSums().add(H1, H0).suppressed_s, 3).latents == [1, 5, 2]
    expected = [0, 0, 0, 0.000625, 0, 0]  # 2.0, 2.0, 2.2, 1.8 against 2.0, 2.1, 2.0, 1.8
    assert PairSums().add(H0, H1).suppressed_s.tolist() == pytest.approx(expected, abs=1e-6)


def test_selection_takes_only_what_shifts():
    found = select(torch.tensor([0.0, 2.0, 0.0, 1.0]), 3)
    assert found.latents == [1, 3] and found.asked == 3 and "only 2 shift" in found.note
    assert select(torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0]), 4).latents == [1, 2, 4, 0]
    with pytest.raises(DataError, match="does not change the features"):
        select(torch.zeros(4), 2)
    with pytest.raises(DataError, match="finite"):
        select(torch.tensor([1.0, math.nan]), 1)
    with pytest.raises(ConfigError):
        select(torch.ones(3), 0)


def test_pairs_of_different_tokens_are_refused():
    with pytest.raises(DataError, match="same tokens"):
        PairSums().add(H0, H1[:3])
    with pytest.raises(DataError, match="no tokens"):
        _ = PairSums().delta_s


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 5))
@example(1, 19, 0)  # one token: a variance of zero is left, not the rounding of the squares
@settings(max_examples=30, deadline=None)
def test_sums_do_not_depend_on_how_tokens_come(tokens, latents, seed):
    generator = torch.Generator().manual_seed(seed)
    base, context = (torch.relu(torch.randn(tokens, latents, generator=generator)) for _ in range(2))
    whole, parts = PairSums().add(base, context), PairSums()
    for t in range(tokens):
        parts.add(base[t : t + 1], context[t : t + 1])
    a, b = base.double(), context.double()
    assert torch.allclose(whole.delta_s, (a - b).square().mean(0))
    assert torch.allclose(parts.delta_s, whole.delta_s)
    unaligned = a.var(0, correction=0) + b.var(0, correction=0) + (a.mean(0) - b.mean(0)).square()
    assert torch.allclose(parts.unaligned_s, unaligned)
    assert torch.allclose(parts.suppressed_s, (a - b).mean(0).clamp(min=0).square())
    # Without pairing, the statistic is what random pairs of rows give on average.
    rows = (a[:, None] - b[None]).square().mean((0, 1))
    assert torch.allclose(unaligned, rows)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.integers(1, 25))
@settings(max_examples=50, deadline=None)
def test_selection_properties(values, n):
    delta = torch.tensor(values, dtype=torch.float64)
    if not (delta > 0).any():
        return
    found = select(delta, n)
    assert len(found.latents) == min(n, int((delta > 0).sum())) == len(set(found.latents))
    left = [v for j, v in enumerate(values) if j not in found.latents]
    assert min(found.shifts) >= max(left, default=0) and found.shifts == sorted(found.shifts, reverse=True)
    assert found.concentration == pytest.approx(sum(found.shifts) / sum(values))
    enough = count_for_share(delta, 0.25)
    assert select(delta, enough).concentration >= 0.25 - 1e-9
    assert enough == 1 or select(delta, enough - 1).concentration < 0.25


def test_overlap_and_concentration():
    assert overlap([1, 2, 3, 4], [4, 3, 9, 8]) == 0.5
    assert overlap([1, 2], [2, 3, 4, 5]) == 0.25 and math.isnan(overlap([], []))
    assert math.isnan(concentration(torch.zeros(3), [0]))


# ---------------------------------------------------------------- scores of domains


def sums_of(name):
    base, context = (torch.tensor(x) for x in DOMAINS[name])
    return FeatureSums().add(base), PairSums().add(base, context)


def test_worked_scores():
    found = {n: (sts_act(s, [1, 5]), released(s, [1, 5]), sts_icl(p, [1, 5])) for n in DOMAINS for s, p in [sums_of(n)]}
    expected = {
        "A": (1.4, 0.62, 0.95),
        "B": (0.8, 0.21, 0.285),
        "C": (0.25, 0.0225, 0.105),
        "D": (0.05, 0.0025, 0.025),
        "E": (0.35, 0.0625, 0.07),
    }
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-6)
        assert sts_act_squared(sums_of(name)[0], [1, 5]) == pytest.approx(2 * values[1], abs=1e-6)


def test_sums_over_chosen_latents():
    base, context = (torch.tensor(x) for x in DOMAINS["A"])
    assert sts_act(FeatureSums([1, 5]).add(base), [0, 1]) == pytest.approx(1.4)
    assert sts_icl(PairSums([1, 5]).add(base, context), range(2)) == pytest.approx(0.95)


def test_suppressed_score():
    sums = {name: sums_of(name)[0] for name in DOMAINS}
    rms = pooled(sums.values()).rms_s
    rows = torch.tensor([row for base, _ in DOMAINS.values() for row in base]).double()
    assert torch.allclose(rms, rows.square().mean(0).sqrt())
    for name, (base, _) in DOMAINS.items():
        h = torch.tensor(base).double()
        expected = (h[:, [1, 5]] / rms[[1, 5]]).sum(1).mean()
        assert sts_sup(sums[name], [1, 5], rms) == pytest.approx(float(expected))
    assert sts_sup(sums["A"], [0], torch.zeros(6)) == 0


def test_an_empty_domain_has_no_score():
    with pytest.raises(DataError, match="no tokens"):
        sts_act(FeatureSums(), [0])
    with pytest.raises(DataError, match="no tokens"):
        sts_act(FeatureSums().add(torch.zeros(0, 6)), [0])


def test_cosine():
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(cosine(torch.zeros(2), torch.ones(2)))


# ---------------------------------------------------------------- the mixture


def test_worked_mixture():
    assert mixture([0.95, 0.285, 0.105, 0.025, 0.07], 220) == [145, 44, 16, 4, 11]
    assert mixture([3, 1], 220) == [165, 55]
    assert mixture([1, 1, 1], 220) == [74, 73, 73] and mixture([2.0], 7) == [7] and mixture([1, 0], 0) == [0, 0]


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=14), st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_mixture_properties(scores, budget):
    if not any(scores):
        return
    counts = mixture(scores, budget)
    total = sum(scores)
    assert sum(counts) == budget
    if math.isfinite(total):
        assert all(abs(n - budget * (s / total)) < 1 + 1e-6 for n, s in zip(counts, scores, strict=True))
    for (a, m), (b, n) in itertools.combinations(zip(scores, counts, strict=True), 2):
        assert m >= n if a > b else m <= n if a < b else abs(m - n) <= 1


@pytest.mark.parametrize("scores", [[], [0, 0], [1, -1], [1, math.nan], [math.inf, 1]])
def test_scores_that_share_nothing(scores):
    with pytest.raises(DataError, match="cannot be shared"):
        mixture(scores, 10)


@pytest.mark.parametrize("budget", [-1, 1.5, True])
def test_a_budget_is_a_count(budget):
    with pytest.raises(ConfigError):
        mixture([1.0], budget)


# ---------------------------------------------------------------- a planted world


def test_overlap_explains_the_correlation():
    """512 latents, 12 domains, |change| = sum of loadings over 16 true latents: E[r] is about the overlap."""
    from methods.sts.correlation import pearson

    rng = np.random.default_rng(0)
    found = {f: [] for f in (1.0, 0.75, 0.25, 0.0)}
    for _ in range(60):
        loadings = rng.random((12, 512)) * (rng.random((12, 512)) < 0.2)
        change = loadings[:, :16].sum(1)
        for f, values in found.items():
            kept = round(16 * f)
            chosen = [*range(kept), *range(100, 116 - kept)]
            scores = [sts_act(FeatureSums().add(torch.tensor(row)[None]), chosen) for row in loadings]
            values.append(pearson(scores, change))
    means = {f: float(np.mean(values)) for f, values in found.items()}
    assert means[1.0] == pytest.approx(1) and all(abs(means[f] - f) < 0.12 for f in found)
