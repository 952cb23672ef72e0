"""GPUs, lent to one process at a time by kernel file locks in a shared directory.

The kernel gives a lock back however its holder ends. Who holds one is written beside it, for those
who wait; that note counts only while the lock is held, so one left by a killed holder is ignored.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from tasks import files
from tasks.errors import CollectError

_POLL = 0.2
_NODE = re.compile(r"nvidia[0-9]+")
_LARGEST_NOTE = 4096


@dataclass(frozen=True)
class Holder:
    """Who holds a GPU."""

    pid: int
    host: str
    session: str
    since: str
    """UTC, to the second."""

    def __str__(self) -> str:
        """Describe it in one phrase."""
        session = f"session {self.session}, " if self.session else ""
        return f"{session}pid {self.pid} on {self.host} since {self.since}"


def visible_gpus(
    configured: Sequence[str] | None = None, *, devices: Path = Path("/dev")
) -> tuple[str, ...]:
    """Return the ids of this machine's GPUs, as `CUDA_VISIBLE_DEVICES` takes them.

    Args:
        configured: the GPUs to use, by number or UUID; else those that `CUDA_VISIBLE_DEVICES` of
            this process names, else all that have a device node. Containers that share a lease
            directory but see different GPUs need UUIDs: each of them counts its own from 0.
        devices: folder of the device nodes.

    Raises:
        CollectError: an id is named twice.
        InputError: an id is not one.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if configured is not None:
        return _ordered(configured, "GPUs")
    if named is not None:
        ids = [part.strip() for part in named.split(",")]
        # CUDA ignores the first invalid id and what follows; "" and "-1" are how to say none.
        until = next((i for i, part in enumerate(ids) if part in {"", "-1", "NoDevFiles"}), None)
        return _ordered(ids[:until], "CUDA_VISIBLE_DEVICES")
    # CUDA counts the GPUs that it sees; a container's only node may well be /dev/nvidia2.
    nodes = [path for path in devices.glob("nvidia*") if _NODE.fullmatch(path.name)]
    return tuple(str(number) for number in range(len(nodes)))


@contextmanager
def lease(
    directory: Path,
    gpus: Sequence[str],
    count: int,
    *,
    on_wait: Callable[[str], None],
    timeout: float | None = None,
    session: str = "",
    pause: Callable[[float], object] = time.sleep,
) -> Iterator[tuple[str, ...]]:
    """Hold `count` of `gpus` while the block runs; it gets their ids.

    It is all or nothing: no GPU is held while waiting for another, so waiters never block each
    other.

    Args:
        directory: shared by all who lease these GPUs, on a file system with `flock`.
        gpus: ids of the GPUs to choose from.
        count: how many; 0 holds none.
        on_wait: told who holds them when waiting begins and whenever that changes.
        timeout: seconds to wait at most; None waits as long as it takes.
        session: shown to others who wait.
        pause: waits some seconds between two attempts; what it raises ends the wait.

    Raises:
        CollectError: there are not that many GPUs, an id is named twice, none was free in time,
            or the directory's locks cannot be tried.
        InputError: an id is not one, or the directory cannot be made or opened.
    """
    names = _ordered(gpus, "GPUs")
    if not 0 <= count <= len(names):
        listed = f" ({', '.join(names)})" if names else ""
        raise CollectError(f"{count} GPUs are asked for and there are {len(names)}{listed}")
    deadline = None if timeout is None else time.monotonic() + timeout
    told = None
    while True:
        with _alone(directory):
            taken, release = _take(directory, names, count, session)
            busy = _held(directory, names) if release is None else {}
        if release is not None:
            break
        waiting = f"waiting for {count} of GPUs {', '.join(names)}: {_described(busy)}"
        if deadline is not None and time.monotonic() >= deadline:
            raise CollectError(f"gave up {waiting} (after {timeout:.0f} s)")
        if busy != told:
            told = busy
            on_wait(waiting)
        pause(_POLL)
    try:
        yield taken
    finally:
        with _alone(directory):
            release.close()


def _take(
    directory: Path, gpus: Sequence[str], count: int, session: str
) -> tuple[tuple[str, ...], ExitStack | None]:
    """Return the GPUs taken and what gives them back, or none and None."""
    taken: list[str] = []
    with ExitStack() as stack:
        for gpu in gpus:
            if len(taken) == count:
                break
            try:
                stack.enter_context(_lock(directory, gpu).acquire(blocking=False))
            except Timeout:
                continue
            taken.append(gpu)
        if len(taken) < count:
            return (), None
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        holder = Holder(os.getpid(), socket.gethostname(), session, now)
        for gpu in taken:
            files.write_json(_note(directory, gpu), asdict(holder))
            stack.callback(_note(directory, gpu).unlink, missing_ok=True)
        return tuple(taken), stack.pop_all()


def _held(directory: Path, gpus: Sequence[str]) -> dict[str, Holder | None]:
    held: dict[str, Holder | None] = {}
    for gpu in gpus:
        try:
            with _lock(directory, gpu).acquire(blocking=False):
                continue
        except Timeout:
            held[gpu] = _read(_note(directory, gpu))
    return held


def _read(note: Path) -> Holder | None:
    try:
        with note.open("rb") as stream:
            value = json.loads(stream.read(_LARGEST_NOTE))
    except (OSError, ValueError, RecursionError):
        return None
    match value:
        case {"pid": int(pid), "host": str(host), "session": str(session), "since": str(since)}:
            return Holder(pid, host, session, since)
    return None


def _described(busy: dict[str, Holder | None]) -> str:
    return "; ".join(
        f"GPU {gpu} is held by {holder or 'a process that left no note'}"
        for gpu, holder in busy.items()
    )


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Try locks while nobody else does: a lock that is only tried never looks held."""
    try:
        if not directory.exists():
            directory.mkdir(parents=True)
            directory.chmod(0o777)  # other users of these GPUs lock here too
        with files.locked(directory):
            yield
    except OSError as error:
        raise CollectError(f"{directory}: GPUs cannot be leased there ({error})") from error


def _lock(directory: Path, gpu: str) -> FileLock:
    # Given back by the thread that ends the block, which need not be the one that began it.
    return FileLock(directory / f"gpu-{gpu}.lock", mode=0o666, thread_local=False)


def _note(directory: Path, gpu: str) -> Path:
    return directory / f"gpu-{gpu}.json"


def _ordered(gpus: Sequence[str], what: str) -> tuple[str, ...]:
    """Return valid ids, numbers first and by value, so that everybody takes them in one order."""
    names = [files.safe_name(gpu, f"{what}, id of a GPU") for gpu in gpus]
    for name in names:
        if names.count(name) > 1:
            raise CollectError(f"{what}: GPU {name} is named twice")
    return tuple(sorted(names, key=lambda name: (not name.isdecimal(), len(name), name)))
