"""What a user asks for, and what is left to do for each kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from tasks.errors import InputError
from tasks.files import safe_name
from tasks.git import redact
from tasks.manifest import DONE, NEEDS_REFERENCE, KernelEntry, PullRequests, Route, RunManifest
from tasks.publish.outbox import can_be_sent
from tasks.publish.publishers import sends_to_github, sends_to_hub
from tasks.publish.requested import is_public
from tasks.settings import REPOSITORY, Settings, github_site, load_settings

ALL_PHASES = (0, 1, 2, 3, 4)
_PULL_REQUEST = re.compile(
    rf"(?:(?P<kernel>[^=:/\s]+)=)?(?P<site>https?://[^/\s@?#]+)/(?P<path>{REPOSITORY.pattern}"
    r"/pull/[1-9][0-9]{0,9})/?",
    re.ASCII,
)


def for_the_form(schema: dict[str, Any]) -> None:
    """Number a schema's fields, and have what is not given be an empty field.

    PostgreSQL, which keeps the schema, forgets their order; and Prefect's form has no field for
    what may be null until its type is chosen.
    """
    for position, field in enumerate(schema["properties"].values()):
        field["position"] = position
        kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
        if len(kinds) == 1:
            del field["anyOf"], field["default"]
            field.update(kinds[0])


Workspace = Annotated[
    Path,
    Field(
        default_factory=lambda: load_settings().workspace,
        description="Folder of clones, manifests and the outbox; the worker's own if not given.",
    ),
]
SkipWorkload = Annotated[bool, Field(description="Do not collect workloads (phase 3).")]
SubmitPrs = Annotated[
    bool, Field(title="Submit PRs", description="Publish what is complete (phase 4).")
]


class OnboardRequest(BaseModel):
    """One model to onboard."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=for_the_form)

    model_name: str = Field(
        description="Slug of the model, as in `model:` tags and manifest names.",
        examples=["qwen3-30b-a3b"],
    )
    hf_repo_id: str | None = Field(
        default=None,
        title="HF repo id",
        description="Hugging Face repository, where config.json is read from.",
    )
    config: Path | None = Field(
        default=None, description="A config.json file to use instead of the Hub's."
    )
    workspace: Workspace
    phases: tuple[int, ...] = Field(
        default=ALL_PHASES,
        description="Phases to run: 0 update sources, 1 discover, 2 define, 3 collect, 4 publish.",
    )
    skip_workload: SkipWorkload = False
    submit_prs: SubmitPrs = True
    refresh: bool = Field(
        default=False, description="Forget what an earlier run recorded and start over."
    )
    dumps: Path | None = Field(
        default=None, description="Folder of recorded FlashInfer dumps to collect from."
    )
    sglang_pr: tuple[str, ...] = Field(
        default=(),
        title="SGLang pull requests",
        description="SGLang pull requests that somebody has opened: the kernels that SGLang lacks "
        "wait for them, and none is prepared. A URL for all of them, or KERNEL=URL for one, or for "
        "those of an op type.",
        examples=[["sampling=https://github.com/sgl-project/sglang/pull/12345"]],
    )
    renew: tuple[str, ...] = Field(
        default=(),
        description="Definitions whose open pull requests are brought up to date with what is "
        "staged now, as after changes that a reviewer asked for.",
        examples=[["gqa_paged_decode_h32_kv4_d128_ps1"]],
    )

    @field_validator("model_name")
    @classmethod
    def _slug(cls, value: str) -> str:
        return safe_name(value, "--model-name")

    @field_validator("hf_repo_id")
    @classmethod
    def _repository(cls, value: str | None) -> str | None:
        if value is not None and not REPOSITORY.fullmatch(value):
            raise ValueError(f"{value!r} is not a Hugging Face repository id (owner/name)")
        return value

    @field_validator("phases")
    @classmethod
    def _known_phases(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        unknown = sorted(set(value) - set(ALL_PHASES))
        if unknown or not value:
            raise ValueError(f"{list(value)}: phases are 0 to 4")
        return tuple(sorted(set(value)))

    @field_validator("sglang_pr")
    @classmethod
    def _pull_requests(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        site = github_site(load_settings(info.data.get("workspace")).publish.github_url)
        found: dict[str, str] = {}
        for text in value:
            match = _PULL_REQUEST.fullmatch(text)
            if not match or match["site"].lower() != site:
                raise ValueError(
                    f"{redact(text)!r} is not [KERNEL=]URL with a pull request's URL "
                    f"({site}/OWNER/REPOSITORY/pull/NUMBER)"
                )
            kernel, url = match["kernel"] or "", f"{site}/{match['path']}"
            if found.setdefault(kernel, url) != url:
                raise ValueError(f"{found[kernel]} and {url} are both for {kernel or 'all'}")
        return tuple(f"{kernel}={url}" if kernel else url for kernel, url in found.items())

    @property
    def publishes(self) -> bool:
        """Whether what is complete is published."""
        return 4 in self.phases and self.submit_prs

    def sglang_pr_of(self, entry: KernelEntry) -> str | None:
        """Return the pull request that somebody named for a kernel, its op type, or all."""
        named = dict(text.rpartition("=")[::2] for text in self.sglang_pr)
        keys = (entry.definition_name, entry.op_type, "")
        return next((named[key] for key in keys if key in named), None)


def parse_request(**fields: Any) -> OnboardRequest:
    """Build a request from a command's options.

    Raises:
        InputError: one of them is wrong; the message names the option.
    """
    try:
        return OnboardRequest(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise InputError(f"{option}: {first['msg'].removeprefix('Value error, ')}") from error


class StandingRequest(BaseModel):
    """What is asked of a flow that starts `onboard-model` by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=for_the_form)

    workspace: Workspace
    skip_workload: SkipWorkload = False
    submit_prs: SubmitPrs = True

    def onboarding(self, model_name: str, hf_repo_id: str) -> OnboardRequest:
        """Return the request for a model.

        Raises:
            InputError: its name cannot be one.
        """
        return parse_request(
            model_name=model_name,
            hf_repo_id=hf_repo_id,
            workspace=self.workspace,
            skip_workload=self.skip_workload,
            submit_prs=self.submit_prs,
        )


def check_names(request: OnboardRequest, run: RunManifest) -> None:
    """Check that what a request names are kernels, or op types, that the model has.

    Raises:
        InputError: one is not.
    """
    kernels = {entry.definition_name for entry in run.kernels}
    known = kernels | {entry.op_type for entry in run.kernels}
    for text in request.sglang_pr:
        kernel = text.rpartition("=")[0]
        if kernel and kernel not in known:
            raise InputError(
                f"--sglang-pr: {kernel!r} is no kernel and no op type of {run.model_slug}"
            )
    for name in request.renew:
        if name not in kernels:
            raise InputError(f"renew: {name!r} is no kernel of {run.model_slug}")


class Step(Enum):
    """One thing to do for one kernel; each is a Prefect task."""

    DEFINE = "define"
    REQUEST_KERNEL = "request kernel"
    REQUEST_TEMPLATE = "request trace template"
    PREPARE_SGLANG = "prepare SGLang pull request"
    COLLECT = "collect"
    PUBLISH_DATASET = "publish dataset"
    PUBLISH_COVERAGE = "publish coverage"


class _Sites:
    """What of the things in the outbox could be sent by now."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace

    @cached_property
    def _options(self) -> Settings:
        return load_settings(self._workspace)

    def lack(self, url: str | None) -> bool:
        """Whether GitHub has to get something: nobody has asked for it, or it can be sent now."""
        waits = url is not None and not is_public(url) and can_be_sent(url)
        return url is None or (waits and sends_to_github(self._options))

    def dataset_lacks(self, url: str | None) -> bool:
        """Whether the dataset has to get something."""
        return url is None or (not is_public(url) and sends_to_hub(self._options))


def remaining_steps(
    manifest: RunManifest, entry: KernelEntry, request: OnboardRequest
) -> tuple[Step, ...]:
    """Return what is still to do for a kernel, in order; what is done is never repeated.

    The branches: existing -> nothing; fi_missing -> define, request the kernel, publish the
    definition; sgl_missing -> define, prepare SGLang's pull request, wait; integrated -> define,
    collect, publish; nothing to collect -> define, publish the definition. Where FlashInfer has the
    kernel's API but no trace template for it, that is requested too. What is in the outbox is not
    done once there is a token for its site, and what is to be renewed is published again.

    While nobody has written the kernel's reference, of these only the requests are made.
    """
    route = entry.route
    if route is Route.NOTHING:
        return ()
    sites = _Sites(request.workspace)
    defines = 2 in request.phases and entry.phase2_status != DONE
    steps = [Step.DEFINE] if defines else []
    steps += _requests(entry, request, sites, defines=defines)
    if entry.phase2_status != DONE and not defines:
        return tuple(steps)
    if _prepares_sglang(entry, request, sites):
        steps.append(Step.PREPARE_SGLANG)
    collects = 3 in request.phases and not request.skip_workload
    if collects and route is Route.COLLECT and entry.phase3_status != DONE:
        steps.append(Step.COLLECT)
    collected = entry.phase3_status == DONE or Step.COLLECT in steps
    complete = route in {Route.REQUEST_KERNEL, Route.DEFINITION_ONLY} or (
        route is Route.COLLECT and collected
    )
    if request.publishes and complete:
        pulls = manifest.pull_requests(entry.definition_name)
        renewed = Step.REQUEST_KERNEL in steps or entry.definition_name in request.renew
        steps += _pull_requests(pulls, sites, renewed=renewed)
    return tuple(steps)


def _requests(
    entry: KernelEntry, request: OnboardRequest, sites: _Sites, *, defines: bool
) -> Iterator[Step]:
    """Yield what is asked of FlashInfer, once phase 2 has seen the kernel."""
    seen = request.publishes and entry.phase2_status in {DONE, NEEDS_REFERENCE}
    if not request.submit_prs or not (2 in request.phases or seen):
        return
    # A request and the definition made now are told of each other, even if it is an old one.
    if entry.route is Route.REQUEST_KERNEL and (defines or sites.lack(entry.fi_issue_url)):
        yield Step.REQUEST_KERNEL
    url = entry.fi_trace_template_request_url
    if _lacks_template(entry) and (defines or sites.lack(url)):
        yield Step.REQUEST_TEMPLATE


def _prepares_sglang(entry: KernelEntry, request: OnboardRequest, sites: _Sites) -> bool:
    """Whether SGLang's pull request is to be opened, or another one that is named recorded."""
    if entry.route is not Route.AWAIT_SGLANG or request.skip_workload:
        return False
    named = request.sglang_pr_of(entry)
    if named is not None:
        return named != entry.sglang_pr_url and bool({3, 4} & set(request.phases))
    goes_on = 3 in request.phases or request.publishes
    return goes_on and request.submit_prs and sites.lack(entry.sglang_pr_url)


def _pull_requests(pulls: PullRequests, sites: _Sites, *, renewed: bool) -> Iterator[Step]:
    """Yield what is left of a definition's pair.

    Both link the kernel request, and the coverage's links the dataset's.
    """
    dataset, coverage = pulls.flashinfer_trace_pr, pulls.flashinfer_bench_pr
    publishes = renewed or sites.dataset_lacks(dataset)
    if publishes:
        yield Step.PUBLISH_DATASET
    if publishes or coverage is None or (is_public(dataset) and sites.lack(coverage)):
        yield Step.PUBLISH_COVERAGE


def _lacks_template(entry: KernelEntry) -> bool:
    """Whether FlashInfer runs the kernel, by an API that has no trace template."""
    by_an_api = entry.route in {Route.COLLECT, Route.AWAIT_SGLANG}
    return by_an_api and entry.fi_status == "fi_supported" and entry.fi_trace_template is False
