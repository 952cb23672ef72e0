"""Phase 4's Prefect tasks, and the requests upstream that earlier phases make."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from prefect import get_run_logger

from tasks import manifest, settings
from tasks.manifest import Upstream
from tasks.publish import checklist, render
from tasks.publish.base import Branch, NothingNewError, OpensPullRequests, Post
from tasks.publish.publishers import Publishers
from tasks.publish.render import Subject
from tasks.publish.requested import is_public, note_request, public_address
from tasks.publish.scaffold import NothingToScaffoldError
from tasks.publish.sglang import of_another_model, sglang_by_hand, sglang_pull_request
from tasks.step import step


def _subject(path: Path, name: str) -> tuple[Subject, Publishers]:
    run = manifest.load(path)
    options = settings.load_settings(path.parent)
    return Subject.of(run, run.kernel(name), options), Publishers.of(options)


@step(2, "request-kernel", "Ask FlashInfer for the kernel, in an issue.")
def request_kernel(path: Path, name: str, phase2_status: str | None = None) -> str:
    """Open the kernel request, and record its URL in the manifest and the definition.

    Args:
        path: the run manifest.
        name: the kernel's definition name.
        phase2_status: what the definition has come to: of another one the request is made anew.
    """
    del phase2_status
    subject, publishers = _subject(path, name)
    url = subject.entry.fi_issue_url
    if not is_public(url):
        url = publishers.for_issues.open_issue(render.kernel_request(subject))
        manifest.update_kernel(path, name, fi_issue_url=url)
        _say_manual(path, url)
    _note_request(subject, url)
    get_run_logger().info("kernel request: %s", url)
    return str(url)


def _left(name: str, url: str | None, site: OpensPullRequests | None) -> str | None:
    """Return a public pull request that there is no token to bring up to date with; say so."""
    if site or not is_public(url):
        return None
    why = "there is no token to bring it up to date with"
    get_run_logger().warning("%s: %s is left as it is: %s", name, url, why)
    return url


def _opened(publisher: OpensPullRequests, post: Post, branch: Branch) -> str:
    """Open a pull request; where all of it is there already, return where that is."""
    try:
        return publisher.open_pull_request(post, branch)
    except NothingNewError as error:
        get_run_logger().info("%s", error)
        return error.url


def _say_manual(path: Path, url: str) -> None:
    """Say in the manifest that what is in the outbox is for somebody to send."""
    if not is_public(url):
        manifest.record_upstream(path, {url: Upstream(state="manual")})


def _note_request(subject: Subject, url: str | None) -> None:
    if url:
        definition = subject.dataset / subject.files.definition
        note_request(definition, public_address(url, subject.workspace))


@step(2, "request-template", "Ask FlashInfer for the API's trace template, in an issue.")
def request_template(path: Path, name: str, phase2_status: str | None = None) -> str:
    """Open the template request, one for all kernels of an API, and record its URL.

    Args:
        path: the run manifest.
        name: the kernel's definition name.
        phase2_status: what the definition has come to: of another one the request is made anew.
    """
    del phase2_status
    subject, publishers = _subject(path, name)
    url = subject.entry.fi_trace_template_request_url
    if not is_public(url):
        url = publishers.for_issues.open_issue(render.template_request(subject))
        manifest.update_kernel(path, name, fi_trace_template_request_url=url)
        _say_manual(path, url)
    get_run_logger().info("template request: %s", url)
    return str(url)


@step(
    3,
    "prepare-sglang-pr",
    "Open the draft of the SGLang pull request without which nothing can be collected.",
)
def prepare_sglang(path: Path, name: str, named: Mapping[str, str] | None = None) -> str:
    """Open SGLang's draft and record its URL, or that of the one that somebody named.

    Args:
        path: the run manifest.
        name: the kernel's definition name.
        named: definition -> the pull request that somebody named for it.
    """
    subject, publishers = _subject(path, name)
    url = (
        (named or {}).get(name)
        or of_another_model(subject)
        or _draft(subject, publishers, named or {})
    )
    manifest.update_kernel(path, name, sglang_pr_url=url)
    _say_manual(path, url)
    get_run_logger().info("SGLang pull request: %s", url)
    return url


def _draft(subject: Subject, publishers: Publishers, named: Mapping[str, str]) -> str:
    with tempfile.TemporaryDirectory(prefix="onboard-sglang-") as folder:
        try:
            post, branch = sglang_pull_request(subject, Path(folder), named)
        except NothingToScaffoldError as error:  # only a person can write it
            return publishers.outbox.open_issue(sglang_by_hand(subject, str(error)))
        return publishers.for_branches.open_pull_request(post, branch)


@step(
    4, "publish-dataset", "Open the dataset pull request with everything staged for the definition."
)
def publish_dataset(path: Path, name: str) -> str:
    """Open the dataset pull request, if its checklist holds, and record its URL."""
    subject, publishers = _subject(path, name)
    log = get_run_logger()
    known = subject.manifest.pull_requests(name).flashinfer_trace_pr
    if left := _left(name, known, publishers.hub):
        return left
    # The definition may have been staged again since the kernel was requested.
    _note_request(subject, subject.entry.fi_issue_url)
    checked = checklist.check_dataset(subject).require()
    for found in checked.findings:
        if not found.ok:
            log.warning("%s: %s: %s", name, found.item, found.message)
    post, branch = render.dataset_pull_request(subject, checked)
    url = _opened(publishers.for_the_dataset, post, branch)
    manifest.record_pull_request(path, name, flashinfer_trace_pr=url)
    _say_manual(path, url)
    log.info("dataset pull request: %s", url)
    return url


@step(4, "publish-coverage", "Open the coverage-document pull request, which links the dataset's.")
def publish_coverage(path: Path, name: str, dataset_pr: str) -> str:
    """Open the coverage pull request, or bring it up to date, and record its URL.

    It links the dataset's: while that is in the outbox, so is this.
    """
    subject, publishers = _subject(path, name)
    log = get_run_logger()
    known = subject.manifest.pull_requests(name).flashinfer_bench_pr
    if left := _left(name, known, publishers.github):
        return left
    upstream = publishers.github is not None and is_public(dataset_pr)
    publisher = publishers.for_branches if upstream else publishers.outbox
    clone = settings.load_settings(path.parent).clone("flashinfer_bench")
    with tempfile.TemporaryDirectory(prefix="onboard-coverage-") as folder:
        edited = Path(folder, "model_coverage.mdx")
        post, branch = render.coverage_pull_request(subject, clone, dataset_pr, edited)
        checklist.check_coverage(subject, post, branch, dataset_pr, upstream=upstream).require()
        url = _opened(publisher, post, branch)
    manifest.record_pull_request(path, name, flashinfer_bench_pr=url)
    _say_manual(path, url)
    log.info("coverage pull request: %s", url)
    return url
