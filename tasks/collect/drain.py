"""Turn dumps into stored calls while the server that writes them goes on.

Finished calls are stored, then their folders deleted, in this order: a crash in between leaves
folders whose calls are known, which the next drain deletes and does not count again. FlashInfer's
list of all records and its log grow with every call, so they are kept small too.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tasks.collect.dumps import (
    SESSION,
    CapturedError,
    DumpedCall,
    DumpFolder,
    Reader,
    UnfinishedError,
    Unreadable,
    find_flushes,
    find_folders,
)
from tasks.collect.dumps.folders import FOREIGN
from tasks.collect.dumps.tensors import opened
from tasks.collect.store import CallStore
from tasks.errors import CollectError
from tasks.ops.base import DumpError

NOTICES = ("Dump limit reached", "Dump size limit reached", "DUMP ERROR", "Failed to dump")
"""What FlashInfer logs when it does not write a dump."""
_RUBBISH = ".drained"
_BATCH = 256
"""Folders in one transaction."""
_CHUNK = 1 << 20
_LARGE_LOG = 16 << 20
_PUNCH_HOLE, _KEEP_SIZE = 2, 1


@dataclass
class Drained:
    """What one step of a drain came to."""

    calls: int = 0
    """Calls that were not known before."""
    unreadable: Counter[str] = field(default_factory=Counter)
    """Why folders were no calls; of those that were not known before."""
    left: int = 0
    """Folders whose calls are not finished."""
    backlog: int = 0
    """Bytes that lie on disk."""


@dataclass
class _Taken:
    """What a folder comes to: what to store, then what to delete."""

    results: list[DumpedCall | Unreadable] = field(default_factory=list)
    done: list[str] = field(default_factory=list)


class Drain:
    """Drains one folder of dumps into a store."""

    def __init__(
        self,
        dumps: Path,
        store: CallStore,
        *,
        prefix: str,
        bound: int,
        incomplete: bool,
        keep: Path | None = None,
    ) -> None:
        """Make a drain; nothing is read yet.

        Args:
            dumps: FlashInfer's dump folder; it need not be there yet.
            store: where calls go.
            prefix: what goes before the ids and processes of its calls (`session/`), so that those
                of different servers differ.
            bound: bytes that may lie on disk. The caller holds the server back beyond them; calls
                that will never finish are given up then.
            incomplete: whether calls count of which only the inputs were saved (on a host without a
                GPU), as soon as their process has made a later call.
            keep: folder that stored dumps are moved to instead of being deleted.
        """
        self._keep = keep
        self._dumps = dumps
        self._store = store
        self._prefix = prefix
        self._bound = bound
        self._incomplete = incomplete
        self._rubbish = dumps / _RUBBISH
        self._remove_rubbish()

    def step(self) -> Drained:
        """Store the calls that are finished and delete their folders; leave the others.

        Raises:
            CollectError: a folder cannot be deleted, or the store fails.
        """
        drained = self._drain(pressed=False)
        if drained.left and drained.backlog > self._bound:
            more = self._drain(pressed=True)
            more.calls += drained.calls
            more.unreadable += drained.unreadable
            return more
        return drained

    def finish(self) -> Drained:
        """Store or count everything that is left, and delete it; the server has ended.

        Files that are no dumps are counted and stay.

        Raises:
            CollectError: a folder cannot be deleted, or the store fails.
        """
        drained = self._drain(pressed=True, final=True)
        _, other = find_folders(self._dumps) if self._dumps.is_dir() else ([], [])
        results = [Unreadable(self._prefix + item.id, item.reason) for item in other]
        _, unreadable = self._store.add(results)
        self._delete([item.id for item in other if item.reason != FOREIGN])
        drained.unreadable += unreadable
        drained.backlog = self.backlog()
        return drained

    def discard(self) -> int:
        """Delete what was dumped so far without storing it; no call may be running.

        The folders of captured calls stay, as in `step`; what was replayed so far goes.

        Returns:
            How many calls were deleted.

        Raises:
            CollectError: a folder cannot be deleted.
        """
        if not self._dumps.is_dir():
            return 0
        (self._dumps / SESSION).unlink(missing_ok=True)
        reader = Reader(self._dumps, self._prefix, self._store.reads)
        done: list[str] = []
        for folder in find_folders(self._dumps)[0]:
            try:
                reader.read(folder, incomplete=True)
            except CapturedError:
                done += [replay.relative for replay in find_flushes(self._dumps, folder)[0]]
                continue
            except DumpError:
                pass  # it is not wanted, whatever is wrong with it
            done.append(folder.relative)
        self._delete(done)
        return len(done)

    def backlog(self) -> int:
        """Return the bytes that lie on disk, session list and unfinished calls included."""
        return _allocated(str(self._dumps))

    def _drain(self, *, pressed: bool, final: bool = False) -> Drained:
        drained = Drained()
        if not self._dumps.is_dir():
            return drained
        (self._dumps / SESSION).unlink(missing_ok=True)
        folders, _ = find_folders(self._dumps)
        newest = {(folder.parent, folder.pid): folder for folder in folders}
        for batch in _batches(folders):
            results: list[DumpedCall | Unreadable] = []
            done: list[str] = []
            reader = Reader(self._dumps, self._prefix, self._store.reads)
            for folder in batch:
                later = folder < newest[folder.parent, folder.pid]
                over = final or later
                taken = self._take(reader, folder, over=over, pressed=pressed, final=final)
                results += taken.results
                done += taken.done
                drained.left += folder.relative not in taken.done
            calls, unreadable = self._store.add(results)
            self._put_away(done)
            drained.calls += calls
            drained.unreadable += unreadable
        drained.backlog = self.backlog()
        return drained

    def _take(
        self, reader: Reader, folder: DumpFolder, *, over: bool, pressed: bool, final: bool
    ) -> _Taken:
        """Read a folder.

        Args:
            reader: reads it.
            folder: the folder.
            over: whether its process has made a later call, or none will follow.
            pressed: whether to give up a call that is over and did not finish.
            final: whether nothing is written any more.
        """
        identity = self._prefix + folder.relative
        if self._store.knows(identity):
            return _Taken(done=[folder.relative])
        try:
            call = reader.read(folder, incomplete=self._incomplete and over)
            return _Taken([call], [folder.relative])
        except CapturedError as error:
            reason, waits = str(error), not final
            taken = self._replays(reader, folder, final=final)
        except DumpError as error:
            reason = str(error)
            waits = isinstance(error, UnfinishedError) and not (pressed and over)
            taken = _Taken() if waits else self._replays(reader, folder, final=True)
        if waits:
            return taken
        taken.done.append(folder.relative)
        if not taken.results and not self._store.knows_within(identity):
            taken.results.append(Unreadable(identity, reason))
        return taken

    def _replays(self, reader: Reader, folder: DumpFolder, *, final: bool) -> _Taken:
        """Read a captured call's replays.

        The newest may lack its outputs yet. The call's own folder stays while its process lives:
        FlashInfer makes the metadata of the next replay from it.
        """
        replays, other = find_flushes(self._dumps, folder)
        taken = _Taken()
        if final:
            taken.results += [Unreadable(self._prefix + o.id, o.reason) for o in other]
        for replay in replays if final else replays[:-1]:
            if not self._store.knows(self._prefix + replay.relative):
                taken.results.append(reader.try_read(replay))
            taken.done.append(replay.relative)
        return taken

    def _put_away(self, paths: Sequence[str]) -> None:
        """Keep the folders of stored calls where that is wanted, delete them elsewhere."""
        if self._keep is None:
            self._delete(paths)
            return
        for path in paths:
            kept = self._keep / path
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self._dumps / path, kept)

    def _delete(self, paths: Sequence[str]) -> None:
        """Delete folders, and links themselves; each vanishes as a whole or not at all."""
        if not paths:
            return
        try:
            self._rubbish.mkdir(exist_ok=True)
            for number, path in enumerate(paths):
                if os.path.lexists(self._dumps / path):
                    (self._dumps / path).rename(self._rubbish / str(number))
        except OSError as error:
            raise CollectError(
                f"{self._dumps}: drained dumps cannot be deleted ({error.strerror})"
            ) from error
        self._remove_rubbish()

    def _remove_rubbish(self) -> None:
        if self._rubbish.is_symlink():
            raise CollectError(f"{self._rubbish}: a symbolic link, remove it")
        if self._rubbish.exists():
            shutil.rmtree(self._rubbish, ignore_errors=True)


def _batches(folders: Sequence[DumpFolder]) -> Iterator[list[DumpFolder]]:
    rest = iter(folders)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _allocated(folder: str) -> int:
    """Return the bytes that a folder and all in it take on disk; others may be deleting it."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                total += max(status.st_size, status.st_blocks * 512)
                if entry.is_dir(follow_symlinks=False):
                    total += _allocated(entry.path)
    return total


