"""What methods may ask of the bench: sampling, scoring, forwards, embeddings, a judge, random streams."""

from __future__ import annotations

import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.seeds import derive
from experiments.team import ALONE
from experiments.tools import ToolRunner
from methods.base import Trajectory, assemble
from methods.errors import ConfigError

EMBED_DIM = 512


class Services:
    """Services around an engine; every call is timed under `time/service/<kind>`, apart from the hooks.

    On several processes all make the same calls and the work is divided; inside `apart()` each works for itself alone.
    """

    step = 0
    team = ALONE

    def __init__(self, engine: Any, task: Any, seed: int, limits: SimpleNamespace, tokenizer: Any = None) -> None:
        self._engine, self.task, self.seed, self.limits, self.tokenizer = engine, task, seed, limits, tokenizer
        self.cost: dict[str, int] = defaultdict(int)
        self.judge_engine: Any = None
        self.seconds: dict[str, float] = defaultdict(float)
        self._orders: dict[tuple[int, str], np.ndarray] = {}
        self._depth = 0
        self._apart = False
        self._runner: ToolRunner | None = None
        self._calls: Counter[str] = Counter()
        self._calls_step = -1

    @property
    def engine(self) -> Any:
        return self._engine

    @property
    def rank(self) -> int:
        """What random streams are told apart by: all processes draw the same, except apart."""
        return self.team.rank if self._apart else 0

    @contextmanager
    def apart(self):
        """Inside, calls are this process's own, on rows that no other process has."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def _divided(self, items: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
        return list(work(items)) if self._apart else self.team.divided(items, work)

    @contextmanager
    def counted(self, kind: str):
        """Times a service; nested services are counted once, under the outer one."""
        started, self._depth = time.perf_counter(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                spent = time.perf_counter() - started
                self.seconds[kind] += spent
                self._charge(spent)

    def _charge(self, seconds: float) -> None: ...

    def take_seconds(self) -> dict[str, float]:
        taken = {f"time/service/{k}": v for k, v in self.seconds.items()}
        self.seconds.clear()
        return taken

    def stream(self, name: str) -> int:
        """A seed for the next use of the stream `name`: it goes on within a step and starts anew with each step, so
        that a resumed run draws the same."""
        if self._calls_step != self.step:
            self._calls_step, self._calls = self.step, Counter()
        self._calls[name] += 1
        return derive(self.seed, "generate", name, self.step, self.rank, self._calls[name])

    def encode(self, prompts: Sequence[Any]) -> list[list[int]]:
        from experiments.engines.base import Request
        from experiments.engines.base import encode as ids_of

        if self.tokenizer is None:
            raise ConfigError(
                "a method asks for token ids, which this engine does not know",
                where="engine",
                got=self.engine.name,
                fix="choose engine=transformers",
            )
        asked = [Request(prompt=p) if isinstance(p, str) else Request(messages=p) for p in prompts]
        with self.counted("encode"):
            return [ids_of(self.tokenizer, request, self.engine.chat) for request in asked]

    def generate(self, requests: Sequence[Any], stream: str) -> list[list[Any]]:
        from dataclasses import replace

        from experiments.engines.base import Request

        with self.counted("generate"):
            base = self.stream(stream)
            requests = [Request(**r) if isinstance(r, dict) else r for r in requests]
            seeded = [replace(r, seed=derive(base, i)) if r.seed is None else r for i, r in enumerate(requests)]
            return self._divided(seeded, self._generated)

    def _generated(self, requests: Sequence[Any]) -> list[list[Any]]:
        results = self.engine.generate(requests)
        self.cost["generated_tokens"] += sum(r.usage.completion_tokens for rs in results for r in rs)
        return results

    def score(self, texts: Sequence[str], rows: Sequence[Any]) -> list[float]:
        with self.counted("score"):
            pairs = list(zip(texts, rows, strict=True))
            return self._divided(pairs, lambda some: [self.task.score(text, row) for text, row in some])

    def measure(self, texts: Sequence[str], rows: Sequence[Any]) -> list[dict[str, float]]:
        with self.counted("score"):
            pairs = list(zip(texts, rows, strict=True))
            return self._divided(pairs, lambda some: [self.task.metrics(text, row) for text, row in some])

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), 512) unit vectors of hashed words and character trigrams: needs no model, same everywhere.

        An empty text gives the zero vector.
        """
        with self.counted("embed"):
            out = np.zeros((len(texts), EMBED_DIM), dtype=np.float32)
            for i, text in enumerate(texts):
                lowered = f" {text.lower().strip()} "
                features = lowered.split() + [lowered[k : k + 3] for k in range(len(lowered) - 2)] * bool(
                    lowered.strip()
                )
                hashes = np.array([zlib.crc32(f.encode()) for f in features], dtype=np.int64)
                np.add.at(out[i], hashes % EMBED_DIM, np.where(hashes >> 16 & 1, 1.0, -1.0).astype(np.float32))
            norms = np.linalg.norm(out, axis=1, keepdims=True)
            return torch.from_numpy(out / np.maximum(norms, 1e-12))

    def judge(self, requests: Sequence[Any]) -> list[list[Any]]:
        from experiments.engines.base import Request

        if self.judge_engine is None:
            raise ConfigError(
                "a method asks for a judge and none is configured",
                where="judge",
                fix="add +engine@judge=openai judge.url=http://localhost:8000/v1",
            )
        with self.counted("judge"):
            asked = [Request(**r) if isinstance(r, dict) else r for r in requests]
            return self._divided(asked, self._judged)

    def _judged(self, requests: Sequence[Any]) -> list[list[Any]]:
        self.cost["judge_calls"] += len(requests)
        return self.judge_engine.generate(requests)

    def forward(self, trajs: list[Trajectory], what: Sequence[str]) -> dict[str, Tensor]:
        raise ConfigError("a method asks for a forward pass, which only training gives", fix="guard it with ctx.mode")

    def env(self, row: Any) -> Any:
        return self.task.environment(row)

    def call(self, jobs: Sequence[tuple[Any, Any]]) -> list[str]:
        """Tool calls with the time-out of the task's own tool loop, where it has one."""
        if self._runner is None:
            tools = self.task.tools
            self._runner = ToolRunner(tools.timeout if tools else None)
        with self.counted("tools"):
            return self._runner(jobs)

    def gather(self, x: Tensor) -> Tensor:
        """x itself where all processes have the same; apart, the parts of all processes."""
        if not self._apart or self.team.size == 1:
            return x
        return torch.cat([part.to(x.device) for part in self.team.joined([x.cpu()])])

    def divided_rows(self, count: int, work: Callable[[slice], Tensor]) -> Tensor:
        """work(slice) gives a tensor with one row for each of `count` things; each process computes a part."""
        return work(slice(0, count)) if self._apart else self.team.divided_rows(count, work)

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng(derive(self.seed, "method", name, self.rank))

    def train_rows(self, count: int, name: str) -> list[Any]:
        raise ConfigError("a method asks for training rows, which only training has", fix="guard it with ctx.mode")

    def order(self, count: int, name: str) -> np.ndarray:
        """A fixed permutation of `count` rows, the same on every rank."""
        if (count, name) not in self._orders:
            self._orders[count, name] = np.random.default_rng(derive(self.seed, "order", name)).permutation(count)
        return self._orders[count, name]


