"""Clone or update one source repository.

Clones are blobless and without submodules: phase 1 reads sources and builds nothing. An update that
fails leaves the clone as it was, and the commit in hand is used with a warning.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tasks import git
from tasks.errors import InputError, RemoteError

PHASE0 = ("sglang", "flashinfer", "sgl_cookbook", "flashinfer_trace")
"""The four repositories whose SHAs the manifest records."""


@dataclass(frozen=True)
class Checkout:
    """A repository at a commit."""

    name: str
    path: Path
    sha: str
    """Short SHA of the commit that is checked out."""
    moved: bool
    """Whether this update cloned it or moved it to another commit."""
    warning: str | None = None
    """Why the remote's newest commit is not the one checked out."""


def _as_url(remote: str) -> str:
    """Return a local path as a URL: git ignores a clone's filter for plain paths."""
    return Path(remote).as_uri() if Path(remote).is_absolute() else remote


def _clone(name: str, url: str, path: Path) -> None:
    # A name of its own: a git that outlived a killed run may still write to the last one.
    for stale in path.parent.glob(f".{path.name}.cloning-*"):
        shutil.rmtree(stale, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.cloning-"))
    try:
        git.git(
            "clone",
            "--quiet",
            "--filter=blob:none",
            "--no-recurse-submodules",
            "--",
            _as_url(url),
            str(unfinished),
        )
        git.git("rev-parse", "--verify", "--quiet", "HEAD^{commit}", cwd=unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(path)
    except git.GitError as error:
        raise RemoteError(
            f"remote {name}: {git.redact(url)} cannot be cloned and {path} does not exist "
            f"({error}); set it with ONBOARD_REMOTES__{name.upper()} or in onboard.toml"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _make_way(path: Path, name: str) -> None:
    """Let a staged file that was merged upstream give way; one that differs is kept elsewhere."""
    ours = git.git("hash-object", "--no-filters", "--", name, cwd=path)
    if ours != git.git("rev-parse", f"FETCH_HEAD:{name}", cwd=path):
        kept = path.parent / "superseded" / path.name / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path / name, kept)
    (path / name).unlink()


def _advance(path: Path) -> str | None:
    """Move the clone to the remote's HEAD; return a warning if it stays where it is."""
    try:
        git.git("fetch", "--quiet", "--no-recurse-submodules", "origin", "HEAD", cwd=path)
    except git.GitError as error:
        return f"cannot be updated ({error}); using the commit in hand"
    arriving = set(
        git.git("ls-tree", "-r", "--name-only", "-z", "FETCH_HEAD", cwd=path).split("\0")
    )
    untracked = git.git("ls-files", "--others", "-z", cwd=path).split("\0")
    in_the_way = sorted(name for name in untracked if name and name in arriving)
    for name in in_the_way:
        _make_way(path, name)
    # We hold the clone's lock, and nobody edits tracked files: what differs is of a killed update.
    (path / ".git" / "index.lock").unlink(missing_ok=True)
    git.git("checkout", "--quiet", "--force", "--detach", "FETCH_HEAD", cwd=path)
    return None


def update(name: str, url: str, path: Path) -> Checkout:
    """Bring the clone of `name` at `path` to the newest commit of `url`, cloning it if needed.

    Raises:
        RemoteError: there is no clone and the remote cannot be cloned.
        InputError: `url` is no remote, or the workspace cannot be written.
    """
    git.check_remote(name, url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Runs of several models share the clones.
        with FileLock(path.with_name(f".{path.name}.lock")):
            return _update(name, url, path)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written ({error.strerror})") from error


def _update(name: str, url: str, path: Path) -> Checkout:
    if not (path / ".git").exists():
        if path.exists() and any(path.iterdir()):
            raise InputError(f"{path}: exists and is no git clone; move it away")
        _clone(name, url, path)
        return Checkout(name, path, git.short_sha(path), moved=True)
    before = git.short_sha(path)
    git.git("remote", "set-url", "origin", _as_url(url), cwd=path)
    warning = _advance(path)
    after = git.short_sha(path)
    if warning:
        warning = f"{name}: {warning} {after}"
    return Checkout(name, path, after, moved=after != before, warning=warning)


def in_hand(name: str, path: Path) -> Checkout | None:
    """Return the clone as it is, without asking its remote; None if there is none."""
    if not (path / ".git").exists():
        return None
    return Checkout(name, path, git.short_sha(path), moved=False)
