"""What a local GitHub keeps, over real bare repositories, and how its API tells it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from tests.fakes.bare import Bare
from tests.fakes.web import Answer, Server, page

API = "/api/v3"
_BODY = 65536


@dataclass(eq=False)
class Pull:
    """What a pull request has that an issue lacks."""

    head: Repository
    ref: str
    base: str
    draft: bool
    merged_by: str = ""
    merge_commit: str = ""
    reviews: list[dict[str, Any]] = field(default_factory=list)
    judged: tuple[str, str] = ("", "")
    """Of which commits it is known whether they merge: GitHub finds out after it was asked."""


@dataclass(eq=False)
class Issue:
    """An issue, or a pull request."""

    number: int
    title: str
    body: str
    author: str
    created: str
    state: str = "open"
    closed: str = ""
    labels: list[str] = field(default_factory=list)
    comments: list[dict[str, Any]] = field(default_factory=list)
    pull: Pull | None = None


@dataclass(eq=False)
class Repository:
    number: int
    name: str
    """With its owner."""
    git: Bare
    writers: set[str]
    parent: Repository | None = None
    private: bool = False
    labels: list[str] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]


class RefusedError(Exception):
    """What GitHub answers to a request that it does not carry out."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        url = "https://docs.github.com/rest"
        self.answer = Answer(status, {"message": message, "documentation_url": url, **more})


def not_found() -> RefusedError:
    return RefusedError(404, "Not Found")


def invalid(resource: str, code: str, **more: str) -> RefusedError:
    error = {"resource": resource, "code": code, **more}
    return RefusedError(422, "Validation Failed", errors=[error])


