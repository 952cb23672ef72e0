"""Several models and kernels at a time, through deployments: what waits holds up nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest

from tasks import manifest
from tests.conftest import copy_workspace
from tests.docker.database import database, why_not
from tests.docker.served import Prefect, Service, prefect_server, until
from tests.flow.test_artifacts import ASKED, FOREIGN, WAITING, kernels, write_manifest
from tests.unit.test_supplied import WHOLE

pytestmark = [
    pytest.mark.docker,
    pytest.mark.bench_extra,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 300.0


@dataclass(frozen=True)
class House:
    """A server whose pools take few runs at a time, with their workers."""

    prefect: Prefect
    engine: docker.DockerClient
    control: Service
    store: Path
    """Shared with the containers."""
    label: str

    def containers(self, **more: bool) -> list[docker.models.containers.Container]:
        """Return its containers."""
        found: list[docker.models.containers.Container] = self.engine.containers.list(
            filters={"label": self.label}, **more
        )
        return found

    def read(self, run: str) -> dict[str, Any]:
        """Return a flow run."""
        found: dict[str, Any] = self.prefect.api.get(f"/flow_runs/{run}").json()
        return found

    def span(self, run: str) -> tuple[datetime, datetime]:
        """Return when a run started and when it ended."""
        found = self.read(run)
        return datetime.fromisoformat(found["start_time"]), datetime.fromisoformat(
            found["end_time"]
        )

    def created(self, run: str) -> datetime:
        """Return when a run was created."""
        return datetime.fromisoformat(self.read(run)["created"])

    def asked(self, pool: str) -> datetime:
        """Return when a worker last asked for runs of a pool."""
        queue = self.prefect.api.get(f"/work_pools/{pool}/queues/default").json()
        return datetime.fromisoformat(queue["last_polled"])

    def tagged(self, *tags: str) -> list[dict[str, Any]]:
        """Return the flow runs that have all these tags."""
        asked = {"flow_runs": {"tags": {"all_": list(tags)}}}
        found: list[dict[str, Any]] = self.prefect.post("/flow_runs/filter", asked)
        return found

    def slots(self, pool: str) -> int:
        """Return how many of a pool's slots are taken."""
        return int(self.prefect.post(f"/work_pools/{pool}/concurrency_status", {})["active_slots"])


