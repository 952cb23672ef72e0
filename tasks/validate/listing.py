"""The files of a dataset folder, and reading one of them when nobody can be trusted."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tasks.errors import InputError, OnboardError
from tasks.files import safe_name
from tasks.validate.findings import Findings

_PARTS = ("definitions", "workloads", "blob", "solutions", "traces", "tests")
_DEEPEST = 6
_FOREIGN = "not part of the dataset's layout"
_LARGEST_TEXT = 64 << 20
_NOT_LISTED = frozenset({"__pycache__", "logs", "conftest.py", "__init__.py"})


class BadFileError(OnboardError):
    """A file cannot be used; the text says why, without the path."""


def printable_path(path: PurePosixPath) -> str:
    """Return a path as text, even if its name is not UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def scan(root: Path, findings: Findings) -> Iterator[PurePosixPath]:
    """Yield the regular files of the dataset's folders, sorted; hidden ones are left out.

    Symbolic links and what is neither file nor folder are errors, and are not followed.
    """
    found: list[PurePosixPath] = []
    folders = [PurePosixPath()]
    while folders:
        folder = folders.pop()
        for path in _inside(root, folder, findings):
            kind = _kind(root, path)
            foreign = len(path.parts) > _DEEPEST or path.parts[0] not in _PARTS
            if kind == "file" and len(path.parts) > 1:
                found.append(path)
            elif kind == "folder" and foreign:
                findings.warn("", printable_path(path), "", _FOREIGN)
            elif kind == "folder":
                folders.append(path)
            elif kind != "file" and path.parts[0] in _PARTS:
                place = place_of(path, Findings())
                name = place.name if place else ""
                findings.error(name, printable_path(path), "", f"is {kind}, refused")
    yield from sorted(found)


def _inside(root: Path, folder: PurePosixPath, findings: Findings) -> list[PurePosixPath]:
    try:
        names = os.listdir(root / folder)  # noqa: PTH208  names, not paths
    except OSError as error:
        findings.error("", printable_path(folder), "", f"cannot be listed ({error.strerror})")
        return []
    return [folder / name for name in names if name[0] != "." and name not in _NOT_LISTED]


def _kind(root: Path, path: PurePosixPath) -> str:
    mode = (root / path).lstat().st_mode
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    return "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"


@dataclass(frozen=True)
class Place:
    """Where a file belongs, by its path."""

    part: str
    """`definitions`, `tests`, `workloads`, `blob`, `solutions` or `traces`."""
    name: str
    """Name of the definition."""
    path: PurePosixPath
    op_type: str = ""
    author: str = ""


def place_of(path: PurePosixPath, findings: Findings) -> Place | None:
    """Return which definition a file belongs to; None, with a finding, if to none."""
    match path.parts:
        case ("definitions", op_type, file) if file.endswith(".json"):
            place = Place("definitions", file.removesuffix(".json"), path, op_type)
        case ("workloads", op_type, file) if file.endswith(".jsonl"):
            place = Place("workloads", file.removesuffix(".jsonl"), path, op_type)
        case ("traces", author, op_type, file) if file.endswith(".jsonl"):
            place = Place("traces", file.removesuffix(".jsonl"), path, op_type, author)
        case ("solutions", author, op_type, name, file) if file.endswith(".json"):
            place = Place("solutions", name, path, op_type, author)
        case ("blob", "workloads", op_type, name, file) if file.endswith(".safetensors"):
            place = Place("blob", name, path, op_type)
        case ("tests", "references", file) if file.startswith("test_") and file.endswith(".py"):
            place = Place("tests", file.removeprefix("test_").removesuffix(".py"), path)
        case _:
            findings.warn("", printable_path(path), "", _FOREIGN)
            return None
    try:
        for part in path.parts:
            safe_name(part, "path")
        safe_name(place.name, "path")
    except InputError as error:
        findings.error("", printable_path(path), "", str(error))
        return None
    return place


def open_file(root: Path, path: PurePosixPath) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        BadFileError: it is none, or cannot be read.
    """
    try:
        handle = os.open(root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BadFileError(f"cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadFileError("is not a regular file")
    return os.fdopen(handle, "rb")


def read_text(root: Path, path: PurePosixPath) -> str:
    """Read UTF-8 text.

    Raises:
        BadFileError: it is none, too large, or cannot be read.
    """
    with open_file(root, path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > _LARGEST_TEXT:
            raise BadFileError(f"is {size} bytes long, more than {_LARGEST_TEXT}")
        data = stream.read(_LARGEST_TEXT)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadFileError(f"is not UTF-8 text (byte {error.start})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"key {name!r} appears twice")
        value[name] = item
    return value


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        BadFileError: it is none, is nested too deeply, or has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadFileError("has a string that is not Unicode text") from error
    except RecursionError as error:
        raise BadFileError("is nested too deeply") from error
    except ValueError as error:
        raise BadFileError(f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadFileError(f"is a JSON {type(value).__name__}, expected an object")
    return value
