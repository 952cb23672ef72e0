"""Phase 0 against real git repositories."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import git
from tasks.dataset import published_definitions
from tasks.errors import InputError, RemoteError
from tasks.repos import clone

IDENTITY = git.AUTHOR


def commit(remote: Path, name: str, text: str) -> str:
    """Commit one file to a repository, making the repository if needed."""
    if not remote.exists():
        git.git("init", "--quiet", "--initial-branch=main", str(remote))
        git.git("config", "uploadpack.allowFilter", "true", cwd=remote)
    (remote / name).parent.mkdir(parents=True, exist_ok=True)
    (remote / name).write_text(text)
    git.git("add", "--all", cwd=remote)
    git.git("commit", "--quiet", "-m", name, cwd=remote, env=IDENTITY)
    return git.short_sha(remote)


def test_clone_then_update(tmp_path: Path) -> None:
    remote, path = tmp_path / "remote", tmp_path / "workspace" / "clone"
    first = commit(remote, "a.txt", "1")
    made = clone.update("sglang", str(remote), path)
    assert (made.sha, made.moved, made.warning) == (first, True, None)
    assert git.git("config", "remote.origin.partialclonefilter", cwd=path) == "blob:none"
    again = clone.update("sglang", str(remote), path)
    assert (again.sha, again.moved) == (first, False)
    second = commit(remote, "b.txt", "2")
    moved = clone.update("sglang", remote.as_uri(), path)
    assert (moved.sha, moved.moved) == (second, True)
    assert (path / "b.txt").read_text() == "2"


def test_submodules_are_left_alone(tmp_path: Path) -> None:
    inner, remote = tmp_path / "inner", tmp_path / "remote"
    commit(inner, "x", "x")
    commit(remote, "a.txt", "1")
    allow = ("-c", "protocol.file.allow=always")
    git.git(*allow, "submodule", "--quiet", "add", str(inner), "sub", cwd=remote)
    git.git("commit", "--quiet", "-m", "sub", cwd=remote, env=IDENTITY)
    clone.update("sglang", str(remote), tmp_path / "clone")
    assert not any((tmp_path / "clone" / "sub").iterdir())


def test_offline_with_a_clone_is_a_warning(tmp_path: Path) -> None:
    remote, path = tmp_path / "remote", tmp_path / "clone"
    sha = commit(remote, "a.txt", "1")
    clone.update("sglang", str(remote), path)
    remote.rename(tmp_path / "gone")
    kept = clone.update("sglang", str(remote), path)
    assert kept.sha == sha
    assert kept.warning is not None
    assert "using the commit in hand" in kept.warning


def test_offline_without_a_clone_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="remote sglang: .*cannot be cloned.*ONBOARD_REMOTES"):
        clone.update("sglang", str(tmp_path / "none"), tmp_path / "workspace" / "sglang")
    assert [p.name for p in (tmp_path / "workspace").iterdir()] == [".sglang.lock"]


def test_empty_remote_is_an_error(tmp_path: Path) -> None:
    git.git("init", "--quiet", "--bare", str(tmp_path / "remote"))
    with pytest.raises(RemoteError):
        clone.update("sglang", str(tmp_path / "remote"), tmp_path / "clone")
    assert not (tmp_path / "clone").exists()


def test_staged_files_give_way_to_merged_ones_and_differing_ones_are_kept(tmp_path: Path) -> None:
    remote, path = tmp_path / "remote", tmp_path / "clone"
    commit(remote, "a.txt", "1")
    clone.update("flashinfer_trace", str(remote), path)
    for name in ("same.txt", "other.txt", "mine.txt"):
        (path / name).write_text("ours")
    commit(remote, "same.txt", "ours")
    newest = commit(remote, "other.txt", "theirs")
    assert clone.update("flashinfer_trace", str(remote), path).sha == newest
    assert (path / "other.txt").read_text() == "theirs"
    assert (path / "mine.txt").read_text() == "ours"
    kept = [p for p in (tmp_path / "superseded").rglob("*") if p.is_file()]
    assert [p.relative_to(tmp_path).as_posix() for p in kept] == ["superseded/clone/other.txt"]
    assert kept[0].read_text() == "ours"


def test_update_repairs_what_a_killed_one_left(tmp_path: Path) -> None:
    remote, path = tmp_path / "remote", tmp_path / "clone"
    commit(remote, "a.txt", "1")
    clone.update("sglang", str(remote), path)
    newest = commit(remote, "a.txt", "2")
    (path / "a.txt").write_text("half")
    (path / ".git" / "index.lock").write_text("")
    (path / "staged.json").write_text("ours")
    assert clone.update("sglang", str(remote), path).sha == newest
    assert (path / "a.txt").read_text() == "2"
    assert (path / "staged.json").read_text() == "ours"


@pytest.mark.parametrize(
    "url", ["--upload-pack=touch /tmp/x", "ext::sh -c id", "-x", "", "a\nb", "fd::17"]
)
def test_hostile_remote_is_refused_before_git_sees_it(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="is not a git URL or a local path"):
        clone.update("sglang", url, tmp_path / "clone")
    assert not (tmp_path / "clone").exists()


def test_folder_that_is_no_clone_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "mine").write_text("x")
    with pytest.raises(InputError, match="is no git clone"):
        clone.update("sglang", str(tmp_path), tmp_path / "clone")
    assert (tmp_path / "clone" / "mine").read_text() == "x"


def test_credentials_in_a_url_reach_no_message(tmp_path: Path) -> None:
    url = "https://someone:s3cret@127.0.0.1:1/x.git"
    with pytest.raises(RemoteError) as caught:
        clone.update("sglang", url, tmp_path / "clone")
    assert "s3cret" not in str(caught.value)
    assert "127.0.0.1:1/x.git" in str(caught.value)


def test_published_definitions_are_those_of_the_commit(tmp_path: Path) -> None:
    remote, path = tmp_path / "remote", tmp_path / "clone"
    commit(remote, "definitions/gemm/gemm_n1_k1.json", "{}")
    commit(remote, "definitions/README.md", "x")
    clone.update("flashinfer_trace", str(remote), path)
    (path / "definitions/gemm/gemm_n2_k2.json").write_text("{}")
    assert published_definitions(path) == {"gemm_n1_k1": "gemm"}
