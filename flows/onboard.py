"""Onboard one model: `onboard-model`.

Phase 0 and 1 run here, then one `onboard-kernel` run per kernel that has anything left to do, side
by side. The report at the end has every kernel's state; the run fails only if a kernel failed.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger, tags, task, unmapped
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from pydantic import BaseModel

from flows.collect import serve_sessions
from flows.dispatch import check_crashes, deployed, run_child, tag_run
from flows.gpu import serve_on_pool
from flows.kernel import onboard_kernel, recorded_dumps
from flows.outcome import ended
from flows.report import Report
from flows.sources import update_all
from tasks import manifest, settings
from tasks.collect.request import parse_request
from tasks.define.task import draft
from tasks.discover.task import discover_kernels
from tasks.errors import InputError, OnboardError
from tasks.repos.clone import PHASE0, in_hand
from tasks.request import OnboardRequest, Step, check_names, remaining_steps
from tasks.step import artifact_key, only_shown


class Outcome(BaseModel):
    """What a run leaves behind."""

    manifest: Path
    worked_on: list[str]
    """The kernels that had anything left to do."""


# Prefect's decorator names its parameter type without the runner's own type variable.
_KERNELS_AT_A_TIME: TaskRunner[PrefectFuture[Any]] = cast(
    "TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=8)
)


@flow(
    name="onboard-model",
    flow_run_name="{request.model_name}",
    description=(
        "Onboard a model: bring the sources up to date, compute and classify its kernels, then "
        "run one onboard-kernel per kernel with work left. Running it again continues where the "
        "manifest says."
    ),
    task_runner=_KERNELS_AT_A_TIME,
)
def onboard_model(request: OnboardRequest) -> State[Outcome]:
    """Run the requested phases for one model; the final state's data is the `Outcome`.

    Args:
        request: the model and what to do.
    """
    tag_run(f"model:{request.model_name}")
    check_crashes(request.workspace)
    shas = update_sources(request)
    today = dt.datetime.now(tz=dt.UTC).date()
    path = manifest.locate(request.workspace, request.model_name, request.hf_repo_id, today)
    if path.exists():
        manifest.clear_errors(path)
    if 1 in request.phases:
        discover_kernels(request, shas, path, today)
    elif not path.exists():
        raise InputError(f"{path}: there is no manifest yet; run phase 1 first")
    run = manifest.load(path)
    check_names(request, run)
    todo = {
        entry.definition_name: steps
        for entry in run.kernels
        if (steps := remaining_steps(run, entry, request))
    }
    get_run_logger().info("%d of %d kernels have work to do", len(todo), len(run.kernels))
    undefined = [name for name, steps in todo.items() if Step.DEFINE in steps]
    if undefined:
        draft(path, undefined)
    serve = settings.load_settings(request.workspace).collect.serve
    where = "no" if recorded_dumps(request, request.workspace) else serve
    served = [name for name, steps in todo.items() if Step.COLLECT in steps and where != "no"]
    others = [name for name in todo if name not in served]
    # Kernels that wait for no GPU do not wait for those that do.
    started = start_kernel.map(unmapped(request), unmapped(path), others)
    if served:
        serve_for(path, served, request, on_pool=where == "pool")
        started += start_kernel.map(unmapped(request), unmapped(path), served)
    wait(started)
    for name, future in zip([*others, *served], started, strict=True):
        account_for(path, name, future.state)
    result = report(path)
    outcome = Outcome(manifest=path, worked_on=list(todo))
    return ended(result.counts, outcome, failed=result.exit_code == 1)


@task(
    name="start-kernel",
    task_run_name="{name}",
    description="Run one kernel's flow; its failure is recorded and stops no other kernel.",
)
def start_kernel(request: OnboardRequest, path: Path, name: str) -> State[Any]:
    """Run `onboard-kernel`; this task ends in the state that run ended in."""
    labels = [f"model:{request.model_name}", f"kernel:{name}"]
    if deployed():
        return run_child(
            "onboard-kernel",
            {"request": request, "path": path, "name": name},
            key=name,
            labels=labels,
            title=f"{request.model_name}/{name}",
            crashes=settings.load_settings(request.workspace).collect.crashes,
        )
    with tags(*labels):
        return onboard_kernel(request, path, name, return_state=True)


def serve_for(path: Path, names: list[str], request: OnboardRequest, *, on_pool: bool) -> None:
    """Serve the model for these kernels; where that fails, only those that it was for have nothing.

    Args:
        path: the run manifest.
        names: the kernels.
        request: what the user asked for.
        on_pool: whether a run on the GPU work pool serves it, and not this process.
    """
    options = settings.load_settings(request.workspace).collect.options
    fixed = {"manifest": path, "definitions": tuple(names), "sessions_only": True}
    try:
        asked = parse_request(**{"config": request.config, **options, **fixed})
        if on_pool and deployed():
            serve_on_pool(asked, request.model_name)
        else:
            serve_sessions(asked)
    except OnboardError as error:
        get_run_logger().error("the model cannot be served: %s", error)


def account_for(path: Path, name: str, state: State[Any]) -> None:
    """See that a kernel whose run did not complete has an error in the manifest.

    A run records its own; one that was killed, cancelled or never started could not.
    """
    accounted = state.is_completed() or state.is_paused()
    if not accounted and not manifest.load(path).kernel(name).error:
        manifest.record_error(path, name, f"{name}: its run ended {state.name}: {state.message}")


def update_sources(request: OnboardRequest) -> dict[str, str]:
    """Run phase 0 side by side for all repositories, or take the clones in hand without it.

    Raises:
        InputError: phase 0 is not wanted and a clone is missing.
    """
    options = settings.load_settings(request.workspace)
    more = ["flashinfer_bench"] if 4 in request.phases and request.submit_prs else []
    if 0 in request.phases:
        shas = update_all(request.workspace, more)
    else:
        clones = {name: in_hand(name, options.clone(name)) for name in (*PHASE0, *more)}
        missing = sorted(name for name, checkout in clones.items() if checkout is None)
        if missing:
            raise InputError(
                f"{request.workspace}: has no clone of {', '.join(missing)}; run phase 0 first"
            )
        shas = {name: checkout.sha for name, checkout in clones.items() if checkout}
    return {name: shas[name] for name in PHASE0}


@task(name="report", description="Write the inventory and the final report as artifacts.")
def report(path: Path) -> Report:
    """Write the artifacts and return the report they were made of."""
    result = Report(manifest.load(path), path)
    slug = result.run.model_slug
    with only_shown():
        create_table_artifact(
            key=artifact_key("inventory", slug),
            table=result.table(),
            description=f"Kernels of {slug}",
        )
        create_markdown_artifact(
            key=artifact_key("report", slug),
            markdown=result.markdown(),
            description="Where every kernel stands",
        )
    return result
