"""A model is onboarded through deployments: its collection runs in containers of the gpu pool."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import Any

import pytest

from tasks import manifest
from tasks.collect.lease import lease
from tasks.errors import CollectError
from tests.docker.database import why_not
from tests.docker.house import DECODE, NORM, PLANTED, RAGGED, SECONDS, SLUG, House
from tests.docker.served import until

pytestmark = [
    pytest.mark.docker,
    pytest.mark.bench_extra,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


def deployed(house: House) -> dict[str, Any]:
    """What `make deploy` makes, without the times at which it was touched."""
    prefect = house.prefect
    pools = {name: prefect.api.get(f"/work_pools/{name}").json() for name in ("gpu", "control")}
    deployments = prefect.post("/deployments/filter", {})
    automations = prefect.post("/automations/filter", {})
    return {
        "pools": {name: (pool["id"], pool["base_job_template"]) for name, pool in pools.items()},
        "deployments": {made["name"]: made["id"] for made in deployments},
        "automations": {made["name"]: (made["id"], made["actions"]) for made in automations},
    }


def test_deploying_again_changes_nothing(house: House) -> None:
    before = deployed(house)
    house.bootstrap()
    assert deployed(house) == before
    assert len(before["deployments"]) == 6
    assert len(before["automations"]) == 3


@pytest.mark.timeout(1200)
def test_collection_crashes_starts_again_fails_and_is_retried(house: House) -> None:
    """What a bad host and an operator do to a run, up to what it publishes."""
    prefect, once = house.prefect, house.workspace / "once"
    house.settings(server_env={"FAKE_SGLANG_FAULT": "hang_start", "FAKE_SGLANG_ONCE": str(once)})
    parent = house.onboard()
    until("the collection", lambda: house.runs("collect-workloads"), SECONDS)
    (collection,) = house.runs("collect-workloads")
    run = collection["id"]
    assert set(collection["tags"]) == {"onboard", "gpu", f"model:{SLUG}"}

    # Its container is killed: it crashes, is started again, and no third time.
    for _ in range(2):
        container = until("SGLang in a container", house.serving, SECONDS)
        container.kill()
        until("its end", lambda killed=container: killed not in house.containers())
    prefect.wait(run, "Failed", seconds=SECONDS, restarts=True)
    assert "has crashed 2 times" in prefect.state(run)["message"]
    states = prefect.history(run)
    assert (states.count("Crashed"), states.count("AwaitingRetry")) == (2, 2)

    until("the operator's notification", lambda: house.told)
    (told,) = house.told
    assert "has crashed 2 times" in told
    assert run in told

    # Only what it was for fails with it.
    prefect.wait(parent, "Failed", seconds=SECONDS)
    kernels = {item["name"].partition("/")[2]: item for item in house.runs("onboard-kernel")}
    ends = {name: item["state_name"] for name, item in kernels.items()}
    waiting = "top_k_sampling_from_probs_v151936"
    assert ends == {DECODE: "Failed", RAGGED: "Failed", NORM: "Failed", waiting: "Waiting"}

    # Whatever ailed the host is gone. Retrying the collection repeats the collection...
    once.touch()
    prefect.retry(run)
    prefect.wait(run, "Completed", seconds=SECONDS)
    assert len(house.runs("collect-workloads")) == 1
    # ... and retrying the parent what came after it.
    prefect.retry(parent)
    state = prefect.wait(parent, "Completed", seconds=SECONDS)
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
        "isl": 256,
        "osl": 8,
        "sessions_only": True,
        "server_env": {"FAKE_SGLANG_FAULT": "hang_start"},
    }
    deployment = house.prefect.deployment("collect-workloads")
    # Any parameter, and any variable of the pool, can be another for one run.
    run = house.prefect.run(
        deployment, parameters={"request": request}, job_variables={"shm_size": "128m"}
    )
    container = until("SGLang in a container", house.serving, SECONDS)
    assert container.attrs["HostConfig"]["ShmSize"] == 128 << 20
    assert_nothing_planted(json.dumps([container.attrs, container.top(ps_args="-ef")]), house)
    # What serves the model has the Hub's token, in its environment only, and no other.
    code, environments = container.exec_run(["sh", "-c", "cat /proc/[0-9]*/environ"])
    assert PLANTED["hub"].encode() in environments, code
    assert PLANTED["github"].encode() not in environments
    with pytest.raises(CollectError, match="gave up"), one_gpu(house):
        pass
    house.prefect.cancel(run)
    house.prefect.wait(run, "Cancelled", seconds=SECONDS)
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
