"""Retrieval over a corpus of passages: BM25 on an index that is built once and memory-mapped, optionally with vectors.

    score(q, d) = sum over the tokens t of q, repeated ones included, of
                  idf(t) tf / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(t) = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))

with tf the count of t in d, n_t the number of passages that hold t, k1 = 1.5 and b = 0.75 (the form of Lucene).
An index is an artefact named by the hash of the corpus and of all that determines its tokens and scores, so that a
corpus that has changed is indexed anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments.artefacts import artefact
from experiments.tasks.base import SUFFIXES, columns_of, first_line, read_file, table_files
from methods.errors import DataError, nearest

if TYPE_CHECKING:
    import numpy as np

    from experiments.dense import Vectors

K1, B = 1.5, 0.75
DEPTH = 100  # passages that each of two rankings gives to their fusion
RRF = 60  # c of reciprocal rank fusion: score(d) = sum over the rankings of 1 / (c + rank of d)
TOKENS = 1  # raise it with any change of `tokens`
USUAL = {"id": ("doc_id", "docid", "id", "_id"), "title": ("title",), "text": ("text", "contents", "passage")}

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_RUN = re.compile(rf"[{_CJK}]+|[^\W_{_CJK}]+")
_ACCENT = re.compile("(?<=[a-z])[\u0300-\u036f]+")
_local = threading.local()


class Retriever(Protocol):
    """Finds passages for a query."""

    def search(self, query: str, k: int, where: str | None = None) -> list[tuple[str, float]]:
        """At most k (doc_id, score), best first; `where` names a part of a corpus that has parts."""
        ...


@dataclass(frozen=True)
class Passage:
    """One document of a corpus. `part` is the partition that it belongs to, such as a city."""

    doc_id: str
    title: str
    text: str
    part: str = ""


def tokens(text: str) -> list[str]:
    """Stems (Snowball, English) of lower-case words, accents of Latin letters taken off; no word is left out.

    A run of Chinese, Japanese or Korean characters gives its overlapping pairs and its single characters.
    """
    text = text.lower()
    if text.isascii():
        return _stems(_RUN.findall(text))
    text = _ACCENT.sub("", unicodedata.normalize("NFD", text))
    found: list[str] = []
    for run in _RUN.findall(unicodedata.normalize("NFKC", text)):
        if re.match(f"[{_CJK}]", run):
            found += [run[i : i + 2] for i in range(len(run) - 1)] + list(run)
        else:
            found.append(run)
    return _stems(found)


def _stems(words: list[str]) -> list[str]:
    # A stemmer must not be shared by threads, and tools may be called from several.
    if not hasattr(_local, "stemmer"):
        import Stemmer

        _local.stemmer = Stemmer.Stemmer("english")
    return _local.stemmer.stemWords(words)


# ---------------------------------------------------------------- the index


class Bm25:
    """BM25 over some of a corpus's passages; `places` are their positions in the corpus."""

    def __init__(self, folder: Path, count: int) -> None:
        import numpy as np
        from bm25s import BM25

        self.places = np.load(folder / "places.npy", mmap_mode="r")
        self.model = BM25.load(folder, mmap=True) if (folder / "params.index.json").exists() else None
        if len(self.places) and self.places[-1] >= count:
            raise ValueError("the index and its passages do not belong together")

    @staticmethod
    def build(folder: Path, places: Sequence[int], texts: Sequence[list[str]]) -> None:
        """Writes the index of token lists into `folder`. Nothing but the places where no text has a token."""
        import numpy as np
        from bm25s import BM25

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it sets DEBUG
        folder.mkdir(parents=True)
        np.save(folder / "places.npy", np.asarray(places, dtype=np.int64))
        vocabulary: dict[str, int] = {}
        ids = [[vocabulary.setdefault(token, len(vocabulary)) for token in text] for text in texts]
        if vocabulary:
            model = BM25(k1=K1, b=B, method="lucene")
            model.index((ids, vocabulary), create_empty_token=False, show_progress=False)
            model.save(folder, show_progress=False)

    def rank(self, query: str, k: int) -> list[tuple[int, float]]:
        """At most k (place, score) with a score above 0, best first, ties by place."""
        if self.model is None:
            return []
        scores = self.model.get_scores_from_ids(self.model.get_tokens_ids(tokens(query)))
        return [(int(self.places[i]), float(scores[i])) for i in best(scores, k)]


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest scores above 0, highest first, equal ones in their order."""
    import numpy as np

    k = min(k, int((scores > 0).sum()))
    if k < 1:
        return np.empty(0, dtype=np.int64)
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    found = np.flatnonzero(scores >= least)
    return found[np.argsort(-scores[found], kind="stable")][:k]


def fuse(rankings: Sequence[Sequence[int]], c: int = RRF) -> list[tuple[int, float]]:
    """Reciprocal rank fusion of rankings of places: (place, score), best first, ties by place."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, place in enumerate(ranking, start=1):
            scores[place] = scores.get(place, 0.0) + 1 / (c + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


class Passages(Sequence[Passage]):
    """The passages of an index by position, read from disk one by one."""

    def __init__(self, file: Path) -> None:
        import pyarrow as arrow

        table = arrow.ipc.open_file(arrow.memory_map(str(file))).read_all()
        self.columns: list[Any] = [column.combine_chunks() for column in table.columns]

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, place: Any) -> Any:
        return Passage(*(column[place].as_py() for column in self.columns))

    @staticmethod
    def write(file: Path, passages: Sequence[Passage]) -> None:
        import pyarrow as arrow

        names = ("doc_id", "title", "text", "part")
        table = arrow.table({n: arrow.array([getattr(p, n) for p in passages], arrow.large_string()) for n in names})
        with arrow.OSFile(str(file), "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)


class Index:
    """A `Retriever` over one corpus.

    A corpus with parts has one BM25 per part (with the part's own statistics) and is searched part by part.
    With vectors, the best 100 of BM25 and the nearest 100 by cosine are fused by reciprocal rank.
    """

    def __init__(self, folder: Path, vectors: Vectors | None = None) -> None:
        self.folder, self.vectors = folder, vectors
        self.passages = Passages(folder / "passages.arrow")
        names = json.loads((folder / "parts.json").read_text())
        self.parts = {name: Bm25(folder / f"part{i}", len(self.passages)) for i, name in enumerate(names)}

    def search(self, query: str, k: int, where: str | None = None) -> list[tuple[str, float]]:
        """At most k (doc_id, score), best first, ties in the order of the corpus; a passage that shares no word with
        the query is never found by BM25. LookupError for a part that is not there, or none named where there are."""
        return [(self.passages[place].doc_id, score) for place, score in self.rank(query, k, where)]

    def rank(self, query: str, k: int, where: str | None = None) -> list[tuple[int, float]]:
        """`search` with positions in `passages` in place of ids."""
        part = self.parts.get(where or "")
        if part is None:
            names = ", ".join(list(self.parts)[:8])
            raise LookupError(f"the corpus has no part '{where or ''}'; {nearest(where or '', self.parts)} [{names}]")
        if self.vectors is None:
            return part.rank(query, k)
        depth = max(DEPTH, k)
        lexical = [place for place, _ in part.rank(query, depth)]
        return fuse([lexical, self.vectors.rank(query, depth, part.places)])[: max(k, 0)]

    def locate(self, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """The ids of passages given as (title, text), runs of white space counted as one. A text under another title
        counts where it occurs once only; a title alone never does."""
        wanted = list(wanted)
        texts = {squeezed(text) for _, text in wanted}
        found: dict[str, list[Passage]] = {}
        for place, cell in enumerate(self.passages.columns[2] if texts else ()):
            if (text := squeezed(cell.as_py())) in texts:
                found.setdefault(text, []).append(self.passages[place])
        places = {}
        for title, text in wanted:
            same = found.get(squeezed(text), [])
            titled = [p for p in same if squeezed(p.title) == squeezed(title)]
            if titled or len(same) == 1:
                places[title, text] = (titled or same)[0].doc_id
        return places

    def known(self, ids: Iterable[str]) -> set[str]:
        """Those of `ids` that the corpus has."""
        wanted = set(ids)
        return {i for i in self.passages.columns[0].to_pylist() if i in wanted} if wanted else wanted


def squeezed(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------- opening


def open_corpus(path: str, *, partition: str | None = None, dense: str | None = None, key: str = "task") -> Index:
    """The index of a jsonl, jsonl.gz, csv or parquet file or a folder of them, built if there is none of this content.

    Columns: an id (`doc_id`, `docid`, `id`, `_id`), `text` (or `contents`, whose first line is the title, or
    `passage`), and perhaps `title`. partition: the column that names the part of each passage. dense: a path or hub id
    of sentence-transformers. DataError for a corpus that cannot be used, with file and line or passage; ConfigError
    for vectors that cannot be had.
    """
    files = corpus_files(path, key)
    content = hashlib.sha256()
    for file in files:
        content.update(f"{file.stat().st_size} ".encode())
        with file.open("rb") as data:
            content.update(hashlib.file_digest(data, "sha256").digest())
    return _open(content.hexdigest(), lambda: read_corpus(files, partition), partition, dense, key)


def index_passages(passages: Sequence[Passage], *, dense: str | None = None, key: str = "task") -> Index:
    """The index of passages that were made in this process; with parts if any passage has one."""
    content = hashlib.sha256()
    for passage in passages:
        content.update(json.dumps(astuple(passage)).encode())
    return _open(content.hexdigest(), lambda: checked(passages, "the passages"), "part", dense, key)


def _open(content: str, read: Callable[[], list[Passage]], partition: str | None, dense: str | None, key: str) -> Index:
    settings = {"content": content, "partition": partition, "k1": K1, "b": B, "tokens": TOKENS}
    versions = {name: metadata.version(name) for name in ("bm25s", "PyStemmer")}
    folder = artefact("index", settings | versions, lambda new: _build(new, read()))
    index = _load(folder)
    if dense is None:
        return index
    from experiments.dense import vectors

    return Index(folder, vectors(index.passages, content, dense, key))


def _build(folder: Path, passages: list[Passage]) -> None:
    Passages.write(folder / "passages.arrow", passages)
    parts: dict[str, list[int]] = {}
    for place, passage in enumerate(passages):
        parts.setdefault(passage.part, []).append(place)
    for i, places in enumerate(parts.values()):
        texts = [tokens(f"{passages[place].title}\n{passages[place].text}") for place in places]
        Bm25.build(folder / f"part{i}", places, texts)
    (folder / "parts.json").write_text(json.dumps(list(parts)))


@functools.lru_cache(maxsize=8)
def _load(folder: Path) -> Index:
    try:
        return Index(folder)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(
            "A cached index is damaged", where=str(folder), got=first_line(error), fix="delete this folder and go on"
        ) from error


def corpus_files(path: str, key: str) -> list[Path]:
    """The files of a corpus. Raises DataError where there are none."""
    source = Path(path).expanduser()
    files = table_files(source) if path and source.is_dir() else [source]
    if path and files and all(file.is_file() for file in files):
        return files
    what = "No passage corpus was given" if not path else "The corpus folder holds no table"
    raise DataError(
        what if not path or source.is_dir() else "No such corpus",
        where=f"{key}.corpus={path}",
        expected="a file or folder of *" + ", *".join(SUFFIXES),
        fix=f"set {key}.corpus=FILE",
    )


def read_corpus(files: Sequence[Path], partition: str | None = None) -> list[Passage]:
    """The passages of files in their order. Raises DataError: nothing there, damaged line, column or cell missing,
    an id that occurs twice."""
    return checked([p for file in files for p in _passages(file, partition)], ", ".join(map(str, files[:3])))


def checked(passages: Sequence[Passage], where: str) -> list[Passage]:
    """The passages as a list. Raises DataError for none at all and for an id that occurs twice."""
    if not passages:
        raise DataError("The corpus has no passages", where=where, fix="give a corpus with at least one passage")
    seen: set[str] = set()
    for passage in passages:
        if passage.doc_id in seen:
            raise DataError("Two passages have the same id", where=where, got=passage.doc_id)
        seen.add(passage.doc_id)
    return list(passages)


def _passages(file: Path, partition: str | None) -> Iterator[Passage]:
    records = read_file(file)
    found = columns_of(records)
    names = {what: next((n for n in usual if n in found), None) for what, usual in USUAL.items()}
    names["part"] = partition
    for what, name in names.items():
        missing = name not in found if what == "part" else name is None and what != "title"
        if records and missing and (what != "part" or partition):
            raise DataError(
                f"The corpus has no column '{partition if what == 'part' else USUAL[what][0]}'",
                where=str(file),
                got="columns " + ", ".join(found),
                expected="" if what == "part" else f"the {what} in a column " + " or ".join(USUAL[what]),
            )
    for number, record in enumerate(records, start=1):
        cells = {what: None if name is None else record.get(name) for what, name in names.items()}
        title, text = cells["title"] or "", cells["text"]
        if names["text"] == "contents" and not title and isinstance(text, str):
            title, _, text = text.partition("\n")
            title = title.strip('" ')
        if cells["id"] is None or not isinstance(text, str) or (partition and cells["part"] is None):
            empty = "text" if not isinstance(text, str) else "id" if cells["id"] is None else "part"
            raise DataError(f"A passage has no {empty}", where=f"{file}, passage {number}", got=repr(record)[:100])
        # A lone surrogate, which JSON can hold, is no text.
        parts = (str(cells["id"]), str(title), text, "" if cells["part"] is None else str(cells["part"]))
        yield Passage(*(part.encode("utf-8", "replace").decode() for part in parts))
