"""The commit behind a branch, written by git's plumbing: no work tree is touched."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tasks.errors import PublishError
from tasks.git import AUTHOR, GitError, git
from tasks.publish.base import Branch

_FILE, _EXECUTABLE = "100644", "100755"


def write_commit(branch: Branch, repository: Path, tip: str = "") -> str:
    """Write the commit that a branch is to point to; no ref is moved.

    Its tree is that of the branch's base with its files, so that a file no longer
    published does not stay behind. The same files on the same commits give the same commit
    whenever it is written, so a push that is made again pushes nothing new.

    Args:
        branch: what it contains.
        repository: where it is written: the clone, or a repository that has the clone's commit.
        tip: the commit that the branch points to already; the new one goes on top of it.

    Returns:
        The commit; `tip` itself if that has the same tree.

    Raises:
        PublishError: a file cannot be read, or git refuses a path.
    """
    try:
        base = git("rev-parse", branch.base, cwd=branch.clone)
        tree = _tree(branch, base, repository)
        if tip and git("rev-parse", f"{tip}^{{tree}}", cwd=repository) == tree:
            return tip
        parent = tip or base
        when = git("show", "--no-patch", "--format=%cI", parent, cwd=repository)
        author = AUTHOR | {"GIT_AUTHOR_DATE": when, "GIT_COMMITTER_DATE": when}
        message = ("-m", branch.message)
        return git("commit-tree", tree, "-p", parent, *message, cwd=repository, env=author)
    except GitError as error:
        raise PublishError(f"branch {branch.name}: {error}") from error


def _tree(branch: Branch, base: str, repository: Path) -> str:
    """Write the tree of `base` with the branch's files."""
    sources = "".join(f"{source.absolute()}\n" for source in branch.files.values())
    write = ("hash-object", "-w", "--no-filters", "--stdin-paths")
    hashes = git(*write, cwd=repository, stdin=sources.encode()).splitlines()
    known = _modes(base, repository)
    entries = {
        str(path): f"{known.get(str(path), _FILE)} {digest}\t{path}\0"
        for path, digest in zip(branch.files, hashes, strict=True)
    }
    with tempfile.TemporaryDirectory(prefix="onboard-index-") as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        git("read-tree", base, cwd=repository, env=index)
        add = ("update-index", "-z", "--add", "--index-info")
        git(*add, cwd=repository, stdin="".join(entries.values()).encode(), env=index)
        # Git passes over what it does not take (`../a`), and lets a file replace a folder.
        found = git("ls-files", "-z", cwd=repository, env=index)
        wrong = {*known, *entries} ^ set(found.rstrip("\0").split("\0"))
        if wrong:
            raise PublishError(f"branch {branch.name}: {min(wrong)!r} cannot be a file in it")
        # A blobless clone lacks the blobs of files nobody touches.
        return git("write-tree", "--missing-ok", cwd=repository, env=index)


def _modes(base: str, repository: Path) -> dict[str, str]:
    """Return the modes of the files of `base`, but no link: what is published is files."""
    listed = git("ls-tree", "-r", "-z", "--full-tree", base, cwd=repository)
    facts = (entry.partition("\t") for entry in listed.split("\0") if entry)
    return {path: _EXECUTABLE if mode.startswith(_EXECUTABLE) else _FILE for mode, _, path in facts}
