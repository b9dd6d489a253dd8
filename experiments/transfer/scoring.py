"""Scores of domains on the untouched model: features with and without demonstrations, a part on disk per domain.

A part holds sums per text, so that intervals over texts need no second reading. Each part is written whole or not at
all, and names what it was made from: an interrupted scoring goes on with the next domain.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.artefacts import cache_root, digest
from experiments.capture import Capture, Passage, Vectors
from experiments.files import os_errors, replace
from experiments.passages import MOST_SKIPPED, Prompter
from experiments.transfer.data import Example, refuse_too_few
from methods.errors import DataError
from methods.sts.sae import SAE
from methods.sts.scores import FeatureSums, PairSums, Selection, count_for_share, select

if TYPE_CHECKING:
    from experiments.weights import LoadedModel

SHOWN = 5  # texts per latent and domain that are kept for the page
AROUND = (160, 60)  # characters of a text that are shown before and behind the token


@dataclass
class Scorer:
    """Reads texts through one model and SAE. `demos`, `tokens`: of a domain; `source_demos`, `source_tokens`."""

    loaded: LoadedModel
    sae: SAE
    seed: int
    source_demos: int = 2
    source_tokens: int = 20_000
    demos: int = 5
    tokens: int = 10_000
    context: int | None = None
    batch_tokens: int = 4096
    longest: float | None = None  # leave out tokens whose vector is longer than so many times their text's median
    read: int = field(default=0, init=False)  # tokens that went through the model, demonstrations included
    seconds: float = field(default=0.0, init=False)  # that this took, features included
    skipped: int = field(default=0, init=False)  # texts of the last domain that did not fit
    left_out: int = field(default=0, init=False)  # tokens of the last domain or source that were too long

    def __post_init__(self) -> None:
        assert self.sae.layer is not None
        self.capture = Capture(self.loaded.model, self.sae.layer, self.batch_tokens)
        context = self.context and min(self.context, self.capture.context or self.context)
        self.prompter = Prompter(self.loaded, context=context)
        self.plain = Prompter(self.loaded, chat=False, context=context)

    def pairs(self, examples: Sequence[Example], demos: int, tokens: int) -> list[tuple[Example, Passage, Passage]]:
        """Queries, each alone and behind the first `demos` examples, until `tokens` of them count.

        DataError if too few examples are there, or more than a fifth does not fit the context.
        """
        refuse_too_few(examples, demos)
        first = [e.asked for e in examples[:demos]]
        prompter = self.plain if examples[0].is_text else self.prompter
        found, left, skipped = [], tokens, 0
        for query in examples[demos:]:
            if query.asked in first:
                continue
            pair = prompter.pair(query.asked, first)
            if pair is None:
                skipped += 1
                continue
            found.append((query, *pair))
            left -= found[-1][1].tokens
            if left <= 0:
                break
        if not found or skipped > MOST_SKIPPED * (skipped + len(found)):
            raise DataError(
                "Too many texts do not fit into the model's context behind one demonstration",
                where=f"domain {examples[0].domain}",
                got=f"{skipped} of {skipped + len(found)} skipped, context {prompter.context} tokens",
                expected=f"at most {MOST_SKIPPED:.0%} skipped",
                fix="give shorter texts (plain ones are cut to score.piece characters), or raise score.context",
            )
        self.skipped = skipped
        return found

    def source(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Step 1 on the source: sums over all latents."""
        found = PairSums()
        for _, base_Ts, context_Ts, _ in self._features(self.pairs(examples, self.source_demos, self.source_tokens)):
            found.add(base_Ts, context_Ts)
        tensors = {
            "delta": found.delta_s,
            "unaligned": found.unaligned_s,
            "suppressed": found.suppressed_s,
            "mean": found.base.mean_s,
        }
        counts = {"tokens": np.array([found.tokens]), "left_out": np.array([self.left_out])}
        return {name: value.cpu().numpy() for name, value in tensors.items()} | counts

    def domain(self, examples: Sequence[Example], selected: dict[str, list[int]]) -> dict[str, np.ndarray]:
        """Step 2 on a domain: per text (N) sums over tokens of sum_{j in D} h_j, of squares, of squared shifts, for
        the aligned D (`act`, `squares`, `icl`) and the release's (`released`); per latent of D the strongest token of
        each text (`best`, `place`, both (N, D)); `mean` and `square` over all latents (s)."""
        pairs = self.pairs(examples, self.demos, self.tokens)
        count = len(pairs)
        chosen, release = selected["latents"], selected["release"]
        per_text = {k: np.zeros(count) for k in ("act", "squares", "icl", "released", "tokens")}
        best = np.zeros((count, len(chosen)), dtype=np.float32)
        place = np.zeros((count, len(chosen)), dtype=np.int64)
        found = FeatureSums()
        for row_T, base_Ts, context_Ts, offset_T in self._features(pairs):
            found.add(base_Ts)
            h_TD = base_Ts[:, chosen].double()
            moved_TD = (h_TD - context_Ts[:, chosen].double()).square()
            values = (h_TD.sum(1), h_TD.square().sum(1), moved_TD.sum(1), base_Ts[:, release].double().square().mean(1))
            for key, value_T in zip(("act", "squares", "icl", "released"), values, strict=True):
                np.add.at(per_text[key], row_T, value_T.cpu().numpy())
            np.add.at(per_text["tokens"], row_T, 1)
            strongest(h_TD.float().cpu().numpy(), row_T, offset_T, best, place)
        mean = {"mean": found.mean_s.cpu().numpy(), "square": found.mean_square_s.cpu().numpy()}
        return per_text | {"best": best, "place": place} | mean

    def _features(
        self, pairs: Sequence[tuple[Example, Passage, Passage]]
    ) -> Iterator[tuple[np.ndarray, Any, Any, Any]]:
        """(row_T, base (T, s), context (T, s), offset_T) per batch; `offset_T` is the token's place in its text."""
        began, self.left_out = time.monotonic(), 0
        self.read += sum(len(p.ids) for _, *both in pairs for p in both)
        for base, context in self.capture.read_pairs((b, c) for _, b, c in pairs):
            row_T = base.row_T.cpu().numpy()
            starts = np.flatnonzero(np.r_[True, row_T[1:] != row_T[:-1]])
            lengths = np.diff(np.r_[starts, len(row_T)])
            offset_T = np.arange(len(row_T)) - np.repeat(starts, lengths)
            keep_T = self.usual(base) & self.usual(context)
            self.left_out += int((~keep_T).sum())
            kept = keep_T.cpu().numpy()
            base_Ts, context_Ts = (self.features(vectors.z_Td[keep_T]) for vectors in (base, context))
            yield row_T[kept], base_Ts, context_Ts, offset_T[kept]
        self.seconds += time.monotonic() - began

    def usual(self, vectors: Vectors) -> torch.Tensor:
        """(T,) which tokens are no attention sinks: their vectors are not `longest` times as long as the text's median.

        Models put sinks on the first token of some texts; with demonstrations in front the same token is none. One of
        2,077 tokens (smollm2, math_word; its vector 80 times as long as the others) made 96 % of the squared shift.
        """
        length_T = vectors.z_Td.float().norm(dim=1)
        keep_T = torch.ones_like(length_T, dtype=torch.bool)
        # Where no token is that much longer than the shortest of all, none is than its median.
        if self.longest is not None and len(length_T) and length_T.max() > self.longest * length_T.min():
            for row in vectors.row_T.unique().tolist():
                of_text_T = vectors.row_T == row
                keep_T[of_text_T] = length_T[of_text_T] <= self.longest * length_T[of_text_T].median()
        return keep_T

    def features(self, z_Td: torch.Tensor) -> torch.Tensor:
        """(T, s) features of residual vectors."""
        return self.sae.encode(z_Td)

    def scored(
        self, examples: Sequence[Example], latents: dict[str, list[int]]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """`domain` with, per text, which text of the table it is a piece of, and per latent the texts to be shown."""
        part = self.domain(examples, latents)
        left_out = self.left_out
        pairs = self.pairs(examples, self.demos, self.tokens)
        texts = [query.id.partition(",")[0] for query, _, _ in pairs]
        numbers = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        shown = [
            [
                {"value": float(part["best"][row, d]), **self._snippet(pairs[row][1], int(part["place"][row, d]))}
                for row in np.argsort(-part["best"][:, d], kind="stable")[:SHOWN].tolist()
                if part["best"][row, d] > 0
            ]
            for d in range(part["best"].shape[1])
        ]
        info = {"skipped": self.skipped, "left_out": left_out}
        return part, {**info, "clusters": [numbers[text] for text in texts], "shown": shown}

    def _snippet(self, passage: Passage, place: int) -> dict[str, str]:
        ids, decode = passage.counted, self.loaded.tokenizer.decode
        return {
            "before": decode(ids[max(0, place - 40) : place])[-AROUND[0] :],
            "token": decode([ids[place]]),
            "after": decode(ids[place + 1 : place + 21])[: AROUND[1]],
        }


def strongest(h_TD: np.ndarray, row_T: np.ndarray, offset_T: np.ndarray, best: np.ndarray, place: np.ndarray) -> None:
    """Put each text's largest feature and its place into `best` and `place`; a text is never split over batches."""
    starts = np.flatnonzero(np.r_[True, row_T[1:] != row_T[:-1]])
    for start, end in zip(starts, np.r_[starts[1:], len(row_T)], strict=True):
        at = h_TD[start:end].argmax(0)
        best[row_T[start]] = h_TD[start:end][at, np.arange(h_TD.shape[1])]
        place[row_T[start]] = offset_T[start + at]


def selection(part: dict[str, np.ndarray], n: int | None, share: float, kind: str = "delta") -> Selection:
    """D_N from the source's part; N None is the smallest one that holds `share` of the shift."""
    delta_s = torch.from_numpy(part[kind])
    return select(delta_s, n or count_for_share(delta_s, share))


# ---------------------------------------------------------------- parts on disk


def part_file(made_from: dict[str, Any]) -> Path:
    """Where the part made from these things lies: runs that differ in their output only share it."""
    return cache_root() / "transfer" / f"{digest(made_from)[:20]}.safetensors"


def keep_part(path: Path, made_from: dict[str, Any], arrays: dict[str, np.ndarray], info: Any = None) -> None:
    """Write one part as a whole. `made_from` must be the same for it to be taken up later."""
    from safetensors.numpy import save

    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    header = {"made_from": json.dumps(made_from, sort_keys=True), "info": json.dumps(info)}
    replace(path, save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata=header))


def kept_part(path: Path, made_from: dict[str, Any]) -> tuple[dict[str, np.ndarray], Any] | None:
    """The part and its info, or None where there is none, it is damaged, or it was made from something else."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("made_from") != json.dumps(made_from, sort_keys=True):
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header["info"])  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, OSError):
        return None
