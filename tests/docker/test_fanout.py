"""Several models and kernels at a time, through deployments: what waits holds up nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest

from tasks import manifest
from tests.docker.database import why_not
from tests.docker.house import House, open_house
from tests.docker.served import until
from tests.flow.test_artifacts import ASKED, FOREIGN, WAITING, kernels, write_manifest
from tests.unit.test_supplied import WHOLE

pytestmark = [
    pytest.mark.docker,
    pytest.mark.bench_extra,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

_SECONDS = 300.0


@dataclass(frozen=True)
class Small:
    """A house whose pools take two runs at a time."""

    house: House

    def read(self, run: str) -> dict[str, Any]:
        """Return a flow run."""
        found: dict[str, Any] = self.house.prefect.api.get(f"/flow_runs/{run}").json()
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
        queue = self.house.prefect.api.get(f"/work_pools/{pool}/queues/default").json()
        return datetime.fromisoformat(queue["last_polled"])

    def tagged(self, *tags: str) -> list[dict[str, Any]]:
        """Return the flow runs that have all these tags."""
        asked = {"flow_runs": {"tags": {"all_": list(tags)}}}
        found: list[dict[str, Any]] = self.house.prefect.post("/flow_runs/filter", asked)
        return found

    def slots(self, pool: str) -> int:
        """Return how many of a pool's slots are taken."""
        return int(
            self.house.prefect.post(f"/work_pools/{pool}/concurrency_status", {})["active_slots"]
        )


@pytest.fixture(scope="module")
def small(
    cloned: Path,
    engine: docker.DockerClient,
    worker_image: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Small]:
    folder = tmp_path_factory.mktemp("small")
    limits = ("--gpu-runs", "2", "--control-runs", "2")
    with open_house(folder, cloned, engine, worker_image, limits) as made:
        yield Small(made)


@pytest.mark.timeout(900)
def test_what_waits_blocks_nothing_and_models_leave_room_for_their_kernels(small: Small) -> None:
    """Two models, or one and a suspended kernel, would fill the two slots: kernels would starve."""
    prefect, workspace = small.house.prefect, small.house.workspace
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
    before, after = sorted(small.span(run) for run in models.values())
    assert before[1] <= after[0]

    # A run for every kernel. The one that waits for somebody is seen to, and costs nothing.
    runs = small.tagged("model:first")
    children = {run["name"].partition("/")[2]: run for run in runs if "/" in run["name"]}
    assert {name: run["state_name"] for name, run in children.items()} == {
        ASKED: "Defined",
        WAITING: "Waiting",
        FOREIGN: "Suspended",
    }
    until("all slots", lambda: small.slots("control") == 0)
    worker = psutil.Process(small.house.workers["control"].pid)
    until("the end of all processes", lambda: not worker.children(recursive=True))

    # Somebody fills in its form.
    (run,) = (found["id"] for found in small.tagged("model:first", f"kernel:{FOREIGN}"))
    resume = f"/flow_runs/{run}/resume"
    assert prefect.post(resume, {"run_input": {}})["status"] == "REJECT"
    assert prefect.state(run)["name"] == "Suspended"
    assert prefect.post(resume, {"run_input": {"reference": WHOLE}})["status"] == "ACCEPT"
    prefect.wait(run, "Defined", seconds=_SECONDS)
    assert manifest.load(paths["first"]).kernel(FOREIGN).phase2_method == "supplied"
    assert len(small.tagged("model:first")) == len(runs)


@pytest.mark.timeout(600)
def test_a_pool_takes_no_more_runs_than_its_limit_and_a_gpu_one_session(small: Small) -> None:
    prefect = small.house.prefect
    deployment = prefect.deploy("hold", "hold.py:hold", "/opt/tests", "gpu")
    folders = [small.house.store / name for name in ("first", "second", "third")]

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
    until("the worker's asking", lambda: small.asked("gpu") > small.created(third))
    assert prefect.state(third)["type"] == "SCHEDULED"
    assert sorted(c.name for c in small.house.containers()) == ["first", "second"]
    assert small.slots("gpu") == 2

    (folders[0] / "go").touch()
    prefect.wait(first, "Completed", seconds=_SECONDS)
    until("the second one's GPU", (folders[1] / "held").exists)
    assert not (folders[2] / "held").exists()
    for folder in folders[1:]:
        (folder / "go").touch()
    for run in (second, third):
        prefect.wait(run, "Completed", seconds=_SECONDS)
    assert small.span(third)[0] >= small.span(first)[1]
