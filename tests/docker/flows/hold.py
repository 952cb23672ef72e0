"""A flow for containers: it leases the host's only GPU as a session does, until it is let go."""

from __future__ import annotations

import time
from pathlib import Path

from prefect import flow

from tasks.collect.lease import lease
from tasks.settings import load_settings


@flow(name="hold", log_prints=True)
def hold(folder: Path) -> None:
    """Make a file `held` once there is a GPU; end when there is a file `go`."""
    locks = load_settings(folder).collect.lease_dir
    with lease(locks, ("0",), 1, on_wait=print, session=folder.name):
        (folder / "held").touch()
        while not (folder / "go").exists():
            time.sleep(0.1)
