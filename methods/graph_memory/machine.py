"""From what happened in a rollout to its canonical path through a finite-state machine (sheet 3.2)."""

from __future__ import annotations

from collections.abc import Iterable

from methods.base import Trajectory

PLAN, ANALYSIS = "StrategyPlanning", "InformationAnalysis"
TOOL, ANSWER, INVALID = "ToolExecution", "AnswerGeneration", "Invalid"
START, END = "Start", "End"
MOVES = {
    START: {PLAN, TOOL, ANSWER},
    PLAN: {PLAN, TOOL, ANSWER},
    TOOL: {ANALYSIS},
    ANALYSIS: {ANALYSIS, TOOL, ANSWER},
    ANSWER: set(),
    INVALID: {PLAN, ANALYSIS, TOOL, ANSWER},
}
STATES = {"tool_result": ANALYSIS, "tool_call": TOOL, "answer": ANSWER}  # `think` depends on what came before
MOST_LOOPS = 3
THOUGHT = ("<think>", "</think>")  # some chat templates open the block themselves, so that only its end is written

Path = tuple[str, ...]


def canonical_path(events: Iterable[str]) -> Path:
    """The states that the events `think`, `tool_call`, `tool_result` and `answer` lead through.

    Thinking is planning before the first tool result and analysis after it. An unknown event, or a move that MOVES does
    not list (a call before the result of the last one), gives Invalid in its place, from where any move is legal. Then
    repeats count once; tool calls beyond the third are dropped, with the analysis of their results. No events: the
    empty path.
    """
    path: list[str] = []
    informed = False
    for event in events:
        state = (ANALYSIS if informed else PLAN) if event == "think" else STATES.get(event, INVALID)
        informed = informed or event == "tool_result"
        here = path[-1] if path else START
        state = state if state in MOVES[here] else INVALID
        if state != here:
            path.append(state)
    return _shortened(path)


def _shortened(path: list[str]) -> Path:
    kept: list[str] = []
    calls = 0
    for state in path:
        calls += state == TOOL
        beyond = calls > MOST_LOOPS and state in (TOOL, ANALYSIS)
        if not beyond and kept[-1:] != [state]:
            kept.append(state)
    return tuple(kept)


def events(traj: Trajectory, texts: Iterable[str]) -> list[str]:
    """The events of a rollout from its turns and their texts; a last turn that was cut is no answer."""
    found = []
    for i, (turn, text) in enumerate(zip(traj.turns, texts, strict=True)):
        cut = traj.finish != "stop" and i == len(traj.turns) - 1
        if any(mark in text for mark in THOUGHT):
            found.append("think")
        if turn.kind == "call":
            found += ["tool_call"] + ["tool_result"] * (turn.result is not None)
        elif turn.kind != "answer":
            found.append("invalid")
        elif not cut:
            found.append("answer")
    return found


def strategy(success: Path, failure: Path) -> str | None:
    """What to do where a failing path first parts from a successful one; None for equal paths."""
    if success == failure:
        return None
    same = 0
    while same < min(len(success), len(failure)) and success[same] == failure[same]:
        same += 1
    after = success[same - 1] if same else START
    prefer, avoid = ((path[same] if same < len(path) else END) for path in (success, failure))
    return f"After {after} prefer {prefer} over {avoid}."
