"""The REST API's operations that publishing calls, named as GitHub's description names them."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable

from tasks.git import GitError
from tests.fakes.github_state import (
    Call,
    Issue,
    Pull,
    RefusedError,
    Repository,
    State,
    check_text,
    invalid,
    not_found,
    now,
    root,
    set_state,
)
from tests.fakes.web import Answer

LIMIT = 5000
_QUALIFIER = re.compile(r'(?P<name>\w+):(?P<value>"[^"]*"|\S+)|(?P<term>"[^"]*"|\S+)')

Handler = Callable[[State, Call], Answer]
HANDLERS: dict[str, Handler] = {}


def _operation(name: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS[name] = handler
        return handler

    return register


@_operation("users/get-authenticated")
def _get_user(hub: State, call: Call) -> Answer:
    if not call.user:
        raise RefusedError(401, "Requires authentication")
    return Answer(200, hub.told_user(call.user) | {"user_view_type": "private"})


@_operation("rate-limit/get")
def _get_rate_limit(hub: State, call: Call) -> Answer:
    rate = {"limit": LIMIT, "remaining": LIMIT - hub.used, "reset": 0, "used": hub.used}
    return Answer(200, {"resources": {"core": rate, "search": rate}, "rate": rate})


@_operation("repos/get")
def _get_repository(hub: State, call: Call) -> Answer:
    return Answer(200, hub.told_repository(call.repository, call.user))


@_operation("repos/list-forks")
def _list_forks(hub: State, call: Call) -> Answer:
    forks = [r for r in hub.repositories if r.parent is call.repository]
    return call.paged(hub.told_repository(fork, call.user) for fork in forks)


@_operation("repos/create-fork")
def _create_fork(hub: State, call: Call) -> Answer:
    parent = call.repository
    owner = call.said.get("organization") or call.user
    forks = [r for r in hub.repositories if r.parent is parent and r.owner == owner]
    if not forks:
        name = f"{owner}/{call.said.get('name') or parent.name.partition('/')[2]}"
        forks = [hub.repository(name, parent.git.path, writers={call.user})]
        forks[0].parent = parent
    return Answer(202, hub.told_repository(forks[0], call.user))


@_operation("repos/merge-upstream")
def _merge_upstream(hub: State, call: Call) -> Answer:
    fork, branch = call.writable(), call.said["branch"]
    if fork.parent is None:
        raise RefusedError(422, "Repository is not a fork")
    ref = f"refs/heads/{branch}"
    before = fork.git.sha(ref)
    try:
        fork.git.git("fetch", "--quiet", str(fork.parent.git.path), f"{ref}:{ref}")
    except GitError as error:
        raise RefusedError(409, "There are merge conflicts") from error
    kind = "none" if fork.git.sha(ref) == before else "fast-forward"
    upstream = f"{fork.parent.owner}:{branch}"
    told = {"message": "Done", "merge_type": kind, "base_branch": upstream}
    return Answer(200, told)


@_operation("repos/get-branch")
def _get_branch(hub: State, call: Call) -> Answer:
    name = call.parts["branch"]
    commit = hub.told_commit_of(call.repository, call.sha(f"refs/heads/{name}"))
    return Answer(200, {"name": name, "commit": commit})


@_operation("repos/get-content")
def _get_content(hub: State, call: Call) -> Answer:
    path, revision = call.parts["path"].strip("/"), call.query.get("ref", "main")
    git = call.repository.git
    entries = git.tree(call.sha(revision), path=path)
    if not entries:
        raise not_found()
    if entries[0].kind == "blob":
        told = hub.told_file(call.repository, path, entries[0].sha, revision)
        return Answer(200, told)
    listed = git.tree(f"{call.sha(revision)}:{path}")
    files = [e for e in listed if e.kind == "blob"]
    told_files = [
        hub.told_file(call.repository, f"{path}/{e.path}", e.sha, revision) for e in files
    ]
    return Answer(200, told_files)


@_operation("repos/create-or-update-file-contents")
def _put_content(hub: State, call: Call) -> Answer:
    repository, said = call.writable(), call.said
    branch, path = said.get("branch", "main"), call.parts["path"]
    known = repository.git.tree(call.sha(f"refs/heads/{branch}"), path=path)
    if known and "sha" not in said:
        raise RefusedError(422, 'Invalid request.\n\n"sha" wasn\'t supplied.')
    if known and known[0].sha != said["sha"]:
        raise RefusedError(409, f"{path} does not match {said['sha']}")
    content = base64.b64decode(said["content"])
    made = repository.git.commit(branch, {path: content}, said["message"])
    sha = repository.git.tree(made, path=path)[0].sha
    told = {"content": hub.told_file(repository, path, sha, branch)}
    commit = hub.told_commit(repository, made)
    return Answer(200 if known else 201, {**told, "commit": commit})


@_operation("repos/compare-commits")
def _compare(hub: State, call: Call) -> Answer:
    repository, git = call.repository, call.repository.git
    base, head = (_named(hub, call, call.parts[end]) for end in ("base", "head"))
    fork_point = git.git("merge-base", base, head)
    ahead, behind = git.commits(base, head), git.commits(head, base)
    status = {(0, 0): "identical", (0, 1): "behind", (1, 0): "ahead", (1, 1): "diverged"}
    files = git.changed(fork_point, head)
    told = {
        "status": status[min(len(ahead), 1), min(len(behind), 1)],
        "ahead_by": len(ahead),
        "behind_by": len(behind),
        "total_commits": len(ahead),
        "base_commit": hub.told_commit_of(repository, base),
        "merge_base_commit": hub.told_commit_of(repository, fork_point),
        "commits": [hub.told_commit_of(repository, sha) for sha in ahead],
        "files": [{"filename": path, "status": change} for change, path in files],
    }
    return Answer(200, told)


def _named(hub: State, call: Call, name: str) -> str:
    """Return the commit of a branch, or of `owner:branch` in the repository's network."""
    owner, _, branch = name.rpartition(":")
    ref = f"refs/heads/{branch}"
    network = (r for r in hub.repositories if root(r) is root(call.repository))
    near = next((r for r in network if r.owner == owner and r.git.sha(ref)), None)
    if near:
        call.repository.git.git("fetch", "--quiet", str(near.git.path), ref)
        return call.sha("FETCH_HEAD")
    return call.sha(name)


