"""Check a definition, and its reference test; nothing of them is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from tasks import ops
from tasks.define.check import check_definition
from tasks.errors import DefinitionError
from tasks.ops.base import FlashInferApi
from tasks.validate import source
from tasks.validate.findings import Findings
from tasks.validate.listing import Place, printable_path

Json = dict[str, Any]
_FUNCTIONS = frozenset({"abs", "all", "any", "int", "len", "max", "min", "sum"})
_GROUPS = ("axes", "inputs", "outputs")


def _misformed(definition: Json) -> Iterator[tuple[str, str]]:
    """Yield the fields, with what they should be, whose JSON type is wrong."""
    for key in ("name", "op_type", "reference"):
        if not isinstance(definition.get(key), str):
            yield key, "a string"
    for key in ("tags", "constraints"):
        value = definition.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            yield key, "a list of strings"
    for group in _GROUPS:
        value = definition.get(group)
        if not isinstance(value, dict):
            yield group, "an object"
            continue
        for name, spec in value.items():
            if not isinstance(spec, dict):
                yield f"{group}.{name}", "an object"
            elif group != "axes" and not _is_shape(spec.get("shape")):
                yield f"{group}.{name}.shape", "a list of axes or null"


def _is_shape(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(axis, str) for axis in value)
    )


def check(definition: Json, place: Place, findings: Findings) -> bool:
    """Check a definition; say whether its form lets the rest of the dataset be checked by it."""
    name, file = place.name, place.path
    wrong = list(_misformed(definition))
    for where, expected in wrong:
        findings.error(name, file, where, f"missing, or not {expected}")
    if wrong:
        return False
    for key, value in (("name", name), ("op_type", place.op_type)):
        if definition[key] != value:
            findings.error(name, file, key, f"{definition[key]!r}, but the path says {value!r}")
    usable = _structure(definition, place, findings)
    _constraints(definition, place, findings)
    _descriptions(definition, place, findings)
    _tags(definition, place, findings)
    return usable


def _structure(definition: Json, place: Place, findings: Findings) -> bool:
    try:
        check_definition(definition)
    except DefinitionError as error:
        where, _, message = str(error).partition(": ")
        findings.error(place.name, place.path, where, message)
        # What else is wrong with these leaves axes, inputs and outputs as they should be.
        return where in ("reference", "constraints") and message != "missing or empty"
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        findings.error(place.name, place.path, "", f"cannot be checked ({error})")
        return False
    tree = source.parsed(definition["reference"])
    if isinstance(tree, str):
        findings.error(place.name, place.path, "reference", tree)
    return True


def _constraints(definition: Json, place: Place, findings: Findings) -> None:
    declared = _FUNCTIONS.union(*(definition[group] for group in _GROUPS))
    for index, constraint in enumerate(definition.get("constraints", [])):
        where = f"constraints.{index}"
        tree = source.parsed(constraint)
        if isinstance(tree, str):  # `_structure` has said so
            continue
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if used - declared:
            unknown = ", ".join(sorted(used - declared))
            findings.error(
                place.name, place.path, where, f"{constraint!r} uses {unknown}, not declared"
            )


def _descriptions(definition: Json, place: Place, findings: Findings) -> None:
    described = {"description": definition}
    for group in _GROUPS:
        described |= {f"{group}.{name}": spec for name, spec in definition[group].items()}
    for where, spec in described.items():
        if not spec.get("description"):
            findings.warn(place.name, place.path, where, "missing description")


def _tags(definition: Json, place: Place, findings: Findings) -> None:
    tags = definition.get("tags", [])
    if sum(tag.startswith("status:") for tag in tags) != 1:
        findings.warn(place.name, place.path, "tags", "should have one status: tag")
    if not any(tag.startswith("fi_api:") for tag in tags) and _has_api(definition):
        findings.warn(place.name, place.path, "tags", "no fi_api: tag")


def _has_api(definition: Json) -> bool:
    """Say whether the kernel may well be a FlashInfer API, as far as op modules know."""
    module = ops.registry().get(definition["op_type"])
    if module is None:
        return True
    try:
        return isinstance(module.provider(module.spec_of(definition)), FlashInferApi)
    except Exception:  # an op module reads a definition that need not be any of its own
        return True


def check_test(text: str, place: Place, findings: Findings) -> None:
    """Check a reference test."""
    tree = source.parsed(text)
    if isinstance(tree, str):
        findings.error(place.name, printable_path(place.path), "", tree)
