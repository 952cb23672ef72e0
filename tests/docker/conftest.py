"""A server, the gpu pool and a docker worker for all tests with containers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest

from tests.docker import images
from tests.docker.house import House, open_house
from tests.docker.served import Prefect, prefect_server, template_for

_REASON = images.why_not()
_LABEL = "onboard.test"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a Docker engine."""
    for item in items:
        if _REASON and item.get_closest_marker("docker"):
            item.add_marker(pytest.mark.skip(reason=_REASON))


@dataclass(frozen=True)
class GpuPool:
    """The gpu pool on this machine, which has no GPU, with a worker at work."""

    prefect: Prefect
    engine: docker.DockerClient
    image: str
    store: Path

    def container(self, name: str) -> docker.models.containers.Container | None:
        """Return a run's container, while there is one."""
        found = self.engine.containers.list(filters={"name": f"^/{name}$"}, ignore_removed=True)
        return found[0] if found else None


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """The Docker engine."""
    with closing(docker.from_env(timeout=600)) as client:
        yield client


@pytest.fixture(scope="session")
def worker_image(engine: docker.DockerClient) -> str:
    """The worker image, from `docker/worker.Dockerfile`."""
    return images.make(engine, images.WORKER)


@pytest.fixture(scope="module")
def house(
    cloned: Path,
    engine: docker.DockerClient,
    worker_image: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    """A house for the tests of one file."""
    with open_house(tmp_path_factory.mktemp("house"), cloned, engine, worker_image) as made:
        yield made


@pytest.fixture(scope="session")
def gpu_pool(
    engine: docker.DockerClient, worker_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GpuPool]:
    """The gpu pool from its own template, for a host without a GPU."""
    folder = tmp_path_factory.mktemp(f"gpu-pool-{os.getpid()}-")
    host = {name: folder / name for name in ("store", "hf_cache", "kernel_cache", "gpu_locks")}
    for path in host.values():
        path.mkdir()
        path.chmod(0o777)  # the image's user is nobody here
    with prefect_server(folder) as prefect:
        template = template_for(
            folder,
            "gpu",
            image=worker_image,
            device_requests=[],
            labels={_LABEL: folder.name},
            shm_size="64m",
            # Only lower limits than one's own can be set without CAP_SYS_RESOURCE.
            ulimits=[{"name": "nofile", "soft": 512, "hard": 512}],
            client_profile=str(prefect.client_profile),
            volumes=[f"{Path(__file__).parent / 'flows'}:/opt/tests:ro"],
            **{name: str(path) for name, path in host.items()},
        )
        prefect.create_pool("gpu", "docker", template)
        try:
            with prefect.worker("gpu", "docker"):
                yield GpuPool(prefect, engine, worker_image, host["store"])
        finally:
            label = f"{_LABEL}={folder.name}"
            for container in engine.containers.list(
                all=True, filters={"label": label}, ignore_removed=True
            ):
                container.remove(force=True)
