"""Questions over a corpus of passages that the model may search: HotpotQA, MuSiQue, NQ and others, or own ones."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.tasks import qa_forms, scorers
from experiments.tasks.base import Row
from experiments.tasks.table import TableTask
from experiments.tools import FORMS, Tools
from methods.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from experiments.retrieval import Index, Passage
    from methods.base import Trajectory

CLOSED = "Answer the question in a few words, inside <answer> and </answer>."
INSTRUCTIONS = {
    "search": """\
Answer the question. Whenever you have learnt something new, think about it inside <think> and </think>. To look \
something up, write one query inside <search> and </search>; passages that match it follow inside <information> and \
</information>. Search as often as you need, for one thing at a time. When you know the answer, give it in a few words \
inside <answer> and </answer>.

Example:
<think>I need to know who wrote Emma, then when she was born.</think>
<search>author of the novel Emma</search>
<information>1. Emma (novel): Emma is a novel by Jane Austen, published in 1815.</information>
<think>The author is Jane Austen.</think>
<search>Jane Austen date of birth</search>
<information>1. Jane Austen: Jane Austen (16 December 1775 - 18 July 1817) was an English novelist.</information>
<think>Now I know it.</think>
<answer>16 December 1775</answer>""",
    "hermes": """\
Answer the question. You have one tool, search(query), which shows passages that match the query. To call it, write

<tool_call>
{"name": "search", "arguments": {"query": "author of the novel Emma"}}
</tool_call>

