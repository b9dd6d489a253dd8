"""`assay score-transfer` in one process: files, resume, measured changes, bad input; a random model and SAE."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

from methods.errors import ConfigError, DataError

WORDS = {
    "math": "add sum seven equals",
    "food": "bread soup salt oven",
    "sea": "wave ship sail salt",
    "law": "court case",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a random model, a random SAE of its layer 1, and a table of four domains."""
    from experiments.models import Tiny
    from experiments.sae_files import write_sae
    from experiments.tokenizers import tiny_tokenizer
    from methods.sts.sae import SAE

    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer(None, chat=True)
    model = Tiny(chat=True, warm_start=None, hidden_size=32, max_length=256).new(tokenizer, 0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(64, 32), dim=1)
    zeros = {"b_enc": torch.zeros(64), "b_dec": torch.zeros(32)}
    write_sae(SAE("topk", {"W_enc": W.T.contiguous(), "W_dec": W, **zeros}, k=4, layer=1), folder / "sae")
    rng = np.random.default_rng(0)
    rows = [
        {"domain": d, "prompt": " ".join(rng.choice(w.split(), 5)), "answer": " ".join(rng.choice(w.split(), 3))}
        for d, w in WORDS.items()
        for _ in range(8)
    ]
    rows.append({"domain": "law", "prompt": "<script>alert(1)</script>", "answer": "a & b"})
    write_rows(folder / "rows.jsonl", rows)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def score(world, tmp_path, monkeypatch):
    """score(*words) -> the run folder."""
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))

    def call(*words, results=None):
        from cli import launch
        from experiments.transfer.run import check, run

        line = [
            "domains=jsonl",
            f"domains.path={world / 'rows.jsonl'}",
            "source.domain=math",
            "score.demos=2",
            "name=t",
        ]
        line += ["model=hf", f"model.path={world / 'model'}", f"sae.path={world / 'sae'}", "scale=cpu"]
        line = [w for w in line if w.partition("=")[0] not in {x.partition("=")[0] for x in words}]
        plan = launch.plan("score_transfer", [*line, *words, f"results_dir={results or tmp_path / 'out'}"], check=check)
        return run(plan.jobs[0].cfg)

    return call


FILES = ("table.md", "table.csv", "result.json", "latents.html", "figures/scores.png", "figures/scores.svg")


def test_files_and_scores_against_plain_sums(score, world):
    folder = score("score.suppressed=true", "mixture.budget=20")
    result = json.loads((folder / "result.json").read_text())
    assert set(result["scores"]) == {"food", "sea", "law"} and sum(result["mixture"].values()) == 20
    assert len(result["D_N"]) == result["N"] and result["concentration"] >= 0.25
    food = result["scores"]["food"]
    assert food["act_low"] <= food["act"] <= food["act_high"] and food["texts"] == 6 and "sts_sup" in food
    assert food["act"] == pytest.approx(plainly(world, result), rel=1e-4)
    table = (folder / "table.md").read_text()
    assert "STS_act" in table and "examples to add" in table and "never in which direction" in table
    page = (folder / "latents.html").read_text()
    assert "<script" not in page and "<mark>" in page and "default-src 'none'" in page and "//" not in page
    assert all((folder / name).is_file() for name in FILES)


def plainly(world, result):
    """STS_act of food: every query on its own through the model, features by the formula."""
    from experiments.capture import Capture
    from experiments.passages import Prompter
    from experiments.sae_files import read_sae
    from experiments.tasks.base import shuffled
    from experiments.transfer.data import Domains, cut
    from experiments.weights import open_model

    loaded = open_model(world / "model", "model", dtype="float32", folder=world / "model")
    sae = read_sae(world / "sae").sae
    rows = shuffled(cut(Domains(str(world / "rows.jsonl")).read()["food"], 800), 0, "transfer", "food")[2:]
    h = []
    for row in rows:
        passage = Prompter(loaded).passage(row.asked)
        (vectors,) = Capture(loaded.model, 1).read([passage])
        pre = vectors.z_Td @ sae.W_enc
        top = pre.topk(4, dim=1)
        h.append(torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()))
    return float(torch.cat(h)[:, result["D_N"]].sum(1).mean())


