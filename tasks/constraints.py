"""Evaluate the constraints that are plain arithmetic on a row's axes and index tensors.

`len_indptr == batch_size + 1`, `total_q == qo_indptr[-1].item()`, `x.shape[0] == tokens`: nothing
else is understood, and nothing is ever passed to `eval`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tasks import syntax

_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], tuple[str, Callable[[int, int], bool]]] = {
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
}


class _UnknownError(Exception):
    """The expression is of another form, or about values that are not at hand."""


@dataclass(frozen=True)
class Comparison:
    """A constraint with its numbers filled in."""

    left: int
    sign: str
    right: int
    holds: bool

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}"


@lru_cache(maxsize=256)
def _parsed(constraint: str) -> ast.Compare | None:
    """Return the one comparison that a constraint is; None if it is anything else."""
    try:
        tree = syntax.parse_expression(constraint).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if isinstance(tree, ast.Compare) and len(tree.ops) == 1 else None


def compare(
    constraint: str,
    axes: Mapping[str, int],
    shape: Callable[[str], tuple[int, ...] | None],
    element: Callable[[str, int], int | None],
) -> Comparison | None:
    """Return both sides of a constraint in a row; None if they cannot be known here.

    Args:
        constraint: an expression.
        axes: all axes.
        shape: returns the shape of an input.
        element: returns one element of an index tensor, if it is stored.
    """
    tree = _parsed(constraint)
    known = _COMPARISONS.get(type(tree.ops[0])) if tree else None
    if tree is None or known is None:
        return None
    sign, holding = known
    try:
        left, right = (
            _value(node, axes, shape, element) for node in (tree.left, tree.comparators[0])
        )
    except (_UnknownError, ZeroDivisionError, ValueError, RecursionError, MemoryError):
        return None
    return Comparison(left, sign, right, holding(left, right))


def holds(
    constraint: str,
    axes: Mapping[str, int],
    shape: Callable[[str], tuple[int, ...] | None],
    element: Callable[[str, int], int | None],
) -> bool | None:
    """Say whether a constraint holds in a row; None if that cannot be said here.

    The arguments are those of `compare`.
    """
    compared = compare(constraint, axes, shape, element)
    return None if compared is None else compared.holds


def _value(node: ast.expr, axes: Mapping[str, int], shape: Any, element: Any) -> int:
    known: int | None = None
    match node:
        case ast.Constant(value=int(number)):
            known = number
        case ast.Name(id=name):
            known = axes.get(name)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
            known = _ARITHMETIC[type(sign)](
                _value(left, axes, shape, element), _value(right, axes, shape, element)
            )
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            known = -_value(operand, axes, shape, element)
        case ast.Subscript(value=ast.Attribute(value=ast.Name(id=name), attr="shape"), slice=at):
            sizes, index = shape(name), _value(at, axes, shape, element)
            known = sizes[index] if sizes and -len(sizes) <= index < len(sizes) else None
        case ast.Call(
            func=ast.Attribute(value=ast.Subscript(value=ast.Name(id=name), slice=at), attr="item"),
            args=[],
            keywords=[],
        ):
            known = element(name, _value(at, axes, shape, element))
    if known is None:
        raise _UnknownError
    return known
