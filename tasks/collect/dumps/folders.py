"""Which folders below a root are dumps of calls, and in which order the calls were made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tasks.collect.dumps.tensors import SYMLINK

SESSION = "session.jsonl"
"""FlashInfer's own list of all records, beside the folders."""
FOREIGN = "not a dump of FlashInfer's (a foreign file)"
FLUSHES = "graph_flushes"
_DUMP = re.compile(r"(\d{8}_\d{6}_\d{3})_pid(\d{1,10})_([\w.<>]{1,200})_call(\d{1,12})", re.ASCII)
_LIKE_A_DUMP = re.compile(r".*_call\d")
_FLUSH = re.compile(r"flush_(\d{1,12})", re.ASCII)
_DEEPEST = 8
_UNREADABLE = "a folder cannot be read"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What is no call, and why; reasons are counted."""

    id: str
    """Its path, relative to the root."""
    reason: str


class DumpFolder(NamedTuple):
    """A dumped call's folder; they sort in the order of the calls.

    Call numbers count per function, so that they do not order a plan and its run: of the same
    millisecond, the plan comes first.
    """

    stamp: str
    parent: str
    """Folder that holds it, relative to the root; empty for the root itself."""
    pid: int
    runs: bool
    """Whether it is of anything but a plan."""
    call: int
    function: str
    flush: int
    """Which replay of a captured call; 0 for the call itself."""
    relative: str
    """Path relative to the root."""


def dump_folder(relative: str) -> DumpFolder | None:
    """Return the dump folder that a relative path names, or nothing if it is no such name."""
    path, flush = relative, 0
    head, _, last = relative.rpartition("/")
    if found := _FLUSH.fullmatch(last):
        path, flush = head.removesuffix(f"/{FLUSHES}"), int(found[1])
        if path == head:
            return None
    parent, _, name = path.rpartition("/")
    match = _DUMP.fullmatch(name)
    if match is None:
        return None
    stamp, pid, function, call = match.groups()
    runs = not function.endswith(".plan")
    return DumpFolder(stamp, parent, int(pid), runs, int(call), function, flush, relative)


def find_folders(root: Path) -> tuple[list[DumpFolder], list[Unreadable]]:
    """Return the dump folders below `root` in the order of their calls, and what else is there.

    Hidden files and folders are passed over.
    """
    found: list[DumpFolder] = []
    other: list[Unreadable] = []
    for path in _walk(str(root), "", other):
        folder = dump_folder(path)
        if folder is None:
            other.append(Unreadable(path, "the folder's name is not that of a dump"))
        else:
            found.append(folder)
    return sorted(found), other


def _walk(root: str, parent: str, other: list[Unreadable]) -> Iterator[str]:
    """Yield the relative paths of folders that look like dumps."""
    try:
        with os.scandir(f"{root}/{parent}") as listed:
            entries = list(listed)
    except OSError:
        other.append(Unreadable(parent, _UNREADABLE))
        return
    for entry in entries:
        path = f"{parent}/{entry.name}" if parent else entry.name
        if entry.name == SESSION or entry.name.startswith("."):
            continue
        if not entry.name.isprintable():
            other.append(Unreadable(ascii(path), "a name that is not text"))
        elif entry.is_symlink():
            other.append(Unreadable(path, SYMLINK))
        elif not entry.is_dir(follow_symlinks=False):
            other.append(Unreadable(path, FOREIGN))
        elif _LIKE_A_DUMP.match(entry.name):
            yield path
        elif path.count("/") >= _DEEPEST:
            other.append(Unreadable(path, "folders too deep within each other"))
        else:
            yield from _walk(root, path, other)


def find_flushes(root: Path, folder: DumpFolder) -> tuple[list[DumpFolder], list[Unreadable]]:
    """Return the replays of a captured call, in their order, and what else lies among them."""
    place = f"{folder.relative}/{FLUSHES}"
    if (root / place).is_symlink():
        return [], [Unreadable(place, SYMLINK)]
    try:
        with os.scandir(root / place) as listed:
            entries = list(listed)
    except FileNotFoundError:
        return [], []
    except OSError:
        return [], [Unreadable(place, _UNREADABLE)]
    found: list[DumpFolder] = []
    other: list[Unreadable] = []
    for entry in entries:
        flush, path = _FLUSH.fullmatch(entry.name), f"{place}/{entry.name}"
        if flush and entry.is_dir(follow_symlinks=False):
            found.append(folder._replace(flush=int(flush[1]), relative=path))
        else:
            name = path if entry.name.isprintable() else ascii(path)
            other.append(Unreadable(name, SYMLINK if entry.is_symlink() else FOREIGN))
    return sorted(found), other
