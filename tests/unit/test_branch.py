"""The commit behind a branch: its tree, its parent, and that it is the same whenever written."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest

from tasks.errors import PublishError
from tasks.git import git
from tasks.publish.base import Branch
from tasks.publish.branch import write_commit
from tasks.repos import clone
from tests.unit.test_repos import commit


@pytest.fixture
def source(tmp_path: Path) -> Path:
    upstream = tmp_path / "upstream"
    commit(upstream, "README.md", "hello")
    commit(upstream, "kept/data.txt", "as it is")
    (upstream / "run.sh").write_text("#!/bin/sh\n")
    (upstream / "run.sh").chmod(0o755)
    commit(upstream, "last.txt", "1")
    clone.update("sglang", str(upstream), tmp_path / "clone")
    return tmp_path / "clone"


def branch(source: Path, folder: Path, **content: str) -> Branch:
    folder.mkdir(exist_ok=True)
    files = {}
    for n, (name, text) in enumerate(content.items()):
        path = folder / str(n)
        path.write_text(text)
        files[PurePosixPath(name.replace("__", "/").replace("_dot_", "."))] = path
    return Branch("some/branch", source, "Add: a thing\n\nWhy.\n", files)


def changed(repository: Path, old: str, new: str) -> list[str]:
    return git("diff", "--name-status", old, new, cwd=repository).splitlines()


def test_only_the_files_change_and_nothing_else_in_the_clone(tmp_path: Path, source: Path) -> None:
    before = git("status", "--porcelain", "--branch", cwd=source)
    made = branch(source, tmp_path / "f", README_dot_md="new\r\n", a__b__c_dot_json="{}")
    sha = write_commit(made, source)
    assert changed(source, "HEAD", sha) == ["M\tREADME.md", "A\ta/b/c.json"]
    assert git("log", "-1", "--format=%B", sha, cwd=source) == "Add: a thing\n\nWhy."
    assert git("rev-parse", f"{sha}^", cwd=source) == git("rev-parse", "HEAD", cwd=source)
    # As it was written: neither line ends nor the end of the file are git's to change.
    assert git("cat-file", "-s", f"{sha}:README.md", cwd=source) == "5"
    assert git("status", "--porcelain", "--branch", cwd=source) == before
    assert (source / "README.md").read_text() == "hello"


def test_the_same_files_give_the_same_commit(tmp_path: Path, source: Path) -> None:
    made = branch(source, tmp_path / "f", a="1")
    bare = tmp_path / "bare.git"
    git("clone", "--quiet", "--bare", str(tmp_path / "upstream"), str(bare))
    assert write_commit(made, source) == write_commit(made, bare) == write_commit(made, source)


def test_on_top_of_a_tip(tmp_path: Path, source: Path) -> None:
    first = write_commit(branch(source, tmp_path / "1", a="1", b="1"), source)
    assert write_commit(branch(source, tmp_path / "2", a="1", b="1"), source, first) == first
    second = write_commit(branch(source, tmp_path / "3", a="2"), source, first)
    assert git("rev-parse", f"{second}^", cwd=source) == first
    # What is no longer published does not stay behind.
    assert changed(source, "HEAD", second) == ["A\ta"]


def test_an_executable_stays_one(tmp_path: Path, source: Path) -> None:
    sha = write_commit(branch(source, tmp_path / "f", run_dot_sh="exit 1\n", other="x"), source)
    listed = git("ls-tree", sha, "run.sh", "other", cwd=source).splitlines()
    assert [(line[:6], line.rpartition("\t")[2]) for line in listed] == [
        ("100644", "other"),
        ("100755", "run.sh"),
    ]


def test_odd_but_valid_paths(tmp_path: Path, source: Path) -> None:
    names = ('with "quotes"', "tab\there", "line\nfeed", "ünï", "-dash", ":(glob)*")
    made = branch(source, tmp_path / "f", **dict.fromkeys(names, "x"))
    sha = write_commit(made, source)
    added = git("diff", "-z", "--name-only", "HEAD", sha, cwd=source)
    assert sorted(added.rstrip("\0").split("\0")) == sorted(names)


@pytest.mark.parametrize("path", ["../outside", ".git/config", "a/../../b", "/etc/passwd"])
def test_paths_do_not_escape(path: str, tmp_path: Path, source: Path) -> None:
    content = tmp_path / "content"
    content.write_text("x")
    made = Branch("b", source, "m", {PurePosixPath(path): content})
    with pytest.raises(PublishError, match="branch b: "):
        write_commit(made, source)


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path, source: Path) -> None:
    for name, lost in {"kept": "kept/data.txt", "last.txt__a": "last.txt"}.items():
        with pytest.raises(PublishError, match=f"some/branch: '{lost}' cannot be"):
            write_commit(branch(source, tmp_path / "f", **{name: "x"}), source)


def test_a_blobless_clone_fetches_nothing(tmp_path: Path, source: Path) -> None:
    """The blobs of files that nobody touches need not be there."""
    bare = tmp_path / "lean.git"
    url = (tmp_path / "upstream").as_uri()
    git("clone", "--quiet", "--bare", "--filter=blob:none", url, str(bare))
    (tmp_path / "upstream").rename(tmp_path / "gone")
    missing = git("rev-parse", "HEAD:kept/data.txt", cwd=bare)
    sha = write_commit(branch(source, tmp_path / "f", new="x"), bare)
    listed = git("rev-list", "--objects", "--missing=print", sha, cwd=bare)
    assert f"?{missing}" in listed.splitlines()
    assert not os.path.lexists(tmp_path / "upstream")
