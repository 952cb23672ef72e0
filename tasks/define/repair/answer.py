"""A trace template's answer, read strictly, and what becomes of it."""

from __future__ import annotations

import ast
import keyword
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tasks.define.repair.syntax import Function, fail, parse_source, returned_count

Json = dict[str, Any]
T = TypeVar("T")


@dataclass
class Draft:
    """A template's answer while rules change it."""

    name: str
    op_type: str
    description: str
    tags: list[str]
    axes: Json
    constraints: list[str]
    inputs: Json
    outputs: Json
    source: str
    functions: dict[str, Function] = field(default_factory=dict)
    """The reference's top-level functions; the last is the one meant."""
    passed: dict[str, str] = field(default_factory=dict)
    """The reference's parameters -> an input, or Python; the others keep their defaults."""
    raw_inputs: dict[str, str] = field(default_factory=dict)
    """Inputs stored as another dtype of the same bytes -> the one the reference gets."""
    paged: list[str] = field(default_factory=list)
    """Inputs the reference gets with pages of one."""
    copied: list[str] = field(default_factory=list)
    """Parameters of which the reference gets copies."""
    first: list[str] = field(default_factory=list)
    """Statements of `run` before the call."""
    picked: list[int] | None = None
    """Which of the returned values are outputs, in order; all of them if not set."""
    raw_outputs: dict[str, str] = field(default_factory=dict)
    """Outputs stored as another dtype of the same bytes -> that dtype."""
    doubts: list[str] = field(default_factory=list)
    """What makes the definition wrong although it holds together."""

    @property
    def target(self) -> Function:
        """The reference itself."""
        return next(reversed(self.functions.values()))

    @property
    def returned(self) -> int | None:
        """How many values the reference returns, where that is clear."""
        return returned_count(self.functions, self.target.name)


@dataclass(frozen=True)
class Repaired:
    """A repaired definition."""

    definition: Json
    applied: tuple[str, ...]
    """The rules that changed something."""
    doubts: tuple[str, ...] = ()
    """Why it may not be used although it holds together."""


def _of(kind: type[T], value: Any, what: str) -> T:
    if not isinstance(value, kind):
        raise fail("form", f"{what} is {type(value).__name__}, expected {kind.__name__}")
    return value


def texts(value: Any, what: str) -> list[str]:
    """Return a list of strings.

    Raises:
        DefinitionError: it is none.
    """
    if not isinstance(value, list | tuple):
        raise fail("form", f"{what} is {type(value).__name__}, expected list")
    return [_of(str, item, f"an item of {what}") for item in value]


def _tensors(template: Json, part: str) -> Json:
    found = {}
    for name, read in _of(dict, template.get(part), part).items():
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise fail("form", f"{part}: {str(name)[:80]!r} is not an identifier")
        given = _of(dict, read, f"{part}.{name}")
        spec: Json = {"shape": None, "dtype": _of(str, given.get("dtype"), f"{part}.{name}.dtype")}
        if given.get("shape") is not None:
            spec["shape"] = texts(given["shape"], f"{part}.{name}.shape")
            if not all(re.fullmatch(r"[A-Za-z_]\w*|[0-9]{1,9}", axis) for axis in spec["shape"]):
                raise fail("form", f"{part}.{name}.shape: not all names or numbers")
        for key in ("description", "param"):
            if given.get(key):
                spec[key] = _of(str, given[key], f"{part}.{name}.{key}")
        if given.get("optional"):
            spec["optional"] = True
        found[name] = spec
    if not found:
        raise fail("form", f"{part}: there are none")
    return found


def _axes(template: Json) -> Json:
    found = {}
    for name, read in _of(dict, template.get("axes"), "axes").items():
        given = _of(dict, read, f"axes.{name}")
        axis: Json = {"type": _of(str, given.get("type"), f"axes.{name}.type")}
        if given.get("value") is not None:
            axis["value"] = _of(int, given["value"], f"axes.{name}.value")
        if given.get("description"):
            axis["description"] = _of(str, given["description"], f"axes.{name}.description")
        found[str(name)] = axis
    return found


def read_answer(template: Any) -> Draft:
    """Read a template's answer.

    Raises:
        DefinitionError: it is not of the expected form, or has no reference.
    """
    template = _of(dict, template, "the answer")
    source = _of(str, template.get("reference") or "", "reference")
    if not source.strip():
        raise fail("reference", "the template has none")
    top = [node for node in parse_source(source).body if isinstance(node, ast.FunctionDef)]
    functions = {node.name: node for node in top}
    if not functions:
        raise fail("reference", "it has no function")
    if len(functions) != len(top):
        raise fail("reference", "it has two functions of one name")
    return Draft(
        name=_of(str, template.get("name", ""), "name"),
        op_type=_of(str, template.get("op_type", ""), "op_type"),
        description=_of(str, template.get("description") or "", "description"),
        tags=texts(template.get("tags") or [], "tags"),
        axes=_axes(template),
        constraints=texts(template.get("constraints") or [], "constraints"),
        inputs=_tensors(template, "inputs"),
        outputs=_tensors(template, "outputs"),
        source=source,
        functions=functions,
    )
