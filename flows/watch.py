"""What waits for upstream goes on when upstream has moved: `watch-upstream`.

What has become of all pull requests and issues is read and recorded. A kernel that FlashInfer or
SGLang lacked is classified anew when it was asked for with success, or when their sources have
changed since its model was last looked at; the run that is started for it does what is left.
Coverage pull requests are kept such that they merge: others edit the same document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel

from flows.dispatch import check_crashes, deployed
from flows.kernel import show
from flows.nightly import start_model
from flows.onboard import report
from flows.outcome import reason_of
from flows.sources import update_all
from tasks import manifest
from tasks.errors import InputError, OnboardError
from tasks.manifest import Route, RunManifest
from tasks.publish import watch
from tasks.publish.publishers import Publishers
from tasks.publish.task import publish_coverage
from tasks.publish.watch import Look, Sites
from tasks.request import OnboardRequest, StandingRequest
from tasks.settings import load_settings
from tasks.step import step

_NAMES = {"sglang": "SGLang", "flashinfer": "FlashInfer"}
_DECIDING = {
    Route.AWAIT_SGLANG: frozenset({"sglang", "flashinfer"}),
    Route.REQUEST_KERNEL: frozenset({"flashinfer"}),
}
"""What a kernel waits for -> the sources that decide whether it goes on."""


class WatchRequest(StandingRequest):
    """Where to look for what waits, and what to do with what goes on."""


class Watched(BaseModel):
    """What a look came to."""

    started: dict[str, str] = {}
    """Model slug -> the id of its `onboard-model` run, whichever look started it."""
    waiting: dict[str, str] = {}
    """Model slug -> why it goes on waiting."""
    rebased: list[str] = []
    """The definitions whose coverage pull request was seen to."""
    failed: dict[str, str] = {}
    """What could not be asked for or seen to -> why."""

    @property
    def counts(self) -> str:
        """Say it in a line."""
        failed = f", {len(self.failed)} could not be looked after" if self.failed else ""
        return f"{len(self.started)} models go on, {len(self.waiting)} wait{failed}"


@flow(
    name="watch-upstream",
    description=(
        "Read what has become of all pull requests and issues, and bring the sources up to date; "
        "where kernels wait for SGLang or FlashInfer and those have moved since, start "
        "onboard-model for their model, which goes on where it can."
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
    shas = update_all(request.workspace, ["flashinfer_bench"])
    sites = Sites(Publishers.of(load_settings(request.workspace)).state_of)
    watched = _Round(request, shas, sites)
    for path, run in newest(request.workspace):
        try:
            watched.look_after(path, run)
        except Exception as error:  # one model's trouble stops no other
            watched.fail(run.model_slug, error)
    return Completed(message=watched.found.counts, data=watched.found)


@dataclass(frozen=True)
class _Round:
    """One round of looks; what fails for one model, or one definition, stops no other."""

    request: WatchRequest
    shas: Mapping[str, str]
    sites: Sites
    found: Watched = field(default_factory=Watched)

    def look_after(self, path: Path, before: RunManifest) -> None:
        """Read what has become of a model's publications, and do what follows from it."""
        seen = read_upstream(path, self.sites)
        run = manifest.load(path)
        self.found.failed |= seen.failed
        show_news(path, before, run)
        if self.request.submit_prs:
            self._rebase(path, watch.behind(run, seen.told, self.shas["flashinfer_bench"]))
        if any(awaited(run)):
            self._go_on(run)

    def _rebase(self, path: Path, names: Iterable[str]) -> None:
        for name in names:
            try:
                rebase_coverage(path, name, self.shas["flashinfer_bench"])
                self.found.rebased.append(name)
            except Exception as error:  # of one definition
                self.fail(name, error)

    def _go_on(self, run: RunManifest) -> None:
        try:
            asked = going_on(run, self.shas, self.request)
        except InputError as error:
            self.found.waiting[run.model_slug] = str(error)
            get_run_logger().info("%s: %s", run.model_slug, error)
        else:
            commit = f"{self.shas['sglang']}-{self.shas['flashinfer']}"
            self.found.started[run.model_slug] = start_model(asked, commit, "upstream")

    def fail(self, what: str, error: Exception) -> None:
        """Note what could not be looked after."""
        self.found.failed[what] = reason_of(error)
        get_run_logger().warning("%s: %s", what, self.found.failed[what])


