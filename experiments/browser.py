"""A self-contained page to read a run's samples: tokens coloured by advantage, rewards, filters. No network.

Completions are untrusted text. They travel as JSON with ``<``, ``>`` and ``&`` escaped, enter the page as text nodes
only, and the page's content policy runs no script but its own (by hash).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.files import clean, replace
from experiments.records import Run

LIMIT = 3_000_000  # bytes of samples in one page
LONGEST = 4_000  # tokens of one completion, and half the characters of one prompt
_HERE = Path(__file__).resolve().parent


def write(runs: Sequence[Run], path: Path, title: str, limit: int = LIMIT) -> Path:
    """Write the page for these runs (a selector chooses among them); at most about `limit` bytes of samples.

    Each run gets an equal share; a run that does not fit is thinned evenly over its samples, and the page says so.
    A run without samples is left out.
    """
    loaded = [(run, rows) for run in runs if (rows := run.samples())]
    share = limit // max(1, len(loaded))
    several = len({run.run.get("experiment") for run, _ in loaded}) > 1
    entries, kept, total = [], 0, 0
    for run, rows in loaded:
        packed = _fit([embed(_compact(row)) for row in rows], share)
        parts = [run.run.get("experiment")] if several else []
        name = " / ".join(str(part) for part in (*parts, run.run.get("arm"), f"seed {run.run.get('seed')}"))
        entries.append(f'{{"name":{embed(name)},"scale":{_scale(rows)!r},"samples":[{",".join(packed)}]}}')
        kept, total = kept + len(packed), total + len(rows)
    note = f"{kept} of {total} recorded samples." if kept else "These runs recorded no samples."
    replace(path, page(_HERE / "browser", f"Samples of {title}", note, "[" + ",\n".join(entries) + "]").encode())
    return path


def page(template: Path, title: str, note: str, data: str) -> str:
    """`template`.html filled in with `template`.js, the common style, `template`.css where there is one, and `data`, a
    JSON text made by `embed`."""
    sheets = [_HERE / "browser.css", template.with_suffix(".css")]
    style = "".join(dict.fromkeys(sheet.read_text() for sheet in sheets if sheet.is_file()))
    script = template.with_suffix(".js").read_text()
    parts = {
        "SCRIPT_HASH": _digest(script),
        "STYLE_HASH": _digest(style),
        "TITLE": html.escape(title),
        "STYLE": style,
        "NOTE": html.escape(note),
        "SCRIPT": script,
        "DATA": data,
    }
    # One pass from left to right: a sample that contains %SCRIPT% must not be filled in.
    pieces = template.with_suffix(".html").read_text().split("%")
    return "".join(parts.get(piece, piece) if i % 2 else piece for i, piece in enumerate(pieces))


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embed(value: Any) -> str:
    """JSON that can stand inside a script element: no character can end it or open a comment."""
    text = json.dumps(clean(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _compact(row: dict) -> dict:
    """What the page shows of one sample; the completion only if its tokens do not spell it."""
    tokens = [str(token) for token in row.get("tokens") or []]
    advantages = [None if a is None else float(f"{a:.3g}") for a in row.get("advantages") or []]
    completion = str(row.get("completion") or "")
    kept = {key: row.get(key) for key in ("step", "row_id", "group_id", "finish")}
    kept |= {"tier": str(row.get("tier") or "all"), "rewards": row.get("rewards") or {}}
    kept["prompt"] = _shorten(_prompt(row.get("prompt")), 2 * LONGEST)
    if tokens:
        rest = [f" [{len(tokens) - LONGEST} more tokens]"] if len(tokens) > LONGEST else []
        kept |= {"length": len(tokens), "tokens": tokens[:LONGEST] + rest, "advantages": advantages[:LONGEST]}
    else:
        kept["completion"] = _shorten(completion, 2 * LONGEST)
    return kept


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list):  # chat messages
        return "\n\n".join(f"[{m.get('role')}]\n{m.get('content')}" for m in prompt if isinstance(m, dict))
    return str(prompt or "")


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} [{len(text) - most} more characters]"


def _fit(rows: list[str], limit: int) -> list[str]:
    """As many rows as fit into `limit` bytes, spread evenly over the run."""
    stride = 1
    while stride <= len(rows):
        chosen = rows[::stride]
        if sum(map(len, chosen)) <= limit:
            return chosen
        stride += 1
    return []


def _scale(rows: Sequence[dict]) -> float:
    """The advantage that gets the full colour: the 98th percentile of the absolute values of the run, or 1."""
    sizes = sorted(abs(a) for row in rows for a in row.get("advantages") or [] if a)
    top = sizes[math.ceil(0.98 * len(sizes)) - 1] if sizes else 1.0
    return float(f"{top:.3g}")
