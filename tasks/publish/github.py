"""GitHub: pull requests, from a fork where there is no push right, and issues, each exactly once.

What was sent is looked for before anything is sent: a pull request among those of its branch, an
issue among those of the token's user, both by the marker in their text. So a run that died, or
whose answer was lost, goes on where it stopped. A call that may have taken effect is never simply
repeated.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from filelock import FileLock, Timeout
from github import Auth, Github
from github.GithubException import (
    BadCredentialsException,
    GithubException,
    RateLimitExceededException,
)
from github.GithubRetry import GithubRetry
from github.Issue import Issue
from github.PullRequest import PullRequest
from github.Repository import Repository
from pydantic import SecretStr
from requests import RequestException

from tasks.errors import InputError, OnboardError, PublishError
from tasks.git import AUTHOR, GitError, check_remote, git
from tasks.manifest import Upstream
from tasks.publish.base import ODD_ANSWER, Branch, NothingNewError, Post, marker, text_of
from tasks.publish.branch import write_commit
from tasks.publish.markdown import one_line
from tasks.settings import REPOSITORY, github_site

_log = logging.getLogger(__name__)
_TOKEN = re.compile(r"[!-~]{1,1000}")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")
_TITLE = 256
_WORDS = 1000
_LOCK_SECONDS = 1800
_SCOPES = (
    "a classic token needs the scope `public_repo` (and `workflow`, if the fork is behind), a "
    "fine-grained one write access to contents, issues and pull requests"
)
_ODD = (AssertionError, *ODD_ANSWER)
_FAILED = (GithubException, RequestException, *_ODD)
_AGAIN = "run it again later, and it goes on where it stopped"
T = TypeVar("T", Issue, PullRequest, Repository)
U = TypeVar("U")


@dataclass(frozen=True)
class Pace:
    """How fast GitHub is asked, and how long it is waited for; in seconds."""

    requests: float = 0.25
    writes: float = 1.0
    """Least time between two requests, and between two that change something."""
    answer: int = 30
    backoff: float = 0.5
    """Before what failed is read again; doubled each time."""
    limited: float = 60
    """After a refusal for too many requests that does not say how long to wait."""
    longest: int = 900
    """For a limit to end; it is waited for a few times at most."""
    again: tuple[float, ...] = (2, 10, 30)
    """After a call that may have taken effect or not, before it is looked for."""
    fork: tuple[float, ...] = (1, 2, 4, 8, 15, 30, 60, 60, 120)
    """Between looks at a new fork, which GitHub fills in its own time."""


class Careful(GithubRetry):
    """Repeats what reads, and what a limit refused: nothing that may have taken effect."""

    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:
        """Return whether an answer is to be asked for again."""
        return status_code in {403, 429} or super().is_retry(method, status_code, has_retry_after)

    def get_backoff_time(self) -> float:
        """Return how long to wait where the answer does not say."""
        if self.history and self.history[-1].status == 429:
            return self.secondary_rate_wait
        return super().get_backoff_time()

    @classmethod
    def at(cls, pace: Pace) -> Careful:
        """Return one whose waits are bounded."""
        return cls(
            total=4,
            backoff_factor=pace.backoff,
            status_forcelist=[429, *range(500, 600)],
            allowed_methods={"GET", "HEAD"},
            secondary_rate_wait=pace.limited,
            raise_on_status=False,  # the last answer says more
            max_rate_limit_wait=pace.longest,
            retry_after_max=pace.longest,
        )


@dataclass(frozen=True)
class Change:
    """The commit of a branch, in the clone it was made from."""

    clone: Path
    commit: str
    base: str

    @classmethod
    def of(cls, branch: Branch) -> Change:
        """Write it."""
        commit = write_commit(branch, branch.clone)
        return cls(branch.clone, commit, git("rev-parse", f"{commit}^", cwd=branch.clone))

    @property
    def tree(self) -> str:
        """What the repository is to contain."""
        return git("rev-parse", f"{self.commit}^{{tree}}", cwd=self.clone)

    @property
    def is_empty(self) -> bool:
        """Whether the repository contains that already."""
        return self.tree == git("rev-parse", f"{self.base}^{{tree}}", cwd=self.clone)

    def follows(self, commit: str | None) -> bool:
        """Return whether it was made on top of a commit."""
        try:
            ancestor = ("merge-base", "--is-ancestor", commit or "", self.base)
            git(*ancestor, cwd=self.clone)
        except GitError:
            return False
        return True

    def merges_to(self, tip: str) -> bool:
        """Return whether another commit comes to the same, merged into what is there now."""
        try:
            return git("merge-tree", "--write-tree", self.base, tip, cwd=self.clone) == self.tree
        except GitError:  # they conflict
            return False


class GitHubPublisher:
    """Publishes to GitHub, or to a GitHub Enterprise server."""

    def __init__(
        self, api_url: str, token: SecretStr, locks: Path, pace: Pace | None = None
    ) -> None:
        """Ask nothing yet.

        Args:
            api_url: `https://api.github.com`, or `https://HOST/api/v3`.
            token: a user's token.
            locks: folder of the locks that keep siblings from sending the same twice.
            pace: how fast.

        Raises:
            InputError: the URL is none, or the token cannot be one.
        """
        self._pace, self._token, self._locks = pace or Pace(), token, locks
        self._web = github_site(api_url)
        if not _TOKEN.fullmatch(token.get_secret_value()):
            # Said here: the client's message would have it.
            raise InputError("github_token: is no token (letters, digits, '_' and such, no spaces)")
        self._hub = Github(
            base_url=api_url.rstrip("/"),
            auth=Auth.Token(token.get_secret_value()),
            timeout=self._pace.answer,
            per_page=100,
            user_agent="fib-onboard",
            retry=Careful.at(self._pace),
            seconds_between_requests=self._pace.requests or None,
            seconds_between_writes=self._pace.writes or None,
        )

    def open_pull_request(self, post: Post, branch: Branch) -> str:
        """Open a pull request, or bring the open one up to date; return its URL.

        A draft is left alone once it exists: people push to it. So is a branch that others have
        committed to. Of one that was merged another follows only if the branch was made after that
        and still changes something.

        Raises:
            NothingNewError: the repository has all of it.
            PublishError: it could not be, or it was closed without being merged.
        """
        with self._alone(post), _explained(post.repository):
            upstream = self._repository(post.repository)
            change = Change.of(branch)
            pull = self._pull(upstream, post, branch.name)
            if pull is None or _has_landed(pull, change):
                if change.is_empty:
                    raise _nothing_new(upstream, post, branch)
                return self._open(upstream, post, branch.name, change)
            if pull.state == "open" and not post.draft:
                self._renew(upstream, pull, post, change)
            if pull.state == "open" or pull.merged_at:
                return pull.html_url
            said = _words_about(pull)
            raise PublishError(
                f"{post.repository}: {pull.html_url} was closed without being merged"
                f"{f' ({one_line(said)})' if said else ''}; it is not opened anew: reopen it there "
                "if that is wanted"
            )

    def open_issue(self, post: Post) -> str:
        """Open an issue; one that is there already is left as it is. Return its URL.

        Raises:
            PublishError: it could not be.
        """
        with self._alone(post), _explained(post.repository):
            upstream = self._repository(post.repository)
            title, text = _title(post), text_of(post)

            def find() -> Issue | None:
                return self._issue(upstream, post)

            def create() -> Issue:
                # GitHub drops the labels of somebody without push right.
                return upstream.create_issue(title, body=text, labels=list(post.labels))

            return (find() or self._once(find, create)).html_url

    def state_of(self, url: str) -> Upstream:
        """Return what has become of a pull request or an issue, whoever opened it.

        Raises:
            PublishError: the URL is none of this GitHub, or it cannot be read.
        """
        path = url.removeprefix(f"{self._web}/").removesuffix("/").split("/")
        kinds = {"pull", "issues"}
        known = url.startswith(f"{self._web}/") and len(path) == 4 and path[2] in kinds
        name = "/".join(path[:2])
        if not known or not REPOSITORY.fullmatch(name) or not _NUMBER.fullmatch(path[3]):
            raise PublishError(
                f"{one_line(url)}: is no pull request or issue at {self._web} "
                f"({self._web}/OWNER/NAME/pull/NUMBER)"
            )
        with _explained(name):
            repository, number = self._hub.get_repo(name, lazy=True), int(path[3])
            if path[2] == "pull":
                return _state_of_pull(repository.get_pull(number))
            return _state_of_issue(repository.get_issue(number))

    @contextmanager
    def _alone(self, post: Post) -> Iterator[None]:
        """Hold what is published against siblings; the kernel releases it when its holder dies."""
        what = f"{post.repository} {marker(post.key, post.kind)}"
        name = f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.lock"
        lock = FileLock(self._locks / name, timeout=_LOCK_SECONDS)
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            message = f"{post.repository}: {post.key} is being published by another process"
            raise PublishError(f"{message} for {_LOCK_SECONDS} s; {_AGAIN}") from error
        except OSError as error:
            raise PublishError(f"{self._locks}: cannot be written ({error.strerror})") from error
        try:
            yield
        finally:
            lock.release()

    @cached_property
    def _login(self) -> str:
        return self._hub.get_user().login

    def _repository(self, name: str) -> Repository:
        """Return a repository as it is now.

        Raises:
            PublishError: it has moved: the client takes the redirect of what it sends there for
                the answer.
        """
        found = self._hub.get_repo(name)
        if found.full_name.casefold() != name.casefold():
            raise PublishError(
                f"{name}: has moved to {found.full_name}; name that in [publish] of onboard.toml"
            )
        return found

    def _once(self, find: Callable[[], T | None], create: Callable[[], T]) -> T:
        """Create what is not there; after a lost answer look for it before it is sent again."""
        for wait in self._pace.again:
            try:
                return _made(create())
            except _FAILED as error:
                if not _may_pass(error):
                    raise
            time.sleep(wait)
            found = find()
            if found is not None:
                return found
        return _made(create())

    def _issue(self, upstream: Repository, post: Post) -> Issue | None:
        """Return the issue that has the post's marker, of those of the token's user."""
        # The list is right at once, where the search's index is late.
        listed = upstream.get_issues(
            state="all",
            creator=self._login,  # type: ignore[arg-type]  # takes the name, too
        )
        wanted = marker(post.key, post.kind)
        # Pull requests are listed with the issues.
        return next(
            (i for i in listed if wanted in (i.body or "") and "/pull/" not in i.html_url), None
        )

    def _pull(self, upstream: Repository, post: Post, name: str) -> PullRequest | None:
        """Return the post's pull request: the open one, else the latest.

        Raises:
            PublishError: its branch has an open one that is not ours.
        """
        heads = dict.fromkeys(f"{owner}:{name}" for owner in (self._login, upstream.owner.login))
        pulls = [p for head in heads for p in upstream.get_pulls(state="all", head=head)]
        wanted = marker(post.key, post.kind)
        ours = [pull for pull in pulls if wanted in (pull.body or "")]
        if any(pull.state == "open" for pull in ours):
            return next(pull for pull in ours if pull.state == "open")
        others = [pull.html_url for pull in pulls if pull.state == "open"]
        if others:
            raise PublishError(
                f"{post.repository}: branch {name} has a pull request already, without our marker "
                f"({others[0]}); close it, or put {wanted} into its text to have it taken over"
            )
        return max(ours, key=lambda pull: pull.number, default=None)

    def _open(self, upstream: Repository, post: Post, name: str, change: Change) -> str:
        """Push the branch and open its pull request."""
        title, text = _title(post), text_of(post)
        _require_base(upstream, change)
        home = self._home(upstream)
        tip = _tip(home, name)
        others = _others(upstream, home, name) if tip and tip != change.commit else []
        if others:
            raise PublishError(
                f"{home.full_name}: branch {name} has commits of {', '.join(others)}, which are "
                "not overwritten; rename or delete the branch"
            )
        self._push(home, name, change, tip)

        def find() -> PullRequest | None:
            found = self._pull(upstream, post, name)
            return found if found is not None and found.state == "open" else None

        def create() -> PullRequest:
            return upstream.create_pull(
                base=upstream.default_branch,
                head=f"{home.owner.login}:{name}",
                title=title,
                body=text,
                draft=post.draft,
            )

        return self._once(find, create).html_url

    def _renew(self, upstream: Repository, pull: PullRequest, post: Post, change: Change) -> None:
        """Let an open pull request have the change as it is now, and its text."""
        home, name = pull.head.repo, pull.head.ref
        tip = _tip(home, name) if home else ""
        if not tip:
            raise PublishError(
                f"{post.repository}: the branch of {pull.html_url} is gone; close the pull request"
            )
        if tip != change.commit and not change.is_empty:
            others = _others(upstream, home, name)
            if others:
                _log.warning("%s: left to %s", pull.html_url, ", ".join(others))
                return
            _require_base(upstream, change)
            self._fetch(home, name, change)
            if not change.merges_to(tip):
                self._push(home, name, change, tip)
        text = text_of(post)
        if _plain(pull.body or "") != _plain(text):
            pull.edit(body=text)

    def _home(self, upstream: Repository) -> Repository:
        """Return where the branch goes: the repository, or the fork of the token's user."""
        if upstream.permissions.push:
            return upstream

        def find() -> Repository | None:
            found = _if_there(lambda: self._hub.get_repo(f"{self._login}/{upstream.name}"))
            return found if found and found.source and _root(found) == _root(upstream) else None

        # Of a fork that has another name GitHub returns the one there is.
        fork = find() or self._once(find, upstream.create_fork)
        for wait in self._pace.fork:
            if _tip(fork, upstream.default_branch):
                return fork
            time.sleep(wait)
        raise PublishError(
            f"{upstream.full_name}: its fork {fork.full_name} is still without its branch "
            f"{upstream.default_branch}; {_AGAIN}"
        )

    def _push(self, home: Repository, name: str, change: Change, tip: str) -> None:
        """Let a branch point to the change, if it still points to `tip`."""
        if tip == change.commit:
            return
        ref = f"refs/heads/{name}"
        options = ("--quiet", f"--force-with-lease={ref}:{tip}")
        self._git(home.clone_url, "push", *options, f"{change.commit}:{ref}", cwd=change.clone)

    def _fetch(self, home: Repository, name: str, change: Change) -> None:
        """Bring a branch's commits into the clone; no ref is made."""
        options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules")
        self._git(home.clone_url, "fetch", *options, f"refs/heads/{name}", cwd=change.clone)

    def _git(self, url: str, command: str, *args: str, cwd: Path) -> None:
        """Run a git command with a remote; nobody but that remote is told the token."""
        check_remote("GitHub", url)
        said = base64.b64encode(f"x-access-token:{self._token.get_secret_value()}".encode())
        config = {
            f"http.{url}.extraHeader": f"Authorization: Basic {said.decode()}",
            "http.followRedirects": "false",
            # Somebody's own git configuration is not to push as somebody else.
            "credential.helper": "",
            f"url.{url}.insteadOf": url,
            f"url.{url}.pushInsteadOf": url,
            # Else a fork whose branches the clone does not know is sent everything.
            "push.negotiate": "true",
        }
        environment = {"GIT_ASKPASS": "", "GIT_CONFIG_COUNT": str(len(config))}
        for number, (key, value) in enumerate(config.items()):
            environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
        options = (command, *args[:-1], "--", url, args[-1])
        git(*options, cwd=cwd, env=environment)


