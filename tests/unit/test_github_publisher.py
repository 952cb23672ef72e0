"""Publishing to a GitHub that counts: opened once, found again, kept apart, and explained."""

from __future__ import annotations

import base64
import datetime as dt
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from pydantic import SecretStr

from tasks.coverage_doc import PATH, CoverageDocument
from tasks.errors import InputError, PublishError
from tasks.git import AUTHOR, git
from tasks.manifest import KernelEntry, RunManifest
from tasks.publish import render
from tasks.publish.base import Branch, Post, marker
from tasks.publish.github import GitHubPublisher, Pace
from tasks.publish.render import Subject
from tasks.repos import clone
from tests.conftest import DATA
from tests.fakes.github import GitHub, secondary_limit
from tests.fakes.github_state import Issue, Repository
from tests.fakes.web import EVERY, Answer, Fault, Request

NAME = "flashinfer-ai/flashinfer-bench"
DOCUMENT = (DATA / "flashinfer-bench" / PATH).read_bytes()
BRANCH = "feat/def-k.m"
FORK = "contributor/flashinfer-bench"
WRITES = {"repos/create-fork", "git-receive-pack", "pulls/create", "issues/create"}
OTHER = {"GIT_COMMITTER_NAME": "Someone", "GIT_COMMITTER_EMAIL": "someone@example.org"}
QUICK = Pace(
    requests=0, writes=0, answer=60, backoff=0, limited=0, longest=0, again=(0, 0), fork=(0, 0)
)


@dataclass
class Place:
    """A GitHub with a repository, a clone of it, and somebody who may not push to it."""

    hub: GitHub
    folder: Path
    token: str
    upstream: Repository
    clone: Path
    publisher: GitHubPublisher = field(init=False)

    def __post_init__(self) -> None:
        self.publisher = self.of(self.token)

    def of(self, token: str, pace: Pace = QUICK) -> GitHubPublisher:
        return GitHubPublisher(self.hub.api, SecretStr(token), self.folder / "locks", pace)

    @property
    def fork(self) -> Repository:
        (found,) = (r for r in self.hub.repositories if r.name == FORK)
        return found

    def branch(self, text: str = "text", name: str = BRANCH, path: str = "docs/new.md") -> Branch:
        content = self.folder / "content" / f"{abs(hash(text))}"
        content.parent.mkdir(exist_ok=True)
        content.write_text(text)
        return Branch(name, self.clone, f"docs: {text}\n", {PurePosixPath(path): content})

    def open(self, text: str = "text", said: str = "The body.", **options: Any) -> str:
        made = replace(POST, body=said, **options)
        return self.publisher.open_pull_request(made, self.branch(text))

    def update(self) -> None:
        """Bring the clone up to date."""
        clone.update("flashinfer_bench", str(self.upstream.git.path), self.clone)

    def push(self, repository: Repository, branch: str, text: str, **who: str) -> str:
        """Let somebody else commit to a branch."""
        made = repository.git
        entries = [("100644", made.write(text.encode()), "docs/theirs.md")]
        tip = made.sha(f"refs/heads/{branch}") or made.sha("main")
        tree = made.write_tree(tip, entries)
        sha = made.git("commit-tree", tree, "-p", tip, "-m", text, env=who or OTHER)
        made.update(f"refs/heads/{branch}", sha)
        return sha

    def counted(self) -> tuple[int, int, int, int]:
        """Return how many forks, branches of ours, pull requests and issues there are."""
        forks = [r for r in self.hub.repositories if r.parent]
        branches = [b for r in forks for b in r.git.refs("refs/heads/") if b.endswith(BRANCH)]
        issues = [i for r in self.hub.repositories for i in r.issues]
        pulls = [i for i in issues if i.pull]
        return len(forks), len(branches), len(pulls), len(issues) - len(pulls)


POST = Post("k.m", "coverage", NAME, "docs: mark k as covered", "The body.")
ISSUE = Post("k", "kernel-request", NAME, "Kernel request: gdn", "Please.", ("enhancement",))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with GitHub(tmp_path / "hub") as hub:
        content = {PATH: DOCUMENT, "README.md": b"#\n"}
        upstream = hub.repository(NAME, content, writers={"maintainer"})
        upstream.git.git("config", "uploadpack.allowFilter", "true")
        made = Place(hub, tmp_path, hub.user("contributor"), upstream, tmp_path / "clone")
        made.update()
        yield made