@pytest.fixture(scope="module")
def house(
    cloned: Path,
    engine: docker.DockerClient,
    worker_image: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("fanout")
    for name in ("store/results", "huggingface", "kernel-cache", "gpu-locks", "secrets"):
        (folder / name).mkdir(parents=True)
    copy_workspace(cloned, folder / "store" / "workspace")
    variables = {
        "user": "0",  # the folders are this test's user's
        "shm_size": "64m",
        "ulimits": [{"name": "nofile", "soft": 1024, "hard": 1024}],
        "volumes": [f"{Path(__file__).parent / 'flows'}:/opt/tests:ro"],
        "labels": {"onboard.test": folder.name},
    }
    with ExitStack() as stack:
        prefect = stack.enter_context(prefect_server(folder, stack.enter_context(database()).url))
        shutil.copy(prefect.client_profile, folder / "secrets" / "client.toml")
        subprocess.run(
            [
                *(sys.executable, str(ROOT / "deployments" / "bootstrap.py"), "--no-gpus"),
                *("--home", str(folder), "--worker-image", worker_image),
                *("--gpu-runs", "2", "--control-runs", "2"),
                *(f"--gpu-variable={k}={json.dumps(v)}" for k, v in variables.items()),
                f"--control-variable=working_dir={ROOT}",
            ],
            env=prefect.environment(PYTHONPATH=str(ROOT)),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        results = {"PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(folder / "store" / "results")}
        stack.enter_context(prefect.worker("gpu", "docker", **results))
        control = prefect.worker("control", "process", PYTHONPATH=str(ROOT), **results)
        made = House(
            prefect=prefect,
            engine=engine,
            control=stack.enter_context(control),
            store=folder / "store",
            label=f"onboard.test={folder.name}",
        )
        try:
            yield made
        finally:
            for container in made.containers(all=True):
                with suppress(docker.errors.APIError):  # it is being removed
                    container.remove(force=True)


@pytest.mark.timeout(900)
def test_what_waits_blocks_nothing_and_models_leave_room_for_their_kernels(house: House) -> None:
    """Two models, or one and a suspended kernel, would fill the two slots: kernels would starve."""
    prefect, workspace = house.prefect, house.store / "workspace"
    asked, waiting, _, foreign = kernels()
    wanted = {"first": [foreign, waiting, asked], "second": [asked]}
    paths = {slug: write_manifest(workspace, slug, entries) for slug, entries in wanted.items()}
    deployment = prefect.deployment("onboard-model")
    request = {"phases": [2, 3], "workspace": str(workspace)}
    models = {
        slug: prefect.run(
            deployment, parameters={"request": {**request, "model_name": slug}}, name=slug
        )
        for slug in wanted
    }
    ends = {
        slug: prefect.wait(run, "Completed", seconds=_SECONDS)["message"]
        for slug, run in models.items()
    }
    assert ends == {
        "first": "1 defined, 1 needs_reference, 1 waiting",
        "second": "1 defined",
    }
    before, after = sorted(house.span(run) for run in models.values())
    assert before[1] <= after[0]

    # A run for every kernel. The one that waits for somebody is seen to, and costs nothing.
    children = {run["name"].partition("/")[2]: run for run in house.tagged("model:first")}
    assert {name: run["state_name"] for name, run in children.items()} == {
        ASKED: "Defined",
        WAITING: "Waiting",
        FOREIGN: "Suspended",
    }
    until("all slots", lambda: house.slots("control") == 0)
    worker = psutil.Process(house.control.pid)
    until("the end of all processes", lambda: not worker.children(recursive=True))

    # Somebody fills in its form.
    (run,) = (found["id"] for found in house.tagged("model:first", f"kernel:{FOREIGN}"))
    resume = f"/flow_runs/{run}/resume"
    assert prefect.post(resume, {"run_input": {}})["status"] == "REJECT"
    assert prefect.state(run)["name"] == "Suspended"
    assert prefect.post(resume, {"run_input": {"reference": WHOLE}})["status"] == "ACCEPT"
    prefect.wait(run, "Defined", seconds=_SECONDS)
    assert manifest.load(paths["first"]).kernel(FOREIGN).phase2_method == "supplied"
    assert len(house.tagged("model:first")) == 3


@pytest.mark.timeout(600)
def test_a_pool_takes_no_more_runs_than_its_limit_and_a_gpu_one_session(house: House) -> None:
    prefect = house.prefect
    deployment = prefect.deploy("hold", "hold.py:hold", "/opt/tests", "gpu")
    folders = [house.store / name for name in ("first", "second", "third")]

    def start(folder: Path) -> str:
        folder.mkdir()
        return prefect.run(deployment, name=folder.name, parameters={"folder": str(folder)})

    first = start(folders[0])
    until("the first one's GPU", (folders[0] / "held").exists)
    # There is a slot for the second one, and no GPU.
    second = start(folders[1])
    told = "waiting for 1 of GPUs 0: GPU 0 is held by session first, pid "
    until("the second one's word", lambda: told in prefect.log(second))
    assert prefect.state(second)["name"] == "Running"
    assert not (folders[1] / "held").exists()
    # There is no slot for the third one, for which the worker has asked in vain.
    third = start(folders[2])
    until("the worker's asking", lambda: house.asked("gpu") > house.created(third))
    assert prefect.state(third)["type"] == "SCHEDULED"
    assert sorted(c.name for c in house.containers()) == ["first", "second"]
    assert house.slots("gpu") == 2

    (folders[0] / "go").touch()
    prefect.wait(first, "Completed", seconds=_SECONDS)
    until("the second one's GPU", (folders[1] / "held").exists)
    assert not (folders[2] / "held").exists()
    for folder in folders[1:]:
        (folder / "go").touch()
    for run in (second, third):
        prefect.wait(run, "Completed", seconds=_SECONDS)
    assert house.span(third)[0] >= house.span(first)[1]
