"""A reference that somebody supplies for a kernel whose family has none: one Python file.

At its top level it has

- `run`, the reference, with the definition's inputs as its parameters, and whatever it uses;
- `DEFINITION = {...}`, a literal with `description`, `axes`, `inputs`, `outputs` and, if there are
  any, `constraints` and `tags`, where there is no op module that knows them;
- `CASES` and `check`, an independent computation (`OpModule.reference_test` says in which form),
  where the op module has none.

The file is hostile: it is only read here, and this project only ever runs it in the jail. What it
says as `CASES` and `check` is published as a reference test, which whoever reviews it should read
before running it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from tasks import syntax
from tasks.define.repair.syntax import lines_of
from tasks.errors import DefinitionError

Json = dict[str, Any]
_SCHEMA = ("description", "axes", "inputs", "outputs")
_TEST = ("CASES", "check")
_OUR_TAGS = ("status:", "model:", "fi_api:", "tp:", "ep:")
_MAX_CHARACTERS = 200_000


@dataclass(frozen=True)
class Supplied:
    """What such a file says."""

    body: Json
    """The definition without name, op type and tags about the run."""
    family: str
    """The middle of its reference test."""

    @classmethod
    def parse(cls, source: str, own: Json, family: str) -> Supplied:
        """Read a file.

        Args:
            source: its text.
            own: the op module's definition, without a reference; empty if there is no op module.
            family: the op module's `reference_test`, if it has one.

        Raises:
            DefinitionError: something that it must have is missing.
        """
        if len(source) > _MAX_CHARACTERS:
            raise DefinitionError(f"reference: longer than {_MAX_CHARACTERS} characters")
        try:
            tree = syntax.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise DefinitionError(f"reference: not Python ({error})") from error
        top: dict[str, list[ast.stmt]] = {}
        for node in tree.body:
            for name in _names(node):
                top.setdefault(name, []).append(node)
        if "run" not in top:
            raise DefinitionError("reference: the file has no top-level function `run`")
        schema = own or _schema(top.get("DEFINITION", []))
        wanted = [name for name in _TEST if name not in top]
        if not family and wanted:
            raise DefinitionError(
                f"reference: the file has no {' and no '.join(wanted)}: an independent computation "
                "to prove the reference with"
            )
        reference = _without(source, top, ("DEFINITION", *_TEST))
        test = family or _without(source, top, ("DEFINITION", "run", "__future__"))
        return cls({"tags": [], **schema, "reference": reference}, test)


def _names(node: ast.stmt) -> list[str]:
    """Return what a top-level statement defines, or that it is about `__future__`."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return ["__future__"]
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _schema(nodes: list[ast.stmt]) -> Json:
    node = nodes[0] if len(nodes) == 1 else None
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        raise DefinitionError(
            "reference: no op module knows this kernel, and the file has no literal "
            f"DEFINITION = {{...}} with {', '.join(_SCHEMA)}"
        )
    try:
        value = ast.literal_eval(node.value)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise DefinitionError(f"reference: DEFINITION is no literal ({error})") from error
    missing = [key for key in _SCHEMA if not isinstance(value, dict) or not value.get(key)]
    if missing:
        raise DefinitionError(f"reference: DEFINITION has no {', '.join(missing)}")
    tags = value.get("tags", [])
    if not isinstance(tags, list):
        raise DefinitionError(f"reference: DEFINITION.tags is {tags!r}, expected a list")
    ours = [tag for tag in tags if str(tag).startswith(_OUR_TAGS)]
    if ours:
        raise DefinitionError(f"reference: DEFINITION has tags that are not its own: {ours}")
    known = (*_SCHEMA, "constraints", "tags")
    return {key: value[key] for key in known if key in value}


def _without(source: str, top: dict[str, list[ast.stmt]], names: tuple[str, ...]) -> str:
    """Return the source without the statements that define `names`."""
    lines = lines_of(source)
    for node in (node for name in names for node in top.get(name, ())):
        if node.end_lineno is not None:
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
            lines[first - 1 : node.end_lineno] = [b""] * (node.end_lineno - first + 1)
    return b"".join(lines).decode().strip() + "\n"
