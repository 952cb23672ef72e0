"""What has become of everything that was published: asked of its sites, kept in the manifest."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
from github import GithubException, RateLimitExceededException
from huggingface_hub.errors import HfHubHTTPError
from requests import RequestException

from tasks import manifest
from tasks.errors import PublishError
from tasks.manifest import RunManifest, Upstream
from tasks.publish.markdown import one_line

OPEN = frozenset({"draft", "open", "changes_requested"})
"""States in which something waits for a reviewer."""
_ENDED = frozenset({"closed", "rejected"})
_ASKED_AGAIN = dt.timedelta(days=1)
"""After which it is seen whether somebody has opened again what was closed."""
_TRIES = 3
"""Failures in succession after which a site is left alone: its clients are patient with each."""
_NO_ANSWER = (RequestException, httpx2.TransportError, RateLimitExceededException)

StateOf = Callable[[str], Upstream | None]


class Sites:
    """Asks what has become of things published; of each one once, whoever wants to know."""

    def __init__(self, state_of: StateOf) -> None:
        """Ask nothing yet.

        Args:
            state_of: tells what has become of a URL, or None if nobody here can ask; raises a
                PublishError if there is no answer.
        """
        self._state_of = state_of
        self._answers: dict[str, Upstream | PublishError | None] = {}
        self._failures: Counter[str] = Counter()

    def ask(self, url: str) -> Upstream | None:
        """Return what has become of it; None if nobody here can ask.

        Raises:
            PublishError: there is no answer.
        """
        if url not in self._answers:
            try:
                self._answers[url] = self._asked(url)
            except PublishError as error:
                self._answers[url] = error
        answer = self._answers[url]
        if isinstance(answer, PublishError):
            raise answer
        return answer

    def _asked(self, url: str) -> Upstream | None:
        try:
            site = urlsplit(url).netloc
        except ValueError as error:
            raise PublishError(f"{one_line(url)}: is no URL ({error})") from error
        if self._failures[site] >= _TRIES:
            raise PublishError(f"{one_line(url)}: is not asked for, {site} does not answer")
        try:
            found = self._state_of(url)
        except PublishError as error:
            self._failures[site] = self._failures[site] + 1 if _is_of_the_site(error) else 0
            raise
        self._failures[site] = 0
        return found


def _is_of_the_site(error: PublishError) -> bool:
    """Whether others at the site would not be answered either."""
    cause, status = error.__cause__, 0
    if isinstance(cause, GithubException):
        status = cause.status
    elif isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
    return isinstance(cause, _NO_ANSWER) or status in {401, 429} or status >= 500


@dataclass(frozen=True)
class Look:
    """What a look at everything that a run has published came to."""

    told: dict[str, Upstream] = field(default_factory=dict)
    """URL -> what has become of it."""
    failed: dict[str, str] = field(default_factory=dict)
    """URL -> why there is no answer."""
    not_asked: tuple[str, ...] = ()
    """Nobody here can ask for these: there is no token for their site."""


def look(run: RunManifest, sites: Sites, now: dt.datetime | None = None) -> Look:
    """Ask for everything that a run has published and that may still change.

    Args:
        run: its manifest.
        sites: who is asked.
        now: the time.
    """
    now = now or dt.datetime.now(dt.UTC)
    told, failed, not_asked = {}, {}, []
    for url in dict.fromkeys(_published(run)):
        if _is_settled((run.upstream or {}).get(url), now):
            continue
        try:
            found = sites.ask(url)
        except PublishError as error:
            failed[url] = str(error)
            continue
        if found is None:
            not_asked.append(url)
        else:
            told[url] = found.model_copy(update={"checked": found.checked or now})
    return Look(told, failed, tuple(not_asked))


def _published(run: RunManifest) -> Iterator[str]:
    for entry in run.kernels:
        yield from run.links(entry).values()


def _is_settled(known: Upstream | None, now: dt.datetime) -> bool:
    """Whether something need not be asked for: it is merged, or was closed when last seen."""
    if known is None or known.checked is None:
        return False
    return known.state == "merged" or (known.state in _ENDED and now - known.checked < _ASKED_AGAIN)


def record_base(path: Path, url: str, base: str) -> None:
    """Record with which commit of its repository a coverage pull request merges.

    Args:
        path: the run manifest.
        url: of the pull request.
        base: the commit.
    """

    def change(run: RunManifest) -> None:
        known = run.upstream_of(url) or Upstream(state="open")
        run.upstream = {**(run.upstream or {}), url: known.model_copy(update={"base": base})}

    manifest.update(path, change)


def news(before: RunManifest, after: RunManifest) -> list[str]:
    """Return the definitions of which something is known that was not.

    Args:
        before: the manifest.
        after: the same one, later.
    """
    return [
        entry.definition_name
        for entry in after.kernels
        if any(
            _said(before.upstream_of(url)) != _said(after.upstream_of(url))
            for url in after.links(entry).values()
        )
    ]


def _said(known: Upstream | None) -> tuple[str | None, ...]:
    return (known.state, known.said) if known else ()


def behind(run: RunManifest, told: Mapping[str, Upstream], base: str) -> list[str]:
    """Return the definitions whose open coverage pull request was made for an older document.

    Args:
        run: the manifest.
        told: what has just been told; a site that did not answer takes no update either.
        base: the commit of the document's repository.
    """
    waits = {url for url, found in told.items() if found.state in OPEN}
    made_for = {url: known.base for url, known in (run.upstream or {}).items()}
    urls = {entry.definition_name: run.links(entry).get("coverage", "") for entry in run.kernels}
    return [name for name, url in urls.items() if url in waits and made_for.get(url) != base]
