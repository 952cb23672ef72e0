"""What runs show in the UI: pages, plots and progress, and how runs are found there."""

from __future__ import annotations

import base64
import datetime as dt
import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from prefect import flow, task
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import Artifact as Shown

from flows.report import Report
from tasks import files, manifest
from tasks.collect import task as collecting
from tasks.collect.place import Place
from tasks.collect.realism import Extent, plot, realism
from tasks.collect.session import Progress
from tasks.manifest import KernelEntry, PullRequests, RunManifest
from tasks.step import artifact_key
from tests.flow.test_branches import request
from tests.unit.test_serve import CONFIG, NOT_SAMPLED, SPECS, stage

served = pytest.mark.usefixtures("prefect_server")

SLUG = "shown"
ASKED, FAILING, FOREIGN, WAITING = "scale_rows_w8", "scale_rows_w2", "scale_rows_w4", NOT_SAMPLED[0]
TOKEN = "hf_" + "a" * 30
HOSTILE = (
    "a | b `c` ](javascript:alert(1)) [d](javascript:alert(2)) <img src=x onerror=alert(3)> "
    f"<javascript:alert(4)> @all <!-- onboard:x:y --> ```\n# e\n{TOKEN} https://u:p@x.y/z"
)


def until(what: str, ask: Callable[[], bool]) -> None:
    """Ask until it holds."""
    deadline = time.monotonic() + 60
    while not ask():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


def shown(key: str) -> Shown:
    """The artifact of a key as it is now."""
    found = Artifact.get(key)
    assert isinstance(found, Shown), key
    return found


def read(markdown: str) -> Iterator[Token]:
    """All tokens of a text, read by whoever lets pass all links there are."""
    reader = MarkdownIt("commonmark").enable("table")
    reader.validateLink = lambda url: True
    for token in reader.parse(markdown):
        yield token
        yield from token.children or ()


def links(markdown: str) -> set[str]:
    """Where a text's links lead; it has no HTML and no picture."""
    tokens = list(read(markdown))
    assert not {token.type for token in tokens} & {"html_block", "html_inline", "image"}
    return {str(token.attrs["href"]) for token in tokens if token.type == "link_open"}


def table(markdown: str) -> dict[str, str]:
    """The first two columns of a text's tables."""
    cells = [token.content for token in _cells(markdown)]
    return dict(zip(cells[::2], cells[1::2], strict=True))


def _cells(markdown: str) -> Iterator[Token]:
    for before, token in pairwise(read(markdown)):
        if before.type == "td_open":
            yield token


def kernels() -> list[KernelEntry]:
    """One kernel of each end: requested from FlashInfer, waiting, failing, without a reference."""
    made = {"phase1_status": "new", "phase2_status": "done", "phase2_method": "supplied"}
    new: dict[str, dict[str, Any]] = {
        ASKED: {**made, "fi_status": "fi_missing", "evidence": [HOSTILE, "SGLang: a.py:3"]},
        WAITING: {
            **made,
            "op_type": "sampling",
            "fi_status": "fi_supported",
            "sgl_status": "sgl_missing",
            "server_flags": ["--sampling-backend", "flashinfer"],
            "spec": SPECS[WAITING].model_dump(mode="json"),
        },
        FAILING: {**made, "sgl_status": "sgl_integrated", "phase2_notes": [HOSTILE]},
        FOREIGN: {"phase1_status": "new", "fi_status": "fi_missing"},
    }
    return [
        KernelEntry.model_validate({"definition_name": name, "op_type": "scaling", **fields})
        for name, fields in new.items()
    ]


def write_manifest(workspace: Path, slug: str, entries: list[KernelEntry]) -> Path:
    """Write a manifest with what phase 1, and phase 2 of some, left behind."""
    day = dt.date(2026, 1, 2)
    path = workspace / manifest.file_name(slug, day)
    manifest.create(path, RunManifest(model_slug=slug, hf_repo_id=None, date=day, kernels=entries))
    return path


