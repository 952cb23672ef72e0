"""Folders in memory that launches dump into, and those that nobody will empty any more.

Beside each folder lies a note that says whose it is: the session's folder, and the host. Who uses
a folder holds a lock on it, which the kernel gives back however its holder ends.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks import files
from tasks.errors import CollectError, InputError

SHARED = Path("/dev/shm")  # noqa: S108  names there are random, and folders their owner's alone


def folder_in_memory(session: str, number: int, room: int) -> Path | None:
    """Return a new name for a launch's dumps in memory; nothing where that has no room.

    Args:
        session: name of the session's folder.
        number: which launch it is.
        room: bytes that have to be free.
    """
    if not SHARED.is_dir() or shutil.disk_usage(SHARED).free <= room:
        return None
    return SHARED / f"{_ours()}{secrets.token_hex(4)}-{session}-{number}"


@contextmanager
def used(folder: Path, session: Path) -> Iterator[None]:
    """Make a folder, hold it while the block runs, and remove it with all that is in it.

    Args:
        folder: the folder; it must be new.
        session: folder of the session whose it is.

    Raises:
        CollectError: it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise CollectError(f"{folder}: cannot be made ({error.strerror})") from error
    with _lock(folder):
        owner = {"host": socket.gethostname(), "session": str(session.absolute())}
        files.write_json(_note(folder), owner)
        try:
            yield
        finally:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder of dumps, and the note beside it.

    What cannot be removed now, as a server that is being ended still writes, keeps its note: a
    later session tries again.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        _note(folder).unlink(missing_ok=True)


def left() -> list[tuple[Path, Path]]:
    """Return this user's folders in memory that nobody uses, each with its session's folder.

    Those of other hosts (containers may share the memory) and those without a note are left out:
    it is not known here whose they are.
    """
    found = []
    for note in sorted(SHARED.glob(f"{_ours()}*.json")):
        folder, owner = note.with_suffix(""), _owner(note)
        if owner is None:
            continue
        if not _is_own(folder, stat.S_ISDIR):
            note.unlink(missing_ok=True)  # a folder is made before its note, and goes before it
            continue
        with suppress(CollectError), _lock(folder):
            found.append((folder, owner))
    return found


def _ours() -> str:
    return f"onboard-{os.getuid()}-"


def _note(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _owner(note: Path) -> Path | None:
    """Return the session that a note names, if it was written by this user on this host."""
    if not _is_own(note, stat.S_ISREG):
        return None
    try:
        said = files.read_json_object(note, "the note of a folder of dumps")
    except InputError:
        return None
    match said:
        case {"host": host, "session": str(session)} if host == socket.gethostname():
            return Path(session)
    return None


def _is_own(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return kind(status.st_mode) and status.st_uid == os.getuid()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold a folder.

    Raises:
        CollectError: somebody does, or it is gone.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise CollectError(f"{folder}: cannot be opened ({error.strerror})") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CollectError(f"{folder}: another process uses it") from error
        yield
    finally:
        os.close(handle)
