"""Phase 3 of one kernel, from recorded calls to rows, blobs, baseline and provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tasks import files
from tasks.collect.baseline import write_baseline
from tasks.collect.dumps import CallLog
from tasks.collect.realism import plot
from tasks.collect.sanitize import Collected, sanitize
from tasks.collect.session import Session
from tasks.collect.write import write_workloads
from tasks.dataset import DefinitionFiles
from tasks.manifest import KernelEntry
from tasks.ops.base import KernelSpec


def plot_beside(provenance: Path) -> Path:
    """Return the file of the plot that belongs to a provenance file."""
    return provenance.with_suffix(".png")


def collect_calls(
    entry: KernelEntry,
    log: CallLog,
    dataset: Path,
    provenance: Path,
    max_workloads: int,
    *,
    sessions: Sequence[Session] = (),
) -> Collected:
    """Collect one definition's workloads from calls, wherever they come from.

    Args:
        entry: the kernel; its definition is staged.
        log: the calls.
        dataset: the dataset clone.
        provenance: file for what the rows were made of; a plot goes beside it.
        max_workloads: how many rows to keep at most.
        sessions: what was served while the calls were dumped.

    Raises:
        CollectError: no call is a workload of this definition.
    """
    spec = KernelSpec.model_validate(entry.spec)
    place = DefinitionFiles(entry.op_type, entry.definition_name)
    definition = files.read_json_object(dataset / place.definition, "the definition")
    chosen, collected = sanitize(spec, definition, log, max_workloads, sessions=sessions)
    # Traces may be of another baseline.
    (dataset / place.traces).unlink(missing_ok=True)
    write_baseline(dataset, spec)
    written = write_workloads(dataset, definition, chosen)
    collected = collected.named(written.uuids)
    files.write_bytes(plot_beside(provenance), plot([collected.realism]))
    files.write_json(provenance, {**asdict(collected), "table": collected.realism.markdown()})
    return collected
