"""What waits for upstream goes on when upstream has moved: `watch-upstream`.

A kernel that FlashInfer or SGLang lacked is classified anew when their sources have changed since
its model was last looked at; the run that is started for it does what is left.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field

from flows.dispatch import deployed
from flows.nightly import start_model
from flows.sources import update_all
from tasks import manifest
from tasks.errors import InputError, OnboardError
from tasks.manifest import RunManifest
from tasks.request import OnboardRequest
from tasks.settings import load_settings

_DECIDING = ("sglang", "flashinfer")


class WatchRequest(BaseModel):
    """Where to look for what waits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workspace: Path = Field(
        default_factory=lambda: load_settings().workspace,
        description="Folder of clones, manifests and the outbox.",
    )


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
        request: where to look.
    """
    if not deployed():
        raise InputError("watch-upstream starts runs of deployments; use onboard run instead")
    log = get_run_logger()
    shas = update_all(request.workspace)
    found = Watched()
    for path in sorted(request.workspace.glob("onboard_*.json")):
        try:
            run = manifest.load(path)
        except OnboardError as error:  # a damaged manifest stops no other
            log.warning("%s", error)
            continue
        if not any(run.state(entry) == "waiting" for entry in run.kernels):
            continue
        why = why_not(run, shas)
        if why:
            found.waiting[run.model_slug] = why
        else:
            asked = OnboardRequest(
                model_name=run.model_slug, hf_repo_id=run.hf_repo_id, workspace=request.workspace
            )
            found.started[run.model_slug] = start_model(asked, "-".join(shas[n] for n in _DECIDING))
    for slug, why in found.waiting.items():
        log.info("%s: %s", slug, why)
    message = f"{len(found.started)} models go on, {len(found.waiting)} wait"
    return Completed(message=message, data=found)


def why_not(run: RunManifest, shas: dict[str, str]) -> str:
    """Say why a model's waiting kernels cannot go on; empty if they may."""
    if run.hf_repo_id is None:
        return "its config is not on the Hub: start onboard-model with it by hand"
    then = run.repo_shas.model_dump()
    if all(then.get(name) == shas[name] for name in _DECIDING):
        return "neither SGLang nor FlashInfer has changed"
    return ""
