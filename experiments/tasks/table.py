"""Tasks whose rows come from a table: a local file or folder, or a hub data set."""

from __future__ import annotations

import json
import random
import re
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from experiments.seeds import derive
from experiments.tasks import scorers
from experiments.tasks.base import (
    Row,
    Task,
    bucket,
    columns_of,
    is_hub_id,
    missing_column,
    read_table,
    shuffled,
    split_files,
    tier_order,
)
from methods.errors import ConfigError, DataError, nearest

USUAL = {
    "prompt": ("problem", "question", "prompt"),
    "answer": ("answer", "final_answer", "expected_answer", "answerKey", "solution"),
    "choices": ("choices", "options"),
    "split": ("split", "src_split"),
    "id": ("id", "unique_id", "question_id"),
    "tier": ("tier", "level"),
}
SUFFIX = {
    "math_verify": "Please reason step by step, and put your final answer within \\boxed{}.",
    "number": "Please reason step by step, and put your final answer within \\boxed{}.",
    "choice": "Answer with the letter of the right option on the last line, in the form `Answer: X`.",
    "exact": "",
    "contains": "",
    "em": "Give a short answer inside <answer></answer>.",
    "f1": "Give a short answer inside <answer></answer>.",
}


@dataclass
class TableTask(Task):
    """Rows of a table. A column set to `auto` is the first usual name that the table has (`usual`), null is none.

    Where the rows of a split come from: the hub's split `splits[split]`; in a folder the files named after it; in a
    table with a split column the rows with that value; or all of `eval_path` for eval. Otherwise `eval_fraction` of
    the questions go to eval by a hash of their text (a repeated question never lands on both sides).
    Rows with choices are rendered with letters and scored by letter, whatever `scorer` says. `wrong_columns`
    (GPQA) are wrong options to be mixed with the answer in a fixed order. `suffix` null means the usual one for the
    scorer. `prefill` begins the assistant's answer (`<think>\n`): the prompt becomes a chat that ends in these words,
    which a chat model continues and a plain one reads behind the prompt. Further columns are in `Row.meta`, the
    options as shown under `lettered`. Demonstrations are read for train rows only: a text, chat messages of which the
    first one counts, or a list of texts (`Row.meta["demos"]`); an empty cell is none.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = USUAL

    path: str = ""
    subset: str | None = None
    eval_path: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "eval": "test", "test": "test"})
    split_column: str | None = "auto"
    eval_fraction: float = 0.2
    where: dict[str, Any] | None = None
    prompt_column: str = "auto"
    answer_column: str = "auto"
    choices_column: str | None = "auto"
    wrong_columns: list[str] = field(default_factory=list)
    id_column: str | None = "auto"
    tier_column: str | None = "auto"
    demo_column: str | None = None
    scorer: str = "math_verify"
    suffix: str | None = None
    prefill: str = ""

    def __post_init__(self) -> None:
        self.config_key = "task"  # a suite member puts its own key here, for error texts
        super().__post_init__()
        scorers.scorer(self.scorer, self.config_key)
        if not 0 <= self.eval_fraction <= 1:
            raise ConfigError(
                "Not a share", where=f"{self.config_key}.eval_fraction", got=self.eval_fraction, expected="0 to 1"
            )

    def rows(self, split: str, seed: int) -> list[Row]:
        """Rows in the order fixed by `seed`. Raises DataError (source, column, row) and ConfigError."""
        records, source = self._records(split)
        columns = self._columns(records, source, split)
        seen: dict[str, int] = {}
        rows = []
        for place, record in records:
            row = self._row(record, columns, split, f"{source}, row {place + 1}")
            seen[row.id] = seen.get(row.id, 0) + 1
            rows.append(row if seen[row.id] == 1 else Row(**{**vars(row), "id": f"{row.id}~{seen[row.id]}"}))
        self.tiers = tier_order((row.tier for row in rows), self.tiers)
        return shuffled(rows, seed, "table", self.name, split)

    def score(self, text: str, row: Row) -> float:
        """1 or 0 by the scorer."""
        name = "choice" if "lettered" in row.meta else self.scorer
        return scorers.SCORERS[name](text, row.answer, row.meta.get("lettered", ()))

    # What a task reads from a record; tasks with forms of their own override these.
    def answer_of(self, value: Any, record: dict) -> Any:
        """The gold answer in the cell `value`: a worked solution's last boxed part, a mapping's `ground_truth`."""
        value = value.get("ground_truth") if isinstance(value, dict) else value
        return (scorers.boxed(value) or value) if isinstance(value, str) else value

    def tier_of(self, value: Any, record: dict) -> str:
        """The tier in the cell `value` (None: no such column)."""
        return "all" if value is None else str(value)

    def demo_of(self, value: str | None, record: dict) -> str | None:
        """The demonstration, which is the text of its cell `value` (None: no such column, or an empty cell)."""
        return value

    def _records(self, split: str) -> tuple[list[tuple[int, dict]], str]:
        """(place in the table, record) of one split, and the source they come from."""
        key = self.config_key
        own = split != "train" and self.eval_path
        source = str(own or self.path)
        named = self.splits.get(split, split)
        records = list(enumerate(read_table(source, named, where=self.where, subset=self.subset, key=key)))
        column = self._find("split", self.split_column, columns_of([r for _, r in records]), source)
        if column is not None:
            kept = [(k, r) for k, r in records if str(r.get(column)) == named]
            if not kept:
                values = ", ".join(sorted({str(r.get(column)) for _, r in records})[:8])
                raise DataError(
                    f"No row has {column} = {named}",
                    where=source,
                    got=values,
                    fix=f"set {key}.splits.{split}= to one of these, or {key}.split_column=null",
                )
            return kept, source
        if own or self._is_split(source, named):
            return records, source
        prompt = self._find("prompt", self.prompt_column, columns_of([r for _, r in records]), source)
        kept = [(k, r) for k, r in records if self._is_eval(str(r.get(str(prompt)))) == (split != "train")]
        if not kept:
            raise DataError(
                f"No row is left for the split '{split}'",
                where=source,
                got=f"{len(records)} rows in all",
                fix=f"change {key}.eval_fraction={self.eval_fraction}, or give {key}.eval_path=",
            )
        return kept, source

    def _is_split(self, source: str, named: str) -> bool:
        if self.splits.get("train", "train") == self.splits.get("eval", "eval"):
            return False
        path = Path(source).expanduser()
        return bool(split_files(path, named)) if path.is_dir() else is_hub_id(source)

    def _is_eval(self, prompt: str) -> bool:
        return bucket(prompt, 10_000) < 10_000 * self.eval_fraction

    def _find(self, what: str, column: str | None, found: list[str], source: str) -> str | None:
        """The column to use for `what`, None for none. Raises DataError for a named column that is not there."""
        if column is None:
            return None
        if column != "auto":
            if column not in found:
                raise missing_column(column, found, source, self.config_key)
            return column
        usual = next((name for name in self.usual.get(what, ()) if name in found), None)
        if usual is None and what in ("prompt", "answer"):
            guess = nearest(self.usual[what][0], found)
            raise DataError(
                f"The data has no {what} column by a usual name ({', '.join(self.usual[what])})",
                where=source,
                got="columns " + ", ".join(found),
                fix=f"set {self.config_key}.{what}_column= to one of these" + (f"; {guess}" if guess else ""),
            )
        return usual

    def _columns(self, records: list[tuple[int, dict]], source: str, split: str) -> dict[str, str | None]:
        found = columns_of([record for _, record in records])
        for column in self.wrong_columns:
            self._find("wrong", column, found, source)
        asked = {
            "prompt": self.prompt_column,
            "answer": self.answer_column,
            "id": self.id_column,
            "tier": self.tier_column,
            "demo": self.demo_column if split == "train" else None,
            "choices": None if self.wrong_columns else self.choices_column,
        }
        return {what: self._find(what, column, found, source) for what, column in asked.items()}

    def _row(self, record: dict, columns: dict[str, str | None], split: str, where: str) -> Row:
        def cell(what: str) -> Any:
            column = columns[what]
            return None if column is None else record.get(column)

        prompt, answer = cell("prompt"), self.answer_of(cell("answer"), record)
        for what, value in (("prompt", prompt), ("answer", answer)):
            if value is None or value == "" or value == []:
                fix = f"fill it in or take the row out, or name another column with {self.config_key}.{what}_column="
                raise DataError(f"The {what} is empty", where=f"{where}, column '{columns[what]}'", fix=fix)
        name = str(cell("id")) if cell("id") is not None else f"{bucket(json.dumps(record, default=str), 2**64):016x}"
        used = {columns["prompt"], columns["answer"], self.demo_column, columns["choices"]}
        meta = {key: value for key, value in record.items() if key not in used}
        options, labels = read_choices(cell("choices"))
        if self.wrong_columns:
            options = [str(answer)] + [str(record[column]) for column in self.wrong_columns]
            random.Random(derive(0, "options", name)).shuffle(options)
            answer = string.ascii_uppercase[options.index(str(answer))]
        elif options:
            answer = letter_of(answer, options, labels, where)
        if options:
            meta["lettered"] = options
        demos = read_demos(cell("demo"), f"{where}, column '{columns['demo']}'")
        if len(demos) > 1:
            meta["demos"] = demos
        self._check_gold(answer, bool(options), where)
        return Row(
            id=name,
            prompt=self._ask(prompt, options, where),
            answer=answer,
            tier=self.tier_of(cell("tier"), record),
            demo=self.demo_of(demos[0] if demos else None, record) if split == "train" else None,
            meta=meta,
        )

    def _check_gold(self, answer: Any, choices: bool, where: str) -> None:
        if choices or self.scorer not in ("number", "choice"):
            return
        if self.scorer == "number":
            good = scorers.to_number(str(answer)) is not None
        else:
            good = re.fullmatch("[A-J]", str(answer).strip().upper()) is not None
        if not good:
            raise DataError(
                f"The answer does not suit the scorer '{self.scorer}'",
                where=where,
                got=repr(answer)[:100],
                fix=f"set {self.config_key}.scorer=math_verify or exact, or {self.config_key}.answer_column=",
            )

    def _ask(self, prompt: Any, options: list[str], where: str) -> str | list[dict]:
        suffix = SUFFIX["choice" if options else self.scorer] if self.suffix is None else self.suffix
        lettered = "\n".join(f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False))
        extra = "".join(f"\n\n{part}" for part in (lettered, suffix) if part)
        begun = [{"role": "assistant", "content": self.prefill}] if self.prefill else []
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt + extra}, *begun] if begun else prompt + extra
        good = isinstance(prompt, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)
        if not good:
            raise DataError(
                "The prompt is neither text nor chat messages",
                where=where,
                got=repr(prompt)[:100],
                expected='text, or a list such as [{"role": "user", "content": "..."}]',
            )
        return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + extra}, *begun]


def read_choices(value: Any) -> tuple[list[str], list[str]]:
    """(texts, labels) of a choices cell: a list, the same as JSON text, or ARC's `{"text": [...], "label": [...]}`.

    Letters that all options carry in order (`A)`, `(B)`, `C.`: AQuA) are taken off. No choices: two empty lists.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [], []
    if not value:
        return [], []
    labels = [str(v) for v in value.get("label", [])] if isinstance(value, dict) else []
    texts = [str(v) for v in (value.get("text", []) if isinstance(value, dict) else value)]
    pairs = list(zip(string.ascii_uppercase, texts, strict=False))
    marks = [re.match(rf"\(?{letter}[).:]\s*", text) for letter, text in pairs]
    if all(marks):
        texts = [text[mark.end() :] for text, mark in zip(texts, marks, strict=False) if mark]
    return texts, labels


