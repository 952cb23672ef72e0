"""A model is onboarded through deployments: its collection runs in containers of the gpu pool."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
import tomli_w

from tasks import files, manifest
from tasks.collect.lease import lease
from tasks.errors import CollectError
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
PLANTED = {name: f"planted-{name}-{secrets.token_hex(12)}" for name in ("hub", "github")}
"""Tokens that nothing may show: the Hub's is kept by the server, GitHub's the control worker's."""


@dataclass(frozen=True)
class House:
    """Server, pools, workers and a workspace that control and containers share."""

    prefect: Prefect
    engine: docker.DockerClient
    workspace: Path
    gpu_locks: Path
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
        kept = stack.enter_context(database())
        prefect = stack.enter_context(prefect_server(folder, kept.url))
        shutil.copy(prefect.client_profile, folder / "secrets" / "client.toml")
        for _ in range(2):  # the second time changes nothing
            subprocess.run(
                [
                    *(sys.executable, str(ROOT / "deployments" / "bootstrap.py"), "--no-gpus"),
                    *("--home", str(folder), "--worker-image", worker_image),
                    *(f"--gpu-variable={k}={json.dumps(v)}" for k, v in variables.items()),
                    f"--control-variable=working_dir={ROOT}",
                ],
                env=prefect.environment(PYTHONPATH=str(ROOT), HF_TOKEN=PLANTED["hub"]),
                check=True,
                stdout=subprocess.DEVNULL,
            )
        results = {"PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(folder / "store" / "results")}
        stack.enter_context(prefect.worker("gpu", "docker", **results))
        stack.enter_context(
            prefect.worker(
                "control",
                "process",
                PYTHONPATH=str(ROOT),
                ONBOARD_GITHUB_TOKEN=PLANTED["github"],
                **results,
            )
        )
        house = House(
            prefect=prefect,
            engine=engine,
            workspace=workspace,
            gpu_locks=folder / "gpu-locks",
            label=f"onboard.test={folder.name}",
        )
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


@pytest.mark.timeout(600)
def test_cancelling_a_collection_stops_its_container_and_frees_the_gpu(house: House) -> None:
    path = manifest.latest(house.workspace, SLUG)
    request = {
        "manifest": str(path),
        "definitions": [DECODE],
        "config": str(house.workspace / "model" / "config.json"),
        "model_path": str(house.workspace / "model"),
        "batch_sizes": [2],
        "isl": 64,
        "osl": 8,
        "sessions_only": True,
        "server_env": {"FAKE_SGLANG_FAULT": "hang_start"},
    }
    deployment = house.prefect.deployment("collect-workloads")
    # Any parameter, and any variable of the pool, can be another for one run.
    run = house.prefect.run(
        deployment, parameters={"request": request}, job_variables={"shm_size": "128m"}
    )
    container = until("SGLang in a container", lambda: serving(house), _SECONDS)
    assert container.attrs["HostConfig"]["ShmSize"] == 128 << 20
    assert_nothing_planted(json.dumps([container.attrs, container.top(ps_args="-ef")]), house)
    # What serves the model has the Hub's token, in its environment only, and no other.
    code, environments = container.exec_run(["sh", "-c", "cat /proc/[0-9]*/environ"])
    assert PLANTED["hub"].encode() in environments, code
    assert PLANTED["github"].encode() not in environments
    with pytest.raises(CollectError, match="gave up"), one_gpu(house):
        pass
    house.prefect.cancel(run)
    house.prefect.wait(run, "Cancelled", seconds=_SECONDS)
    until("the container's removal", lambda: not house.containers())
    with one_gpu(house) as held:
        assert held == ("0",)


def assert_nothing_planted(text: str, house: House) -> None:
    """Check that no token and no password is in a text."""
    for secret in (*PLANTED.values(), house.prefect.password.partition(":")[2]):
        assert secret not in text


def one_gpu(house: House) -> AbstractContextManager[tuple[str, ...]]:
    """Lease the GPU as another user of the host does."""
    return lease(house.gpu_locks, ("0",), 1, on_wait=print, timeout=0.1)


def test_no_token_is_in_a_log_an_artifact_a_manifest_or_an_image(
    house: House, worker_image: str
) -> None:
    """After everything above: it stands last."""
    prefect = house.prefect
    for path in ("/logs/filter", "/artifacts/filter", "/flow_runs/filter", "/deployments/filter"):
        assert_nothing_planted(json.dumps(prefect.post(path, {})), house)
    for name in ("gpu", "control"):
        assert_nothing_planted(prefect.api.get(f"/work_pools/{name}").text, house)
    secrets_kept = {"client.toml", "server.toml"}
    looked_at = 0
    for path in prefect.folder.rglob("*"):
        if path.is_file() and path.name not in secrets_kept and ".git" not in path.parts:
            assert_nothing_planted(path.read_bytes().decode(errors="replace"), house)
            looked_at += 1
    assert looked_at > 100
    tail = b""
    wanted = [secret.encode() for secret in PLANTED.values()]
    for chunk in house.engine.images.get(worker_image).save():
        assert not any(secret in tail + chunk for secret in wanted)
        tail = chunk[-100:]
