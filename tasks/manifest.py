"""The run manifest `onboard_{model_slug}_{YYYYMMDD}.json`: the contract between the phases.

Field names are those of the original procedures, so that a manifest written by them loads here and
ours is readable by them; fields we do not know survive a round trip. The file is the truth about a
run: what it does not call done is done again.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from tasks import files
from tasks.errors import ManifestError, first_problem

_FILE_NAME = re.compile(r"onboard_(?P<slug>.+)_(?P<date>\d{8})\.json")
_LOCK_SECONDS = 60
DONE = "done"
NEEDS_REFERENCE = "needs_reference"
"""Value of `phase2_status`: nobody has written the kernel's reference yet."""


KernelState = Literal[
    "new",
    "existing",
    "defined",
    "needs_reference",
    "collected",
    "published",
    "waiting",
    "merged",
    "changes_requested",
    "rejected",
    "failed",
]
"""How far a kernel has come (`RunManifest.state`)."""


class RepoShas(BaseModel):
    """Short commit SHAs of the sources a run was made from."""

    model_config = ConfigDict(extra="allow")

    sglang: str | None = None
    flashinfer: str | None = None
    sgl_cookbook: str | None = None
    flashinfer_trace: str | None = None


class Route(Enum):
    """The four branches of the DAG, and the fifth that has nothing to collect."""

    NOTHING = "nothing"
    REQUEST_KERNEL = "request kernel"
    AWAIT_SGLANG = "await sglang"
    COLLECT = "collect"
    DEFINITION_ONLY = "definition only"


