"""Retrieval: scores against the formula, order, parts, the cache, what a corpus may look like, and what it may not."""

from __future__ import annotations

import gzip
import json
import math
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import dense, retrieval
from experiments.retrieval import Index, Passage, fuse, index_passages, open_corpus, tokens
from methods.errors import ConfigError, DataError

ANIMALS = [("d0", "Cats", "The cat sat"), ("d1", "", "cats and cats and dogs"), ("d2", "Dogs", "A dog barks at night")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("indexes")


def index_of(*texts: str) -> Index:
    return index_passages([Passage(f"d{i}", "", text) for i, text in enumerate(texts)])


def write(path: Path, passages=ANIMALS) -> Path:
    path.write_text("".join(json.dumps({"doc_id": i, "title": t, "text": x}) + "\n" for i, t, x in passages))
    return path


# Scores


def test_scores_against_the_formula_by_hand(tmp_path):
    index = open_corpus(str(write(tmp_path / "corpus.jsonl")))
    # Tokens: d0 cat the cat sat (4), d1 cat and cat and dog (5), d2 dog a dog bark at night (6); mean 5.
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))  # both "cat" and "dog" are in two of three passages: ln 1.6

    def part(tf, length):
        return tf / (tf + 1.5 * (1 - 0.75 + 0.75 * length / 5))

    assert idf == pytest.approx(0.470004, abs=1e-6)
    assert dict(index.search("cat", 9)) == pytest.approx({"d0": idf * part(2, 4), "d1": idf * part(2, 5)}, abs=1e-6)
    # A word that is asked for twice counts twice.
    both = {"d0": 2 * idf * part(2, 4), "d1": idf * (2 * part(2, 5) + part(1, 5)), "d2": idf * part(2, 6)}
    assert both == pytest.approx({"d0": 0.574050, "d1": 0.725149, "d2": 0.252351}, abs=1e-6)
    assert dict(index.search("Cats! cat, DOGS?", 9)) == pytest.approx(both, abs=1e-6)
    assert [d for d, _ in index.search("cat cat dog", 9)] == ["d1", "d0", "d2"]


WORDS = st.lists(st.sampled_from(["red", "blue", "tall"]), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, min_size=1, max_size=6), WORDS, st.integers(-1, 8))
def test_ranking_is_that_of_the_formula_with_ties_in_corpus_order(texts, query, k):
    found = index_of(*texts).search(query, k)
    scores = reference(texts, query)
    order = sorted((i for i in range(len(texts)) if scores[i] > 0), key=lambda i: (-round(scores[i], 5), i))
    assert [d for d, _ in found] == [f"d{i}" for i in order[: max(k, 0)]]
    assert [s for _, s in found] == pytest.approx([scores[i] for i in order[: max(k, 0)]], abs=1e-5)


def reference(texts, query):
    bags = [Counter(tokens(text)) for text in texts]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = [0.0] * len(texts)
    for token in tokens(query):
        holders = sum(token in bag for bag in bags)
        idf = math.log(1 + (len(bags) - holders + 0.5) / (holders + 0.5))
        for i, bag in enumerate(bags):
            tf = bag[token]
            scores[i] += idf * tf / (tf + 1.5 * (0.25 + 0.75 * bag.total() / mean))
    return scores


def test_k_is_clamped_and_passages_without_a_shared_word_are_never_found():
    index = index_of("red house", "red house", "blue", "")
    assert [d for d, _ in index.search("red", 1)] == ["d0"]
    assert [d for d, _ in index.search("red", 10**6)] == ["d0", "d1"]
    for query, k in (("red", 0), ("red", -3), ("green", 5), ("", 5), ("?!", 5)):
        assert index.search(query, k) == []
    assert index_of("", "...").search("red", 5) == []  # a corpus without any word


def test_tokens():
    assert tokens("The runners' RUNNING_fast, 3.5 km!") == ["the", "runner", "run", "fast", "3", "5", "km"]
    assert tokens("Beyoncé Søren naïve Ⅳ") == ["beyonc", "søren", "naiv", "iv"]
    assert tokens("Beyonce") == tokens("BEYONCÉ") and tokens("e\u0301tude") == tokens("étude")
    assert tokens("北京大学 café") == ["北京", "京大", "大学", "北", "京", "大", "学", "cafe"]
    assert tokens("ガ") == ["ガ"] and tokens("한국어") == ["한국", "국어", "한", "국", "어"]
    assert tokens("Москва́ Αθήνα")[0].startswith("москва") and tokens("") == tokens("—…") == []


def test_chinese_is_found_by_part_of_a_word():
    index = index_of("北京大学在海淀", "上海交通大学", "Peking University")
    assert [d for d, _ in index.search("北京", 3)] == ["d0"]
    assert [d for d, _ in index.search("大学", 3)] == ["d1", "d0"]  # the shorter text first


