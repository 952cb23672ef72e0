"""A local GitHub: the REST API's operations that publishing calls, over real bare repositories.

Every request and every answer is held to GitHub's own OpenAPI description: what is not as described
is answered 500 with the reason, and recorded in `violations`. A push over HTTP to
`{url}/{owner}/{name}.git` goes to the same repositories.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.fakes import bare
from tests.fakes.github_operations import HANDLERS, LIMIT
from tests.fakes.github_state import API, Call, RefusedError, State
from tests.fakes.openapi import Description, Operation
from tests.fakes.web import Answer, Fault, Request

DESCRIPTION = Path(__file__).parents[1] / "data" / "github" / "openapi.json"
_GIT = re.compile(r"/(?P<repo>[\w.-]+/[\w.-]+)\.git/(?P<service>info/refs|git-[\w-]+)")


class GitHub(State):
    """The server; see `Server` for what it counts and how its calls go wrong.

    Operations are counted by their name in the description, git by its own (`git-receive-pack`).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._description = Description(DESCRIPTION, f"{self.url}/unset")

    def route(self, request: Request) -> tuple[str, Callable[[], Answer]]:
        if found := _GIT.fullmatch(request.path):
            return found["service"], partial(self._git, request, found["repo"])
        path = request.path.removeprefix(API)
        found_operation = self._description.find(request.method, self._by_number(path))
        if path == request.path or found_operation is None:
            unknown = f"{request.method} {request.path}"
            return unknown, lambda: self.violated(f"{unknown}: no such operation here")
        operation, parts = found_operation
        return operation.name, partial(self._judged, request, operation, parts)

    def _by_number(self, path: str) -> str:
        """Return a path in which a repository is named, not numbered."""
        found = re.match(r"/repositories/(\d+)", path)
        if not found or int(found[1]) > len(self.repositories):
            return path
        return f"/repos/{self.repositories[int(found[1]) - 1].name}{path[found.end() :]}"

    def _judged(self, request: Request, operation: Operation, parts: Mapping[str, str]) -> Answer:
        """Carry out an operation if it is asked for as described, and answer as described."""
        wrong = self._description.wrong_request(operation, parts, request)
        answer = Answer()
        if not wrong:
            answer = self._carry_out(request, operation, parts)
            wrong = self._description.wrong_answer(operation, parts, request, answer)
        if wrong:
            return self.violated(f"not as GitHub describes {operation.name}: {wrong}")
        return answer

    def _carry_out(
        self, request: Request, operation: Operation, parts: Mapping[str, str]
    ) -> Answer:
        headers = {}
        try:
            user = self._known(request.headers.get("authorization", ""))
            headers = self._rate()
            name = f"{parts.get('owner')}/{parts.get('repo')}"
            if name in self.moved:
                return self._moved(request, name)
            call = Call(
                user=user,
                parts=parts,
                query=request.query,
                said=request.json() if request.body else {},
                url=f"{self.url}{request.path}",
                _repository=self.visible(name, user),
            )
            if request.method != "GET" and not user:
                raise RefusedError(401, "Requires authentication")
            answer = HANDLERS[operation.name](self, call)
        except RefusedError as refused:
            answer = refused.answer
        content = self._description.complete(operation, answer.status, answer.content)
        return Answer(answer.status, content, headers | dict(answer.headers))

    def _known(self, said: str) -> str:
        """Return whose token it is."""
        token = said.partition(" ")[2]
        if said.lower().startswith("basic "):
            token = base64.b64decode(token).decode().partition(":")[2]
        if token and token not in self.users:
            raise RefusedError(401, "Bad credentials")
        return self.users.get(token, "")

    def _rate(self) -> dict[str, str]:
        """Count a request against the limit; return the headers that say what is left."""
        limited = time.time() < self.limited_until
        self.used += 1
        reset = self.limited_until if limited else time.time() + 3600
        headers = {
            "X-RateLimit-Limit": str(LIMIT),
            "X-RateLimit-Remaining": "0" if limited else str(max(1, LIMIT - self.used)),
            "X-RateLimit-Reset": str(int(reset)),
            "X-RateLimit-Resource": "core",
        }
        if limited:
            refused = RefusedError(403, "API rate limit exceeded for user ID 1.")
            refused.answer = Answer(403, refused.answer.content, headers)
            raise refused
        return headers

    def _moved(self, request: Request, name: str) -> Answer:
        rest = request.target.partition(name)[2]
        url = f"{self.api}/repositories/{self.moved[name].number}{rest}"
        told = {"message": "Moved Permanently", "url": url, "documentation_url": url}
        return Answer(301 if request.method == "GET" else 307, told, {"Location": url})

    def _git(self, request: Request, name: str) -> Answer:
        """Let git serve a repository; pushing needs a token of somebody who may."""
        try:
            user = self._known(request.headers.get("authorization", ""))
        except RefusedError:
            return Answer(401, b"", {"WWW-Authenticate": 'Basic realm="GitHub"'})
        repository = self.moved.get(name) or self.visible(name, user)
        if repository is None:
            return Answer(404, b"Repository not found.")
        pushes = "receive-pack" in request.target
        if pushes and not user:
            return Answer(401, b"", {"WWW-Authenticate": 'Basic realm="GitHub"'})
        if pushes and user not in repository.writers:
            return Answer(403, f"Permission to {name}.git denied to {user}.".encode())
        path = f"/{repository.name}.git{request.path.partition('.git')[2]}"
        return bare.serve(self.folder, path, request, user)


def secondary_limit(operation: str, call: int = 1, wait: int | None = 1) -> Fault:
    """Let a call be refused for being one of too many in a short time."""
    headers = {} if wait is None else {"Retry-After": str(wait)}
    message = (
        "You have exceeded a secondary rate limit. Please wait a few minutes before you try again."
    )
    url = "https://docs.github.com/rest/overview/rate-limits-for-the-rest-api"
    content = {"message": message, "documentation_url": url}
    return Fault(operation, call, status=403, headers=headers, content=content)
