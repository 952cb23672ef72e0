"""The pools' job templates: every field a variable of its own, and what a job becomes of them."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_HOME, temporary_settings
from prefect.workers.base import BaseJobConfiguration
from prefect.workers.process import ProcessJobConfiguration
from prefect_docker.worker import DockerWorkerJobConfiguration

from tests.docker.served import POOLS

KINDS: dict[str, type[BaseJobConfiguration]] = {
    "gpu": DockerWorkerJobConfiguration,
    "control": ProcessJobConfiguration,
}
_PLACEHOLDER = re.compile(r"{{ (\w+) }}")


def _template(pool: str) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((POOLS / f"{pool}.json").read_text()))


def _job(pool: str, **values: Any) -> Any:
    """Make a job's configuration as a worker does; no block is named, so no server is asked."""
    nobody = PrefectClient("http://127.0.0.1:1/api")
    make = KINDS[pool].from_template_and_values(_template(pool), values, client=nobody)
    return asyncio.run(make)


@pytest.mark.parametrize("pool", KINDS)
def test_every_variable_is_explained_typed_and_used(pool: str) -> None:
    template = _template(pool)
    variables = template["variables"]["properties"]
    for name, schema in variables.items():
        assert {"default", "description"} <= set(schema), name
        assert "title" in schema or "$ref" in json.dumps(schema), name
        assert "type" in schema or "anyOf" in schema, name
        assert schema["description"].endswith("."), name
    used = set(_PLACEHOLDER.findall(json.dumps(template["job_configuration"])))
    assert used == set(variables)


def test_every_variable_of_a_docker_pool_is_there() -> None:
    theirs = set(DockerWorkerJobConfiguration.json_template())
    ours = set(_template("gpu")["job_configuration"])
    assert ours == theirs


def test_a_job_sees_all_gpus_and_shares_the_host_s_folders() -> None:
    job = _job("gpu")
    extra = job.container_create_kwargs
    assert extra["device_requests"] == [
        {"driver": "nvidia", "count": -1, "capabilities": [["gpu"]]}
    ]
    assert (extra["init"], extra["shm_size"], extra["ipc_mode"]) == (True, "16g", "private")
    assert {"name": "memlock", "soft": -1, "hard": -1} in extra["ulimits"]
    mounts = {mount["Target"]: mount for mount in extra["mounts"]}
    assert mounts["/srv/onboard/store"]["Source"] == "/srv/onboard/store"
    assert mounts["/srv/huggingface"]["ReadOnly"] is True
    assert mounts["/run/secrets/prefect.toml"]["ReadOnly"] is True
    assert job.env["ONBOARD_COLLECT__LEASE_DIR"] in mounts
    assert (job.image_pull_policy, job.auto_remove, job.mem_limit) == ("IfNotPresent", True, None)


def test_a_deployment_or_a_run_can_set_what_it_wants() -> None:
    wanted = {
        "device_requests": [],
        "shm_size": "1g",
        "ipc_mode": "host",
        "user": "1:1",
        "cpuset_cpus": "0-3",
        "mem_limit": "10g",
        "store": "/elsewhere",
        "hf_cache_read_only": False,
        "image": "another@sha256:0",
        "image_pull_policy": "Always",
        "network_mode": "host",
        "env": {"HF_HUB_OFFLINE": None, "MORE": "1"},
    }
    job = _job("gpu", **wanted)
    extra = job.container_create_kwargs
    for name in ("device_requests", "shm_size", "ipc_mode", "user", "cpuset_cpus"):
        assert extra[name] == wanted[name]
    for name in ("mem_limit", "image", "image_pull_policy", "network_mode"):
        assert getattr(job, name) == wanted[name]
    mounts = {mount["Target"]: mount for mount in extra["mounts"]}
    assert mounts["/elsewhere"]["Source"] == "/elsewhere"
    assert mounts["/srv/huggingface"]["ReadOnly"] is False
    assert job.env["MORE"] == "1"
    assert job.env["HF_HUB_OFFLINE"] is None
    assert job.env["HF_HOME"] == "/srv/huggingface"


@pytest.mark.parametrize("pool", KINDS)
def test_what_the_worker_passes_on_has_no_password(pool: str) -> None:
    job = _job(pool)
    secret = {PREFECT_API_AUTH_STRING: "admin:planted", PREFECT_HOME: "/home/of/the/worker"}
    with temporary_settings(secret):
        job.prepare_for_flow_run(FlowRun(name="run", flow_id=uuid4()))
    assert "planted" not in json.dumps(job.model_dump(mode="json"))
    assert pool == "control" or job.env["PREFECT_HOME"] == "/tmp/prefect"
