"""The digit world: its rules and variants, its documents, what fine-tunes and scores are computed from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.studies.sts_tiny import SCORES, StsTiny
from experiments.transfer.world import DOMAINS, NAMES, PLAIN, PLUS5, REVERSED, SOURCES, SYMBOLS, Language, answers
from methods.errors import ConfigError


@pytest.fixture(scope="module")
def language():
    ids = {symbol: k + 3 for k, symbol in enumerate(SYMBOLS)}
    return Language.of(SimpleNamespace(convert_tokens_to_ids=ids.__getitem__))


def test_the_rules_of_all_domains_on_one_question():
    a, b = np.array([7]), np.array([4])
    expected = {
        "copy": "74", "swap": "47", "plus1": "85", "minus1": "63", "plus3": "07", "complement": "25", "sort_up": "47",
        "sort_down": "74", "max": "77", "min": "44", "first": "77", "second": "44", "minus3": "41", "double": "48",
    }  # fmt: skip
    assert {n: "".join(map(str, answers(n, a, b)[0])) for n in NAMES} == expected
    assert answers("copy", a, b, PLUS5).tolist() == [[2, 9]] and answers("copy", a, b, REVERSED).tolist() == [[4, 7]]


def test_seven_sources_and_the_published_exposures():
    assert SOURCES == ("copy", "plus1", "plus3", "complement", "max", "first", "minus3") and len(NAMES) == 14
    plus5 = [plus5 for _, plus5, _ in DOMAINS.values()]
    assert plus5 == [0.30, 0.02, 0.25, 0.02, 0.10, 0.20, 0, 0.05, 0.25, 0, 0.15, 0.02, 0.10, 0.05]
    assert sum(r for _, _, r in DOMAINS.values()) == pytest.approx(1.22)


def test_a_document_is_five_examples_of_one_domain_under_one_variant(language):
    documents = language.documents(3000, np.random.default_rng(0))
    assert documents.shape == (3000, 36) and (documents[:, 0] == language.bos).all()
    shares = {name: [] for name in NAMES}
    of_id = {v: k for k, v in language.operator.items()}
    digit = {int(v): k for k, v in enumerate(language.digit_D)}
    for ids in documents[:, 1:].reshape(3000, 5, 7):
        (name,) = {of_id[int(i)] for i in ids[:, 0]}
        a, b, y = ([digit[int(i)] for i in ids[:, c]] for c in (1, 2, 4))
        z = [digit[int(i)] for i in ids[:, 5]]
        fits = [
            v
            for v in (PLAIN, PLUS5, REVERSED)
            if (answers(name, np.array(a), np.array(b), v) == np.stack([y, z], 1)).all()
        ]
        assert fits
        shares[name].append(PLUS5 in fits)
    assert np.mean(shares["copy"]) == pytest.approx(0.3, abs=0.1) and np.mean(shares["min"]) == 0


def test_queries_stand_behind_their_demonstrations(language):
    rows = language.examples("copy", np.array([1, 2]), np.array([3, 4]))
    ids = language.queries(rows, rows[:1])
    assert ids.shape == (2, 15) and (ids[:, 1:8] == rows[0]).all() and (ids[:, 8:] == rows).all()
    assert (language.queries(rows)[:, 1:] == rows).all()


def made_up(sources=7, s=512, seed=0):
    g = torch.Generator().manual_seed(seed)
    shifts = ("delta", "unaligned", "suppressed", "true_delta", "delta_foreign", "delta_rule", "source_mean")
    found = {name: torch.rand(sources, s, generator=g, dtype=torch.float64) for name in shifts}
    found |= {f"untrained_{n}": torch.rand(sources, s, generator=g) for n in ("delta", "true_delta")}
    found |= {f"raw_{n}": torch.rand(sources, 64, generator=g) for n in ("delta", "true_delta")}
    found |= {n: torch.rand(14, s, generator=g) for n in ("mean", "square", "icl", "untrained_mean")}
    found |= {"raw_mean": torch.rand(14, 64, generator=g), "change": torch.rand(sources, 14, generator=g) - 1}
    found |= {"learned": torch.ones(sources), "before": torch.ones(14), "quality": torch.tensor([0.1, 8, 0.05, 0.99])}
    return found | {"ablation": torch.tensor([[1.0, 0.8, 0.95]] * sources)}


@pytest.mark.parametrize("score", SCORES)
def test_every_score_gives_a_row_per_source(score, monkeypatch):
    monkeypatch.setattr("experiments.transfer.world_scores.measured", lambda seed, settings: made_up())
    frame = StsTiny(score=score).simulate(0)
    assert list(frame["item_id"]) == list(SOURCES) and frame["score"].between(-1, 1).all()
    zeroed = {"act": 0.2, "random": 0.05}.get(score, float("nan"))
    assert frame["zeroed"].iloc[0] == pytest.approx(zeroed, nan_ok=True)
    assert frame["overlap"].isna().all() == (score in ("cosine", "all"))


def test_a_planted_change_is_found_and_shuffled_domains_lose_it(monkeypatch):
    found = made_up()
    for k in range(7):
        top = found["delta"][k].argsort(descending=True)[:16]
        found["change"][k] = -found["mean"][:, top].sum(1)
    monkeypatch.setattr("experiments.transfer.world_scores.measured", lambda seed, settings: found)
    r = {score: StsTiny(score=score).simulate(0)["score"].mean() for score in ("act", "random", "shuffled")}
    assert r["act"] == pytest.approx(1.0) and abs(r["random"]) < 0.5 and abs(r["shuffled"]) < 0.25


def test_where_training_changes_nothing_there_is_no_correlation(monkeypatch):
    found = made_up()
    found["change"] *= 0
    found["true_delta"] *= 0
    monkeypatch.setattr("experiments.transfer.world_scores.measured", lambda seed, settings: found)
    frame = StsTiny().simulate(0)
    assert frame["score"].isna().all() and frame["overlap"].isna().all()


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="act, squares"):
        StsTiny(score="actt")
    with pytest.raises(ConfigError, match="at most 7"):
        StsTiny(sources=8)


@pytest.mark.slow
def test_the_whole_measurement_on_a_hardly_trained_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    study = StsTiny(steps=10, sae_steps=10, sae_vectors=3500, queries=12, repeats=1, sources=2)
    frame = study.simulate(0)
    assert len(frame) == 2 and frame["share"].between(0, 1).all() and frame["fvu"].iloc[0] > 0
    again = StsTiny(**{**vars(study), "score": "act"}).simulate(0)
    assert again.equals(frame)


class Table(torch.nn.Module):
    """A model that reads nothing but the place: logits `weight` (place, vocabulary)."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.weight[: input_ids.shape[1]].expand(len(input_ids), -1, -1))