def pull_of(place: Place, url: str) -> Issue:
    return place.upstream.issues[int(url.rpartition("/")[2]) - 1]


def tip(repository: Repository, branch: str = BRANCH) -> str:
    return repository.git.sha(f"refs/heads/{branch}")


# Pull requests.


def test_a_pull_request_from_a_fork(place: Place) -> None:
    url = place.open()
    assert url == f"{place.hub.url}/{NAME}/pull/1"
    opened = pull_of(place, url)
    assert opened.title == POST.title
    assert opened.body == f"The body.\n\n{marker('k.m', 'coverage')}\n"
    assert opened.pull
    assert (opened.pull.draft, opened.pull.base, opened.pull.head) == (False, "main", place.fork)
    changed = place.fork.git.changed("main", BRANCH)
    assert changed == [("added", "docs/new.md")]
    assert place.upstream.git.refs("refs/heads/").keys() == {"refs/heads/main"}


def test_called_again_it_changes_nothing(place: Place) -> None:
    urls = {place.open()}
    before = tip(place.fork)
    place.hub.fail()
    urls |= {place.open(), place.of(place.token).open_pull_request(POST, place.branch())}
    assert len(urls) == 1
    assert tip(place.fork) == before
    assert not WRITES & place.hub.calls.keys()
    assert "pulls/update" not in place.hub.calls


def test_with_push_right_there_is_no_fork(place: Place) -> None:
    url = place.of(place.hub.user("maintainer")).open_pull_request(POST, place.branch())
    assert pull_of(place, url).author == "maintainer"
    assert tip(place.upstream)
    assert place.counted() == (0, 0, 1, 0)


def test_new_content_goes_to_the_open_one(place: Place) -> None:
    url = place.open("one")
    pull_of(place, url).title = "docs: as a reviewer calls it"
    assert place.open("two", "Another body.") == url
    assert place.fork.git.git("show", f"{BRANCH}:docs/new.md") == "two"
    assert place.fork.git.git("rev-list", "--count", f"main..{BRANCH}") == "1"
    assert pull_of(place, url).body.startswith("Another body.")
    assert pull_of(place, url).title == "docs: as a reviewer calls it"


def test_what_still_merges_is_not_pushed_again(place: Place) -> None:
    """A push costs reviewers their approvals; upstream moves on without us every day."""
    url, before = place.open(), tip(place.fork)
    place.push(place.upstream, "main", "elsewhere")
    place.update()
    assert place.open() == url
    assert tip(place.fork) == before


def test_a_draft_is_left_to_those_who_work_on_it(place: Place) -> None:
    url = place.open("scaffold", draft=True)
    opened = pull_of(place, url)
    assert opened.pull
    assert opened.pull.draft
    theirs = place.push(place.fork, BRANCH, "their work", **AUTHOR)
    assert place.open("another scaffold", "Another body.", draft=True) == url
    assert (tip(place.fork), opened.body[:9]) == (theirs, "The body.")


def test_a_branch_that_others_committed_to_is_left_to_them(place: Place) -> None:
    url = place.open("one")
    theirs = place.push(place.fork, BRANCH, "their fix")
    assert place.open("two", "Another body.") == url
    assert tip(place.fork) == theirs


def test_a_commit_that_arrives_meanwhile_is_not_lost(place: Place) -> None:
    place.open("one")
    theirs: list[str] = []
    route = place.hub.route

    def interrupt(request: Request) -> tuple[str, Callable[[], Answer]]:
        if "service=git-receive-pack" in request.target:
            theirs.append(place.push(place.fork, BRANCH, "their fix"))
        return route(request)

    place.hub.route = interrupt  # type: ignore[method-assign]
    with pytest.raises(PublishError, match="run it again later"):
        place.open("two")
    assert theirs == [tip(place.fork)]


