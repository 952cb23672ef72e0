"""Phase 0 of every flow: the source repositories, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prefect.futures import wait

from tasks import settings
from tasks.repos.clone import PHASE0
from tasks.repos.task import update_repo


def update_all(workspace: Path, more: Iterable[str] = ()) -> dict[str, str]:
    """Clone or update the sources; return their commits.

    Args:
        workspace: folder of the clones.
        more: names of repositories besides those of phase 0.
    """
    options = settings.load_settings(workspace)
    remotes = options.remotes.model_dump()
    futures = {
        name: update_repo.submit(name, remotes[name], options.clone(name))
        for name in (*PHASE0, *more)
    }
    wait(list(futures.values()))
    return {name: future.result() for name, future in futures.items()}
