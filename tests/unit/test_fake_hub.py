"""The local Hub against the real client: what publishing calls, and every way it can go wrong."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import pytest
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    set_client_factory,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub.utils._http import default_client_factory, hf_request_event_hook

from tests.fakes.hub import Hub, Repository
from tests.fakes.web import EVERY, Fault

NAME = "flashinfer-ai/flashinfer-trace"
BLOB = bytes(range(256)) * 40


@dataclass
class Place:
    hub: Hub
    repository: Repository
    ours: HfApi
    """A user without the right to push."""

    def read(self, path: str, revision: str = "main") -> bytes:
        found = self.repository.find(revision)
        assert found
        return found.files[path].content

    def commit(self, path: str = "a.json", content: bytes = b"{}\n", **options: Any) -> CommitInfo:
        options = {"create_pr": True, "commit_message": "Add it", "repo_type": "dataset"} | options
        return self.ours.create_commit(NAME, [CommitOperationAdd(path, content)], **options)

    def opened(self) -> list[str]:
        return [discussion.title for discussion in self.repository.discussions]


def _wait_for_answers(seconds: float) -> None:
    hooks = {"request": [hf_request_event_hook]}
    set_client_factory(
        lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=seconds)
    )


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    _wait_for_answers(60)
    disable_progress_bars()
    with Hub() as hub:
        files = {"README.md": b"# Traces\n", "definitions/old.json": b"{}\n"}
        repository = hub.repository(NAME, files, writers={"maintainer"})
        yield Place(hub, repository, HfApi(hub.url, hub.user("contributor")))
    enable_progress_bars()
    set_client_factory(default_client_factory)


def test_a_pull_request_with_small_and_large_files(place: Place) -> None:
    files = {
        "definitions/gemm/g.json": b'{"name": "g"}\n',
        "blob/g_1.safetensors": BLOB,
        "blob/g_2.safetensors": BLOB[:-1],
    }
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    info = place.ours.create_commit(
        NAME,
        [*operations, CommitOperationDelete("definitions/old.json")],
        commit_message="Add g",
        commit_description="A body",
        repo_type="dataset",
        create_pr=True,
    )
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert {path: place.read(path, "refs/pr/1") for path in files} == files
    assert "definitions/old.json" not in place.repository.commits[info.oid].files
    assert place.repository.refs["main"] == place.repository.commits[info.oid].parent
    assert place.hub.calls == {
        "preupload": 1, "lfs-batch": 1, "lfs-upload": 2, "lfs-verify": 2, "commit": 1
    }  # fmt: skip

    more = place.commit("more.json", create_pr=False, revision="refs/pr/1", parent_commit=info.oid)
    assert place.repository.refs["refs/pr/1"] == more.oid
    again = place.commit("more.json", create_pr=False, revision="refs/pr/1")
    assert again.oid == more.oid  # nothing changed: the client makes no commit
    with pytest.raises(HfHubHTTPError, match="412"):
        place.commit("else.json", create_pr=False, revision="refs/pr/1", parent_commit=info.oid)
    assert place.opened() == ["Add g"]


def test_a_large_file_is_sent_in_parts_and_once(place: Place) -> None:
    place.hub.part_bytes = 4096
    place.commit("blob/a.safetensors", BLOB)
    assert place.hub.calls["lfs-part"] == 3
    assert place.hub.calls["lfs-complete"] == 1
    assert place.hub.storage == {hashlib.sha256(BLOB).hexdigest(): BLOB}
    place.commit("blob/b.safetensors", BLOB)
    assert place.hub.calls["lfs-part"] == 3


def test_discussions(place: Place) -> None:
    place.commit(commit_message="First", commit_description="<!-- onboard:a:dataset -->")
    place.commit(commit_message="Second")
    api, repo = place.ours, {"repo_id": NAME, "repo_type": "dataset"}
    api.create_discussion(title="A question", description="Why?", **repo)
    for number in range(10):
        api.create_discussion(title=f"Question {number}", description="Why?", **repo)
    pulls = list(
        api.get_repo_discussions(NAME, repo_type="dataset", discussion_type="pull_request")
    )
    assert [(pull.title, pull.num, pull.status) for pull in pulls] == [
        ("Second", 2, "open"),
        ("First", 1, "open"),
    ]
    assert len(list(api.get_repo_discussions(NAME, repo_type="dataset"))) == 13  # two pages

    details = api.get_discussion_details(discussion_num=1, **repo)
    comment, commit = details.events
    assert (comment.type, comment.content) == ("comment", "<!-- onboard:a:dataset -->")
    assert commit.oid == place.repository.refs["refs/pr/1"]
    edited = api.edit_discussion_comment(
        discussion_num=1, comment_id=comment.id, new_content="New", **repo
    )
    assert (edited.content, edited.edited) == ("New", True)
    api.rename_discussion(discussion_num=1, new_title="Renamed", **repo)
    api.comment_discussion(discussion_num=1, comment="Done.", **repo)
    api.change_discussion_status(discussion_num=1, new_status="closed", **repo)
    details = api.get_discussion_details(discussion_num=1, **repo)
    assert (details.title, details.status) == ("Renamed", "closed")
    assert [event.type for event in details.events] == [
        "comment", "commit", "title-change", "comment", "status-change"
    ]  # fmt: skip


def test_what_others_do_is_seen(place: Place) -> None:
    for name in ("a.json", "b.json", "README.md", "c.json"):
        place.commit(name)
    place.hub.merge(place.repository, 1)
    place.hub.close(place.repository, 2, "Not needed.")
    place.hub.push(place.repository, {"README.md": b"# Other\n"})
    api, repo = place.ours, {"repo_id": NAME, "repo_type": "dataset"}
    details = [api.get_discussion_details(discussion_num=n, **repo) for n in (1, 2, 3, 4)]
    assert [d.status for d in details] == ["merged", "closed", "open", "open"]
    assert details[0].merge_commit_oid in place.repository.commits
    assert [e.content for e in details[1].events if e.type == "comment"][-1] == "Not needed."
    assert [d.conflicting_files for d in details] == [[], [], ["README.md"], []]
    assert api.repo_info(NAME, repo_type="dataset").sha == place.repository.refs["main"]
    assert api.list_repo_files(NAME, repo_type="dataset") == [
        "README.md", "a.json", "definitions/old.json"
    ]  # fmt: skip
    (entry,) = api.get_paths_info(NAME, ["a.json", "nowhere"], repo_type="dataset")
    assert (
        entry.blob_id == place.repository.commits[place.repository.refs["main"]].files["a.json"].oid
    )
    assert [c.title for c in api.list_repo_commits(NAME, repo_type="dataset")] == [
        "update", "Add it (#1)", "initial commit"
    ]  # fmt: skip


def test_rights(place: Place) -> None:
    hub = place.hub
    with pytest.raises(HfHubHTTPError, match="403"):
        place.commit(create_pr=False)
    refused = {
        "hf_unknown": ("401", HfHubHTTPError),
        hub.user("reader", read_only=True): ("403", HfHubHTTPError),
    }
    for token, (status, kind) in refused.items():
        with pytest.raises(kind, match=status):
            place.commit(token=token)
    with pytest.raises(RepositoryNotFoundError):
        place.ours.repo_info("flashinfer-ai/nowhere", repo_type="dataset")
    place.repository.gated = True
    with pytest.raises(GatedRepoError):
        place.commit()
    assert place.ours.whoami()["name"] == "contributor"
    assert not place.opened()


def test_a_moved_repository_redirects(place: Place) -> None:
    place.hub.move(place.repository, "elsewhere/trace")
    info = place.commit("blob/a.safetensors", BLOB)
    assert place.ours.repo_info(NAME, repo_type="dataset").id == "elsewhere/trace"
    assert info.pr_url == f"{place.hub.url}/datasets/elsewhere/trace/discussions/1"
    assert place.read("blob/a.safetensors", "refs/pr/1") == BLOB


@pytest.mark.parametrize("endpoint", ["preupload", "lfs-batch", "lfs-upload", "lfs-verify"])
@pytest.mark.parametrize(
    "fault",
    [{}, {"after": True}, {"status": 429, "headers": {"Retry-After": "1"}}, {"status": 503}],
    ids=["drop", "drop-after", "429", "503"],
)
def test_the_client_itself_retries_all_but_the_commit(
    place: Place, endpoint: str, fault: dict[str, Any]
) -> None:
    place.hub.fail(Fault(endpoint, **fault))
    place.commit("blob/a.safetensors", BLOB)
    assert place.opened() == ["Add it"]
    assert place.hub.calls[endpoint] == 2


@pytest.mark.parametrize(
    ("fault", "kind", "opened"),
    [
        (Fault("commit"), httpx2.RemoteProtocolError, 0),
        (Fault("commit", after=True), httpx2.RemoteProtocolError, 1),
        (Fault("commit", hold=60), httpx2.ReadTimeout, 0),
        (Fault("commit", hold=60, after=True), httpx2.ReadTimeout, 1),
        (Fault("commit", status=412), HfHubHTTPError, 0),
        (Fault("commit", status=429, headers={"Retry-After": "1"}), HfHubHTTPError, 0),
        (Fault("commit", status=500), HfHubHTTPError, 0),
        (Fault("commit", status=502, after=True), HfHubHTTPError, 1),
        (Fault(EVERY, call=2), httpx2.RemoteProtocolError, 0),
    ],
)
def test_a_commit_that_goes_wrong(
    place: Place, fault: Fault, kind: type[Exception], opened: int
) -> None:
    went_wrong = threading.Event()
    place.hub.fail(replace(fault, act=went_wrong.set))
    if fault.hold:
        _wait_for_answers(0.5)
    with pytest.raises(kind):
        place.commit()
    assert went_wrong.wait(60)
    assert len(place.opened()) == opened
    assert place.hub.calls["commit"] == 1


def test_a_client_that_was_not_kept_from_xet(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(ConnectionError, match="404"):
        place.commit("blob/a.safetensors", BLOB)
    assert place.hub.calls == {"preupload": 1, "xet-token": 1}


def test_what_the_hub_has_not_is_an_error_of_the_test() -> None:
    hub = Hub()
    with pytest.raises(AssertionError, match="GET /api/nothing: no such endpoint"), hub:
        httpx2.get(f"{hub.url}/api/nothing")
