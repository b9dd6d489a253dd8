"""Rubrics for questions: by profiling both answers and condensing the contrast, or in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from experiments.engines.base import Result
from experiments.judging.asking import Asker
from experiments.judging.pairs import Item, Question
from methods.cdrrm import prompts
from methods.cdrrm.parsing import Rejected
from methods.cdrrm.profiles import Profile, same_diagnosis
from methods.cdrrm.rubric import Rubric

Parsed = TypeVar("Parsed")
Written = Rubric | Rejected


def read(asker: Asker, results: Iterable[Result], parse: Callable[[str], Parsed], what: str) -> list[Parsed | Rejected]:
    """Each answer parsed, or why not; refusals are counted under `what` and their reason.

    An answer at the token limit counts if what it should hold is whole: small models go on behind it.
    """
    found: list[Parsed | Rejected] = []
    for result in results:
        try:
            if result.finish == "error":
                raise Rejected("request failed")
            found.append(parse(result.text))
        except Rejected as told:
            refusal = Rejected("cut off", str(told)) if result.finish == "length" else told
            asker.counts[f"{what}: {refusal.reason}"] += 1
            found.append(refusal)
    return found


def profiles(asker: Asker, questions: Sequence[Question]) -> dict[tuple, Profile | Rejected]:
    """The profile of every response that `questions` show, by (item key, response index); each is asked for once."""
    wanted: dict[tuple, tuple[Item, int]] = {}
    for question in questions:
        wanted |= {(*question.item.key, slot): (question.item, slot) for slot in question.slots}
    asked = [prompts.profiling(item.prompt, item.responses[slot]) for item, slot in wanted.values()]
    found = read(asker, asker.ask(asked), Profile.parse, "profile")
    asker.progress(2 * len(questions) - len(asked))  # what several questions share was asked once
    return dict(zip(wanted, found, strict=True))


def contrasted(
    asker: Asker, questions: Sequence[Question], known: dict[tuple, Profile | Rejected] | None = None
) -> list[Written]:
    """A rubric per question from the two profiles, in the order of its slots, or why there is none.

    Which profile is called A follows from the question's slots, which a seed drew, never from the label.
    """
    if known is None:
        known = profiles(asker, questions)
    found: list[Written] = []
    asked: list[prompts.Messages] = []
    places: list[int] = []
    for place, question in enumerate(questions):
        pair = [known[(*question.item.key, slot)] for slot in question.slots]
        refused = next((p for p in pair if isinstance(p, Rejected)), None)
        one, other = pair
        if isinstance(one, Rejected) or isinstance(other, Rejected):
            found.append(Rejected(f"no profile ({refused.reason})" if refused else "no profile"))
        elif same_diagnosis(one, other):
            asker.counts["rubric: both profiles are the same"] += 1
            found.append(Rejected("both profiles are the same"))
        else:
            found.append(Rejected("not asked yet"))
            places.append(place)
            asked.append(prompts.synthesis(question.item.prompt, one, other))
    asker.progress(len(questions) - len(asked))
    for place, rubric in zip(places, read(asker, asker.ask(asked), Rubric.parse, "rubric"), strict=True):
        found[place] = rubric
    return found


def generated(asker: Asker, questions: Sequence[Question]) -> list[Written]:
    """A rubric per question in one step, from instruction and both answers: a trained generator, or any model."""
    asked = [prompts.generation(question.item.prompt, *question.responses) for question in questions]
    return read(asker, asker.ask(asked), Rubric.parse, "rubric")