def named(name: str, *tags: str) -> list[str]:
    """The states of the flow runs that the UI finds by a part of the name, and tags."""
    wanted = FlowRunFilter(
        name=FlowRunFilterName(like_=name), tags=FlowRunFilterTags(all_=list(tags))
    )
    with get_client(sync_client=True) as client:
        return [run.state_name or "" for run in client.read_flow_runs(flow_run_filter=wanted)]


@served
@pytest.mark.flow
@pytest.mark.bench_extra
def test_every_kernel_has_a_page_whatever_became_of_it(workspace: Path) -> None:
    from flows.onboard import onboard_model

    path = write_manifest(workspace, SLUG, kernels())
    asked = request(workspace, model_name=SLUG, hf_repo_id=None, config=None, phases=(2, 3))
    state = onboard_model(asked, return_state=True)
    assert state.message == "1 defined, 1 failed, 1 needs_reference, 1 waiting"
    found = manifest.load(path)
    pages = {
        entry.definition_name: str(
            shown(f"kernel-{SLUG}-{entry.definition_name.replace('_', '-')}").data
        )
        for entry in found.kernels
    }
    for name, page in pages.items():
        assert page == Report(found, path).page(found.kernel(name))
        assert page.startswith(f"# `{name}`\n")
        assert links(page) == set()
        assert TOKEN not in page
    assert {name: table(page)["state"] for name, page in pages.items()} == {
        ASKED: "defined",
        WAITING: "waiting",
        FAILING: "failed",
        FOREIGN: "needs_reference",
    }
    assert table(pages[WAITING])["server flags"] == "--sampling-backend flashinfer"
    assert table(pages[WAITING])["SGLang"] == "missing"
    assert f"kernel request: `{workspace}/outbox/issues/" in pages[ASKED]
    assert "- SGLang: a.py:3" in pages[ASKED]
    assert f"SGLang: `{workspace}/outbox/" in pages[WAITING]
    assert f"```\n{found.kernel(FAILING).error}\n```" in pages[FAILING]
    assert f"--only {FOREIGN} --reference FILE.py`" in pages[FOREIGN]
    assert links(str(shown(f"report-{SLUG}").data)) == set()

    # The runs behind them are found by name, by model and by kernel.
    assert named(f"{SLUG}/{WAITING}") == ["Waiting"]
    assert named(SLUG, f"model:{SLUG}", f"kernel:{FAILING}") == ["Failed"]
    assert len(named("", f"model:{SLUG}")) == 5  # the model's own among them


def test_pull_requests_and_issues_are_links() -> None:
    entry = kernels()[0].model_copy(
        update={
            "fi_issue_url": "https://github.com/flashinfer-ai/flashinfer/issues/1",
            "sglang_pr_url": "file:///srv/my%20outbox/a.md",
            "fi_trace_template_request_url": "javascript:alert(1)",
        }
    )
    pulls = PullRequests(
        flashinfer_trace_pr="https://huggingface.co/datasets/a/b/discussions/7",
        flashinfer_bench_pr="https://github.com/a/b/pull/2) [x](javascript:alert(1)",
    )
    run = RunManifest(
        model_slug="m",
        hf_repo_id="a/M",
        date=dt.date(2026, 1, 2),
        kernels=[entry],
        phase4={ASKED: pulls},
    )
    report = Report(run, Path("/srv/onboard/onboard_m_20260102.json"))
    for text in (report.page(entry), report.markdown()):
        assert links(text) == {
            "https://github.com/flashinfer-ai/flashinfer/issues/1",
            "https://huggingface.co/datasets/a/b/discussions/7",
        }
        assert "SGLang: `/srv/my outbox/a.md`" in text
        assert "template request: `javascript:alert(1)`" in text


