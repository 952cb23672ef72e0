"""Everything that onboards a model on this machine: server, pools, workers, a shared folder."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import docker
import tomli_w

from tasks import files
from tests.conftest import DATA, copy_workspace, listening
from tests.docker.database import Database, database
from tests.docker.served import Prefect, Service, prefect_server, redis

ROOT = Path(__file__).resolve().parents[2]
SLUG = "qwen3-30b-a3b"
DECODE = "gqa_paged_decode_h32_kv4_d128_ps1"
RAGGED = "gqa_ragged_prefill_causal_h32_kv4_d128"
NORM = "fused_add_rmsnorm_h2048"
SECONDS = 300.0
_LABEL = "onboard.test"
PLANTED = {name: f"planted-{name}-{secrets.token_hex(12)}" for name in ("hub", "github")}
"""Tokens that nothing may show: the Hub's is kept by the server, GitHub's the control worker's."""


@dataclass(frozen=True)
class House:
    """Server, pools, workers and a workspace that control and containers share."""

    prefect: Prefect
    database: Database
    workers: dict[str, Service]
    """By pool."""
    engine: docker.DockerClient
    store: Path
    """Shared with the containers."""
    workspace: Path
    gpu_locks: Path
    label: str
    """Of its containers: others may be at work beside it."""
    told: list[str]
    """What came to the operator's webhook."""
    bootstrap: Callable[[], None]
    """Does again what `make deploy` did."""

    def containers(self, **more: bool) -> list[docker.models.containers.Container]:
        """Return its containers."""
        found: list[docker.models.containers.Container] = self.engine.containers.list(
            filters={"label": self.label}, ignore_removed=True, **more
        )
        return found

    def serving(self) -> docker.models.containers.Container | None:
        """Return the container in which SGLang has been launched, while there is one."""
        servers = ("sglang.launch_server", "tasks.collect.engine")
        for container in self.containers():
            try:
                commands = [" ".join(row) for row in container.top()["Processes"]]
            except docker.errors.APIError:
                continue  # It has ended since it was listed.
            if any(server in command for command in commands for server in servers):
                return container
        return None

    def onboard(self, **more: Any) -> str:
        """Trigger `onboard-model` through the API; return the run's id."""
        request = {
            "model_name": SLUG,
            "hf_repo_id": "Qwen/Qwen3-30B-A3B",
            "config": str(self.workspace / "model" / "config.json"),
            "workspace": str(self.workspace),
        }
        return self.prefect.run(
            self.prefect.deployment("onboard-model"), parameters={"request": {**request, **more}}
        )

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """Return the runs of a flow, the first one first."""
        asked = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_ASC"}
        found: list[dict[str, Any]] = self.prefect.post("/flow_runs/filter", asked)
        return found

    def settings(self, **options: Any) -> None:
        """Write the workspace's settings, with these of the collection."""
        traffic = {"batch_sizes": [1, 3], "isl": 256, "osl": 8, "rounds": 1}
        served = {"model_path": str(self.workspace / "model"), **traffic, **options}
        collect = {"gpus": ["0"], "incomplete_calls": True, "crashes": 1, "options": served}
        given = tomllib.loads((self.workspace / "onboard.toml").read_text())
        text = tomli_w.dumps({**given, "collect": collect})
        files.write_text(self.workspace / "onboard.toml", text)


@contextmanager
def _webhook(told: list[str]) -> Iterator[str]:
    """Take what is posted to a URL, and yield it."""

    class Taken(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with listening(Taken) as url:
        yield f"{url}/told"


@contextmanager
def open_house(
    folder: Path,
    cloned: Path,
    engine: docker.DockerClient,
    worker_image: str,
    options: Sequence[str] = (),
) -> Iterator[House]:
    """Have it while the block runs.

    Args:
        folder: of its own.
        cloned: a workspace to copy.
        engine: the Docker engine.
        worker_image: of the gpu pool's containers.
        options: more of `bootstrap.py`'s.
    """
    for name in ("store/results", "huggingface", "kernel-cache", "gpu-locks", "secrets"):
        (folder / name).mkdir(parents=True)
    workspace = copy_workspace(cloned, folder / "store" / "workspace")
    config = json.loads((DATA / "configs" / "Qwen--Qwen3-30B-A3B.json").read_text())
    files.write_json(workspace / "model" / "config.json", {**config, "num_hidden_layers": 2})
    label = f"{folder.name}-{secrets.token_hex(6)}"  # other folders have the same name
    variables = {
        "user": "0",  # the folders are this test's user's
        "shm_size": "256m",
        "ulimits": [{"name": "nofile", "soft": 1024, "hard": 1024}],
        "volumes": [
            f"{ROOT / 'tests' / 'fakes'}:/opt/fakes:ro",
            f"{ROOT / 'tests' / 'docker' / 'flows'}:/opt/tests:ro",
        ],
        "env": {"PYTHONPATH": "/opt/app:/opt/fakes"},
        "labels": {_LABEL: label},
    }
    with ExitStack() as stack:
        kept = stack.enter_context(database())
        broker = stack.enter_context(redis(folder))
        prefect = stack.enter_context(prefect_server(folder, kept.url, broker))
        told: list[str] = []
        outside = {
            "HF_TOKEN": PLANTED["hub"],
            "ONBOARD_NOTIFY_URL": stack.enter_context(_webhook(told)),
        }
        shutil.copy(prefect.client_profile, folder / "secrets" / "client.toml")
        command = [
            *(sys.executable, str(ROOT / "deployments" / "bootstrap.py"), "--no-gpus"),
            *("--home", str(folder), "--worker-image", worker_image),
            *(f"--gpu-variable={k}={json.dumps(v)}" for k, v in variables.items()),
            f"--control-variable=working_dir={ROOT}",
            *options,
        ]
        environment = prefect.environment(PYTHONPATH=str(ROOT), **outside)

        def bootstrap() -> None:
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

        bootstrap()
        results = {"PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(folder / "store" / "results")}
        control = {
            "PYTHONPATH": str(ROOT),
            "ONBOARD_GITHUB_TOKEN": PLANTED["github"],
            "ONBOARD_PUBLISH__TO": "outbox",
        }
        workers = {
            "gpu": stack.enter_context(prefect.worker("gpu", "docker", **results)),
            "control": stack.enter_context(
                prefect.worker("control", "process", **control, **results)
            ),
        }
        made = House(
            prefect=prefect,
            database=kept,
            workers=workers,
            engine=engine,
            store=folder / "store",
            workspace=workspace,
            gpu_locks=folder / "gpu-locks",
            label=f"{_LABEL}={label}",
            told=told,
            bootstrap=bootstrap,
        )
        try:
            yield made
        finally:
            for container in made.containers(all=True):
                with suppress(docker.errors.APIError):  # it is being removed
                    container.remove(force=True)
