"""What can be made to go wrong.

* `oom_until_tokens=N`: out of GPU memory at the start unless `--max-total-tokens` is at most N;
* `no_room`: no memory is left for the KV cache;
* `bad_flag`: the command line refuses an argument;
* `hang_start`: the server is never ready;
* `crash_after=N`: the scheduler is killed when it has served N requests;
* `hold_after=N`: nothing is answered after N requests, until the file `FAKE_SGLANG_ONCE` is there;
* `fail_requests=SHARE`: this share of requests fails;
* `no_flashinfer`: SGLang takes its Triton backends, and FlashInfer is never called;
* `warm_up`: kernels are called before the server is ready, for a request of 7 tokens of nobody's;
* `orphan`: a process is started that outlives its session: one of its own, deaf to SIGTERM.
"""

import os
from pathlib import Path


def fault(name: str) -> str | None:
    """Return a fault's value (empty if it has none), or None if it is not asked for."""
    once = os.environ.get("FAKE_SGLANG_ONCE")
    if once and Path(once).exists():
        return None
    asked = dict(
        item.partition("=")[::2]
        for item in os.environ.get("FAKE_SGLANG_FAULT", "").split(",")
        if item
    )
    return asked.get(name)


def happened() -> None:
    """Note that a fault took place."""
    if once := os.environ.get("FAKE_SGLANG_ONCE"):
        Path(once).touch()
