"""Starting a kernel's run: the one place that knows whether flows are deployed.

Embedded, the child flow is called inline and runs in this process.
"""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.states import State

from flows.kernel import onboard_kernel
from tasks.request import OnboardRequest


@task(
    name="start-kernel",
    task_run_name="{name}",
    description="Run one kernel's flow; its failure is recorded and stops no other kernel.",
)
def start_kernel(request: OnboardRequest, path: Path, name: str) -> str:
    """Run `onboard-kernel` and return the name of its final state."""
    state: State[str] = onboard_kernel(request, path, name, return_state=True)
    return state.name or state.type.value