@_operation("git/get-ref")
def _get_ref(hub: State, call: Call) -> Answer:
    ref = f"refs/{call.parts['ref']}"
    found = call.repository.git.refs(ref)
    if ref not in found:
        raise not_found()
    return Answer(200, hub.told_ref(call.repository, ref, found[ref]))


@_operation("git/list-matching-refs")
def _list_refs(hub: State, call: Call) -> Answer:
    found = call.repository.git.refs(f"refs/{call.parts['ref']}")
    return Answer(200, [hub.told_ref(call.repository, *pair) for pair in found.items()])


@_operation("git/create-ref")
def _create_ref(hub: State, call: Call) -> Answer:
    repository, ref, sha = call.writable(), call.said["ref"], call.said["sha"]
    if ref in repository.git.refs(ref):
        raise RefusedError(422, "Reference already exists")
    if not ref.startswith("refs/") or not repository.git.sha(sha):
        raise RefusedError(422, "Object does not exist")
    repository.git.update(ref, sha)
    return Answer(201, hub.told_ref(repository, ref, sha))


@_operation("git/update-ref")
def _update_ref(hub: State, call: Call) -> Answer:
    repository, sha = call.writable(), call.said["sha"]
    ref = f"refs/{call.parts['ref']}"
    if ref not in repository.git.refs(ref) or not repository.git.sha(sha):
        raise RefusedError(422, "Reference does not exist")
    if repository.git.commits(sha, ref) and not call.said.get("force"):
        raise RefusedError(422, "Update is not a fast forward")
    repository.git.update(ref, sha)
    return Answer(200, hub.told_ref(repository, ref, sha))


