"""Check that a definition holds together, without running it and without torch.

These are the rules of `flashinfer_bench.data.Definition` plus the ones it leaves to the builder
(the reference takes exactly the inputs); the real model is applied too where it is installed.
"""

from __future__ import annotations

import ast
import json
from typing import Any

from tasks import syntax
from tasks.errors import DefinitionError

DTYPES = frozenset(
    {
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float4_e2m1",
        "int64",
        "int32",
        "int16",
        "int8",
        "bool",
    }
)
_REQUIRED = ("name", "op_type", "axes", "inputs", "outputs", "reference")


def _check_axes(axes: Any) -> None:
    for name, axis in axes.items():
        kind, value = axis.get("type"), axis.get("value")
        if kind == "const":
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise DefinitionError(f"axes.{name}: const value {value!r} is no positive integer")
        elif kind != "var":
            raise DefinitionError(f"axes.{name}: type {kind!r} is neither const nor var")


def _check_tensors(part: str, tensors: Any, axes: Any) -> None:
    if not tensors:
        raise DefinitionError(f"{part}: empty")
    for name, spec in tensors.items():
        if not name.isidentifier():
            raise DefinitionError(f"{part}.{name}: not an identifier")
        if spec.get("dtype") not in DTYPES:
            raise DefinitionError(f"{part}.{name}: dtype {spec.get('dtype')!r} is not supported")
        for axis in spec.get("shape") or ():
            if axis not in axes:
                raise DefinitionError(f"{part}.{name}: shape uses axis {axis!r}, not declared")


def _check_reference(source: str, inputs: Any) -> None:
    try:
        tree = syntax.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DefinitionError(f"reference: not Python ({error})") from error
    run = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run"]
    if len(run) != 1:
        raise DefinitionError(f"reference: {len(run)} top-level functions named run, expected 1")
    arguments = run[0].args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or names != list(inputs):
        raise DefinitionError(f"reference: run takes {names}, the inputs are {list(inputs)}")


_IN_CONSTRAINTS = (
    *(ast.Expression, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.BinOp, ast.operator),
    *(ast.UnaryOp, ast.unaryop, ast.Name, ast.Load, ast.Constant, ast.Subscript, ast.Tuple),
)


_FUNCTIONS = frozenset({"abs", "max", "min"})


def _texts(definition: dict[str, Any], key: str) -> list[str]:
    texts = definition.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DefinitionError(f"{key}: {texts!r} is no list of texts")
    return texts


def _check_constraint(constraint: str, known: set[str]) -> None:
    """Check that a constraint only compares: whoever evaluates it runs it as Python."""
    try:
        tree = syntax.parse_expression(constraint)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DefinitionError(f"constraints: {constraint!r} is no expression") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in known | _FUNCTIONS:
            raise DefinitionError(f"constraints: {constraint!r}: {node.id} is no axis and no input")
        if not (isinstance(node, _IN_CONSTRAINTS) or _reads_a_tensor(node)):
            raise DefinitionError(f"constraints: {constraint!r} does more than compare")


def _reads_a_tensor(node: ast.AST) -> bool:
    """Whether a node is `x.shape`, `x.item`, `x.item()` or a call like `max(m, n)`."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            return node.func.id in _FUNCTIONS and not node.keywords
        return not (node.args or node.keywords) and _reads_a_tensor(node.func)
    return isinstance(node, ast.Attribute) and node.attr in {"item", "shape"}


def check_definition(definition: dict[str, Any]) -> None:
    """Check a definition's structure.

    Raises:
        DefinitionError: it does not hold; the text begins with the field.
    """
    for key in _REQUIRED:
        if not definition.get(key):
            raise DefinitionError(f"{key}: missing or empty")
    axes, inputs, outputs = definition["axes"], definition["inputs"], definition["outputs"]
    try:
        _check_axes(axes)
        _check_tensors("inputs", inputs, axes)
        _check_tensors("outputs", outputs, axes)
    except (AttributeError, TypeError) as error:
        raise DefinitionError(
            f"axes, inputs or outputs: not of the right form ({error})"
        ) from error
    both = sorted(inputs.keys() & outputs.keys())
    if both:
        raise DefinitionError(f"outputs: {', '.join(both)} is an input too")
    known = axes.keys() | inputs.keys()
    for constraint in _texts(definition, "constraints"):
        _check_constraint(constraint, known)
    _texts(definition, "tags")
    try:
        json.dumps(definition, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise DefinitionError(f"not JSON, or not Unicode text ({error})") from error
    _check_reference(definition["reference"], inputs)
