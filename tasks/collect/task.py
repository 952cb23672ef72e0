"""Phase 3's Prefect task."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from tasks import manifest
from tasks.collect.evaluate import evaluate
from tasks.collect.phase import collect_recorded
from tasks.manifest import DONE
from tasks.step import step


@step(
    3, "collect", "Turn dumped FlashInfer calls into workload rows, and evaluate the baseline."
)
def collect(
    path: Path, name: str, dumps: Path | None, dataset: Path, provenance: Path, max_workloads: int
) -> int:
    """Collect one definition's workloads and record phase 3 as done; return how many.

    Raises:
        CollectError: there is nothing to collect from, or a workload fails its baseline.
    """
    log = get_run_logger()
    entry = manifest.load(path).kernel(name)
    collected = collect_recorded(entry, dumps, dataset, provenance, max_workloads)
    log.info(
        "%s: %d workloads of %d distinct in %d calls, %d calls not used",
        *(name, collected.rows, collected.distinct, collected.calls),
        sum(collected.rejected.values()),
    )
    outcome = evaluate(dataset, entry.op_type, name)
    log.info("%s: baseline %s", name, outcome)
    manifest.update_kernel(
        path,
        name,
        phase3_status=DONE,
        workload_entries=collected.rows,
        baseline_status=outcome,
    )
    return collected.rows