def test_own_answers_are_the_likeliest_digits_each_behind_those_before(language):
    class Next:
        """Says the token after the one it reads: `=` gives `=` + 1, then + 2."""

        def __call__(self, input_ids):
            return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids + 1, 60).float())

    from experiments.transfer.world_mixture import own_answers

    rows = own_answers(Next(), language, "copy", np.array([12, 99]))
    assert (rows[:, 4] == language.equals + 1).all() and (rows[:, 5] == language.equals + 2).all()
    asked = language.examples("copy", np.array([1, 9]), np.array([2, 9]))
    assert (rows[:, :4] == asked[:, :4]).all() and (rows[:, 6] == language.end).all()


def test_mixtures_share_one_budget_and_the_worst_is_the_advice_upside_down():
    from experiments.studies.sts_mixture import MIXTURES, StsMixture

    found = made_up()
    counts = {m: StsMixture(mixture=m, budget=50).counts(found, 1, "plus1", 0) for m in MIXTURES}
    source = NAMES.index("plus1")
    assert all(sum(c) == (0 if m == "none" else 50) and c[source] == 0 for m, c in counts.items())
    top = found["delta"][1].argsort(descending=True)[:16]
    others = [i for i in range(14) if i != source]
    scores = found["mean"][others][:, top].sum(1)
    order = [others[i] for i in scores.argsort().tolist()]
    advised, worst = ([counts[m][i] for i in order] for m in ("advised", "worst"))
    assert advised == sorted(advised) and worst == advised[::-1] and advised != worst
    moved = [others[i] for i in found["change"][1][others].abs().argsort().tolist()]
    assert [counts["measured"][i] for i in moved] == sorted(counts["measured"][i] for i in moved)
    assert max(counts["uniform"]) - min(counts["uniform"][i] for i in others) == 1
    with pytest.raises(ConfigError, match="none, uniform"):
        StsMixture(mixture="best")


