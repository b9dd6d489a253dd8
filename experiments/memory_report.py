"""What a graph memory has learned, for people: a listing of its strategies, and a drawing of its layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.files import os_errors
from experiments.memory_file import graph_of
from methods.graph_memory.graph import Memory
from methods.graph_memory.relevance import best

MOST_QUESTIONS = 1000  # looked at for the listing
MOST_DRAWN = 40  # questions in the drawing
SHORT = {"StrategyPlanning": "Plan", "InformationAnalysis": "Analysis", "ToolExecution": "Tool"}
SHORT |= {"AnswerGeneration": "Answer"}


def listing(memory: Memory, neighbours: int = 5, shown: int = 3) -> str:
    """The strategies by weight, then what questions are told, by the path on which they were answered.

    weight: mean over the paths that lead to the strategy. first: share of the stored questions for which it is the
    most relevant. evidence: questions for it, and against. A question is told its `shown` most relevant strategies.
    """
    Q, J, M = memory.sizes
    lines = [f"{Q} questions, {J} paths, {M} strategies", ""]
    if not M:
        return lines[0]
    some = memory.embedding_QD[:MOST_QUESTIONS]
    relevance_BM = memory.activate(some, neighbours).relevance_BM
    first_M = np.bincount([k for row in relevance_BM for k in best(row, 1)], minlength=M) / max(len(some), 1)
    told_BM = np.zeros_like(relevance_BM)
    for told_M, relevance_M in zip(told_BM, relevance_BM, strict=True):
        told_M[best(relevance_M, shown)] = 1
    weight_M = memory.mean_weights()
    lines.append("weight  first  evidence  kind         strategy")
    for k in np.argsort(-weight_M, kind="stable"):
        s = memory.strategies[k]
        evidence = f"{s.support}:{s.contradictions}" if s.observations else "-"
        lines.append(f"{weight_M[k]:6.2f}  {first_M[k]:4.0%}  {evidence:>9}  {s.kind:<11}  {_visible(s.text)}")
    for j in range(J):
        won = memory.to_paths.source_E[(memory.to_paths.target_E == j) & (memory.to_paths.count_E2[:, 0] > 0)]
        won = won[won < len(some)]
        if len(won):
            share_M = told_BM[won].mean(0)
            lines += ["", f"{len(won)} questions were answered by {_short(memory.paths[j])}; of them are told"]
            lines += [f"  {share_M[k]:4.0%}  {_visible(memory.strategies[k].text)}" for k in best(share_M, M)]
    return "\n".join(lines)


def draw(memory: Memory, path: str | Path) -> Path:
    """Questions, paths and strategies in three columns, edges as thick as their weights; `path` without its suffix."""
    import matplotlib
    import networkx

    from experiments.plots import BASELINE, COLOURS, INK, STYLE, new_figure, save

    path = Path(path).with_suffix("")
    graph = graph_of(memory)
    graph.remove_nodes_from([f"q{i}" for i in range(MOST_DRAWN, len(memory.questions))])
    layers = [[n for n, x in graph.nodes(data="layer") if x == name] for name in ("question", "path", "strategy")]
    at = {
        node: (column, 1 - (i + 0.5) / len(nodes))
        for column, nodes in enumerate(layers)
        for i, node in enumerate(nodes)
    }
    widths = [2.0 * w for *_, w in graph.edges(data="weight")]
    shades = [COLOURS[0] if a[0] == "t" else COLOURS[2] if d["successes"] else BASELINE
              for a, _, d in graph.edges(data=True)]  # fmt: skip
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(11, 1.5 + 0.28 * max(map(len, layers), default=1), 1, 1)
        ax = axes[0, 0]
        networkx.draw_networkx_edges(graph, at, ax=ax, width=widths, edge_color=shades, alpha=0.5, arrows=False)
        networkx.draw_networkx_nodes(graph, at, ax=ax, node_size=30, node_color=INK)
        for node, (x, y) in at.items():
            text = graph.nodes[node]["text"]
            text = _short(memory.paths[int(node[1:])]) if node[0] == "t" else text[-28:] if node[0] == "q" else text
            text = _visible(text).replace("$", r"\$")
            place = {"q": (-6, 0, "right"), "t": (0, 9, "center"), "m": (6, 0, "left")}[node[0]]
            ax.annotate(
                text, (x, y), place[:2], textcoords="offset points", ha=place[2], va="center",
                fontsize=7, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )  # fmt: skip
        kept = f", the first {MOST_DRAWN}" if len(memory.questions) > MOST_DRAWN else ""
        ax.set_title(f"Questions{kept} (green: answered), paths, strategies; width = weight")
        ax.set_xlim(-0.7, 3.0)
        ax.axis("off")
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path)
    return path.with_suffix(".png")


def _short(states: tuple[str, ...]) -> str:
    return " > ".join(SHORT.get(state, _visible(state)) for state in states)


def _visible(text: str) -> str:
    """Without what a terminal would obey: texts of a memory file may come from anywhere."""
    return "".join(c if c.isprintable() else "?" for c in text)
