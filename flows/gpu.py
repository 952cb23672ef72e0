"""Work for the GPU work pool: `evaluate-baseline`, and the runs there that other runs wait for."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, task
from prefect.client.schemas.objects import State

from flows.dispatch import check_crashes, deployed, run_child
from tasks import settings
from tasks.collect.request import CollectRequest
from tasks.collect.task import evaluate_baseline
from tasks.errors import CollectError
from tasks.request import OnboardRequest


@flow(
    name="evaluate-baseline",
    flow_run_name="evaluate {name}",
    description=(
        "Evaluate one definition's baseline on its collected workloads, on a leased GPU. Retrying "
        "evaluates it again."
    ),
)
def evaluate_workloads(path: Path, name: str) -> str:
    """Evaluate one baseline; return what came of it.

    Args:
        path: the run manifest.
        name: the definition.
    """
    check_crashes(path.parent)
    return evaluate_baseline(path, name)


@task(
    name="serve-on-pool",
    description="Have a run on the GPU work pool serve the model, and wait for it.",
)
def serve_on_pool(request: CollectRequest, model: str) -> None:
    """Run `collect-workloads` on the pool.

    Args:
        request: what to collect.
        model: the model's slug.

    Raises:
        CollectError: it did not complete.
    """
    crashes = settings.load_settings(request.manifest.parent).collect.crashes
    labels = ["gpu", f"model:{model}"]
    state = run_child(
        "collect-workloads",
        {"request": request},
        key=model,
        labels=labels,
        title=f"collect {model}",
        crashes=crashes,
    )
    _check(state, "collect-workloads")


@task(
    name="evaluate-on-pool",
    task_run_name="evaluate {name}",
    description="Have a run on the GPU work pool evaluate the baseline, and wait for it.",
)
def evaluate_on_pool(request: OnboardRequest, path: Path, name: str) -> None:
    """Run `evaluate-baseline` on the pool.

    Args:
        request: what the user asked for.
        path: the run manifest.
        name: the definition.

    Raises:
        CollectError: it did not complete; its own reason, where it has one.
    """
    crashes = settings.load_settings(path.parent).collect.crashes
    labels = ["gpu", f"model:{request.model_name}", f"kernel:{name}"]
    state = run_child(
        "evaluate-baseline",
        {"path": path, "name": name},
        key=name,
        labels=labels,
        title=f"evaluate {name}",
        crashes=crashes,
    )
    _check(state, "evaluate-baseline")


def evaluate(request: OnboardRequest, path: Path, name: str) -> None:
    """Evaluate one definition's baseline where the settings say."""
    on_pool = settings.load_settings(path.parent).collect.serve == "pool"
    if on_pool and deployed():
        evaluate_on_pool(request, path, name)
    else:
        evaluate_baseline(path, name)


def _check(state: State[object], name: str) -> None:
    if not state.is_completed():
        raise CollectError(f"the {name} run on the GPU pool ended {state.name}: {state.message}")