class KernelEntry(BaseModel):
    """One kernel of the model: what is known about it and how far it has come."""

    model_config = ConfigDict(extra="allow")

    definition_name: str
    op_type: str
    phase1_status: Literal["new", "existing"]
    fi_status: Literal["fi_supported", "fi_missing", "n/a", "n-a"] | None = None
    fi_trace_template: bool | None = None
    fi_trace_template_request_url: str | None = None
    sgl_status: Literal["sgl_integrated", "sgl_missing", "n/a", "n-a"] | None = None
    fi_issue_url: str | None = None
    phase2_status: str | None = None
    phase2_method: str | None = None
    phase2_notes: list[str] | None = None
    """Ours: what phase 2 has to say, such as what a reference lacks."""
    phase2_proof: list[str] | None = None
    """Ours: the cases in which the reference agreed with an independent computation."""
    phase2_versions: dict[str, str] | None = None
    """Ours: the packages the definition was made and proved with."""
    phase2_fingerprint: str | None = None
    """Ours: a digest of the definition and the test that the proof is of."""
    phase3_status: str | None = None
    workload_entries: int | None = Field(default=None, ge=0)

    # Ours, beyond the original contract.
    spec: dict[str, Any] | None = None
    """The op module's kernel specification: axes, parallelism, scalars."""
    evidence: list[str] | None = None
    """Why each classification holds, as `file:line` facts."""
    server_flags: list[str] | None = None
    """SGLang server flags without which it takes another kernel."""
    sglang_pr_url: str | None = None
    baseline_status: str | None = None
    error: str | None = None
    """The message of the step that failed last; absent once a later try gets past it."""

    @field_validator("definition_name", "op_type")
    @classmethod
    def _one_path_component(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(
                f"{value!r} is not a valid name (letters, digits, '.', '_' and '-' only)"
            )
        return value

    @property
    def route(self) -> Route:
        """The branch this kernel takes, decided by its phase 1 classification alone."""
        if self.phase1_status == "existing":
            return Route.NOTHING
        if self.fi_status == "fi_missing":
            return Route.REQUEST_KERNEL
        if self.sgl_status == "sgl_missing":
            return Route.AWAIT_SGLANG
        if self.sgl_status == "sgl_integrated":
            return Route.COLLECT
        return Route.DEFINITION_ONLY


class PullRequests(BaseModel):
    """Where a definition's pair of pull requests is."""

    model_config = ConfigDict(extra="allow")

    flashinfer_trace_pr: str | None = None
    flashinfer_bench_pr: str | None = None


class Upstream(BaseModel):
    """What has become of a pull request or an issue."""

    model_config = ConfigDict(extra="allow")

    state: Literal["manual", "draft", "open", "changes_requested", "merged", "closed", "rejected"]
    """`manual`: in the outbox, for somebody to send; `closed`: an issue that was dealt with;
    `rejected`: closed without being merged, or as not planned."""
    said: str | None = None
    """The reviewer's last words."""
    checked: AwareDatetime | None = None
    """When this was seen."""
    base: str | None = None
    """Of a coverage pull request: the repository's commit with which it was last seen to merge."""


class RunManifest(BaseModel):
    """One onboarding run of one model."""

    model_config = ConfigDict(extra="allow", validate_assignment=True)

    model_slug: str
    hf_repo_id: str | None
    date: dt.date
    repo_shas: RepoShas = Field(default_factory=RepoShas)
    kernels: list[KernelEntry] = Field(default_factory=list)
    phase4: dict[str, PullRequests] = Field(default_factory=dict)

    # Ours, beyond the original contract.
    upstream: dict[str, Upstream] | None = None
    """What has become of everything that was published, by its URL."""
    # What phase 1 found besides the kernels.
    architecture: str | None = None
    model_class: str | None = None
    """The architecture, and the file of SGLang that implements it."""
    serving: list[dict[str, Any]] | None = None
    unmapped: list[dict[str, Any]] | None = None
    """Parts of the model without a kernel: `what`, `reason`, `sglang_file`."""
    rejected: list[dict[str, Any]] | None = None
    """Combinations that cannot be: `what`, `reason`."""
    phase1_fingerprint: str | None = None
    """A digest of what phase 1 found, to tell whether anything changed since."""

    @field_validator("kernels")
    @classmethod
    def _unique_names(cls, kernels: list[KernelEntry]) -> list[KernelEntry]:
        names = [kernel.definition_name for kernel in kernels]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"definition listed twice: {', '.join(twice)}")
        return kernels

    def kernel(self, definition_name: str) -> KernelEntry:
        """Return the entry of one kernel.

        Raises:
            ManifestError: there is none of that name.
        """
        for entry in self.kernels:
            if entry.definition_name == definition_name:
                return entry
        raise ManifestError(f"manifest of {self.model_slug}: no kernel {definition_name!r}")

    def pull_requests(self, definition_name: str) -> PullRequests:
        """Return a definition's pair, as far as it is there."""
        return self.phase4.get(definition_name, PullRequests())

    def state(self, entry: KernelEntry) -> KernelState:
        """Say in a word or two how far a kernel has come; derived, never stored."""
        pulls = self.pull_requests(entry.definition_name)
        pair = pulls.flashinfer_trace_pr, pulls.flashinfer_bench_pr
        became = [found.state if (found := self.upstream_of(url)) else None for url in pair]
        existing = entry.route is Route.NOTHING
        awaited = entry.route is Route.AWAIT_SGLANG and self.upstream_of(entry.sglang_pr_url)
        facts: tuple[tuple[KernelState, object], ...] = (
            ("failed", entry.error and not existing),
            ("rejected", "rejected" in became),
            ("changes_requested", "changes_requested" in became),
            ("merged", became == ["merged", "merged"]),
            ("existing", existing),
            ("published", all(pair)),
            ("needs_reference", entry.phase2_status == NEEDS_REFERENCE),
            ("rejected", awaited and awaited.state == "rejected"),
            ("waiting", entry.route is Route.AWAIT_SGLANG and entry.sglang_pr_url),
            ("collected", entry.phase3_status == DONE),
            ("defined", entry.phase2_status == DONE),
        )
        return next((state for state, holds in facts if holds), "new")

    def links(self, entry: KernelEntry) -> dict[str, str]:
        """Return what was published and asked for upstream for a kernel: kind -> URL."""
        pulls = self.pull_requests(entry.definition_name)
        found = {
            "dataset": pulls.flashinfer_trace_pr,
            "coverage": pulls.flashinfer_bench_pr,
            "kernel request": entry.fi_issue_url,
            "template request": entry.fi_trace_template_request_url,
            "SGLang": entry.sglang_pr_url,
        }
        return {kind: url for kind, url in found.items() if url}

    def upstream_of(self, url: str | None) -> Upstream | None:
        """Return what is known of something published; None if nobody has looked yet."""
        known = (self.upstream or {}).get(url or "")
        # What is in the outbox waits for somebody to send it.
        outbox = url and url.startswith("file:")
        return known or (Upstream(state="manual") if outbox else None)


