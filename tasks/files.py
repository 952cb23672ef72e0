"""Files that are never half-written, and paths that never escape.

A write goes to a temporary name in the same folder and is renamed into place, so that a reader, or
a later run after a crash, sees the old content or the new, never a part.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from tasks.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def safe_name(value: str, what: str) -> str:
    """Return `value` if it can be one path component, without separators or a leading dot.

    Raises:
        InputError: it cannot; the message names `what` and the value.
    """
    if not _NAME.fullmatch(value):
        raise InputError(
            f"{what}: {value!r} is not a valid name (letters, digits, '.', '_' and '-' only, "
            "starting with a letter or digit, at most 200 characters)"
        )
    return value


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically, creating parent folders.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_inside(root: Path, *folders: PurePath) -> None:
    """Check that folders below `root`, as far as they exist, are not links to elsewhere.

    Raises:
        InputError: one is.
    """
    for folder in folders:
        if not (root / folder).resolve().is_relative_to(root.resolve()):
            raise InputError(f"{root / folder}: leads out of {root}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that do the same; it is made if it is not there.

    The kernel releases it when its holder dies, and nothing is left behind: the lock is on the
    folder itself, which `filelock` cannot do.

    Raises:
        InputError: it cannot be made or opened.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_text(path: Path, what: str, error: type[InputError] = InputError) -> str:
    """Read UTF-8 text, with errors that name the file.

    Raises:
        InputError: (or the given subclass) not readable, or no text.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path}: {what} is not a regular file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path}: {what} is not UTF-8 text (byte {cause.start})") from cause
    except OSError as cause:
        raise error(f"{path}: {what} cannot be read ({cause.strerror})") from cause


def read_json_object(path: Path, what: str, error: type[InputError] = InputError) -> dict[str, Any]:
    """Read a JSON object, with errors that name the file.

    Raises:
        InputError: (or the given subclass) not readable, not JSON, or not an object.
    """
    text = read_text(path, what, error)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: {what} is not JSON ({cause})") from cause
    if not isinstance(value, dict):
        raise error(f"{path}: {what} is a JSON {type(value).__name__}, expected an object")
    if "\\ud" in text.lower():
        # A lone surrogate is valid JSON and no valid text; it could not be written back.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as cause:
            raise error(f"{path}: {what} has a string that is not Unicode text") from cause
    return value