def _nothing_new(upstream: Repository, post: Post, branch: Branch) -> NothingNewError:
    path = quote(str(next(iter(branch.files), "")))
    return NothingNewError(
        f"{post.repository}: has all of {post.title!r} already, there is nothing to open",
        f"{upstream.html_url}/blob/{upstream.default_branch}/{path}",
    )


def _title(post: Post) -> str:
    return post.title if len(post.title) <= _TITLE else f"{post.title[: _TITLE - 1]}…"


def _made(what: T) -> T:
    """Return what was made, if the answer was about it.

    Raises:
        ValueError: it was not; the client knows nothing then, and does not mind.
    """
    if not what.html_url:
        raise ValueError(f"no {type(what).__name__} is in it")
    return what


def _plain(text: str) -> str:
    """Return a text as it is before a browser has sent it."""
    return text.replace("\r\n", "\n").strip()


def _root(repository: Repository) -> str:
    """Return the name of what a repository is a fork of, at the end."""
    return (repository.source or repository).full_name


def _if_there(ask: Callable[[], U]) -> U | None:
    """Return what GitHub answers; None if it has no such thing, or nothing in it yet."""
    try:
        return ask()
    except GithubException as error:
        if error.status not in {404, 409}:
            raise
        return None


def _tip(repository: Repository, name: str) -> str:
    """Return a branch's commit; empty if there is no such branch."""
    branch = _if_there(lambda: repository.get_branch(name))
    return branch.commit.sha if branch else ""


