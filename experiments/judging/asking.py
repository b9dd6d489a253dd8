"""Asking a model during judging: greedy requests in windows, failures counted, progress told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from experiments.engines.base import TOO_LONG, Engine, Progress, Request, Result

SEED = 42  # of rubric writing and judging, as in the released code; with temperature 0 it only names the request


class Asker:
    """One engine with its counts. `counts` holds why an answer was of no use, by reason.

    max_tokens: longest completion. progress is called once per answer. unanswered: requests that failed and can be
    asked again, which a prompt that is too long for the model cannot.
    """

    def __init__(self, engine: Engine, max_tokens: int) -> None:
        self.engine, self.max_tokens = engine, max_tokens
        self.counts: Counter[str] = Counter()
        self.unanswered = 0
        self.progress: Progress = lambda count: None

    def ask(self, prompts: Sequence[list[dict[str, str]]], begun: str = "") -> list[Result]:
        """One greedy answer per prompt, in their order; each goes on from the words `begun`."""
        more = [{"role": "assistant", "content": begun}] if begun else []
        asked = [
            Request(messages=[*messages, *more], max_tokens=self.max_tokens, temperature=0.0, seed=SEED)
            for messages in prompts
        ]
        results = [answers[0] for answers in self.engine.generate(asked, self.progress)]
        for result in results:
            if result.finish == "error":
                self.counts[f"request failed: {result.error}"] += 1
                self.unanswered += not (result.error or "").startswith(TOO_LONG)
        return results
