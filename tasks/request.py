"""What a user asks for, and what is left to do for each kernel."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tasks.errors import InputError
from tasks.files import safe_name
from tasks.manifest import DONE, KernelEntry, Route, RunManifest
from tasks.settings import load_settings

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
ALL_PHASES = (0, 1, 2, 3, 4)


class OnboardRequest(BaseModel):
    """One model to onboard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_name: str = Field(
        description="Slug of the model, as in `model:` tags and manifest names.",
        examples=["qwen3-30b-a3b"],
    )
    hf_repo_id: str | None = Field(
        default=None, description="Hugging Face repository, where config.json is read from."
    )
    config: Path | None = Field(
        default=None, description="A config.json file to use instead of the Hub's."
    )
    workspace: Path = Field(
        default_factory=lambda: load_settings().workspace,
        description="Folder of clones, manifests and the outbox.",
    )
    phases: tuple[int, ...] = Field(default=ALL_PHASES, description="Phases to run.")
    skip_workload: bool = Field(default=False, description="Do not collect workloads (phase 3).")
    submit_prs: bool = Field(default=True, description="Publish what is complete (phase 4).")
    refresh: bool = Field(
        default=False, description="Forget what an earlier run recorded and start over."
    )
    dumps: Path | None = Field(
        default=None, description="Folder of recorded FlashInfer dumps to collect from."
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


class Step(Enum):
    """One thing to do for one kernel; each is a Prefect task."""

    DEFINE = "define"
    REQUEST_KERNEL = "request kernel"
    REQUEST_TEMPLATE = "request trace template"
    PREPARE_SGLANG = "prepare SGLang pull request"
    COLLECT = "collect"
    PUBLISH_DATASET = "publish dataset"
    PUBLISH_COVERAGE = "publish coverage"


def remaining_steps(
    manifest: RunManifest, entry: KernelEntry, request: OnboardRequest
) -> tuple[Step, ...]:
    """Return what is still to do for a kernel, in order; what is done is never repeated.

    The branches: existing -> nothing; fi_missing -> define, request the kernel, publish the
    definition; sgl_missing -> define, prepare SGLang's pull request, wait; integrated -> define,
    collect, publish; nothing to collect -> define, publish the definition. Where FlashInfer has the
    kernel's API but no trace template for it, that is requested too.

    While nobody has written the kernel's reference, of these only the requests are made.
    """
    route = entry.route
    if route is Route.NOTHING:
        return ()
    steps = []
    if 2 in request.phases:
        defines = entry.phase2_status != DONE
        if defines:
            steps.append(Step.DEFINE)
        # A request and the definition made now are told of each other, even if it is an old one.
        if route is Route.REQUEST_KERNEL and (defines or entry.fi_issue_url is None):
            steps.append(Step.REQUEST_KERNEL)
        if _lacks_template(entry) and (defines or entry.fi_trace_template_request_url is None):
            steps.append(Step.REQUEST_TEMPLATE)
    if entry.phase2_status != DONE and Step.DEFINE not in steps:
        return ()
    collects = 3 in request.phases and not request.skip_workload
    if collects and route is Route.AWAIT_SGLANG and entry.sglang_pr_url is None:
        steps.append(Step.PREPARE_SGLANG)
    if collects and route is Route.COLLECT and entry.phase3_status != DONE:
        steps.append(Step.COLLECT)
    collected = entry.phase3_status == DONE or Step.COLLECT in steps
    complete = route in {Route.REQUEST_KERNEL, Route.DEFINITION_ONLY} or (
        route is Route.COLLECT and collected
    )
    if 4 in request.phases and request.submit_prs and complete:
        pulls = manifest.phase4.get(entry.definition_name)
        if pulls is None or pulls.flashinfer_trace_pr is None:
            steps.append(Step.PUBLISH_DATASET)
        if pulls is None or pulls.flashinfer_bench_pr is None:
            steps.append(Step.PUBLISH_COVERAGE)
    return tuple(steps)


def _lacks_template(entry: KernelEntry) -> bool:
    """Whether FlashInfer runs the kernel, by an API that has no trace template."""
    by_an_api = entry.route in {Route.COLLECT, Route.AWAIT_SGLANG}
    return by_an_api and entry.fi_status == "fi_supported" and entry.fi_trace_template is False
