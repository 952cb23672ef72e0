"""A Prefect server with a password, and its workers, as processes of a test."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import tomli_w
from redis import Redis, RedisError
from tenacity import retry, retry_if_result, stop_after_delay, wait_fixed

from flows.embedded import die_with_parent
from tasks.collect.keeper import free_port

POOLS = Path(__file__).resolve().parents[2] / "deployments" / "pools"
_DEADLINE_SECONDS = 120.0
T = TypeVar("T")


def until(
    what: str,
    ask: Callable[[], T | None],
    seconds: float = _DEADLINE_SECONDS,
    accept: type[Exception] = httpx.TransportError,
) -> T:
    """Ask until there is an answer that is true.

    Args:
        what: is waited for.
        ask: for it.
        seconds: to wait at most.
        accept: an error that is no answer yet.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(accept):
            if answer := ask():
                return answer
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


class _Patient(httpx.HTTPTransport):
    """Asks again where the server is too busy to answer, as Prefect's own client does."""

    @retry(
        retry=retry_if_result(lambda said: said.status_code == httpx.codes.SERVICE_UNAVAILABLE),
        stop=stop_after_delay(30),
        wait=wait_fixed(0.5),
        retry_error_callback=lambda tried: tried.outcome and tried.outcome.result(),
    )
    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return super().handle_request(request)


