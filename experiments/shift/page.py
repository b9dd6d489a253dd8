"""A self-contained page: every response with its tokens coloured by how their probability moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments import browser
from experiments.files import replace
from experiments.shift.compare import Comparison

LIMIT = browser.LIMIT
_TEMPLATE = Path(__file__).resolve().parent / "page"


def write(result: Comparison, path: Path) -> Path:
    """Write the page; responses beyond about `LIMIT` bytes are left out, and the page says so."""
    bounds = [np.flatnonzero(result.tokens[0]["response"] == i) for i in range(len(result.pieces))]
    packed: list[str] = []
    for i, at in enumerate(bounds):
        packed.append(browser.embed(_entry(result, i, slice(int(at[0]), int(at[-1]) + 1))))
        if sum(map(len, packed)) > LIMIT:
            packed.pop()
            break
    names = browser.embed([one.name for one in result.new])
    data = f'{{"names":{names},"scale":{result.scale!r},"texts":[{",".join(packed)}]}}'
    base = result.found[0].name
    note = f"{len(packed)} of {len(result.pieces)} responses: {result.texts.told}. Colours: p of the checkpoint minus p"
    title = f"Token shift from {base}"
    replace(path, browser.page(_TEMPLATE, title, f"{note} of {base}.", data).encode())
    return path


def _entry(result: Comparison, i: int, at: slice) -> dict[str, Any]:
    def column(name: str) -> list[list[float]]:
        return [[float(f"{x:.4g}") for x in token[name][at]] for token in result.tokens]

    first = result.tokens[0]
    return {
        "id": result.texts.rows[i].id,
        "prompt": result.prompts[i],
        "tokens": result.pieces[i],
        "p": [float(f"{x:.4g}") for x in first["p_base"][at]],
        "entropy": [float(f"{x:.4g}") for x in first["entropy"][at]],
        "dp": column("dp"),
        "kl": column("kl"),
    }
