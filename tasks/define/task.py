"""Phase 2's Prefect tasks."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from tasks import manifest, settings
from tasks.define.draft import draft_definitions, stage_definition
from tasks.manifest import DONE, Route
from tasks.step import step


@step(
    2,
    "draft-definitions",
    "Call FlashInfer's trace templates on meta tensors, in one child process.",
    once=False,
)
def draft(path: Path, names: list[str]) -> None:
    """Draft the definitions of several kernels; what failed is reported when they are staged."""
    run = manifest.load(path)
    drafts = settings.load_settings(path.parent).drafts(run.model_slug)
    draft_definitions([run.kernel(name) for name in names], run.model_slug, drafts)
    get_run_logger().info("drafted %d definitions", len(names))


@step(2, "define", "Stage the kernel's definition in the dataset clone.")
def define(path: Path, name: str) -> str:
    """Stage one definition and record phase 2 as done; return how the definition was made.

    Raises:
        DefinitionError: the kernel could not be drafted.
    """
    run = manifest.load(path)
    entry = run.kernel(name)
    options = settings.load_settings(path.parent)
    dataset = options.clone("flashinfer_trace")
    made = stage_definition(entry, options.drafts(run.model_slug), dataset)
    fields = {"phase2_status": DONE, "phase2_method": made["method"]}
    if made["notes"]:
        fields["phase2_notes"] = made["notes"]
    if made["versions"]:
        fields["phase2_versions"] = made["versions"]
    if entry.route is Route.REQUEST_KERNEL:
        fields["phase3_status"] = "skipped (fi_missing)"
    elif entry.route is Route.DEFINITION_ONLY:
        fields["phase3_status"] = "skipped (no FlashInfer call)"
    manifest.update_kernel(path, name, **fields)
    get_run_logger().info("%s defined by %s", name, made["method"])
    return str(made["method"])
