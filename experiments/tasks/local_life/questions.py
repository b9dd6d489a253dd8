"""What a question is, whichever source it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.tasks.local_life.programs import Program


@dataclass(frozen=True)
class Question:
    """One request of a user. hops: searches that the reference path takes, the web's included.

    hop_queries: its LocalRAG queries in order; web_queries: those to the web. gold: the poi_ids in visiting order, None
    where only a judge can score. reference: the answer in the release's form, with `\\boxed{A→B→C}`. path: the search
    path in the release's form. verifier: the program whose solution gold is.
    """

    id: str
    city: str
    level: str
    hops: int
    text: str
    hop_queries: tuple[str, ...]
    web_queries: tuple[str, ...] = ()
    gold: tuple[str, ...] | None = None
    reference: str = ""
    path: str = ""
    verifier: Program | None = None
    style: str = "plain"
    language: str = "en"
    meta: dict = field(default_factory=dict)
