"""What a reference's syntax tree says. Nothing is executed."""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Iterator

from tasks import syntax
from tasks.errors import DefinitionError

Function = ast.FunctionDef

_LONGEST = 1_000_000
"""Characters of a reference; FlashInfer's longest has 20,000."""


def fail(rule: str, text: str) -> DefinitionError:
    """Return the error of a rule that cannot be applied."""
    return DefinitionError(f"{rule}: {text}")


def parse_source(source: str) -> ast.Module:
    """Return a reference's syntax tree.

    Raises:
        DefinitionError: it is too long, or not Python.
    """
    if len(source) > _LONGEST:
        raise fail("reference", f"{len(source)} characters, at most {_LONGEST} are read")
    try:
        return syntax.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise fail("reference", f"not Python ({error})") from error


def parameters_of(function: Function) -> dict[str, ast.expr | None]:
    """Return the parameters a caller may name, with their defaults."""
    args = function.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    found = {a.arg: default for a, default in zip(plain, defaults, strict=True)}
    found.update({a.arg: d for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)})
    return found


def _body(function: Function) -> Iterator[ast.AST]:
    """Yield the nodes of a function's body without those of functions inside it."""
    left: list[ast.AST] = list(reversed(function.body))
    while left:
        node = left.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            left.extend(reversed(list(ast.iter_child_nodes(node))))


def read_by(function: Function) -> set[str]:
    """Return the names a function reads."""
    names = (node for node in ast.walk(function) if isinstance(node, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def asked_by(function: Function) -> set[str]:
    """Return the names that a function compares with `is`."""
    comparisons = (node for node in ast.walk(function) if isinstance(node, ast.Compare))
    asked = [c.left for c in comparisons if isinstance(c.ops[0], ast.Is | ast.IsNot)]
    return {left.id for left in asked if isinstance(left, ast.Name)}


def returned_by(function: Function) -> list[ast.expr]:
    """Return the values of a function's return statements."""
    nodes = (node for node in _body(function) if isinstance(node, ast.Return))
    return [node.value for node in nodes if node.value is not None]


def _count(functions: dict[str, Function], name: str, known: dict[str, int | None]) -> int | None:
    """Count the values a function returns; nothing where that is not clear."""
    if name not in known:
        known[name] = None  # for functions that call themselves
        counts = {_values(functions, value, known) for value in returned_by(functions[name])}
        known[name] = counts.pop() if len(counts) == 1 else None
    return known[name]


def _values(
    functions: dict[str, Function], value: ast.expr, known: dict[str, int | None]
) -> int | None:
    if isinstance(value, ast.Tuple):
        return None if any(isinstance(e, ast.Starred) for e in value.elts) else len(value.elts)
    if isinstance(value, ast.IfExp):
        return None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        helper = value.func.id
        return _count(functions, helper, known) if helper in functions else None
    return 1


def returned_count(functions: dict[str, Function], name: str) -> int | None:
    """Return how many values one of some functions returns, where that is clear."""
    return _count(functions, name, {})


def written_by(function: Function) -> set[str]:
    """Return the parameters whose tensors the function seems to write, or hands back."""
    touched: list[ast.expr] = []
    for node in _body(function):
        if isinstance(node, ast.Assign):
            touched += [t.value for t in node.targets if isinstance(t, ast.Subscript)]
        elif isinstance(node, ast.AugAssign):
            inner = node.target
            touched.append(inner.value if isinstance(inner, ast.Subscript) else inner)
        elif isinstance(node, ast.Attribute) and node.attr.endswith("_"):
            touched.append(node.value)  # PyTorch's names for what works in place end so
    for value in returned_by(function):
        touched += value.elts if isinstance(value, ast.Tuple) else [value]
    return {e.id for e in touched if isinstance(e, ast.Name)} & parameters_of(function).keys()


def undefined_names(source: str) -> list[str]:
    """Return the global names that a module reads and nobody defines."""
    try:
        root = symtable.symtable(source, "reference", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise fail("reference", f"not Python ({error})") from error
    known, read = set(dir(builtins)), set()
    tables = [root]
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        for symbol in table.get_symbols():
            if table is root and (symbol.is_assigned() or symbol.is_imported()):
                known.add(symbol.get_name())
            if symbol.is_referenced() and (table is root or symbol.is_global()):
                read.add(symbol.get_name())
    return sorted(read - known)


def lines_of(source: str) -> list[bytes]:
    """Return a source's lines as Python counts them; its columns are counted in bytes."""
    return source.encode().splitlines(keepends=True)
