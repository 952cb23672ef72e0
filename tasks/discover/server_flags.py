"""SGLang's server flags, read from the sources that declare them.

A flag is a field of `ServerArgs` annotated with its command-line metadata (from 0.5.20 on, a field
of the classes in `arg_groups/fields`), or a literal `parser.add_argument("--flag", ...)`, which is
how deprecated spellings are kept.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from pydantic import BaseModel

from tasks.discover.constants import Calculator
from tasks.discover.syntax import dotted, module_name, parse

DECLARES = re.compile(rb"\bA\[|\bAnnotated\[|\.add_argument\(|^class ServerArgs\b", re.MULTILINE)


class ServerFlag(BaseModel):
    """One command-line flag of the SGLang server."""

    file: str
    line: int
    field: str = ""
    """The `ServerArgs` field it sets; empty where it only exists on the command line."""
    choices: list[str] = []
    deprecated: bool = False
    instead: str = ""
    """What a deprecated flag's own text says to use."""


class ServerFlags(BaseModel):
    """What the server can be started with."""

    flags: dict[str, ServerFlag] = {}
    """By spelling (`--tp-size`), aliases included."""
    fields: list[str] = []
    """Names of `ServerArgs` fields, which `Engine(...)` takes."""


def read_flags(
    path: str, source: bytes, calculator: Calculator, module_path: str, into: ServerFlags
) -> None:
    """Add the flags that one file declares.

    Args:
        path: the file, for the record.
        source: its content.
        calculator: resolves constants (lists of choices) of the package's modules.
        module_path: the file's path relative to the folder that is imported from.
        into: receives the flags.
    """
    tree = parse(source)
    if tree is None:
        return
    module = module_name(module_path)

    def choices(node: ast.expr | None) -> list[str]:
        scope = calculator.module(module) if node is not None else None
        values = calculator.value(node, scope) if node is not None and scope else None
        return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []

    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for name, flags in _fields(node, path, choices):
                into.fields.append(name)
                into.flags |= flags
        elif isinstance(node, ast.Call) and _method(node) == "add_argument":
            for spelling, flag in _argument(node, path, choices):
                into.flags.setdefault(spelling, flag)


def _method(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def complete(flags: ServerFlags) -> ServerFlags:
    """Name the field of each flag that is only declared by its spelling."""
    flags.fields = sorted(set(flags.fields))
    for spelling, flag in flags.flags.items():
        name = spelling.removeprefix("--").replace("-", "_")
        if not flag.field and name in flags.fields:
            flag.field = name
    return flags


def _fields(
    node: ast.ClassDef, path: str, choices: Callable[[ast.expr | None], list[str]]
) -> Iterator[tuple[str, dict[str, ServerFlag]]]:
    """Yield a class's fields that are server arguments, with the flags of each."""
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        name, note = item.target.id, item.annotation
        marked = isinstance(note, ast.Subscript) and dotted(note.value) in ("A", "Annotated")
        if not marked:
            if node.name == "ServerArgs" and not name.startswith("_"):
                yield name, {}
            continue
        assert isinstance(note, ast.Subscript)  # noqa: S101 - `marked` says so
        parts = note.slice.elts if isinstance(note.slice, ast.Tuple) else [note.slice]
        yield name, _annotated(name, item.lineno, parts, path, choices)


def _annotated(
    name: str,
    line: int,
    parts: list[ast.expr],
    path: str,
    choices: Callable[[ast.expr | None], list[str]],
) -> dict[str, ServerFlag]:
    """Return the flags of `name: A[type, "help" or Arg(...)]`, by spelling."""
    metadata = next(
        (p for p in parts[1:] if isinstance(p, ast.Call) and dotted(p.func) == "Arg"), None
    )
    text = any(isinstance(p, ast.Constant | ast.JoinedStr | ast.BinOp) for p in parts[1:])
    if metadata is None and not text:
        return {}
    given = {k.arg: k.value for k in metadata.keywords} if metadata else {}
    no_cli = given.get("no_cli")
    if isinstance(no_cli, ast.Constant) and no_cli.value:
        return {}
    spelled = given.get("cli_name")
    first = spelled.value if isinstance(spelled, ast.Constant) and spelled.value else None
    spellings = [str(first or f"--{name.replace('_', '-')}"), *choices(given.get("aliases"))]
    values = choices(given.get("choices")) or _literals(parts[0])
    flag = ServerFlag(file=path, line=line, field=name, choices=values)
    return dict.fromkeys(spellings, flag)


def _literals(note: ast.expr) -> list[str]:
    """Return the texts of a `Literal[...]` in a type."""
    for node in ast.walk(note):
        if isinstance(node, ast.Subscript) and dotted(node.value) in ("Literal", "typing.Literal"):
            items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return [
                i.value for i in items if isinstance(i, ast.Constant) and isinstance(i.value, str)
            ]
    return []


def _argument(
    call: ast.Call, path: str, choices: Callable[[ast.expr | None], list[str]]
) -> Iterator[tuple[str, ServerFlag]]:
    """Yield the spellings that a literal `add_argument` declares."""
    given = {k.arg: k.value for k in call.keywords if k.arg}
    action = dotted(given["action"]) if "action" in given else None
    texts = {n: v.value for n, v in given.items() if isinstance(v, ast.Constant)}
    for argument in call.args:
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("--"):
            yield (
                str(argument.value),
                ServerFlag(
                    file=path,
                    line=call.lineno,
                    field=str(texts.get("dest") or ""),
                    choices=choices(given.get("choices")),
                    deprecated=(action or "").rpartition(".")[2].startswith("Deprecated"),
                    instead=str(texts.get("new_flag") or ""),
                ),
            )
