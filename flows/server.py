"""`prefect server start` for a server on SQLite: a thread of its own collects its garbage.

Freeing a cursor takes its connection's lock, which the connection's thread holds while it waits
for the database. Where Python collects garbage in the middle of whatever is being done, that is
often the event loop: it then waits for a connection that waits for a transaction which only the
event loop can end, and nothing moves until SQLite gives up after a minute.

    python -m flows.server OPTION...
"""

from __future__ import annotations

import gc
import runpy
import sys
import threading
import time
from typing import NoReturn

_SECONDS = 5.0


def collect_in_a_thread(seconds: float = _SECONDS) -> None:
    """Collect garbage in a thread of its own, and nowhere else, until the process ends.

    Args:
        seconds: between two collections. What is there now is not looked at again.
    """

    def collect() -> NoReturn:
        while True:
            time.sleep(seconds)
            gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    threading.Thread(target=collect, name="garbage", daemon=True).start()


if __name__ == "__main__":
    import prefect.server.api.server  # noqa: F401  stays

    collect_in_a_thread()
    sys.argv[:] = ["prefect", "server", "start", *sys.argv[1:]]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
