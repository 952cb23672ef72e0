"""What a model's part of the coverage document should say, by the dataset and the manifest."""

from __future__ import annotations

from pathlib import Path

from tasks import dataset, manifest
from tasks.coverage_doc import CoverageDocument, dataset_statuses, model_slug


def refreshed(
    document: CoverageDocument, name: str, workspace: Path, clone: Path
) -> tuple[CoverageDocument, str]:
    """Return the document with one model's section in line with the dataset, and its heading.

    The section's own rows are looked at, and the kernels of the model's newest run manifest. A
    model that has a manifest and no section gets one.

    Args:
        document: the document as it is; it is not changed.
        name: the model, by slug, heading or repository id.
        workspace: where manifests are looked for.
        clone: the dataset.

    Raises:
        InputError: no section and no manifest is of that model, or more than one section.
    """
    heading = document.model(name)
    slugs = (name, model_slug(name), model_slug(heading or name).replace(" ", "-"))
    found = (manifest.latest(workspace, slug) for slug in slugs)
    path = next((path for path in found if path), None)
    run = manifest.load(path) if path else None
    if heading is None and run and run.hf_repo_id:
        heading = document.model(run.hf_repo_id)
    edited = CoverageDocument.parse(document.render())
    if heading is None and run:
        heading = run.hf_repo_id.rpartition("/")[2] if run.hf_repo_id else name
        edited.add_model(heading, run.architecture or "unknown")
    heading = heading or document.find(name)
    wanted = {row.name: row.op_type for row in edited.rows(heading) if row.is_definition}
    for entry in run.kernels if run else ():
        wanted.setdefault(entry.definition_name, entry.op_type)
    statuses = dataset_statuses(
        wanted, dataset.published_definitions(clone), dataset.collected_definitions(clone)
    )
    edited.refresh(heading, statuses)
    return edited, heading