def test_a_merge_by_others_is_no_work_of_theirs(place: Place) -> None:
    url = place.open("one")
    ours, main = tip(place.fork), place.push(place.upstream, "main", "elsewhere")
    bare = place.fork.git
    bare.git("fetch", "--quiet", str(place.upstream.git.path), "main")
    tree = bare.merged(ours, main)
    merge = bare.git("commit-tree", tree, "-p", ours, "-p", main, "-m", "Update", env=OTHER)
    bare.update(f"refs/heads/{BRANCH}", merge)
    place.update()
    assert place.open("two") == url
    assert bare.git("show", f"{BRANCH}:docs/new.md") == "two"


def test_somebody_elses_branch_of_that_name_is_not_overwritten(place: Place) -> None:
    place.publisher.open_pull_request(replace(POST, key="x"), place.branch(name="feat/x"))
    theirs = place.push(place.fork, BRANCH, "their own")
    with pytest.raises(PublishError, match=rf"{FORK}: branch {BRANCH} has commits of Someone"):
        place.open()
    assert tip(place.fork) == theirs
    place.hub.fail(Fault("repos/compare-commits", 2, status=404))  # they share no commit
    with pytest.raises(PublishError, match="has commits of somebody"):
        place.open()
    place.fork.git.update(f"refs/heads/{BRANCH}", place.fork.git.sha("main"))
    place.open()  # nobody's: without a commit


def test_a_pull_request_from_the_branch_that_is_not_ours(place: Place) -> None:
    url = place.open()
    pull_of(place, url).body = "Written anew by hand."
    with pytest.raises(PublishError, match=f"without our marker \\({url}\\)"):
        place.open()
    place.hub.close(place.upstream, 1)
    assert place.open() != url


def test_a_merged_one_is_done(place: Place) -> None:
    url = place.open()
    place.hub.merge(place.upstream, 1)
    assert place.open() == url  # the clone has not heard of it
    assert place.open("more") == url
    place.update()
    assert place.open() == url
    assert place.counted() == (1, 1, 1, 0)


def test_what_comes_after_a_merged_one_is_another(place: Place) -> None:
    """Defined first, with workloads later: the row is marked twice."""
    first = place.open("defined")
    place.hub.merge(place.upstream, 1)
    place.update()
    second = place.open("with workloads")
    assert (second, place.open("with workloads")) == (f"{place.hub.url}/{NAME}/pull/2", second)
    place.hub.merge(place.upstream, 2)
    assert place.open("with workloads") == second != first
    assert place.upstream.git.git("show", "main:docs/new.md") == "with workloads"


def test_a_rejected_one_is_not_opened_anew(place: Place) -> None:
    url = place.open()
    place.hub.close(place.upstream, 1, "Not like\nthis.")
    for _ in range(2):
        with pytest.raises(PublishError, match=r"without being merged \(Not like this\.\)") as told:
            place.open("two")
        assert url in str(told.value)
    assert place.counted() == (1, 1, 1, 0)


def test_a_fork_with_another_name_and_a_repository_with_that_name(place: Place) -> None:
    may = {"contributor"}
    place.hub.repository(FORK, {"README.md": b"mine\n"}, writers=may)
    renamed = place.hub.repository("contributor/bench-1", place.upstream.git.path, writers=may)
    renamed.parent = place.upstream
    place.open()
    assert tip(renamed)


def test_a_fork_that_the_clone_does_not_know_is_sent_what_is_new(place: Place) -> None:
    """A clone has few of the blobs: what the fork has is neither sent nor fetched first."""
    place.publisher.open_pull_request(replace(POST, key="x"), place.branch(name="feat/x"))
    for number in range(3):
        place.push(place.upstream, "main", f"upstream {number}")
    place.update()
    place.push(place.upstream, "main", "what the clone has not heard of")
    fork = place.fork.git
    fork.git("fetch", "--quiet", str(place.upstream.git.path), "main:main")
    git("remote", "set-url", "origin", "file:///gone", cwd=place.clone)
    listed = git("rev-list", "--objects", "--missing=print", "--all", cwd=place.clone)
    assert "?" in listed
    place.open()
    assert fork.git("rev-list", "--count", f"main..{BRANCH}") == "1"