def test_an_interrupted_scoring_goes_on_and_ends_in_the_same_files(score, tmp_path, monkeypatch):
    from experiments.transfer.scoring import Scorer

    whole = score()
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "other"))
    domain, read = Scorer.domain, []

    def dying(self, examples, latents):
        read.append(examples[0].domain)
        if len(read) == 2:
            raise KeyboardInterrupt
        return domain(self, examples, latents)

    monkeypatch.setattr(Scorer, "domain", dying)
    with pytest.raises(KeyboardInterrupt):
        score(results=tmp_path / "cut")
    cut = score(results=tmp_path / "cut")
    assert len(read) == 4 and read[1] == read[2]
    for name in FILES:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert score(results=tmp_path / "cut") == cut and len(read) == 4


def test_measured_changes_are_validated_over_all_domains(score, tmp_path):
    words = ["measure=true", "sft.epochs=1", "sft.batch_size=4", "sft.learning_rate=1e-2", "sft.warmup_steps=0"]
    lora = ["sft.lora={r: 2}"] if importlib.util.find_spec("peft") else []  # an extra
    folder = score(*words, "extremes=1", *lora)
    result = json.loads((folder / "result.json").read_text())
    changes = {d: s["change"] for d, s in result["scores"].items()}
    assert all(s["change_low"] <= s["change"] <= s["change_high"] for s in result["scores"].values())
    assert all(abs(c) > 1e-3 for c in changes.values())
    assert result["validation"]["act"]["domains"] == 3 and result["validation_of_extremes"]["act"]["domains"] == 2
    assert 0 <= result["overlap"] <= 1 and not (folder / "sft").exists()
    tuned = score(*words, *lora, "score.rank=tuned", "name=tuned")  # the same parts, so the same figures
    metrics = json.loads((tuned / "summary.json").read_text())["metrics"]
    assert metrics["eval/score"] == pytest.approx(result["validation"]["tuned"]["r"])
    assert metrics["eval/spearman"] == pytest.approx(result["validation"]["tuned"]["spearman"])
    order = [line.split(",")[0] for line in (tuned / "table.csv").read_text().splitlines()[1:]]
    assert order == sorted(changes, key=lambda d: -result["scores"][d]["tuned"])
    table = (folder / "table.md").read_text()
    assert "permutation p" in table and "r is inflated" in table and (folder / "figures/transfer.svg").is_file()
    given = write_rows(tmp_path / "given.jsonl", [{"domain": d, "change": c} for d, c in changes.items()])
    again = score(f"changes={given}", "name=given", "score.rank=icl")
    r = json.loads((again / "result.json").read_text())["validation"]["icl"]["r"]
    assert r == pytest.approx(result["validation"]["icl"]["r"])
    assert json.loads((again / "summary.json").read_text())["metrics"]["eval/score"] == r


def test_a_fine_tune_that_changes_nothing_has_no_correlation(score):
    words = ["measure=true", "sft.epochs=1", "sft.batch_size=4", "sft.learning_rate=0", "sft.save_every=0"]
    folder = score(*words, "score.rank=tuned", "mixture.budget=10")
    result = json.loads((folder / "result.json").read_text())
    assert result["validation"]["act"]["r"] is None and "overlap" not in result
    assert sum(result["mixture"].values()) == 10  # there is no `tuned` to share it by: STS_act
    assert "the change is the same in every domain" in (folder / "table.md").read_text()


def test_the_loss_is_that_of_the_answers_tokens(world):
    from experiments.transfer.data import Example
    from experiments.transfer.effects import measure
    from experiments.weights import open_model

    loaded = open_model(world / "model", "model", dtype="float32", folder=world / "model")
    found = measure(loaded, [Example("1", "d", "add seven", "sum five"), Example("2", "d", "a", "b")], None)
    tokenizer = loaded.tokenizer
    for i, (question, answer) in enumerate((("add seven", "sum five"), ("a", "b"))):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        said = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([tokenizer(asked, add_special_tokens=False)["input_ids"] + said])
        with torch.no_grad():
            logp = loaded.model(ids).logits.log_softmax(-1)[0, -len(said) - 1 : -1]
        assert found.weight_N[i] == len(said)
        assert found.value_N[i] == pytest.approx(-float(logp.gather(1, ids[0, -len(said) :, None]).mean()), rel=1e-4)


