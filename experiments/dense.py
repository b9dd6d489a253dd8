"""Vectors of passages by a model of sentence-transformers, an optional package, for fusion with BM25."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.artefacts import artefact
from experiments.tasks.base import first_line
from methods.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from experiments.retrieval import Passage

_lock = threading.Lock()  # models are no more than one thread's business


class Vectors:
    """Unit vectors of a corpus in its order, memory-mapped, and the model that made them."""

    def __init__(self, file: Path, model: Any) -> None:
        import numpy as np

        self.vectors, self.model = np.load(file, mmap_mode="r"), model

    def rank(self, query: str, k: int, places: np.ndarray) -> list[int]:
        """The k of `places` whose vectors have the highest cosine with the query's, ties by place."""
        import numpy as np

        with _lock:
            vector = np.asarray(self.model.encode_query([query], normalize_embeddings=True)[0], np.float32)
        chosen = self.vectors if len(places) == len(self.vectors) else self.vectors[places]
        return [int(places[i]) for i in np.argsort(-(chosen @ vector), kind="stable")[:k]]


def vectors(passages: Sequence[Passage], content: str, path: str, key: str = "task") -> Vectors:
    """The vectors of a corpus whose hash is `content`, made once per model. ConfigError if there is no such model."""
    import numpy as np

    model, version = load_versioned(path, key)

    def build(folder: Path) -> None:
        texts = [f"{passage.title}\n{passage.text}" for passage in passages]
        made = model.encode_document(texts, normalize_embeddings=True, show_progress_bar=len(texts) > 1000)
        np.save(folder / "vectors.npy", np.asarray(made, np.float32))

    folder = artefact("vectors", {"content": content, "model": _identity(path), "version": version}, build)
    return Vectors(folder / "vectors.npy", model)


def reranked(path: str, query: str, texts: Sequence[str], key: str = "task") -> list[tuple[int, float]]:
    """(position, score) of texts by a cross-encoder's score of query and text, best first, ties by position.

    Scores are shifted so that the worst is 0. ConfigError if there is no such model.
    """
    import numpy as np

    model = load_reranker(path, key)
    with _lock:
        scores = np.asarray(model.predict([(query, text) for text in texts], show_progress_bar=False), np.float32)
    return [(int(i), float(scores[i] - scores.min())) for i in np.argsort(-scores, kind="stable")]


def _identity(path: str) -> list:
    """What tells one model from another: the hub id, or the path with names, sizes and times of its files."""
    folder = Path(path).expanduser()
    files = sorted(f for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else []
    stats = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return [str(folder.resolve()) if files else path, *map(list, stats)]


def load(path: str, key: str) -> Any:
    """The model of sentence-transformers at `path`. ConfigError if there is none."""
    return load_versioned(path, key)[0]


@functools.lru_cache(maxsize=2)
def load_versioned(path: str, key: str) -> tuple[Any, str]:
    return _loaded("SentenceTransformer", path, f"{key}.dense")


@functools.lru_cache(maxsize=2)
def load_reranker(path: str, key: str) -> Any:
    return _loaded("CrossEncoder", path, f"{key}.rerank")[0]


def _loaded(kind: str, path: str, where: str) -> tuple[Any, str]:
    try:
        import sentence_transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "Dense retrieval needs the package sentence-transformers, which is not installed",
            where=f"{where}={path}",
            fix=f"pip install 'assay[dense]', or set {where}=null for BM25 alone",
        ) from error
    try:
        return getattr(sentence_transformers, kind)(path), sentence_transformers.__version__
    except Exception as error:  # no such folder, no network, a damaged model: each of its own kind
        raise ConfigError(
            "The embedding model could not be loaded",
            where=f"{where}={path}",
            got=first_line(error),
            fix=f"set {where}= to a folder or hub id of sentence-transformers, or null",
        ) from error
