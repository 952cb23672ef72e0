"""Phase 0's Prefect task."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from tasks.repos import clone
from tasks.step import step


@step(
    0,
    "update-repo",
    "Clone a source repository, or bring its clone to the remote's newest commit.",
    run_name="update-repo-{name}",
    once=False,
)
def update_repo(name: str, url: str, path: Path) -> str:
    """Update one clone and return its short SHA.

    Raises:
        RemoteError: the remote cannot be reached and there is no clone.
    """
    log = get_run_logger()
    checkout = clone.update(name, url, path)
    if checkout.warning:
        log.warning(checkout.warning)
    log.info("%s %s %s", name, "moved to" if checkout.moved else "is at", checkout.sha)
    return checkout.sha
