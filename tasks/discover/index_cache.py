"""The source indexes' cache in the workspace: one file per index and revision."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tasks import files, git
from tasks.errors import InputError

VERSION = 3
"""Counted up with every change of what the indexes hold."""


class Index(BaseModel):
    """What is read from a source tree."""

    version: int = VERSION


Kind = TypeVar("Kind", bound=Index)


def cached(cache: Path, kind: type[Kind], sha: str, build: Callable[[], Kind]) -> Kind:
    """Return the index of a revision from `cache`, building and storing it where it is not there.

    A file that is damaged or of another version of the index is built anew. A cache that cannot be
    written to is not used.
    """
    path = cache / f"{kind.__name__.lower()}-{files.safe_name(sha, 'revision')}.json"
    with contextlib.suppress(OSError, ValidationError):
        index = kind.model_validate_json(path.read_bytes())
        if index.version == VERSION:
            return index
    index = build()
    with contextlib.suppress(OSError, InputError):
        files.write_text(path, index.model_dump_json())
    return index


_WHEEL = re.compile(r"(?P<name>[A-Za-z0-9_.]+)-(?P<version>[A-Za-z0-9_.+!]+)\.dist-info")


def revision(checkout: Path, package: str, *more: str) -> str:
    """Return what names a tree's content.

    The commit of a git checkout, and a digest of what its Python files differ by; the versions of
    unpacked wheels; or else a digest of the names, sizes and times of the Python files.

    Args:
        checkout: the tree.
        package: the package it holds, as its wheel calls it (`flashinfer_python`).
        more: packages that are read too where they are beside it (`sglang_kernel`).
    """
    if (checkout / ".git").exists():
        changes = _changes(checkout)
        return "-".join([git.short_sha(checkout), *([_digest(changes)] if changes else [])])
    wheels = [_WHEEL.fullmatch(folder.name) for folder in sorted(checkout.glob("*.dist-info"))]
    versions = {wheel["name"].lower(): wheel["version"] for wheel in wheels if wheel}
    if package.lower() in versions:
        beside = [f"{n}-{versions[n]}" for n in map(str.lower, more) if n in versions]
        return "-".join([versions[package.lower()], *beside])
    return f"tree-{_digest(_states(checkout, sorted(checkout.rglob('*.py'))))}"


def _changes(checkout: Path) -> bytes:
    """Return what the Python files of a work tree differ by from its commit, new ones included."""
    # A checkout's own settings may name programs; none of them is run.
    plain = ("-c", "core.fsmonitor=false")
    options = ("--no-ext-diff", "--no-textconv", "--binary", "--ignore-submodules")
    changed = git.run(*plain, "diff", *options, "HEAD", "--", "*.py", cwd=checkout)
    others = ("--others", "--exclude-standard", "--", "*.py")
    new = git.git(*plain, "ls-files", "-z", *others, cwd=checkout).split("\0")
    return changed + _states(checkout, (checkout / name for name in new if name))


def _states(root: Path, paths: Iterable[Path]) -> bytes:
    """Return names, sizes and times of files, as bytes to be hashed."""
    states = ((path.relative_to(root), path.lstat()) for path in paths)
    return b"".join(ascii((path, s.st_size, s.st_mtime_ns)).encode() for path, s in states)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
