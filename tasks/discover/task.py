"""Phase 1's Prefect task."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from prefect import get_run_logger

from tasks import manifest, settings
from tasks.discover.phase import inventory
from tasks.manifest import RepoShas, RunManifest
from tasks.request import OnboardRequest
from tasks.step import step


@step(
    1,
    "discover-kernels",
    "Compute the kernels the model needs, classify them, merge them into the manifest.",
)
def discover_kernels(
    request: OnboardRequest, shas: dict[str, str], path: Path, today: dt.date
) -> bool:
    """Run phase 1 and record it; return whether anything differs from what was recorded.

    The manifest is created once there is something to record.

    Raises:
        InputError: the config, a clone or the manifest is wrong.
    """
    log = get_run_logger()
    options = settings.load_settings(request.workspace)
    clones = {name: options.clone(name) for name in shas}
    cache = request.workspace / ".cache"
    found = inventory(request, clones, shas, cache, options)
    empty = RunManifest(model_slug=request.model_name, hf_repo_id=request.hf_repo_id, date=today)
    manifest.create(path, empty)
    known = manifest.load(path).phase1_fingerprint
    if known == found.fingerprint and not request.refresh:
        manifest.update(path, lambda run: setattr(run, "repo_shas", RepoShas(**shas)))
        log.info("phase 1: unchanged, %d kernels", len(found.kernels))
        return False
    manifest.update(
        path,
        lambda run: found.record(run, shas, request.hf_repo_id, refresh=request.refresh),
    )
    log.info("phase 1: %d kernels for %s", len(found.kernels), request.model_name)
    return True
