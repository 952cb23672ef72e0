"""A local HTTP server for tests that counts its calls, and where they go wrong on demand.

Standard library only: dropping a connection at the right moment needs the socket itself.
"""

from __future__ import annotations

import json
import socket
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

EVERY = "*"
"""As a fault's endpoint: whatever is called."""


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str
    """As sent, percent-encoded."""
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """By lower-case name."""
    body: bytes
    target: str
    """Path and query as sent."""

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Answer:
    """What a server says; `content` is JSON unless it is bytes."""

    status: int = 200
    content: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return (
            self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()
        )

    @property
    def media(self) -> str:
        known = {name.lower(): value for name, value in self.headers.items()}
        plain = (
            "application/octet-stream" if isinstance(self.content, bytes) else "application/json"
        )
        return known.get("content-type", plain)


@dataclass(frozen=True)
class Fault:
    """What goes wrong at one call: the connection is dropped, unless a status is given."""

    endpoint: str
    call: int = 1
    """The how-maniest call of the endpoint, from 1."""
    times: int = 1
    """At how many calls in succession."""
    after: bool = False
    """Whether the call took effect before it went wrong."""
    status: int = 0
    """Answered instead of what the server would say."""
    headers: Mapping[str, str] = field(default_factory=dict)
    content: Any = field(default_factory=lambda: {"message": "no", "error": "no"})
    hold: float = 0
    """Say nothing for so many seconds first: longer than the client waits."""
    act: Callable[[], None] | None = None
    """Done at this moment, such as killing the client."""

    def hits(self, endpoint: str, calls: Counter[str]) -> bool:
        number = calls.total() if self.endpoint == EVERY else calls[self.endpoint]
        return self.endpoint in {endpoint, EVERY} and 0 <= number - self.call < self.times


@dataclass(frozen=True)
class Seen:
    """One call, as the server remembers it."""

    endpoint: str
    method: str
    target: str
    status: int
    """0: nothing was answered."""


class Server:
    """Serves on a free port of this machine while its `with` block runs."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        """How often each endpoint was called."""
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.violations: list[str] = []
        """What was asked or answered that the real server would not have."""
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _Threads(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def route(self, request: Request) -> tuple[str, Callable[[], Answer]]:
        """Return the endpoint's name and what answers the request."""
        raise NotImplementedError

    def fail(self, *faults: Fault) -> None:
        """Let calls go wrong; calls are counted from now on."""
        with self._lock:
            self.calls.clear()
            self.faults = list(faults)

    def answer(self, request: Request) -> Answer | None:
        """Answer a request; None drops the connection."""
        endpoint, handle = self.route(request)
        with self._lock:  # one at a time, as in a transaction
            self.calls[endpoint] += 1
            fault = next((f for f in self.faults if f.hits(endpoint, self.calls)), None)
            answer = self._handled(endpoint, handle) if fault is None or fault.after else None
            if fault is not None:
                answer = (
                    Answer(fault.status, fault.content, fault.headers) if fault.status else None
                )
            status = answer.status if answer else 0
            self.seen.append(Seen(endpoint, request.method, request.target, status))
        if fault is not None:
            if fault.act is not None:
                fault.act()
            self._stopped.wait(fault.hold)
        return answer

    def _handled(self, endpoint: str, handle: Callable[[], Answer]) -> Answer:
        try:
            return handle()
        except Exception:
            return self.violated(f"{endpoint}: {traceback.format_exc()}")

    def violated(self, reason: str) -> Answer:
        """Record what must not be, and answer with it."""
        self.violations.append(reason)
        return Answer(500, {"message": reason, "error": reason})

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._http.shutdown()
        self._http.server_close()
        if error[0] is None:
            assert not self.violations, "\n".join(self.violations)


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    owner: Server

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        request = Request(
            self.command,
            parts.path,
            dict(parse_qsl(parts.query, keep_blank_values=True)),
            {name.lower(): value for name, value in self.headers.items()},
            self._read(),
            self.path,
        )
        answer = self.owner.answer(request)
        if answer is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = answer.body
        self.send_response(answer.status)
        own = {"Content-Type": answer.media, "Content-Length": str(len(body))}
        if answer.status == 204:
            own = {}
        for name, value in (own | dict(answer.headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, OSError):  # the client has gone, or we dropped it
            self.close_connection = True


def page(items: Sequence[Any], size: int, number: int) -> list[Any]:
    """Return one page of a list; pages are counted from 0."""
    return list(items[number * size : (number + 1) * size])
