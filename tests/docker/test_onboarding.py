"""A model is onboarded through deployments: its collection runs in containers of the gpu pool."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
import tomli_w

from tasks import files, manifest
from tests.conftest import DATA, copy_workspace
from tests.docker.database import database, why_not
from tests.docker.served import Prefect, prefect_server, until

pytestmark = [
    pytest.mark.docker,
    pytest.mark.bench_extra,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

ROOT = Path(__file__).resolve().parents[2]
SLUG = "qwen3-30b-a3b"
DECODE = "gqa_paged_decode_h32_kv4_d128_ps1"
RAGGED = "gqa_ragged_prefill_causal_h32_kv4_d128"
NORM = "fused_add_rmsnorm_h2048"
_SECONDS = 300.0


@dataclass(frozen=True)
class House:
    """Server, pools, workers and a workspace that control and containers share."""

    prefect: Prefect
    engine: docker.DockerClient
    workspace: Path
    label: str
    """Of its containers: others may be at work beside it."""

    def containers(self, **more: bool) -> list[docker.models.containers.Container]:
        """Return its containers."""
        found: list[docker.models.containers.Container] = self.engine.containers.list(
            filters={"label": self.label}, **more
        )
        return found

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
        traffic = {"batch_sizes": [1, 3], "isl": 96, "osl": 8, "rounds": 1}
        served = {"model_path": str(self.workspace / "model"), **traffic, **options}
        collect = {"gpus": ["0"], "incomplete_calls": True, "crashes": 1, "options": served}
        given = tomllib.loads((self.workspace / "onboard.toml").read_text())
        text = tomli_w.dumps({"remotes": given["remotes"], "collect": collect})
        files.write_text(self.workspace / "onboard.toml", text)


@pytest.fixture(scope="module")
def house(
    cloned: Path,
    engine: docker.DockerClient,
    worker_image: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    for name in ("store/results", "huggingface", "kernel-cache", "gpu-locks", "secrets"):
        (folder / name).mkdir(parents=True)
    workspace = copy_workspace(cloned, folder / "store" / "workspace")
    config = json.loads((DATA / "configs" / "Qwen--Qwen3-30B-A3B.json").read_text())
    files.write_json(workspace / "model" / "config.json", {**config, "num_hidden_layers": 2})
    variables = {
        "user": "0",  # the folders are this test's user's
        "shm_size": "256m",
        "ulimits": [{"name": "nofile", "soft": 1024, "hard": 1024}],
        "volumes": [f"{ROOT / 'tests' / 'fakes'}:/opt/fakes:ro"],
        "env": {"PYTHONPATH": "/opt/app:/opt/fakes"},
        "labels": {"onboard.test": folder.name},
    }
    with ExitStack() as stack:
        store = stack.enter_context(database())
        prefect = stack.enter_context(prefect_server(folder, store.url))
        shutil.copy(prefect.client_profile, folder / "secrets" / "client.toml")
        for _ in range(2):  # the second time changes nothing
            subprocess.run(
                [
                    *(sys.executable, str(ROOT / "deployments" / "bootstrap.py"), "--no-gpus"),
                    *("--home", str(folder), "--worker-image", worker_image),
                    *(f"--gpu-variable={k}={json.dumps(v)}" for k, v in variables.items()),
                    f"--control-variable=working_dir={ROOT}",
                ],
                env=prefect.environment(PYTHONPATH=str(ROOT)),
                check=True,
                stdout=subprocess.DEVNULL,
            )
        results = {"PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(folder / "store" / "results")}
        stack.enter_context(prefect.worker("gpu", "docker", **results))
        stack.enter_context(prefect.worker("control", "process", PYTHONPATH=str(ROOT), **results))
        house = House(prefect, engine, workspace, f"onboard.test={folder.name}")
        try:
            yield house
        finally:
            for container in house.containers(all=True):
                with suppress(docker.errors.APIError):  # it is being removed
                    container.remove(force=True)


def serving(house: House) -> docker.models.containers.Container | None:
    """Return the container in which SGLang has been launched, while there is one."""
    for container in house.containers():
        commands = [" ".join(row) for row in container.top()["Processes"]]
        servers = ("sglang.launch_server", "tasks.collect.engine")
        if any(server in command for command in commands for server in servers):
            return container
    return None


@pytest.mark.timeout(1200)
def test_collection_crashes_starts_again_fails_and_is_retried(house: House) -> None:
    """What a bad host and an operator do to a run, up to what it publishes."""
    prefect, once = house.prefect, house.workspace / "once"
    house.settings(server_env={"FAKE_SGLANG_FAULT": "hang_start", "FAKE_SGLANG_ONCE": str(once)})
    parent = house.onboard()
    until("the collection", lambda: house.runs("collect-workloads"), _SECONDS)
    (collection,) = house.runs("collect-workloads")
    run = collection["id"]
    assert set(collection["tags"]) == {"onboard", "gpu", f"model:{SLUG}"}

    # Its container is killed: it crashes, is started again, and no third time.
    for _ in range(2):
        container = until("SGLang in a container", lambda: serving(house), _SECONDS)
        container.kill()
        until("its end", lambda killed=container: killed not in house.containers())
    prefect.wait(run, "Failed", seconds=_SECONDS, restarts=True)
    assert "has crashed 2 times" in prefect.state(run)["message"]
    states = prefect.history(run)
    assert (states.count("Crashed"), states.count("AwaitingRetry")) == (2, 2)

    # Only what it was for fails with it.
    prefect.wait(parent, "Failed", seconds=_SECONDS)
    kernels = {item["name"].partition("/")[2]: item for item in house.runs("onboard-kernel")}
    ends = {name: item["state_name"] for name, item in kernels.items()}
    waiting = "top_k_sampling_from_probs_v151936"
    assert ends == {DECODE: "Failed", RAGGED: "Failed", NORM: "Failed", waiting: "Waiting"}

    # Whatever ailed the host is gone. Retrying the collection repeats the collection...
    once.touch()
    prefect.retry(run)
    prefect.wait(run, "Completed", seconds=_SECONDS)
    assert len(house.runs("collect-workloads")) == 1
    # ... and retrying the parent what came after it.
    prefect.retry(parent)
    state = prefect.wait(parent, "Completed", seconds=_SECONDS)
    assert state["message"] == "14 existing, 3 published, 1 waiting"
    assert len(house.runs("collect-workloads")) == 1
    assert {item["id"] for item in house.runs("onboard-kernel")} == {
        item["id"] for item in kernels.values()
    }
    path = manifest.latest(house.workspace, SLUG)
    assert path is not None
    found = manifest.load(path)
    for name in (DECODE, RAGGED, NORM):
        entry = found.kernel(name)
        assert entry.workload_entries
        # It was looked for in a container, by a run of its own.
        assert entry.baseline_status == "not evaluated (no CUDA device on this host)"
    evaluated = {item["name"] for item in house.runs("evaluate-baseline")}
    assert evaluated == {f"evaluate {name}" for name in (DECODE, RAGGED, NORM)}
    until("the containers' removal", lambda: not house.containers())
