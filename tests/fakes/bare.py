"""Real bare git repositories behind a fake server, and git's own HTTP server in front of them."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.git import AUTHOR, GitError, git, run
from tests.fakes.web import Answer, Request


@dataclass(frozen=True)
class Entry:
    """An entry of a tree."""

    mode: str
    kind: str
    sha: str
    path: str


@dataclass(frozen=True)
class Bare:
    """A bare repository in a folder."""

    path: Path

    def git(self, *args: str, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> str:
        return git(*args, cwd=self.path, stdin=stdin, env=AUTHOR | dict(env or {}))

    @classmethod
    def made(cls, path: Path, content: Mapping[str, bytes] | Path) -> Bare:
        """Make a repository with one commit on `main`, or with the branches of another."""
        if isinstance(content, Path):
            git("clone", "--quiet", "--bare", str(content), str(path))
            return cls(path)
        git("init", "--quiet", "--bare", "--initial-branch=main", str(path))
        made = cls(path)
        made.commit("main", content, "Initial commit")
        return made

    def sha(self, revision: str, kind: str = "commit") -> str:
        """Return an object's name; empty if there is none."""
        try:
            return self.git("rev-parse", "--verify", "--quiet", f"{revision}^{{{kind}}}")
        except GitError:
            return ""

    def refs(self, prefix: str) -> dict[str, str]:
        """Return the references whose name begins so."""
        listed = self.git("for-each-ref", "--format=%(objectname) %(refname)").splitlines()
        pairs = (line.split(" ", 1) for line in listed)
        return {name: sha for sha, name in pairs if name.startswith(prefix)}

    def update(self, ref: str, sha: str) -> None:
        self.git("update-ref", ref, sha)

    def read(self, sha: str) -> bytes:
        return run("cat-file", "blob", sha, cwd=self.path)

    def write(self, content: bytes) -> str:
        return self.git("hash-object", "-w", "--stdin", stdin=content)

    def tree(self, revision: str, *options: str, path: str = "") -> list[Entry]:
        """List a tree, or its entry at a path."""
        only = ["--", path] if path else []
        listed = self.git("ls-tree", "-z", *options, revision, *only)
        entries = []
        for row in filter(None, listed.split("\0")):
            head, path = row.split("\t", 1)
            mode, kind, sha = head.split(" ")
            entries.append(Entry(mode, kind, sha, path))
        return entries

    def write_tree(self, base: str, entries: Iterable[tuple[str, str, str]]) -> str:
        """Write a tree: another one with some entries (mode, sha, path) changed."""
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
            self.git("read-tree", base or "--empty", env=index)
            lines = "".join(f"{mode} {sha}\t{path}\n" for mode, sha, path in entries)
            self.git("update-index", "--add", "--index-info", stdin=lines.encode(), env=index)
            return self.git("write-tree", env=index)

    def commit_tree(self, tree: str, parents: Iterable[str], message: str) -> str:
        options = [option for parent in parents for option in ("-p", parent)]
        return self.git("commit-tree", tree, *options, "-m", message)

    def commit(self, branch: str, files: Mapping[str, bytes], message: str) -> str:
        """Commit files to a branch."""
        parent = self.sha(f"refs/heads/{branch}")
        entries = [("100644", self.write(content), path) for path, content in files.items()]
        made = self.commit_tree(self.write_tree(parent, entries), filter(None, [parent]), message)
        self.update(f"refs/heads/{branch}", made)
        return made

    def merged(self, ours: str, theirs: str) -> str:
        """Return the tree of a merge; empty if there are conflicts."""
        try:
            return self.git("merge-tree", "--write-tree", ours, theirs)
        except GitError:
            return ""

    def commits(self, base: str, head: str) -> list[str]:
        """Return what one commit has that another lacks, the oldest first."""
        return self.git("rev-list", "--reverse", head, f"^{base}").split()

    def changed(self, base: str, head: str) -> list[tuple[str, str]]:
        """Return status and path of the files that two commits differ in."""
        listed = self.git("diff-tree", "-r", "--no-renames", "--name-status", base, head)
        names = {"A": "added", "D": "removed", "M": "modified"}
        rows = (line.split("\t", 1) for line in listed.splitlines())
        return [(names.get(status, "changed"), path) for status, path in rows]


def serve(root: Path, path: str, request: Request, user: str) -> Answer:
    """Let git's own CGI program answer; whom it knows by name may push."""
    environment = {
        "PATH": os.environ["PATH"],
        "GIT_PROJECT_ROOT": str(root),
        "GIT_HTTP_EXPORT_ALL": "1",
        "GIT_CONFIG_NOSYSTEM": "1",
        "HOME": str(root),
        "PATH_INFO": path,
        "QUERY_STRING": request.target.partition("?")[2],
        "REQUEST_METHOD": request.method,
        "CONTENT_TYPE": request.headers.get("content-type", ""),
        "CONTENT_LENGTH": str(len(request.body)),
        "HTTP_CONTENT_ENCODING": request.headers.get("content-encoding", ""),
        "GIT_PROTOCOL": request.headers.get("git-protocol", ""),
        "REMOTE_USER": user,
    }
    environment = {name: value for name, value in environment.items() if value}
    done = subprocess.run(
        ["git", "http-backend"],
        input=request.body,
        env=environment,
        capture_output=True,
        check=True,
    )
    head, _, body = done.stdout.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().splitlines())
    status = int(headers.pop("Status", "200 OK").split()[0])
    return Answer(status, body, headers)
