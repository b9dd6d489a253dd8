"""The agent loop of ZipRL: each turn sees the question, the memory and new documents, zips them, and acts."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from methods.base import Context, Segment, Trajectory, Turn
from methods.ziprl.forms import Document, Entry, Form, Written, Zip
from methods.ziprl.quality import NOTHING, PARTS

IDLE_TURNS = 2  # turns in a row without an action that end an episode
ERROR_CHARACTERS = 200
SCORES = tuple((part, f"q_{part}") for part in (*PARTS, "relevance"))  # of a zip, and the turn's name for it


@dataclass
class Episode:
    """One rollout while it grows. `memory` is what survives; `documents` are the raw ones of the coming turn."""

    row: Any
    tools: Any
    form: Form
    memory: list[Entry] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    action: str = ""  # the one that brought the documents
    segments: list[Segment] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)  # of the coming turn
    shown: int = 0  # documents so far
    idle: int = 0
    text: str = ""
    finish: str = "length"
    over: bool = False

    def trajectory(self, group_id: int, sample_id: int) -> Trajectory:
        """One segment per turn; `text` is the answer, empty where none was given."""
        return Trajectory(
            row_id=self.row.id,
            group_id=group_id,
            sample_id=sample_id,
            segments=self.segments,
            turns=self.turns,
            finish=self.finish,
            text=self.text,
            row=self.row,
        )


@dataclass
class Loop:
    """Runs episodes side by side, one generation per turn for all that are not over.

    compression: `adaptive` (the model chooses levels), `uniform` (every zip at `level`), `none` (zips are ignored, raw
    documents stay in memory until the oldest no longer fit). A prompt has at most `max_prompt_tokens`: the oldest zips
    are cut down level by level, then the oldest zips are dropped, then the oldest actions, then documents halved; each
    is counted.
    """

    max_turns: int
    max_prompt_tokens: int
    compression: str
    level: int

    def run(self, episodes: Sequence[Episode], ctx: Context) -> None:
        for turn in range(self.max_turns + 1):
            last = turn == self.max_turns
            live = [e for e in episodes if not e.over]
            asked = [(e, *prompt) for e, prompt in zip(live, self._prompts(live, ctx, last), strict=True)]
            asked = [(e, ids, opening) for e, ids, opening in asked if not e.over]
            if not asked:
                return
            how = {
                "max_tokens": ctx.limits.max_completion_tokens,
                "temperature": ctx.temperature,
                "top_p": ctx.top_p,
            }
            # A stream of its own in evaluation: training draws the same whether or not it was evaluated in between.
            requests = [{"prompt_ids": ids, **how} for _, ids, _ in asked]
            results = [r[0] for r in ctx.generate(requests, stream=f"ziprl/{ctx.mode}")]
            for (e, ids, opening), result in zip(asked, results, strict=True):
                self._take(e, ids, opening, result, last, ctx)
            self._act([e for e, _, _ in asked if not e.over], ctx)

    # ---- the prompt ----
    def _ask(self, e: Episode, last: bool) -> tuple[str, str]:
        return e.form.ask(e.memory, e.documents, self.level if self.compression == "uniform" else None, last)

    def _prompts(self, live: Sequence[Episode], ctx: Context, last: bool) -> list[tuple[list[int], str]]:
        """Ids of each prompt with what the completion begins with; an episode whose prompt cannot fit is over."""
        for e in live:
            if last:  # what the last action brought cannot be zipped any more
                e.documents = []
        out = self._encode([self._ask(e, last) for e in live], ctx)
        long = range(len(live))
        # One step for all that are too long, then one encoding: a call for each would cost more than all else.
        while long := [k for k in long if len(out[k][0]) > self.max_prompt_tokens and not live[k].over]:
            for k in long:
                if not self._shrink(live[k]):
                    self._stop_unasked(live[k], out[k][0], ctx)
            again = [k for k in long if not live[k].over]
            for k, prompt in zip(again, self._encode([self._ask(live[k], last) for k in again], ctx), strict=True):
                out[k] = prompt
        return out

    @staticmethod
    def _encode(asked: list[tuple[str, str]], ctx: Context) -> list[tuple[list[int], str]]:
        texts = list(dict.fromkeys([text for text, _ in asked]))  # the first turns of a group are equal
        ids_of = dict(zip(texts, ctx.encode(texts) if texts else [], strict=True))
        openings = {opening for _, opening in asked}
        begun = {o: ctx.tokenizer(o, add_special_tokens=False)["input_ids"] if o else [] for o in openings}
        return [([*ids_of[text], *begun[opening]], opening) for text, opening in asked]

    def _shrink(self, e: Episode) -> bool:
        """One step of the overflow rule; whether there was anything to cut."""
        if self.compression != "none":
            for k, entry in enumerate(e.memory):
                for j, zipped in enumerate(entry.zips):
                    if zipped.level > 1:
                        zips = (*entry.zips[:j], e.form.coarser(zipped), *entry.zips[j + 1 :])
                        e.memory[k] = entry._replace(zips=zips)
                        e.events["overflow_cut"] += 1
                        return True
        if e.memory:
            for k, entry in enumerate(e.memory):
                if any(zipped.text for zipped in entry.zips):
                    j = next(j for j, zipped in enumerate(entry.zips) if zipped.text)
                    e.memory[k] = entry._replace(zips=entry.zips[:j] + entry.zips[j + 1 :])
                    break
            else:
                del e.memory[0]
            e.events["overflow_dropped"] += 1
            return True
        k = max(range(len(e.documents)), key=lambda i: e.form.length(e.documents[i].text), default=-1)
        if k < 0 or (shorter := e.form.cut(e.documents[k])) == e.documents[k]:
            return False
        e.documents[k] = shorter
        e.events["overflow_document"] += 1
        return True

    @staticmethod
    def _stop_unasked(e: Episode, ids: list[int], ctx: Context) -> None:
        """The question alone is too long: one row with nothing to train on, so that the trajectory has a row at all."""
        e.over = True
        if not e.segments:
            e.segments.append(Segment(ids, [ctx.tokenizer.eos_token_id], model_mask=[0]))

    # ---- one turn ----
    def _take(self, e: Episode, ids: list[int], opening: str, result: Any, last: bool, ctx: Context) -> None:
        """Records a turn and what it does to the memory; the action itself waits for `_act`."""
        wrote = list(result.ids or [])
        e.segments.append(Segment(ids, wrote) if wrote else Segment(ids, [ctx.tokenizer.eos_token_id], model_mask=[0]))
        written = e.form.parse(opening + result.text)
        turn = Turn(len(e.segments) - 1, 0, len(wrote), "invalid")
        e.turns.append(turn)
        zips = self._zips(e, written, turn)
        if e.events:
            turn.scores |= e.events
            e.events.clear()
        finishes = written.action is not None and written.action[0] == "finish"
        if finishes or last:
            turn.kind = "forced" if last else "answer"
            e.text = e.form.answer(written.action[1]) if finishes and written.action else ""
            e.finish, e.over = "length" if last else "stop", True
        elif written.action is None:
            e.idle += 1
            e.over = e.idle >= IDLE_TURNS
            e.documents, e.action = [], ""
        else:
            e.idle, turn.kind = 0, "call"
            turn.calls = [self._call(e, *written.action)]
            if e.action:
                e.memory.append(Entry(e.action, tuple(zips)))
            e.documents, e.action = [], f"{written.action[0]}({written.action[1]})"

    def _zips(self, e: Episode, written: Written, turn: Turn) -> list[Zip]:
        """The zips that go to memory, one per document; their mean quality and size go to the turn's scores."""
        if self.compression == "none":
            return [Zip(d.id, 1, d.text) for d in e.documents]
        if not e.documents:
            if written.zips:
                turn.scores["unknown_zips"] = len(written.zips)
            return []
        given: dict[str, Zip] = {}
        for zipped in written.zips:
            given.setdefault(zipped.id, zipped)  # the first counts
        kept, judged = [], []
        for d in e.documents:
            zipped = given.pop(d.id, None) or Zip(d.id, 0, "")
            if self.compression == "uniform" and zipped.level:
                zipped = zipped._replace(level=self.level)
            good = 1 <= zipped.level <= 5
            judged.append(e.form.quality(d, zipped) if good else NOTHING | {"relevance": float("nan")})
            kept.append(zipped if good and zipped.text else Zip(d.id, 1, ""))
        n = len(kept)
        scores, length = turn.scores, e.form.length
        mean = judged[0] if n == 1 else {part: sum([q[part] for q in judged]) / n for part, _ in SCORES}
        for part, name in SCORES:
            scores[name] = mean[part]
        scores["level"] = sum([z.level for z in kept]) / n
        scores["source"] = sum([length(d.text) for d in e.documents])
        scores["kept"] = sum([length(z.text) for z in kept])
        scores["unknown_zips"] = len(given)
        return kept

    # ---- tools ----
    @staticmethod
    def _call(e: Episode, tool: str, argument: str) -> dict[str, Any]:
        """The call as the task's own metrics know it: the argument under the name of the tool's first parameter."""
        return {"tool": tool, "args": {_first_parameter(e.tools[tool]) if tool in e.tools else "argument": argument}}

    @staticmethod
    def _act(live: Sequence[Episode], ctx: Context) -> None:
        """Carries out the last turns' calls. What goes wrong becomes a remark in memory."""
        waiting = [(e, call) for e in live for call in e.turns[-1].calls]
        for (e, _), result in zip(waiting, ctx.call(waiting), strict=True):
            e.turns[-1].result = result
            if result.startswith("error:"):
                e.memory.append(Entry(e.action, (Zip("", 1, result[:ERROR_CHARACTERS]),)))
                e.action = ""
            else:
                e.documents = e.form.documents(result, e.shown + 1)
                e.shown += len(e.documents)


def _first_parameter(tool: Callable[..., Any]) -> str:
    # Every episode has methods of an environment of its own: they share the function, which is read once.
    return _parameter(tool.__func__, 1) if inspect.ismethod(tool) else _parameter.__wrapped__(tool, 0)


@functools.lru_cache(maxsize=64)
def _parameter(function: Callable[..., Any], place: int) -> str:
    names = tuple(inspect.signature(function).parameters)[place:]
    return names[0] if names else "argument"