def test_threads_get_the_same_answers():
    index = index_of(*(f"running number {i} of {i % 7} runners" for i in range(50)))
    queries = [f"runner {i} numbers" for i in range(50)] * 4
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda q: index.search(q, 5), queries)) == [index.search(q, 5) for q in queries]


# Parts


def test_parts_have_their_own_statistics_and_must_be_named(tmp_path):
    rows = [("a", "noodle bar", "Rome"), ("b", "noodle noodle", "Oslo"), ("c", "fish bar", "Oslo")]
    file = tmp_path / "shops.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": t, "city": c}) + "\n" for i, t, c in rows))
    index = open_corpus(str(file), partition="city")
    assert [d for d, _ in index.search("bar", 5, where="Rome")] == ["a"]
    assert [d for d, _ in index.search("noodle bar", 5, where="Oslo")] == ["b", "c"]
    alone = [s for _, s in index_of("noodle noodle", "fish bar").search("noodle bar", 5)]
    assert [s for _, s in index.search("noodle bar", 5, where="Oslo")] == pytest.approx(alone)
    with pytest.raises(LookupError, match="no part 'Rom'; did you mean 'Rome'"):
        index.search("bar", 5, where="Rom")
    with pytest.raises(LookupError, match="Rome, Oslo"):
        index.search("bar", 5)
    with pytest.raises(DataError, match="no column 'town'"):
        open_corpus(str(file), partition="town")


# The cache


def test_an_index_is_built_once_and_memory_mapped(tmp_path, monkeypatch):
    file = write(tmp_path / "corpus.jsonl")
    first = open_corpus(str(file))
    monkeypatch.setattr(retrieval, "_build", lambda *_: pytest.fail("built again"))
    retrieval._load.cache_clear()
    again = open_corpus(str(file))
    assert again.folder == first.folder and again.search("dog", 3) == first.search("dog", 3)
    model = again.parts[""].model
    assert model is not None and isinstance(model.scores["data"], np.memmap)
    assert open_corpus(str(write(tmp_path / "same.jsonl"))).folder == first.folder  # content counts, not the name


def test_a_corpus_that_changed_is_indexed_anew(tmp_path):
    file = write(tmp_path / "corpus.jsonl")
    old = open_corpus(str(file))
    write(file, [*ANIMALS[:2], ("d2", "Dogs", "A cow barks at night")])  # as long as before
    new = open_corpus(str(file))
    assert new.folder != old.folder
    assert [d for d, _ in old.search("cow", 3)] == [] and [d for d, _ in new.search("cow", 3)] == ["d2"]


def test_a_damaged_cache_says_which_folder_to_delete(tmp_path):
    file = write(tmp_path / "corpus.jsonl")
    folder = open_corpus(str(file)).folder
    (folder / "part0" / "data.csc.index.npy").write_bytes(b"")
    retrieval._load.cache_clear()
    with pytest.raises(DataError, match=f"{folder}.*delete this folder"):
        open_corpus(str(file))


# Corpora


def test_kinds_of_files_and_columns(tmp_path):
    import pandas as pd

    record = {"doc_id": ["x", "y"], "title": ["One", None], "text": ["first\ntext", "second"]}
    pd.DataFrame(record).to_parquet(tmp_path / "a.parquet")
    index = open_corpus(str(tmp_path / "a.parquet"))
    assert list(index.passages) == [Passage("x", "One", "first\ntext"), Passage("y", "", "second")]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as out:
        out.write(json.dumps({"id": 7, "contents": '"A title"\nand \ud800 text'}) + "\n\n")
    assert list(open_corpus(str(tmp_path / "b.jsonl.gz")).passages) == [Passage("7", "A title", "and ? text")]
    (tmp_path / "c.csv").write_text("docid,text,url\n12,of a page,http://x\n")
    folder = open_corpus(str(tmp_path))
    assert [p.doc_id for p in folder.passages] == ["x", "y", "7", "12"]


