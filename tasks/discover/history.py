"""What changed in a clone since a day, from its git history.

Two commits are compared, the newest and the one that was the newest on that day: what came and went
in between is not news, and renames are found whichever commit made them. Everything is read with
NUL-separated formats, so that no file name can be taken for something else.
"""

from __future__ import annotations

import datetime as dt
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks import git
from tasks.errors import InputError

_SECONDS = 120
_REGULAR = ("100644", "100755")


def parse_since(text: str, now: dt.datetime) -> dt.datetime:
    """Return the time that `30d`, `2w` or `2026-10-01` (midnight, UTC) means.

    Raises:
        InputError: it is none of these, or not in the past.
    """
    span = re.fullmatch(r"([0-9]{1,4})([dw])", text)
    if span:
        since = now - dt.timedelta(days=int(span[1]) * (7 if span[2] == "w" else 1))
    else:
        try:
            since = dt.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=dt.UTC)
        except ValueError as error:
            raise InputError(f"--since: {text!r} is not 30d, 2w or a day, 2026-10-01") from error
    if since >= now:
        raise InputError(f"--since: {text!r} is not in the past")
    return max(since, dt.datetime(1970, 1, 2, tzinfo=dt.UTC))


@dataclass(frozen=True)
class Commit:
    """A commit's SHA and the day it was made."""

    sha: str
    date: str


@dataclass(frozen=True)
class Change:
    """A file that differs between the two ends of a window."""

    kind: str
    """git's letter: A, C, D, M, R, T."""
    path: str
    source: str | None
    """What it was renamed or copied from."""
    regular: bool
    old_blob: str
    new_blob: str


@dataclass(frozen=True)
class Window:
    """A clone's history from a day to its HEAD."""

    repository: Path
    base: str
    """The commit that was the newest on that day; the empty tree where there was none."""
    span: str
    """The commits since, as `git log` takes them."""
    warning: str | None = None
    """Why the window is shorter than asked for."""

    def _git(self, *args: str, stdin: bytes = b"") -> bytes:
        return git_in(self.repository, *args, stdin=stdin)

    def changes(self, folder: str) -> tuple[list[Change], str | None]:
        """Return what changed in a folder, with renames and copies found by git.

        In a clone without all blobs, comparing contents may need the remote; where that fails only
        exact renames are found, and the second value says so.
        """
        compare = ("diff-tree", "-r", "-z", "--raw", "--no-abbrev", "-l2000")
        ends = (self.base, "HEAD", "--", folder)
        try:
            return list(_changes(self._git(*compare, "-M", "-C", *ends))), None
        except git.GitError as error:
            raw = self._git(*compare, "-M100%", "-C100%", *ends)
            return list(_changes(raw)), f"{self.repository}: only exact renames known ({error})"

    def commits(self, folder: str, *, added: bool = False) -> dict[str, Commit]:
        """Return path -> the newest commit on the main line that changed, or added, it."""
        kinds = ["--diff-filter=A"] if added else []
        logged = self._git(
            *("log", "-z", "--no-show-signature", "--root", "--first-parent", "-m"),
            *("--raw", "--no-abbrev", "--no-renames", *kinds, "--format=%x01%H %cs"),
            *(self.span, "--", folder),
        )
        found: dict[str, Commit] = {}
        commit = Commit("", "")
        tokens = iter(logged.split(b"\0"))
        for token in tokens:
            line = token.removeprefix(b"\n")
            if line.startswith(b"\x01"):
                sha, _, date = line[1:].decode().partition(" ")
                commit = Commit(sha, date)
            elif line.startswith(b":"):
                found.setdefault(os.fsdecode(next(tokens)), commit)
        return found

    def files(self, folder: str, *, before: bool = False) -> dict[str, str]:
        """Return path -> blob of the regular files below a folder, at HEAD or at the base."""
        commit = self.base if before else "HEAD"
        found = {}
        for entry in self._git("ls-tree", "-r", "-z", commit, "--", folder).split(b"\0"):
            about, _, path = entry.partition(b"\t")
            mode, _, blob = about.decode().partition(" blob ")
            if mode in _REGULAR:
                found[os.fsdecode(path)] = blob
        return found

    def read(self, blobs: Collection[str], max_bytes: int) -> dict[str, bytes]:
        """Return the contents of blobs, without those that are larger.

        Raises:
            GitError: the clone lacks some, and the remote cannot be reached.
        """
        wanted = "".join(f"{blob}\n" for blob in sorted(set(blobs))).encode()
        sizes = [
            line.split()
            for line in self._git("cat-file", "--batch-check", stdin=wanted).split(b"\n")
        ]
        small = [about[0] for about in sizes if len(about) == 3 and int(about[2]) <= max_bytes]
        rest = self._git("cat-file", "--batch", stdin=b"".join(blob + b"\n" for blob in small))
        found = {}
        while rest:
            about, _, rest = rest.partition(b"\n")
            blob, _, size = about.split()
            found[blob.decode()], rest = rest[: int(size)], rest[int(size) + 1 :]
        return found


def git_in(repository: Path, *args: str, stdin: bytes = b"") -> bytes:
    """Run git in a clone, which must be a repository of its own, and return its output.

    Raises:
        GitError: see `git.run`.
    """
    # Without the ceiling, a folder inside some other repository would be taken for that one.
    ceiling = {"GIT_CEILING_DIRECTORIES": str(repository.resolve().parent)}
    return git.run(*args, cwd=repository, stdin=stdin, env=ceiling, timeout=_SECONDS)


def _changes(raw: bytes) -> Iterator[Change]:
    tokens = iter(raw.split(b"\0"))
    for token in tokens:
        if not token.startswith(b":"):
            continue
        _, mode, old, new, kind = token[1:].decode().split(" ")
        first = os.fsdecode(next(tokens))
        moved = kind[0] in "RC"
        yield Change(
            kind=kind[0],
            path=os.fsdecode(next(tokens)) if moved else first,
            source=first if moved else None,
            regular=mode in _REGULAR,
            old_blob=old,
            new_blob=new,
        )


def open_window(repository: Path, since: dt.datetime) -> Window:
    """Return a clone's history since a time.

    Raises:
        InputError: the folder is no git repository, or has no commit.
    """
    if not repository.is_dir():
        raise InputError(f"{repository}: is not a folder; clone it first")
    try:
        shallow = git_in(repository, "rev-parse", "--is-shallow-repository").strip() == b"true"
    except git.GitError as error:
        raise InputError(f"{repository}: is not a git repository ({error})") from error
    line = ("rev-list", "--first-parent")
    try:
        git_in(repository, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except git.GitError as error:
        raise InputError(f"{repository}: has no commit") from error
    before = f"--min-age={int(since.timestamp())}"
    base = git_in(repository, *line, "-1", before, "HEAD").decode().strip()
    if base:
        return Window(repository, base, f"{base}..HEAD")
    if not shallow:
        empty = git_in(repository, "hash-object", "-t", "tree", "--stdin").decode().strip()
        return Window(repository, empty, "HEAD")
    oldest = git_in(repository, *line, "HEAD").decode().split()[-1]
    date = git_in(repository, "log", "-1", "--no-show-signature", "--format=%cs", oldest)
    return Window(
        repository,
        oldest,
        f"{oldest}..HEAD",
        f"{repository}: a shallow clone; what changed before {date.decode().strip()} is not known",
    )
