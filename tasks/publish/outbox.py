"""The outbox: everything that would be published, on local git remotes and as files.

`outbox/` is a git repository whose log has one commit per published thing, with the rendered titles
and bodies as files, what a branch changes, and a script that sends it. `outbox/remotes/*.git` are
bare repositories that receive the branches.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from tasks import files
from tasks.errors import PublishError
from tasks.git import AUTHOR, GitError, git
from tasks.publish.base import Branch, Post, text_of
from tasks.publish.branch import write_commit
from tasks.publish.by_hand import script

_LOCK_SECONDS = 120
_FOLDERS = {
    "dataset": "pull-requests",
    "coverage": "pull-requests",
    "sglang": "pull-requests",
    "kernel-request": "issues",
    "template-request": "issues",
}
_BY_HAND = "by-hand"
"""Where SGLang's pull requests are that only a person can begin."""


def can_be_sent(url: str) -> bool:
    """Return whether an entry is complete, and not what a person has to write first."""
    return f"/{_BY_HAND}/" not in url


class Outbox:
    """Publishes into a folder of the workspace."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open_pull_request(self, post: Post, branch: Branch) -> str:
        """Commit the branch to the local remote and keep the rendered pull request."""
        with self._locked():
            return self._record(post, branch, self._publish_branch(post.repository, branch))

    def open_issue(self, post: Post) -> str:
        """Keep the rendered issue."""
        with self._locked():
            return self._record(post)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the outbox; the kernel releases it when its holder dies."""
        files.write_text(self._root / ".gitignore", "/remotes/\n/.lock\n")
        try:
            with FileLock(self._root / ".lock", timeout=_LOCK_SECONDS):
                yield
        except Timeout as error:
            raise PublishError(f"{self._root}: locked for {_LOCK_SECONDS} s") from error

    def _record(self, post: Post, branch: Branch | None = None, commit: str = "") -> str:
        folder = _BY_HAND if branch is None and post.kind == "sglang" else _FOLDERS[post.kind]
        head = {"repository": post.repository, "title": post.title}
        if post.labels:
            head |= {"labels": ", ".join(post.labels)}
        if post.asked_for:
            head |= {"asked_for": post.asked_for}
        if post.draft:
            head |= {"draft": "yes"}
        where = {"branch": branch.name, "commit": commit} if branch else {}
        facts = yaml.safe_dump({**head, **where}, sort_keys=False, allow_unicode=True, width=999)
        text = f"---\n{facts}---\n{text_of(post)}"
        name = files.safe_name(post.key, "outbox entry")
        path = self._root / folder / f"{name}.{post.kind}.md"
        try:
            if not (self._root / ".git").exists():
                git("init", "--quiet", "--initial-branch=main", str(self._root))
            # We hold the outbox's lock: a lock file of git's own is left from a killed run.
            (self._root / ".git" / "index.lock").unlink(missing_ok=True)
            ours = ["--", ".gitignore", str(path.relative_to(self._root))]
            if not _is_anothers(path, post.asked_for):
                for shown, picture in post.pictures.items():
                    copy = path.with_name(files.safe_name(shown, "picture"))
                    files.write_bytes(copy, picture.read_bytes())
                    ours.append(str(copy.relative_to(self._root)))
                for beside, content in self._beside(post, branch, commit, path).items():
                    files.write_text(beside, content)
                    ours.append(str(beside.relative_to(self._root)))
                files.write_text(path, text)
            git("add", *ours, cwd=self._root)
            if git("status", "--porcelain", *ours, cwd=self._root):
                message = f"{post.kind}: {post.title}"
                git("commit", "--quiet", "-m", message, *ours, cwd=self._root, env=AUTHOR)
        except GitError as error:
            raise PublishError(f"{self._root}: {error}") from error
        return path.as_uri()

    def _beside(
        self, post: Post, branch: Branch | None, commit: str, entry: Path
    ) -> dict[Path, str]:
        """Return the files beside an entry: what its branch changes, and what sends it by hand."""
        remote = self._bare(post.repository)
        text, where = (str(path.relative_to(self._root)) for path in (entry, remote))
        found = {entry.with_suffix(".sh"): script(post, branch, text, where)}
        if branch:
            base = git("rev-parse", branch.base, cwd=branch.clone)
            changes = git("diff", "--no-ext-diff", base, commit, cwd=remote)
            found[entry.with_suffix(".diff")] = f"{changes}\n"
        return found

    def _bare(self, repository: str) -> Path:
        return self._root / "remotes" / f"{repository.rpartition('/')[2]}.git"

    def _remote(self, repository: str, clone: Path) -> Path:
        """Return the bare repository for a target, whose `main` is the clone's commit.

        It reads upstream's objects from the clone, so that it costs nothing and needs no network;
        what is published is in the bare repository alone.
        """
        path = self._bare(repository)
        if path.exists():
            return path
        unfinished = path.with_name(f".{path.name}.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        git("init", "--quiet", "--bare", "--initial-branch=main", str(unfinished))
        objects = git("rev-parse", "--path-format=absolute", "--git-path", "objects", cwd=clone)
        files.write_text(unfinished / "objects" / "info" / "alternates", f"{objects}\n")
        git("update-ref", "refs/heads/main", git("rev-parse", "HEAD", cwd=clone), cwd=unfinished)
        unfinished.rename(path)
        return path

    def _publish_branch(self, repository: str, branch: Branch) -> str:
        """Let the remote's branch point to the commit of its files; an equal one is left alone."""
        try:
            remote = self._remote(repository, branch.clone)
            ref = f"refs/heads/{branch.name}"
            tip = git("for-each-ref", "--format=%(objectname)", ref, cwd=remote)
            commit = write_commit(branch, remote, tip)
            if commit != tip:
                git("update-ref", ref, commit, tip, cwd=remote)
        except GitError as error:
            raise PublishError(f"branch {branch.name} for {repository}: {error}") from error
        return commit


def _is_anothers(path: Path, asked_for: str) -> bool:
    """Whether an issue was opened for somebody else, whose text stays as it is."""
    if not asked_for or not path.exists():
        return False
    _, head, _ = files.read_text(path, "the outbox entry").split("---\n", 2)
    return bool(yaml.safe_load(head).get("asked_for", asked_for) != asked_for)
