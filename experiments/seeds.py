"""One seed makes a tree of seeds: every random stream of a run is named, never shared."""

from __future__ import annotations

import hashlib
import json


def derive(seed: int, *names: str | int) -> int:
    """Seed of the stream called `names` below `seed`, in [0, 2**63).

    Stable across processes, machines and Python versions (unlike `hash`). Order and type matter:
    `derive(0, "a", 1)`, `derive(0, 1, "a")` and `derive(0, "a", "1")` are three streams. Without names it
    is still a hash of `seed`, so neighbouring run seeds give unrelated streams.
    Raises TypeError for names that are not str or int (a float or an object has no stable spelling).
    """
    for name in (seed, *names):
        if not isinstance(name, (str, int)):
            raise TypeError(f"derive() takes str and int names, got {type(name).__name__}: {name!r}")
    key = json.dumps([seed, *names], ensure_ascii=True).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
