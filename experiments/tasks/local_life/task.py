"""task=local_life: multi-hop requests about local services, answered by an agent with tools (LocalSearchBench)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from experiments.tasks.base import Row, Task, shuffled
from experiments.tasks.local_life import metrics, prompts
from experiments.tasks.local_life.playground import TOOLS, UNSEEN, Playground, Tags, Visit
from experiments.tasks.local_life.sources import Source, of_path, of_seed
from experiments.tasks.local_life.verdicts import build_judge, judged
from experiments.tools import Tools
from methods.errors import ConfigError, DataError, check_range, nearest

if TYPE_CHECKING:
    from experiments.tasks.local_life.judge import Judge
    from experiments.tasks.local_life.questions import Question
    from experiments.tasks.local_life.world import World
    from methods.base import Trajectory

SPLITS = ("train", "eval", "test")
CHECKS = ("type", "place", "price", "time", "other", "key")


@dataclass
class LocalLife(Task):
    """Questions over a world of merchants: generated ones with exact answers, or those of `path`.

    path: a folder that `python -m experiments.tasks.local_life.data` wrote, or LocalSearchBench's own question file;
    "" generates a world per split from `world_seeds`, so that the cities of one split are never those of another.
    corpus: a merchant file (JSONL) for public questions; null takes the merchants that their search paths name, which
    is a far easier corpus. rounds: N of the paper's agent loop; after N rounds of calls one answer is forced.
    retrieve, show, dense, rerank: LocalRAG (`playground.Playground`). judge: an engine, in a line as
    `'+engine@task.judge=openai' task.judge.url=URL`; None leaves fluency, safety and the scores of a trajectory empty,
    and public questions without a score.

    Row.answer is the list of gold ids, None for public questions. The score is correctness: the ids cited behind
    【Answer】 are the gold ones in their order, and each was retrieved in this rollout. Row ids begin with a city.
    Differs from the paper: BM25 in place of its embedding and reranking models; exact scores in place of a judge's;
    all tags of a reply are run in their order.
    """

    name: str = "local_life"
    max_prompt_tokens: int = 2048
    max_completion_tokens: int = 32_768
    tiers: tuple[str, ...] = ("L3", "L4")
    path: str = ""
    corpus: str | None = None
    world_seeds: dict[str, int] = field(default_factory=lambda: {"train": 1, "eval": 2, "test": 3})
    size: int = 6000
    cities: int = 3
    districts: int = 5
    areas: int = 3
    questions: int = 300
    language: str = "en"
    rounds: int = 5
    retrieve: int = 100
    show: int = 20
    dense: str | None = None
    rerank: str | None = None
    max_turn_tokens: int | None = None
    max_result_tokens: int = 8192
    judge: Any = None
    judge_tokens: int = 18_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("rounds", "show", "max_result_tokens", "judge_tokens"):
            check_range(f"task.{key}", getattr(self, key), 1)
        check_range("task.retrieve", self.retrieve, self.show)
        check_range("task.questions", self.questions, 0)
        if self.corpus and not self.path:
            raise ConfigError(
                "A merchant file belongs to a file of questions", where="task.corpus", got=self.corpus,
                fix="give the questions too: task.path=FILE",
            )  # fmt: skip
        if set(self.world_seeds) != set(SPLITS) or len(set(self.world_seeds.values())) < len(SPLITS):
            raise ConfigError(
                "Each split needs a world of its own", where="task.world_seeds", got=self.world_seeds,
                expected="different seeds for train, eval and test",
            )  # fmt: skip
        self._sources: dict[str, Source] = {}
        self._grounds: dict[str, Playground] = {}
        self._questions: dict[str, tuple[str, Question]] = {}

    # ---------------------------------------------------------------- worlds and rows

    def playground(self, split: str) -> Playground:
        """The tools of the world of a split."""
        source = self._source(split)
        return self._grounds.setdefault(source.name, self._ground(source.world))

    def _ground(self, world: World) -> Playground:
        return Playground(world, retrieve=self.retrieve, show=self.show, dense=self.dense, rerank=self.rerank)

    def _source(self, split: str) -> Source:
        if split not in SPLITS:
            fix = nearest(split, SPLITS) or "choose one"
            raise ConfigError("Unknown split", where="eval.split", got=split, expected=", ".join(SPLITS), fix=fix)
        if split not in self._sources:
            shape = {"cities": self.cities, "districts": self.districts, "areas": self.areas, "language": self.language}
            if self.path:
                self._sources[split] = of_path(self.path, self.corpus)
            else:
                self._sources[split] = of_seed(self.world_seeds[split], self.size, self.questions, **shape)
        return self._sources[split]

    def rows(self, split: str, seed: int) -> list[Row]:
        """Rows in the order fixed by `seed`. Raises DataError for a source that cannot be used or has no such split:
        public questions are there for evaluation only."""
        rows = [self._row(question, split) for question in self._source(split).of_split(split)]
        if not rows:
            raise DataError("There are no questions", where="task.questions", got=self.questions, expected="at least 1")
        return shuffled(rows, seed, "local_life", split)

    def _row(self, question: Question, split: str) -> Row:
        name = f"{question.city}/{question.id}"
        self._questions[name] = (split, question)
        asked = prompts.messages(question.text, question.city, self.rounds, question.language)
        meta = {
            "city": question.city,
            "hops": question.hops,
            "hop_queries": list(question.hop_queries),
            "web_queries": list(question.web_queries),
            "style": question.style,
            "reference": question.reference,
        }
        gold = None if question.gold is None else list(question.gold)
        return Row(name, asked, gold, question.level, meta=meta)

    # ---------------------------------------------------------------- episodes

    @property
    def tools(self) -> Tools:
        # The questions of a file may be in either language.
        last = " ".join(prompts.LAST.values()) if self.path else prompts.LAST[self.language]
        return Tools(Tags(), self.rounds, self.max_turn_tokens, self.max_result_tokens, last=last)

    def environment(self, row: Row) -> Visit:
        return Visit(self.playground(self._questions[row.id][0]), row.meta["city"])

    def score(self, text: str, row: Row) -> float:
        """Correctness of a reply whose unseen ids are marked; NaN where there is no gold answer."""
        if row.answer is None:
            return math.nan
        answer, part = metrics.cited(text), metrics.answer_part(text)
        return metrics.correctness(answer, row.answer, () if UNSEEN in part else answer)

    def episode_metrics(self, traj: Trajectory, row: Row) -> dict[str, float]:
        return self.measure([traj])[0]

    def measure(self, trajs: Sequence[Trajectory]) -> list[dict[str, float]]:
        """Exact metrics of each rollout, and the judge's where there is one (see README, local-life)."""
        episodes = [self._episode(traj) for traj in trajs]
        values = [self._exact(traj, reply, calls) for traj, (reply, calls) in zip(trajs, episodes, strict=True)]
        if self.judge is None:
            return values
        grounds = [self.playground(self._questions[traj.row.id][0]) for traj in trajs]
        for value, verdict in zip(values, judged(self._judge, trajs, episodes, grounds), strict=True):
            value |= verdict
        return values

    @cached_property
    def _judge(self) -> Judge:
        return build_judge(self.judge, self.judge_tokens)

    def _episode(self, traj: Trajectory) -> tuple[str, list[metrics.Call]]:
        """What the model wrote last, and the calls that were carried out."""
        reply = traj.turns[-1].text if traj.turns and traj.finish != "error" else ""
        return reply, self.environment(traj.row).replay(traj.turns)

    def _exact(self, traj: Trajectory, reply: str, calls: list[metrics.Call]) -> dict[str, float]:
        row, meta = traj.row, traj.row.meta
        answer, seen = metrics.cited(reply), metrics.retrieved(calls)
        coverage = metrics.hop_coverage(meta["hop_queries"], calls)
        gold = row.answer or []
        slots = len(gold) or len(meta["hop_queries"])
        faithful = metrics.faithfulness(answer, metrics.claims_of(reply), self._records(row, answer), seen)
        known = row.answer is not None
        values = {
            "correctness": metrics.correctness(answer, gold, seen) if known else math.nan,
            "slot_share": metrics.slot_share(answer, gold) if known else math.nan,
            "in_context": metrics.in_context(answer, seen),
            "completeness": metrics.completeness(reply, calls, slots, TOOLS),
            "faithfulness": math.nan if faithful is None else faithful,
            "calls": float(len(calls)),
            "rounds": float(len(traj.turns)),
            "calls_per_hop": len(calls) / max(meta["hops"], 1),
            "redundant": metrics.redundant_share(calls),
        }
        for name in ("accuracy", "ratio", "missing", "invalid", "extra"):
            values[f"hop_{name}"] = math.nan if coverage is None else float(getattr(coverage, name))
        blank = dict.fromkeys(metrics.evidence((), ()), math.nan)
        values |= metrics.evidence(gold, calls) if known else blank
        return values | self._checklist(row, answer)

    def _records(self, row: Row, answer: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        world = self.playground(self._questions[row.id][0]).world
        records: dict[str, Mapping[str, Any]] = {}
        for merchant in (world.merchant(poi) for poi in answer if poi in world):
            price, rating, hours = merchant.avg_price, merchant.rating, merchant.hours
            records[merchant.poi_id] = {
                "price": None if price != price else price,
                "rating": None if rating != rating else rating,
                "hours": None if hours is None else frozenset(span for day in hours.days for span in day),
                "address": merchant.address or None,
                "name": merchant.name,
            }
        return records

    def _checklist(self, row: Row, answer: Sequence[str]) -> dict[str, float]:
        """check_<kind>: share of the slots with such a condition where the answer meets it."""
        split, question = self._questions[row.id]
        if question.verifier is None or question.gold is None:
            return {f"check_{kind}": math.nan for kind in CHECKS}
        solver = self._source(split).solver
        due, met = solver.checklist(question.verifier, question.gold), solver.checklist(question.verifier, answer)
        values = {}
        for kind in CHECKS:
            names = [name for name in due if name.split()[-1] == kind]
            values[f"check_{kind}"] = sum(met.get(n, False) for n in names) / len(names) if names else math.nan
        return values
