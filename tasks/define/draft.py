"""Draft definitions in a child process, and stage one of them in the dataset clone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import files, ops, sandbox
from tasks.dataset import DefinitionFiles
from tasks.errors import DefinitionError, OnboardError, first_problem
from tasks.manifest import KernelEntry
from tasks.ops.base import KernelSpec

_SECONDS_IN_ALL, _SECONDS_EACH = 120, 60
_CALLS = 3
"""How many calls of its reference, at their longest, a kernel has the time for."""
_MEMORY_GB = 64
"""Address space, not resident memory: torch maps far more than it touches."""


class NeedsReferenceError(OnboardError):
    """Nobody has written a reference for the kernel."""

    exit_code = 3


class Order(BaseModel):
    """One definition to draft."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spec: KernelSpec
    has_template: bool = True
    """Whether FlashInfer has a trace template for the kernel's API."""
    supplied: str | None = None
    """A Python file with the reference that the op module lacks (`define/supplied.py`)."""


class Draft(BaseModel):
    """A definition that was drafted and proved."""

    model_config = ConfigDict(extra="forbid")

    definition: dict[str, Any]
    method: str
    """`trace_template`, `op_module` or `supplied`."""
    notes: list[str]
    """Why a trace template was not used."""
    test: str
    """The source of its reference test."""
    proof: list[str]
    """The cases in which the reference agreed with the independent computation."""
    versions: dict[str, str]


def order_of(entry: KernelEntry, supplied: str | None = None) -> Order:
    """Return what to draft for a kernel of a manifest.

    Raises:
        DefinitionError: the manifest does not say what the kernel is.
    """
    name, op_type = entry.definition_name, entry.op_type
    if entry.spec is not None:
        try:
            spec = KernelSpec.model_validate(entry.spec)
        except ValidationError as error:
            field, reason = first_problem(error, "spec")
            raise DefinitionError(f"{name}: field {field}: {reason}") from error
        for field, said, meant in (("name", spec.name, name), ("op_type", spec.op_type, op_type)):
            if said != meant:
                raise DefinitionError(f"{name}: field spec.{field}: {said!r}, expected {meant!r}")
        ops.family(op_type).check_name(spec)
    elif op_type in ops.registry():
        raise DefinitionError(f"{name}: the manifest has no `spec`; run phase 1 again")
    else:
        spec = KernelSpec(name=name, op_type=op_type, variant="", axes={})
    return Order(spec=spec, has_template=entry.fi_trace_template is not False, supplied=supplied)


def _draft_path(drafts: Path, name: str) -> Path:
    return drafts / f"{files.safe_name(name, 'definition name')}.json"


def draft_definitions(
    orders: Sequence[Order],
    model_slug: str,
    drafts: Path,
    *,
    prove: bool = True,
    seconds: float = _SECONDS_EACH,
) -> None:
    """Draft, and prove, all orders in one child process, one file each in `drafts`.

    A kernel that fails gets a file with its `error`; so do those that were not reached when the
    child itself failed, with the child's last lines.

    Args:
        orders: what to draft.
        model_slug: for the definitions' tags.
        drafts: the folder; earlier drafts of these kernels are removed from it.
        prove: whether references are run and compared.
        seconds: what one call of a reference may take.
    """
    for order in orders:
        _draft_path(drafts, order.spec.name).unlink(missing_ok=True)
    request = {
        "model_slug": model_slug,
        "seconds": seconds if prove else None,
        "seconds_per_kernel": _CALLS * seconds,
        "orders": [order.model_dump(mode="json") for order in orders],
    }
    with tempfile.TemporaryDirectory(prefix="onboard-draft-") as folder:
        asked = Path(folder, "request.json")
        files.write_json(asked, request)
        drafts.mkdir(parents=True, exist_ok=True)
        outcome = sandbox.run_python(
            ["-m", "tasks.define.child", str(asked), str(drafts.absolute())],
            timeout=_SECONDS_IN_ALL + _CALLS * seconds * len(orders),
            memory_gb=_MEMORY_GB,
            cwd=Path(folder),
        )
    for order in orders:
        if not _draft_path(drafts, order.spec.name).exists():
            reason = outcome.reason or "ended without an answer"
            write_failure(drafts, order.spec.name, f"drafting: the child process {reason}")


def write_failure(drafts: Path, name: str, error: str) -> None:
    """Record why a kernel could not be drafted, in place of its draft."""
    files.write_json(_draft_path(drafts, name), {"error": error})


def read_draft(drafts: Path, name: str) -> Draft:
    """Return a drafted definition.

    Raises:
        DefinitionError: it was not drafted, or could not be.
        NeedsReferenceError: it lacks a reference.
    """
    path = _draft_path(drafts, name)
    if not path.exists():
        raise DefinitionError(f"{name}: has no draft at {path}")
    draft = files.read_json_object(path, "the draft")
    if "needs_reference" in draft:
        raise NeedsReferenceError(f"{name}: {draft['needs_reference']}")
    if "error" in draft:
        raise DefinitionError(f"{name}: {draft['error']}")
    return Draft.model_validate(draft)


def stage_definition(name: str, op_type: str, drafts: Path, dataset: Path) -> Draft:
    """Write one drafted definition and its reference test into the dataset, atomically.

    Raises:
        DefinitionError: it was not drafted, or could not be.
        NeedsReferenceError: it lacks a reference.
    """
    draft = read_draft(drafts, name)
    place = DefinitionFiles(op_type, name)
    staged = dataset / place.definition
    with files.locked(dataset):
        files.check_inside(dataset, place.definition.parent, place.reference_test.parent)
        if staged.exists():
            earlier = files.read_json_object(staged, "the staged definition")
            draft.definition = _merged(draft.definition, earlier, staged)
        files.write_text(dataset / place.reference_test, draft.test)
        files.write_json(staged, draft.definition)
    return draft


_OF_MODELS = ("model:", "tp:", "ep:")


def _merged(definition: dict[str, Any], earlier: Mapping[str, Any], staged: Path) -> dict[str, Any]:
    """Return a definition with the models of the same kernel staged for another one.

    Raises:
        DefinitionError: what is staged is no definition.
    """
    tags = earlier.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise DefinitionError(f"{staged}: field tags: no list of texts")
    theirs = [tag for tag in tags if tag.startswith(_OF_MODELS)]
    return {**definition, "tags": list(dict.fromkeys((*definition["tags"], *theirs)))}
