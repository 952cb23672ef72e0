"""Run FlashInfer-Bench's command line where it runs references unjailed, to build them.

`python -m tasks.validate.upstream SCRATCH ARGUMENTS`: what runs has no network, and Landlock lets
it write only below SCRATCH and to shared memory, whatever a reference does once it finds itself out
of the jail.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import struct
import sys
from pathlib import Path

from tasks.define import jail
from tasks.errors import OnboardError

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION, _PATH_BENEATH, _NO_NEW_PRIVS = 1, 1, 38
_WRITE_FILE, _REMOVE_FILE, _MAKE_FILE, _TRUNCATE = 1 << 1, 1 << 5, 1 << 8, 1 << 14
_CHANGES = _WRITE_FILE | _TRUNCATE | sum(1 << bit for bit in range(4, 14))
"""Writing, removing, making and moving."""
_ALSO = {
    Path(os.devnull): _WRITE_FILE | _TRUNCATE,
    # FlashInfer-Bench makes a multiprocessing.Lock when it is imported.
    Path("/dev/shm"): _WRITE_FILE | _TRUNCATE | _MAKE_FILE | _REMOVE_FILE,  # noqa: S108
}
_NO_SIGNALS_NOR_ABSTRACT_SOCKETS = 3
_KNOWS_TRUNCATE, _KNOWS_SCOPES = 3, 6


def write_only_below(folder: Path) -> None:
    """Forbid this process and its children, for good, to write outside a folder (and `_ALSO`).

    Raises:
        OnboardError: the kernel cannot do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, 0, _GET_VERSION)
    if version < _KNOWS_TRUNCATE:
        raise OnboardError("FlashInfer-Bench builds references only behind Landlock (Linux 6.2)")
    attributes = struct.pack("<Q", _CHANGES)
    if version >= _KNOWS_SCOPES:
        attributes += struct.pack("<QQ", 0, _NO_SIGNALS_NOR_ABSTRACT_SOCKETS)
    rules = _checked(libc, _CREATE_RULESET, attributes, len(attributes), 0)
    for path, allowed in {folder: _CHANGES, **_ALSO}.items():
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("<Qi", allowed, handle)
        _checked(libc, _ADD_RULE, rules, _PATH_BENEATH, rule, 0)
        os.close(handle)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    _checked(libc, _RESTRICT_SELF, rules, 0)
    os.close(rules)


def _checked(libc: ctypes.CDLL, *call: int | bytes) -> int:
    result: int = libc.syscall(*call)
    if result < 0:
        raise OnboardError(f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result


def main(scratch: Path, arguments: list[str]) -> None:
    """Run `flashinfer_bench ARGUMENTS`."""
    jail.deny_network()
    write_only_below(scratch)
    os.environ |= dict.fromkeys(("HOME", "TMPDIR", "FIB_CACHE_PATH"), str(scratch))
    sys.argv = ["flashinfer_bench", *arguments]
    runpy.run_module("flashinfer_bench", run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