def read_demos(value: Any, where: str) -> list[str]:
    """The demonstrations in a cell: a text, a list of texts, or chat messages of which the first one counts.

    DataError for anything else.
    """
    found = [value] if isinstance(value, str) else list(value or []) if isinstance(value, list | None) else [value]
    if isinstance(value, list) and found and isinstance(found[0], dict):
        found = [found[0].get("content")]
    if not all(isinstance(text, str) for text in found):
        raise DataError(
            "The demonstration is no text",
            where=where,
            got=repr(value)[:100],
            expected='a text, a list of texts, or [{"role": "assistant", "content": "..."}]',
        )
    return [text for text in found if text]


def letter_of(answer: Any, options: list[str], labels: list[str], where: str) -> str:
    """The letter of the gold answer, which is a label, a letter, a position from 0, or the text of one option.
    Raises DataError for anything else."""
    letters = string.ascii_uppercase[: len(options)]
    said = str(answer).strip()
    if len(options) > 10:
        raise DataError("More than ten options", where=where, got=len(options))
    if said in labels:
        return letters[labels.index(said)]
    if not labels and len(said) == 1 and said.upper() in letters:
        return said.upper()
    if isinstance(answer, int) and 0 <= answer < len(options):
        return letters[answer]
    if options.count(said) == 1:
        return letters[options.index(said)]
    raise DataError("The answer is none of the options", where=where, got=repr(answer)[:100], expected=letters)
