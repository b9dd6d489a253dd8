"""What `assay synth-data` writes last: rows for training, parquet, statistics, the data card, the cost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import synthesis_files as files
from experiments.files import replace, write_json
from methods.toolforge.pipeline import diversity, mistakes_of
from methods.toolforge.record import INSTRUCTIONS, Record
from methods.toolforge.shapes import SHAPES, case_entropy

if TYPE_CHECKING:
    from omegaconf import DictConfig

SAMPLE = 1000  # conversations from whose thoughts diversity is measured


def row_of(record: Record, route: str) -> dict[str, Any]:
    """One training row of a record, as TRL's SFTTrainer takes it.

    messages: the system message holds the instructions alone, because a chat template that knows tools renders the
    schemas of `tools` itself (JSON text, which TRL reads). mistakes: places of messages with a planted mistake.
    documents: all sentences of the source item, for replay.
    """
    source, messages = record[6], record[1]["messages"]
    language = "zh" if messages[0]["content"].startswith(INSTRUCTIONS["zh"]) else "en"
    tools = [{"type": "function", "function": schema} for schema in record[5]["argument_tool_bank"]]
    return {
        "id": record[0]["uuid"],
        "messages": [{"role": "system", "content": INSTRUCTIONS[language]}, *messages[1:]],
        "tools": json.dumps(tools, ensure_ascii=False),
        "mistakes": mistakes_of(record),
        "shape": record[0]["case"],
        "route": route,
        "language": language,
        "question": source["question"],
        "answer": source["answer"],
        "type": source["type"],
        "source_id": source["_id"],
        "documents": [{"title": t, "content": s} for t, sentences in source["context"] for s in sentences],
    }


def statistics(folder: Path, triples: int) -> dict[str, Any]:
    """Figures of a finished folder, read from its files a line at a time."""
    shapes, routes, turns = Counter(), Counter(), Counter()
    thoughts: list[str] = []
    tools: set[str] = set()
    for row in files.read_lines(folder / files.TRAIN):
        shapes[row["shape"]] += 1
        routes[row["route"]] += 1
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        turns[len(said)] += 1
        if sum(shapes.values()) <= SAMPLE:
            thoughts += said
            tools |= {tool["function"]["name"] for tool in json.loads(row["tools"])}
    rejected = Counter(f"{row['stage']}: {row['reason']}" for row in files.read_lines(folder / files.REJECTED))
    kept, lost = sum(shapes.values()), sum(rejected.values())
    return {
        "triples": triples,
        "conversations": kept,
        "attempts_rejected": lost,
        "yield": kept / (kept + lost) if kept + lost else 0.0,
        "shapes": {name: shapes[name] for name in SHAPES if shapes[name]},
        "routes": dict(sorted(routes.items())),
        "case_entropy": case_entropy(shapes.elements()) if kept else 0.0,
        "assistant_turns": {str(n): turns[n] for n in sorted(turns)},
        "mean_assistant_turns": sum(n * count for n, count in turns.items()) / kept if kept else 0.0,
        "diversity_of_turns": diversity(thoughts),
        "tools_offered_in_sample": len(tools),
        "rejections": dict(sorted(rejected.items(), key=lambda pair: (-pair[1], pair[0]))),
    }


def finish(output: files.Output, cfg: DictConfig, triples: int, cost: dict[str, float], seconds: float) -> None:
    """Everything that is made from the finished files; the state says `finished` last. Raises RunError where nothing
    was kept; the statistics are written then too."""
    from experiments.synthesis import nothing_kept

    folder = output.folder
    found = statistics(folder, triples)
    write_json(folder / "statistics.json", found)
    if not found["conversations"]:
        raise nothing_kept(found["rejections"])
    files.to_parquet(folder / files.TRAIN, folder / "train.parquet")
    replace(folder / "README.md", card(found, cfg).encode())
    kept = found["conversations"]
    spent = {**cost, "seconds": seconds, "conversations_per_minute": 60 * kept / seconds}
    if "usd" in cost:
        spent["usd_per_conversation"] = cost["usd"] / kept
    write_json(folder / "cost.json", spent)
    output.state |= {"finished": True}
    write_json(folder / files.STATE, output.state)


def card(found: dict[str, Any], cfg: DictConfig) -> str:
    """The data card, with the metadata block that the hub reads."""
    shapes = "\n".join(
        f"| {n} | {count} | {count / found['conversations']:.3f} |" for n, count in found["shapes"].items()
    )
    rejections = "\n".join(f"| {_cell(reason)} | {count} |" for reason, count in found["rejections"].items())
    turns = ", ".join(f"{n}: {count}" for n, count in found["assistant_turns"].items())
    words = found["diversity_of_turns"]
    tongues = "\n".join(f"- {name}" for name in cfg.languages)
    return f"""---