MODEL = "MiniMax M2"
ROWS = {
    # Neighbours, and rows that only the count below the table brings together.
    "rmsnorm_h3072": "rmsnorm",
    "fused_add_rmsnorm_h3072": "rmsnorm",
    "rope_with_cos_sin_cache_neox_style_d128_rd64": "rope",
    "gemm_n512_k3072": "gemm",
    "top_p_sampling_from_probs_v7": "sampling",
}


def coverage(place: Place, name: str) -> tuple[Post, Branch]:
    entries = [
        KernelEntry(definition_name=n, op_type=op, phase1_status="new", phase3_status="done")
        for n, op in ROWS.items()
    ]
    run = RunManifest(
        model_slug="minimax-m2",
        hf_repo_id="MiniMaxAI/MiniMax-M2",
        date=dt.date(2026, 1, 1),
        kernels=entries,
    )
    nowhere = place.folder / "nowhere"
    subject = Subject(run, run.kernel(name), nowhere, nowhere, place.folder, nowhere)
    edited = place.folder / f"{name}.mdx"
    return render.coverage_pull_request(subject, place.clone, "https://huggingface.co/x", edited)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1)])
def test_the_pull_requests_of_one_model_merge_in_any_order(
    place: Place, order: Sequence[int]
) -> None:
    names = list(ROWS)
    before = CoverageDocument.parse(DOCUMENT.decode())
    urls = {name: place.publisher.open_pull_request(*coverage(place, name)) for name in names}
    in_the_way = 0
    for index in order:
        place.hub.merge(place.upstream, pull_of(place, urls[names[index]]).number)
        place.update()
        for name in names:
            pull = pull_of(place, urls[name])
            if pull.state == "closed":
                continue
            in_the_way += not place.upstream.git.merged("main", f"refs/pull/{pull.number}/head")
            assert place.publisher.open_pull_request(*coverage(place, name)) == urls[name]
    assert in_the_way  # else nothing was shown
    assert place.counted() == (1, 0, 5, 0)
    assert all(issue.pull and issue.pull.merged_by for issue in place.upstream.issues)
    after = CoverageDocument.parse(place.upstream.git.git("show", f"main:{PATH}") + "\n")
    assert {n: after.statuses(MODEL)[n] for n in names} == dict.fromkeys(names, "✅")
    assert len(after.rows(MODEL)) == len(before.rows(MODEL)) + 2
    assert not after.findings(MODEL)


# Issues.


def test_an_issue_is_opened_once_and_left_as_it_is(place: Place) -> None:
    url = place.publisher.open_issue(ISSUE)
    assert url == f"{place.hub.url}/{NAME}/issues/1"
    place.open()  # is listed with the issues
    again = replace(ISSUE, title="Other", body="Of another model.", asked_for="other/k")
    place.hub.close(place.upstream, 1)
    assert place.publisher.open_issue(again) == url
    assert place.upstream.issues[0].body == f"Please.\n\n{marker('k', 'kernel-request')}\n"
    other = place.publisher.open_issue(replace(ISSUE, kind="template-request"))
    assert other == f"{place.hub.url}/{NAME}/issues/3"


def test_a_marker_in_somebody_elses_issue_is_not_ours(place: Place) -> None:
    theirs = place.of(place.hub.user("somebody")).open_issue(ISSUE)
    assert place.publisher.open_issue(ISSUE) != theirs


def test_labels_of_those_who_may_set_them(place: Place) -> None:
    place.of(place.hub.user("maintainer")).open_issue(ISSUE)
    place.publisher.open_issue(ISSUE)
    assert [issue.labels for issue in place.upstream.issues] == [["enhancement"], []]


def test_titles_and_texts_have_limits(place: Place) -> None:
    place.publisher.open_issue(replace(ISSUE, title="x" * 300))
    assert place.upstream.issues[0].title == "x" * 255 + "…"
    with pytest.raises(PublishError, match="is 70000 characters long"):
        place.publisher.open_issue(replace(ISSUE, key="other", body="x" * 70_000))
    long = replace(POST, log="\n".join(f"line {n}" for n in range(20_000)))
    url = place.publisher.open_pull_request(long, place.branch())
    assert len(pull_of(place, url).body) <= 65_536
    assert marker("k.m", "coverage") in pull_of(place, url).body


# Exactly once.


