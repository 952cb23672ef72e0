"""A local Hugging Face Hub: what `huggingface_hub` calls to publish pull requests to repositories.

Content is kept in memory, one set of files per commit. What the client expects of each answer is in
its own source (`_commit_api.py`, `lfs.py`, `hf_api.py`, `community.py`). Xet is not offered: a
client that asks for it is answered 404, and counted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import unquote

from tests.fakes.web import Answer, Request, Server, page

_PAGE = 10
_POINTER = 130
_LFS_SUFFIXES = (".safetensors", ".bin", ".gz", ".xz", ".zip", ".npy", ".parquet", ".pt")
_LFS_BYTES = 10 * 1024 * 1024
_BODY = 65536

_REPOSITORY = r"(?P<kind>models|datasets|spaces)/(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/{_REPOSITORY}"
_GIT = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[\w.-]+/[\w.-]+)"
_DISCUSSION = rf"{_API}/discussions/(?P<number>\d+)"
_ROUTES = [
    (method, re.compile(pattern), endpoint)
    for method, pattern, endpoint in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate-yaml"),
        ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"{_GIT}\.git/info/lfs/objects/batch", "lfs-batch"),
        ("POST", rf"{_GIT}\.git/info/lfs/verify", "lfs-verify"),
        ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "lfs-upload"),
        ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", "lfs-part"),
        ("POST", r"/storage/(?P<oid>[0-9a-f]{64})/complete", "lfs-complete"),
        ("GET", rf"{_API}/xet-\w+-token/.*", "xet-token"),
        ("GET", rf"{_API}/discussions", "discussions"),
        ("POST", rf"{_API}/discussions", "create-discussion"),
        ("GET", _DISCUSSION, "discussion"),
        ("POST", rf"{_DISCUSSION}/comment", "comment"),
        ("POST", rf"{_DISCUSSION}/comment/(?P<event>\w+)/edit", "edit"),
        ("POST", rf"{_DISCUSSION}/status", "status"),
        ("POST", rf"{_DISCUSSION}/title", "title"),
        ("POST", rf"{_DISCUSSION}/merge", "merge"),
        ("GET", rf"{_API}(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths-info"),
        ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", "commits"),
        ("GET", rf"{_API}/refs", "refs"),
        ("GET|HEAD", rf"{_GIT}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
]


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether it is kept in large file storage."""

    content: bytes
    large: bool = False

    @property
    def oid(self) -> str:
        """What the client compares with its own: SHA-256 of a large file, else git's hash."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str
    files: Mapping[str, Blob]
    title: str
    message: str
    author: str
    date: str


@dataclass
class Discussion:
    """A discussion, or a pull request if it has a base."""

    number: int
    title: str
    author: str
    created: str
    status: str
    base: str = ""
    """The commit that a pull request starts from; empty for a discussion."""
    merged: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Repository:
    kind: str
    name: str
    writers: set[str]
    readers: set[str] | None = None
    """Who may see it; None: everybody."""
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """Branches by their name, pull requests as `refs/pr/N`."""
    discussions: list[Discussion] = field(default_factory=list)

    def commit(
        self,
        ref: str,
        parent: str,
        files: Mapping[str, Blob],
        title: str,
        message: str,
        author: str,
    ) -> Commit:
        """Add a commit and let a reference point to it."""
        date = _now()
        said = [self.name, parent, title, message, author, date, str(len(self.commits))]
        said += [f"{path} {blob.oid}" for path, blob in sorted(files.items())]
        oid = hashlib.sha1("\n".join(said).encode()).hexdigest()
        made = Commit(oid, parent, files, title, message, author, date)
        self.commits[oid] = made
        self.refs[ref] = oid
        return made

    def find(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a pull request, or a commit's own name, also shortened."""
        revision = revision.removeprefix("refs/heads/")
        if revision in self.refs:
            return self.commits[self.refs[revision]]
        if not re.fullmatch(r"[0-9a-f]{5,40}", revision):
            return None
        return next((c for oid, c in self.commits.items() if oid.startswith(revision)), None)

    def history(self, commit: Commit) -> Iterator[Commit]:
        """Yield a commit and all before it."""
        yield commit
        while commit.parent:
            commit = self.commits[commit.parent]
            yield commit

    def changes(self, discussion: Discussion) -> dict[str, Blob | None]:
        """Return what a pull request changes; None: the file is removed."""
        base = self.commits[discussion.base].files
        head = self.commits[self.refs[f"refs/pr/{discussion.number}"]].files
        paths = (path for path in {*base, *head} if base.get(path) != head.get(path))
        return {path: head.get(path) for path in sorted(paths)}

    def conflicts(self, discussion: Discussion) -> list[str]:
        """Return the files that a pull request and its branch both changed, differently."""
        base, main = self.commits[discussion.base].files, self.commits[self.refs["main"]].files
        return [
            path
            for path, blob in self.changes(discussion).items()
            if main.get(path) != base.get(path) and main.get(path) != blob
        ]


