"""Regenerate published definitions from their const axes, and explain every difference."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks import files, ops
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
    CONTRADICTS = "the published name and const axes do not say one kernel of the op type"
    NOT_REGENERATED = "not regenerated: no op module here makes definitions of this op type"
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
    if not (root / "definitions").is_dir():
        raise InputError(f"{root}: has no definitions/ folder; it should be a dataset")
    paths = sorted((root / "definitions").glob("*/*.json"))
    if not paths:
        raise InputError(f"{root}: has no definitions")
    published: dict[Path, Json] = {}
    specs: dict[Path, KernelSpec] = {}
    found: dict[Path, list[Disagreement]] = {path: [] for path in paths}
    for path in paths:
        try:
            published[path] = _read(path)
            specs[path] = ops.op_module(path.parent.name).spec_of(published[path])
        except InputError as error:
            reason = Reason.NOT_REGENERATED if path in published else Reason.NOT_READABLE
            found[path] = [_missing(path, reason, str(error))]
        except DefinitionError as error:
            found[path] = [_missing(path, Reason.CONTRADICTS, str(error))]
    with tempfile.TemporaryDirectory(prefix="onboard-agree-") as folder:
        drafts = Path(folder)
        draft_definitions([Order(spec=s) for s in specs.values()], "agree", drafts, prove=False)
        for path, spec in specs.items():
            siblings = [
                definition
                for other, definition in published.items()
                if other != path and other.parent == path.parent
            ]
            found[path] = _compared(path, spec, drafts, published[path], siblings)
    equal = {
        path: all(Reason(item.reason) in _NOT_STRUCTURAL for item in items)
        for path, items in found.items()
    }
    op_types = sorted({path.parent.name for path in paths})
    counts = {op: [equal[path] for path in paths if path.parent.name == op] for op in op_types}
    return Agreement(
        equal=sum(equal.values()),
        total=len(paths),
        by_op_type={op_type: f"{sum(same)}/{len(same)}" for op_type, same in counts.items()},
        differences=sorted(
            (item for items in found.values() for item in items),
            key=lambda item: (item.definition, item.field),
        ),
    )


def _compared(
    path: Path, spec: KernelSpec, drafts: Path, theirs: Json, siblings: list[Json]
) -> list[Disagreement]:
    """Compare a published definition with the one drafted for its name and axes."""
    try:
        ours = read_draft(drafts, spec.name).definition
    except DefinitionError as error:
        return [_missing(path, Reason.UNEXPLAINED, str(error))]
    provider = ops.op_module(spec.op_type).provider(spec)
    former = provider.former if isinstance(provider, FlashInferApi) else ()
    differ = list(differences(ours, theirs))
    return [
        Disagreement(
            definition=spec.name,
            reason=_reason(difference, differ, former, siblings).value,
            **difference._asdict(),
        )
        for difference in differ
    ]


def _read(path: Path) -> Json:
    """Read a published definition.

    Raises:
        InputError: it is none.
    """
    definition = files.read_json_object(path, "the definition")
    parts: Mapping[str, type] = {"name": str, "axes": dict, "inputs": dict, "outputs": dict}
    for key, kind in {**parts, "reference": str}.items():
        if not isinstance(definition.get(key), kind):
            raise InputError(f"{path}: field {key}: missing or no {kind.__name__}")
    for key in ("constraints", "tags"):
        texts = definition.setdefault(key, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: field {key}: no list of texts")
    for part in ("axes", "inputs", "outputs"):
        for key, value in definition[part].items():
            if not isinstance(value, dict):
                raise InputError(f"{path}: field {part}.{key}: {value!r} is no object")
    for axis, value in definition["axes"].items():
        if value.get("type") == "const" and type(value.get("value")) is not int:
            raise InputError(f"{path}: field axes.{axis}: const value {value.get('value')!r}")
    for key, said in (("name", path.stem), ("op_type", path.parent.name)):
        if definition.get(key) != said:
            raise InputError(f"{path}: field {key}: {definition.get(key)!r}, by its path {said!r}")
    return definition


def _missing(path: Path, reason: Reason, detail: str) -> Disagreement:
    return Disagreement(
        definition=path.stem,
        field="definition",
        ours=None,
        theirs=path.stem,
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
