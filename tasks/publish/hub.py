"""Dataset pull requests on the Hugging Face Hub, each opened exactly once.

A pull request is known by its author and the marker in its text, so nothing has to be remembered:
whoever publishes again, after whatever failure, finds it and sends what it still lacks. Processes
that share a folder of locks take turns with a definition.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar
from urllib.parse import quote

import httpx2
from filelock import FileLock, Timeout
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    Discussion,
    DiscussionComment,
    DiscussionCommit,
    DiscussionWithDetails,
    HfApi,
    RepoFile,
    RepoFolder,
    get_session,
    set_client_factory,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

# The library names what it exports in a way that mypy does not see.
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    disable_progress_bars,
    parse_ratelimit_headers,
)
from pydantic import SecretStr
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exception,
    wait_exponential_jitter,
)

from tasks import files
from tasks.errors import PublishError
from tasks.git import redact
from tasks.manifest import Upstream
from tasks.publish.base import (
    LARGEST_FILE,
    ODD_ANSWER,
    Branch,
    NothingNewError,
    Post,
    marker,
    text_of,
    titled,
)
from tasks.publish.markdown import one_line, scrubbed

INITIAL_COMMIT_SIZE = 250
"""Most files of a commit: where the library's own upload of folders begins (`_upload_pipeline`)."""
REGULAR_CONTENT_BYTES_BUDGET = 100 * 1024 * 1024
"""Most content of a commit, without what goes to large file storage; as in the library."""
_LARGE = ".safetensors"
"""What goes to large file storage whatever its size."""
_TIMEOUT = httpx2.Timeout(30, read=120)
"""Seconds; a commit of many files is answered when it is written."""
_PATHS = 250
"""Most paths of a question."""
_LOCK_SECONDS = 3600
_ATTEMPTS = 6
_LONGEST_WAIT = 300
"""Seconds: the Hub counts requests over five minutes."""
_MOST_SAID = 1000
_log = logging.getLogger(__name__)
_TITLE = re.compile(r"Add [^\s:]+(?:: .*)?")
"""How pull requests are titled (`titled`, and what they contain)."""

_State = Literal["open", "draft", "merged", "rejected"]
_STATES: Mapping[str, _State] = {
    "open": "open",
    "draft": "draft",
    "merged": "merged",
    "closed": "rejected",
}
_FAILURES = (httpx2.HTTPError, OSError, RuntimeError, *ODD_ANSWER)
"""What the library raises."""
_SET_UP = threading.Lock()
T = TypeVar("T")
_Operation = CommitOperationAdd | CommitOperationDelete


class GoneError(PublishError):
    """What was published is not where it was: it was deleted, or its repository has moved."""


class RejectedError(PublishError):
    """The pull request was closed without being merged; it is not opened anew."""


@dataclass(frozen=True)
class _Wanted:
    """What a pull request is to be."""

    post: Post
    text: str
    message: str
    """Of the commits after the first, which has the pull request's title."""
    left: dict[str, CommitOperationAdd]
    """By path, what is not known to be there. An operation knows its hash, and what of it is
    uploaded, so that nothing is done twice however often it is tried."""
    paths: frozenset[str]
    """Of all its files."""
    owned: tuple[str, ...]
    """Files and folders in which nothing else is to be."""


