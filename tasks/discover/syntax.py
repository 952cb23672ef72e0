"""Reading Python source trees as data: which files, parsed how, naming what.

A tree comes from a git remote, so nothing in it is trusted: links are not followed, only regular
files of a sane size are read, and a file that does not parse is passed over.
"""

from __future__ import annotations

import ast
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks import syntax

MAX_BYTES = 8_000_000
"""Larger files are not read; the largest real module has 1.2 MB."""


def python_files(root: Path, *folders: str) -> Iterator[tuple[str, bytes]]:
    """Yield path relative to `root` and content of the Python files below `folders`, in order."""
    inside = root.resolve()
    for folder in folders:
        top = inside / folder
        if not top.resolve().is_relative_to(inside):
            continue
        for parent, subfolders, names in os.walk(top):
            subfolders.sort()
            for name in sorted(names):
                content = _read(f"{parent}/{name}") if name.endswith(".py") else None
                if content is not None:
                    yield os.path.relpath(f"{parent}/{name}", inside), content


def _read(path: str) -> bytes | None:
    try:
        path.encode()  # A name that is no text could not be written to the cache.
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            return None
        return Path(path).read_bytes()
    except (OSError, UnicodeEncodeError):
        return None


def parse(source: bytes) -> ast.Module | None:
    """Parse bytes (a file may start with a byte-order mark); None for what is not Python 3."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return syntax.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def dotted(node: ast.expr) -> str | None:
    """Return `a.b.c` for a chain of attributes, None for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([node.id, *reversed(parts)])


def module_name(path: str) -> str:
    """Return the dotted name of the module at a path relative to the packages' folder."""
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute(module: str, is_package: bool, target: str, level: int) -> str:
    """Return the module that `from <level dots><target> import ...` names in `module`."""
    if not level:
        return target
    parts = module.split(".")
    parts = parts[: max(0, len(parts) - (level - is_package))]
    return ".".join([*parts, target] if target else parts)


@dataclass(frozen=True)
class Imported:
    """A name bound by an import: a module, or a name in a module."""

    module: str
    name: str | None


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


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a scope: also those inside `if`, `try`, `with` and loops."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, None) or [])
        for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            yield from statements(part.body)


def entry_classes(tree: ast.Module) -> Iterator[str]:
    """Yield the classes that an SGLang model file registers by `EntryClass`."""
    for node in statements(tree.body):
        match node:
            case ast.Assign(targets=[ast.Name(id="EntryClass")], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id="EntryClass"), value=ast.expr() as value):
                pass
            case _:
                continue
        values = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
        yield from (value.id for value in values if isinstance(value, ast.Name))
