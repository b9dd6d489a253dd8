"""What the preference-consistency filter does to rubrics, as arithmetic; our choice, the paper has no formula."""

from __future__ import annotations

NAN = float("nan")


def filter_purity(p: float, a: float, b: float, passes: int = 1) -> tuple[float, float]:
    """(purity, kept share) behind `passes` independent passes of the preference-consistency filter.

    A share p of the rubrics is good; a good one reproduces the label with chance a, a bad one with b:
    kept = p a^m + (1 - p) b^m, purity = p a^m / kept. b is at least what the judge gets right without a rubric, so the
    filter cannot see a rubric that is merely useless on an easy pair. Degenerate: nothing kept gives purity NaN.
    """
    good, bad = p * a**passes, (1 - p) * b**passes
    kept = good + bad
    return (good / kept if kept > 0 else NAN), kept
