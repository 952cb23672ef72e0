"""Regenerate published definitions from their const axes, and explain every difference."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks import dataset, files, ops
from tasks.dataset import DefinitionFiles
from tasks.define.compare import Difference, differences
from tasks.define.draft import Order, draft_definitions, read_draft
from tasks.errors import DefinitionError, InputError
from tasks.ops.base import FlashInferApi, KernelSpec

Json = dict[str, Any]


class Reason(Enum):
    """Why a regenerated definition differs from the published one; there are no others."""

    LAST_PAGE = (
        "ours is right: FlashInfer's plan takes one kv_last_page_len per sequence (batch_size), "
        "the published shape has one too many, unlike its siblings"
    )
    UNSTATED = (
        "the dataset is inconsistent: the published definition leaves out constraints that its "
        "siblings state"
    )
    FORMER_API = (
        "ours is right: the published fi_api tag names a module or function that FlashInfer no "
        "longer has, or that nobody calls in this layout"
    )
    ALIAS = "the dataset is inconsistent: the same API by another public path than its siblings'"
    NO_API = "the dataset is inconsistent: the published definition has no fi_api tag"
    NOT_READABLE = "the published file is no definition"
    NOT_REGENERATED = "not regenerated: no op module here makes definitions of this name"
    UNEXPLAINED = "unexplained: one of the two is wrong"


_NOT_STRUCTURAL = frozenset({Reason.UNSTATED, Reason.FORMER_API, Reason.ALIAS, Reason.NO_API})
"""Reasons for differences outside axes, inputs and outputs that contradict nothing."""


class Disagreement(BaseModel):
    """One field in which a regenerated definition differs from the published one."""

    definition: str
    field: str
    ours: Any
    theirs: Any
    reason: str
    detail: str = ""


class Agreement(BaseModel):
    """How far the regenerated definitions equal the published ones."""

    equal: int
    """Definitions whose axes, inputs and outputs are the same and whose constraints agree."""
    total: int
    by_op_type: dict[str, str]
    """`equal/total` of each op type."""
    differences: list[Disagreement]


def agree(root: Path) -> Agreement:
    """Regenerate every definition of a dataset from its own name and const axes.

    Raises:
        InputError: `root` is no dataset.
    """
    published: dict[str, Json] = {}
    specs: dict[str, KernelSpec] = {}
    found: list[Disagreement] = []
    op_types = dataset.published_definitions(root)
    if not op_types:
        raise InputError(f"{root}: has no definitions")
    for name, op_type in sorted(op_types.items(), key=lambda item: (item[1], item[0])):
        try:
            published[name] = _read(root, op_type, name)
            specs[name] = ops.op_module(op_type).spec_of(published[name])
        except (InputError, DefinitionError) as error:
            reason = Reason.NOT_REGENERATED if name in published else Reason.NOT_READABLE
            found.append(_missing(name, reason, str(error)))
    with tempfile.TemporaryDirectory(prefix="onboard-agree-") as folder:
        drafts = Path(folder)
        draft_definitions([Order(spec=s) for s in specs.values()], "agree", drafts, prove=False)
        for name, spec in specs.items():
            try:
                ours = read_draft(drafts, name).definition
            except DefinitionError as error:
                found.append(_missing(name, Reason.UNEXPLAINED, str(error)))
                continue
            provider = ops.op_module(spec.op_type).provider(spec)
            former = provider.former if isinstance(provider, FlashInferApi) else ()
            differ = list(differences(ours, published[name]))
            siblings = [
                definition
                for other, definition in published.items()
                if other != name and op_types[other] == spec.op_type
            ]
            found += [
                Disagreement(
                    definition=name,
                    reason=_reason(difference, differ, former, siblings).value,
                    **difference._asdict(),
                )
                for difference in differ
            ]
    unequal = {item.definition for item in found if Reason(item.reason) not in _NOT_STRUCTURAL}
    counts = {
        op_type: [name not in unequal for name, other in op_types.items() if other == op_type]
        for op_type in sorted(set(op_types.values()))
    }
    return Agreement(
        equal=len(op_types) - len(unequal),
        total=len(op_types),
        by_op_type={op_type: f"{sum(same)}/{len(same)}" for op_type, same in counts.items()},
        differences=sorted(found, key=lambda item: (item.definition, item.field)),
    )


def _read(root: Path, op_type: str, name: str) -> Json:
    """Read a published definition.

    Raises:
        InputError: it is none.
    """
    path = root / DefinitionFiles(op_type, name).definition
    definition = files.read_json_object(path, "the definition")
    parts: Mapping[str, type] = {"name": str, "axes": dict, "inputs": dict, "outputs": dict}
    for key, kind in {**parts, "reference": str, "tags": list}.items():
        if not isinstance(definition.get(key), kind):
            raise InputError(f"{path}: field {key}: missing or no {kind.__name__}")
    for part in ("axes", "inputs", "outputs"):
        for key, value in definition[part].items():
            if not isinstance(value, dict):
                raise InputError(f"{path}: field {part}.{key}: {value!r} is no object")
    for axis, value in definition["axes"].items():
        if value.get("type") == "const" and type(value.get("value")) is not int:
            raise InputError(f"{path}: field axes.{axis}: const value {value.get('value')!r}")
    if definition["name"] != name:
        raise InputError(f"{path}: field name: {definition['name']!r} is not the file's")
    return definition


def _missing(name: str, reason: Reason, detail: str) -> Disagreement:
    return Disagreement(
        definition=name,
        field="definition",
        ours=None,
        theirs=name,
        reason=reason.value,
        detail=detail,
    )


_TOO_LONG = Difference("inputs.kv_last_page_len.shape", ["batch_size"], ["len_indptr"])
_ITS_AXIS = Difference("axes.batch_size", "var", None)
"""In a prefill over pages, only the length of kv_last_page_len uses the axis."""


def _reason(
    difference: Difference,
    beside: list[Difference],
    former: tuple[str, ...],
    siblings: list[Json],
) -> Reason:
    """Return why two definitions differ in a field.

    Args:
        difference: the field.
        beside: all their differences.
        former: paths that our API had, or that the dataset has for it.
        siblings: the other published definitions of the op type.
    """
    field, ours, theirs = difference
    if difference in (_TOO_LONG, _ITS_AXIS) and _TOO_LONG in beside:
        return Reason.LAST_PAGE
    if field == "constraints" and set(theirs) < set(ours):
        stated = {text for sibling in siblings for text in sibling.get("constraints") or ()}
        if set(ours) - set(theirs) <= stated:
            return Reason.UNSTATED
    if field == "tags.fi_api":
        if theirs is None:
            return Reason.NO_API
        if theirs.removeprefix("fi_api:") in former:
            return Reason.FORMER_API
        usual = any(ours in sibling["tags"] for sibling in siblings)
        if usual and _is_alias(ours.removeprefix("fi_api:"), theirs.removeprefix("fi_api:")):
            return Reason.ALIAS
    return Reason.UNEXPLAINED


def _is_alias(ours: str, theirs: str) -> bool:
    """Whether a path is another's name one package up, where FlashInfer re-exports it."""
    (*module, name), (*above, same) = ours.split("."), theirs.split(".")
    return name == same and above == module[:-1]
