"""The constraint world as a task for a direct judge, as items in the benchmarks' formats, and as files of these."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.files import new_folder, replace
from experiments.judging.formats import LLMBAR_ROWS, RM_ROWS, RMB_ROWS, V1_ROWS, V2_ROWS, read_item
from experiments.judging.pairs import Item
from experiments.judging.world import SYMBOLS as WORLD
from experiments.judging.world import Case, case
from experiments.seeds import derive
from experiments.tasks.base import Row, Task
from methods.errors import ConfigError, check_range, nearest

LEVELS = ("easy", "normal", "hard")
FIRST, SECOND, ASK = "\nA: ", "\nB: ", "\nbetter: "
SYMBOLS = (*WORLD, FIRST, SECOND, ASK, "A", "B")
LOSERS = {2: 2878, 3: 712, 4: 165, 5: 24, 6: 7}  # RMB's best-of-N items by their number of losers


def level(chosen: int, rejected: int) -> str:
    """RM-Bench's name for a pair of styles: hard where the chosen answer is the plainer one, easy where it is not."""
    return LEVELS[1 + (chosen < rejected) - (chosen > rejected)]


def training_styles(right: Sequence[str], wrong: Sequence[str], longer: bool, rng: random.Random) -> tuple[int, int]:
    """A pair of styles in which the chosen answer is longer (or is not), any if there is no such pair."""
    every = [(i, j) for i in range(3) for j in range(3)]
    fitting = [(i, j) for i, j in every if (len(right[i]) > len(wrong[j])) == longer]
    return rng.choice(fitting or every)


@dataclass
class ConstraintWorld(Task):
    """`has a; count c=2\\nA: ...\\nB: ...\\nbetter: ` -> `A` or `B`: the answer that keeps both rules.

    In training pairs the chosen answer is longer in the share `longer`, by its style alone; in the evaluation each case
    comes in one of the nine pairs of styles (tiers easy, normal, hard). A or B is a coin flip. `Row.meta` holds the two
    answers by grade, the eight rules and which two are required.
    """

    name: str = "constraint_world"
    symbols: tuple[str, ...] | None = SYMBOLS
    max_prompt_tokens: int = 128
    max_completion_tokens: int = 2
    tiers: tuple[str, ...] = field(default=LEVELS, init=False)
    longer: float = 0.8
    train_rows: int = 3000
    eval_rows: int = 900

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("task.longer", self.longer, 0, 1)

    def rows(self, split: str, seed: int) -> list[Row]:
        if split not in ("train", "eval", "test"):
            raise ConfigError("Unknown split", where="task", got=split, expected="train, eval or test")
        count = self.train_rows if split == "train" else self.eval_rows
        return [self._row(k, case(seed, f"{split}-{k}"), split) for k in range(count)]

    def _row(self, k: int, found: Case, split: str) -> Row:
        right, wrong, rng = found.answers(True), found.answers(False), random.Random(derive(found.seed, "row"))
        i, j = k % 3, k // 3 % 3
        if split == "train":
            i, j = training_styles(right, wrong, rng.random() < self.longer, rng)
        gold = rng.choice("AB")
        texts = (right[i], wrong[j]) if gold == "A" else (wrong[j], right[i])
        meta = {"chosen": right[i], "rejected": wrong[j], **found.meta()}
        demo = gold if split == "train" else None
        return Row(found.id, asked(found.instruction, *texts), gold, level(i, j), demo, meta=meta)

    def score(self, text: str, row: Row) -> float:
        """1 for the right letter and nothing else."""
        return float(text.strip() == row.answer)


def asked(instruction: str, a: str, b: str) -> str:
    """The direct judge's prompt."""
    return f"{instruction}{FIRST}{a}{SECOND}{b}{ASK}"


# ---------------------------------------------------------------- items in the benchmarks' formats


@dataclass
class ConstraintBenchmark:
    """Items of the world in the format `name`, `count` of them, the same for the same seed and split.

    Subsets are those of the real benchmark, about in its proportions, so that every published aggregate is exercised.
    `pairs` are training pairs: the chosen answer is longer in the share `longer`.
    """

    name: str = "rm_bench"
    count: int = 300
    split: str = "eval"
    longer: float = 0.8
    seed: int = 0
    official: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.name not in RECORDS:
            hint = nearest(self.name, RECORDS)
            what = "The constraint world has no such format" + (f"; {hint}" if hint else "")
            raise ConfigError(what, where="benchmark.name", got=self.name, expected=", ".join(RECORDS))
        check_range("benchmark.count", self.count, 1)
        check_range("benchmark.longer", self.longer, 0, 1)

    @property
    def source(self) -> str:
        return f"constraint_world/{self.split}/seed{self.seed}"

    def stream(self) -> Iterator[Item]:
        for number, record in enumerate(self.records()):
            yield read_item(self.name, record, f"{self.source}, row {number + 1}")

    def records(self) -> Iterator[dict]:
        """The rows as a file of this format has them."""
        for k in range(self.count):
            found = case(self.seed, f"{self.name}-{self.split}-{k}")
            yield RECORDS[self.name](k, found, self)

    def write(self, path: str | Path) -> Path:
        """All rows as a jsonl file in the benchmark's own format."""
        path = Path(path)
        with new_folder(path.parent):
            replace(path, "".join(json.dumps(record) + "\n" for record in self.records()).encode())
        return path