def title_of(state: KernelState) -> str:
    """Return a kernel's state as Prefect's UI shows it: the name of its run's last state."""
    return state.replace("_", " ").capitalize()


def file_name(model_slug: str, date: dt.date) -> str:
    """Return the manifest's file name for a model and a day."""
    return f"onboard_{model_slug}_{date:%Y%m%d}.json"


def slug_of(path: Path) -> str:
    """Return the model that a manifest is named for; a file of another name, its stem."""
    named = _FILE_NAME.fullmatch(path.name)
    return named["slug"] if named else path.stem


def dump(manifest: RunManifest) -> dict[str, Any]:
    """Return the manifest as JSON data: what was set, nothing that was not."""
    return manifest.model_dump(mode="json", exclude_unset=True)


def load(path: Path) -> RunManifest:
    """Read a manifest.

    Raises:
        ManifestError: not readable, not JSON, or a field is missing or wrong. The message names
            the file and the field; the file is left as it is.
    """
    value = files.read_json_object(path, "the manifest", ManifestError)
    try:
        manifest = RunManifest.model_validate(value)
    except ValidationError as error:
        field, reason = first_problem(error)
        raise ManifestError(f"{path}: field {field}: {reason}") from error
    named = _FILE_NAME.fullmatch(path.name)
    if named and named["slug"] != manifest.model_slug:
        raise ManifestError(
            f"{path}: field model_slug: {manifest.model_slug!r} is another model's manifest, "
            f"the file is named for {named['slug']!r}"
        )
    return manifest


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_SECONDS)


def update(path: Path, change: Callable[[RunManifest], None]) -> RunManifest:
    """Apply `change` to the manifest as it is on disk now, and write it back atomically.

    Safe against other processes doing the same: an exclusive file lock is held from the read to
    the rename, and the kernel releases it when its holder dies.

    Raises:
        ManifestError: the file is damaged, or its lock could not be had.
    """
    try:
        with _lock(path):
            manifest = load(path)
            change(manifest)
            files.write_json(path, dump(manifest))
            return manifest
    except Timeout as error:
        raise ManifestError(f"{path}: locked by another process for {_LOCK_SECONDS} s") from error
    except OSError as error:
        raise ManifestError(f"{path}: cannot be written ({error.strerror})") from error


def create(path: Path, manifest: RunManifest) -> RunManifest:
    """Write `manifest` unless the file exists; return what the file holds then.

    Raises:
        ManifestError: an existing file is damaged or the folder cannot be written.
    """
    try:
        with _lock(path):
            if not path.exists():
                files.write_json(path, dump(manifest))
            return load(path)
    except Timeout as error:
        raise ManifestError(f"{path}: locked by another process for {_LOCK_SECONDS} s") from error
    except OSError as error:
        raise ManifestError(f"{path}: cannot be written ({error.strerror})") from error


def update_kernel(path: Path, definition_name: str, **fields: Any) -> KernelEntry:
    """Set fields of one kernel; `error` is removed unless it is among them.

    Raises:
        ManifestError: no such manifest or kernel, or a damaged file.
    """

    def change(manifest: RunManifest) -> None:
        entry = manifest.kernel(definition_name)
        kept = entry.model_dump(exclude_unset=True)
        kept.pop("error", None)
        index = manifest.kernels.index(entry)
        manifest.kernels[index] = KernelEntry.model_validate({**kept, **fields})

    return update(path, change).kernel(definition_name)


def record_error(path: Path, definition_name: str, message: str) -> None:
    """Record why a kernel's step failed; what it had done before stays done."""

    def change(manifest: RunManifest) -> None:
        manifest.kernel(definition_name).error = message

    update(path, change)


def clear_errors(path: Path) -> None:
    """Forget why steps failed: the run that begins finds out again."""

    def change(manifest: RunManifest) -> None:
        manifest.kernels = [
            KernelEntry.model_validate(entry.model_dump(exclude_unset=True, exclude={"error"}))
            for entry in manifest.kernels
        ]

    if any(entry.error for entry in load(path).kernels):
        update(path, change)