def test_training_and_measuring_questions_are_apart(language, monkeypatch):
    """Every example of a mixture is of the training half, and accuracy is over the other one."""
    from experiments.transfer import world_mixture
    from experiments.transfer.world_model import Tuning

    halves, seen = world_mixture.Halves.of(3), {}

    def keep(loaded, rows, seed, settings, folder):
        seen["rows"] = rows
        return loaded.model

    def measured(model, language, variant, places):
        seen.setdefault("places", []).append(places)
        return dict.fromkeys(NAMES, 1.0)

    monkeypatch.setattr(world_mixture, "fine_tune", keep)
    monkeypatch.setattr(world_mixture, "accuracies", measured)
    loaded = SimpleNamespace(model=Table(torch.zeros(20, 60)))
    counts = [60 if name == "swap" else 0 for name in NAMES]
    world_mixture.after_mixture(loaded, language, "copy", counts, 3, Tuning())
    rows = seen["rows"]
    digit = {int(v): k for k, v in enumerate(language.digit_D)}
    asked = [10 * digit[int(a)] + digit[int(b)] for a, b in rows[:, 2:4]]
    assert len(rows) == 260 and set(asked) <= set(halves.train.tolist())
    assert (rows[:, 1] == language.operator["swap"]).sum() == 60
    assert not set(halves.train) & set(halves.test) and all((p == halves.test).all() for p in seen["places"])


def test_group_advantages_are_relative_to_the_group():
    from experiments.transfer.world_rl import group_advantages

    found = group_advantages(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1]), 4)
    assert found[:4].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-3) and found[4:].abs().max() == 0


def test_grpo_makes_rewarded_answers_likelier_and_leaves_the_model_as_it_was(language, monkeypatch):
    from experiments.transfer import world_rl

    row = language.examples("copy", np.array([1]), np.array([2]), PLUS5)
    monkeypatch.setattr(world_rl, "source_examples", lambda language, source, rng, count: row.repeat(count, axis=0))
    start = torch.zeros(8, 60)
    for place in (5, 6):  # of the answer; what stands there is predicted one place before
        start[place - 1, row[0, place - 1]] = 3.0
    model = Table(start.clone())
    tuned = world_rl.reinforce(model, language, "copy", 0, world_rl.Reinforcing(steps=40, learning_rate=0.1))
    chance = [tuned.weight[p - 1].softmax(-1)[row[0, p - 1]].item() for p in (5, 6)]
    assert min(chance) > 0.9 and torch.equal(model.weight, start)
    again = world_rl.reinforce(model, language, "copy", 0, world_rl.Reinforcing(steps=40, learning_rate=0.1))
    assert torch.equal(again.weight, tuned.weight)


def test_overlap_is_with_what_each_training_shifted():
    from experiments.studies.sts_rl import StsRl

    by_sft, by_grpo = made_up(), made_up(seed=1)
    top = by_sft["delta"][0].argsort(descending=True)[:16]
    by_sft["true_delta"][0, top] += 10  # the fine-tune shifts what demonstrations shift
    by_grpo["true_delta"][0, by_sft["delta"][0].argsort()[:16]] += 10  # GRPO the opposite
    by_grpo["change"][0] = -by_sft["mean"][:, top].sum(1)
    sft, grpo = (StsRl(training=t).row(by_sft, by_grpo, 0, "copy") for t in ("sft", "grpo"))
    assert sft["overlap"] == 1 and grpo["overlap"] == 0 and sft["both"] == grpo["both"] == 0
    assert grpo["score"] == pytest.approx(1) and sft["score"] < 0.9 and sft["share"] > 0.3
    by_grpo["true_delta"][0] *= 0
    assert np.isnan(StsRl(training="grpo").row(by_sft, by_grpo, 0, "copy")["overlap"])
    with pytest.raises(ConfigError, match="sft, grpo"):
        StsRl(training="rl")
