r"""Equivalence of two short mathematical texts, bounded without a clock.

math-verify finds and parses the expressions. Its comparison is bounded by a signal, which only the main thread may
set, and a limit in seconds would make rewards depend on the machine; what it falls back on, sympy's `simplify`, has no
bound. So expressions are compared here by their values at fixed points (an identity test), sets, tuples, matrices and
equations by their parts, and only small inequalities and intervals by math-verify itself. What cannot be sure to be
quick is refused: deep brackets, sums, products, integrals, limits, huge numbers, powers or sets.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from experiments.seeds import derive

MAX_CHARS = 300
MAX_BARS = 8  # absolute values: each bar may open or close, so the parser's work doubles
MAX_DEPTH = 6
MAX_NODES = 120
MAX_NODES_RELATION = 40
MAX_DIGITS = 800.0  # of any number on the way
MAX_MEMBERS = 30  # of a set, tuple or matrix
POINTS = 3
REFUSED = ("Sum", "Product", "Integral", "Limit", "Derivative")


def same(gold: str, said: str) -> bool:
    """Whether an expression of each text can be parsed, is quick to compare, and both are equal."""
    return any(equal(one, other) for one in parsed(gold) for other in parsed(said))


def equal(one: Any, other: Any) -> bool:
    """Whether two parsed expressions mean the same. `x = 3` equals `3`; sets have no order, tuples do."""
    import sympy

    if one == other:
        return True
    if hasattr(one, "flat") or hasattr(other, "flat"):
        alike = getattr(one, "shape", None) == getattr(other, "shape", None)
        return alike and all(equal(a, b) for a, b in zip(one.flat(), other.flat(), strict=True))
    kinds = [type(one).__name__, type(other).__name__]
    if kinds == ["FiniteSet", "FiniteSet"]:
        return _matched(list(one.args), list(other.args))
    if kinds == ["Tuple", "Tuple"]:
        alike = len(one.args) == len(other.args)
        return alike and all(equal(a, b) for a, b in zip(one.args, other.args, strict=True))
    if "Equality" in kinds:
        return _equations(one, other)
    scalars = [isinstance(item, sympy.Expr) for item in (one, other)]
    if any(scalars):
        return all(scalars) and _expressions(one, other)
    return _by_library(one, other)


def _matched(ones: list, others: list) -> bool:
    """Whether each of `ones` has a partner of its own in `others`."""
    if len(ones) != len(others):
        return False
    for one in ones:
        partner = next((k for k, other in enumerate(others) if equal(one, other)), None)
        if partner is None:
            return False
        del others[partner]
    return True


def _equations(one: Any, other: Any) -> bool:
    """Two equations (equal sides, or one a multiple of the other), or an equation `name = value` and a value."""
    import sympy
    from sympy.core.function import AppliedUndef

    if isinstance(one, sympy.Eq) and isinstance(other, sympy.Eq):
        pairs = ((one.lhs, other.lhs, one.rhs, other.rhs), (one.lhs, other.rhs, one.rhs, other.lhs))
        if any(equal(a, b) and equal(c, d) for a, b, c, d in pairs):
            return True
        if not all(isinstance(side, sympy.Expr) for e in (one, other) for side in (e.lhs, e.rhs)):
            return False
        names = one.free_symbols | other.free_symbols
        ratios = []
        for k in range(POINTS):
            top, bottom = (_value(e.lhs, k) - _value(e.rhs, k) for e in (one, other))
            ratios.append(top / bottom if bottom else math.nan)
        return bool(names) and all(_close(r, ratios[0]) for r in ratios) and ratios[0] != 0
    equation, value = (one, other) if isinstance(one, sympy.Eq) else (other, one)
    named = isinstance(equation.lhs, (sympy.Symbol, AppliedUndef))
    return named and not value.has(equation.lhs) and equal(equation.rhs, value)


def _expressions(one: Any, other: Any) -> bool:
    import sympy

    names = one.free_symbols | other.free_symbols
    rounded = not names and (one.has(sympy.Float) or other.has(sympy.Float))
    values = [(_value(one, k), _value(other, k)) for k in range(POINTS if names else 1)]
    if rounded:  # completions round: six digits after the point, or six significant ones of a small value
        return all(abs(a - b) <= 1.0001e-6 * min(1.0, max(abs(a), abs(b))) for a, b in values)
    return all(_close(a, b) for a, b in values)


def _close(a: complex, b: complex) -> bool:
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b))


def _value(expression: Any, point: int) -> complex:
    """The value with a fixed positive number for each symbol; NaN, which equals nothing, if there is none."""
    subs = {s: 0.5 + derive(point, s.name) / 2**62 for s in expression.free_symbols}
    try:
        value = complex(expression.evalf(17, subs=subs, maxn=60))
    except (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
        return complex(math.nan)
    return value if math.isfinite(abs(value)) else complex(math.nan)


def _by_library(one: Any, other: Any) -> bool:
    import math_verify
    import sympy

    for item in (one, other):
        if sum(1 for _ in sympy.preorder_traversal(item)) > MAX_NODES_RELATION:
            return False
    return bool(math_verify.verify(one, other, timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> tuple[Any, ...]:
    """Sympy expressions that math-verify finds in `text`, if they are quick to work with, else none.

    Cached: a group of rollouts shares its gold answer and often its answers.
    """
    import logging

    import math_verify

    if not quick_text(text):
        return ()
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns that its time limit is off
    bare = "$" not in text and "\\[" not in text and "\\(" not in text
    found = math_verify.parse(f"\\boxed{{{text}}}" if bare else text, parsing_timeout=None)  # type: ignore[arg-type]
    return tuple(item for item in found if not isinstance(item, str) and quick(item))


def quick_text(text: str) -> bool:
    """Whether a text is short, its brackets shallow and its braces balanced."""
    if not text.strip() or len(text) > MAX_CHARS or text.count("|") > MAX_BARS or "--" in text:
        return False
    depth = braces = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        braces += (char == "{") - (char == "}")
        if depth > MAX_DEPTH or braces < 0:
            return False
    return braces == 0


def quick(expression: Any) -> bool:
    """Whether a parsed, not yet evaluated expression is small enough to be compared."""
    import sympy

    if hasattr(expression, "flat"):
        return len(expression.flat()) <= MAX_MEMBERS and all(quick(item) for item in expression.flat())
    for count, node in enumerate(sympy.preorder_traversal(expression)):
        if count > MAX_NODES or type(node).__name__ in REFUSED or len(getattr(node, "args", ())) > MAX_MEMBERS:
            return False
    return digits(expression) <= MAX_DIGITS


def digits(node: Any) -> float:
    """A bound on log10 of the largest number met on the way to the value of `node`; symbols count as 1."""
    import sympy

    if isinstance(node, sympy.Rational):
        return math.log10(max(abs(int(node.p)), int(node.q), 1))
    if isinstance(node, sympy.Float):
        return math.log10(max(abs(float(node)), 1))
    args = [digits(arg) for arg in getattr(node, "args", ())]
    if not args:
        return 0.5
    if isinstance(node, sympy.Pow):
        return math.inf if args[1] > 4 else max(args[0], 0.1) * 10 ** args[1]
    if isinstance(node, sympy.exp):
        return math.inf if args[0] > 4 else 10 ** args[0]
    if isinstance(node, sympy.Mul):
        return sum(args)
    if isinstance(node, sympy.Add):
        return max(args) + 1
    if type(node).__name__ in ("factorial", "binomial", "factorial2", "gamma"):
        return math.inf if max(args) > 2.5 else max(args) * 10 ** max(args)
    return max(args)