and the passages come with the next message. Search as often as you need, for one thing at a time. When you know the \
answer, give it in a few words inside <answer> and </answer>, for example <answer>Jane Austen</answer>.""",
}


@dataclass
class MultihopQA(TableTask):
    """Rows of `path` (file, folder or hub id), searched in `corpus` (see `retrieval.open_corpus`; None: no tools).

    Recognised by their columns: HotpotQA, MuSiQue, 2WikiMultihopQA, Bamboogle, NQ, TriviaQA, PopQA, SQuAD, Frames,
    BrowseComp-Plus (decrypted), FlashRAG's and Search-R1's files; own rows need `question` and `answer` (a text or a
    list) and may name gold passages by `documents` (ids) or `golden_context` (a list of `{"title", "text"}`).
    `Row.answer` is the list of golds. Rows that say that they have no answer are left out, with a notice.
    `Row.documents` are the gold passages found in the corpus by id, or by title and text, never by title alone; what
    the corpus lacks is counted in `Row.meta["not_in_corpus"]`, and a notice tells how many there are.
    `form` is how the model writes its calls (`experiments.tools.FORMS`); the prompt explains it unless `suffix` is
    given. A search shows `top_k` passages of at most `passage_words` words, cut after `max_result_tokens`; an episode
    has at most `max_calls` searches.
    The completion scored is the last turn; one that still asks for a search says nothing.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = qa_forms.COLUMNS

    name: str = "multihop_qa"
    max_prompt_tokens: int = 1024
    max_completion_tokens: int = 2048
    tiers: tuple[str, ...] = ("easy", "medium", "hard")
    path: str = "hotpotqa/hotpot_qa"
    subset: str | None = "distractor"
    splits: dict[str, str] = field(
        default_factory=lambda: {"train": "train", "eval": "validation", "test": "validation"}
    )
    choices_column: str | None = None
    scorer: str = "em"
    corpus: str | None = ""
    dense: str | None = None
    top_k: int = 3
    passage_words: int = 100
    form: str = "search"
    max_calls: int = 4
    max_turn_tokens: int | None = None
    max_result_tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("top_k", "passage_words", "max_calls", "max_result_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(
                    "A search must show something",
                    where=f"{self.config_key}.{key}",
                    got=getattr(self, key),
                    expected="at least 1",
                )
        if self.choices_column or self.wrong_columns:
            raise ConfigError(
                "Open questions have no options",
                where=f"{self.config_key}.choices_column, {self.config_key}.wrong_columns",
                fix="use task=jsonl for questions with options",
            )
        if self.form not in INSTRUCTIONS:
            raise ConfigError(
                f"Unknown form of calls '{self.form}'",
                where=f"{self.config_key}.form",
                expected="one of " + ", ".join(INSTRUCTIONS),
                fix=nearest(self.form, INSTRUCTIONS) or "choose one",
            )

    # ---------------------------------------------------------------- rows

    def rows(self, split: str, seed: int) -> list[Row]:
        """As `TableTask.rows`, with gold passages. Raises DataError and ConfigError, also for the corpus."""
        rows = super().rows(split, seed)
        if self.corpus is None:
            return [replace(row, meta=_kept(row.meta)) for row in rows]
        gold = [passage for row in rows for passage in row.meta["gold_passages"]]
        places = self.index.locate(gold)
        known = self.index.known(i for row in rows for i in row.meta["gold_ids"])
        rows = [_with_documents(row, places, known) for row in rows]
        lost = sum(row.meta["not_in_corpus"] for row in rows)
        if lost:
            every = lost + sum(len(row.documents) for row in rows)
            text = f"{lost} of {every} gold passages are not in {self.corpus}; recall is over the others"
            print(f"{self.name}, {split}: {text}", file=sys.stderr)
        return rows

    def answer_of(self, value: Any, record: dict) -> list[str]:
        columns = self.usual["answer"] if self.answer_column == "auto" else (self.answer_column,)
        return qa_forms.all_golds(record, columns)

    def tier_of(self, value: Any, record: dict) -> str:
        return qa_forms.tier(record) if value is None else str(value)

    def _records(self, split: str) -> tuple[list[tuple[int, dict]], str]:
        records, source = super()._records(split)
        kept = [(place, record) for place, record in records if not qa_forms.unanswerable(record)]
        if not kept:
            raise DataError("No row has an answer", where=source, got=f"{len(records)} rows for the split '{split}'")
        if len(kept) < len(records):
            lost = len(records) - len(kept)
            print(f"{self.name}, {split}: {lost} of {len(records)} rows have no answer; left out", file=sys.stderr)
        return kept, source

    def _row(self, record: dict, columns: dict[str, str | None], split: str, where: str) -> Row:
        row = super()._row(record, columns, split, where)
        try:
            gold = {"gold_passages": qa_forms.gold_passages(record), "gold_ids": qa_forms.gold_ids(record)}
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise DataError(
                "The gold passages cannot be read",
                where=where,
                got=f"{type(error).__name__}: {error}",
                expected='a column `golden_context` of [{"title": "...", "text": "..."}], or `documents` with ids',
            ) from error
        return replace(row, meta=row.meta | gold | {"question": record[str(columns["prompt"])]})

    def _ask(self, prompt: Any, options: list[str], where: str) -> str | list[dict]:
        asked = super()._ask(prompt, options, where)
        if self.suffix is not None:
            return asked
        text = CLOSED if self.corpus is None else INSTRUCTIONS[self.form]
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        filled = f"{text}\n\nQuestion: {question}"
        if isinstance(asked, str):
            return filled
        at = len(asked) - 1 - bool(self.prefill)  # the question's own message
        return [*asked[:at], {**asked[at], "content": filled}, *asked[at + 1 :]]

    # ---------------------------------------------------------------- searching

    @functools.cached_property
    def index(self) -> Index:
        """The index of the corpus, opened on first use. Raises DataError and ConfigError."""
        from experiments.retrieval import open_corpus

        return open_corpus(str(self.corpus), dense=self.dense, key=self.config_key)

    @functools.cached_property
    def find(self) -> Callable[[str], tuple[Passage, ...]]:
        """The passages of a query; the latest queries are remembered."""
        index = self.index

        @functools.lru_cache(maxsize=4096)
        def found(query: str) -> tuple[Passage, ...]:
            return tuple(index.passages[place] for place, _ in index.rank(query, self.top_k))

        return found

    @property
    def tools(self) -> Tools | None:
        if self.corpus is None:
            return None
        return Tools(FORMS[self.form], self.max_calls, self.max_turn_tokens, self.max_result_tokens)

    def environment(self, row: Row) -> SearchEnvironment | None:
        return None if self.corpus is None else SearchEnvironment(self.find, self.passage_words)

    def episode_metrics(self, traj: Trajectory, row: Row) -> dict[str, float]:
        """searches: the calls that were carried out. recall: the share of the row's gold passages that any of them
        returned, whether or not the model's context had room for them all; NaN where no gold passage is known.

        A search gives the same passages each time, so that they are looked up again from the calls.
        """
        queries = [query for turn in traj.turns for query in _carried_out(turn)]
        found = {passage.doc_id for query in queries for passage in self.find(query)} if row.documents else set()
        gold = set(row.documents)
        return {"searches": float(len(queries)), "recall": len(found & gold) / len(gold) if gold else math.nan}

    # ---------------------------------------------------------------- scoring

    def score(self, text: str, row: Row) -> float:
        """EM (or F1) of the short answer."""
        return super().score(self._answered(text), row)

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        said = self._answered(text)
        return {"em": scorers.em(said, row.answer), "f1": scorers.f1(said, row.answer)}

    def _answered(self, text: str) -> str:
        asks = self.corpus is not None and FORMS[self.form].opening in text.rpartition("</think>")[2]
        return "" if asks and "</answer>" not in text else text


