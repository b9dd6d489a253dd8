"""Judges that ask a model: directly, or by a rubric. Rule judges and reward models have the same form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from experiments.engines.base import Engine, Progress
from experiments.judging import rubrics
from experiments.judging.asking import Asker
from experiments.judging.pairs import FAILED, UNPARSABLE, Question, Verdict
from methods.cdrrm import prompts
from methods.cdrrm.parsing import Rejected, last_integer, rating, winner
from methods.cdrrm.rubric import Rubric
from methods.errors import ConfigError, check_range

LETTER = 4  # tokens of an answer that has begun with the verdict line
VERDICT = "Final Judgment\nWinner: Response"
PARSERS = {"strict": rating, "official": last_integer}


class Direct:
    """Which response is better, asked without a rubric.

    max_tokens: longest judgment. analysis: let the model reason first; false begins its answer with the verdict line,
    so that it writes the letter only (for models too small to keep to a form).
    Degenerate: an answer without a readable last line is UNPARSABLE, a request that failed FAILED; both are counted in
    `counts`.
    """

    name = "direct"
    form: Literal["pairs"] = "pairs"
    needs = "engine"
    calls = 1  # per question, for the progress bar

    def __init__(self, engine: Engine, max_tokens: int = 8192, analysis: bool = True) -> None:
        check_range("judge.by.max_tokens", max_tokens, 1)
        self.asker = Asker(engine, max_tokens if analysis else LETTER)
        self.begun = "" if analysis else VERDICT

    @property
    def counts(self) -> Counter[str]:
        return self.asker.counts

    def watch(self, progress: Progress) -> None:
        """`progress` is called once for each of the `calls` per question."""
        self.asker.progress = progress

    def judge(self, questions: Sequence[Question]) -> Iterator[Verdict]:
        return self.by_rubrics(questions, [None] * len(questions))

    def by_rubrics(self, questions: Sequence[Question], given: Sequence[Rubric | None]) -> Iterator[Verdict]:
        """One verdict per question, by the rubric given for it."""
        asked = [
            prompts.judging(question.item.prompt, *question.responses, rubric=rubric)
            for question, rubric in zip(questions, given, strict=True)
        ]
        for question, result in zip(questions, self.asker.ask(asked, self.begun), strict=True):
            if result.finish == "error":
                yield Verdict(question, FAILED)
                continue
            text = self.begun + first_word(result.text) if self.begun else result.text
            slot = winner(text)
            if slot is None:
                self.asker.counts["verdict: no winner"] += 1
            yield Verdict(question, UNPARSABLE if slot is None else slot, text)


def first_word(text: str) -> str:
    """What a begun verdict line goes on with: its first word, behind one space."""
    return " " + (text.split() or [""])[0]


class ByRubric(Direct):
    """A frozen judge that follows a rubric written for the pair: CDRRM, or its one-step ablation.

    writer: `contrast` profiles each response on its own and condenses the difference, `one_step` writes the rubric
    from instruction and both responses. generator: run or folder of the trained model that writes the rubrics in one
    step; None lets the judge's own engine write them. rubric_tokens: longest profile or rubric.
    Degenerate: where no valid rubric could be had the direct judge answers, counted as "no rubric: asked directly".
    Differs from the paper: the slots of a pair are shuffled, and the rubric is written anew for the swapped order.
    """

    name = "cdrrm"

    def __init__(
        self,
        engine: Engine,
        writer: str = "contrast",
        generator: Engine | None = None,
        max_tokens: int = 8192,
        rubric_tokens: int = 4096,
        analysis: bool = True,
    ) -> None:
        super().__init__(engine, max_tokens, analysis)
        check_range("judge.by.rubric_tokens", rubric_tokens, 1)
        if writer not in ("contrast", "one_step"):
            raise ConfigError(
                "Unknown way to write rubrics", where="judge.by.writer", got=writer, expected="contrast or one_step"
            )
        self.writer = writer
        self.author = Asker(generator or engine, rubric_tokens)
        self.calls = 4 if writer == "contrast" else 2

    @property
    def counts(self) -> Counter[str]:
        return self.author.counts + self.asker.counts

    def watch(self, progress: Progress) -> None:
        self.asker.progress = self.author.progress = progress

    def rubrics(self, questions: Sequence[Question]) -> list[rubrics.Written]:
        """A rubric per question, or why there is none."""
        write = rubrics.contrasted if self.writer == "contrast" else rubrics.generated
        return write(self.author, questions)

    def judge(self, questions: Sequence[Question]) -> Iterator[Verdict]:
        given = [None if isinstance(found, Rejected) else found for found in self.rubrics(questions)]
        if missing := given.count(None):
            self.asker.counts["no rubric: asked directly"] += missing
        return self.by_rubrics(questions, given)


class Rating:
    """Each response rated from 1 to 10 by itself: a score for every benchmark, RewardBench 2 and its Ties among them.

    max_tokens: longest judgment of one response. analysis: as of `Direct`; false begins the answer with `Rating:`.
    parser: `strict` reads the last rating line, of `8/10` the 8; `official` the integer that ends the answer, as
    RewardBench 2 does (of `8/10` the 10). Equal ratings tie.
    Degenerate: an answer without a readable rating is the score NaN (what it decides is wrong), a request that failed
    makes its question FAILED; both are counted in `counts`.
    """

    name = "rating"
    form: Literal["all"] = "all"
    needs = "engine"
    calls = 1  # of a question: the responses differ in number

    def __init__(self, engine: Engine, max_tokens: int = 8192, analysis: bool = True, parser: str = "strict") -> None:
        check_range("judge.by.max_tokens", max_tokens, 1)
        if parser not in PARSERS:
            expected = ", ".join(PARSERS)
            raise ConfigError("Unknown way to read ratings", where="judge.by.parser", got=parser, expected=expected)
        self.asker = Asker(engine, max_tokens if analysis else LETTER)
        self.begun = "" if analysis else "Rating:"
        self.read = PARSERS[parser]
        self.progress: Progress = lambda count: None

    @property
    def counts(self) -> Counter[str]:
        return self.asker.counts

    def watch(self, progress: Progress) -> None:
        self.progress = progress

    def judge(self, questions: Sequence[Question]) -> Iterator[Verdict]:
        asked = [prompts.rating(q.item.prompt, response) for q in questions for response in q.responses]
        self.asker.progress = _shared_out(self.progress, len(questions), len(asked))
        results = iter(self.asker.ask(asked, self.begun))
        for question in questions:
            given = [next(results) for _ in question.slots]
            texts = [self.begun + first_word(r.text) if self.begun else r.text for r in given]
            told = "\n\n".join(f"[{slot}] {text}" for slot, text in enumerate(texts))
            if any(result.finish == "error" for result in given):
                yield Verdict(question, FAILED, told)
                continue
            scores = [self.read(text) for text in texts]
            if missing := scores.count(None):
                self.asker.counts["rating: none readable"] += missing
            yield Verdict.of_scores(question, [float("nan") if s is None else s for s in scores], told)


def _shared_out(progress: Progress, questions: int, requests: int) -> Progress:
    """Tells `progress` of questions where requests are counted."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done * questions // requests, done + count
        progress(done * questions // requests - before)

    return advance


class RewardModel:
    """A scalar reward model: the response with the highest score.

    model: a folder or hub id of a sequence classifier with one output (`assay judge` takes a run as well); only
    safetensors, and no code of the model runs. Scores are compared in float32. batch_size, max_length (tokens; a longer
    conversation loses its beginning, counted): of one forward. Raises ConfigError.
    """

    name = "reward_model"
    form: Literal["all"] = "all"
    needs = "nothing"
    calls = 1

    def __init__(self, model: str, batch_size: int = 16, max_length: int = 4096) -> None:
        from experiments.artefacts import cache_root, digest
        from experiments.engines.cache import CachedEngine
        from experiments.engines.scores import ScoreEngine

        engine = ScoreEngine(model, batch_size=batch_size, max_length=max_length)
        self.counts: Counter[str] = engine.counts
        self.engine = CachedEngine(engine, cache_root() / "requests" / digest(engine.identity())[:20])
        self.progress: Progress = lambda count: None

    def watch(self, progress: Progress) -> None:
        self.progress = progress

    def judge(self, questions: Sequence[Question]) -> Iterator[Verdict]:
        from experiments.engines.scores import as_request

        asked = [as_request(q.item.prompt, response) for q in questions for response in q.responses]
        scores = iter([float(answers[0].text or "nan") for answers in self.engine.generate(asked)])
        for question in questions:
            self.progress(1)
            yield Verdict.of_scores(question, [next(scores) for _ in question.slots])
