"""The few git operations the pipeline needs, through the git program itself.

Arguments are always a list, never a shell string; a remote that looks like an option or names an
external transport helper is refused; git never prompts; credentials inside a URL never reach a
message.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tasks.errors import InputError, OnboardError

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@|\?\S*")
_OWN_CONFIG = {
    "protocol.ext.allow": "never",
    "core.hooksPath": "/dev/null",
    "core.excludesFile": "/dev/null",
    "core.autocrlf": "false",
    "commit.gpgSign": "false",
    "gc.auto": "0",
}
"""What must not depend on the user's git configuration."""
_HARDENING = [part for key, value in _OWN_CONFIG.items() for part in ("-c", f"{key}={value}")]
AUTHOR = {
    "GIT_AUTHOR_NAME": "fib-onboard",
    "GIT_AUTHOR_EMAIL": "fib-onboard@localhost",
    "GIT_COMMITTER_NAME": "fib-onboard",
    "GIT_COMMITTER_EMAIL": "fib-onboard@localhost",
}


class GitError(OnboardError):
    """A git command failed; the message is its last line of error output, without credentials."""


def redact(text: str) -> str:
    """Remove user names, passwords and query strings from the URLs in `text`."""
    return _CREDENTIALS.sub("", text)


def git(
    *args: str,
    cwd: Path | None = None,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
) -> str:
    """Run `git ARGS` and return its output as text, without final newlines.

    See `run` for the arguments and errors.
    """
    return run(*args, cwd=cwd, stdin=stdin, env=env).decode(errors="surrogateescape").rstrip("\n")


def run(
    *args: str,
    cwd: Path | None = None,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    timeout: float = 900,
) -> bytes:
    """Run `git ARGS` and return its output.

    Args:
        args: the arguments, one each.
        cwd: the repository.
        stdin: bytes for its standard input.
        env: variables added to the inherited environment.
        timeout: seconds before it is killed.

    Raises:
        GitError: git is not installed, failed, or ran past its time.
    """
    environment = {
        **{
            k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k == "GIT_SSL_CAINFO"
        },
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_LFS_SKIP_SMUDGE": "1",
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C",
        **(env or {}),
    }
    try:
        done = subprocess.run(
            ["git", *_HARDENING, *args],
            cwd=cwd,
            input=stdin,
            env=environment,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise GitError("git is not installed, or the folder it should run in is gone") from error
    except subprocess.TimeoutExpired as error:
        raise GitError(f"git {args[0]} did not finish in {timeout:.0f} s") from error
    if done.returncode:
        lines = [x for x in done.stderr.decode(errors="replace").splitlines() if x.strip()]
        told = (" ! ", "fatal:", "error:")  # the first one: why a push was refused
        reason = next((x for start in told for x in lines if x.startswith(start)), "")
        reason = reason or (lines[-1] if lines else f"exit status {done.returncode}")
        raise GitError(redact(f"git {args[0]}: {reason}"))
    return done.stdout


def check_remote(name: str, url: str) -> str:
    """Return `url` if git may be given it as a remote.

    Raises:
        InputError: it looks like an option, or names a transport helper (`ext::...`).
    """
    if not url or url.startswith("-") or "::" in url.split("/", 1)[0] or "\n" in url:
        raise InputError(f"remote {name}: {redact(url)!r} is not a git URL or a local path")
    return url


def short_sha(repository: Path, revision: str = "HEAD") -> str:
    """Return the abbreviated SHA of `revision`, at least seven characters."""
    return git("rev-parse", "--short", f"{revision}^{{commit}}", cwd=repository)


def tracked_files(repository: Path, folder: str) -> list[str]:
    """List the paths below `folder` in the commit that is checked out, not in the work tree."""
    listed = git("ls-tree", "-r", "-z", "--name-only", "HEAD", "--", folder, cwd=repository)
    return [path for path in listed.split("\0") if path]
