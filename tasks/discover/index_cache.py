"""The source indexes' cache in the workspace: one file per index and revision."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tasks import files, git
from tasks.errors import InputError

Index = TypeVar("Index", bound=BaseModel)


def cached(cache: Path, kind: type[Index], sha: str, build: Callable[[], Index]) -> Index:
    """Return the index of a revision from `cache`, building and storing it where it is not there.

    A file that is damaged or of another version of the index is built anew. A cache that cannot be
    written to is not used.
    """
    path = cache / f"{kind.__name__.lower()}-{files.safe_name(sha, 'revision')}.json"
    with contextlib.suppress(OSError, ValidationError):
        index = kind.model_validate_json(path.read_bytes())
        if getattr(index, "version", None) == kind.model_fields["version"].default:
            return index
    index = build()
    with contextlib.suppress(OSError, InputError):
        files.write_text(path, index.model_dump_json())
    return index


_WHEEL = re.compile(r"(?P<name>[A-Za-z0-9_.]+)-(?P<version>[A-Za-z0-9_.+!]+)\.dist-info")


def revision(checkout: Path, package: str) -> str:
    """Return what names a tree's content.

    The commit of a git checkout, the version of an unpacked wheel, or else a digest of the names,
    sizes and times of the Python files.

    Args:
        checkout: the tree.
        package: the package it holds, as its wheel calls it (`flashinfer_python`).
    """
    if (checkout / ".git").exists():
        return git.short_sha(checkout)
    for folder in sorted(checkout.glob("*.dist-info")):
        wheel = _WHEEL.fullmatch(folder.name)
        if wheel and wheel["name"].lower() == package.lower():
            return wheel["version"]
    digest = hashlib.sha256()
    for path in sorted(checkout.rglob("*.py")):
        status = path.lstat()
        digest.update(
            ascii((path.relative_to(checkout), status.st_size, status.st_mtime_ns)).encode()
        )
    return f"tree-{digest.hexdigest()[:12]}"
