"""Phase 2's Prefect tasks."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from tasks import manifest, settings
from tasks.define.phase import draft_all, stage_and_record
from tasks.manifest import NEEDS_REFERENCE
from tasks.step import step


@step(
    2,
    "draft-definitions",
    "Harvest FlashInfer's trace templates on meta tensors and prove every reference, in one child.",
    once=False,
)
def draft(path: Path, names: list[str]) -> None:
    """Draft the definitions of several kernels; what failed is reported when they are staged."""
    run = manifest.load(path)
    drafts = settings.load_settings(path.parent).drafts(path.stem)
    results = draft_all([run.kernel(name) for name in names], run.model_slug, drafts)
    proved = sum(result.draft is not None for result in results)
    get_run_logger().info("drafted %d of %d definitions", proved, len(names))


@step(2, "define", "Stage the kernel's definition and its reference test in the dataset clone.")
def define(path: Path, name: str) -> str:
    """Stage one definition and record phase 2; return how it was made, or `needs_reference`.

    Raises:
        DefinitionError: the kernel could not be drafted.
    """
    options = settings.load_settings(path.parent)
    drafts = options.drafts(path.stem)
    made = stage_and_record(path, name, drafts, options.clone("flashinfer_trace"))
    what = "needs a reference" if made == NEEDS_REFERENCE else f"defined by {made}"
    get_run_logger().info("%s %s", name, what)
    return made
