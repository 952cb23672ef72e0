"""One kernel's path: `onboard-kernel`.

What is left to do is read from the manifest, so a retry, a later run and a run after a crash all do
the same: only what is not done.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.dispatch import check_crashes
from flows.gpu import evaluate
from flows.outcome import reason_of
from flows.reference import ask_for_reference
from flows.report import Report
from tasks import manifest, settings
from tasks.collect.task import collect
from tasks.define.task import define
from tasks.manifest import NEEDS_REFERENCE
from tasks.publish.task import (
    prepare_sglang,
    publish_coverage,
    publish_dataset,
    request_kernel,
    request_template,
)
from tasks.request import OnboardRequest, Step, remaining_steps
from tasks.step import artifact_key, only_shown


@flow(
    name="onboard-kernel",
    flow_run_name="{request.model_name}/{name}",
    description=(
        "Onboard one kernel: define it, then by its classification request the kernel from "
        "FlashInfer, prepare SGLang's pull request and wait, or collect workloads; publish what "
        "is complete. Retrying repeats only what failed. A kernel whose reference nobody has "
        "written is paused until somebody gives one: Resume has the form."
    ),
)
def onboard_kernel(request: OnboardRequest, path: Path, name: str) -> State[str]:
    """Do what is left for one kernel; the final state's data is the kernel's state.

    Args:
        request: what the user asked for.
        path: the run manifest.
        name: the kernel's definition name.
    """
    try:
        check_crashes(request.workspace)
        _onboard(request, path, name)
    except Exception as error:
        manifest.record_error(path, name, reason_of(error))
        show(path, name)
        raise
    show(path, name)
    run = manifest.load(path)
    state = run.state(run.kernel(name))
    get_run_logger().info("%s: %s", name, state)
    # The name is what the UI shows: a kernel that waits for upstream is not simply completed.
    said = Report(run, path).summary(run.kernel(name))
    return Completed(name=manifest.title_of(state), message=said, data=state)


def _onboard(request: OnboardRequest, path: Path, name: str) -> None:
    run = manifest.load(path)
    steps = remaining_steps(run, run.kernel(name), request)

    if Step.DEFINE in steps:
        define(path, name)
    _request_upstream(steps, path, name)
    if _status(path, name) == NEEDS_REFERENCE:
        show(path, name)  # a run that is suspended gets no further
        if not ask_for_reference(path, name):
            return
        _request_upstream(steps, path, name)
    if Step.PREPARE_SGLANG in steps:
        named = {e.definition_name: url for e in run.kernels if (url := request.sglang_pr_of(e))}
        prepare_sglang(path, name, named)
    if Step.COLLECT in steps:
        collect(path, name, recorded_dumps(request, path.parent))
        evaluate(request, path, name)
    if Step.PUBLISH_DATASET in steps:
        publish_dataset(path, name)
    if Step.PUBLISH_COVERAGE in steps:
        published = manifest.load(path).phase4[name]
        publish_coverage(path, name, str(published.flashinfer_trace_pr))


def show(path: Path, name: str) -> None:
    """Show where the kernel stands, as an artifact.

    Args:
        path: the run manifest.
        name: the kernel's definition name.
    """
    with only_shown():
        run = manifest.load(path)
        create_markdown_artifact(
            key=artifact_key("kernel", run.model_slug, name),
            markdown=Report(run, path).page(run.kernel(name)),
            description="Where the kernel stands, and why",
        )


def recorded_dumps(request: OnboardRequest, workspace: Path) -> Path | None:
    """Return the folder of what somebody recorded of the model, if it is not to be served.

    Args:
        request: what the user asked for.
        workspace: whose settings may name a folder with one of each model.
    """
    recorded = settings.load_settings(workspace).collect.recorded_dumps
    return request.dumps or (recorded / request.model_name if recorded else None)


def _status(path: Path, name: str) -> str | None:
    return manifest.load(path).kernel(name).phase2_status


def _request_upstream(steps: tuple[Step, ...], path: Path, name: str) -> None:
    if Step.REQUEST_KERNEL in steps:
        request_kernel(path, name, _status(path, name))
    if Step.REQUEST_TEMPLATE in steps:
        request_template(path, name, _status(path, name))
