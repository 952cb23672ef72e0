"""The outbox: real branches on real bare remotes, each thing once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from tasks.errors import InputError, PublishError
from tasks.git import git
from tasks.publish.base import Branch, Post
from tasks.publish.outbox import Outbox
from tasks.repos import clone
from tests.unit.test_repos import commit


@pytest.fixture
def source(tmp_path: Path) -> Path:
    commit(tmp_path / "upstream", "README.md", "hello")
    clone.update("flashinfer_trace", str(tmp_path / "upstream"), tmp_path / "clone")
    return tmp_path / "clone"


def post(name: str, body: str = "The body.", kind: str = "dataset") -> Post:
    return Post(name, kind, "flashinfer-ai/flashinfer-trace", f"Add {name}: it's", body, ("x", "y"))


def branch(source: Path, name: str, text: str) -> Branch:
    path = source / f"{name}.json"
    path.write_text(text)
    files = {PurePosixPath("definitions", f"{name}.json"): path}
    return Branch(f"onboard/{name}", source, f"Add {name}", files)


def log(root: Path) -> list[str]:
    return git("log", "--format=%s", cwd=root).splitlines()


def test_branch_and_rendered_text(tmp_path: Path, source: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    url = outbox.open_pull_request(post("k"), branch(source, "k", "{}\n"))
    remote = tmp_path / "outbox" / "remotes" / "flashinfer-trace.git"
    assert git("show", "onboard/k:definitions/k.json", cwd=remote) == "{}"
    assert git("log", "--format=%s", "main..onboard/k", cwd=remote) == "Add k"
    assert git("diff", "--name-only", "main", "onboard/k", cwd=remote) == "definitions/k.json"
    text = Path(url.removeprefix("file://")).read_text()
    _, head, body = text.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["title"] == "Add k: it's"
    assert facts["commit"] == git("rev-parse", "onboard/k", cwd=remote)
    assert body == "The body.\n\n<!-- onboard:k:dataset -->\n"
    git("fsck", "--strict", cwd=remote)


def test_again_changes_nothing_and_a_new_version_is_a_commit_on_top(
    tmp_path: Path, source: Path
) -> None:
    outbox = Outbox(tmp_path / "outbox")
    urls = {outbox.open_pull_request(post("k"), branch(source, "k", "1\n")) for _ in range(3)}
    remote = tmp_path / "outbox" / "remotes" / "flashinfer-trace.git"
    assert len(urls) == 1
    assert log(tmp_path / "outbox") == ["dataset: Add k: it's"]
    assert git("rev-list", "--count", "main..onboard/k", cwd=remote) == "1"
    outbox.open_pull_request(post("k"), branch(source, "k", "2\n"))
    assert git("rev-list", "--count", "main..onboard/k", cwd=remote) == "2"
    assert len(log(tmp_path / "outbox")) == 2


def test_one_commit_per_thing_from_many_threads(tmp_path: Path, source: Path) -> None:
    names = [f"k{i}" for i in range(8)]
    branches = {name: branch(source, name, name) for name in names}
    failures: list[BaseException] = []

    def publish(name: str) -> None:
        try:
            Outbox(tmp_path / "outbox").open_pull_request(post(name), branches[name])
            Outbox(tmp_path / "outbox").open_issue(post(name, kind="kernel-request"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=publish, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    expected = [f"{kind}: Add {n}: it's" for n in names for kind in ("dataset", "kernel-request")]
    assert sorted(log(tmp_path / "outbox")) == sorted(expected)
    assert git("status", "--porcelain", cwd=tmp_path / "outbox") == ""


def test_goes_on_after_a_run_that_died_with_git_locks_held(tmp_path: Path, source: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    outbox.open_issue(post("a", kind="kernel-request"))
    (tmp_path / "outbox" / ".git" / "index.lock").write_text("")
    (tmp_path / "outbox" / "remotes" / ".flashinfer-trace.git.new").mkdir(parents=True)
    outbox.open_pull_request(post("b"), branch(source, "b", "{}"))
    assert len(log(tmp_path / "outbox")) == 2


def test_survives_a_fresh_clone_of_the_source(tmp_path: Path, source: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    outbox.open_pull_request(post("k"), branch(source, "k", "1\n"))
    source.rename(tmp_path / "old")
    clone.update("flashinfer_trace", str(tmp_path / "upstream"), source)
    outbox.open_pull_request(post("k"), branch(source, "k", "2\n"))
    remote = tmp_path / "outbox" / "remotes" / "flashinfer-trace.git"
    assert git("rev-list", "--count", "main..onboard/k", cwd=remote) == "2"


def test_names_do_not_escape(tmp_path: Path, source: Path) -> None:
    with pytest.raises(InputError, match="not a valid name"):
        Outbox(tmp_path / "outbox").open_issue(post("../../x", kind="kernel-request"))
    assert not (tmp_path / "x.kernel-request.md").exists()


def test_a_file_that_is_gone_is_an_error(tmp_path: Path, source: Path) -> None:
    made = branch(source, "k", "{}")
    (source / "k.json").unlink()
    with pytest.raises(PublishError, match="branch onboard/k"):
        Outbox(tmp_path / "outbox").open_pull_request(post("k"), made)


@pytest.fixture
def run_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Run a script with programs that write down what they are asked, and return that."""
    programs, said = tmp_path / "programs", tmp_path / "said.jsonl"
    programs.mkdir()
    for name in ("gh", "hf"):
        program = programs / name
        program.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            "asked, read = sys.argv[1:], '-' in sys.argv\n"
            "there = [sorted(f for _, _, fs in os.walk(a) for f in fs) for a in asked"
            " if os.path.isdir(a) and a != '.']\n"
            "line = {'program': os.path.basename(sys.argv[0]), 'asked': asked,"
            " 'read': sys.stdin.read() if read else '', 'files': there}\n"
            f"print(json.dumps(line), file=open({str(said)!r}, 'a'))\n"
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def run(script: Path, *arguments: str) -> list[dict[str, Any]]:
        subprocess.run(["sh", str(script), *arguments], check=True, cwd="/")
        return [json.loads(line) for line in said.read_text().splitlines()]

    return run