class RefusedError(Exception):
    """What the Hub answers to a request that it does not carry out."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, headers)


@dataclass(frozen=True)
class Call:
    """A request with what its path and token stand for."""

    request: Request
    user: str
    """Empty: nobody in particular."""
    parts: Mapping[str, str]
    repository: Repository

    def revision(self) -> Commit:
        name = self.parts.get("revision") or "main"
        if found := self.repository.find(name):
            return found
        raise RefusedError(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def discussion(self) -> Discussion:
        number = int(self.parts["number"])
        if number > len(self.repository.discussions):
            raise RefusedError(404, "Discussion not found")
        return self.repository.discussions[number - 1]

    def known(self) -> str:
        if not self.user:
            raise RefusedError(401, "Invalid username or password.")
        return self.user

    def writer(self) -> str:
        if self.known() not in self.repository.writers:
            raise RefusedError(403, "You don't have write access to this repository")
        return self.user


class Hub(Server):
    """The server; see `Server` for what it counts and how its calls go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[str, str] = {}
        """Token -> name."""
        self.read_only: set[str] = set()
        """Tokens that may look and do nothing else."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[tuple[str, str], str] = {}
        """Kind and old name -> new name."""
        self.storage: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.part_bytes = 1 << 40
        """Larger files are uploaded in parts of this size."""
        self._parts: dict[tuple[str, int], bytes] = {}

    def user(self, name: str, *, read_only: bool = False) -> str:
        """Add a user's token and return it."""
        token = f"hf_{hashlib.sha256(f'{name}{read_only}'.encode()).hexdigest()[:34]}"
        self.users[token] = name
        if read_only:
            self.read_only.add(token)
        return token

    def repository(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        kind: str = "dataset",
        writers: set[str] | None = None,
    ) -> Repository:
        """Add a repository with one commit."""
        made = Repository(f"{kind}s", name, writers or set())
        blobs = {path: Blob(content, _is_large(path, content)) for path, content in files.items()}
        made.commit("main", "", blobs, "initial commit", "", name.partition("/")[0])
        self.repositories[made.kind, name] = made
        return made

    def move(self, repository: Repository, name: str) -> None:
        """Rename a repository; its old name redirects."""
        self.moved[repository.kind, repository.name] = name
        del self.repositories[repository.kind, repository.name]
        repository.name = name
        self.repositories[repository.kind, name] = repository

    def push(
        self, repository: Repository, files: Mapping[str, bytes], by: str = "maintainer"
    ) -> Commit:
        """Commit to the main branch, as somebody else does."""
        main = repository.commits[repository.refs["main"]]
        blobs = {path: Blob(content, _is_large(path, content)) for path, content in files.items()}
        return repository.commit("main", main.oid, {**main.files, **blobs}, "update", "", by)

    def merge(self, repository: Repository, number: int, by: str = "maintainer") -> None:
        """Merge a pull request, as a reviewer does."""
        discussion = repository.discussions[number - 1]
        if discussion.status != "open":
            raise RefusedError(409, f"This pull request is {discussion.status}")
        if conflicts := repository.conflicts(discussion):
            raise RefusedError(409, f"Conflicts in {', '.join(conflicts)}")
        main = repository.commits[repository.refs["main"]]
        changed = {**main.files, **repository.changes(discussion)}
        files = {path: blob for path, blob in changed.items() if blob is not None}
        title = f"{discussion.title} (#{number})"
        merged = repository.commit("main", main.oid, files, title, "", by)
        discussion.merged = merged.oid
        self.set_status(discussion, "merged", by)

    def close(
        self, repository: Repository, number: int, comment: str, by: str = "maintainer"
    ) -> None:
        """Close a pull request unmerged, with a comment, as a reviewer does."""
        discussion = repository.discussions[number - 1]
        self.comment(discussion, comment, by)
        self.set_status(discussion, "closed", by)

    def comment(self, discussion: Discussion, text: str, by: str) -> dict[str, Any]:
        """Add a comment to a discussion."""
        if len(text) > _BODY:
            raise RefusedError(400, f"Too big: expected string to have <={_BODY} characters")
        latest = {"raw": text, "html": "", "updatedAt": _now(), "author": {"name": by}}
        data = {"edited": False, "hidden": False, "latest": latest, "history": [], "numEdits": 0}
        return _add_event(discussion, "comment", by, data)

    def set_status(self, discussion: Discussion, status: str, by: str) -> dict[str, Any]:
        """Open, close or merge a discussion."""
        discussion.status = status
        return _add_event(discussion, "status-change", by, {"status": status})

    # The HTTP side.

    def route(self, request: Request) -> tuple[str, Callable[[], Answer]]:
        for methods, pattern, endpoint in _ROUTES:
            found = pattern.fullmatch(request.path)
            if found and request.method in methods.split("|"):
                parts = {name: unquote(value) for name, value in found.groupdict().items() if value}
                return endpoint, partial(self._carry_out, endpoint, request, parts)
        unknown = f"{request.method} {request.path}"
        return unknown, lambda: self.violated(f"{unknown}: no such endpoint here")

    def _carry_out(self, endpoint: str, request: Request, parts: Mapping[str, str]) -> Answer:
        try:
            if endpoint.startswith("lfs-") and "oid" in parts:
                return self._store(endpoint, request, parts)  # the address is the permission
            user = self._user(request)
            if endpoint == "whoami":
                return self._whoami(user)
            if endpoint == "validate-yaml":  # asked before a README.md is committed
                return Answer(200, {"errors": [], "warnings": []})
            kind, name = parts.get("kind", "models"), parts["repo"]
            if (kind, name) in self.moved:
                target = request.target.replace(name, self.moved[kind, name], 1)
                return Answer(307, {"error": "Temporary Redirect"}, {"Location": target})
            call = Call(request, user, parts, self._visible(kind, name, user))
            handle: Callable[[Call], Answer] = getattr(self, "_" + endpoint.replace("-", "_"))
            if request.method == "POST" and endpoint != "paths-info":
                self._may_change(call)
            return handle(call)
        except RefusedError as refused:
            return refused.answer

    def _user(self, request: Request) -> str:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.users.get(token, "")

    def _visible(self, kind: str, name: str, user: str) -> Repository:
        found = self.repositories.get((kind, name))
        if found is None or (
            found.readers is not None and user not in found.readers | found.writers
        ):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def _may_change(self, call: Call) -> None:
        token = call.request.headers.get("authorization", "").removeprefix("Bearer ")
        if token in self.read_only:
            raise RefusedError(403, "This token has read access only; a write token is needed")
        call.known()
        if call.repository.gated and call.user not in call.repository.writers:
            raise RefusedError(403, "Access to this repository is restricted", "GatedRepo")

    def _whoami(self, user: str) -> Answer:
        if not user:
            raise RefusedError(401, "Invalid username or password.")
        return Answer(200, {"type": "user", "id": user, "name": user, "orgs": [], "auth": {}})

    def _preupload(self, call: Call) -> Answer:
        self._may_commit(call)
        files = call.revision().files
        told = []
        for entry in call.request.json()["files"]:
            path, sample = entry["path"], base64.b64decode(entry["sample"])
            large = _is_large(path, sample) or entry["size"] > _LFS_BYTES
            known = files.get(path)
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            told.append({"path": path, **mode, "oid": known.oid if known else None})
        return Answer(200, {"files": told, "commitOid": call.revision().oid})

    def _lfs_batch(self, call: Call) -> Answer:
        objects = [self._upload_of(call, entry) for entry in call.request.json()["objects"]]
        return Answer(200, {"transfer": "basic", "objects": objects})

    def _upload_of(self, call: Call, entry: Mapping[str, Any]) -> dict[str, Any]:
        oid, size = entry["oid"], entry["size"]
        known = {"oid": oid, "size": size, "authenticated": True}
        if oid in self.storage:
            return known
        place = f"{self.url}/storage/{oid}"
        upload: dict[str, Any] = {"href": place, "header": {}}
        if size > self.part_bytes:
            parts = range(1, -(-size // self.part_bytes) + 1)
            header = {str(n): f"{place}/{n}" for n in parts} | {"chunk_size": str(self.part_bytes)}
            upload = {"href": f"{place}/complete", "header": header}
        verify = f"{self.url}{call.request.path.removesuffix('objects/batch')}verify"
        return {**known, "actions": {"upload": upload, "verify": {"href": verify, "header": {}}}}

    def _store(self, endpoint: str, request: Request, parts: Mapping[str, str]) -> Answer:
        oid, content = parts["oid"], request.body
        if endpoint == "lfs-part":
            self._parts[oid, int(parts["part"])] = content
            return Answer(200, b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
        if endpoint == "lfs-complete":
            numbers = [part["partNumber"] for part in request.json()["parts"]]
            content = b"".join(self._parts.pop((oid, number)) for number in numbers)
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusedError(400, f"The content is not {oid}")
        self.storage[oid] = content
        return Answer(200, b"")

    def _lfs_verify(self, call: Call) -> Answer:
        said = call.request.json()
        if len(self.storage.get(said["oid"], b"")) != said["size"]:
            raise RefusedError(404, f"{said['oid']} is not stored")
        return Answer(200, {"message": "ok"})

    def _xet_token(self, call: Call) -> Answer:
        raise RefusedError(404, f"{call.repository.name} does not offer xet")

    def _commit(self, call: Call) -> Answer:
        discussion = self._may_commit(call)
        lines = [json.loads(line) for line in call.request.body.splitlines()]
        head, operations = lines[0]["value"], lines[1:]
        parent = call.revision()
        repository, revision = call.repository, call.parts["revision"]
        creates = call.request.query.get("create_pr") == "1"
        expected = head.get("parentCommit")
        if expected and creates:
            parent = repository.find(expected) or parent
        elif expected and not parent.oid.startswith(expected):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = self._applied(parent.files, operations)
        told = (head["summary"], head.get("description", ""))
        if creates:
            discussion = self._open(call, *told, base=parent.oid, status="open")
            revision = f"refs/pr/{discussion.number}"
        made = repository.commit(revision, parent.oid, files, *told, call.user)
        if discussion:
            event = {"subject": made.title, "oid": made.oid}
            _add_event(discussion, "commit", call.user, event)
        page_of = f"{self.url}/{repository.kind}/{repository.name}"
        answer = {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{page_of}/commit/{made.oid}",
        }
        if creates and discussion:
            answer["pullRequestUrl"] = f"{page_of}/discussions/{discussion.number}"
        return Answer(200, answer)

    def _may_commit(self, call: Call) -> Discussion | None:
        """Check who may commit where; return the pull request that a revision belongs to."""
        revision = call.parts["revision"]
        if call.request.query.get("create_pr") == "1":
            if revision not in call.repository.refs:
                raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        number = revision.removeprefix("refs/pr/")
        if number == revision:
            call.writer()
            return None
        found = replace(call, parts={**call.parts, "number": number}).discussion()
        if call.user != found.author:
            call.writer()
        if found.status not in {"open", "draft"}:
            raise RefusedError(400, f"This pull request is {found.status}")
        return found

    def _applied(
        self, files: Mapping[str, Blob], operations: list[dict[str, Any]]
    ) -> dict[str, Blob]:
        """Return the files after a commit's operations."""
        after = dict(files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind == "file":
                after[path] = Blob(base64.b64decode(value["content"], validate=True))
            elif kind == "lfsFile":
                if value["oid"] not in self.storage:
                    raise RefusedError(400, f"{path}: LFS object {value['oid']} does not exist")
                after[path] = Blob(self.storage[value["oid"]], large=True)
            else:
                gone = [p for p in after if p == path or p.startswith(f"{path.rstrip('/')}/")]
                if not gone:
                    message = f"A file with this name doesn't exist: {path}"
                    raise RefusedError(404, message, "EntryNotFound")
                for name in gone:
                    del after[name]
        return after

    def _open(self, call: Call, title: str, text: str, *, base: str, status: str) -> Discussion:
        if not 3 <= len(title.strip()) <= 200:
            raise RefusedError(400, "title: expected 3 to 200 characters")
        listed = call.repository.discussions
        made = Discussion(len(listed) + 1, title, call.user, _now(), status, base)
        self.comment(made, text, call.user)
        listed.append(made)
        if base:
            call.repository.refs[f"refs/pr/{made.number}"] = base
        return made

    def _create_discussion(self, call: Call) -> Answer:
        said = call.request.json()
        pull = bool(said.get("pullRequest"))
        base = call.repository.refs["main"] if pull else ""
        told = (said["title"], said["description"])
        made = self._open(call, *told, base=base, status="draft" if pull else "open")
        return Answer(200, {"num": made.number, "pullRequest": pull})

    def _discussions(self, call: Call) -> Answer:
        query = call.request.query
        wanted = [d for d in reversed(call.repository.discussions) if _is_wanted(d, query)]
        number = int(query.get("p", 0))
        shown = [self._summary(call.repository, d) for d in page(wanted, _PAGE, number)]
        return Answer(200, {"discussions": shown, "count": len(wanted), "start": number * _PAGE})

    def _summary(self, repository: Repository, discussion: Discussion) -> dict[str, Any]:
        return {
            "num": discussion.number,
            "title": discussion.title,
            "status": discussion.status,
            "isPullRequest": bool(discussion.base),
            "author": {"name": discussion.author},
            "createdAt": discussion.created,
            "repo": {"name": repository.name, "type": repository.kind.removesuffix("s")},
        }

    def _discussion(self, call: Call) -> Answer:
        discussion = call.discussion()
        told = self._summary(call.repository, discussion) | {"events": discussion.events}
        if discussion.base:
            changes: dict[str, Any] = {"base": "refs/heads/main"}
            if discussion.merged:
                changes["mergeCommitId"] = discussion.merged
            waits = discussion.status in {"open", "draft"}
            conflicts = call.repository.conflicts(discussion) if waits else []
            diff = "".join(f"diff --git a/{p} b/{p}\n" for p in call.repository.changes(discussion))
            told |= {"changes": changes, "filesWithConflicts": conflicts, "diff": diff}
        return Answer(200, told)

    def _comment(self, call: Call) -> Answer:
        text = call.request.json()["comment"]
        return Answer(200, {"newMessage": self.comment(call.discussion(), text, call.user)})

    def _edit(self, call: Call) -> Answer:
        event = next((e for e in call.discussion().events if e["id"] == call.parts["event"]), None)
        if event is None or event["type"] != "comment":
            raise RefusedError(404, "Comment not found")
        if event["author"]["name"] != call.user:
            call.writer()
        data, text = event["data"], call.request.json()["content"]
        if len(text) > _BODY:
            raise RefusedError(400, f"Too big: expected string to have <={_BODY} characters")
        data["history"].append(data["latest"])
        data["latest"] = {**data["latest"], "raw": text, "updatedAt": _now()}
        data |= {"edited": True, "numEdits": len(data["history"])}
        return Answer(200, {"updatedComment": event})

    def _status(self, call: Call) -> Answer:
        discussion, said = call.discussion(), call.request.json()
        if call.user != discussion.author:
            call.writer()
        if discussion.status == "merged":
            raise RefusedError(409, "This pull request is merged")
        if "comment" in said:
            self.comment(discussion, said["comment"], call.user)
        return Answer(200, {"newStatus": self.set_status(discussion, said["status"], call.user)})

    def _title(self, call: Call) -> Answer:
        discussion, title = call.discussion(), call.request.json()["title"]
        if call.user != discussion.author:
            call.writer()
        data = {"from": discussion.title, "to": title}
        discussion.title = title
        return Answer(200, {"newTitle": _add_event(discussion, "title-change", call.user, data)})

    def _merge(self, call: Call) -> Answer:
        self.merge(call.repository, call.discussion().number, call.writer())
        return Answer(200, {})

    def _info(self, call: Call) -> Answer:
        commit, repository = call.revision(), call.repository
        return Answer(
            200,
            {
                "id": repository.name,
                "author": repository.name.partition("/")[0],
                "sha": commit.oid,
                "lastModified": commit.date,
                "private": repository.readers is not None,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            },
        )

    def _tree(self, call: Call) -> Answer:
        inside = f"{call.parts['path'].rstrip('/')}/" if "path" in call.parts else ""
        files = {p: b for p, b in call.revision().files.items() if p.startswith(inside)}
        if inside and not files:
            raise RefusedError(404, f"{inside} does not exist", "EntryNotFound")
        recursive = call.request.query.get("recursive", "").lower() in {"true", "1"}
        entries = {}
        for path, blob in sorted(files.items()):
            *folders, _ = path.removeprefix(inside).split("/")
            for depth in range(1, len(folders) + 1):
                folder = inside + "/".join(folders[:depth])
                entries[folder] = _folder(folder)
            entries[path] = _entry(path, blob)
        shown = [e for p, e in entries.items() if recursive or "/" not in p.removeprefix(inside)]
        return Answer(200, shown)

    def _paths_info(self, call: Call) -> Answer:
        said = re.findall(r"(?:^|&)paths=([^&]*)", call.request.body.decode())
        asked = [unquote(path.replace("+", " ")) for path in said]
        files = call.revision().files
        found = [_entry(path, files[path]) for path in asked if path in files]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
        return Answer(200, found + [_folder(path) for path in folders])

    def _commits(self, call: Call) -> Answer:
        shown = [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for commit in call.repository.history(call.revision())
        ]
        return Answer(200, shown)

    def _refs(self, call: Call) -> Answer:
        refs = {name: {"targetCommit": oid} for name, oid in call.repository.refs.items()}
        pulls = [{"name": n, "ref": n, **r} for n, r in refs.items() if n.startswith("refs/pr/")]
        rest = [(n, r) for n, r in refs.items() if not n.startswith("refs/pr/")]
        branches = [{"name": n, "ref": f"refs/heads/{n}", **r} for n, r in rest]
        told: dict[str, Any] = {"branches": branches, "converts": [], "tags": []}
        if "include_prs" in call.request.query:
            told["pullRequests"] = pulls
        return Answer(200, told)

    def _resolve(self, call: Call) -> Answer:
        commit, path = call.revision(), call.parts["path"]
        if path not in commit.files:
            raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        return Answer(200, blob.content, headers)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _is_large(path: str, content: bytes) -> bool:
    return path.endswith(_LFS_SUFFIXES) or len(content) > _LFS_BYTES


def _is_wanted(discussion: Discussion, query: Mapping[str, str]) -> bool:
    """Whether a listing shows a discussion; closed ones are also those that were merged."""
    kind = "pull_request" if discussion.base else "discussion"
    status = "open" if discussion.status in {"open", "draft"} else "closed"
    return (
        query.get("type", "all") in {kind, "all"}
        and query.get("status", "all") in {status, "all"}
        and query.get("author", discussion.author) == discussion.author
    )


def _add_event(discussion: Discussion, kind: str, by: str, data: dict[str, Any]) -> dict[str, Any]:
    said = f"{discussion.created}/{discussion.number}/{len(discussion.events)}"
    event = {
        "id": hashlib.sha1(said.encode()).hexdigest()[:24],
        "type": kind,
        "createdAt": _now(),
        "author": {"name": by},
        "data": data,
    }
    discussion.events.append(event)
    return event


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    """Return a file as a tree lists it: of a large one, git has a pointer."""
    size = len(blob.content)
    if not blob.large:
        return {"type": "file", "oid": blob.oid, "size": size, "path": path}
    pointer = hashlib.sha1(blob.oid.encode()).hexdigest()
    lfs = {"oid": blob.oid, "size": size, "pointerSize": _POINTER}
    return {"type": "file", "oid": pointer, "size": size, "path": path, "lfs": lfs}
