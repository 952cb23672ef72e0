"""Phase 2 of some kernels: drafted together in one child process, then staged one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks import manifest, settings
from tasks.dataset import published_definitions
from tasks.define.draft import (
    Draft,
    NeedsReferenceError,
    Order,
    draft_definitions,
    order_of,
    read_draft,
    stage_definition,
    write_failure,
)
from tasks.define.staged import fingerprint
from tasks.errors import DefinitionError, InputError, first_problem
from tasks.files import safe_name
from tasks.manifest import DONE, NEEDS_REFERENCE, KernelEntry, Route, RunManifest


@dataclass(frozen=True)
class Result:
    """What became of one kernel."""

    name: str
    op_type: str
    state: str
    """`defined`, `needs_reference` or `failed`."""
    draft: Draft | None = None
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as `onboard define --json` prints it."""
        told: dict[str, Any] = {
            "definition_name": self.name,
            "op_type": self.op_type,
            "state": self.state,
        }
        if self.draft is not None:
            told |= self.draft.model_dump(mode="json", exclude={"test"})
        if self.error:
            told["error"] = self.error
        return told


def kernels_to_define(run: RunManifest) -> list[KernelEntry]:
    """Return the kernels of a run that are new and not yet defined."""
    return [
        entry
        for entry in run.kernels
        if entry.route is not Route.NOTHING and entry.phase2_status != DONE
    ]


def kernels_of_inventory(
    inventory: dict[str, Any], source: str, dataset: Path
) -> tuple[str, list[KernelEntry]]:
    """Return the model's slug and the new kernels of an `onboard inventory --json`.

    Those that were not compared with a dataset are new if `dataset` does not have them.

    Raises:
        InputError: it is none; the message names the field.
    """
    slug, kernels = inventory.get("model_slug"), inventory.get("kernels")
    if not isinstance(slug, str):
        raise InputError(f"{source}: field model_slug: missing, or no text")
    safe_name(slug, f"{source}: field model_slug")
    if not isinstance(kernels, list):
        raise InputError(f"{source}: field kernels: missing, or no list")
    published = published_definitions(dataset) if (dataset / "definitions").is_dir() else {}
    entries = []
    for index, kernel in enumerate(kernels):
        if not isinstance(kernel, dict) or not isinstance(kernel.get("spec"), dict):
            raise InputError(
                f"{source}: field kernels.{index}.spec: missing; this should be what "
                "`onboard inventory --json` prints"
            )
        status = "existing" if kernel.get("definition_name") in published else "new"
        known = {**kernel, "phase1_status": kernel.get("phase1_status") or status}
        try:
            entry = KernelEntry.model_validate(
                {key: value for key, value in known.items() if key in KernelEntry.model_fields}
            )
        except ValidationError as error:
            field, reason = first_problem(error, "kernels", index)
            raise InputError(f"{source}: field {field}: {reason}") from error
        if entry.route is not Route.NOTHING:
            entries.append(entry)
    return slug, entries


def chosen(entries: Sequence[KernelEntry], names: Iterable[str], where: str) -> list[KernelEntry]:
    """Return the entries of these names; all of them if none is given.

    Raises:
        InputError: a name is not among them.
    """
    wanted = list(dict.fromkeys(names))
    known = {entry.definition_name: entry for entry in entries}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InputError(
            f"--only: {', '.join(unknown)} is not among the {len(known)} kernels to define of "
            f"{where}"
        )
    return [known[name] for name in wanted] if wanted else list(entries)


def draft_all(
    entries: Sequence[KernelEntry],
    model_slug: str,
    drafts: Path,
    supplied: str | None = None,
) -> list[Result]:
    """Draft and prove kernels; nothing but the drafts is written."""
    orders: list[Order] = []
    for entry in entries:
        try:
            orders.append(order_of(entry, supplied))
        except DefinitionError as error:
            write_failure(drafts, entry.definition_name, str(error))
    draft_definitions(orders, model_slug, drafts)
    return [_result(drafts, entry) for entry in entries]


def _result(drafts: Path, entry: KernelEntry) -> Result:
    name, op_type = entry.definition_name, entry.op_type
    try:
        return Result(name, op_type, "defined", read_draft(drafts, name))
    except NeedsReferenceError as error:
        return Result(name, op_type, NEEDS_REFERENCE, error=str(error))
    except DefinitionError as error:
        return Result(name, op_type, "failed", error=str(error))


def stage(result: Result, drafts: Path, dataset: Path, run_manifest: Path | None) -> None:
    """Write what was drafted of a kernel into the dataset and, if there is one, the manifest."""
    if run_manifest is None:
        if result.draft is not None:
            stage_definition(result.name, result.op_type, drafts, dataset)
    elif result.state == "failed":
        manifest.record_error(run_manifest, result.name, result.error)
    else:
        stage_and_record(run_manifest, result.name, drafts, dataset)


def stage_and_record(path: Path, name: str, drafts: Path, dataset: Path) -> str:
    """Stage a drafted definition in the dataset and record phase 2 in the manifest.

    Returns:
        How the definition was made, or `needs_reference`.

    Raises:
        DefinitionError: the kernel could not be drafted.
    """
    entry = manifest.load(path).kernel(name)
    try:
        draft = stage_definition(name, entry.op_type, drafts, dataset)
    except NeedsReferenceError as error:
        fields: dict[str, Any] = {
            "phase2_status": NEEDS_REFERENCE,
            "phase2_notes": [str(error)],
        }
        manifest.update_kernel(path, name, **fields)
        return NEEDS_REFERENCE
    fields = {
        "phase2_status": DONE,
        "phase2_method": draft.method,
        "phase2_notes": draft.notes,
        "phase2_proof": draft.proof,
        "phase2_versions": draft.versions,
        "phase2_fingerprint": fingerprint(draft.definition, draft.test),
    }
    if entry.route is Route.REQUEST_KERNEL:
        fields["phase3_status"] = "skipped (fi_missing)"
    elif entry.route is Route.DEFINITION_ONLY:
        fields["phase3_status"] = "skipped (no FlashInfer call)"
    manifest.update_kernel(path, name, **fields)
    return draft.method


def supply_reference(path: Path, name: str, source: str) -> None:
    """Take a reference that somebody wrote for a kernel of a run: prove it, stage, record.

    Args:
        path: the run manifest.
        name: the kernel's definition name.
        source: the Python file (`define/supplied.py` says what it has).

    Raises:
        DefinitionError: the file lacks something, or its reference does not pass its proof.
    """
    run = manifest.load(path)
    entry = run.kernel(name)
    options = settings.load_settings(path.parent)
    with tempfile.TemporaryDirectory(prefix="onboard-supplied-") as folder:
        drafts = Path(folder)
        draft_definitions([order_of(entry, source)], run.model_slug, drafts)
        stage_and_record(path, name, drafts, options.clone("flashinfer_trace"))
