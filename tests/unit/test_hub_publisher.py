"""Pull requests of the dataset, through the real client and a local Hub that counts its calls."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, _upload_pipeline, set_client_factory
from huggingface_hub.utils import enable_progress_bars
from huggingface_hub.utils._http import default_client_factory
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tasks.errors import InputError, OnboardError, PublishError
from tasks.publish import hub as publisher
from tasks.publish.base import BODY_LIMIT, Branch, Post, marker
from tasks.publish.hub import GoneError, HubPublisher, NothingNewError, RejectedError
from tests.fakes.hub import Discussion, Hub, Repository
from tests.fakes.web import EVERY, Fault

NAME = "flashinfer-ai/flashinfer-trace"
KEY = "gemm_n128_k64"
FORK = multiprocessing.get_context("fork")
OLD = {"README.md": b"# Traces\n", "definitions/old.json": b"{}\n"}
FILES = {
    f"definitions/gemm/{KEY}.json": b'{"name": "gemm_n128_k64"}\n',
    f"tests/references/test_{KEY}.py": b"def test(): ...\n",
    f"workloads/gemm/{KEY}.jsonl": b"{}\n{}\n",
    f"blob/workloads/gemm/{KEY}/{KEY}_1.safetensors": bytes(range(256)) * 40,
    f"blob/workloads/gemm/{KEY}/{KEY}_2.safetensors": bytes(range(255)) * 40,
}
POST = Post(KEY, "dataset", NAME, f"Add {KEY}: definition", "The body.", log="one\ntwo")
BRANCH_MESSAGE = f"Add {KEY}\n\nModel: Qwen3\n"


@dataclass
class Place:
    hub: Hub
    repository: Repository
    clone: Path
    token: str
    slept: list[float] = field(default_factory=list)

    def publisher(self, token: str | None = None) -> HubPublisher:
        secret = SecretStr(token or self.token)
        return HubPublisher(NAME, secret, self.hub.url, self.clone.parent / "locks")

    def branch(self, files: dict[str, bytes]) -> Branch:
        for path, content in files.items():
            (self.clone / path).parent.mkdir(parents=True, exist_ok=True)
            (self.clone / path).write_bytes(content)
        named = {PurePosixPath(path): self.clone / path for path in files}
        return Branch(f"onboard/{KEY}", self.clone, BRANCH_MESSAGE, named)

    def publish(self, post: Post = POST, files: dict[str, bytes] | None = None) -> str:
        return self.publisher().open_pull_request(post, self.branch(files or FILES))

    def anew(self) -> None:
        """Forget all that was published."""
        self.repository = self.hub.repository(NAME, OLD, writers={"maintainer"})
        self.hub.storage.clear()

    def url(self, number: int) -> str:
        return f"{self.hub.url}/datasets/{NAME}/discussions/{number}"

    def at(self, revision: str) -> dict[str, bytes]:
        found = self.repository.find(revision)
        assert found
        return {path: blob.content for path, blob in found.files.items()}

    @property
    def pulls(self) -> list[Discussion]:
        return self.repository.discussions

    def commits(self, number: int = 1) -> int:
        return sum(event["type"] == "commit" for event in self.pulls[number - 1].events)

    def check_one(self) -> None:
        """Check that there is one pull request with everything, and one marker."""
        assert self.at("refs/pr/1") == OLD | FILES
        assert [pull.title for pull in self.pulls] == [POST.title]
        assert [text(pull).count(marker(KEY, "dataset")) for pull in self.pulls] == [1]


def text(pull: Discussion) -> str:
    told: str = pull.events[0]["data"]["latest"]["raw"]
    return told


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    slept: list[float] = []
    clock = SimpleNamespace(sleep=slept.append)
    monkeypatch.setattr("tenacity.nap.time", clock)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    publisher._set_up.cache_clear()
    with Hub() as hub:
        repository = hub.repository(NAME, OLD, writers={"maintainer"})
        yield Place(hub, repository, tmp_path / "clone", hub.user("contributor"), slept)
    enable_progress_bars()
    set_client_factory(default_client_factory)


def test_one_commit_with_everything(place: Place) -> None:
    assert place.publish() == place.url(1)
    place.check_one()
    pull = place.pulls[0]
    assert pull.author == "contributor"
    assert text(pull).startswith("The body.\n")
    assert "\none\ntwo\n" in text(pull)
    assert text(pull).endswith(f"\n\n{marker(KEY, 'dataset')}\n")
    assert place.hub.calls == {
        "info": 1, "whoami": 1, "discussions": 1,
        "preupload": 1, "lfs-batch": 1, "lfs-upload": 2, "lfs-verify": 2, "commit": 1,
    }  # fmt: skip
    assert place.at("main") == OLD


@pytest.mark.parametrize(
    "title", [f"{KEY}, as its reviewer calls it", "[WIP] GEMM", "Add GEMM of 64"]
)
def test_again_changes_nothing(place: Place, title: str) -> None:
    place.publish()
    place.pulls[0].title = title
    place.hub.fail()
    assert place.publish() == place.url(1)
    assert place.hub.calls == {
        "info": 1, "whoami": 1, "discussions": 1, "discussion": 1, "paths-info": 1
    }  # fmt: skip
    assert place.pulls[0].title == title


def test_a_title_of_any_length_is_found(place: Place) -> None:
    key = f"{KEY:_<200}"
    post = replace(POST, key=key, title=f"Add {key}"[:200])
    assert [place.publish(post), place.publish(post)] == [place.url(1)] * 2


def test_those_of_other_definitions_are_not_looked_at(place: Place) -> None:
    for number in range(3):
        name = f"definitions/rope_{number}.json"
        post = replace(POST, key=f"rope_{number}", title=f"Add rope_{number}: definition")
        place.publish(post, {name: b"{}"})
    place.hub.fail()
    assert place.publish() == place.url(4)
    assert place.hub.calls["discussion"] == 0


def test_what_is_no_longer_staged_leaves_its_pull_request(place: Place) -> None:
    """But not what the repository has, and nothing of another definition."""
    blobs, traces = f"blob/workloads/gemm/{KEY}", f"traces/baseline/gemm/{KEY}.jsonl"
    others = {f"{blobs}0/a.safetensors": b"a", f"traces/baseline/gemm/{KEY}0.jsonl": b"{}"}
    merged = {f"{blobs}/merged.safetensors": b"merged"}
    place.hub.push(place.repository, others | merged)
    owned = (PurePosixPath(blobs), PurePosixPath(traces), PurePosixPath("solutions/none"))

    def publish(files: dict[str, bytes]) -> str:
        branch = replace(place.branch(files), owned=owned)
        return place.publisher().open_pull_request(POST, branch)

    first = FILES | {traces: b"{}\n", f"{blobs}/deeper/x.safetensors": b"x"}
    assert publish(first) == place.url(1)
    there = OLD | others | merged
    assert place.at("refs/pr/1") == there | first
    left = {path: content for path, content in FILES.items() if not path.endswith("_2.safetensors")}
    for _ in range(2):
        assert publish(left) == place.url(1)
        assert place.at("refs/pr/1") == there | left
    assert place.commits() == 2
    # Something new at the same time, and an answer that is lost.
    place.hub.fail(Fault("commit", after=True))
    del left[f"{blobs}/{KEY}_1.safetensors"]
    assert publish(left | {traces: b"{}\n{}\n"}) == place.url(1)
    assert place.at("refs/pr/1") == there | left | {traces: b"{}\n{}\n"}
    assert place.commits() == 3


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_call_it_is_there_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr(publisher, "INITIAL_COMMIT_SIZE", 2)  # three commits
    place.publish()
    calls = place.hub.calls.total()
    assert calls == 3 + 3 * 2 + 2 * (1 + 1 + 1)  # each blob is in another commit
    for call in range(1, calls + 1):
        place.anew()
        started = threading.Event()
        child = FORK.Process(target=place.publish)

        def kill(child: Any = child, started: threading.Event = started) -> None:
            started.wait(60)
            child.kill()

        place.hub.fail(Fault(EVERY, call=call, after=after, act=kill))
        child.start()
        started.set()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        place.hub.fail()
        assert place.publish() == place.url(1)
        place.check_one()
        assert place.commits() == 3


def test_two_processes_at_once(place: Place) -> None:
    both = threading.Barrier(2)

    def meet() -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # in vain, as only one has found that there is nothing yet

    place.hub.fail(Fault("preupload", times=2, act=meet))
    publisher, branch = place.publisher(), place.branch(FILES)
    both_are_there = FORK.Event()  # no process begins while the server is at work

    said = FORK.SimpleQueue()

    def publish() -> None:
        both_are_there.wait(60)
        try:
            said.put(publisher.open_pull_request(POST, branch))
        except BaseException:
            said.put(traceback.format_exc())

    children = [FORK.Process(target=publish) for _ in range(2)]
    for child in children:
        child.start()
    both_are_there.set()
    assert [said.get() for _ in children] == [place.url(1)] * 2
    for child in children:
        child.join(60)
    place.check_one()
    assert place.commits() == 1


@pytest.mark.parametrize("endpoint", ["info", "whoami", "discussions", "preupload", "commit"])
@pytest.mark.parametrize(
    "fault",
    [
        {},
        {"after": True},
        {"status": 412},
        {"status": 429},
        {"status": 500},
        {"status": 502, "after": True},
        {"hold": 60, "after": True},
    ],
    ids=["drop", "drop-after", "412", "429", "500", "502-after", "silence-after"],
)
def test_what_may_pass_is_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, endpoint: str, fault: dict[str, Any]
) -> None:
    if "hold" in fault:
        monkeypatch.setattr(publisher, "_TIMEOUT", httpx2.Timeout(0.3))
    place.hub.fail(Fault(endpoint, **fault))
    assert place.publish() == place.url(1)
    place.check_one()
    assert place.commits() == 1
    assert place.hub.calls["lfs-upload"] == 2
    assert len(place.slept) == 1


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b"{}", b"null", b"<html>a proxy's</html>"])
def test_an_answer_that_is_not_the_hubs(place: Place, said: bytes) -> None:
    """Whichever call has it: it is our error or does no harm, and there is one of everything."""
    place.publish()
    for endpoint in tuple(place.hub.calls):
        place.anew()
        place.hub.fail(Fault(endpoint, status=200, after=True, content=said))
        with suppress(PublishError):
            place.publish()
        place.hub.fail()
        assert place.publish() == place.url(1)
        place.check_one()


def test_a_hub_that_stays_away_is_an_error_and_the_next_run_goes_on(place: Place) -> None:
    place.hub.fail(Fault("lfs-upload", times=1000))
    why = "RemoteProtocolError"
    with pytest.raises(PublishError, match=rf"^{NAME}: Error while uploading .* {why}: .* again"):
        place.publish()
    assert not place.pulls
    place.hub.fail()
    place.publish()
    place.check_one()


def test_the_hub_is_waited_for_as_long_as_it_asks(place: Place) -> None:
    limits = [{"Retry-After": "70"}, {"ratelimit": '"api";r=0;t=80'}, {"Retry-After": "99999"}]
    place.hub.fail(
        *(Fault("whoami", call, status=429, headers=told) for call, told in enumerate(limits, 1))
    )
    place.publish()
    least = [70 + 1, 80 + 2, 300 + 4]
    assert all(low <= slept <= low + 1 for low, slept in zip(least, place.slept, strict=True))


def test_a_set_too_large_for_one_commit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = _upload_pipeline
    first = limits.COMMIT_SIZE_SCALE[limits.INITIAL_COMMIT_SIZE_INDEX]
    assert first == publisher.INITIAL_COMMIT_SIZE
    assert limits.REGULAR_CONTENT_BYTES_BUDGET == publisher.REGULAR_CONTENT_BYTES_BUDGET

    monkeypatch.setattr(publisher, "INITIAL_COMMIT_SIZE", 2)
    place.hub.fail(Fault("commit", call=3, status=403))
    with pytest.raises(PublishError, match="may not open pull requests"):
        place.publish()
    assert len(place.at("refs/pr/1")) == len(OLD) + 4
    place.hub.fail()
    assert place.publish() == place.url(1)
    place.check_one()
    assert place.hub.calls["commit"] == 1
    history = place.repository.history(place.repository.commits[place.repository.refs["refs/pr/1"]])
    titles = [commit.title for commit in history]
    assert titles == [f"Add {KEY}", f"Add {KEY}", POST.title, "initial commit"]


@given(sizes=st.lists(st.integers(0, 30)), most=st.integers(1, 5), budget=st.integers(0, 60))
def test_parts_have_everything_once_and_keep_to_the_limits(
    sizes: list[int], most: int, budget: int
) -> None:
    operations = [
        SimpleNamespace(path_in_repo=str(number), upload_info=SimpleNamespace(size=size))
        for number, size in enumerate(sizes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publisher, "INITIAL_COMMIT_SIZE", most)
        patch.setattr(publisher, "REGULAR_CONTENT_BYTES_BUDGET", budget)
        parts = list(publisher._parts(operations))
    assert [operation for part in parts for operation in part] == operations
    for part in parts:
        assert 1 <= len(part) <= most
        assert len(part) == 1 or sum(o.upload_info.size for o in part) <= budget


def test_hashes_are_computed_once_and_uploads_are_parallel(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    compute = "huggingface_hub.lfs.sha_fileobj"
    from huggingface_hub.lfs import sha_fileobj

    monkeypatch.setattr(compute, lambda file: hashed.append(file.name) or sha_fileobj(file))
    both = threading.Barrier(2)
    place.hub.fail(
        Fault("lfs-upload", times=2, after=True, status=200, act=lambda: bool(both.wait(60))),
        Fault("commit", status=500),
        Fault("commit", call=2, after=True),
    )
    place.publish()
    place.check_one()
    assert len(hashed) == len(set(hashed)) == 2
    assert place.hub.calls["lfs-upload"] == 2


def test_a_new_version_goes_to_the_same_pull_request(place: Place) -> None:
    place.publish()
    more = FILES | {f"workloads/gemm/{KEY}.jsonl": b"{}\n{}\n{}\n"}
    new = replace(POST, title=f"Add {KEY}: definition + workloads", body="Another body.")
    assert place.publish(new, more) == place.url(1)
    (pull,) = place.pulls
    assert place.at("refs/pr/1") == OLD | more
    assert pull.title == new.title
    assert text(pull).startswith("Another body.\n")
    assert place.commits() == 2


@pytest.mark.parametrize("who", ["maintainer", "contributor"])
def test_what_others_committed_to_is_left_to_them(
    place: Place, caplog: pytest.LogCaptureFixture, who: str
) -> None:
    url = place.publish()
    definition = f"definitions/gemm/{KEY}.json"
    theirs = CommitOperationAdd(definition, b'{"name": "as a reviewer wants it"}\n')
    reviewer = HfApi(place.hub.url, place.hub.user(who))
    reviewer.create_commit(
        NAME, [theirs], commit_message="Edit", repo_type="dataset", revision="refs/pr/1"
    )
    before = place.at("refs/pr/1")
    assert before[definition] == theirs.path_or_fileobj
    assert place.publish(files=FILES | {f"traces/{KEY}.jsonl": b"{}\n"}) == url
    assert place.at("refs/pr/1") == before
    assert f"{url}: left to {who}" in caplog.text


def test_only_our_own_marker_counts(place: Place) -> None:
    files = {f"definitions/{KEY}0.json": b"{}\n"}
    longer = replace(POST, key=f"{KEY}0", title=f"Add {KEY}0: definition")
    assert place.publish(longer, files) == place.url(1)
    theirs = place.publisher(place.hub.user("somebody"))
    assert theirs.open_pull_request(POST, place.branch(FILES)) == place.url(2)
    assert place.publish() == place.url(3)
    assert place.publish() == place.url(3)
    assert place.publish(longer, files) == place.url(1)


def test_a_rejected_one_is_not_opened_anew(place: Place) -> None:
    place.publish()
    place.hub.close(place.repository, 1, "We have it\nunder another name.")
    expected = r"discussions/1 was closed .* after \"We have it under another name\.\"; .* Reopen"
    with pytest.raises(RejectedError, match=expected):
        place.publish()
    assert len(place.pulls) == 1
    place.hub.set_status(place.pulls[0], "open", "maintainer")
    assert place.publish() == place.url(1)


def test_a_merged_one_is_done_and_what_is_new_since_is_another(place: Place) -> None:
    place.publish()
    place.hub.merge(place.repository, 1)
    assert place.publish() == place.url(1)
    more = FILES | {f"traces/gemm/{KEY}.jsonl": b"{}\n"}
    assert place.publish(files=more) == place.url(2)
    assert list(place.repository.changes(place.pulls[1])) == [f"traces/gemm/{KEY}.jsonl"]


def test_nothing_new(place: Place) -> None:
    place.hub.push(place.repository, FILES)
    with pytest.raises(NothingNewError, match=f"{KEY}: {NAME} has all of its files already"):
        place.publish()
    assert not place.pulls


def test_the_text_fits_and_shows_no_picture(place: Place) -> None:
    body = f"Before.\n![Batch sizes]({KEY}.png)\nAfter."
    pictures = {f"{KEY}.png": place.clone / "plot.png"}
    log = "a line of the log\n" * 10_000
    place.publish(replace(POST, body=body, pictures=pictures, log=log))
    told = text(place.pulls[0])
    assert told.startswith("Before.\nAfter.\n")
    assert BODY_LIMIT - 100 < len(told) <= BODY_LIMIT
    assert told.endswith(f"{marker(KEY, 'dataset')}\n")


def test_states(place: Place) -> None:
    ours, repository = place.publisher(), place.repository
    url = place.publish()
    pull = place.pulls[0]
    assert (ours.state_of(url).state, ours.state_of(url).said) == ("open", None)
    place.hub.comment(pull, "Please add \N{MULTIPLICATION SIGN} more.", "maintainer")
    place.hub.comment(pull, "Done.", "contributor")
    place.hub.set_status(pull, "draft", "contributor")
    seen = ours.state_of(url)
    assert (seen.state, seen.said) == ("draft", "Please add \N{MULTIPLICATION SIGN} more.")
    assert seen.checked
    place.hub.close(repository, 1, " No.\n")
    assert (ours.state_of(url).state, ours.state_of(url).said) == ("rejected", "No.")
    place.hub.set_status(pull, "open", "maintainer")
    place.hub.merge(repository, 1)
    assert ours.state_of(url).state == "merged"
    place.hub.fail(Fault("discussion", status=500))
    assert ours.state_of(url).state == "merged"

    with pytest.raises(GoneError, match=f"{place.url(2)}: .* no such pull request any more"):
        ours.state_of(place.url(2))
    for wrong in ("file:///outbox/x.md", f"{url}/files", place.url(1).replace(NAME, "a/b")):
        with pytest.raises(PublishError, match="is no pull request of"):
            ours.state_of(wrong)
    place.hub.move(repository, "elsewhere/trace")
    with pytest.raises(GoneError, match="has moved to elsewhere/trace"):
        place.publisher().state_of(url)


def test_a_discussion_is_no_pull_request(place: Place) -> None:
    place.publish()
    place.pulls[0].base = ""
    with pytest.raises(PublishError, match="no pull request"):
        place.publisher().state_of(place.url(1))


def _outside(place: Place) -> Path:
    path = place.clone.parent / "secret.json"
    path.write_text("{}")
    return path


def _link(place: Place) -> Path:
    path = place.clone / "link.json"
    path.symlink_to(_outside(place))
    return path


def _below_a_link(place: Place) -> Path:
    _outside(place)
    (place.clone / "folder").symlink_to(place.clone.parent)
    return place.clone / "folder" / "secret.json"


def _huge(place: Place) -> Path:
    path = place.clone / "huge.safetensors"
    with path.open("wb") as stream:
        stream.truncate(5 * 1024**3)
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda place: place.clone / "missing.json", "missing.json: cannot be published"),
        (lambda place: place.clone, "is no regular file"),
        (_link, "link.json: is no regular file"),
        (_below_a_link, "folder: leads out of"),
        (_huge, "huge.safetensors: has 5368709120 bytes"),
    ],
)
def test_a_file_that_cannot_be_published(place: Place, make: Any, expected: str) -> None:
    branch = place.branch(FILES)
    wrong = replace(branch, files={**branch.files, PurePosixPath("x.json"): make(place)})
    with pytest.raises(OnboardError, match=expected):
        place.publisher().open_pull_request(POST, wrong)
    assert not place.hub.seen


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/x", ".", ".git/config", "a/.git/x", "a\\..\\x", "a\nb"]
)
def test_a_path_that_escapes(place: Place, path: str) -> None:
    branch = place.branch(FILES)
    wrong = replace(branch, files={PurePosixPath(path): next(iter(branch.files.values()))})
    with pytest.raises(PublishError, match="cannot be a file of the repository"):
        place.publisher().open_pull_request(POST, wrong)
    assert not place.hub.seen


def test_a_folder_for_locks_that_cannot_be(place: Place) -> None:
    (place.clone.parent / "locks").write_text("")
    with pytest.raises(PublishError, match="locks: cannot be opened"):
        place.publish()


def test_a_name_that_escapes_and_a_post_for_another_repository(place: Place) -> None:
    ours, branch = place.publisher(), place.branch(FILES)
    with pytest.raises(InputError, match=r"'\.\./x' is not a valid name"):
        ours.open_pull_request(replace(POST, key="../x"), branch)
    with pytest.raises(PublishError, match="is for a/b, not flashinfer-ai"):
        ours.open_pull_request(replace(POST, repository="a/b"), branch)
    assert not place.hub.seen


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        ("unknown", "the Hub does not accept the token"),
        ("reader", "the token .* may not open pull requests there; it needs the type `write`"),
        ("gated", "is gated; accept its terms"),
        ("nowhere", "does not exist, or the token .* may not see it; set publish.dataset"),
        ("moved", "has moved to elsewhere/trace; .* set it as publish.dataset"),
    ],
)
def test_what_keeps_us_out(
    place: Place, caplog: pytest.LogCaptureFixture, who: str, expected: str
) -> None:
    token = place.hub.user(who, read_only=who == "reader")
    if who == "unknown":
        del place.hub.users[token]
    if who == "gated":
        place.repository.gated = True
    if who == "moved":
        place.hub.move(place.repository, "elsewhere/trace")
    if who == "nowhere":
        place.hub.repositories.clear()
    ours = place.publisher(token)
    with caplog.at_level(logging.DEBUG), pytest.raises(PublishError, match=expected) as caught:
        ours.open_pull_request(POST, place.branch(FILES))
    assert str(caught.value).startswith(f"{NAME}: ")
    for told in (str(caught.value), repr(caught.value), repr(ours), caplog.text):
        assert token not in told
    assert not place.pulls
    assert not place.slept
    assert not place.hub.storage


def test_a_secret_that_the_hub_repeats_is_not_told(place: Place) -> None:
    said = {"error": f"no {place.token}"}
    place.hub.fail(Fault("preupload", status=403, content=said))
    with pytest.raises(PublishError, match="403, no") as caught:
        place.publish()
    assert place.token not in str(caught.value)


def test_the_client_does_not_wait_for_ever(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.publish()
    monkeypatch.setattr(publisher, "_TIMEOUT", httpx2.Timeout(0.2))
    place.hub.fail(Fault("info", times=1000, hold=60))
    with pytest.raises(PublishError, match="ReadTimeout: timed out; publishing again"):
        place.publisher().state_of(place.url(1))
