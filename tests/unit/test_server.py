"""The garbage of a server on SQLite is collected by a thread of its own."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, threading
from flows.server import collect_in_a_thread

freed = threading.Event()

class Cycle:
    def __init__(self):
        self.itself = self

    def __del__(self):
        global by
        by = threading.current_thread()
        freed.set()

collect_in_a_thread(seconds=0.01)
Cycle()
assert freed.wait(60)
print(by.name, gc.isenabled())
"""


def test_cycles_are_freed_in_another_thread_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True
    )
    assert done.stdout == "garbage False\n"