BAD = {
    "empty": ("", "The corpus has no passages"),
    "damaged": ('{"doc_id": "a", "text": "b"}\n{"doc_id": \n', r"corpus\.jsonl:2"),
    "no object": ("3\n", r"no JSON object.*corpus\.jsonl:1"),
    "no text column": ('{"doc_id": "a", "body": "b"}\n', "no column 'text'.*columns doc_id, body.*contents"),
    "no id column": ('{"text": "b"}\n', "no column 'doc_id'.*_id"),
    "no text": ('{"doc_id": "a", "text": "b"}\n{"doc_id": "c", "text": null}\n', "no text.*passage 2"),
    "no id": ('{"doc_id": null, "text": "b"}\n', "no id.*passage 1"),
    "text of another kind": ('{"doc_id": "a", "text": ["b"]}\n', "no text.*passage 1"),
    "twice": ('{"doc_id": "a", "text": "b"}\n{"doc_id": "a", "text": "c"}\n', "same id.*Got: a"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_corpora(tmp_path, cache, name):
    content, message = BAD[name]
    file = tmp_path / "corpus.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        open_corpus(str(file))
    assert not list(cache.rglob("*.arrow"))  # nothing is left of it


def test_no_corpus(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 no gzip")
    for path, message in (("", "No passage corpus was given.*task.corpus="), ("/nowhere.jsonl", "No such corpus"),
                          ("folder", "holds no table"), ("broken.jsonl.gz", "cannot be read")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            open_corpus(str(tmp_path / path) if path else "")
    with pytest.raises(DataError, match="no passages"):
        index_passages([])


def test_passages_are_located_by_title_and_text_never_by_title_alone():
    rows = [
        ("a", "Rome", "The capital."),
        ("b", "Rome", "A film."),
        ("c", "Rome, NY", "A town."),
        ("d", "Oslo", "The capital."),
    ]
    index = index_passages([Passage(*row) for row in rows])
    wanted = [
        ("Rome", "A  film.\n"),
        ("Oslo", "The capital."),
        ("Rome", "Another."),
        ("rome_ny", "A town."),
        ("X", "The capital."),
    ]
    assert index.locate(wanted) == {wanted[0]: "b", wanted[1]: "d", wanted[3]: "c"}
    assert index.known(["a", "z"]) == {"a"} and index.known([]) == set()


# Vectors


def test_without_the_package_one_paragraph_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"task\.dense=some/model.*pip install 'assay\[dense\]'.*task\.dense=null"):
        open_corpus(str(write(tmp_path / "corpus.jsonl")), dense="some/model")


class FakeModel:
    """Vectors by hand: animals along one axis, all else along the other."""

    encoded = 0

    def __init__(self, path: str) -> None:
        if path == "missing":
            raise OSError("no such model")

    def encode_document(self, texts, **_):
        FakeModel.encoded += len(texts)
        return [self._vector(t) for t in texts]

    def encode_query(self, texts, **_):
        return [self._vector(t) for t in texts]

    def _vector(self, text):
        animal = float(any(w in text.lower() for w in ("cat", "dog", "pet")))
        return [animal, 1 - animal]


@pytest.fixture
def fake_package(monkeypatch):
    dense.load_versioned.cache_clear()
    module = SimpleNamespace(SentenceTransformer=FakeModel, __version__="5.0")
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    yield
    dense.load_versioned.cache_clear()


def test_fusion_of_words_and_vectors(fake_package):
    passages = [Passage("a", "", "a tree"), Passage("b", "", "some cat"), Passage("c", "", "one pet tree")]
    index = index_passages(passages, dense="fake")
    # BM25 of "tree": a, c. Vectors of "tree": a, then b and c alike, in their order.
    expected = {"a": 1 / 61 + 1 / 61, "c": 1 / 62 + 1 / 63, "b": 1 / 62}
    assert dict(index.search("tree", 5)) == pytest.approx(expected, abs=1e-12)
    assert [d for d, _ in index.search("tree", 2)] == ["a", "c"] and index.search("tree", 0) == []
    assert [d for d, _ in index.search("pet", 3)] == ["c", "b", "a"]
    assert [d for d, _ in index_passages(passages).search("pet", 3)] == ["c"]  # words alone
    before = FakeModel.encoded
    index_passages(passages, dense="fake")
    assert FakeModel.encoded == before  # the vectors are kept
    with pytest.raises(ConfigError, match=r"could not be loaded.*task\.dense=missing.*no such model"):
        index_passages(passages, dense="missing")


def test_fusion_keeps_to_the_part(fake_package):
    passages = [Passage("a", "", "cat", "x"), Passage("b", "", "cat", "y"), Passage("c", "", "tree", "y")]
    index = index_passages(passages, dense="fake")
    assert [d for d, _ in index.search("dog", 5, where="y")] == ["b", "c"]


def test_fuse_by_hand():
    assert fuse([[3, 1], [1, 2]]) == [(1, 1 / 62 + 1 / 61), (3, 1 / 61), (2, 1 / 62)]
    assert fuse([[5], [4]])[0][0] == 4 and fuse([[], []]) == []


# The real corpus


def test_real_corpus(data, shared_cache, monkeypatch, capsys):
    monkeypatch.setenv("ASSAY_CACHE", str(shared_cache))
    began = time.perf_counter()
    index = open_corpus(str(data / "multihop_qa" / "corpus.jsonl.gz"))
    built = time.perf_counter() - began
    assert len(index.passages) == 4684
    titles = [index.passages[i].title for i in range(0, 4684, 60)]
    began = time.perf_counter()
    hits = [t in {index.passages[p].title for p, _ in index.rank(t, 5)} for t in titles]
    each = (time.perf_counter() - began) / len(titles)
    with capsys.disabled():
        print(f"\n4684 passages indexed in {built:.2f} s; titles: {1e3 * each:.2f} ms each, {np.mean(hits):.2f} found")
    assert np.mean(hits) > 0.9