def _others(upstream: Repository, home: Repository, branch: str) -> list[str]:
    """Return who has committed to a branch besides us; a merge adds nothing of its own."""
    main, head = upstream.default_branch, f"{home.owner.login}:{branch}"
    commits = _if_there(lambda: list(upstream.compare(main, head).commits))
    if commits is None:  # it has no commit in common with the repository
        return ["somebody"]
    people = (c.commit.committer for c in commits if len(c.parents) < 2)
    ours = AUTHOR["GIT_COMMITTER_EMAIL"]
    return list(dict.fromkeys(one_line(who.name) for who in people if who.email != ours))


def _require_base(upstream: Repository, change: Change) -> None:
    """Raise an error unless the change was made on a commit that the repository has."""
    main = upstream.default_branch
    status = _if_there(lambda: upstream.compare(main, change.base).status)
    if status not in {"identical", "behind"}:
        raise PublishError(
            f"{upstream.full_name}: commit {change.base[:12]} of {change.clone} is not on its "
            f"branch {main}; update the clone, or give it the repository as its remote"
        )


def _has_landed(pull: PullRequest, change: Change) -> bool:
    """Whether the change was made after the pull request was merged, and has something to add."""
    merged = pull.state != "open" and pull.merged_at is not None
    return merged and change.follows(pull.merge_commit_sha) and not change.is_empty