class HubPublisher:
    """Opens the pull requests of a dataset, and tells what has become of them."""

    def __init__(
        self, repository: str, token: SecretStr, endpoint: str | None, locks: Path
    ) -> None:
        """Say where to publish; nothing is asked yet.

        Args:
            repository: the dataset.
            token: with the right to open pull requests there.
            endpoint: the Hub; the public one if not given.
            locks: folder of the locks that keep processes apart.
        """
        self._repository = repository
        self._token = token
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self._locks = locks

    def open_pull_request(self, post: Post, branch: Branch) -> str:
        """Open the pull request, or find it and send what it lacks; return its URL.

        Raises:
            RejectedError: it was closed without being merged.
            NothingNewError: the repository has all of it.
            PublishError: something else is in the way; the message says what to do.
        """
        if post.repository != self._repository:
            raise PublishError(f"{post.key}: is for {post.repository}, not {self._repository}")
        text = text_of(_without_pictures(post))
        with self._held(post):
            wanted = _wanted(post, text, branch)
            return self._patiently(lambda: self._publish(wanted))

    def state_of(self, url: str) -> Upstream:
        """Return what has become of a pull request.

        Raises:
            GoneError: it was deleted, or the repository has moved.
            PublishError: the Hub cannot be asked, or it is no pull request of the repository.
        """
        where = f"{self._api.endpoint}/datasets/{self._repository}/discussions/"
        number = url.removeprefix(where)
        if not (number.isascii() and number.isdecimal()):
            raise PublishError(f"{url}: is no pull request of {self._repository} ({where}...)")
        pull = self._patiently(lambda: self._existing(url, int(number)))
        if not pull.is_pull_request or pull.status not in _STATES:
            raise PublishError(f"{url}: is {pull.status}, and no pull request as we know them")
        now = dt.datetime.now(dt.UTC)
        return Upstream(state=_STATES[pull.status], said=_said(pull), checked=now)

    @cached_property
    def _api(self) -> HfApi:
        with _SET_UP:
            _set_up()
        return HfApi(self._endpoint, self._token.get_secret_value())

    @cached_property
    def _place(self) -> str:
        """The repository, once it is known to be there: the client follows one that has moved."""
        info = self._api.dataset_info(self._repository, expand=["sha"])
        if info.id != self._repository:
            raise GoneError(
                f"{self._repository}: has moved to {info.id}; if that is where to publish, set it "
                "as publish.dataset (ONBOARD_PUBLISH__DATASET)"
            )
        return info.id

    @cached_property
    def _me(self) -> str:
        return str(self._api.whoami()["name"])

    @contextmanager
    def _held(self, post: Post) -> Iterator[None]:
        """Keep other processes from publishing the same; the kernel lets go when we die."""
        key = files.safe_name(post.key, "what is published")
        path = self._locks / f"{key}.{post.kind}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path, timeout=_LOCK_SECONDS):
                yield
        except Timeout as error:
            raise PublishError(
                f"{post.key}: another process has been publishing it for {_LOCK_SECONDS} s ({path})"
            ) from error
        except OSError as error:
            where = error.filename or path
            raise PublishError(f"{where}: cannot be opened ({error.strerror})") from error

    def _patiently(self, do: Callable[[], T]) -> T:
        """Do what can be done again without harm, until it works or trying is of no use."""
        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_exponential_jitter(max=60) + wait_exception(_seconds_asked_for),
            stop=stop_after_attempt(_ATTEMPTS),
            reraise=True,
        )
        try:
            return retrying(do)
        except _FAILURES as error:
            raise PublishError(f"{self._repository}: {self._explained(error)}") from error

    def _publish(self, wanted: _Wanted) -> str:
        ours = self._found(wanted.post)
        if waiting := [pull for pull in ours if pull.status in {"open", "draft"}]:
            return self._complete(waiting[-1], wanted)
        latest = ours[0] if ours else None
        if latest and latest.status == "closed":
            said = _said(latest)
            because = f' after "{one_line(said)}"' if said else ""
            raise RejectedError(
                f"{wanted.post.key}: {latest.url} was closed without being merged{because}; it is "
                "not opened anew. Reopen it and publish again to go on with it, or take the line "
                "`<!-- onboard:... -->` out of its text to publish another one"
            )
        there = self._on_main(wanted)
        if opened := self._send(wanted, None):
            return opened
        if latest:
            return latest.url
        raise NothingNewError(
            f"{wanted.post.key}: {self._place} has all of its files already", there
        )

    def _on_main(self, wanted: _Wanted) -> str:
        """Return where the repository has the first of the files."""
        path = quote(next(iter(wanted.left), ""))
        return f"{self._api.endpoint}/datasets/{self._place}/blob/main/{path}"

    def _found(self, post: Post) -> list[DiscussionWithDetails]:
        """Return our pull requests with the post's marker, newest first."""
        listed = self._api.get_repo_discussions(
            self._place,
            author=self._me,
            discussion_type="pull_request",
            discussion_status="all",
            repo_type="dataset",
        )
        numbers = [pull.num for pull in listed if _may_be(pull, post)]
        pulls = [self._details(number) for number in sorted(numbers, reverse=True)]
        mark = marker(post.key, post.kind)
        return [pull for pull in pulls if (text := _text(pull)) and mark in text.content]

    def _details(self, number: int) -> DiscussionWithDetails:
        return self._api.get_discussion_details(self._place, number, repo_type="dataset")

    def _existing(self, url: str, number: int) -> DiscussionWithDetails:
        place = self._place
        try:
            return self._details(number)
        except HfHubHTTPError as error:
            if error.response.status_code in {404, 410}:
                raise GoneError(f"{url}: {place} has no such pull request any more") from error
            raise

    def _complete(self, pull: DiscussionWithDetails, wanted: _Wanted) -> str:
        """Let an open pull request have everything, and no more.

        One that has is left as people left it, and so is one that others have committed to.
        """
        revision = f"refs/pr/{pull.num}"
        gone = self._compare(wanted, revision)
        if not wanted.left and not gone:
            return pull.url
        if others := sorted(self._others(pull, wanted.post)):
            _log.warning("%s: left to %s", pull.url, one_line(", ".join(others)))
            return pull.url
        self._tell(pull, wanted)
        self._send(wanted, revision, gone)
        return pull.url

    def _others(self, pull: DiscussionWithDetails, post: Post) -> set[str]:
        """Return who has committed to a pull request besides us, perhaps with our account."""
        commits = (event for event in pull.events if isinstance(event, DiscussionCommit))
        ours = titled(post.key)
        return {
            commit.author
            for commit in commits
            if commit.author != self._me or not commit.summary.startswith(ours)
        }

    def _compare(self, wanted: _Wanted, revision: str) -> tuple[CommitOperationDelete, ...]:
        """Forget of what is left what a pull request has.

        Returns:
            What removes the files that it alone has, from an earlier version.
        """
        asked = dict.fromkeys((*wanted.left, *wanted.owned))
        extra = []
        for path, file in self._files_at(tuple(asked), revision).items():
            if path in wanted.left and _is_same(wanted.left[path], file):
                del wanted.left[path]
            elif path not in wanted.paths:
                extra.append(path)
        kept = self._files_at(extra, "main")
        return tuple(CommitOperationDelete(path) for path in extra if path not in kept)

    def _files_at(self, paths: Sequence[str], revision: str) -> dict[str, RepoFile]:
        """Return the files that are there, and those in the folders that are, by path."""
        found: dict[str, RepoFile] = {}
        for start in range(0, len(paths), _PATHS):
            for entry in self._api.get_paths_info(
                self._place,
                list(paths[start : start + _PATHS]),
                revision=revision,
                repo_type="dataset",
            ):
                inside = [entry] if isinstance(entry, RepoFile) else self._tree(entry, revision)
                found |= {file.path: file for file in inside if isinstance(file, RepoFile)}
        return found

    def _tree(self, folder: RepoFolder, revision: str) -> Iterable[RepoFile | RepoFolder]:
        return self._api.list_repo_tree(
            self._place, folder.path, recursive=True, revision=revision, repo_type="dataset"
        )

    def _tell(self, pull: DiscussionWithDetails, wanted: _Wanted) -> None:
        """Let title and text say what is about to be sent."""
        title, told = wanted.post.title, _text(pull)
        if pull.title != title:
            self._api.rename_discussion(self._place, pull.num, new_title=title, repo_type="dataset")
        if told and told.content.strip() != wanted.text.strip():
            self._api.edit_discussion_comment(
                self._place, pull.num, told.id, new_content=wanted.text, repo_type="dataset"
            )

    def _send(
        self,
        wanted: _Wanted,
        revision: str | None,
        gone: tuple[CommitOperationDelete, ...] = (),
    ) -> str | None:
        """Commit what is left, and what goes, to a pull request, or to a new one if none is given.

        Returns:
            The URL of the new one; the client makes none for files that are all on main.
        """
        url = None
        subject, _, body = wanted.message.partition("\n\n")
        for part in _parts((*wanted.left.values(), *gone)):
            new = revision is None
            made = self._api.create_commit(
                self._place,
                part,
                commit_message=wanted.post.title if new else subject,
                commit_description=wanted.text if new else body,
                repo_type="dataset",
                revision=revision,
                create_pr=new,
            )
            if new:
                url, revision = made.pr_url, made.pr_revision
            for operation in part:
                wanted.left.pop(operation.path_in_repo, None)
        return url

    def _explained(self, error: Exception) -> str:
        """Return what went wrong, and what to do about it."""
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        given = "the token (ONBOARD_HF_TOKEN, or the Secret block hf-token)"
        if isinstance(error, GatedRepoError):
            return "is gated; accept its terms on the Hub with the account that the token is of"
        if isinstance(error, RepositoryNotFoundError):
            return f"does not exist, or {given} may not see it; set publish.dataset to one that is"
        if status == httpx2.codes.UNAUTHORIZED:
            return f"the Hub does not accept {given}; set a valid one"
        if status == httpx2.codes.FORBIDDEN:
            return (
                f"{given} may not open pull requests there; it needs the type `write`, or "
                f"fine-grained the right to open them ({self._shown(error)})"
            )
        return f"{self._shown(error)}; publishing again goes on where this ended"

    def _shown(self, error: Exception) -> str:
        """Return an error's text, without what may be secret in it or in an address."""
        # A failed upload is wrapped by the library.
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        if isinstance(error, HfHubHTTPError):
            text = f"HTTP {error.response.status_code}, {error.server_message or 'nothing said'}"
        elif isinstance(cause, Exception):
            text = f"{error} {self._shown(cause)}"
        else:
            text = f"{type(error).__name__}: {error}"
        secrets = (self._token.get_secret_value(),)
        return one_line(scrubbed(redact(text), secrets, {}))[:_MOST_SAID]


