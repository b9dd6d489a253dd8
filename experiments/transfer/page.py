"""The page of the most shifted latents with the texts that excite them most: one HTML file, nothing from outside.

All text comes from data or a tokenizer and is escaped; there is no script, and the policy allows none.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments.files import replace

LATENTS = 20  # on the page
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin:2rem 0 .2rem}p{margin:.2rem 0;color:#555}
ol{margin:.4rem 0;padding:0;list-style:none}
li{margin:.25rem 0;padding:.3rem .5rem;background:#f6f6f4;border-left:3px solid #0072b2;overflow-wrap:anywhere}
li small{color:#666;display:inline-block;min-width:11rem}
mark{background:#ffd98a;color:#000;padding:0 .1em}
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{hash}'; base-uri 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_page(path: Path, title: str, intro: Sequence[str], latents: Sequence[dict[str, Any]]) -> None:
    """`latents`: {latent, shift, share, texts: [{domain, value, before, token, after}]}, the most shifted first."""
    parts = [f"<p>{escape(line)}</p>" for line in intro]
    for entry in latents[:LATENTS]:
        parts.append(f"<h2>latent {entry['latent']}</h2>")
        parts.append(f"<p>shift {entry['shift']:.4g}, {entry['share']:.1%} of the whole shift</p>")
        rows = [_text(text) for text in entry["texts"]] or ["<li>no text of any domain excites it</li>"]
        parts.append("<ol>" + "\n".join(rows) + "</ol>")
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    page = _PAGE.format(title=escape(title), style=STYLE, hash=digest, body="\n".join(parts))
    replace(path, page.encode("utf-8", "replace"))


def _text(text: dict[str, Any]) -> str:
    words = f"{escape(text['before'])}<mark>{escape(text['token'])}</mark>{escape(text['after'])}"
    return f"<li><small>{escape(text['domain'])} · {text['value']:.3g}</small> {words}</li>"