def record_pull_request(path: Path, definition_name: str, **urls: str) -> None:
    """Record the URL of a pull request in `phase4`, keeping its sibling's."""

    def change(manifest: RunManifest) -> None:
        known = manifest.pull_requests(definition_name)
        manifest.phase4 = {
            **manifest.phase4,
            definition_name: known.model_copy(update=urls),
        }

    update(path, change)


def record_upstream(path: Path, told: Mapping[str, Upstream]) -> RunManifest:
    """Record what has become of things published; what else was known of them stays.

    Args:
        path: the run manifest.
        told: URL -> what has become of it.
    """

    def change(manifest: RunManifest) -> None:
        known = manifest.upstream or {}
        news = {url: _with(known.get(url), found) for url, found in told.items()}
        manifest.upstream = {**known, **news}

    return update(path, change) if told else load(path)


def _with(known: Upstream | None, found: Upstream) -> Upstream:
    new: dict[str, Any] = {name: getattr(found, name) for name in found.model_fields_set}
    return known.model_copy(update=new) if known else found


PHASE1_FIELDS = frozenset(
    {
        "definition_name",
        "op_type",
        "phase1_status",
        "fi_status",
        "fi_trace_template",
        "sgl_status",
        "spec",
        "evidence",
        "server_flags",
    }
)


_DEFINITION_ALONE = frozenset({Route.REQUEST_KERNEL, Route.DEFINITION_ONLY})


def merge_discovery(
    manifest: RunManifest, discovered: list[KernelEntry], *, refresh: bool = False
) -> None:
    """Merge what phase 1 found into a manifest.

    Phase 1's own fields are replaced; what later phases wrote is kept, unless `refresh`, or unless
    the kernel was published without workloads and can be collected from now. A kernel
    that discovery no longer names is kept too when a later phase has touched it (its work is not
    lost), and dropped when nothing but phase 1 ever wrote about it.
    """
    known = {} if refresh else {entry.definition_name: entry for entry in manifest.kernels}
    merged = []
    for found in discovered:
        old = known.pop(found.definition_name, None)
        later = old.model_dump(exclude_unset=True, exclude=set(PHASE1_FIELDS)) if old else {}
        if old and old.route in _DEFINITION_ALONE and found.route not in {old.route, Route.NOTHING}:
            # It was published as a definition alone; now there is more to it.
            later = {key: value for key, value in later.items() if not key.startswith("phase")}
            manifest.phase4.pop(found.definition_name, None)
        merged.append(KernelEntry.model_validate({**found.model_dump(exclude_unset=True), **later}))
    merged += [
        entry
        for entry in known.values()
        if entry.model_dump(exclude_unset=True, exclude=set(PHASE1_FIELDS))
    ]
    manifest.kernels = merged
    if refresh:
        manifest.phase4 = {}


def check_same_model(run: RunManifest, path: Path, model_slug: str, hf_repo_id: str | None) -> None:
    """Check that a manifest is of the model somebody asked for.

    Raises:
        ManifestError: it is of another; the message names the field and both values.
    """
    if run.model_slug != model_slug:
        raise ManifestError(f"{path}: field model_slug: {run.model_slug!r} is not {model_slug!r}")
    if run.hf_repo_id and hf_repo_id and run.hf_repo_id != hf_repo_id:
        raise ManifestError(
            f"{path}: field hf_repo_id: this manifest is of {run.hf_repo_id!r}, not of "
            f"{hf_repo_id!r}; use another --model-name, or move the file away"
        )


def locate(workspace: Path, model_slug: str, hf_repo_id: str | None, today: dt.date) -> Path:
    """Return where the model's manifest is, or where today's would be.

    Raises:
        ManifestError: the manifest in the workspace is damaged or another model's.
    """
    path = latest(workspace, model_slug)
    if path is None:
        return workspace / file_name(model_slug, today)
    check_same_model(load(path), path, model_slug, hf_repo_id)
    return path


def latest(workspace: Path, model_slug: str) -> Path | None:
    """Return the newest manifest of a model in the workspace, if there is one."""
    return newest(workspace).get(model_slug)


def newest(workspace: Path) -> dict[str, Path]:
    """Return the newest manifest of each model in the workspace, by the model's slug."""
    named = ((_FILE_NAME.fullmatch(path.name), path) for path in workspace.glob("onboard_*.json"))
    return {name["slug"]: path for name, path in sorted(named, key=lambda pair: pair[1]) if name}
