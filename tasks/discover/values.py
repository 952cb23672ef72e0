"""The values that constant Python comes to, for `tasks.discover.constants`.

They are Python's own texts, numbers, lists, tuples and dictionaries, and the classes below.
"""

from __future__ import annotations

import ast
from collections import ChainMap
from dataclasses import dataclass, field
from typing import Any, Final

from tasks.discover.syntax import Imported

MAX_ITEMS = 5_000
MAX_TEXT = 8 * MAX_ITEMS
MAX_KEY = 16


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = _Unknown()
"""A value that only a running program has."""
_SPOILED: Final = _Unknown()
"""Marks a list or dictionary whose content is no longer known."""


@dataclass(eq=False)
class Class:
    """A class of the tree."""

    name: str
    initializer: Any
    """Its `__init__`, where that is a function of the tree."""


@dataclass(eq=False)
class Record:
    """An object of a class of the tree."""

    kind: Class
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Function:
    """A function with the scope it was defined in."""

    node: ast.FunctionDef
    scope: Scope
    plain: list[str]
    """The parameters that may be positional."""
    names: dict[str, Any]
    """All parameters, with their defaults."""
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Scope:
    """The names of a module or of one function call."""

    module: str
    is_package: bool
    names: ChainMap[str, Any] = field(default_factory=ChainMap)
    """With those around it."""
    returned: list[Any] = field(default_factory=list)
    """What the function call returns; UNKNOWN where it may or may not."""

    def find(self, name: str, default: Any) -> Any:
        """Return the value bound to a name."""
        for names in self.names.maps:
            if name in names:
                return names[name]
        return default

    def forget(self, name: str) -> None:
        """Make a name unknown here, and where it is bound further out."""
        self.names[name] = UNKNOWN
        for names in self.names.maps:
            if name in names:
                names[name] = UNKNOWN

    def inner(self, names: dict[str, Any]) -> Scope:
        """Return a scope inside this one."""
        return Scope(self.module, self.is_package, self.names.new_child(names))


SCALARS: Final = (str, int, float, bool, type(None))


def is_key(value: Any) -> bool:
    """Whether a value is a scalar or a short tuple of them; hashing a deep one may never end."""
    if isinstance(value, tuple):
        return len(value) <= MAX_KEY and all(isinstance(item, SCALARS) for item in value)
    return isinstance(value, SCALARS)


def size(value: Any) -> int:
    """Return about how many words of memory a value takes itself."""
    if isinstance(value, list | tuple | dict):
        return len(value)
    text = value.module if isinstance(value, Imported) else value
    return len(text) // 8 if isinstance(text, str) else 0


def bounded(value: Any) -> Any:
    """Return a value, UNKNOWN for one that is spoiled or larger than any real one."""
    if isinstance(value, int):
        return value if abs(value) < 2**63 else UNKNOWN
    return UNKNOWN if size(value) > MAX_ITEMS or _is_spoiled(value) else value


def _is_spoiled(value: Any) -> bool:
    if isinstance(value, dict):
        return _SPOILED in value
    return isinstance(value, list) and bool(value) and value[0] is _SPOILED


def spoil(value: Any, depth: int = 3) -> int:
    """Make unknown what an object holds, for all who have it, and so for the objects it holds.

    Returns:
        How many objects were looked at.
    """
    count, level = 1, [value]
    for _ in range(depth + 1):
        held = [inner for one in level for inner in _spoiled(one)]
        count += len(held)
        level = list({id(inner): inner for inner in held}.values())
    return count


def _spoiled(value: Any) -> list[Any]:
    """Make one object unknown; return what it held."""
    held: list[Any] = []
    if not _is_spoiled(value):
        if isinstance(value, list | tuple):
            held = list(value)
        elif isinstance(value, dict):
            held = list(value.values())
            value[_SPOILED] = UNKNOWN
        elif isinstance(value, Record | Function):
            held = list(value.attributes.values())
            value.attributes.clear()
        if isinstance(value, list):
            value.insert(0, _SPOILED)
    return held