@_operation("git/delete-ref")
def _delete_ref(hub: State, call: Call) -> Answer:
    repository, ref = call.writable(), f"refs/{call.parts['ref']}"
    if ref not in repository.git.refs(ref):
        raise RefusedError(422, "Reference does not exist")
    repository.git.git("update-ref", "-d", ref)
    return Answer(204)


@_operation("git/get-commit")
def _get_commit(hub: State, call: Call) -> Answer:
    return Answer(200, hub.told_commit(call.repository, call.sha(call.parts["commit_sha"])))


@_operation("git/create-commit")
def _create_commit(hub: State, call: Call) -> Answer:
    repository, said = call.writable(), call.said
    shas = [(said["tree"], "tree"), *((sha, "commit") for sha in said.get("parents", []))]
    if not all(repository.git.sha(*pair) for pair in shas):
        raise RefusedError(422, "Tree SHA or parent does not exist")
    made = repository.git.commit_tree(said["tree"], said.get("parents", []), said["message"])
    return Answer(201, hub.told_commit(repository, made))


@_operation("git/get-tree")
def _get_tree(hub: State, call: Call) -> Answer:
    options = ["-r", "-t"] if "recursive" in call.query else []
    sha = call.sha(call.parts["tree_sha"], "tree")
    return Answer(200, hub.told_tree(call.repository, sha, *options))


@_operation("git/create-tree")
def _create_tree(hub: State, call: Call) -> Answer:
    repository, said = call.writable(), call.said
    entries = []
    for entry in said["tree"]:
        content = entry.get("content")
        sha = entry.get("sha") if content is None else repository.git.write(content.encode())
        entries.append((entry["mode"] if sha else "0", sha or "0" * 40, entry["path"]))
    made = repository.git.write_tree(said.get("base_tree", ""), entries)
    return Answer(201, hub.told_tree(repository, made))


@_operation("git/get-blob")
def _get_blob(hub: State, call: Call) -> Answer:
    sha = call.sha(call.parts["file_sha"], "blob")
    content = call.repository.git.read(sha)
    encoded = base64.encodebytes(content).decode()
    told = {"sha": sha, "content": encoded, "encoding": "base64", "size": len(content)}
    return Answer(200, told)


@_operation("git/create-blob")
def _create_blob(hub: State, call: Call) -> Answer:
    content = str(call.said["content"]).encode()
    if call.said.get("encoding") == "base64":
        content = base64.b64decode(content)
    return Answer(201, {"sha": call.writable().git.write(content)})


@_operation("pulls/list")
def _list_pulls(hub: State, call: Call) -> Answer:
    query, repository = call.query, call.repository
    found = [
        issue
        for issue in reversed(repository.issues)
        if (pull := issue.pull)
        and query.get("state", "open") in {issue.state, "all"}
        and query.get("base", pull.base) == pull.base
        and query.get("head") in {None, f"{pull.head.owner}:{pull.ref}"}
    ]
    return call.paged(found, lambda shown: [hub.told_pull(repository, i, call.user) for i in shown])


@_operation("pulls/create")
def _create_pull(hub: State, call: Call) -> Answer:
    repository, said = call.repository, call.said
    owner, _, ref = said["head"].rpartition(":")
    network = [r for r in hub.repositories if root(r) is root(repository)]
    heads = [r for r in network if r.owner == (owner or repository.owner)]
    if not heads or not heads[0].git.sha(f"refs/heads/{ref}"):
        raise invalid("PullRequest", "invalid", field="head")
    if call.user not in heads[0].writers | repository.writers:
        raise not_found()
    _refuse_second(hub, repository, heads[0], ref, said["base"])
    pull = Pull(heads[0], ref, said["base"], bool(said.get("draft")))
    made = hub.add_issue(call, pull)
    base, head = hub.ends(repository, made, pull)
    if not base or not repository.git.commits(base, head):
        repository.issues.remove(made)
        message = f"No commits between {said['base']} and {said['head']}"
        raise invalid("PullRequest", "custom", message=message)
    told = hub.told_pull(repository, made, call.user, whole=True)
    pull.judged = ("", "")
    return Answer(201, told)


