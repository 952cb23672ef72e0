"""The outbox: real branches on real bare remotes, each thing once."""

from __future__ import annotations

import threading
from pathlib import Path, PurePosixPath

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
