"""`onboard server`: a run triggered through the API as the UI does, and the retry of one kernel."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks import manifest
from tests.docker.served import until
from tests.e2e.conftest import CONFIG

pytestmark = [pytest.mark.e2e, pytest.mark.bench_extra]

NORM = "fused_add_rmsnorm_h2048"
_DEADLINE_SECONDS = 200


@pytest.fixture
def api(workspace: Path) -> Iterator[httpx.Client]:
    """A client of a server that serves the workspace's flows."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "ONBOARD_"))
    }
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [
            *(sys.executable, "-c", "from flows.cli import main; main()", "server"),
            *("--workspace", str(workspace), "--port", str(port)),
        ],
        cwd=workspace,
        env={**environment, "PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        stdout=(workspace / "served.log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=10) as client:
                yield client
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(timeout=60)
            finally:
                if server.poll() is None:
                    os.killpg(server.pid, signal.SIGKILL)


def _deployment(api: httpx.Client, name: str) -> dict[str, Any]:
    def ask() -> Any:
        found = api.get(f"/deployments/name/{name}/{name}")
        return found.json() if found.status_code == 200 else None

    return until(f"deployment {name}", ask, _DEADLINE_SECONDS)


def _final(api: httpx.Client, run_id: str, count: int = 1) -> dict[str, Any]:
    def ask() -> Any:
        run = api.get(f"/flow_runs/{run_id}").json()
        final = run["state"]["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        return run if final and run["run_count"] >= count else None

    return until(f"flow run {run_id}", ask, _DEADLINE_SECONDS)


def test_trigger_fan_out_and_retry_of_one_kernel(
    api: httpx.Client, workspace: Path, dumps: Path, tmp_path: Path
) -> None:
    recorded = tmp_path / "recorded"
    shutil.copytree(dumps / "q330b_a", recorded / "q330b_a", copy_function=os.link)
    deployment = _deployment(api, "onboard-model")
    _deployment(api, "onboard-kernel")
    schema = deployment["parameter_openapi_schema"]
    fields = schema["definitions"]["OnboardRequest"]["properties"]
    assert fields["model_name"]["description"].startswith("Slug of the model")

    asked = {
        "model_name": "qwen3-30b-a3b",
        "hf_repo_id": "Qwen/Qwen3-30B-A3B",
        "config": str(CONFIG),
        "dumps": str(recorded),
    }
    created = api.post(
        f"/deployments/{deployment['id']}/create_flow_run",
        json={"parameters": {"request": asked}},
    )
    created.raise_for_status()
    parent = _final(api, created.json()["id"])
    assert parent["name"] == "qwen3-30b-a3b"
    assert parent["state"]["message"] == "14 existing, 1 failed, 2 published, 1 waiting"

    children = api.post(
        "/flow_runs/filter",
        json={"flow_runs": {"tags": {"all_": ["model:qwen3-30b-a3b"]}}},
    ).json()
    named = {run["name"].partition("/")[2]: run for run in children if "/" in run["name"]}
    assert {name: run["state"]["name"] for name, run in named.items()} == {
        "gqa_paged_decode_h32_kv4_d128_ps1": "Published",
        "gqa_ragged_prefill_causal_h32_kv4_d128": "Published",
        "top_k_sampling_from_probs_v151936": "Waiting",
        NORM: "Failed",
    }

    # The recording is completed; the button on the failed run's page does this:
    shutil.copytree(dumps / "q330b_c", recorded / "q330b_c", copy_function=os.link)
    failed = named[NORM]["id"]
    state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    api.post(f"/flow_runs/{failed}/set_state", json={"state": state, "force": True})
    retried = _final(api, failed, count=2)
    assert (retried["state"]["name"], retried["run_count"]) == ("Published", 2)
    path = manifest.latest(workspace, "qwen3-30b-a3b")
    assert path is not None
    run = manifest.load(path)
    assert run.state(run.kernel(NORM)) == "published"