def opened(place: Place, kind: str) -> str:
    return place.publisher.open_issue(ISSUE) if kind == "issue" else place.open()


def kill_at(place: Place, call: int, kind: str, *, after: bool) -> None:
    """Let a process publish, and kill it at a call: before it takes effect, or after."""
    started = threading.Event()

    def kill() -> None:
        started.wait(60)
        os.kill(child.pid or 0, signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=opened, args=(place, kind))
    place.hub.fail(Fault(EVERY, call, after=after, act=kill))
    child.start()
    started.set()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    place.hub.fail()


@pytest.mark.parametrize(("kind", "expected"), [("pull", (1, 1, 1, 0)), ("issue", (0, 0, 0, 1))])
def test_killed_at_any_call_it_goes_on_where_it_stopped(
    tmp_path: Path, kind: str, expected: tuple[int, ...]
) -> None:
    with GitHub(tmp_path / "hub") as hub:
        source = hub.repository(NAME, {PATH: DOCUMENT})
        token = hub.user("contributor")
        made = Place(hub, tmp_path, token, source, tmp_path / "clone")
        made.update()

        def fresh() -> Place:
            hub.repositories.clear()
            folder = tmp_path / "hub" / f"{hub.calls.total()}-{len(hub.seen)}"
            hub.folder = folder
            return replace(made, upstream=hub.repository(NAME, source.git.path))

        place = fresh()
        hub.seen.clear()
        opened(place, kind)
        assert place.counted() == expected
        calls = [seen.endpoint for seen in hub.seen]
        kills = [(n, False) for n in range(1, len(calls) + 1)]
        kills += [(n, True) for n, name in enumerate(calls, 1) if name in WRITES]
        assert len(kills) > len(calls)
        for number, after in kills:
            place = fresh()
            kill_at(place, number, kind, after=after)
            opened(place, kind)
            assert place.counted() == expected, (calls[number - 1], after)


LOST = {
    "lost": Fault("", after=True),
    "not arrived": Fault("", times=2),
    "failed after": Fault("", status=502, after=True),
    "failed": Fault("", status=500, times=2),
    "late": Fault("", hold=60, after=True),
    "too many": Fault("", status=429, times=3),
    "too many, wait": Fault("", status=429, headers={"Retry-After": "100000"}),
    "too many at once": secondary_limit("", wait=None),
}


@pytest.mark.parametrize(
    ("endpoint", "what"),
    [
        *(("issues/create", what) for what in LOST),
        *(("pulls/create", what) for what in ("lost", "failed", "failed after")),
        *(("repos/create-fork", what) for what in ("lost", "failed", "too many")),
    ],
)
def test_an_answer_that_is_lost_or_refused_for_a_while(
    place: Place, endpoint: str, what: str
) -> None:
    place.publisher = place.of(place.token, replace(QUICK, answer=1 if what == "late" else 60))
    place.hub.fail(replace(LOST[what], endpoint=endpoint))
    kind = "issue" if endpoint.startswith("issues") else "pull"
    opened(place, kind)
    assert place.counted() == ((0, 0, 0, 1) if kind == "issue" else (1, 1, 1, 0))


def test_a_read_that_fails_is_repeated(place: Place) -> None:
    place.hub.fail(Fault("pulls/list", times=2), Fault("repos/get", status=502, times=2))
    place.open()


def test_a_push_whose_answer_is_lost(place: Place) -> None:
    place.hub.fail(Fault("git-receive-pack", after=True))
    with pytest.raises(PublishError, match="run it again later"):
        place.open()
    place.open()
    assert place.counted() == (1, 1, 1, 0)


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b"{}", b"null", b"<html>a proxy's</html>"])
@pytest.mark.parametrize("kind", ["pull", "issue"])
def test_an_answer_that_is_not_githubs(place: Place, kind: str, said: bytes) -> None:
    """Whichever call has it: it is our error or does no harm, and there is one of everything."""
    opened(place, kind)
    endpoints = [name for name in place.hub.calls if not name.startswith(("git-", "info"))]
    if said in {b"", b"null", b"[]"}:  # which is a list with nothing in it
        endpoints = [name for name in endpoints if "/list" not in name]
    for endpoint in endpoints:
        place.hub.fail(Fault(endpoint, status=200, after=True, content=said))
        with suppress(PublishError):
            opened(place, kind)
        place.hub.fail()
    opened(place, kind)
    assert place.counted() == ((0, 0, 0, 1) if kind == "issue" else (1, 1, 1, 0))


