"""What is published, and the interface of whatever publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol


def marker(key: str, kind: str) -> str:
    """Return the line that identifies a body, so that it is found again and never sent twice."""
    return f"<!-- onboard:{key}:{kind} -->"


@dataclass(frozen=True)
class Post:
    """A rendered issue or pull request."""

    key: str
    """What it is about: a definition name, or a FlashInfer API."""
    kind: str
    """`dataset`, `coverage`, `kernel-request`, `template-request` or `sglang`."""
    repository: str
    title: str
    body: str
    labels: tuple[str, ...] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)
    """Files that the body shows, by the name that it has for them."""
    asked_for: str = ""
    """`{model}/{definition}`, where others may open the same: the text of the first one stays."""


@dataclass(frozen=True)
class Branch:
    """The commit behind a pull request."""

    name: str
    clone: Path
    """The clone whose checked-out commit it starts from."""
    message: str
    files: Mapping[PurePosixPath, Path] = field(default_factory=dict)
    """Path in the repository -> file with its content."""


class Publisher(Protocol):
    """Opens pull requests and issues, each exactly once.

    Called again with the same post it returns the same URL and changes nothing.
    """

    def open_pull_request(self, post: Post, branch: Branch) -> str:
        """Publish a branch and its pull request; return the pull request's URL.

        Raises:
            PublishError: it could not be.
        """
        ...

    def open_issue(self, post: Post) -> str:
        """Open an issue, or leave a pull request's text for somebody to complete; return its URL.

        Raises:
            PublishError: it could not be.
        """
        ...