def _state_of_pull(pull: PullRequest) -> Upstream:
    state: Literal["open", "draft", "changes_requested", "merged", "rejected"] = "open"
    if pull.merged:
        state = "merged"
    elif pull.state == "closed":
        state = "rejected"
    elif _is_to_change(pull):
        state = "changes_requested"
    elif pull.draft:
        state = "draft"
    return Upstream(state=state, said=_words_about(pull), checked=datetime.now(UTC))


def _state_of_issue(issue: Issue) -> Upstream:
    state: Literal["open", "closed", "rejected"] = "open"
    if issue.state == "closed":
        # As it was told: an older server does not tell it, however often it is asked.
        unwanted = issue.raw_data.get("state_reason") == "not_planned"
        state = "rejected" if unwanted else "closed"
    return Upstream(state=state, said=_words_about(issue), checked=datetime.now(UTC))


def _is_to_change(pull: PullRequest) -> bool:
    """Whether a reviewer's last verdict is a request for changes."""
    deciding = {"APPROVED", "CHANGES_REQUESTED", "DISMISSED"}
    verdicts = {r.user.login: r.state for r in pull.get_reviews() if r.user and r.state in deciding}
    return "CHANGES_REQUESTED" in verdicts.values()


def _words_about(about: PullRequest | Issue) -> str | None:
    """Return what a person other than its author has said last."""
    said: list[tuple[datetime | None, Any, str | None]] = []
    if isinstance(about, PullRequest):
        said += [(r.submitted_at, r.user, r.body) for r in about.get_reviews()]
        said += [(c.created_at, c.user, c.body) for c in about.get_review_comments()]
        said += [(c.created_at, c.user, c.body) for c in about.get_issue_comments()]
    else:
        said += [(c.created_at, c.user, c.body) for c in about.get_comments()]
    author = about.user.login if about.user else ""
    theirs = [
        (when, words.strip())
        for when, who, words in said
        if when and words and words.strip() and who
        if who.login != author and who.type != "Bot"
    ]
    last = max(theirs, key=lambda pair: pair[0], default=None)
    return last[1][:_WORDS] if last else None


