"""From checkpoints and texts to all numbers with their intervals; one model beside the base is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import stats
from experiments.engines.progress import progress_bar
from experiments.shift import measure
from experiments.shift.checkpoints import Checkpoint, paths
from experiments.shift.texts import Text, Texts, choose, sample
from methods import token_shift

Numbers = dict[str, stats.Interval]


@dataclass
class Dynamics:
    """Checkpoints as points: `points[p][k]` is the mean token cross-entropy of checkpoint p on reference set k.

    The same `rows` prompts are in all `sets`. `distance[p]` is from the base. `chains` are the paths (indices of
    checkpoints); `trajectories[c]` has the numbers of chain c: net, path, straightness, turning/<i> and tax/<i>, where
    i counts the points of the chain from 0.
    """

    sets: list[str]
    rows: int
    points: list[list[stats.Interval]]
    distance: list[stats.Interval]
    chains: list[list[int]]
    trajectories: list[Numbers]


@dataclass
class Comparison:
    """What the files show. `found[0]` is the base; entry i of `tokens`, `shift`, `difference` is of `found[i + 1]`.

    `tokens`: the arrays of `measure.compare`. `difference`: the shift's numbers minus those of `found[1]`, on the same
    tokens. `prompts` and `pieces`: each response's prompt and tokens as text.
    """

    found: list[Checkpoint]
    texts: Texts
    prompts: list[str]
    pieces: list[list[str]]
    tokens: list[dict[str, np.ndarray]]
    shift: list[Numbers]
    difference: list[Numbers]
    dynamics: Dynamics

    @property
    def new(self) -> list[Checkpoint]:
        return self.found[1:]

    @property
    def scale(self) -> float:
        """The |dp| that gets the full colour: the 98th percentile over all checkpoints, at least 0.05."""
        sizes = np.concatenate([np.abs(token["dp"]) for token in self.tokens])
        return max(0.05, float(np.quantile(sizes, 0.98)))


def compare(
    found: list[Checkpoint],
    references: Sequence[Checkpoint],
    config: Mapping[str, Any],
    how: str,
    items: int,
    seed: int,
) -> Comparison:
    """Load, sample the reference sets, read every text under every checkpoint, summarise.

    The reference sets are samples of the base, the texts (unless a checkpoint wrote them) and samples of each of
    `references`, on the prompts of the texts. Other arguments as in `texts.choose`.
    """
    base = found[0].load()
    measure.same_tokens(base, found[0].name, [one for one in (*found[1:], *references) if one.weights])
    texts = choose(how, base, found, config, items, seed)
    prompts = [(row.id, row.prompt) for row in texts.rows]
    longest = max(len(row.positions) for row in texts.rows)
    sets = [sample(f"samples of {found[0].name}", base, prompts, longest, seed)]
    sets += [] if texts.sampled else [texts]
    for one in references:
        loaded = one.load()
        measure.same_vocabulary(base, loaded, (found[0].name, one.name))
        sets.append(sample(f"samples of {one.name}", loaded, prompts, longest, seed))
    shared = set.intersection(*({row.id for row in one.rows} for one in sets))
    rows_KR = [[row for row in one.rows if row.id in shared] for one in sets]

    tokens, sums = [], []
    passes = (len(found) - 1) * len(texts.rows) + len(found) * sum(map(len, rows_KR))
    with progress_bar("reading the texts", passes, unit="responses") as advance:
        for loaded in _models(found, base):
            if loaded is not base:
                tokens.append(measure.compare(base.model, loaded.model, texts.rows, advance))
            sums.append([measure.cross_entropy(loaded.model, rows, advance) for rows in rows_KR])
    shift, difference = _shift(tokens)
    decode = base.tokenizer.decode
    return Comparison(
        found,
        texts,
        [decode(row.prompt) for row in texts.rows],
        [[decode([row.ids[i]]) for i in row.positions] for row in texts.rows],
        tokens,
        shift,
        difference,
        _dynamics(found, [one.by for one in sets], rows_KR, np.array(sums)),
    )


def _models(found: Sequence[Checkpoint], base: Any) -> Iterator[Any]:
    yield base
    for one in found[1:]:
        loaded = one.load()
        measure.same_vocabulary(base, loaded, (found[0].name, one.name))
        yield loaded


# ---------------------------------------------------------------- summaries


def _shift(tokens: Sequence[dict[str, np.ndarray]]) -> tuple[list[Numbers], list[Numbers]]:
    """Numbers of every new checkpoint, and those of the later ones minus those of the first."""

    # Sorted once, so that every draw finds the sizes in order.
    orders = [np.argsort(np.abs(one["dp"]), kind="stable") for one in tokens]
    columns = [(one["dp"][at], one["entropy"][at], one["kl"][at]) for one, at in zip(tokens, orders, strict=True)]

    def statistic(weight_N: np.ndarray) -> np.ndarray:
        found = [token_shift.shift(*c, weight_N=weight_N[at]) for c, at in zip(columns, orders, strict=True)]
        values = np.array([list(one.values()) for one in found])
        return np.concatenate([values, values[1:] - values[0]]).ravel()

    names = list(token_shift.shift(*columns[0]))
    found = stats.cluster_bootstrap(statistic, tokens[0]["response"])
    rows = [dict(zip(names, found[i : i + len(names)], strict=True)) for i in range(0, len(found), len(names))]
    return rows[: len(tokens)], rows[len(tokens) :]


def _dynamics(
    found: Sequence[Checkpoint], sets: list[str], rows_KR: Sequence[Sequence[Text]], sums_PKR: np.ndarray
) -> Dynamics:
    counts_KR = np.array([[len(row.positions) for row in rows] for rows in rows_KR], float)
    chains, P, K = paths(found), len(found), len(sets)

    def points(weight_R: np.ndarray) -> np.ndarray:
        return (sums_PKR @ weight_R) / (counts_KR @ weight_R)

    def statistic(weight_R: np.ndarray) -> np.ndarray:
        x = points(weight_R)
        distance = np.linalg.norm(x - x[0], axis=1)
        return np.concatenate([x.ravel(), distance, *(list(_numbers(x, found, c).values()) for c in chains)])

    values = stats.cluster_bootstrap(statistic, np.arange(len(rows_KR[0])))
    at = iter(values)
    grid = [[next(at) for _ in range(K)] for _ in range(P)]
    distance = [next(at) for _ in range(P)]
    middle = points(np.ones(len(rows_KR[0])))
    numbers = [{name: next(at) for name in _numbers(middle, found, chain)} for chain in chains]
    return Dynamics(sets, len(rows_KR[0]), grid, distance, chains, numbers)


def _numbers(points_PK: np.ndarray, found: Sequence[Checkpoint], chain: Sequence[int]) -> dict[str, float]:
    path = token_shift.trajectory(points_PK[list(chain)])
    values = {"net": path.net, "path": path.path, "straightness": path.straightness}
    values |= {f"turning/{i}": cosine for i, cosine in enumerate(path.turning, start=1)}
    # Inside one run there is no stage to end; only where training goes on as another run is there a tax.
    ends = [i for i in range(1, len(chain) - 1) if len(chain) == 3 or _switches(found[chain[i]], found[chain[i + 1]])]
    return values | {f"tax/{i}": path.tax[i - 1] for i in ends}


def _switches(one: Checkpoint, following: Checkpoint) -> bool:
    return one.run is None or one.run != following.run
