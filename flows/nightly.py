"""Models to onboard next, found on a schedule: `discover-nightly`.

Every candidate gets one `onboard-model` run for the SGLang it was found with: the same night twice,
or a night after an interrupted one, finds the runs that were started and starts no second ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prefect import flow, get_client, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Completed
from pydantic import BaseModel, Field

from flows.dispatch import check_crashes, deployed, start_run
from flows.sources import update_all
from tasks import settings
from tasks.discover.candidates import Candidate, Discovery, discover
from tasks.errors import InputError
from tasks.publish.markdown import cell
from tasks.request import OnboardRequest, StandingRequest
from tasks.step import only_shown, step

_MODEL = "onboard-model"
_NEW = ("candidate", "needs_repo_id")
_ENDED = [StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED, StateType.CRASHED]


class NightlyRequest(StandingRequest):
    """Where to look for models, and what to do with them."""

    since: str = Field(default="14d", description="How far back to look: 30d, 2w or a day.")
    most: int = Field(default=5, ge=0, le=100, description="Models to start at most.")
    ask_hub: bool = Field(
        default=True, description="Also ask the Hub: trending models, missing repository ids."
    )


class Night(BaseModel):
    """What a night came to."""

    started: dict[str, str] = {}
    """Model slug -> the id of its `onboard-model` run, whichever night started it."""
    left: list[Candidate] = []
    """The candidates that are not onboarded; their reasons say why."""

    @property
    def counts(self) -> str:
        """Say it in a line."""
        return f"{len(self.started)} models are being onboarded, {len(self.left)} are left"


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
    check_crashes(request.workspace)
    # The coverage document says which models need no onboarding.
    shas = update_all(request.workspace, ["flashinfer_bench"])
    found = find_candidates(request, shas)
    wanted, left = choose(found.candidates, request)
    night = Night(left=left)
    for slug, candidate in wanted.items():
        asked = onboarding(candidate, request)
        night.started[slug] = start_model(asked, shas["sglang"], "nightly")
    with only_shown():
        create_markdown_artifact(
            key="nightly-candidates",
            markdown=markdown(found, wanted, night),
            description="Models found",
        )
    get_run_logger().info(night.counts)
    return Completed(message=night.counts, data=night)


@step(1, "find-candidates", "Find models that are new in SGLang, the cookbook or on the Hub.")
def find_candidates(request: NightlyRequest, shas: dict[str, str]) -> Discovery:
    """Return what there is, the first to onboard first.

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
    return found


def choose(
    candidates: Iterable[Candidate], request: NightlyRequest
) -> tuple[dict[str, Candidate], list[Candidate]]:
    """Return what to onboard, by its slug, and the candidates that are left, with the reasons.

    Args:
        candidates: what there is, the first to onboard first.
        request: how many may be onboarded, and how.
    """
    wanted: dict[str, Candidate] = {}
    left = []
    for candidate in candidates:
        if candidate.status not in _NEW:
            continue
        try:
            slug = onboarding(candidate, request).model_name
            _check_room(slug, wanted, request.most)
        except InputError as error:
            reason = f"{candidate.reason}; {error}"
            left.append(candidate.model_copy(update={"reason": reason}))
        else:
            wanted[slug] = candidate
    return wanted, left


def _check_room(slug: str, wanted: Mapping[str, Candidate], most: int) -> None:
    if slug in wanted:  # its manifest would be the other's
        raise InputError(f"{wanted[slug].hf_repo_id} has the same name")
    if len(wanted) >= most:
        raise InputError(f"{most} are enough for a night")


def onboarding(candidate: Candidate, request: NightlyRequest) -> OnboardRequest:
    """Return the request to onboard a candidate.

    Raises:
        InputError: it cannot be onboarded.
    """
    if candidate.hf_repo_id is None:
        raise InputError("nobody knows its repository")
    slug = candidate.hf_repo_id.rpartition("/")[2].lower()
    return request.onboarding(slug, candidate.hf_repo_id)


@task(
    name="start-model",
    task_run_name="{request.model_name}",
    description="Start onboard-model for a model and what it is made from, unless it was started.",
)
def start_model(request: OnboardRequest, commit: str, label: str) -> str:
    """Return the id of the run, which nobody waits for.

    Args:
        request: the model.
        commit: of the sources; with others there is more to do.
        label: a tag that says who asked.
    """
    run = under_way(request.model_name) or start_run(
        _MODEL,
        {"request": request},
        key=f"{request.hf_repo_id}@{commit}",
        labels=[label, f"model:{request.model_name}"],
        title=request.model_name,
    )
    return str(run.id)


def under_way(model_name: str) -> FlowRun | None:
    """Return a model's run that has not ended, whoever started it: two would do the same work."""
    not_ended = FlowRunFilterState(type=FlowRunFilterStateType(not_any_=_ENDED))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[_MODEL])),
            flow_run_filter=FlowRunFilter(state=not_ended),
        )
    return next(
        (run for run in runs if run.parameters.get("request", {}).get("model_name") == model_name),
        None,
    )


def markdown(found: Discovery, wanted: Mapping[str, Candidate], night: Night) -> str:
    """Return what the UI shows of a night.

    Args:
        found: what there is.
        wanted: what of it is onboarded, by its slug.
        night: what became of it.
    """
    lines = [f"{night.counts}; looked back to {found.since}.", ""]
    lines += [f"- {cell(warning)}" for warning in found.warnings]
    lines += ["", "| Onboarded | Repository | Since | Why | Run |", "|---|---|---|---|---|"]
    for slug, candidate in wanted.items():
        run = night.started[slug]
        # The UI completes the link: where its readers find it is not known here.
        lines.append(_row(slug, *_about(candidate)) + f" [{run[:8]}](/runs/flow-run/{run}) |")
    lines += ["", "| Not onboarded | Since | Why | Status |", "|---|---|---|---|"]
    others = [candidate for candidate in found.candidates if candidate.status not in _NEW]
    lines += [_row(*_about(candidate), candidate.status) for candidate in (*night.left, *others)]
    return "\n".join(lines) + "\n"


def _about(candidate: Candidate) -> tuple[str, str, str]:
    name = candidate.hf_repo_id or candidate.architecture or candidate.model_file or "-"
    return name, candidate.date or "-", candidate.reason


def _row(*texts: str) -> str:
    return "".join(f"| {cell(text)} " for text in texts) + "|"