@pytest.mark.parametrize("said", [b"", b"{", b"{}", b"<html>a proxy's</html>"])
def test_a_creation_whose_answer_is_not_githubs(place: Place, said: bytes) -> None:
    for endpoint, kind in (("issues/create", "issue"), ("pulls/create", "pull")):
        place.hub.fail(Fault(endpoint, status=200, after=True, content=said))
        assert opened(place, kind) == opened(place, kind)
    assert place.counted() == (1, 1, 1, 1)
    place.hub.fail(Fault("repos/get", status=200, content=said))
    with pytest.raises(PublishError, match=rf"^{NAME}: (GitHub's answer is not|has moved)"):
        place.open()


def test_a_branch_that_github_finds_a_moment_later(place: Place) -> None:
    late = {"message": "Validation Failed", "errors": [{"field": "head", "code": "invalid"}]}
    place.hub.fail(Fault("pulls/create", status=422, content=late))
    place.open()


def test_siblings_open_one(place: Place) -> None:
    def publish() -> None:
        urls.append(place.of(place.token).open_issue(ISSUE))

    urls: list[str] = []
    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(urls) == 4
    assert len(set(urls)) == place.counted()[3] == 1


# Bad input.


def moved(place: Place) -> None:
    place.hub.move(place.upstream, "elsewhere/bench")


def vanished(place: Place) -> None:
    place.hub.repositories.clear()


def refused(place: Place) -> None:
    told = {"message": "Resource not accessible by personal access token"}
    place.hub.fail(Fault("repos/create-fork", status=403, content=told))


def used_up(place: Place) -> None:
    place.hub.limit(600)


def down(place: Place) -> None:
    place.hub.fail(Fault(EVERY, times=99))


def failing(place: Place) -> None:
    place.hub.fail(Fault("repos/get", status=500, times=9, content={"message": "Oh no"}))


def another_repository(place: Place) -> None:
    git("commit", "--quiet", "--allow-empty", "-m", "mine", cwd=place.clone, env=AUTHOR)


def no_base(place: Place) -> None:
    errors = [{"resource": "PullRequest", "field": "base", "code": "invalid"}]
    told = {"message": "Validation Failed", "errors": errors}
    place.hub.fail(Fault("pulls/create", status=422, content=told))


def empty_fork(place: Place) -> None:
    place.hub.fail(Fault("repos/get-branch", status=404, times=9))


def no_right_to_push(place: Place) -> None:
    place.hub.fail(Fault("info/refs", status=403, times=9))


def bad_token(place: Place) -> None:
    place.publisher = place.of("ghp_unknown")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (moved, r"has moved to elsewhere/bench; name that in \[publish\]"),
        (vanished, "is not there, or the token may not see"),
        (
            refused,
            r"the token may not do this \(Resource not accessible.*\); a classic token needs",
        ),
        (used_up, r"requests are used up \(API rate limit exceeded.*run it again later"),
        (down, r"GitHub cannot be reached \(\w+\); run it again later"),
        (failing, r"GitHub fails \(Oh no\)"),
        (another_repository, "is not on its branch main; update the clone"),
        (no_base, r"refuses it \(Validation Failed: base is invalid\)"),
        (empty_fork, f"its fork {FORK} is still without its branch main"),
        (no_right_to_push, "error: 403; a classic token needs the scope"),
        (bad_token, r"does not take the token \(Bad credentials\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_said_with_the_repository(
    place: Place, wrong: Callable[[Place], None], message: str
) -> None:
    wrong(place)
    with pytest.raises(PublishError, match=message) as told:
        place.open()
    assert str(told.value).startswith(f"{NAME}: ")
    assert place.counted()[2:] == (0, 0)


def test_what_the_repository_has_already(place: Place) -> None:
    same = place.branch(DOCUMENT.decode(), path=PATH)
    with pytest.raises(PublishError, match="has all of 'docs: mark k as covered' already"):
        place.publisher.open_pull_request(POST, same)
    assert place.counted() == (0, 0, 0, 0)