@cache
def _set_up() -> None:
    """Let the library's client wait no longer than `_TIMEOUT`, and be silent.

    Its own waits for ever, and logs the addresses of uploads, which are their permissions.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    disable_progress_bars()
    hooks = {"request": [*get_session().event_hooks["request"], _limit]}
    set_client_factory(
        lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None)
    )


def _limit(request: httpx2.Request) -> None:
    """Limit how long a request takes; those that the library limits itself are as they are.

    A client's own limit would not do: some of the library's requests ask for none.
    """
    given = request.extensions.get("timeout", {})
    asked = {part: seconds for part, seconds in given.items() if seconds is not None}
    request.extensions["timeout"] = {**_TIMEOUT.as_dict(), **asked}


def _may_pass(error: BaseException) -> bool:
    """Whether an error is of the network, of a busy Hub, or of somebody who was faster."""
    cause = error.__cause__ if isinstance(error, RuntimeError) else error
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        return status in {408, 412, 429} or status >= httpx2.codes.INTERNAL_SERVER_ERROR
    return isinstance(cause, (httpx2.TransportError, ConnectionError))


def _seconds_asked_for(error: BaseException) -> float:
    """Return how long the Hub asks to wait."""
    if not isinstance(error, HfHubHTTPError):
        return 0
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    said = headers.get("Retry-After", "")
    seconds = int(said) if said.isdecimal() else 0
    if limit and limit.remaining == 0:
        seconds = max(seconds, limit.reset_in_seconds)
    return min(seconds, _LONGEST_WAIT)


def _without_pictures(post: Post) -> Post:
    """Return a post whose text shows no pictures: the Hub shows only those that it has."""
    shown = tuple(f"]({name})" for name in post.pictures)
    lines = [line for line in post.body.split("\n") if not (shown and line.endswith(shown))]
    return replace(post, body="\n".join(lines))


def _may_be(pull: Discussion, post: Post) -> bool:
    """Whether a pull request of ours is perhaps the post's: somebody may have changed its title.

    Only one that still has the title of another definition is none.
    """
    title = pull.title
    return title == post.title or post.key in title or not _TITLE.fullmatch(title)


def _wanted(post: Post, text: str, branch: Branch) -> _Wanted:
    """Return what a pull request is to be; no file is read if one cannot be published.

    Raises:
        PublishError: a path leads out of the repository, or a file cannot be published.
        InputError: a file's folder leads out of the clone.
    """
    for path, source in branch.files.items():
        _check_path(path)
        _check_source(source.absolute(), branch.clone.absolute())
    left = {
        str(path): CommitOperationAdd(str(path), source.absolute())
        for path, source in branch.files.items()
    }
    owned = tuple(map(str, branch.owned))
    return _Wanted(post, text, branch.message, left, frozenset(left), owned)


def _check_path(path: PurePosixPath) -> None:
    text = str(path)
    wrong = not path.parts or path.is_absolute() or {"..", ".git"} & {*path.parts}
    if wrong or "\\" in text or not text.isprintable():
        raise PublishError(f"{text!r}: cannot be a file of the repository")


def _check_source(source: Path, clone: Path) -> None:
    try:
        found = source.lstat()
    except OSError as error:
        raise PublishError(f"{source}: cannot be published ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise PublishError(f"{source}: is no regular file; links and folders are not published")
    if found.st_size > LARGEST_FILE:
        raise PublishError(
            f"{source}: has {found.st_size} bytes; no more than {LARGEST_FILE} are published"
        )
    if source.is_relative_to(clone):
        files.check_inside(clone, source.relative_to(clone).parent)


def _parts(operations: Iterable[_Operation]) -> Iterator[list[_Operation]]:
    """Divide operations into those of one commit each."""
    part: list[_Operation] = []
    content = 0
    for operation in operations:
        size = _content_of(operation)
        full = len(part) == INITIAL_COMMIT_SIZE or content + size > REGULAR_CONTENT_BYTES_BUDGET
        if part and full:
            yield part
            part, content = [], 0
        part.append(operation)
        content += size
    if part:
        yield part


def _content_of(operation: _Operation) -> int:
    """Return how many bytes of a commit an operation takes."""
    if isinstance(operation, CommitOperationDelete) or operation.path_in_repo.endswith(_LARGE):
        return 0
    return int(operation.upload_info.size)


def _is_same(operation: CommitOperationAdd, file: RepoFile) -> bool:
    """Whether a file of the Hub is the one that an operation adds."""
    if file.size != operation.upload_info.size:
        return False
    if file.lfs:
        return file.lfs.sha256 == operation.upload_info.sha256.hex()
    with operation.as_file() as stream:
        content = stream.read()
    blob = b"blob %d\0" % len(content) + content
    return file.blob_id == hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def _comments(pull: DiscussionWithDetails) -> Iterator[DiscussionComment]:
    return (event for event in pull.events if isinstance(event, DiscussionComment))


def _text(pull: DiscussionWithDetails) -> DiscussionComment | None:
    """Return a pull request's text, which is its first comment."""
    return next(_comments(pull), None)


def _said(pull: DiscussionWithDetails) -> str | None:
    """Return the last words of anybody but the author."""
    words = [
        comment.content.strip()
        for comment in _comments(pull)
        if comment.author != pull.author and not comment.hidden
    ]
    return words[-1][:_MOST_SAID] if words else None