def newest(workspace: Path) -> Iterator[tuple[Path, RunManifest]]:
    """Yield the newest manifest of each model; pass over damaged ones.

    Args:
        workspace: where they are.
    """
    for path in sorted(manifest.newest(workspace).values()):
        try:
            yield path, manifest.load(path)
        except OnboardError as error:
            get_run_logger().warning("%s", error)


@step(
    4,
    "read-upstream",
    "Read what has become of everything that was published for a model, and record it.",
    run_name="{path.stem}",
    once=False,
)
def read_upstream(path: Path, sites: Sites) -> Look:
    """Ask for everything that may have changed, and record it.

    Args:
        path: the run manifest.
        sites: who is asked.
    """
    log = get_run_logger()
    seen = watch.look(manifest.load(path), sites)
    manifest.record_upstream(path, seen.told)
    for reason in seen.failed.values():
        log.warning("%s", reason)
    for url in seen.not_asked:
        log.info("%s: there is no token to ask with", url)
    log.info("%d of %d asked for", len(seen.told), len(seen.told) + len(seen.failed))
    return seen


def show_news(path: Path, before: RunManifest, after: RunManifest) -> None:
    """Let the artifacts say what is new.

    Args:
        path: the run manifest.
        before: what it was.
        after: what it is.
    """
    names = watch.news(before, after)
    for name in names:
        became = {
            kind: known.state
            for kind, url in after.links(after.kernel(name)).items()
            if (known := after.upstream_of(url))
        }
        get_run_logger().info("%s: %s", name, ", ".join(f"{k} {v}" for k, v in became.items()))
        show(path, name)
    if names:
        report(path)


@step(
    4,
    "rebase-coverage",
    "See that an open coverage pull request merges with the document as it is now.",
    run_name="{name}",
    once=False,
)
def rebase_coverage(path: Path, name: str, base: str) -> str:
    """Open the coverage pull request again, which updates it where it would conflict.

    Args:
        path: the run manifest.
        name: the definition.
        base: the commit that the document is of.
    """
    pulls = manifest.load(path).phase4[name]
    url = publish_coverage.fn(path, name, pulls.flashinfer_trace_pr or "")
    watch.record_base(path, url, base)
    return url


def awaited(run: RunManifest) -> Iterator[tuple[Route, str]]:
    """Yield what a model's kernels wait for, and where it was asked for.

    Args:
        run: the model's manifest.
    """
    for entry in run.kernels:
        urls = {
            Route.AWAIT_SGLANG: entry.sglang_pr_url,
            Route.REQUEST_KERNEL: entry.fi_issue_url,
        }
        if url := urls.get(entry.route):
            yield entry.route, url


def going_on(run: RunManifest, commits: Mapping[str, str], request: WatchRequest) -> OnboardRequest:
    """Return the request with which a model's waiting kernels go on.

    Args:
        run: the model's manifest.
        commits: of the sources.
        request: what to do with them.

    Raises:
        InputError: they cannot; the message says why.
    """
    if run.hf_repo_id is None:
        raise InputError("its config is not on the Hub: start onboard-model with it by hand")
    then = run.repo_shas.model_dump()
    deciding = {name for route, _ in awaited(run) for name in _DECIDING[route]}
    answered = any(
        (known := run.upstream_of(url)) and known.state in {"merged", "closed"}
        for _, url in awaited(run)
    )
    if not answered and all(then.get(name) == commits[name] for name in deciding):
        names = [title for name, title in _NAMES.items() if name in deciding]
        neither = f"neither {' nor '.join(names)} has" if len(names) > 1 else f"{names[0]} has not"
        raise InputError(f"{neither} changed")
    return request.onboarding(run.model_slug, run.hf_repo_id)
