"""`assay report --shift`: table, per-token file, figures and a page of coloured text between checkpoints.

Two builds from the same weights and texts on the same machine give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.files import new_folder, replace
from experiments.shift.checkpoints import find
from experiments.shift.compare import Comparison, compare
from methods.errors import ConfigError

Amend = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def build(
    targets: Sequence[str],
    root: str | Path = "results",
    *,
    texts: str = "auto",
    items: int = 64,
    references: Sequence[str] = (),
    seed: int = 0,
    out: str | Path | None = None,
    amend: Amend = dict,
) -> Path:
    """Write table.md, tokens.parquet, shift.html and figures/ into a folder `shift`, print the table, return its path.

    targets: as in `checkpoints.find`, the base first. texts, items: as in `texts.choose`. references: checkpoints
    whose samples are the last reference sets of the dynamics (default: the last target). seed: of `experiment/arm`
    words and of all sampling. out: where `shift` goes (default: the experiment's folder below `root`, or `selected`).
    amend: changes the settings of the first run, from which task and split are taken. Raises ConfigError, DataError.
    """
    from experiments.shift import page, plots, table

    if items < 1:
        raise ConfigError("A shift needs at least one response", where="--items", got=items)
    found = find(targets, seed, root)
    others = find(references, seed, root, least=0) or [found[-1]]
    config = amend(next((one.config for one in found if one.config), {}))
    result = compare(found, others, config, texts, items, seed)
    folder = (Path(out) if out else Path(root) / _home(result)) / "shift"
    with new_folder(folder):
        buffer = io.BytesIO()
        frame(result).to_parquet(buffer, index=False)
        replace(folder / "tokens.parquet", buffer.getvalue())
        page.write(result, folder / "shift.html")
        text = table.markdown(result, plots.draw(result, folder / "figures"))
        replace(folder / "table.md", text.encode())
    print(text, end="")
    return folder / "table.md"


def _home(result: Comparison) -> str:
    experiments = {one.experiment for one in result.found if one.config}
    return experiments.pop() if len(experiments) == 1 else "selected"


def frame(result: Comparison) -> Any:
    """One row per token and new checkpoint: checkpoint, id, the columns of `measure.COLUMNS`, token (as text)."""
    import pandas as pd

    ids = [row.id for row in result.texts.rows]
    pieces = [piece for response in result.pieces for piece in response]
    frames = [
        pd.DataFrame(token).assign(checkpoint=one.name, id=[ids[i] for i in token["response"]], token=pieces)
        for one, token in zip(result.new, result.tokens, strict=True)
    ]
    columns = ["checkpoint", "id"]
    joined = pd.concat(frames, ignore_index=True)
    return joined[[*columns, *(name for name in joined.columns if name not in columns)]]
