"""Starting a kernel's run: the one place that knows whether the flows are deployed.

Embedded, the child flow is called inline. Served, a run of its deployment is created, which has its
own page, retry button and state in the UI, and is waited for until it is final or paused.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

from prefect import get_client, tags, task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.runtime import deployment, flow_run
from prefect.states import AwaitingRetry

from flows.kernel import onboard_kernel
from tasks.request import OnboardRequest

KERNEL_DEPLOYMENT = "onboard-kernel/onboard-kernel"
_POLL_SECONDS = 2


@task(
    name="start-kernel",
    task_run_name="{name}",
    description="Run one kernel's flow; its failure is recorded and stops no other kernel.",
)
def start_kernel(request: OnboardRequest, path: Path, name: str) -> State[Any]:
    """Run `onboard-kernel`; this task ends in the state that run ended in."""
    if deployment.id:
        return _run_deployed(request, path, name)
    with tags(*_tags(request, name)):
        return onboard_kernel(request, path, name, return_state=True)


def _tags(request: OnboardRequest, name: str) -> list[str]:
    return [f"model:{request.model_name}", f"kernel:{name}"]


def _run_deployed(request: OnboardRequest, path: Path, name: str) -> State[Any]:
    """Run the child's deployment; a parent's retry finds the same child and retries it if failed.

    Not a subflow of ours: Prefect cannot suspend those.
    """
    created = run_deployment(
        KERNEL_DEPLOYMENT,
        parameters={
            "request": request.model_dump(mode="json"),
            "path": str(path),
            "name": name,
        },
        tags=_tags(request, name),
        idempotency_key=f"{flow_run.id}:{name}",
        as_subflow=False,
        timeout=0,
    )
    child = cast("FlowRun", created)  # a coroutine only where there is an event loop
    with get_client(sync_client=True) as client:
        if child.state and child.state.type in {StateType.FAILED, StateType.CRASHED}:
            client.set_flow_run_state(child.id, AwaitingRetry(), force=True)
        return _wait(client, child)


def _wait(client: SyncPrefectClient, child: FlowRun) -> State[Any]:
    while True:
        state = client.read_flow_run(child.id).state
        if state and (state.is_final() or state.is_paused()):
            return state
        time.sleep(_POLL_SECONDS)
