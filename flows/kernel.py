"""One kernel's path: `onboard-kernel`.

What is left to do is read from the manifest, so a retry, a later run and a run after a crash all do
the same: only what is not done.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger

from tasks import manifest, settings
from tasks.collect.task import collect
from tasks.define.task import define
from tasks.errors import OnboardError
from tasks.publish.task import (
    prepare_sglang,
    provenance_file,
    publish_coverage,
    publish_dataset,
    request_kernel,
)
from tasks.request import OnboardRequest, Step, remaining_steps


@flow(
    name="onboard-kernel",
    flow_run_name="{request.model_name}/{name}",
    description=(
        "Onboard one kernel: define it, then by its classification request the kernel from "
        "FlashInfer, prepare SGLang's pull request and wait, or collect workloads; publish what "
        "is complete. Retrying repeats only what failed."
    ),
)
def onboard_kernel(request: OnboardRequest, path: Path, name: str) -> str:
    """Do what is left for one kernel and return its state.

    Args:
        request: what the user asked for.
        path: the run manifest.
        name: the kernel's definition name.
    """
    try:
        _onboard(request, path, name)
    except Exception as error:
        known = isinstance(error, OnboardError)
        message = str(error) if known else f"unexpected {type(error).__name__}: {error}"
        kept = manifest.load(path).kernel(name).model_dump(exclude_unset=True)
        manifest.update_kernel(path, name, **{**kept, "error": message})
        raise
    run = manifest.load(path)
    state = run.state(run.kernel(name))
    get_run_logger().info("%s: %s", name, state)
    return state


def _onboard(request: OnboardRequest, path: Path, name: str) -> None:
    options = settings.load_settings(request.workspace)
    dataset = options.clone("flashinfer_trace")
    run = manifest.load(path)
    steps = remaining_steps(run, run.kernel(name), request)

    if Step.DEFINE in steps:
        define(path, name, drafts_folder(request), dataset)
    if Step.REQUEST_KERNEL in steps:
        request_kernel(path, name)
    if Step.PREPARE_SGLANG in steps:
        prepare_sglang(path, name)
    if Step.COLLECT in steps:
        provenance = provenance_file(request.workspace, request.model_name, name)
        dumps = dumps_folder(request, options)
        collect(path, name, dumps, dataset, provenance, options.collect.max_workloads)
    if Step.PUBLISH_DATASET in steps:
        publish_dataset(path, name)
    if Step.PUBLISH_COVERAGE in steps:
        published = manifest.load(path).phase4[name]
        publish_coverage(path, name, str(published.flashinfer_trace_pr))


def drafts_folder(request: OnboardRequest) -> Path:
    """Return where the drafted definitions of a model are kept until they are staged."""
    return request.workspace / ".cache" / "drafts" / request.model_name


def dumps_folder(request: OnboardRequest, options: settings.Settings) -> Path | None:
    """Return the recorded dumps to collect from: the request's, else the model's in the settings."""
    if request.dumps:
        return request.dumps
    recorded = options.collect.recorded_dumps
    return recorded / request.model_name if recorded else None