@dataclass(frozen=True)
class Prefect:
    """A running server."""

    folder: Path
    """Everything of it: database, logs, profiles."""
    url: str
    password: str
    """What HTTP basic authentication wants, as `name:password`."""
    api: httpx.Client
    server: Service

    @property
    def client_profile(self) -> Path:
        """A profiles file with the password, and nothing else in it."""
        return self.folder / "client.toml"

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a client process; the password is not in it."""
        return {
            **_outside(),
            "PREFECT_API_URL": self.url,
            "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",  # as compose.yaml: a lost database
            "PREFECT_HOME": str(self.folder / "home"),
            "PREFECT_PROFILES_PATH": str(self.client_profile),
            **more,
        }

    def create_pool(self, name: str, kind: str, template: Path) -> None:
        """Create a work pool with a base job template, as `make deploy` does."""
        subprocess.run(
            [
                *(sys.executable, "-m", "prefect", "work-pool", "create", name, "--type", kind),
                *("--base-job-template", str(template), "--overwrite"),
            ],
            env=self.environment(),
            cwd=self.folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def deploy(self, name: str, entrypoint: str, folder: str, pool: str, **fields: Any) -> str:
        """Create a deployment of a flow in `folder`, as the run sees it; return its id."""
        flow = self.post("/flows/", {"name": name})
        pull = [{"prefect.deployments.steps.set_working_directory": {"directory": folder}}]
        wanted = {
            "name": name,
            "flow_id": flow["id"],
            "entrypoint": entrypoint,
            "pull_steps": pull,
            "work_pool_name": pool,
            **fields,
        }
        return str(self.post("/deployments/", wanted)["id"])

    def deployment(self, name: str) -> str:
        """Return the id of the deployment that has its flow's name."""
        answer = self.api.get(f"/deployments/name/{name}/{name}")
        assert answer.is_success, f"{name}: {answer.status_code} {answer.text}"
        return str(answer.json()["id"])

    def run(self, deployment: str, **fields: Any) -> str:
        """Create a run of a deployment, as the UI does; return its id."""
        wanted = {"state": {"type": "SCHEDULED"}, **fields}
        return str(self.post(f"/deployments/{deployment}/create_flow_run", wanted)["id"])

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a request; fail with what the server says."""
        answer = self.api.post(path, json=body)
        assert answer.is_success, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def state(self, run: str) -> dict[str, Any]:
        """Return a flow run's state."""
        found: dict[str, Any] = self.api.get(f"/flow_runs/{run}").json()["state"]
        return found

    def wait(
        self, run: str, *names: str, seconds: float = _DEADLINE_SECONDS, restarts: bool = False
    ) -> dict[str, Any]:
        """Wait until a flow run is in one of these states, and return it.

        A final state that is none of them is a failure, with what the run logged; where it
        restarts, a crash is not final.
        """

        def ask() -> dict[str, Any] | None:
            state = self.state(run)
            if state["name"] in names:
                return state
            final = state["type"] in {"COMPLETED", "FAILED", "CANCELLED"}
            final |= state["type"] == "CRASHED" and not restarts
            assert not final, f"{state['name']}: {state['message']}\n{self.log(run)}"
            return None

        return until(f"{' or '.join(names)} of run {run}", ask, seconds)

    def history(self, run: str) -> list[str]:
        """Return the names of all states that a flow run was in."""
        states = self.api.get("/flow_run_states/", params={"flow_run_id": run}).json()
        return [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]

    def retry(self, run: str) -> None:
        """Retry a flow run, as the button in the UI does."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        self.post(f"/flow_runs/{run}/set_state", {"state": state, "force": True})

    def cancel(self, run: str) -> None:
        """Cancel a flow run, as the button in the UI does."""
        self.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}, "force": False})

    def log(self, run: str) -> str:
        """Return what a flow run logged."""
        asked = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"}
        return "\n".join(line["message"] for line in self.post("/logs/filter", asked))

    @contextmanager
    def worker(self, pool: str, kind: str, **more: str) -> Iterator[Service]:
        """Run a worker of a pool while the block runs; its output goes to `worker-POOL.log`."""
        command = ("worker", "start", "--pool", pool, "--type", kind, "--name", f"{pool}-worker")
        with _running(
            [sys.executable, "-m", "prefect", *command],
            self.environment(PREFECT_WORKER_QUERY_SECONDS="1", **more),
            self.folder / f"worker-{pool}.log",
        ) as service:
            yield service


@contextmanager
def redis(folder: Path) -> Iterator[dict[str, str]]:
    """Run Redis while the block runs; yield what has a server use it, as compose.yaml does."""
    port = free_port()
    start = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    with _running(start, _outside(), folder / "redis.log"):
        until("Redis", lambda: Redis(port=port).ping(), accept=RedisError)
        yield {
            "PREFECT_REDIS_MESSAGING_HOST": "127.0.0.1",
            "PREFECT_REDIS_MESSAGING_PORT": str(port),
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
            "PREFECT_SERVER_DOCKET_URL": f"redis://127.0.0.1:{port}/1",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
            "PREFECT_SERVER_EVENTS_MESSAGING_BROKER": "prefect_redis.messaging",
            "PREFECT_SERVER_EVENTS_MESSAGING_CACHE": "prefect_redis.messaging",
        }


@contextmanager
def prefect_server(
    folder: Path, database: str | None = None, more: Mapping[str, str] | None = None
) -> Iterator[Prefect]:
    """Run a server with a password of its own while the block runs.

    Args:
        folder: of its logs and profiles, and of its database if none is given.
        database: URL of another one.
        more: of its environment.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    password = f"admin:{secrets.token_hex(16)}"
    _profile(folder / "server.toml", PREFECT_SERVER_API_AUTH_STRING=password)
    _profile(folder / "client.toml", PREFECT_API_AUTH_STRING=password)
    environment = {
        **_outside(),
        "DO_NOT_TRACK": "1",
        "PREFECT_HOME": str(folder / "server"),
        "PREFECT_PROFILES_PATH": str(folder / "server.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        **({"PREFECT_SERVER_DATABASE_CONNECTION_URL": database} if database else {}),
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        **(more or {}),
    }
    start = ("prefect", "server", "start") if database else ("flows.server",)
    address = ("--host", "127.0.0.1", "--port", str(port))
    auth = httpx.BasicAuth(*password.split(":"))
    with (
        httpx.Client(base_url=url, auth=auth, timeout=30, transport=_Patient()) as api,
        _running(
            [sys.executable, "-m", *start, *address], environment, folder / "server.log"
        ) as server,
    ):
        until("the Prefect server", lambda: api.get("/health").is_success)
        yield Prefect(folder, url, password, api, server)


def template_for(folder: Path, pool: str, **defaults: Any) -> Path:
    """Write a pool's template with other defaults of its variables, and return the file."""
    template = json.loads((POOLS / f"{pool}.json").read_text())
    for name, value in defaults.items():
        template["variables"]["properties"][name]["default"] = value
    path = folder / f"{pool}.json"
    path.write_text(json.dumps(template))
    return path


def _profile(path: Path, **settings: str) -> None:
    path.write_text(tomli_w.dumps({"active": "test", "profiles": {"test": settings}}))
    path.chmod(0o644)  # for the container's user; the folder lets nobody else in


def _outside() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "ONBOARD_"))}


class Service:
    """A process that ends with the test."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._command, self._environment, self._log = command, environment, log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process
        return self._process.pid

    def start(self) -> None:
        """Start it."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._log.parent,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  a test may end by a signal
            )

    def kill(self) -> None:
        """Kill it and all that it started, as the end of its host does."""
        assert self._process
        family = psutil.Process(self.pid).children(recursive=True)
        self._process.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it as Ctrl-C does, and whatever it leaves."""
        assert self._process
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):  # a worker waits for its runs
            self._process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def _running(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[Service]:
    service = Service(command, environment, log)
    service.start()
    try:
        yield service
    finally:
        service.stop()
