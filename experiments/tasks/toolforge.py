"""Conversations of `assay synth-data`: supervised rows, and held-out questions replayed with their own tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.tasks import scorers
from experiments.tasks.base import Row, Task, bucket, read_table, shuffled, tier_order
from experiments.tools import HERMES, Tools
from methods.errors import ConfigError, DataError
from methods.toolforge.bundles import Search, pool_search
from methods.toolforge.items import Passage
from methods.toolforge.record import ASK, shown_text, system_text
from methods.toolforge.tools import Schema, schema_problem


@dataclass
class ToolForge(Task):
    """Rows of `path`, a folder that `assay synth-data` wrote or its train.jsonl or train.parquet.

    Training rows are whole dialogues (`meta["messages"]`, `meta["mistakes"]`), for objective=sft. `eval_fraction` of
    the questions, by a hash of their text, are held out: all dialogues about them. Those are replayed: the model gets
    the record's tools and question; each call is checked against its schema and answered by BM25 over all sentences of
    the source item, the `top_k` best, with the values of all arguments as the query. `shapes` keeps training dialogues
    of these shapes only (None: all). The schemas stand in the system message, which any chat template can render.

    Raises DataError for rows that cannot be used and where no row is left.
    """

    name: str = "toolforge"
    max_prompt_tokens: int = 4096
    max_completion_tokens: int = 8192
    tiers: tuple[str, ...] = ("A", "B", "C", "D")
    path: str = ""
    eval_fraction: float = 0.1
    shapes: list[str] | None = None
    top_k: int = 10
    max_calls: int = 5
    max_turn_tokens: int | None = 1024
    max_result_tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eval_fraction <= 1:
            raise ConfigError("Not a share", where="task.eval_fraction", got=self.eval_fraction, expected="0 to 1")
        for key in ("top_k", "max_calls", "max_result_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError("Too small", where=f"task.{key}", got=getattr(self, key), expected="at least 1")

    @property
    def tools(self) -> Tools:
        return Tools(HERMES, self.max_calls, self.max_turn_tokens, self.max_result_tokens)

    # ---- rows ----
    def rows(self, split: str, seed: int) -> list[Row]:
        """Rows in the order fixed by `seed`; the tier is the family of the shape."""
        train, rows = split == "train", []
        for number, record in enumerate(self._records(), start=1):
            row = _row(record, f"{self.path}, row {number}")
            held_out = bucket(record["question"], 10_000) < 10_000 * self.eval_fraction
            wanted = not train or self.shapes is None or record["shape"] in self.shapes
            if held_out != train and wanted:
                rows.append(row)
        if not rows:
            raise DataError(
                f"No row is left for the split '{split}'",
                where=self.path,
                fix="change task.eval_fraction, give more conversations, or task.shapes=null",
            )
        self.tiers = tier_order((row.tier for row in rows), self.tiers)
        return shuffled(rows, seed, "toolforge", split)

    def _records(self) -> list[dict]:
        folder = Path(self.path).expanduser()
        source = str(folder / "train.jsonl") if self.path and (folder / "train.jsonl").is_file() else self.path
        columns = ("messages", "tools", "mistakes", "shape", "question", "answer", "documents")
        return read_table(source, columns=columns)

    # ---- episodes ----
    def environment(self, row: Row) -> Replay:
        return Replay(row.meta["schemas"], row.meta["documents"], self.top_k)

    def score(self, text: str, row: Row) -> float:
        """EM of the answer block; a last turn without one says nothing.

        Differs from the formula in the paper's code: two texts whose normal forms are both empty (`the` and `a`) are
        compared as they stand.
        """
        return scorers.em(_answered(text), row.answer)

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        return {"em": self.score(text, row), "f1": scorers.f1(_answered(text), row.answer)}

    def episode_metrics(self, traj: Any, row: Row) -> dict[str, float]:
        """searches: tool messages. iterations: the model's turns."""
        searches = [turn for turn in traj.turns if turn.result is not None]
        return {"searches": float(len(searches)), "iterations": float(len(traj.turns))}


def _answered(text: str) -> str:
    return text if "</answer>" in text.rpartition("</think>")[2] else ""


def _row(record: dict, where: str) -> Row:
    try:
        tools = record["tools"]
        schemas = [tool["function"] for tool in (json.loads(tools) if isinstance(tools, str) else tools)]
        documents = [Passage(str(d["title"]), str(d["content"])) for d in record["documents"]]
        messages = [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
        if problem := next(filter(None, map(schema_problem, schemas)), ""):
            raise ValueError(f"a tool without a usable schema: {problem}")
        language = "zh" if record.get("language") == "zh" else "en"
        prompt = [{"role": "system", "content": system_text(schemas, language)}]
        prompt.append({"role": "user", "content": ASK[language].format(record["question"])})
        meta = {
            "messages": [*prompt, *messages[2:]],
            "mistakes": [int(place) for place in record["mistakes"]],
            "schemas": schemas,
            "documents": documents,
        }
        name = str(record.get("id") or f"{bucket(json.dumps(record, default=str), 2**64):016x}")
        return Row(name, prompt, str(record["answer"]), str(record["shape"])[:1], meta=meta)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            "A row is no conversation of assay synth-data",
            where=where,
            got=f"{type(error).__name__}: {error}",
            expected="the columns messages, tools, mistakes, shape, question, answer, documents",
        ) from error


class Replay:
    """The virtual tools of one rollout: schema-checked, answered from the item's own sentences."""

    def __init__(self, schemas: list[Schema], documents: list[Passage], top_k: int) -> None:
        self.schemas, self.documents, self.top_k = schemas, documents, top_k
        self.tools: Mapping[str, Callable[..., str]] = {s["name"]: partial(self._call, s) for s in schemas}
        self._search: Search | None = None

    def _call(self, schema: Schema, **arguments: Any) -> str:
        parameters = schema["parameters"]
        lacking = [key for key in parameters["required"] if key not in arguments]
        unknown = [key for key in arguments if key not in parameters["properties"]]
        if lacking or unknown:
            what = f"the required parameter {lacking[0]!r} is missing" if lacking else f"no parameter {unknown[0]!r}"
            raise ValueError(f"{schema['name']}: {what}")
        self._search = self._search or pool_search(self.documents)
        found = self._search("\n".join(str(value) for value in arguments.values()), self.top_k)
        return shown_text(found) or "nothing found"
