"""Errors that a user reads as one paragraph: what, where, got, expected, what to do.

`exit_code` is what the command line returns: 2 for wrong usage, configuration or input,
1 for a run that failed on the way.
"""

from __future__ import annotations


class AssayError(Exception):
    """Base of every error that assay raises on purpose."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", got: object = None, expected: str = "", fix: str = "") -> None:
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        parts = [what.rstrip(".") + "."]
        if where:
            parts.append(f"Where: {where}.")
        if got is not None:
            parts.append(f"Got: {got}.")
        if expected:
            parts.append(f"Expected: {expected}.")
        if fix:
            parts.append(f"To fix it: {fix}" + ("" if fix.endswith("?") else "."))
        super().__init__(" ".join(parts))

    def __reduce__(self):
        # Errors cross process borders (parallel runs); the default would pass the finished paragraph as `what`.
        return _rebuild, (type(self), self.what, self.where, self.got, self.expected, self.fix)


def _rebuild(cls, what, where, got, expected, fix):
    return cls(what, where=where, got=got, expected=expected, fix=fix)


class ConfigError(AssayError, ValueError):
    """A configuration that cannot be right: unknown key, wrong type, refused combination."""

    exit_code = 2


class DataError(AssayError, ValueError):
    """An input file or row that cannot be used."""

    exit_code = 2


class RecordError(AssayError, ValueError):
    """A run record or checkpoint that is damaged, of another version, or of another configuration."""

    exit_code = 2


class RunError(AssayError, RuntimeError):
    """A run that failed on the way (NaN reward, no space, an endpoint that stays down)."""

    exit_code = 1


def check_range(where: str, value: float, least: float, most: float = float("inf"), above: bool = False) -> None:
    """ConfigError unless `least <= value <= most` (`above`: `least < value`); NaN and infinity are refused."""
    inside = least < value if above else least <= value
    if not (inside and value <= most and value < float("inf")):
        low = f"above {least:g}" if above else f"at least {least:g}"
        expected = low if most == float("inf") else f"{low} and at most {most:g}"
        raise ConfigError("a setting is out of range", where=where, got=value, expected=expected)


def raised_at(error: BaseException) -> str:
    """`file.py:12 in function`: the innermost place outside of Python's and installed libraries."""
    import sysconfig
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    libraries = (sysconfig.get_path("stdlib"), "<")
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(libraries)]
    frame = (own or list(frames) or [None])[-1]
    return "nowhere" if frame is None else f"{frame.filename}:{frame.lineno} in {frame.name}"


def nearest(word: str, choices, limit: int = 3) -> str:
    """A hint such as ``did you mean 'ha_dw'?`` or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(choices), n=limit, cutoff=0.5)
    return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?" if close else ""
