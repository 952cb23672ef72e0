"""Models to onboard next, found on a schedule: `discover-nightly`.

Every candidate gets one `onboard-model` run for the SGLang it was found with: the same night twice,
or a night after an interrupted one, finds the runs that were started and starts no second ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field

from flows.dispatch import deployed, start_run
from flows.sources import update_all
from tasks import settings
from tasks.discover.candidates import Candidate, discover
from tasks.errors import InputError
from tasks.files import safe_name
from tasks.request import OnboardRequest
from tasks.settings import load_settings
from tasks.step import step


class NightlyRequest(BaseModel):
    """Where to look for models, and what to do with them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workspace: Path = Field(
        default_factory=lambda: load_settings().workspace,
        description="Folder of clones, manifests and the outbox.",
    )
    since: str = Field(default="14d", description="How far back to look: 30d, 2w or a day.")
    most: int = Field(default=5, ge=0, le=100, description="Models to start at most.")
    ask_hub: bool = Field(
        default=True, description="Also ask the Hub: trending models, missing repository ids."
    )
    skip_workload: bool = Field(default=False, description="Do not collect workloads (phase 3).")
    submit_prs: bool = Field(default=True, description="Publish what is complete (phase 4).")


class Night(BaseModel):
    """What a night came to."""

    started: dict[str, str] = {}
    """Model slug -> the id of its `onboard-model` run, whichever night started it."""
    left: dict[str, str] = {}
    """Candidate -> why it is not onboarded."""


@flow(
    name="discover-nightly",
    flow_run_name="discover since {request.since}",
    description=(
        "Bring the sources up to date, find models that are new in SGLang, in its cookbook or on "
        "the Hub, and start one onboard-model run for each. Running it again starts nothing twice."
    ),
)
def discover_nightly(request: NightlyRequest) -> State[Night]:
    """Start onboarding what is new; the final state's data is the `Night`.

    Args:
        request: where to look, and what to do with what is found.
    """
    if not deployed():
        raise InputError("discover-nightly starts runs of deployments; look with onboard discover")
    shas = update_all(request.workspace)
    night = Night()
    wanted: dict[str, Candidate] = {}
    for candidate in find_candidates(request, shas):
        slug, why = slug_of(candidate)
        if not why and len(wanted) >= request.most:
            why = f"{request.most} are enough for a night"
        if why:
            night.left[candidate.line()] = why
        else:
            wanted[slug] = candidate
    for slug, candidate in wanted.items():
        asked = OnboardRequest(
            model_name=slug,
            hf_repo_id=candidate.hf_repo_id,
            workspace=request.workspace,
            skip_workload=request.skip_workload,
            submit_prs=request.submit_prs,
        )
        night.started[slug] = start_model(asked, shas["sglang"])
    show(wanted, night)
    message = f"{len(night.started)} models are being onboarded, {len(night.left)} are not"
    get_run_logger().info(message)
    return Completed(message=message, data=night)


def slug_of(candidate: Candidate) -> tuple[str, str]:
    """Return the slug of a candidate's model, and why it cannot be onboarded if it cannot."""
    if candidate.hf_repo_id is None:
        return "", "nobody knows its repository"
    try:
        return safe_name(candidate.hf_repo_id.rpartition("/")[2].lower(), "the model"), ""
    except InputError as error:
        return "", str(error)


@step(1, "find-candidates", "Find models that are new in SGLang, the cookbook or on the Hub.")
def find_candidates(request: NightlyRequest, shas: dict[str, str]) -> list[Candidate]:
    """Return the candidates to onboard, the first one first.

    Args:
        request: where to look.
        shas: the sources' commits; others are another look.
    """
    log = get_run_logger()
    options = settings.load_settings(request.workspace)
    found = discover(options, request.since, ask_hub=request.ask_hub)
    for warning in found.warnings:
        log.warning("%s", warning)
    log.info("%d models since %s at %s", len(found.candidates), found.since, shas)
    return [c for c in found.candidates if c.status in ("candidate", "needs_repo_id")]


@task(
    name="start-model",
    task_run_name="{request.model_name}",
    description="Start onboard-model for a model and an SGLang commit, unless it was started.",
)
def start_model(request: OnboardRequest, sglang: str) -> str:
    """Return the id of the run, which nobody waits for.

    Args:
        request: the model.
        sglang: SGLang's commit.
    """
    key, labels = f"{request.model_name}@{sglang}", ["nightly", f"model:{request.model_name}"]
    return str(start_run("onboard-model", {"request": request}, key=key, labels=labels).id)


def show(wanted: dict[str, Candidate], night: Night) -> None:
    """Show what was found, as an artifact."""
    rows: list[dict[str, Any]] = [
        {
            "model": slug,
            "repository": candidate.hf_repo_id,
            "found": candidate.reason,
            "run": f"/runs/flow-run/{night.started[slug]}",
        }
        for slug, candidate in wanted.items()
    ]
    rows += [{"model": "", "repository": "", "found": k, "run": v} for k, v in night.left.items()]
    create_table_artifact(key="nightly-candidates", table=rows, description="Models found")
