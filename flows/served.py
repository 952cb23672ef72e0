"""Serve the flows as deployments from one process: started, scheduled and retried in the UI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from prefect import Flow, serve
from prefect.deployments.runner import RunnerDeployment
from prefect.types.entrypoint import EntrypointType

from flows.collect import collect_workloads
from flows.gpu import evaluate_workloads
from flows.kernel import onboard_kernel
from flows.onboard import onboard_model

LIMIT = 8
"""Flow runs at a time. Half of them may be models, which wait for their kernels' runs."""


def _deployment(flow: Flow[Any, Any], limit: int | None = None) -> RunnerDeployment:
    """Return a flow's deployment, of the flow's own name, found by import and not by file."""
    made = flow.to_deployment(
        name=flow.name,
        tags=["onboard"],
        concurrency_limit=limit,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return cast("RunnerDeployment", made)  # a coroutine only where there is an event loop


def serve_flows(workspace: Path) -> None:
    """Serve until interrupted; runs that name no workspace use `workspace`."""
    os.environ["ONBOARD_WORKSPACE"] = str(workspace)
    serve(
        _deployment(onboard_model, LIMIT // 2),
        _deployment(onboard_kernel),
        _deployment(collect_workloads),
        _deployment(evaluate_workloads),
        limit=LIMIT,
        pause_on_shutdown=False,
        print_starting_message=False,
    )
