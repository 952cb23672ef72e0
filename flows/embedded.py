"""A private Prefect server for one command: history stays in the workspace, nothing stays running.

Prefect's own in-process server loses task runs and takes as long to start, so the command line
starts a real one on a free loopback port, with its database in the workspace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import httpx
from filelock import FileLock, Timeout

from tasks.errors import InputError, OnboardError

_START_SECONDS = 180
_SERVER = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
}
_ONE_COMMAND = {
    # Nothing is scheduled, late or paused in a server that lives for one command.
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
}
_NO_PROXY = ("NO_PROXY", "no_proxy")
_CLIENT = {
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}


def die_with_parent() -> None:
    """Have the kernel end this process when its parent dies, however that dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def home(workspace: Path) -> Path:
    """Return the folder of the workspace's Prefect database, results and log."""
    return workspace / ".prefect"


@contextlib.contextmanager
def prefect_server(workspace: Path, port: int | None = None) -> Iterator[str]:
    """Run a server while the block runs, and point this process's Prefect at it.

    If `PREFECT_API_URL` is set, that server is used and nothing is started.

    Args:
        workspace: holds the database, the results and the server's log.
        port: loopback port of a server with all its services; without it a free port, and only
            the services that one command needs.

    Yields:
        The API's URL.

    Raises:
        InputError: the workspace cannot be written, or another command is using it.
        OnboardError: the server did not start.
    """
    given = os.environ.get("PREFECT_API_URL")
    if given:
        yield given
        return
    folder = home(workspace)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "server.lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{workspace}: another onboard command is running here; wait for it, or share a "
            "server between them with PREFECT_API_URL"
        ) from error
    except OSError as error:
        raise InputError(f"{workspace}: cannot be written ({error.strerror})") from error
    before = dict(os.environ)
    services = {} if port else _ONE_COMMAND
    port = port or _free_port()
    shared = {
        "PREFECT_HOME": str(folder),
        "PREFECT_LOCAL_STORAGE_PATH": str(folder / "storage"),
        **{name: ",".join(filter(None, (os.environ.get(name), "127.0.0.1"))) for name in _NO_PROXY},
    }
    try:
        with server_process(folder, port, services) as url:
            os.environ.update({**_CLIENT, **shared, "PREFECT_API_URL": url})
            try:
                yield url
            finally:
                os.environ.clear()
                os.environ.update(before)
    finally:
        lock.release()


@contextlib.contextmanager
def server_process(
    folder: Path, port: int, settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[str]:
    """Run a server on loopback, and nothing else, while the block runs.

    Args:
        folder: holds the database and the server's log.
        port: to listen on.
        settings: more of its environment.

    Yields:
        The API's URL.

    Raises:
        OnboardError: it did not start.
    """
    url = f"http://127.0.0.1:{port}/api"
    with (
        (folder / "server.log").open("ab") as log,
        subprocess.Popen(
            [sys.executable, "-m", "flows.server", "--host", "127.0.0.1", "--port", str(port)],
            env={
                **os.environ,
                **_SERVER,
                **settings,
                "PREFECT_HOME": str(folder),
                "PREFECT_API_URL": url,
                "PREFECT_API_DATABASE_CONNECTION_URL": (
                    f"sqlite+aiosqlite:///{folder / 'prefect.db'}"
                ),
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509  one system call before exec
        ) as server,
    ):
        try:
            _wait_until_healthy(url, server, folder / "server.log")
            yield url
        finally:
            _send_what_is_queued()
            _stop(server)


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with httpx.Client(timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise OnboardError(f"the Prefect server ended at once, see {log}")
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/health").is_success:
                    return
            time.sleep(0.1)
    raise OnboardError(f"the Prefect server did not answer in {_START_SECONDS} s, see {log}")


def _send_what_is_queued() -> None:
    """Have Prefect send its queued logs and events before the server goes.

    Its workers would otherwise retry against a closed port for a minute when the process exits.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=20, at_exit=False)


def _stop(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