@pytest.mark.parametrize("name", ["a b", "-x/../y", "x.lock", "a:b", "refs//x"])
def test_a_branch_that_cannot_be(place: Place, name: str) -> None:
    with pytest.raises(PublishError, match=f"^{NAME}: "):
        place.publisher.open_pull_request(POST, place.branch(name=name))
    assert place.counted()[2] == 0


def test_locks_that_cannot_be_made(place: Place) -> None:
    (place.folder / "locks").write_text("")
    with pytest.raises(PublishError, match=r"locks: cannot be written"):
        place.open()


@pytest.mark.parametrize("url", ["", "api.github.com", "ftp://x", "https://", "https://me:x@h/api"])
def test_an_address_that_is_none(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match=r"publish\.github_url") as told:
        GitHubPublisher(url, SecretStr("x"), tmp_path)
    assert "me:x" not in str(told.value)


@pytest.mark.parametrize(
    ("api", "web"),
    [
        ("https://api.github.com", "https://github.com"),
        ("https://api.acme.ghe.com/", "https://acme.ghe.com"),
        ("https://git.acme.com/api/v3", "https://git.acme.com"),
        ("https://api.acme.com:8443/api/v3/", "https://api.acme.com:8443"),
    ],
)
def test_where_people_look(tmp_path: Path, api: str, web: str) -> None:
    publisher = GitHubPublisher(api, SecretStr("x"), tmp_path)
    with pytest.raises(PublishError, match=f"is no pull request or issue at {re.escape(web)} "):
        publisher.state_of("file:///outbox/pull/1")


# What has become of it.


def test_states_of_a_pull_request(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    url = place.open(draft=True)
    opened = pull_of(place, url)
    assert opened.pull
    state = place.publisher.state_of

    def of(login: str, text: str) -> None:
        place.hub.add_comment(place.upstream, opened, text, login)

    def seen() -> tuple[str, str | None]:
        found = state(url)
        assert found.checked
        return found.state, found.said

    assert seen() == ("draft", None)
    opened.pull.draft = False
    of("contributor", "Ready.")
    assert seen() == ("open", None)
    tell = place.hub.told_user
    bot = lambda login: tell(login) | ({"type": "Bot"} if login == "ci" else {})  # noqa: E731
    monkeypatch.setattr(place.hub, "told_user", bot)
    of("ci", "All green.")
    assert seen() == ("open", None)
    place.hub.review(place.upstream, 1, "Please sort.")
    assert seen() == ("changes_requested", "Please sort.")
    place.hub.review(place.upstream, 1, "", "COMMENTED")
    place.hub.review(place.upstream, 1, "Good.", "APPROVED", by="another")
    assert seen()[0] == "changes_requested"
    place.hub.review(place.upstream, 1, "", "APPROVED")
    assert seen()[0] == "open"
    place.hub.merge(place.upstream, 1)
    assert seen()[0] == "merged"


def test_a_rejected_pull_request_and_its_last_words(place: Place) -> None:
    url = place.open()
    place.hub.close(place.upstream, 1, "Not like this." + "!" * 2000)
    found = place.publisher.state_of(url)
    assert found.state == "rejected"
    assert found.said
    assert (found.said[:15], len(found.said)) == ("Not like this.!", 1000)


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("", "closed"),
        ("completed", "closed"),
        ("duplicate", "closed"),
        ("not_planned", "rejected"),
    ],
)
def test_states_of_an_issue(
    place: Place, monkeypatch: pytest.MonkeyPatch, reason: str, state: str
) -> None:
    url = place.publisher.open_issue(ISSUE)
    assert place.publisher.state_of(f"{url}/").state == "open"
    told = place.hub.told_issue
    more = {"state_reason": reason} if reason else {}
    monkeypatch.setattr(place.hub, "told_issue", lambda *a: told(*a) | more)
    place.hub.close(place.upstream, 1, "Thank you.")
    found = place.publisher.state_of(url)
    assert (found.state, found.said) == (state, "Thank you.")


def test_a_repository_that_moved_is_still_read(place: Place) -> None:
    url = place.open()
    place.hub.merge(place.upstream, 1)
    place.hub.move(place.upstream, "elsewhere/bench")
    assert place.publisher.state_of(url).state == "merged"