def test_an_issue_by_hand(tmp_path: Path, run_by_hand: Callable[..., list[dict[str, Any]]]) -> None:
    url = Outbox(tmp_path / "outbox").open_issue(
        post("k", "$(id) `id`\n---\nmore", "kernel-request")
    )
    script = Path(url.removeprefix("file://")).with_suffix(".sh")
    (said,) = run_by_hand(script)
    assert said["asked"] == [
        *("issue", "create", "--repo", "flashinfer-ai/flashinfer-trace"),
        *("--title", "Add k: it's", "--label", "x", "--label", "y", "--body-file", "-"),
    ]
    assert said["read"] == "$(id) `id`\n---\nmore\n\n<!-- onboard:k:kernel-request -->\n"


def test_a_dataset_pull_request_by_hand(
    tmp_path: Path, source: Path, run_by_hand: Callable[..., list[dict[str, Any]]]
) -> None:
    url = Outbox(tmp_path / "outbox").open_pull_request(post("k"), branch(source, "k", "{}\n"))
    entry = Path(url.removeprefix("file://"))
    assert "+{}" in entry.with_suffix(".diff").read_text()
    (said,) = run_by_hand(entry.with_suffix(".sh"))
    assert said["asked"][:2] == ["upload", "flashinfer-ai/flashinfer-trace"]
    assert said["asked"][3:] == [
        *(".", "--repo-type", "dataset", "--create-pr", "--commit-message", "Add k: it's"),
        *("--commit-description", "The body.\n\n<!-- onboard:k:dataset -->"),
    ]
    assert said["files"] == [["k.json"]]


def test_a_branch_by_hand(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_by_hand: Callable[..., list[dict[str, Any]]],
) -> None:
    fork = tmp_path / "fork.git"
    git("init", "--quiet", "--bare", str(fork))
    made = replace(post("k", kind="coverage"), draft=True)
    url = Outbox(tmp_path / "outbox").open_pull_request(made, branch(source, "k", "{}\n"))
    # Where git goes for the fork on GitHub.
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{fork}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/me/flashinfer-trace.git")
    (said,) = run_by_hand(Path(url.removeprefix("file://")).with_suffix(".sh"), "me")
    assert said["asked"][2:] == [
        *("--repo", "flashinfer-ai/flashinfer-trace", "--title", "Add k: it's"),
        *("--head", "me:onboard/k", "--draft", "--body-file", "-"),
    ]
    assert git("show", "onboard/k:definitions/k.json", cwd=fork) == "{}"
