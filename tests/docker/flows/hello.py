"""A flow for containers: it says that it is there, and stays until it is let go."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from prefect import flow


@flow(name="hello", log_prints=True)
def hello(folder: str) -> None:
    """Write what can be seen from inside; end when there is a file `go`."""
    seen = {"uid": os.getuid(), "environment": dict(os.environ)}
    (Path(folder) / "seen.tmp").write_text(json.dumps(seen))
    (Path(folder) / "seen.tmp").rename(Path(folder) / "seen.json")
    print("hello from a container")
    while not (Path(folder) / "go").exists():
        time.sleep(0.1)