class TrainingServices(Services):
    """Services of one training run, over the live policy."""

    def __init__(self, trainer, task, seed: int) -> None:
        limits = SimpleNamespace(
            max_completion_tokens=trainer.max_completion_length,
            group_size=trainer.num_generations,
            scale_rewards=trainer.stack.objective.scale_rewards,
            objective=trainer.stack.objective.name,
            rows_per_device=trainer.args.per_device_train_batch_size,
            vocab_size=trainer.accelerator.unwrap_model(trainer.model).get_input_embeddings().num_embeddings,
        )
        super().__init__(None, task, seed, limits, trainer._tokenizer)
        self.trainer, self.cost = trainer, trainer.cost
        self.team = trainer.team

    @property
    def step(self) -> int:
        return self.trainer.state.global_step

    @property
    def engine(self) -> Any:
        """The policy itself behind the engine protocol."""
        if self._engine is None:
            from experiments.engines.transformers import TransformersEngine

            t = self.trainer
            self._engine = TransformersEngine(
                t.accelerator.unwrap_model(t.model), self.tokenizer, chat=t.wrap_prompt.chat
            )
            self._engine.processor = t.processing_class if t._is_vlm else None
        return self._engine

    def encode(self, prompts: Sequence[Any]) -> list[list[int]]:
        with self.counted("encode"):
            return self.trainer.tokenize(prompts)

    def train_rows(self, count: int, name: str) -> list[Any]:
        rows = self.trainer.rows
        return [rows[i] for i in self.order(len(rows), name)[:count]]

    def _charge(self, seconds: float) -> None:
        self.trainer.stack.service_seconds += seconds

    def forward(self, trajs: list[Trajectory], what: Sequence[str]) -> dict[str, Tensor]:
        """logps, entropies, ref_logps as (S, T), hidden as (S, T, D), rows in trajectory order."""
        unknown = set(what) - {"logps", "entropies", "ref_logps", "hidden"}
        if unknown:
            raise ConfigError(
                "forward cannot give this", got=sorted(unknown), expected="logps, entropies, ref_logps, hidden"
            )
        trainer = self.trainer
        batch = assemble(trajs, self.tokenizer.pad_token_id, trainer.accelerator.device)
        out: dict[str, Tensor] = {}
        with torch.no_grad(), self.counted("forward"):
            if {"logps", "entropies"} & set(what):
                logps, entropies = trainer.score_tokens(batch, entropies="entropies" in what)
                out["logps"] = logps
                if entropies is not None:
                    out["entropies"] = entropies
            if "ref_logps" in what:
                if trainer.beta == 0.0:
                    raise ConfigError(
                        "there is no reference model", where="objective.beta", got=0.0, fix="set objective.beta > 0"
                    )
                out["ref_logps"] = trainer.reference_logps(batch)
            if "hidden" in what:
                out["hidden"] = trainer.hidden_states(batch)
        return {k: v for k, v in out.items() if k in what}
