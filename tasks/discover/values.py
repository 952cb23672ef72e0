"""The values that constant Python comes to, for `tasks.discover.constants`.

They are Python's own texts, numbers, lists, tuples and dictionaries (a set is a list, in the
source's order), and the classes below. Trees are data of unknown origin: sizes are bounded.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tasks.discover.syntax import absolute

MAX_TEXT = 20_000
MAX_ITEMS = 5_000
MAX_KEY = 16


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = _Unknown()
"""A value that only a running program has."""


@dataclass(frozen=True, eq=False)
class Choice:
    """One of several values; which one, only a running program knows."""

    values: tuple[Any, ...]


@dataclass(eq=False)
class Record:
    """An object of a class, as the arguments it was made with."""

    kind: str
    """The class's last name."""
    attributes: dict[str, Any]
    bases: frozenset[str] | None
    """The names of its class and base classes; None for a class outside the tree."""


@dataclass(eq=False)
class Function:
    """A function with the scope it was defined in."""

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    scope: Scope
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Class:
    """A class of the tree."""

    node: ast.ClassDef
    scope: Scope
    bases: tuple[Any, ...]


@dataclass(frozen=True)
class Imported:
    """A name bound by an import: a module, or a name in a module."""

    module: str
    name: str | None


@dataclass(eq=False)
class Scope:
    """The names of a module or of one function call."""

    module: str
    is_package: bool
    names: dict[str, Any] = field(default_factory=dict)
    outer: Scope | None = None

    def find(self, name: str) -> Any:
        """Return the value bound to a name here or further out."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return UNKNOWN


SCALARS: Final = (str, int, float, bool, type(None))


def outcomes(value: Any) -> Iterator[Any]:
    """Yield the values of a choice, or the value itself."""
    if isinstance(value, Choice):
        yield from value.values
    else:
        yield value


def choice(values: Iterable[Any]) -> Any:
    """Return the one value there is, or the choice between several."""
    found: dict[int, Any] = {}
    for value in values:
        for one in outcomes(value):
            found.setdefault(id(one), one)
    if len(found) == 1:
        return next(iter(found.values()))
    return Choice(tuple(found.values())[:MAX_ITEMS]) if found else UNKNOWN


def is_key(value: Any) -> bool:
    """Whether a value is a scalar or a short tuple of them; hashing a deep one may never end."""
    if isinstance(value, tuple):
        return len(value) <= MAX_KEY and all(isinstance(item, SCALARS) for item in value)
    return isinstance(value, SCALARS)


def are_keys(items: Any) -> bool:
    """Whether something is a collection of keys."""
    return isinstance(items, list | tuple | dict) and all(is_key(item) for item in items)


def truth(value: Any) -> bool | None:
    """Return whether a value is true; None where that is not known."""
    if isinstance(value, (*SCALARS, list, tuple, dict)):
        return bool(value)
    if isinstance(value, Function | Class) or (isinstance(value, Record) and value.bases):
        return True
    return None


def bounded(value: Any) -> Any:
    """Return a value, UNKNOWN for one larger than any real one."""
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT else UNKNOWN
    if isinstance(value, list | tuple | dict):
        return value if len(value) <= MAX_ITEMS else UNKNOWN
    if isinstance(value, int):
        return value if abs(value) < 2**63 else UNKNOWN
    return value


def import_bindings(
    node: ast.Import | ast.ImportFrom, module: str, is_package: bool
) -> dict[str, Imported]:
    """Return the names an import statement binds; `*<module>` stands for all of a module's."""
    if isinstance(node, ast.ImportFrom):
        origin = absolute(module, is_package, node.module or "", node.level)
        return {
            f"*{origin}" if alias.name == "*" else alias.asname or alias.name: Imported(
                origin, alias.name
            )
            for alias in node.names
        }
    bound = {}
    for alias in node.names:
        top = alias.name.partition(".")[0]
        bound[alias.asname or top] = Imported(alias.name if alias.asname else top, None)
    return bound
