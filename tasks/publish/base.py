"""What is published, what has to hold before, and the interface of whatever publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol, Self

from tasks.errors import PublishError
from tasks.publish.markdown import fit, width

BODY_LIMIT = 65_536
"""Longest text of an issue, a pull request or a comment, in UTF-16 code units (`width`).

Of the Hub as its OpenAPI description has it (`maxLength` of a discussion's `description`), of
GitHub as its error says ("Body is too long (maximum is 65536 characters)").
"""
TITLE_LIMIT = 200
"""Longest title of a discussion on the Hub, as its OpenAPI description has it; GitHub takes 256."""


ODD_ANSWER = (AttributeError, LookupError, TypeError, ValueError)
"""What clients make of an answer that is not their site's: cut off, or a proxy's page."""


def titled(key: str) -> str:
    """Return how the titles of a definition's dataset pull request begin."""
    return f"Add {key}"[:TITLE_LIMIT]


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
    """Without log and marker; what is sent is `text_of` it."""
    labels: tuple[str, ...] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)
    """Files that the body shows, by the name that it has for them."""
    asked_for: str = ""
    """`{model}/{definition}`, where others may open the same: the text of the first one stays."""
    draft: bool = False
    """Whether it is opened as a draft."""
    log: str = ""
    """The whole log of the collection, which ends the text as far as there is room."""
    attached: str = ""
    """Where in the branch the whole log is, if there is no room for it."""


def text_of(post: Post, limit: int = BODY_LIMIT) -> str:
    """Return the text to send: the body, its log, and the marker, within a site's limit.

    Raises:
        PublishError: the body alone is longer.
    """
    end = f"\n\n{marker(post.key, post.kind)}\n"
    link = f"the whole log is `{post.attached}` in this pull request" if post.attached else ""
    try:
        return fit(post.body, post.log, limit - width(end), link) + end
    except ValueError as error:
        raise PublishError(f"{post.key}: the text of its {post.kind} {error}") from error


@dataclass(frozen=True)
class Branch:
    """The commit behind a pull request."""

    name: str
    clone: Path
    message: str
    files: Mapping[PurePosixPath, Path] = field(default_factory=dict)
    """Path in the repository -> file with its content."""
    base: str = "HEAD"
    """The clone's commit that it starts from. Where files were made from those of a commit, that
    one: the clone may be updated in the meantime."""
    owned: tuple[PurePosixPath, ...] = ()
    """Files and folders of its own: what an earlier version of it had there, and it has no longer,
    does not stay."""


@dataclass(frozen=True)
class Finding:
    """What one item of the checklist found."""

    item: str
    ok: bool
    message: str
    """What was found; if it is not ok, with how to fix it."""
    blocks: bool = True
    """Whether nothing is opened while it is not ok."""

    @property
    def failed(self) -> bool:
        """Whether it keeps the pull request from being opened."""
        return self.blocks and not self.ok


LARGEST_FILE = 5 * 10**9
"""Bytes: the Hub takes files up to this size in one part, and advises against larger ones."""


class NothingNewError(PublishError):
    """The repository has everything already; there is nothing to open a pull request with."""

    def __init__(self, message: str, url: str) -> None:
        """Say what is there.

        Args:
            message: what was to be published.
            url: where the repository has it.
        """
        super().__init__(message)
        self.url = url


class ChecklistError(PublishError):
    """A pull request is not opened: items of its checklist do not hold."""


@dataclass(frozen=True)
class Checklist:
    """A pull request's checklist, and what the body quotes of it."""

    definition: str = ""
    kind: str = ""
    findings: tuple[Finding, ...] = ()
    validation: tuple[str, ...] = ()
    """What the validator said of the definition's files, a line each."""
    reference_test: str = ""
    """What the reference test came to."""
    log: str = ""
    """The whole log of the collection, fit to publish."""

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings that keep the pull request from being opened."""
        return tuple(found for found in self.findings if found.failed)

    def require(self) -> Self:
        """Return it if the pull request may be opened.

        Raises:
            ChecklistError: it may not; the text has what failed and how to fix it.
        """
        listed = "; ".join(f"{found.item}: {found.message}" for found in self.failed)
        if listed:
            what = f"{self.definition}: its {self.kind} pull request is not opened"
            raise ChecklistError(f"{what}: {listed}")
        return self


class OpensPullRequests(Protocol):
    """Opens pull requests, each exactly once.

    Called again with the same post it returns the same URL and changes nothing.
    """

    def open_pull_request(self, post: Post, branch: Branch) -> str:
        """Publish a branch and its pull request; return the pull request's URL.

        Raises:
            PublishError: it could not be.
        """
        ...


class Publisher(OpensPullRequests, Protocol):
    """Opens issues too, each exactly once."""

    def open_issue(self, post: Post) -> str:
        """Open an issue, or leave a pull request's text for somebody to complete; return its URL.

        Raises:
            PublishError: it could not be.
        """
        ...
