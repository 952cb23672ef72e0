"""Run a child process that may misbehave: a deadline, limits, and none of our secrets."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PASSED_ON = (
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PYTHONDONTWRITEBYTECODE",
)
_ROOT = Path(__file__).resolve().parent.parent
_TAIL = 2000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    ok: bool
    reason: str
    """Why it failed, with its last lines; empty if it did not."""
    output: str = ""
    """All that it printed."""


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_python(
    arguments: Sequence[str],
    *,
    timeout: float,
    memory_gb: float | None,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run `python ARGUMENTS` in its own process group, without a shell.

    Args:
        arguments: what follows `python`.
        timeout: seconds until the whole group is killed.
        memory_gb: address space each process of it may have; None for one that uses a GPU, whose
            driver reserves terabytes of it.
        cwd: its working folder.
        environment: variables it gets besides, or instead of, those that every child gets.
    """

    def limit() -> None:
        die_with_parent()
        if memory_gb is not None:
            size = int(memory_gb * (1 << 30))
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    passed = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
    passed |= {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(_ROOT),
        "PYTHONUNBUFFERED": "1",
        # Torch's large tensors in huge pages: half of the time went into page faults.
        "THP_MEM_ALLOC_ENABLE": "1",
        "TMPDIR": str(cwd),  # whoever cleans that up cleans up after a killed child too
        **(environment or {}),
    }
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=passed,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=limit,  # noqa: PLW1509  only system calls between fork and exec
    ) as child:
        try:
            output, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
            reason = f"did not finish in {timeout:.0f} s{_tail(output)}"
            return Outcome(False, reason, output.decode(errors="replace"))
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    said = output.decode(errors="replace")
    if child.returncode:
        how = f"exit status {child.returncode}"
        if child.returncode < 0:
            how = f"killed by {signal.Signals(-child.returncode).name}"
        return Outcome(False, f"{how}{_tail(output)}", said)
    return Outcome(True, "", said)


def _tail(output: bytes) -> str:
    text = output[-_TAIL:].decode(errors="replace").strip()
    return f": {' | '.join(text.splitlines()[-3:])}" if text else ""
