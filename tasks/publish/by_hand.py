"""How somebody sends by hand what is in the outbox: a script for each thing, to read and to run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from tasks.publish.base import Branch, Post

_HEAD = """#!/bin/sh
# Sends {text} by hand{how}.
set -eu
cd "$(dirname "$0")/.."
"""
_TEXT = "awk 'f; /^---$/ && ++n == 2 { f = 1 }'"
"""What is below the second line of dashes: the text without the facts about it."""


def script(post: Post, branch: Branch | None, text: str, remote: str) -> str:
    """Return the script.

    Args:
        post: what is sent.
        branch: the commit behind it; None for an issue.
        text: the outbox's entry, relative to the outbox.
        remote: the local repository with the branch, relative to the outbox.
    """
    if branch is None:
        how, lines = " (needs gh)", _issue(post)
    elif post.kind == "dataset":
        how, lines = " (needs hf)", _dataset(post, branch, remote)
    else:
        how, lines = (
            " (needs gh); the argument is your account on GitHub",
            _pull(post, branch, remote),
        )
    text = shlex.quote(text)
    return _HEAD.format(text=text, how=how) + "".join(f"{line}\n" for line in lines).replace(
        "@TEXT@", f"{_TEXT} {text}"
    )


def _issue(post: Post) -> Iterator[str]:
    labels = "".join(f" --label {shlex.quote(label)}" for label in post.labels)
    yield f"@TEXT@ | gh issue create {_named(post)}{labels} --body-file -"


def _pull(post: Post, branch: Branch, remote: str) -> Iterator[str]:
    fork = f'"https://github.com/${{1:?your account}}/{post.repository.rpartition("/")[2]}.git"'
    name = shlex.quote(branch.name)
    draft = " --draft" if post.draft else ""
    yield f"git -C {shlex.quote(remote)} push {fork} {name}"
    yield f'@TEXT@ | gh pr create {_named(post)} --head "$1":{name}{draft} --body-file -'


def _dataset(post: Post, branch: Branch, remote: str) -> Iterator[str]:
    paths = " ".join(shlex.quote(str(path)) for path in branch.files)
    yield "folder=$(mktemp -d)"
    yield f"git -C {shlex.quote(remote)} archive {shlex.quote(branch.name)} {paths} \\"
    yield '    | tar --extract --directory "$folder"'
    yield (
        f'hf upload {shlex.quote(post.repository)} "$folder" . --repo-type dataset --create-pr \\'
    )
    yield (f'    --commit-message {shlex.quote(post.title)} --commit-description "$(@TEXT@)"')
    yield 'rm -r "$folder"'


def _named(post: Post) -> str:
    return f"--repo {shlex.quote(post.repository)} --title {shlex.quote(post.title)}"