def _refuse_second(
    hub: State, repository: Repository, head: Repository, ref: str, base: str
) -> None:
    for issue in repository.issues:
        pull = issue.pull
        if pull and issue.state == "open" and (pull.head, pull.ref, pull.base) == (head, ref, base):
            message = f"A pull request already exists for {head.owner}:{ref}."
            raise invalid("PullRequest", "custom", message=message)


@_operation("pulls/get")
def _get_pull(hub: State, call: Call) -> Answer:
    issue, _ = call.pull()
    return Answer(200, hub.told_pull(call.repository, issue, call.user, whole=True))


@_operation("pulls/update")
def _update_pull(hub: State, call: Call) -> Answer:
    issue, _ = call.pull()
    _change(hub, call, issue)
    return Answer(200, hub.told_pull(call.repository, issue, call.user, whole=True))


def _change(hub: State, call: Call, issue: Issue) -> None:
    if call.user not in call.repository.writers | {issue.author}:
        raise not_found()
    check_text(call.said.get("body") or "")
    issue.title = str(call.said.get("title", issue.title))
    issue.body = call.said.get("body", issue.body) or ""
    if "state" in call.said:
        set_state(issue, call.said["state"])


@_operation("pulls/list-files")
def _list_files(hub: State, call: Call) -> Answer:
    issue, pull = call.pull()
    git = call.repository.git
    base, head = hub.ends(call.repository, issue, pull)
    changed = git.changed(git.git("merge-base", base, head), head)
    return call.paged({"filename": path, "status": status} for status, path in changed)


@_operation("pulls/list-reviews")
def _list_reviews(hub: State, call: Call) -> Answer:
    return call.paged(call.pull()[1].reviews)


@_operation("pulls/list-review-comments")
def _list_review_comments(hub: State, call: Call) -> Answer:
    call.pull()
    return call.paged([])


@_operation("pulls/check-if-merged")
def _is_merged(hub: State, call: Call) -> Answer:
    if not call.pull()[1].merged_by:
        raise not_found()
    return Answer(204)


@_operation("pulls/merge")
def _merge(hub: State, call: Call) -> Answer:
    number = call.pull()[0].number
    sha = hub.merge(call.writable(), number, call.user)
    return Answer(200, {"sha": sha, "merged": True, "message": "Pull Request successfully merged"})


@_operation("issues/list-for-repo")
def _list_issues(hub: State, call: Call) -> Answer:
    query = call.query
    labels = set(query["labels"].split(",")) if query.get("labels") else set()
    found = [
        issue
        for issue in reversed(call.repository.issues)
        if query.get("state", "open") in {issue.state, "all"}
        and labels <= set(issue.labels)
        and query.get("creator", issue.author) == issue.author
        and query.get("since", "") <= issue.created
    ]
    return call.paged(hub.told_issue(call.repository, issue) for issue in found)


@_operation("issues/create")
def _create_issue(hub: State, call: Call) -> Answer:
    made = hub.add_issue(call)
    _set_labels(hub, call, made)
    return Answer(201, hub.told_issue(call.repository, made))


def _set_labels(hub: State, call: Call, issue: Issue) -> None:
    """Set labels; of somebody who may not push they are ignored, without a word."""
    if "labels" in call.said and call.user in call.repository.writers:
        issue.labels = [x if isinstance(x, str) else x["name"] for x in call.said["labels"]]


@_operation("issues/get")
def _get_issue(hub: State, call: Call) -> Answer:
    return Answer(200, hub.told_issue(call.repository, call.issue()))


@_operation("issues/update")
def _update_issue(hub: State, call: Call) -> Answer:
    issue = call.issue()
    _change(hub, call, issue)
    _set_labels(hub, call, issue)
    return Answer(200, hub.told_issue(call.repository, issue))


@_operation("issues/list-comments")
def _list_comments(hub: State, call: Call) -> Answer:
    return call.paged(call.issue().comments)