language:
{tongues}
task_categories:
- text-generation
tags:
- tool-use
- synthetic
---

# Multi-hop search with virtual tools

{found["conversations"]} conversations from {found["triples"]} triples, made by `assay synth-data` (ToolForge, arXiv
2512.16149) and passed by nine rules ({cfg.rules}) and a judge. Made by {_makers(cfg)}. Yield over all attempts:
{found["yield"]:.3f}. The text of the results is that of the source triples, under their licence.

## Columns of `train.jsonl` and `train.parquet`

`messages` (role, content) and `tools` (JSON text) are what TRL's `SFTTrainer` reads; the chat template has to render
tools. `mistakes` are the places of messages with a planted mistake, for training that leaves them out
(`assay train objective=sft task=toolforge objective.train_mistakes=false`). `shape`, `route`, `language`, `question`,
`answer`, `type`, `source_id`; `documents`, all sentences of the source item, for replay. `records.jsonl` has the full
records, `rejected.jsonl` every rejected attempt with its reason, `tools.jsonl` the tool bank.

## Figures

Assistant turns per conversation: {turns} (mean {found["mean_assistant_turns"]:.2f}). Entropy of the shapes, 1 = all 29
alike: {found["case_entropy"]:.3f}. Words of the first {SAMPLE} conversations' turns: {words["words"]:.0f}, different:
{words["vocabulary"]:.0f}, distinct-2: {words["distinct_2"]:.3f}; tools offered there:
{found["tools_offered_in_sample"]}.

| shape | conversations | share |
| --- | --- | --- |
{shapes}

| rejected attempts | count |
| --- | --- |
{rejections or "| none | 0 |"}
"""


def _makers(cfg: DictConfig) -> str:
    from experiments.synthesis_setup import model_stages

    by_model = model_stages(cfg)
    rest = [stage for stage in cfg.stages if stage not in by_model]
    engine = cfg.get("engine") or {}
    name = _cell(str(engine.get("model") or cfg.model.get("path") or cfg.model.get("name"))) if by_model else ""
    parts = [f"the model `{name}` ({', '.join(by_model)})"] if by_model else []
    return " and ".join([*parts, f"templates and rules ({', '.join(rest)})"] if rest else parts)


def _cell(text: str) -> str:
    """Text that comes from data or settings, harmless in a table."""
    return text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;").replace("\n", " ")


def summary(folder: Path) -> str:
    """The lines that the command prints at the end."""
    found = json.loads((folder / "statistics.json").read_text())
    spent = json.loads((folder / "cost.json").read_text())
    lines = [
        f"conversations   {found['conversations']} of {found['triples']} triples, {len(found['shapes'])} of "
        f"{len(SHAPES)} shapes, {spent['conversations_per_minute']:.0f} per minute",
        f"rejected        {found['attempts_rejected']} attempts (yield {found['yield']:.3f})",
    ]
    lines += [f"                {count:5d}  {reason}" for reason, count in list(found["rejections"].items())[:8]]
    if spent.get("requests") or spent.get("cached"):
        paid = f", {spent['usd']:.4f} US dollars" if "usd" in spent else ""
        lines.append(
            f"engine          {spent.get('requests', 0):.0f} requests, {spent.get('cached', 0):.0f} answered by cache,"
            f" {spent.get('errors', 0):.0f} errors, {spent.get('retries', 0):.0f} tries repeated,"
            f" {spent.get('prompt_tokens', 0):.0f} + {spent.get('completion_tokens', 0):.0f} tokens{paid}"
        )
    return "\n".join(lines)