@given(st.text(max_size=60).map(lambda text: HOSTILE[: len(text)] + text), st.integers(0, 6))
def test_foreign_text_stays_text(text: str, field: int) -> None:
    name, value = [
        ("evidence", [text]),
        ("phase2_notes", [text]),
        ("phase2_proof", [text]),
        ("error", text),
        ("baseline_status", text),
        ("fi_issue_url", text),
        ("server_flags", [text]),
    ][field]
    for status in ("done", manifest.NEEDS_REFERENCE):
        entry = kernels()[0].model_copy(update={"phase2_status": status, name: value})
        run = RunManifest(
            model_slug="m", hf_repo_id=None, date=dt.date(2026, 1, 2), kernels=[entry]
        )
        report = Report(run, Path("/w/onboard_m_20260102.json"))
        for shown_text in (report.page(entry), report.markdown()):
            assert not {link for link in links(shown_text) if not link.startswith("http")}
        # One of Prefect's UIs reads the cells of tables as markdown, the other shows them as is.
        for cell in report.table()[0].values():
            assert links(cell) == set()
        headings = [token.tag for token in read(report.page(entry)) if token.type == "heading_open"]
        assert headings[0] == "h1"
        assert "h1" not in headings[1:]


@served
@pytest.mark.flow
def test_realism_is_a_picture_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = realism(ASKED, [Extent(1), Extent(64)], [Extent(1), Extent(64), Extent(64)])
    picture = tmp_path / "plot.png"
    picture.write_bytes(plot([found]))

    @flow
    def show() -> None:
        collecting._show(ASKED, picture, found)

    show()
    text = str(shown("realism-scale-rows-w8").data)
    (image,) = (token for token in read(text) if token.type == "image")
    kind, _, data = str(image.attrs["src"]).partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == picture.read_bytes()
    rows = [line for line in text.splitlines() if line.startswith("| batch sizes, ")]
    assert rows == [
        "| batch sizes, kept | 2 | 1 | 1 | 1 | 64 | 64 | 2 |",
        "| batch sizes, all distinct | 3 | 1 | 1 | 64 | 64 | 64 | 2 |",
    ]

    monkeypatch.setattr(collecting, "create_markdown_artifact", away)
    show()  # the rows are there, whoever sees them


def away(*_: Any, **__: Any) -> None:
    """What calls of Prefect's client do while the server is away."""
    raise httpx.ConnectError("All connection attempts failed")


@served
@pytest.mark.flow
def test_a_sessions_progress_is_followed_and_an_outage_ends_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    session = stage(tmp_path, "planned", WAITING).session
    place = Place.of(tmp_path / "sessions", session)
    key = artifact_key("progress", SLUG, place.root.name)
    monkeypatch.setattr(collecting, "_PROGRESS_SECONDS", 0.01)
    tried: list[str] = []

    def failing(*_: Any, **__: Any) -> None:
        tried.append("")
        away()

    def serve(share: float) -> None:
        answered = Progress(requests=int(share * session.traffic.requests))
        files.write_text(place.served, answered.model_dump_json())

    def percent() -> Any:
        found = Artifact.get(key)
        return found and found.data

    @task
    def follow() -> None:
        with collecting._progress_shown(SLUG, session, place):
            until("the start", lambda: percent() == 0)
            serve(0.5)
            until("the half", lambda: percent() == 50)
            with monkeypatch.context() as outage:
                outage.setattr(collecting, "update_progress_artifact", failing)
                serve(0.75)
                until("two tries", lambda: len(tried) > 1)
            until("the outage's end", lambda: percent() == 75)
            files.write_text(place.served, "damaged")

    @task
    def follow_in_the_dark() -> None:
        monkeypatch.setattr(collecting, "create_progress_artifact", failing)
        serve(0.25)
        tried.clear()
        with collecting._progress_shown("dark", session, place):
            until("two tries in the dark", lambda: len(tried) > 1)

    @flow
    def collect() -> None:
        follow()
        follow_in_the_dark()

    collect()
    found = shown(key)
    assert found.data == 100
    assert found.task_run_id
    assert found.flow_run_id
    assert session.id in str(found.description)
    assert Artifact.get(artifact_key("progress", "dark", place.root.name)) is None
