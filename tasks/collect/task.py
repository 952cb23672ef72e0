"""Phase 3's Prefect task."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from tasks import manifest, settings
from tasks.collect.evaluate import evaluate
from tasks.collect.phase import collect_recorded
from tasks.manifest import DONE
from tasks.step import step


@step(3, "collect", "Turn dumped FlashInfer calls into workload rows, and evaluate the baseline.")
def collect(path: Path, name: str, dumps: Path | None) -> int:
    """Collect one definition's workloads and record phase 3 as done; return how many.

    `dumps` is a folder of recorded dumps; without it, the settings' folder for the model.

    Raises:
        CollectError: there is nothing to collect from, or a workload fails its baseline.
    """
    log = get_run_logger()
    run = manifest.load(path)
    entry = run.kernel(name)
    options = settings.load_settings(path.parent)
    recorded = options.collect.recorded_dumps
    if dumps is None and recorded:
        dumps = recorded / run.model_slug
    dataset = options.clone("flashinfer_trace")
    provenance = options.provenance(run.model_slug, name)
    limit = options.collect.max_workloads
    collected = collect_recorded(entry, dumps, dataset, provenance, limit)
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
