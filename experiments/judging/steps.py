"""The steps that make training data: profile both answers, synthesise rubrics, keep those that recover the label.

Each step does the ones before it as well; what was answered before comes from the cache. A label is read in the filter
alone, after every rubric is written.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engines.progress import progress_bar
from experiments.files import clean, os_errors
from experiments.judging import rubrics
from experiments.judging.pairs import Question, Verdict, questions
from methods.cdrrm import data
from methods.cdrrm.parsing import Rejected
from methods.cdrrm.rubric import Rubric
from methods.errors import RunError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.judging.judges import ByRubric

Write = Callable[[dict], None]


def run(cfg: DictConfig, judge: ByRubric, benchmark: Any, folder: Path) -> dict[str, float]:
    """Run `cfg.judge.step` over all pairs; files in `folder`, figures in return. RunError if the filter keeps nothing.

    profiles.jsonl, rubrics.jsonl: one line per answer and pair, with the reason where there is none.
    generator_sft.jsonl, judge_sft.jsonl (filter): chat messages for `assay train objective=sft`.
    Differs from the paper: the rubrics in judge_sft.jsonl are the teacher's, not those of the trained generator, which
    there is not yet.
    """
    step, both = cfg.judge.step, cfg.judge.orders == "both"

    def asked() -> Iterator[Question]:
        return questions(benchmark.stream(), int(cfg.seed), "pairs", "seeded")

    calls = {"profile": 2, "synthesise": 3, "filter": 3 + 2 * (1 + both)}[step]
    names = {"profile": ["profiles"], "synthesise": ["profiles", "rubrics"]}.get(
        step, ["profiles", "rubrics", "generator_sft", "judge_sft"]
    )
    from experiments.judging.run import WINDOW

    counts: Counter[str] = Counter()
    kept: list[tuple[dict, dict | None]] = []
    with contextlib.ExitStack() as stack:
        write = {name: stack.enter_context(whole_lines(folder / f"{name}.jsonl")) for name in names}
        total = sum(1 for _ in asked()) * calls
        judge.watch(stack.enter_context(progress_bar(f"{step} on {benchmark.name}", total, unit="calls")))
        stream = asked()
        while window := list(itertools.islice(stream, WINDOW)):
            counts["pairs"] += len(window)
            _window(judge, window, step, both, write, counts, kept)
        if step == "filter":
            _refuse_nothing(counts, judge)
            for generator, judged in data.shuffled(kept):
                write["generator_sft"](generator)
                if judged is not None:
                    write["judge_sft"](judged)
    return _figures(counts, step)


def _window(
    judge: ByRubric,
    window: list[Question],
    step: str,
    both: bool,
    write: dict[str, Write],
    counts: Counter[str],
    kept: list[tuple[dict, dict | None]],
) -> None:
    known = rubrics.profiles(judge.author, window)
    for (benchmark, subset, name, response), found in known.items():
        counts["profiles"] += 1
        counts["profiles rejected"] += isinstance(found, Rejected)
        line = {"benchmark": benchmark, "subset": subset, "id": name, "response": response}
        write["profiles"](line | _told("profile", found, lambda profile: profile.redacted()))
    if step == "profile":
        return
    written = rubrics.contrasted(judge.author, window, known)
    verdicts = _checks(judge, window, written, both) if step == "filter" else [[] for _ in window]
    for question, rubric, given in zip(window, written, verdicts, strict=True):
        benchmark, subset, name = question.item.key
        line = {"benchmark": benchmark, "subset": subset, "id": name, "slots": question.slots}
        line |= _told("rubric", rubric, Rubric.to_json)
        counts["rubrics"] += not isinstance(rubric, Rejected)
        if isinstance(rubric, Rubric) and step == "filter":
            keep = all(verdict.choice == verdict.question.gold for verdict in given)
            counts["kept"] += keep
            counts["verdicts with rubric right"] += sum(v.choice == v.question.gold for v in given)
            counts["verdicts with rubric"] += len(given)
            line |= {"verdicts": [verdict.choice for verdict in given], "kept": keep}
            if keep:
                prompt, (a, b) = question.item.prompt, question.responses
                judged = data.judge_row(prompt, a, b, rubric, given[0].text)
                kept.append((data.generator_row(prompt, a, b, rubric), judged))
        write["rubrics"](line)
    if step == "filter":
        # On the pairs that have a rubric, so that both accuracies have the same denominator.
        judged = zip(window, written, strict=True)
        asked = [q for question, r in judged if isinstance(r, Rubric) for q in _orders(question, both)]
        judge.asker.progress(len(window) * (1 + both) - len(asked))
        free = list(judge.by_rubrics(asked, [None] * len(asked)))
        counts["verdicts without rubric right"] += sum(v.choice == v.question.gold for v in free)
        counts["verdicts without rubric"] += len(free)


def _told(what: str, found: Any, spell: Callable[[Any], dict]) -> dict[str, Any]:
    return {"rejected": found.reason} if isinstance(found, Rejected) else {what: spell(found)}


def _orders(question: Question, both: bool) -> list[Question]:
    return [question, question.swapped()] if both else [question]


def _checks(judge: ByRubric, window: list[Question], written: list[rubrics.Written], both: bool) -> list[list[Verdict]]:
    """What the judge says by each rubric, in one order or in both; nothing where there is no rubric."""
    asked = [
        (q, r)
        for question, r in zip(window, written, strict=True)
        if isinstance(r, Rubric)
        for q in _orders(question, both)
    ]
    judge.asker.progress(len(window) * (1 + both) - len(asked))
    found = iter(list(judge.by_rubrics([q for q, _ in asked], [r for _, r in asked])))
    return [[next(found) for _ in range(1 + both)] if isinstance(rubric, Rubric) else [] for rubric in written]


def _refuse_nothing(counts: Counter[str], judge: ByRubric) -> None:
    if counts["kept"]:
        return
    reasons = "; ".join(f"{count} {reason}" for reason, count in judge.counts.most_common())
    refused = counts["rubrics"]
    raise RunError(
        "The filter kept no rubric",
        where=f"{counts['pairs']} pairs",
        got=f"{refused} valid rubrics, none of which recovers the label; {reasons or 'no rejections'}",
        fix="use a stronger teacher, more pairs, or judge.orders=seeded; judge.step=synthesise keeps what was written",
    )


def _figures(counts: Counter[str], step: str) -> dict[str, float]:
    values = {key.replace(" ", "_"): float(value) for key, value in counts.items()}
    if step == "filter":
        values["kept_share"] = counts["kept"] / max(1, counts["rubrics"])
        for kind in ("with", "without"):
            asked = counts[f"verdicts {kind} rubric"]
            values[f"accuracy_{kind}_rubric"] = counts[f"verdicts {kind} rubric right"] / max(1, asked)
    return values


@contextlib.contextmanager
def whole_lines(path: Path) -> Iterator[Write]:
    """A function that adds one JSON line to `path`, which appears whole at the end or not at all."""
    part = path.with_name(f".{path.name}.part")
    with os_errors(path):
        try:
            with part.open("w", encoding="ascii") as file:
                yield lambda record: print(json.dumps(clean(record)), file=file)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
