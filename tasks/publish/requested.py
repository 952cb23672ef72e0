"""Where a kernel was requested, said in its definition's description.

An address in the outbox is written relative to the workspace: a definition is published, and a path
of this machine is nobody's business.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tasks import files

_SENTENCE = re.compile(r"\s*Kernel request: (?:[a-z]+://|outbox/)\S+\.(?=\s|$)")


def is_public(url: str | None) -> bool:
    """Return whether something is upstream, and not in the outbox or nowhere."""
    return bool(url) and not str(url).startswith("file:")


def public_address(url: str, workspace: Path) -> str:
    """Return a URL as it may be published: of a file in the workspace, its path there."""
    parts = urlsplit(url)
    if parts.scheme != "file":
        return url
    path = Path(unquote(parts.path))
    for root in (workspace.absolute(), workspace.resolve()):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return f"outbox/{path.parent.name}/{path.name}"


def without_request(description: str) -> str:
    """Return a description as it was before the request was added."""
    return _SENTENCE.sub("", description)


def with_request(description: str, address: str) -> str:
    """Return a description that says where the kernel was requested, once."""
    return f"{without_request(description)} Kernel request: {address}.".strip()


def note_request(definition: Path, address: str) -> None:
    """Say in a staged definition where the kernel was requested; nothing if it is not staged."""
    if not definition.exists():
        return
    staged = files.read_json_object(definition, "the staged definition")
    described = with_request(str(staged.get("description") or ""), address)
    if staged.get("description") != described:
        files.write_json(definition, {**staged, "description": described})