def scan_log(path: Path, store: CallStore) -> Counter[str]:
    """Count what FlashInfer's log says, in lines not scanned before, about dumps it left out.

    The count is added to the store's notices, with how far the log was read, so that after a crash
    no line counts twice. Of a large log, the disk space of what was read is given back; the lines
    that its process writes meanwhile stay.

    Args:
        path: the log of one process; it need not be there.
        store: keeps the count.

    Returns:
        Kind (of `NOTICES`) -> new lines.

    Raises:
        CollectError: the log cannot be read, or the store fails.
    """
    found: Counter[str] = Counter()
    try:
        with opened(str(path)) as (handle, size):
            status = os.fstat(handle)
            file = f"{status.st_dev}:{status.st_ino}"
            start = store.log_position(str(path), file)
            position = start = start if start <= size else 0
            while chunk := os.pread(handle, _CHUNK, position):
                whole = chunk.rfind(b"\n") + 1
                if not whole and len(chunk) < _CHUNK:
                    break  # a line that is being written
                chunk = chunk[: whole or _CHUNK]
                position += len(chunk)
                for kind in NOTICES:
                    found[kind] += chunk.count(kind.encode())
    except FileNotFoundError:
        return found
    except (OSError, DumpError) as error:
        raise CollectError(f"{path}: FlashInfer's log cannot be read ({error})") from error
    found = +found
    if position != start:
        store.add_notices(str(path), file, position, found)
    if status.st_blocks * 512 > _LARGE_LOG:
        _give_back(path, position)
    return found


def _give_back(path: Path, position: int) -> None:
    """Free the disk space of a file's first bytes.

    Its writer goes on appending, so that cutting it off could lose a line; a hole cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mode = _PUNCH_HOLE | _KEEP_SIZE
        failed = libc.fallocate(handle, mode, ctypes.c_int64(0), ctypes.c_int64(position))
        if failed and os.fstat(handle).st_size == position:
            os.ftruncate(handle, 0)  # the file system knows no holes
    finally:
        os.close(handle)