def test_accuracy_of_multiple_choice(score, world, tmp_path):
    rows = [
        {"category": d, "question": f"{w.split()[0]} {k}", "options": ["x", "y", "z"], "answer": "ABC"[k % 3]}
        for d, w in WORDS.items()
        for k in range(6)
    ]
    path = write_rows(tmp_path / "choice.jsonl", rows)
    words = ["domains=mmlu_pro", f"domains.path={path}", "domains.split=null", "measure=true", "sft.epochs=1"]
    result = json.loads((score(*words, "sft.batch_size=4") / "result.json").read_text())
    assert all(6 * s["before"] == pytest.approx(round(6 * s["before"])) for s in result["scores"].values())
    rows[3]["answer"] = "D"
    write_rows(path, rows)
    with pytest.raises(DataError, match="no letter of an option"):
        score(*words, "name=bad")


def test_a_source_of_its_own_has_its_own_columns(score, tmp_path):
    rows = [{"question": f"add {k}", "solution": f"sum {k} seven"} for k in range(6)]
    path = write_rows(tmp_path / "source.jsonl", rows)
    words = [f"source.path={path}", "source.domain=null", "source.prompt_column=question"]
    result = json.loads((score(*words, "source.answer_column=solution") / "result.json").read_text())
    assert set(result["scores"]) == set(WORDS) and result["source"] == str(path)
    with pytest.raises(DataError, match="no column 'answer'"):
        score(*words, "name=bad")


def test_of_a_list_the_seed_takes_the_source(score):
    """Seeds 0 to 3 of two sources: each in turn; a name that is none is refused whatever the seed."""
    sources = [
        json.loads((score("source.domain=[sea,food]", f"seed={seed}", f"name=s{seed}") / "result.json").read_text())
        for seed in (0, 1, 2)
    ]
    assert [found["source"] for found in sources] == ["sea", "food", "sea"]
    assert set(sources[1]["scores"]) == {"math", "sea", "law"}
    with pytest.raises(ConfigError, match="none of the domains"):
        score("source.domain=[sea,opera]", "name=bad")


def test_the_texts_of_an_sae_are_those_of_the_table_whatever_the_source_and_the_seed(world):
    from omegaconf import OmegaConf

    from experiments.transfer.data import Domains, read

    columns = {"prompt_column": "prompt", "answer_column": "answer", "text_column": "text"}

    def texts(source, seed, characters=None):
        chosen = OmegaConf.create({"domain": source, "path": None, **columns})
        return read(Domains(str(world / "rows.jsonl")), chosen, 800, seed).texts(characters)

    every = texts("math", 0)
    assert texts("law", 3) == every and len(every) == 33
    few = texts("sea", 1, 60)
    per_domain = {d: [t for t in few if set(t.split()) <= set(w.split())] for d, w in WORDS.items()}
    assert texts("math", 0, 60) == few and all(60 <= sum(map(len, p)) < 120 for p in per_domain.values())


