"""Phase 4's Prefect tasks, and the requests upstream that earlier phases make."""

from __future__ import annotations

import tempfile
from pathlib import Path

from prefect import get_run_logger

from tasks import manifest, settings
from tasks.publish import render
from tasks.publish.base import Publisher
from tasks.publish.outbox import Outbox
from tasks.publish.render import Subject
from tasks.publish.requested import note_request, public_address
from tasks.step import step


def _subject(path: Path, name: str) -> tuple[Subject, Publisher]:
    run = manifest.load(path)
    options = settings.load_settings(path.parent)
    subject = Subject(
        manifest=run,
        entry=run.kernel(name),
        dataset=options.clone("flashinfer_trace"),
        collected=options.provenance(run.model_slug, name),
        workspace=options.workspace,
        sglang=options.clone("sglang"),
    )
    return subject, Outbox(options.outbox)


@step(2, "request-kernel", "Prepare the issue that asks FlashInfer for the kernel.")
def request_kernel(path: Path, name: str, phase2_status: str | None = None) -> str:
    """Open the kernel request, and record its URL in the manifest and the definition.

    Args:
        path: the run manifest.
        name: the kernel's definition name.
        phase2_status: what the definition has come to: of another one the request is made anew.
    """
    del phase2_status
    subject, publisher = _subject(path, name)
    url = subject.entry.fi_issue_url
    if not _is_sent(url):
        url = publisher.open_issue(render.kernel_request(subject))
        manifest.update_kernel(path, name, fi_issue_url=url)
    _note_request(subject, url)
    get_run_logger().info("kernel request: %s", url)
    return str(url)


def _is_sent(url: str | None) -> bool:
    """Whether an issue is upstream, where nobody but its readers changes it."""
    return bool(url) and not str(url).startswith("file:")


def _note_request(subject: Subject, url: str | None) -> None:
    if url:
        definition = subject.dataset / subject.files.definition
        note_request(definition, public_address(url, subject.workspace))


@step(2, "request-template", "Prepare the issue that asks FlashInfer for the API's trace template.")
def request_template(path: Path, name: str, phase2_status: str | None = None) -> str:
    """Open the template request, one for all kernels of an API, and record its URL.

    Args:
        path: the run manifest.
        name: the kernel's definition name.
        phase2_status: what the definition has come to: of another one the request is made anew.
    """
    del phase2_status
    subject, publisher = _subject(path, name)
    url = subject.entry.fi_trace_template_request_url
    if not _is_sent(url):
        url = publisher.open_issue(render.template_request(subject))
        manifest.update_kernel(path, name, fi_trace_template_request_url=url)
    get_run_logger().info("template request: %s", url)
    return str(url)


@step(
    3,
    "prepare-sglang-pr",
    "Prepare the SGLang pull request without which nothing can be collected.",
)
def prepare_sglang(path: Path, name: str) -> str:
    """Prepare the SGLang pull request and record its URL."""
    subject, publisher = _subject(path, name)
    url = publisher.open_issue(render.sglang_pull_request(subject))
    manifest.update_kernel(path, name, sglang_pr_url=url)
    get_run_logger().info("SGLang pull request: %s", url)
    return url


@step(
    4, "publish-dataset", "Open the dataset pull request with everything staged for the definition."
)
def publish_dataset(path: Path, name: str) -> str:
    """Open the dataset pull request and record its URL."""
    subject, publisher = _subject(path, name)
    # The definition may have been staged again since the kernel was requested.
    _note_request(subject, subject.entry.fi_issue_url)
    post, branch = render.dataset_pull_request(subject)
    url = publisher.open_pull_request(post, branch)
    manifest.record_pull_request(path, name, flashinfer_trace_pr=url)
    get_run_logger().info("dataset pull request: %s", url)
    return url


@step(4, "publish-coverage", "Open the coverage-document pull request, which links the dataset's.")
def publish_coverage(path: Path, name: str, dataset_pr: str) -> str:
    """Open the coverage pull request and record its URL."""
    subject, publisher = _subject(path, name)
    clone = settings.load_settings(path.parent).clone("flashinfer_bench")
    with tempfile.TemporaryDirectory(prefix="onboard-coverage-") as folder:
        edited = Path(folder, "model_coverage.mdx")
        post, branch = render.coverage_pull_request(subject, clone, dataset_pr, edited)
        url = publisher.open_pull_request(post, branch)
    manifest.record_pull_request(path, name, flashinfer_bench_pr=url)
    get_run_logger().info("coverage pull request: %s", url)
    return url