class SearchEnvironment:
    """The search tool of one rollout; `returned` keeps each query with the ids of its passages."""

    def __init__(self, find: Callable[[str], tuple[Passage, ...]], words: int) -> None:
        self.find, self.words = find, words
        self.tools = {"search": self.search}
        self.returned: list[tuple[str, tuple[str, ...]]] = []

    def search(self, query: str) -> str:
        """Shows passages that match a query, best first.

        Args:
            query: What to look for.
        """
        if not isinstance(query, str) or not query.strip():
            raise ValueError("the query must be a text that is not empty")
        passages = self.find(query)
        self.returned.append((query, tuple(passage.doc_id for passage in passages)))
        lines = (f"{k}. {shown(passage, self.words)}" for k, passage in enumerate(passages, start=1))
        return "\n".join(lines) or "No passage matches the query."


def shown(passage: Passage, words: int) -> str:
    """`Title: text` on one line, cut after so many words (or eight times as many characters: text without blanks)."""
    text = " ".join(passage.text.split(maxsplit=words)[:words])[: 8 * words]
    text += " ..." * (len(text) < len(" ".join(passage.text.split())))
    return f"{passage.title}: {text}" if passage.title else text


def _carried_out(turn: Any) -> list[str]:
    """The queries of a turn's searches; a single call that came back as an error was none."""
    if turn.result is None or (len(turn.calls) == 1 and turn.result.startswith("error:")):
        return []
    queries = [call["args"].get("query") for call in turn.calls if call and call["tool"] == "search"]
    return [query for query in queries if isinstance(query, str) and query.strip()]


def _with_documents(row: Row, places: dict[qa_forms.Gold, str], known: set[str]) -> Row:
    passages, ids = row.meta["gold_passages"], row.meta["gold_ids"]
    found = [i for i in ids if i in known] if ids else [places[p] for p in passages if p in places]
    documents = tuple(dict.fromkeys(found))
    lost = len(ids or passages) - len(found)
    return replace(row, documents=documents, meta=_kept(row.meta) | {"not_in_corpus": lost})


def _kept(meta: dict) -> dict:
    """A row's further columns without whole passages."""
    large = {"context", "golden_context", "paragraphs", "entity_pages", "search_results", "gold_passages", "gold_ids"}
    return {key: value for key, value in meta.items() if key not in large and not key.endswith("_docs")}
