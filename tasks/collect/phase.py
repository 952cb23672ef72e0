"""Phase 3 of one kernel, from recorded dumps to rows, blobs, baseline and provenance."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tasks import files
from tasks.collect.baseline import write_baseline
from tasks.collect.dumps import read_calls
from tasks.collect.sanitize import Collected, sanitize, write_workloads
from tasks.dataset import DefinitionFiles
from tasks.errors import CollectError
from tasks.manifest import KernelEntry
from tasks.ops.base import KernelSpec


def collect_recorded(
    entry: KernelEntry, dumps: Path | None, dataset: Path, provenance: Path, max_workloads: int
) -> Collected:
    """Collect one definition's workloads from a folder of recorded dumps.

    Args:
        entry: the kernel; its definition is staged.
        dumps: the folder.
        dataset: the dataset clone.
        provenance: file for what the rows were made of.
        max_workloads: how many rows to keep at most.

    Raises:
        CollectError: there is no folder, or no call in it is a workload of this definition.
    """
    name = entry.definition_name
    if dumps is None:
        raise CollectError(
            f"{name}: no dumps to collect from; record a run on a GPU and give its folder with "
            "--dumps, or go on without workloads with --skip-workload"
        )
    spec = KernelSpec.model_validate(entry.spec)
    place = DefinitionFiles(entry.op_type, name)
    definition = files.read_json_object(dataset / place.definition, "the definition")
    chosen, collected = sanitize(spec, definition, read_calls(dumps), max_workloads)
    files.write_json(provenance, asdict(collected))
    write_baseline(dataset, spec)
    write_workloads(dataset, definition, chosen)
    # Traces are of other rows or another baseline.
    (dataset / place.traces).unlink(missing_ok=True)
    return collected
