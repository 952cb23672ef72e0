"""Runs of the gpu pool: real server, real docker worker, real containers, no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.docker.conftest import GpuPool
from tests.docker.served import until

pytestmark = pytest.mark.docker


@pytest.fixture
def folder(gpu_pool: GpuPool, request: pytest.FixtureRequest) -> Path:
    path = gpu_pool.store / request.node.name
    path.mkdir()
    path.chmod(0o777)
    return path


def _start(pool: GpuPool, folder: Path, **variables: Any) -> str:
    """Start the flow in a container and wait until it is there; return the run's id."""
    deployment = pool.prefect.deploy("hello", "hello.py:hello", "/opt/tests", "gpu")
    run = pool.prefect.run(
        deployment,
        name=folder.name,
        parameters={"folder": str(folder)},
        job_variables=variables,
    )
    pool.prefect.wait(run, "Running")
    until("the flow's file", (folder / "seen.json").exists)
    return run


def test_a_run_happens_in_a_container_as_its_template_says(gpu_pool: GpuPool, folder: Path) -> None:
    run = _start(gpu_pool, folder, shm_size="128m", **{"env.EXTRA": "1"})
    container = gpu_pool.container(folder.name)
    assert container
    host = container.attrs["HostConfig"]
    assert (host["Init"], host["ShmSize"], host["IpcMode"]) == (True, 128 << 20, "private")
    assert host["Ulimits"] == [{"Name": "nofile", "Soft": 512, "Hard": 512}]
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges"])
    mounts = {mount["Destination"]: mount["RW"] for mount in container.attrs["Mounts"]}
    assert mounts == {
        str(gpu_pool.store): True,
        "/srv/huggingface": False,
        "/srv/gpu-locks": True,
        "/home/onboard/.cache": True,
        "/run/secrets/prefect.toml": False,
        "/opt/tests": False,
    }
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["uid"] == 10001
    assert seen["environment"]["EXTRA"] == "1"
    assert seen["environment"]["PREFECT_HOME"] == "/tmp/prefect"
    assert seen["environment"]["HF_HOME"] == "/srv/huggingface"

    # The server wants a password, and none is where the engine, or a list of processes, shows it.
    history = gpu_pool.engine.images.get(gpu_pool.image).history()
    shown = json.dumps([container.attrs, container.top(), history])
    assert gpu_pool.prefect.password.partition(":")[2] not in shown

    (folder / "go").touch()
    gpu_pool.prefect.wait(run, "Completed")
    until("the run's log", lambda: "hello from a container" in gpu_pool.prefect.log(run))
    until("the container's removal", lambda: gpu_pool.container(folder.name) is None)


def test_a_killed_container_is_a_crashed_run(gpu_pool: GpuPool, folder: Path) -> None:
    run = _start(gpu_pool, folder)
    container = gpu_pool.container(folder.name)
    assert container
    container.kill()
    state = gpu_pool.prefect.wait(run, "Crashed")
    assert "137" in state["message"]