def place(k: int, count: int, rows: Mapping[str, int]) -> str:
    """The subset of item k of `count`: each subset in turn, about as often as in `rows`."""
    at = (k + 0.5) / count * sum(rows.values())
    for name, size in rows.items():
        at -= size
        if at < 0:
            return name
    return list(rows)[-1]


def _rewardbench(k: int, found: Case, world: ConstraintBenchmark) -> dict:
    texts = {"chosen": found.answers(True)[k % 3], "rejected": found.answers(False)[k // 3 % 3]}
    names = {"id": k, "subset": place(k, world.count, V1_ROWS), "chosen_model": "program", "rejected_model": "program"}
    return {"prompt": found.instruction, **texts, **names}


def _rewardbench2(k: int, found: Case, world: ConstraintBenchmark) -> dict:
    """One right among four; at the end Ties: by twos, one prompt with a single right answer and one with several."""
    subset, rng = place(k, world.count, V2_ROWS), random.Random(derive(found.seed, "list"))
    single = subset != "Ties" or k % 2 == 0
    chosen = [found.answers(True, n)[rng.randrange(3)] for n in range(1 if single else rng.randint(2, 8))]
    rejected = [
        found.answers(False, n)[rng.randrange(3)] for n in range(3 if subset != "Ties" else rng.randint(10, 12))
    ]
    name = f"{'ref' if single else 'tied'}:{k // 2}" if subset == "Ties" else str(k)
    counts = {"num_correct": len(chosen), "num_incorrect": len(rejected), "total_completions": len(chosen + rejected)}
    whole = {"id": name, "prompt": found.instruction, "chosen": chosen, "rejected": rejected, **counts}
    return {**whole, "models": ["program"], "subset": subset}


def _rm_bench(k: int, found: Case, world: ConstraintBenchmark) -> dict:
    texts = {"chosen": list(found.answers(True)), "rejected": list(found.answers(False))}
    return {"id": f"world/{k}", "prompt": found.instruction, **texts, "domain": place(k, world.count, RM_ROWS)}


def _rmb(k: int, found: Case, world: ConstraintBenchmark) -> dict:
    """Every seventh item has an earlier turn, which asked for something else."""
    rng, path = random.Random(derive(found.seed, "list")), place(k, world.count, RMB_ROWS)
    turns = [{"role": "user", "content": found.instruction, "language": "rules"}]
    if k % 7 == 0:
        other = case(world.seed, f"{found.id}-before")
        before = [("user", other.instruction), ("assistant", other.answers(True)[0])]
        turns = [{"role": role, "content": text, "language": "rules"} for role, text in before] + turns
    losers = rng.choices(list(LOSERS), weights=list(LOSERS.values()))[0] if path.startswith("BoN") else 1
    best = {"llm_name": "program", "answer": found.answers(True)[rng.randrange(3)]}
    worse = [{"llm_name": "program", "answer": found.answers(False, n)[rng.randrange(3)]} for n in range(losers)]
    row = {"conversation_input": turns, "category_path": f"{path}/Rules"}
    if path.startswith("BoN"):
        return {"bon_uid": str(k), **row, "bon_best": best, "loser_list": worse}
    return {"pair_uid": str(k), **row, "chosen": best, "reject": worse[0]}


def _llmbar(k: int, found: Case, world: ConstraintBenchmark) -> dict:
    texts, label = [found.answers(True)[k % 3], found.answers(False)[k // 3 % 3]], 1
    if random.Random(derive(found.seed, "label")).random() < 0.5:
        texts, label = texts[::-1], 2
    row = {"id": str(k), "subset": place(k, world.count, LLMBAR_ROWS), "input": found.instruction}
    return {**row, "output_1": texts[0], "output_2": texts[1], "label": label}


def _pairs(k: int, found: Case, world: ConstraintBenchmark) -> dict:
    right, wrong, rng = found.answers(True), found.answers(False), random.Random(derive(found.seed, "row"))
    i, j = training_styles(right, wrong, rng.random() < world.longer, rng)
    return {"id": str(k), "prompt": found.instruction, "chosen": right[i], "rejected": wrong[j], **found.meta()}


RECORDS: dict[str, Callable[[int, Case, ConstraintBenchmark], dict]] = {
    "rewardbench": _rewardbench,
    "rewardbench2": _rewardbench2,
    "rm_bench": _rm_bench,
    "rmb": _rmb,
    "llmbar": _llmbar,
    "pairs": _pairs,
}