def test_attention_sinks_are_left_out(score, monkeypatch):
    """A token a hundred times as long as the others in every text that stands alone."""
    from experiments.capture import Capture

    plain, forward = json.loads((score("score.longest=10") / "result.json").read_text()), Capture.forward

    def with_sink(self, ids):
        hidden = forward(self, ids).clone()
        for row, one in zip(hidden, ids, strict=True):
            if len(one) < 100:  # alone
                row[len(one) // 2] *= 100
        return hidden

    monkeypatch.setattr(Capture, "forward", with_sink)
    found = {
        name: json.loads((score(f"score.longest={name}", f"name=s{name}") / "result.json").read_text())
        for name in ("null", "9")  # not 10: parts of the cache know nothing of the planted sink
    }
    assert plain["left_out"] == 0 and found["null"]["left_out"] == 0 and found["9"]["left_out"] > 0
    delta = {name: sum(f["delta"]) / f["concentration"] for name, f in {**found, "plain": plain}.items()}
    assert delta["null"] > 20 * delta["plain"] and delta["9"] == pytest.approx(delta["plain"], rel=0.5)
    food = found["9"]["scores"]["food"]
    assert food["left_out"] == food["texts"] and food["tokens"] == plain["scores"]["food"]["tokens"] - food["texts"]


def test_one_domain_has_a_score_and_no_correlation(score, tmp_path):
    given = write_rows(tmp_path / "given.jsonl", [{"domain": "food", "before": 0.5, "after": 0.4}])
    folder = score("domains.only=[math,food]", f"changes={given}")
    assert "at least 3 domains, there is 1" in (folder / "table.md").read_text()


@pytest.mark.parametrize(
    "words, text",
    [
        (["source.domain=maths"], "did you mean 'math'"),
        (["source.domain=null"], "source.domain=NAME or source.path=FILE"),
        (["domains.only=[math,opera]"], "'opera' is empty"),
        (["domains.path=/nowhere.jsonl"], "No such data file"),
        (["score.demos=0"], "score.demos"),
        (["score.share=nan"], "score.share"),
        (["score.longest=1"], "score.longest"),
        (["score.rank=best"], "act, icl"),
        (["score.rank=tuned"], "measure=true"),
        (["sae.path=null"], "sae.train=true"),
        (["sae.path=/nowhere"], "/nowhere"),
        (["score.demos=9"], "too few texts"),
        (["score.context=20"], "skipped"),
        (["extremes=4"], "measure=true"),
        (["extremes=2", "measure=true"], "2 of 3 domains"),
        (["measure=true", "changes=a.csv"], "either given or measured"),
        (["changes=/nowhere.csv"], "No such data file"),
    ],
)
def test_wrong_input_is_one_paragraph(score, words, text, tmp_path):
    with pytest.raises((ConfigError, DataError), match=text) as caught:
        score(*words)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("transfer/*"))  # nothing was scored for it


def test_a_text_that_is_a_demonstration_is_no_query(score, tmp_path):
    """Of three texts, each three times, the two demonstrations are one or two."""
    rows = [{"domain": d, "prompt": f"{d} {k % 3}", "answer": "x"} for d in WORDS for k in range(9)]
    folder = score(f"domains.path={write_rows(tmp_path / 'same.jsonl', rows)}")
    scores = json.loads((folder / "result.json").read_text())["scores"]
    assert {s["texts"] for s in scores.values()} <= {3, 6}


def test_equal_texts_are_too_few(score, tmp_path):
    """A domain whose texts are all demonstrations has none to read."""
    rows = [{"domain": d, "prompt": d if d == "sea" else f"{d} {k}", "answer": "x"} for d in WORDS for k in range(6)]
    with pytest.raises(DataError, match=r"too few texts.*domain sea.*6 texts"):
        score(f"domains.path={write_rows(tmp_path / 'same.jsonl', rows)}")


@pytest.mark.parametrize(
    "content", ["", "not json\n", "\x00\xff", '{"prompt": "x"}\n', '{"domain": "math", "prompt": ""}\n']
)
def test_junk_files_are_refused(score, tmp_path, content):
    path = tmp_path / "junk.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        score(f"domains.path={path}")
    assert "\n" not in str(caught.value)


def test_a_wrong_change_is_refused(score, tmp_path):
    for rows, text in (
        ([{"domain": "food", "change": "much"}], "not a number"),
        ([{"domain": "food", "change": 1}], "no measured change"),
    ):
        with pytest.raises(DataError, match=text):
            score(f"changes={write_rows(tmp_path / 'c.jsonl', rows)}", f"name={text[:2]}")


def test_nothing_shifts_is_an_error_and_not_an_arbitrary_choice(score, monkeypatch):
    from experiments.transfer.scoring import Scorer

    monkeypatch.setattr(Scorer, "features", lambda self, z_Td: torch.ones(len(z_Td), 64))
    with pytest.raises(DataError, match="does not change the features"):
        score()


def test_long_plain_texts_are_cut_into_pieces():
    from experiments.transfer.data import Example, cut

    text = "word " * 300
    pieces = cut([Example("row 1", "d", "", text), Example("row 2", "d", "", "short")], 200)
    assert "".join(p.answer for p in pieces[:-1]) == text
    assert all(len(p.answer) <= 200 for p in pieces) and pieces[0].id == "row 1, piece 1" and pieces[-1].id == "row 2"


def test_damaged_parts_are_made_again(score, tmp_path):
    whole = score()
    before = (whole / "result.json").read_bytes()
    for part in (tmp_path / "cache" / "transfer").iterdir():
        part.write_bytes(part.read_bytes()[:50])
    assert (score("overwrite=true") / "result.json").read_bytes() == before
