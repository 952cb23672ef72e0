"""What waits for upstream goes on when upstream has moved: `watch-upstream`.

A kernel that FlashInfer or SGLang lacked is classified anew when their sources have changed since
its model was last looked at; the run that is started for it does what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict

from flows.dispatch import check_crashes, deployed
from flows.nightly import start_model
from flows.sources import update_all
from tasks import manifest
from tasks.errors import InputError, OnboardError
from tasks.manifest import RunManifest
from tasks.request import (
    OnboardRequest,
    SkipWorkload,
    SubmitPrs,
    Workspace,
    for_the_form,
    parse_request,
)

_DECIDING = ("sglang", "flashinfer")


class WatchRequest(BaseModel):
    """Where to look for what waits, and what to do with what goes on."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=for_the_form)

    workspace: Workspace
    skip_workload: SkipWorkload = False
    submit_prs: SubmitPrs = True


class Watched(BaseModel):
    """What a look came to."""

    started: dict[str, str] = {}
    """Model slug -> the id of its `onboard-model` run."""
    waiting: dict[str, str] = {}
    """Model slug -> why it goes on waiting."""


@flow(
    name="watch-upstream",
    description=(
        "Bring the sources up to date; where kernels wait for SGLang or FlashInfer and those have "
        "changed since, start onboard-model for their model, which goes on where it can."
    ),
)
def watch_upstream(request: WatchRequest) -> State[Watched]:
    """Start what may go on; the final state's data is the `Watched`.

    Args:
        request: where to look, and what to do with what goes on.
    """
    if not deployed():
        raise InputError("watch-upstream starts runs of deployments; use onboard run instead")
    check_crashes(request.workspace)
    shas = update_all(request.workspace)
    commits = {name: shas[name] for name in _DECIDING}
    found = Watched()
    for run in waiting(request.workspace):
        try:
            asked = going_on(run, commits, request)
        except InputError as error:
            found.waiting[run.model_slug] = str(error)
            get_run_logger().info("%s: %s", run.model_slug, error)
        else:
            commit = "-".join(commits.values())
            found.started[run.model_slug] = start_model(asked, commit, "upstream")
    message = f"{len(found.started)} models go on, {len(found.waiting)} wait"
    return Completed(message=message, data=found)


def waiting(workspace: Path) -> Iterator[RunManifest]:
    """Yield the newest manifest of each model that has kernels waiting; pass over damaged ones.

    Args:
        workspace: where they are.
    """
    for path in sorted(workspace.glob("onboard_*.json")):
        try:
            run = manifest.load(path)
        except OnboardError as error:
            get_run_logger().warning("%s", error)
            continue
        newest = path == manifest.latest(workspace, run.model_slug)
        if newest and any(run.state(entry) == "waiting" for entry in run.kernels):
            yield run


def going_on(run: RunManifest, commits: Mapping[str, str], request: WatchRequest) -> OnboardRequest:
    """Return the request with which a model's waiting kernels go on.

    Args:
        run: the model's manifest.
        commits: of the sources that decide whether they may.
        request: what to do with them.

    Raises:
        InputError: they cannot; the message says why.
    """
    if run.hf_repo_id is None:
        raise InputError("its config is not on the Hub: start onboard-model with it by hand")
    then = run.repo_shas.model_dump()
    if all(then.get(name) == commit for name, commit in commits.items()):
        raise InputError("neither SGLang nor FlashInfer has changed")
    return parse_request(
        model_name=run.model_slug,
        hf_repo_id=run.hf_repo_id,
        workspace=request.workspace,
        skip_workload=request.skip_workload,
        submit_prs=request.submit_prs,
    )
