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
from tasks.discover.syntax import dotted, parse

DECLARES = re.compile(rb"\bA\[|\bAnnotated\[|\.add_argument\(|^class ServerArgs\b", re.MULTILINE)


class ServerFlag(BaseModel):
    """One command-line flag of the SGLang server."""

    choices: list[str] = []
    """Empty where any value goes, or where they are only known at run time."""
    deprecated: bool = False
    instead: str = ""
    """What a deprecated flag's own text says to use."""


def read_flags(
    source: bytes, calculator: Calculator, module: str, into: dict[str, ServerFlag]
) -> None:
    """Add the flags that one file declares.

    Args:
        source: its content.
        calculator: resolves constants (lists of choices) of the package's modules.
        module: its dotted name.
        into: receives the flags by spelling (`--tp-size`), aliases included.
    """
    tree = parse(source)

    def choices(node: ast.expr | None) -> list[str]:
        scope = calculator.module(module) if node is not None else None
        values = calculator.value(node, scope) if node is not None and scope else None
        texts = [v for v in values if isinstance(v, str)] if isinstance(values, list) else []
        return texts if values == texts else []

    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.ClassDef):
            into |= _fields(node, choices)
        elif isinstance(node, ast.Call) and _method(node) == "add_argument":
            for spelling, flag in _argument(node, choices):
                into.setdefault(spelling, flag)


def _method(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _fields(
    node: ast.ClassDef, choices: Callable[[ast.expr | None], list[str]]
) -> dict[str, ServerFlag]:
    """Return the flags of a class's annotated fields."""
    flags: dict[str, ServerFlag] = {}
    for item in node.body:
        match item:
            case ast.AnnAssign(
                target=ast.Name(id=name),
                annotation=ast.Subscript(value=mark, slice=ast.Tuple() as note),
            ) if dotted(mark) in ("A", "Annotated"):
                flags |= _annotated(name, note.elts, choices)
    return flags


def _annotated(
    name: str, parts: list[ast.expr], choices: Callable[[ast.expr | None], list[str]]
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
    return dict.fromkeys(spellings, ServerFlag(choices=values))


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
    call: ast.Call, choices: Callable[[ast.expr | None], list[str]]
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
                    choices=choices(given.get("choices")),
                    deprecated=(action or "").rpartition(".")[2].startswith("Deprecated"),
                    instead=str(texts.get("new_flag") or ""),
                ),
            )