def _may_pass(error: Exception) -> bool:
    """Whether a call has perhaps taken effect, or would a little later."""
    if not isinstance(error, GithubException):
        return True
    # GitHub finds a branch a moment after it was pushed; what somebody was faster with is found.
    late = ("'field': 'head'", "already exists", "No commits between")
    return error.status >= 500 or (
        error.status == 422 and any(text in str(error.data) for text in late)
    )


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what clients raise into an error that names the repository and what to do."""
    try:
        yield
    except GitError as error:
        refused = ("error: 403", "could not read Username", "remote rejected")
        # The answer was lost and git's client sent it again, or somebody was faster.
        raced = "failed to update ref" in str(error)
        known = not raced and any(text in str(error) for text in refused)
        hint = _SCOPES if known else _AGAIN
        raise PublishError(f"{repository}: {error}; {hint}") from error
    except RequestException as error:
        reason = f"cannot be reached ({type(error).__name__})"
        raise PublishError(f"{repository}: GitHub {reason}; {_AGAIN}") from error
    except GithubException as error:
        raise PublishError(f"{repository}: {_reason(error)}") from error
    except OnboardError:
        raise
    except _ODD as error:
        odd = f"GitHub's answer is not understood ({type(error).__name__}: {one_line(error)})"
        raise PublishError(f"{repository}: {odd[:_WORDS]}; {_AGAIN}") from error


def _reason(error: GithubException) -> str:
    data = error.data if isinstance(error.data, dict) else {}
    errors = [e if isinstance(e, dict) else {"message": e} for e in data.get("errors") or ()]
    details = [e.get("message") or f"{e.get('field')} is {e.get('code')}" for e in errors]
    parts = [str(part) for part in (data.get("message"), *details) if part]
    said = one_line(": ".join(parts) or f"status {error.status}")[:_WORDS]
    if isinstance(error, RateLimitExceededException) or error.status == 429:
        return f"the token's requests are used up ({said}); {_AGAIN}"
    if isinstance(error, BadCredentialsException):
        return f"GitHub does not take the token ({said}); give another one (ONBOARD_GITHUB_TOKEN)"
    if error.status == 403:
        return f"the token may not do this ({said}); {_SCOPES}"
    if error.status == 404:
        return f"is not there, or the token may not see or do this ({said}); {_SCOPES}"
    if error.status >= 500:
        return f"GitHub fails ({said}); {_AGAIN}"
    return f"GitHub refuses it ({said})"