@pytest.mark.parametrize(
    "path",
    [
        "a/b",
        "a/b/pull/x",
        "a/b/tree/1",
        "a/b/pull/1/files",
        "../b/pull/1",
        "a/b/pull/1?x",
        "a/b/pull/²",
    ],
)
def test_an_url_that_is_no_pull_request(place: Place, path: str) -> None:
    place.hub.fail()
    with pytest.raises(PublishError, match="is no pull request or issue at"):
        place.publisher.state_of(f"{place.hub.url}/{path}")
    assert not place.hub.calls


def test_a_pull_request_that_is_not_there(place: Place) -> None:
    with pytest.raises(PublishError, match=f"^{NAME}: is not there"):
        place.publisher.state_of(f"{place.hub.url}/{NAME}/pull/7")


# The token.


def test_the_token_is_nowhere(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    commands: list[bytes] = []

    def look() -> None:
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                commands.append(command.read_bytes())
            except OSError:  # it has ended
                continue

    for endpoint in ("git-receive-pack", "info/refs"):
        place.hub.fail(Fault(endpoint, times=9, act=look))
        with pytest.raises(PublishError) as told:
            place.open()
        commands.append(str(told.value).encode())
    place.hub.fail(Fault("git-upload-pack", act=look))
    place.open()
    place.open("two")
    commands += [repr(vars(place.publisher)).encode(), caplog.text.encode()]
    commands += [path.read_bytes() for path in (place.clone / ".git").glob("*") if path.is_file()]
    spoken = b"\n".join(commands)
    assert b"git\0push" in spoken.replace(b"/", b"\0") or b"\0push\0" in spoken
    encoded = base64.b64encode(f"x-access-token:{place.token}".encode())
    assert place.token.encode() not in spoken
    assert encoded not in spoken


@pytest.mark.parametrize("token", ["", "ghp_x\n", " ghp_x", "ghp_é", "ghp_\x00"])
def test_what_cannot_be_a_token_is_not_repeated(tmp_path: Path, token: str) -> None:
    with pytest.raises(InputError, match="github_token: is no token") as told:
        GitHubPublisher("https://api.github.com", SecretStr(token), tmp_path)
    assert "ghp_" not in str(told.value)


def test_somebodys_own_git_configuration_does_not_matter(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = place.folder / "helper"
    helper.write_text(f"#!/bin/sh\ntouch {place.folder}/asked\necho password=x\n")
    helper.chmod(0o755)
    (place.folder / ".gitconfig").write_text(
        f"[credential]\nhelper = {helper}\n[core]\naskPass = {helper}\n"
        f'[url "file:///gone/"]\ninsteadOf = {place.hub.url}/\n'
        f'[url "file:///gone/"]\npushInsteadOf = {place.hub.url}/\n'
    )
    monkeypatch.setenv("HOME", str(place.folder))
    monkeypatch.setenv("SSH_ASKPASS", str(helper))
    place.open()
    place.open("two")
    place.hub.fail(Fault("info/refs", status=401, times=9))
    with pytest.raises(PublishError, match="could not read Username.*; a classic token needs"):
        place.open("three")
    assert not (place.folder / "asked").exists()


def test_only_the_remote_is_told_the_token(place: Place) -> None:
    """Blobs that a fork which is behind lacks are fetched from where the clone came from."""
    place.publisher.open_pull_request(replace(POST, key="x"), place.branch(name="feat/x"))
    for number in range(3):
        place.push(place.upstream, "main", f"upstream {number}")
    origin = f"{place.hub.url}/{NAME}.git"
    clone.update("flashinfer_bench", origin, place.clone)
    told: list[str] = []
    route = place.hub.route

    def watch(request: Request) -> tuple[str, Callable[[], Answer]]:
        if request.path.startswith(f"/{NAME}.git/"):
            told.append(request.headers.get("authorization", ""))
        return route(request)

    place.hub.route = watch  # type: ignore[method-assign]
    place.open("two")
    assert set(told) == {""}
    assert place.fork.git.git("rev-list", "--count", f"main..{BRANCH}") == "4"
