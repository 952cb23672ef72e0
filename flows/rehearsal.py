"""A dry run: phases 0 and 1 in a temporary folder, the manifest only in memory."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

from tasks import manifest, settings
from tasks.discover.phase import inventory
from tasks.manifest import RunManifest
from tasks.repos import clone
from tasks.request import OnboardRequest


def rehearse(
    request: OnboardRequest, folder: Path, progress: Callable[[str], None]
) -> tuple[RunManifest, Path]:
    """Return the manifest a run would start from, and where it would be.

    Clones that the workspace has are read as they are; the others are made in `folder`.

    Raises:
        InputError: the config, a remote or the manifest is wrong.
    """
    options = settings.load_settings(request.workspace)
    remotes = options.remotes.model_dump()
    checkouts = {}
    for name in clone.PHASE0:
        checkout = clone.in_hand(name, options.clone(name))
        if checkout is None:
            progress(f"cloning {name} into a temporary folder")
            checkout = clone.update(name, remotes[name], folder / name)
        checkouts[name] = checkout
    shas = {name: checkout.sha for name, checkout in checkouts.items()}
    clones = {name: checkout.path for name, checkout in checkouts.items()}
    found = inventory(request, clones, shas, folder / "cache", options)
    today = dt.datetime.now(tz=dt.UTC).date()
    path = manifest.latest(request.workspace, request.model_name)
    if path:
        run = manifest.load(path)
    else:
        path = request.workspace / manifest.file_name(request.model_name, today)
        run = RunManifest(model_slug=request.model_name, hf_repo_id=request.hf_repo_id, date=today)
    found.record(run, shas, request.hf_repo_id, refresh=request.refresh)
    return run, path
