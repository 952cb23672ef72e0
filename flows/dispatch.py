"""Starting a child run: the one place that knows whether the flows are deployed.

Embedded, a child flow is called inline. Served, a run of its deployment is created, which has its
own page, retry button and state in the UI, and is waited for until it is final or paused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
from prefect import get_client, get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.runtime import deployment, flow_run
from prefect.states import AwaitingRetry
from prefect.utilities.urls import url_for
from pydantic import BaseModel

from tasks import settings
from tasks.errors import CollectError

_POLL_SECONDS = (1.0, 15.0)
"""Between two looks at a child: at first, and in the end. A hundred models wait for hours."""
_SLOWER = 1.1
_RESCUE_SECONDS = 90
"""How long a crashed run is left to the automation, before its parent starts it again."""
_ENDS = {StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED}


def deployed() -> bool:
    """Say whether this run is one of a deployment, so that its children are too."""
    return bool(deployment.id)


def tag_run(*labels: str) -> None:
    """Add tags to this run, by which it is found; whoever started it need not know them."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, tags={*flow_run.tags, *labels})


def run_child(
    name: str,
    parameters: dict[str, Any],
    *,
    key: str,
    labels: list[str],
    title: str,
    crashes: int = 0,
) -> State[Any]:
    """Run the deployment of a child flow and return the state in which it ended or was paused.

    A parent's retry finds the same child, and has it tried again if it did not complete.

    Args:
        name: of the flow, and of its deployment.
        parameters: of the flow; models are sent as JSON has them.
        key: what tells this child from the parent's others.
        labels: tags of the run, besides the deployment's.
        title: name of the run until it starts.
        crashes: how often the child starts again by itself after a crash.
    """
    whole = f"{flow_run.id}:{name}:{key}"
    child = start_run(name, parameters, key=whole, labels=labels, title=title)
    get_run_logger().info("%s: %s", child.name, url_for(child))
    with get_client(sync_client=True) as client:
        if child.state and child.state.type in {StateType.FAILED, StateType.CRASHED}:
            client.set_flow_run_state(child.id, AwaitingRetry(), force=True)
        state = _wait(client, child, crashes)
    # Without its details, by which Prefect would take it for what this run came to.
    return State(type=state.type, name=state.name, message=state.message)


def start_run(
    name: str, parameters: dict[str, Any], *, key: str, labels: list[str], title: str
) -> FlowRun:
    """Start the deployment of a flow, which nobody waits for; return its run.

    Args:
        name: of the flow, and of its deployment.
        parameters: of the flow; models are sent as JSON has them.
        key: what the same start has and no other: it finds the run that was started.
        labels: tags of the run, besides the deployment's.
        title: name of the run until it starts.
    """
    created = run_deployment(
        f"{name}/{name}",
        parameters={field: _plain(value) for field, value in parameters.items()},
        tags=labels,
        flow_run_name=title,
        idempotency_key=key,
        as_subflow=False,  # Prefect cannot suspend subflows
        timeout=0,
    )
    return cast("FlowRun", created)  # a coroutine only where there is an event loop


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    return str(value) if isinstance(value, Path) else value


def _wait(client: SyncPrefectClient, child: FlowRun, crashes: int) -> State[Any]:
    crashed_at = None
    pause, longest = _POLL_SECONDS
    while True:
        with _outages_tolerated():
            found = client.read_flow_run(child.id)
            state = found.state
            if state and state.is_crashed() and _crashes(client, found) <= crashes:
                crashed_at = crashed_at or time.monotonic()
                if time.monotonic() - crashed_at > _RESCUE_SECONDS:
                    client.set_flow_run_state(child.id, AwaitingRetry(), force=True)
            elif state and (state.is_final() or state.is_paused()):
                return state
            else:
                crashed_at = None
        time.sleep(pause)
        pause = min(longest, _SLOWER * pause)


@contextmanager
def _outages_tolerated() -> Iterator[None]:
    """Take it for a moment's trouble if the server is away, or has lost its database."""
    try:
        yield
    except httpx.TransportError:
        return
    except httpx.HTTPStatusError as error:
        if not error.response.is_server_error:
            raise


def _crashes(client: SyncPrefectClient, run: FlowRun) -> int:
    """Return how often a run has crashed since it last ended in another way."""
    states = sorted(client.read_flow_run_states(run.id), key=lambda state: state.timestamp)
    count, before = 0, False
    for state in states:
        # A worker may report one crash twice.
        count += state.is_crashed() and not before
        before = state.is_crashed()
        if state.type in _ENDS:
            count = 0
    return count


def check_crashes(workspace: Path) -> None:
    """Check that this run, which is started again when it crashes, has not crashed too often.

    A run that fails so can be retried by hand, and counts from none again.

    Args:
        workspace: whose settings say how often it may.

    Raises:
        CollectError: it has.
    """
    if not deployed() or flow_run.run_count == 1:
        return
    limit = settings.load_settings(workspace).collect.crashes
    with get_client(sync_client=True) as client:
        count = _crashes(client, client.read_flow_run(flow_run.id))
    if count > limit:
        raise CollectError(
            f"this run has crashed {count} times, and collect.crashes allows {limit} restarts; "
            "look at its container's last lines in the worker's log, then retry it"
        )
