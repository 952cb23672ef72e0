"""The local GitHub against the real client, real pushes, and GitHub's description of its API."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from github import Auth, Github, GithubException, RateLimitExceededException, UnknownObjectException
from github.InputGitTreeElement import InputGitTreeElement
from github.Repository import Repository as ClientRepository
from openapi_spec_validator import validate

from tasks.git import AUTHOR, GitError, git
from tests.fakes.github import DESCRIPTION, GitHub, secondary_limit
from tests.fakes.github_operations import HANDLERS
from tests.fakes.github_state import Repository
from tests.fakes.web import Fault

NAME = "flashinfer-ai/flashinfer-bench"
DOCUMENT = "docs/model_coverage.mdx"
TABLE = b"| Kernel | Status |\n|---|---|\n| a | no |\n| b | no |\n| c | no |\n| d | no |\n"


@dataclass
class Place:
    hub: GitHub
    upstream: Repository
    token: str
    """Of a user who may not push upstream."""

    def client(self, token: str = "", **options: Any) -> Github:
        options = {"seconds_between_requests": None, "seconds_between_writes": None} | options
        auth = Auth.Token(token or self.token)
        return Github(base_url=self.hub.api, auth=auth, **{"timeout": 60, "retry": None} | options)

    def forked(self, branch: str = "mark-a", row: bytes = b"a") -> ClientRepository:
        """Fork, and push a branch that marks a row, over HTTP."""
        fork = self.client().get_repo(NAME).create_fork()
        ours = next(r for r in self.hub.repositories if r.name == fork.full_name)
        marked = TABLE.replace(b"| %s | no |" % row, b"| %s | yes |" % row)
        url = fork.clone_url.replace("://", f"://x:{self.token}@")
        blob = ours.git.write(marked)
        tree = ours.git.write_tree("main", [("100644", blob, DOCUMENT)])
        commit = ours.git.commit_tree(tree, [ours.git.sha("main")], f"docs: mark {row.decode()}")
        git("push", "--quiet", url, f"+{commit}:refs/heads/{branch}", cwd=ours.git.path)
        return fork

    def opened(self, branch: str = "mark-a", row: bytes = b"a", **options: Any) -> int:
        self.forked(branch, row)
        made = (
            self.client()
            .get_repo(NAME)
            .create_pull(
                base="main",
                head=f"contributor:{branch}",
                title=branch,
                body="<!-- m -->",
                **options,
            )
        )
        return made.number


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with GitHub(tmp_path) as hub:
        upstream = hub.repository(
            NAME, {DOCUMENT: TABLE, "README.md": b"#\n"}, writers={"maintainer"}
        )
        yield Place(hub, upstream, hub.user("contributor"))


def test_the_description_is_valid_and_is_what_is_implemented() -> None:
    description = json.loads(DESCRIPTION.read_text())
    validate(description)
    described = {o["operationId"] for path in description["paths"].values() for o in path.values()}
    assert described == set(HANDLERS)


def test_a_pull_request_from_a_fork(place: Place) -> None:
    number = place.opened(draft=True)
    repository = place.client().get_repo(NAME)
    (pull,) = repository.get_pulls(state="all", head="contributor:mark-a", base="main")
    assert (pull.number, pull.body, pull.draft) == (number, "<!-- m -->", True)
    assert pull.html_url == f"{place.hub.url}/{NAME}/pull/1"
    assert [file.filename for file in pull.get_files()] == [DOCUMENT]
    comparison = repository.compare("main", "contributor:mark-a")
    assert (comparison.status, comparison.ahead_by) == ("ahead", 1)
    states = [repository.get_pull(number).mergeable for _ in range(2)]
    assert states == [None, True]  # GitHub finds out after it was asked
    with pytest.raises(GithubException, match="already exists for contributor:mark-a") as caught:
        place.opened()
    assert caught.value.status == 422
    pull.edit(body="New")
    assert repository.get_issue(number).body == "New"
    assert not list(repository.get_pulls(head="somebody:else"))


def test_others_merge_reject_and_ask_for_changes(place: Place) -> None:
    numbers = [place.opened(f"mark-{row}", row.encode()) for row in "abd"]
    merged = place.hub.merge(place.upstream, numbers[0])
    place.hub.close(place.upstream, numbers[1], "Not like this.")
    place.hub.review(place.upstream, numbers[2], "Please sort.")
    repository = place.client().get_repo(NAME)
    pulls = [repository.get_pull(number) for number in numbers]
    assert [(p.state, p.merged) for p in pulls] == [
        ("closed", True), ("closed", False), ("open", False)
    ]  # fmt: skip
    assert (pulls[0].merge_commit_sha, pulls[0].is_merged()) == (merged, True)
    assert [comment.body for comment in pulls[1].get_issue_comments()] == ["Not like this."]
    (review,) = pulls[2].get_reviews()
    assert (review.state, review.body) == ("CHANGES_REQUESTED", "Please sort.")
    assert not list(pulls[2].get_review_comments())
    document = repository.get_contents(DOCUMENT)
    assert not isinstance(document, list)
    assert document.decoded_content == TABLE.replace(b"| a | no |", b"| a | yes |")


def test_a_pull_request_that_conflicts_with_what_has_landed(place: Place) -> None:
    numbers = [place.opened("mark-a", b"a"), place.opened("mark-b", b"b")]
    place.hub.merge(place.upstream, numbers[0])
    repository = place.client().get_repo(NAME)
    states = [repository.get_pull(numbers[1]).mergeable for _ in range(2)]
    assert states == [None, False]
    fork = place.client().get_repo("contributor/flashinfer-bench")
    assert fork.merge_upstream("main").merge_type == "fast-forward"
    assert fork.get_branch("main").commit.sha == place.upstream.git.sha("main")


def test_git_data(place: Place) -> None:
    fork = place.forked()
    base = fork.get_git_ref("heads/main").object.sha
    tree = fork.get_git_tree(base, recursive=True)
    assert DOCUMENT in [entry.path for entry in tree.tree]
    blob = fork.create_git_blob("bmV3", "base64")
    new = InputGitTreeElement("docs/new.md", "100644", "blob", sha=blob.sha)
    gone = InputGitTreeElement("README.md", "100644", "blob", sha=None)
    made = fork.create_git_tree([new, gone], base_tree=tree)
    commit = fork.create_git_commit("Change", made, [fork.get_git_commit(base)])
    fork.create_git_ref("refs/heads/topic/one", commit.sha)
    with pytest.raises(GithubException, match="Reference already exists"):
        fork.create_git_ref("refs/heads/topic/one", commit.sha)
    new_file = fork.get_contents("docs/new.md", ref="topic/one")
    assert not isinstance(new_file, list)
    assert new_file.decoded_content == b"new"
    fork.update_file("docs/new.md", "Again", "newer", new_file.sha, branch="topic/one")
    with pytest.raises(GithubException, match="409"):
        fork.update_file("docs/new.md", "Late", "lost", new_file.sha, branch="topic/one")
    ref = fork.get_git_ref("heads/topic/one")
    with pytest.raises(GithubException, match="not a fast forward"):
        ref.edit(base)
    ref.edit(base, force=True)
    assert [r.ref for r in fork.get_git_matching_refs("heads/topic")] == ["refs/heads/topic/one"]
    ref.delete()
    with pytest.raises(UnknownObjectException):
        fork.get_git_ref("heads/topic/one")


def test_issues_labels_and_search(place: Place) -> None:
    maintainer = place.client(place.hub.user("maintainer")).get_repo(NAME)
    maintainer.create_label("kernel-request", "ededed")
    repository = place.client().get_repo(NAME)
    theirs = repository.create_issue("Kernel request: gdn", "<!-- onboard:g:kernel-request -->")
    assert not repository.create_issue("Another", "", labels=["kernel-request"]).labels
    labelled = maintainer.create_issue("Third", "text", labels=["kernel-request"])
    assert [issue.number for issue in repository.get_issues(labels=["kernel-request"])] == [3]
    assert [issue.number for issue in repository.get_issues(state="all")] == [3, 2, 1]
    theirs.create_comment("More.").edit("More than that.")
    assert [comment.body for comment in theirs.get_comments()] == ["More than that."]
    query = f'repo:{NAME} is:issue "onboard:g:kernel-request" in:body author:contributor'
    assert [issue.number for issue in place.client().search_issues(query)] == [1]
    theirs.edit(state="closed")
    assert not list(place.client().search_issues(f"{query} state:open"))
    place.hub.unindexed = 3
    assert not list(place.client().search_issues(query))
    with pytest.raises(GithubException, match="is:issue"):
        list(place.client().search_issues("anything"))
    labelled.edit(labels=["kernel-request", "other"])
    assert [label.name for label in labelled.labels] == ["kernel-request", "other"]
    assert [label.name for label in repository.get_labels()] == ["kernel-request"]
    with pytest.raises(GithubException, match="too long"):
        repository.create_issue("Long", "x" * 65537)


def test_lists_come_in_pages(place: Place) -> None:
    repository = place.client(per_page=2).get_repo(NAME)
    for number in range(5):
        repository.create_issue(f"Issue {number}")
    assert len(list(repository.get_issues())) == 5
    assert place.hub.calls["issues/list-for-repo"] == 3


def test_rights(place: Place) -> None:
    repository = place.client().get_repo(NAME)
    sha = repository.get_branch("main").commit.sha
    with pytest.raises(UnknownObjectException):
        repository.create_git_ref("refs/heads/x", sha)
    with pytest.raises(GithubException, match="Bad credentials"):
        place.client("ghp_unknown").get_repo(NAME)
    place.upstream.private = True
    with pytest.raises(UnknownObjectException):
        place.client().get_repo(NAME)
    place.upstream.private = False
    assert place.client().get_user().login == "contributor"
    assert not repository.permissions.push
    for token, message in ((place.token, "403"), ("ghp_unknown", "fatal")):
        url = f"{place.hub.url}/{NAME}.git".replace("://", f"://x:{token}@")
        with pytest.raises(GitError, match=message):
            git("push", url, "main:refs/heads/x", cwd=place.upstream.git.path, env=AUTHOR)
    assert place.upstream.git.refs("refs/heads/") == {"refs/heads/main": sha}


def test_a_moved_repository_redirects(place: Place) -> None:
    place.hub.move(place.upstream, "elsewhere/bench")
    assert place.client().get_repo(NAME).full_name == "elsewhere/bench"
    lazy = place.client().get_repo(NAME, lazy=True)
    lazy.create_issue("Lost")  # this client takes the redirect of a POST for its answer
    assert not place.upstream.issues
    url = f"{place.hub.url}/{NAME}.git"
    assert git("ls-remote", url, "main").endswith("refs/heads/main")


@pytest.mark.parametrize(
    ("fault", "kind", "opened"),
    [
        (Fault("issues/create"), requests.ConnectionError, 0),
        (Fault("issues/create", after=True), requests.ConnectionError, 1),
        (Fault("issues/create", hold=60, after=True), requests.ReadTimeout, 1),
        (Fault("issues/create", status=429), GithubException, 0),
        (Fault("issues/create", status=500), GithubException, 0),
        (Fault("issues/create", status=502, after=True), GithubException, 1),
        (secondary_limit("issues/create"), RateLimitExceededException, 0),
    ],
)
def test_a_call_that_goes_wrong(
    place: Place, fault: Fault, kind: type[Exception], opened: int
) -> None:
    went_wrong = threading.Event()
    repository = place.client(timeout=1 if fault.hold else 60).get_repo(NAME, lazy=True)
    place.hub.fail(replace(fault, act=went_wrong.set))
    with pytest.raises(kind):
        repository.create_issue("Kernel request")
    assert went_wrong.wait(60)
    assert len(place.upstream.issues) == opened


def test_a_push_that_goes_wrong_and_is_repeated(place: Place) -> None:
    place.client().get_repo(NAME).create_fork()
    place.hub.fail(Fault("git-receive-pack", after=True))
    with pytest.raises(GitError):
        place.forked()  # it arrived
    place.forked()
    branches = place.hub.repositories[1].git.refs("refs/heads/")
    assert set(branches) == {"refs/heads/main", "refs/heads/mark-a"}


def test_a_limit_that_is_used_up(place: Place) -> None:
    place.hub.limit(600)
    with pytest.raises(RateLimitExceededException) as caught:
        place.client().get_repo(NAME)
    assert caught.value.headers
    assert caught.value.headers["x-ratelimit-remaining"] == "0"


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: c.post(f"/repos/{NAME}/issues", json={"body": "no title"}), "title"),
        (lambda c: c.post(f"/repos/{NAME}/issues", json={"title": ["x"]}), "issues/create"),
        (lambda c: c.get(f"/repos/{NAME}/pulls", params={"sate": "all"}), "sate"),
        (lambda c: c.get(f"/repos/{NAME}/pulls", params={"state": "merged"}), "merged"),
        (lambda c: c.get(f"/repos/{NAME}/pulls/first"), "first"),
    ],
)
def test_a_request_that_github_does_not_describe(
    place: Place, ask: Callable[[httpx.Client], httpx.Response], message: str
) -> None:
    headers = {"Authorization": f"Bearer {place.token}"}
    with httpx.Client(base_url=place.hub.api, headers=headers) as client:
        answer = ask(client)
    assert answer.status_code == 500
    assert message in answer.json()["message"]
    (violation,) = place.hub.violations
    assert message in violation
    place.hub.violations.clear()
    assert not place.upstream.issues


def test_an_answer_that_github_does_not_describe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = GitHub(tmp_path)
    monkeypatch.setattr(hub, "told_repository", lambda *_: {"id": "one"})
    hub.repository(NAME, {"README.md": b"#\n"})
    hub.__enter__()
    assert httpx.get(f"{hub.api}/repos/{NAME}").status_code == 500
    with pytest.raises(AssertionError, match="repos/get"):
        hub.__exit__(None)