@_operation("issues/create-comment")
def _create_comment(hub: State, call: Call) -> Answer:
    return Answer(201, hub.add_comment(call.repository, call.issue(), call.said["body"], call.user))


@_operation("issues/update-comment")
def _update_comment(hub: State, call: Call) -> Answer:
    comments = (c for issue in call.repository.issues for c in issue.comments)
    found = next((c for c in comments if c["id"] == int(call.parts["comment_id"])), None)
    if found is None or call.user not in call.repository.writers | {found["user"]["login"]}:
        raise not_found()
    check_text(call.said["body"])
    found |= {"body": call.said["body"], "updated_at": now()}
    return Answer(200, found)


@_operation("issues/list-labels-for-repo")
def _list_labels(hub: State, call: Call) -> Answer:
    return call.paged({"name": name, "color": "ededed"} for name in call.repository.labels)


@_operation("issues/get-label")
def _get_label(hub: State, call: Call) -> Answer:
    if call.parts["name"] not in call.repository.labels:
        raise not_found()
    return Answer(200, {"name": call.parts["name"], "color": "ededed"})


@_operation("issues/create-label")
def _create_label(hub: State, call: Call) -> Answer:
    repository, name = call.writable(), call.said["name"]
    if name in repository.labels:
        raise invalid("Label", "already_exists", field="name")
    repository.labels.append(name)
    return Answer(201, {"name": name, "color": call.said.get("color", "ededed")})


@_operation("search/issues-and-pull-requests")
def _search(hub: State, call: Call) -> Answer:
    wanted = _Query(call.query["q"])
    everything = [(r, i) for r in hub.repositories for i in r.issues]
    everything.sort(key=lambda pair: (pair[1].created, pair[1].number))
    known = everything[: len(everything) - hub.unindexed]
    found = [pair for pair in known if hub.visible(pair[0].name, call.user) and wanted.fits(*pair)]
    fixed = {"incomplete_results": False, "search_type": "lexical", "total_count": len(found)}
    return call.paged(
        found,
        lambda shown: fixed | {"items": [hub.told_issue(*p) | {"score": 1.0} for p in shown]},
    )


class _Query:
    """A search's words and qualifiers, those that publishing uses."""

    def __init__(self, text: str) -> None:
        self.words: list[str] = []
        self.qualifiers: list[tuple[str, str]] = []
        for found in _QUALIFIER.finditer(text):
            if found["name"]:
                self.qualifiers.append((found["name"], found["value"].strip('"')))
            else:
                self.words.append(found["term"].strip('"').lower())
        kinds = {"issue", "pr", "pull-request"}
        if not any(name in {"is", "type"} and value in kinds for name, value in self.qualifiers):
            message = "Query must include 'is:issue' or 'is:pull-request'"
            raise invalid("Search", "invalid", message=message)

    def fits(self, repository: Repository, issue: Issue) -> bool:
        places = [value for name, value in self.qualifiers if name == "in"]
        inside = ",".join(places) or "title,body,comments"
        comments = " ".join(comment["body"] for comment in issue.comments)
        texts = {"title": issue.title, "body": issue.body, "comments": comments}
        text = " ".join(texts[name] for name in inside.split(",")).lower()
        return all(word in text for word in self.words) and all(
            self._fits(name, value, repository, issue) for name, value in self.qualifiers
        )

    def _fits(self, name: str, value: str, repository: Repository, issue: Issue) -> bool:
        pull = issue.pull
        states = {
            "issue": not pull,
            "pr": bool(pull),
            "pull-request": bool(pull),
            "merged": bool(pull and pull.merged_by),
            "unmerged": bool(pull and not pull.merged_by),
            "draft": bool(pull and pull.draft),
            "open": issue.state == "open",
            "closed": issue.state == "closed",
        }
        if name in {"is", "type", "state"}:
            return states[value]
        facts = {
            "repo": value == repository.name,
            "author": value == issue.author,
            "label": value in issue.labels,
            "head": bool(pull and pull.ref == value),
            "base": bool(pull and pull.base == value),
            "in": True,
        }
        return facts[name]