@dataclass(frozen=True)
class Call:
    """A request with what its path and token stand for."""

    user: str
    """Empty: nobody in particular."""
    parts: Mapping[str, str]
    query: Mapping[str, str]
    said: Mapping[str, Any]
    url: str
    _repository: Repository | None

    @property
    def repository(self) -> Repository:
        if self._repository is None:
            raise not_found()
        return self._repository

    def writable(self) -> Repository:
        """The repository, if the user may push to it; else it is as if it were not there."""
        if self.user not in self.repository.writers:
            raise not_found()
        return self.repository

    def issue(self) -> Issue:
        number = int(self.parts.get("issue_number") or self.parts["pull_number"])
        if not 0 < number <= len(self.repository.issues):
            raise not_found()
        return self.repository.issues[number - 1]

    def pull(self) -> tuple[Issue, Pull]:
        issue = self.issue()
        if issue.pull is None:
            raise not_found()
        return issue, issue.pull

    def sha(self, revision: str, kind: str = "commit") -> str:
        if found := self.repository.git.sha(revision, kind):
            return found
        raise not_found()

    def paged(self, items: Iterable[Any], told: Callable[[list[Any]], Any] = list) -> Answer:
        """Answer with one page of a list, and where the next one is."""
        listed = list(items)
        size, number = int(self.query.get("per_page", 30)), int(self.query.get("page", 1))
        last = max(1, -(-len(listed) // size))
        links = {"next": number + 1, "last": last} if number < last else {}
        urls = {k: f"{self.url}?{urlencode({**self.query, 'page': n})}" for k, n in links.items()}
        link = ", ".join(f'<{url}>; rel="{name}"' for name, url in urls.items())
        return Answer(200, told(page(listed, size, number - 1)), {"Link": link} if link else {})


class State(Server):
    """Users, repositories, issues and pull requests, and what others do with them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.api = f"{self.url}{API}"
        self.users: dict[str, str] = {}
        """Token -> login."""
        self.repositories: list[Repository] = []
        self.moved: dict[str, Repository] = {}
        """Old name -> repository."""
        self.unindexed = 0
        """How many of the newest issues and pull requests search does not find yet."""
        self.used = 0
        self.limited_until = 0.0
        self.folder = folder

    def user(self, login: str) -> str:
        """Add a user's token and return it."""
        token = f"ghp_{login.encode().hex():0<36}"[:40]
        self.users[token] = login
        return token

    def repository(
        self, name: str, content: Mapping[str, bytes] | Path, *, writers: Iterable[str] = ()
    ) -> Repository:
        """Add a repository with one commit, or with the branches of another one."""
        git = Bare.made(self.folder / f"{name}.git", content)
        made = Repository(len(self.repositories) + 1, name, git, set(writers))
        self.repositories.append(made)
        return made

    def move(self, repository: Repository, name: str) -> None:
        """Rename a repository; its old name redirects."""
        self.moved[repository.name] = repository
        path = self.folder / f"{name}.git"
        path.parent.mkdir(exist_ok=True)
        repository.git.path.rename(path)
        repository.name, repository.git = name, Bare(path)

    def limit(self, seconds: float) -> None:
        """Let the user's requests be used up for some seconds."""
        self.limited_until = time.time() + seconds

    def merge(self, repository: Repository, number: int, by: str = "maintainer") -> str:
        """Merge a pull request, as a reviewer does; return the merge commit."""
        issue = repository.issues[number - 1]
        pull = pull_of(issue)
        ours, theirs = self.ends(repository, issue, pull)
        tree = repository.git.merged(ours, theirs)
        if issue.state != "open" or not tree:
            raise RefusedError(405, "Pull Request is not mergeable")
        message = f"{issue.title} (#{number})"
        pull.merge_commit = repository.git.commit_tree(tree, [ours, theirs], message)
        repository.git.update(f"refs/heads/{pull.base}", pull.merge_commit)
        pull.merged_by = by
        set_state(issue, "closed")
        return pull.merge_commit

    def close(
        self, repository: Repository, number: int, comment: str = "", by: str = "maintainer"
    ) -> None:
        """Close an issue or a pull request, as somebody else does."""
        issue = repository.issues[number - 1]
        if comment:
            self.add_comment(repository, issue, comment, by)
        set_state(issue, "closed")

    def review(
        self,
        repository: Repository,
        number: int,
        body: str,
        state: str = "CHANGES_REQUESTED",
        by: str = "maintainer",
    ) -> None:
        """Review a pull request."""
        pull = pull_of(repository.issues[number - 1])
        said = {"id": len(pull.reviews) + 1, "user": self.told_user(by), "body": body}
        sha = self.ends(repository, repository.issues[number - 1], pull)[1]
        pull.reviews.append({**said, "state": state, "submitted_at": now(), "commit_id": sha})

    def visible(self, name: str, user: str) -> Repository | None:
        found = next((r for r in self.repositories if r.name == name), None)
        return None if found and found.private and user not in found.writers else found

    # What there is, as the API tells it.

    def page_of(self, repository: Repository) -> str:
        return f"{self.url}/{repository.name}"

    def address(self, repository: Repository, *rest: object) -> str:
        return "/".join([f"{self.api}/repos/{repository.name}", *map(str, rest)])

    def told_user(self, login: str) -> dict[str, Any]:
        number = 1 + sorted({*self.users.values(), login}).index(login)
        urls = {"url": f"{self.api}/users/{login}", "html_url": f"{self.url}/{login}"}
        return {"login": login, "id": number, "type": "User", **urls}

    def told_repository(self, repository: Repository, user: str) -> dict[str, Any]:
        told: dict[str, Any] = {
            "id": repository.number,
            "name": repository.name.partition("/")[2],
            "full_name": repository.name,
            "owner": self.told_user(repository.owner),
            "private": repository.private,
            "fork": repository.parent is not None,
            "default_branch": "main",
            "html_url": self.page_of(repository),
            "url": self.address(repository),
            "clone_url": f"{self.page_of(repository)}.git",
            "permissions": dict.fromkeys(("admin", "push"), user in repository.writers)
            | {"pull": True},
        }
        if repository.parent:
            parent = self.told_repository(repository.parent, user)
            told |= {"parent": parent, "source": parent}
        return told

    def told_issue(self, repository: Repository, issue: Issue) -> dict[str, Any]:
        kind = "pull" if issue.pull else "issues"
        told = {
            "id": repository.number * 10000 + issue.number,
            "number": issue.number,
            "title": issue.title,
            "body": issue.body,
            "state": issue.state,
            "user": self.told_user(issue.author),
            "labels": [{"name": name, "color": "ededed"} for name in issue.labels],
            "comments": len(issue.comments),
            "created_at": issue.created,
            "updated_at": issue.created,
            "closed_at": issue.closed or None,
            "html_url": f"{self.page_of(repository)}/{kind}/{issue.number}",
            "url": self.address(repository, "issues", issue.number),
            "repository_url": self.address(repository),
        }
        if issue.pull:
            told["pull_request"] = {"url": self.address(repository, "pulls", issue.number)}
        return told

    def ends(self, repository: Repository, issue: Issue, pull: Pull) -> tuple[str, str]:
        """Return the commits that a pull request is between; after it is closed they stay."""
        ref = f"refs/pull/{issue.number}/head"
        if issue.state == "open" and pull.head.git.sha(f"refs/heads/{pull.ref}"):
            source = f"+refs/heads/{pull.ref}:{ref}"
            repository.git.git("fetch", "--quiet", str(pull.head.git.path), source)
        return repository.git.sha(f"refs/heads/{pull.base}"), repository.git.sha(ref)

    def told_pull(
        self, repository: Repository, issue: Issue, user: str, *, whole: bool = False
    ) -> dict[str, Any]:
        pull = pull_of(issue)
        base, head = self.ends(repository, issue, pull)
        told = self.told_issue(repository, issue)
        del told["pull_request"], told["repository_url"]
        ends = ((repository, pull.base, base), (pull.head, pull.ref, head))
        told["base"], told["head"] = (
            {
                "label": f"{place.owner}:{ref}",
                "ref": ref,
                "sha": sha,
                "repo": self.told_repository(place, user),
                "user": self.told_user(place.owner),
            }
            for place, ref, sha in ends
        )
        told |= {
            "draft": pull.draft,
            "url": self.address(repository, "pulls", issue.number),
            "issue_url": told["url"],
            "merged_at": issue.closed if pull.merged_by else None,
            "merge_commit_sha": pull.merge_commit or None,
            "author_association": "CONTRIBUTOR",
        }
        if whole:
            told |= self._merge_state(repository, issue, pull, base, head)
        return told

    def _merge_state(
        self, repository: Repository, issue: Issue, pull: Pull, base: str, head: str
    ) -> dict[str, Any]:
        known = pull.judged == (base, head) and issue.state == "open"
        pull.judged = (base, head)
        merges = bool(repository.git.merged(base, head)) if known else None
        states = {None: "unknown", True: "clean", False: "dirty"}
        fork_point = repository.git.git("merge-base", base, head)
        return {
            "merged": bool(pull.merged_by),
            "merged_by": self.told_user(pull.merged_by) if pull.merged_by else None,
            "mergeable": merges,
            "mergeable_state": states[merges],
            "commits": len(repository.git.commits(base, head)),
            "changed_files": len(repository.git.changed(fork_point, head)),
        }

    def told_commit(self, repository: Repository, sha: str) -> dict[str, Any]:
        """Return a commit of git's."""
        form = "%T%n%P%n%an%n%ae%n%aI%n%cn%n%ce%n%cI%n%B"
        shown = repository.git.git("show", "-s", f"--format={form}", sha)
        tree, parents, *people = shown.split("\n")
        names = ("name", "email", "date")
        urls = [self.address(repository, "git", "commits", parent) for parent in parents.split()]
        return {
            "sha": sha,
            "url": self.address(repository, "git", "commits", sha),
            "tree": {"sha": tree, "url": self.address(repository, "git", "trees", tree)},
            "parents": [{"sha": p, "url": u} for p, u in zip(parents.split(), urls, strict=True)],
            "author": dict(zip(names, people[0:3], strict=True)),
            "committer": dict(zip(names, people[3:6], strict=True)),
            "message": "\n".join(people[6:]).rstrip("\n"),
        }

    def told_commit_of(self, repository: Repository, sha: str) -> dict[str, Any]:
        """Return a commit as GitHub lists it, around git's."""
        told = self.told_commit(repository, sha)
        commit = {key: told[key] for key in ("message", "tree", "author", "committer", "url")}
        url = self.address(repository, "commits", sha)
        return {"sha": sha, "url": url, "commit": commit, "parents": told["parents"]}

    def told_ref(self, repository: Repository, ref: str, sha: str) -> dict[str, Any]:
        target = {
            "type": "commit",
            "sha": sha,
            "url": self.address(repository, "git", "commits", sha),
        }
        return {"ref": ref, "url": self.address(repository, "git", ref), "object": target}

    def told_file(
        self, repository: Repository, path: str, sha: str, revision: str
    ) -> dict[str, Any]:
        content = repository.git.read(sha)
        url = f"{self.address(repository, 'contents', quote(path))}?ref={revision}"
        return {
            "type": "file",
            "encoding": "base64",
            "size": len(content),
            "name": path.rpartition("/")[2],
            "path": path,
            "sha": sha,
            "content": base64.encodebytes(content).decode(),
            "url": url,
            "_links": {"self": url, "git": url, "html": url},
        }

    def add_comment(
        self, repository: Repository, issue: Issue, text: str, by: str
    ) -> dict[str, Any]:
        check_text(text)
        number = issue.number * 1000 + len(issue.comments) + 1
        dates = {"created_at": now(), "updated_at": now()}
        url = self.address(repository, "issues", "comments", number)
        said = {"id": number, "url": url, "body": text, "user": self.told_user(by), **dates}
        issue.comments.append(said)
        return said

    def add_issue(self, call: Call, pull: Pull | None = None) -> Issue:
        title, body = str(call.said.get("title", "")), call.said.get("body") or ""
        if not title.strip() or len(title) > 256:
            raise invalid("Issue", "missing_field", field="title")
        check_text(body)
        issues = call.repository.issues
        made = Issue(len(issues) + 1, title, body, call.user, now(), pull=pull)
        issues.append(made)
        return made

    def told_tree(self, repository: Repository, sha: str, *options: str) -> dict[str, Any]:
        entries = [
            {"path": e.path, "mode": e.mode, "type": e.kind, "sha": e.sha}
            for e in repository.git.tree(sha, *options)
        ]
        url = self.address(repository, "git", "trees", sha)
        return {"sha": sha, "url": url, "tree": entries, "truncated": False}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def root(repository: Repository) -> Repository:
    return repository.parent or repository


def pull_of(issue: Issue) -> Pull:
    if issue.pull is None:
        raise not_found()
    return issue.pull


def set_state(issue: Issue, state: str) -> None:
    issue.state = state
    issue.closed = now() if state == "closed" else ""


def check_text(text: str) -> None:
    if len(text) > _BODY:
        message = f"body is too long (maximum is {_BODY} characters)"
        raise invalid("Issue", "custom", message=message)
