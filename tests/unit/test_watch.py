"""What becomes of everything that was published: asked of real clients, recorded, acted upon."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow
from prefect.artifacts import Artifact
from prefect.client.schemas.objects import Artifact as Shown
from requests import ConnectionError as NoConnectionError

from flows.outcome import came_to
from flows.watch import Watched, WatchRequest, awaited, going_on, watch_upstream
from tasks import files, git, manifest
from tasks.coverage_doc import PATH, CoverageDocument
from tasks.errors import InputError, ManifestError, PublishError
from tasks.manifest import RepoShas, RunManifest, Upstream
from tasks.publish import watch
from tasks.publish.outbox import Outbox
from tasks.publish.publishers import Publishers
from tasks.publish.task import publish_coverage
from tasks.publish.watch import Sites
from tasks.request import OnboardRequest, remaining_steps
from tests.fakes.web import EVERY, Fault
from tests.unit import test_github_publisher as github_tests
from tests.unit import test_hub_publisher as hub_tests

NEW = {"op_type": "gemm", "phase1_status": "new", "phase2_status": "done"}
ASKED = NEW | {"fi_status": "fi_missing"}
WAITS = NEW | {"fi_status": "fi_supported", "sgl_status": "sgl_missing"}
DAY = dt.timedelta(days=1)
NOON = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)
STATES = get_args(Upstream.model_fields["state"].annotation)


@dataclass
class Upstreams:
    """A Hub and a GitHub, and a run that has one of everything open there."""

    hub: hub_tests.Place
    github: github_tests.Place
    path: Path

    def look(self, now: dt.datetime = NOON) -> watch.Look:
        publishers = Publishers(
            Outbox(self.path.parent / "outbox"), self.hub.publisher(), self.github.publisher
        )
        found = watch.look(self.run, Sites(publishers.state_of), now)
        manifest.record_upstream(self.path, found.told)
        return found

    @property
    def run(self) -> RunManifest:
        return manifest.load(self.path)

    def became(self) -> dict[str, str]:
        """Kind -> what has become of it and who said what, of all kernels."""
        run = self.run
        known = {
            kind: run.upstream_of(url)
            for entry in run.kernels
            for kind, url in run.links(entry).items()
        }
        return {k: " ".join(filter(None, (u.state, u.said))) for k, u in known.items() if u}

    def states(self) -> list[str]:
        return [self.run.state(entry) for entry in self.run.kernels]


@pytest.fixture
def upstreams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Upstreams]:
    hubs = hub_tests.place.__wrapped__(monkeypatch, tmp_path / "a")  # type: ignore[attr-defined]
    gits = github_tests.place.__wrapped__(tmp_path / "b")  # type: ignore[attr-defined]
    hub, github = next(hubs), next(gits)
    draft = replace(github_tests.POST, key="s", kind="sglang", draft=True)
    sglang = github.publisher.open_pull_request(draft, github.branch("s", "feat/s", "docs/s.md"))
    kernels: list[dict[str, Any]] = [
        {**NEW, "definition_name": "k", "sgl_status": "sgl_integrated"},
        {**WAITS, "definition_name": "waits", "sglang_pr_url": sglang},
        {
            **ASKED,
            "definition_name": "lacks",
            "fi_issue_url": github.publisher.open_issue(github_tests.ISSUE),
            "fi_trace_template_request_url": (tmp_path / "t.md").as_uri(),
        },
    ]
    pulls = {"flashinfer_trace_pr": hub.publish(), "flashinfer_bench_pr": github.open()}
    run = {"model_slug": "m", "hf_repo_id": "a/M", "date": "2026-11-21", "kernels": kernels}
    path = tmp_path / "onboard_m_20261121.json"
    files.write_json(path, {**run, "phase4": {"k": pulls}})
    yield Upstreams(hub, github, path)
    for place in (hubs, gits):
        assert next(place, None) is None


OPEN = {
    "dataset": "open",
    "coverage": "open",
    "SGLang": "draft",
    "kernel request": "open",
    "template request": "manual",
}


def test_everything_is_asked_for_once_and_recorded(upstreams: Upstreams) -> None:
    before = upstreams.run
    assert before.upstream is None
    for place in (upstreams.hub.hub, upstreams.github.hub):
        place.fail()
    found = upstreams.look()
    assert (found.failed, found.not_asked) == ({}, ())
    assert upstreams.became() == OPEN
    assert upstreams.states() == ["published", "waiting", "defined"]
    assert {known.checked is not None for known in (upstreams.run.upstream or {}).values()} == {
        True
    }
    assert upstreams.hub.hub.calls["discussion"] == 1
    calls = upstreams.github.hub.calls
    assert (calls["pulls/get"], calls["issues/get"]) == (2, 1)
    # Nothing else of the manifest has changed, and everything is news.
    after = upstreams.run
    assert manifest.dump(after.model_copy(update={"upstream": None})) == manifest.dump(
        before.model_copy(update={"upstream": None})
    )
    assert watch.news(before, after) == ["k", "waits", "lacks"]
    upstreams.look()
    assert watch.news(after, upstreams.run) == []


def test_what_is_merged_is_never_asked_for_again(upstreams: Upstreams) -> None:
    hub, github = upstreams.hub, upstreams.github
    hub.hub.merge(hub.repository, 1)
    upstreams.look()
    assert upstreams.states()[0] == "published"  # one of two
    for number in (1, 3):
        github.hub.merge(github.upstream, number)
    github.hub.close(github.upstream, 2)
    upstreams.look()
    merged = {"dataset": "merged", "coverage": "merged", "SGLang": "merged"}
    assert upstreams.became() == OPEN | merged | {"kernel request": "closed"}
    # The kernel waits on, for sources that have what was merged.
    assert upstreams.states() == ["merged", "waiting", "defined"]
    for place in (hub.hub, github.hub):
        place.fail()
    upstreams.look(NOON + 100 * DAY)
    assert not hub.hub.calls
    assert github.hub.calls["pulls/get"] == 0


def test_what_is_closed_has_its_reviewers_last_words(upstreams: Upstreams) -> None:
    hub, github = upstreams.hub, upstreams.github
    hub.hub.close(hub.repository, 1, "Not like\nthis.")
    github.hub.close(github.upstream, 1, "We have one.")
    upstreams.look(NOON)
    assert upstreams.became() == OPEN | {
        "dataset": "rejected Not like\nthis.",
        "SGLang": "rejected We have one.",
    }
    assert upstreams.states() == ["rejected", "rejected", "defined"]
    # Somebody may open it again, which is seen within a day.
    hub.hub.set_status(hub.repository.discussions[0], "open", "maintainer")
    (url,) = (url for url in upstreams.run.upstream or {} if "discussions" in url)
    manifest.record_upstream(
        upstreams.path, {url: Upstream(state="rejected", said="No.", checked=NOON)}
    )
    assert url not in upstreams.look(NOON + 0.9 * DAY).told
    assert upstreams.states()[0] == "rejected"
    assert url in upstreams.look(NOON + DAY).told
    assert upstreams.states()[0] == "published"


def test_requested_changes_are_seen(upstreams: Upstreams) -> None:
    github = upstreams.github
    coverage = int(upstreams.run.phase4["k"].flashinfer_bench_pr.rpartition("/")[2])  # type: ignore[union-attr]
    github.hub.review(github.upstream, coverage, "Mark it 🟡.")
    upstreams.look()
    assert upstreams.became() == OPEN | {"coverage": "changes_requested Mark it 🟡."}
    assert upstreams.states()[0] == "changes_requested"


def test_what_is_gone_stops_no_other(upstreams: Upstreams) -> None:
    upstreams.look()
    upstreams.hub.repository.discussions.clear()
    upstreams.github.upstream.issues[0].state = "closed"
    gone = f"{upstreams.github.hub.url}/{github_tests.NAME}/issues/99"
    odd = "https://[nowhere"
    manifest.update_kernel(
        upstreams.path, "lacks", fi_issue_url=gone, fi_trace_template_request_url=odd
    )
    found = upstreams.look()
    dataset = str(upstreams.run.phase4["k"].flashinfer_trace_pr)
    assert set(found.failed) == {gone, odd, dataset}
    assert "no such pull request any more" in found.failed[dataset]
    assert "is not there, or the token may not see" in found.failed[gone]
    assert "is no URL" in found.failed[odd]
    # What was known of it stays.
    assert upstreams.became() == {"dataset": "open", "coverage": "open", "SGLang": "rejected"}


def test_a_site_that_is_down_stops_no_other(upstreams: Upstreams) -> None:
    upstreams.hub.hub.fail(Fault(EVERY, times=1000))
    found = upstreams.look()
    assert list(found.failed) == [str(upstreams.run.phase4["k"].flashinfer_trace_pr)]
    assert upstreams.became() == {k: v for k, v in OPEN.items() if k != "dataset"}
    upstreams.hub.hub.fail()
    upstreams.look()
    assert upstreams.became() == OPEN


def test_without_a_token_nobody_is_asked(upstreams: Upstreams) -> None:
    publishers = Publishers(Outbox(upstreams.path.parent / "outbox"))
    found = watch.look(upstreams.run, Sites(publishers.state_of), NOON)
    assert len(found.not_asked) == 4
    assert {known.state for known in found.told.values()} == {"manual"}
    assert found.failed == {}


def refusing(error: Exception | None, down: str) -> tuple[Callable[[str], Upstream], list[str]]:
    """Return a site's answers, and what it was asked for."""
    asked: list[str] = []

    def state_of(url: str) -> Upstream:
        asked.append(url)
        if down in url:
            raise PublishError(f"{url}: no answer") from error
        return Upstream(state="open")

    return state_of, asked


URLS = [f"https://{site}/a/b/pull/{number}" for number in range(1, 7) for site in ("down", "up")]


@pytest.mark.parametrize(("error", "times"), [(NoConnectionError(), 3), (None, 6), (KeyError(), 6)])
def test_a_site_that_does_not_answer_is_left_alone_in_the_end(
    error: Exception | None, times: int
) -> None:
    """Its clients are patient: a hundred pull requests would be waited for all day."""
    state_of, asked = refusing(error, "down")
    sites = Sites(state_of)
    for _ in range(2):
        for url in URLS:
            if "up" in url:
                assert sites.ask(url)
                continue
            with pytest.raises(PublishError):
                sites.ask(url)
    assert sum("down" in url for url in asked) == times
    assert sum("up" in url for url in asked) == 6  # each of them once


def run_of(*entries: dict[str, Any], **fields: Any) -> RunManifest:
    named = [{"definition_name": f"k{number}", **entry} for number, entry in enumerate(entries)]
    head = {"model_slug": "m", "hf_repo_id": "a/M", "date": "2026-11-21"}
    return RunManifest.model_validate({**head, "kernels": named, **fields})


PAIR = {"flashinfer_trace_pr": "d", "flashinfer_bench_pr": "c"}
INTEGRATED = NEW | {"fi_status": "fi_supported", "sgl_status": "sgl_integrated"}
EXISTING = NEW | {"phase1_status": "existing"}


@pytest.mark.parametrize(
    ("entry", "became", "state"),
    [
        (INTEGRATED, {}, "published"),
        (INTEGRATED, {"d": "manual", "c": "manual"}, "published"),
        (INTEGRATED, {"d": "merged", "c": "open"}, "published"),
        (INTEGRATED, {"d": "draft", "c": "open"}, "published"),
        (INTEGRATED, {"d": "merged", "c": "merged"}, "merged"),
        (INTEGRATED, {"d": "merged", "c": "changes_requested"}, "changes_requested"),
        (INTEGRATED, {"d": "rejected", "c": "changes_requested"}, "rejected"),
        (INTEGRATED | {"error": "broke"}, {"d": "rejected"}, "failed"),
        # Once it is merged, the dataset has it.
        (EXISTING, {}, "existing"),
        (EXISTING, {"d": "merged", "c": "open"}, "existing"),
        (EXISTING, {"d": "merged", "c": "merged"}, "merged"),
        (EXISTING, {"d": "merged", "c": "rejected"}, "rejected"),
        # A request is no pull request: the definition is published alone.
        (ASKED | {"fi_issue_url": "i"}, {"i": "rejected"}, "published"),
    ],
)
def test_state_of_what_is_published(
    entry: dict[str, Any], became: dict[str, str], state: str
) -> None:
    known = {url: {"state": value} for url, value in became.items()}
    run = run_of(entry, phase4={"k0": PAIR}, upstream=known)
    assert run.state(run.kernels[0]) == state


@pytest.mark.parametrize("became", [None, *STATES])
def test_state_of_what_waits(became: str | None) -> None:
    known = {"s": {"state": became}} if became else {}
    run = run_of(WAITS | {"sglang_pr_url": "s"}, upstream=known)
    assert run.state(run.kernels[0]) == ("rejected" if became == "rejected" else "waiting")


@given(st.dictionaries(st.sampled_from("dcsit"), st.sampled_from(STATES)))
def test_nothing_is_done_again_because_of_what_became_of_it(became: dict[str, str]) -> None:
    known = {url: {"state": state} for url, state in became.items()}
    request = OnboardRequest(model_name="m", workspace=Path("/nowhere"))
    told = run_of(
        INTEGRATED | {"phase3_status": "done"},
        WAITS | {"sglang_pr_url": "s"},
        ASKED | {"fi_issue_url": "i", "fi_trace_template_request_url": "t"},
        phase4={"k0": PAIR, "k2": PAIR},
        upstream=known,
    )
    assert [remaining_steps(told, entry, request) for entry in told.kernels] == [(), (), ()]


def test_a_time_without_a_zone_is_refused(tmp_path: Path) -> None:
    run = manifest.dump(run_of(INTEGRATED))
    known = {"d": {"state": "rejected", "checked": "2026-11-21T12:00:00"}}
    path = tmp_path / "onboard_m_20261121.json"
    path.write_text(json.dumps({**run, "upstream": known}))
    with pytest.raises(ManifestError, match=r"field upstream\.d\.checked: .*timezone"):
        manifest.load(path)


# What goes on.

SHAS = {"sglang": "s2", "flashinfer": "f2", "flashinfer_bench": "b2"}
NOW, OLD = {"sglang": "s2", "flashinfer": "f2"}, {"sglang": "s1", "flashinfer": "f2"}
WATCH = WatchRequest(workspace=Path("/nowhere"))


@pytest.mark.parametrize(
    ("entries", "shas", "became", "reason"),
    [
        ([WAITS | {"sglang_pr_url": "s"}], OLD, {}, ""),
        ([WAITS | {"sglang_pr_url": "s"}], NOW, {}, "neither SGLang nor FlashInfer has changed"),
        ([WAITS | {"sglang_pr_url": "s"}], NOW, {"s": "merged"}, ""),
        # Somebody else may have done it.
        ([WAITS | {"sglang_pr_url": "s"}], OLD, {"s": "rejected"}, ""),
        ([ASKED | {"fi_issue_url": "i"}], OLD, {}, "FlashInfer has not changed"),
        ([ASKED | {"fi_issue_url": "i"}], NOW | {"flashinfer": "f1"}, {}, ""),
        ([ASKED | {"fi_issue_url": "i"}], NOW, {"i": "closed"}, ""),
        ([ASKED | {"fi_issue_url": "i"}], NOW, {"i": "rejected"}, "FlashInfer has not changed"),
        ([ASKED | {"fi_issue_url": "i"}, WAITS | {"sglang_pr_url": "s"}], OLD, {}, ""),
        # What the model's other kernels have is no reason.
        ([WAITS | {"sglang_pr_url": "s"}, INTEGRATED], NOW, {"d": "merged"}, "neither"),
    ],
)
def test_what_goes_on(
    entries: list[dict[str, Any]], shas: dict[str, str], became: dict[str, str], reason: str
) -> None:
    known = {url: {"state": state} for url, state in became.items()}
    run = run_of(*entries, upstream=known, phase4={"k1": PAIR})
    run.repo_shas = RepoShas.model_validate(shas)
    assert any(awaited(run))
    if reason:
        with pytest.raises(InputError, match=reason):
            going_on(run, SHAS, WATCH)
    else:
        assert going_on(run, SHAS, WATCH).model_name == "m"


@pytest.mark.parametrize("entry", [INTEGRATED, EXISTING, WAITS, ASKED, NEW | {"sgl_status": "n/a"}])
def test_what_asked_for_nothing_does_not_wait(entry: dict[str, Any]) -> None:
    assert not list(awaited(run_of(entry)))


def test_open_coverage_pull_requests_are_seen_to_once_for_each_document(tmp_path: Path) -> None:
    entries = [INTEGRATED] * len(STATES)
    urls = {f"k{number}": f"https://x/a/b/pull/{number}" for number in range(len(STATES))}
    pulls = {name: PAIR | {"flashinfer_bench_pr": url} for name, url in urls.items()}
    path = tmp_path / "onboard_m_20261121.json"
    manifest.create(path, run_of(*entries, phase4=pulls))
    told = {
        url: Upstream.model_validate({"state": state})
        for url, state in zip(urls.values(), STATES, strict=True)
    }
    run = manifest.record_upstream(path, told)
    behind = watch.behind(run, told, "b1")
    assert {run.upstream_of(urls[name]).state for name in behind} == watch.OPEN  # type: ignore[union-attr]
    for name in behind:
        watch.record_base(path, urls[name], "b1")
    # A later look keeps it.
    run = manifest.record_upstream(path, told)
    assert watch.behind(run, told, "b1") == []
    assert watch.behind(run, told, "b2") == behind
    assert watch.behind(run, {}, "b2") == []


# The flow.


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[github_tests.Place]:
    """A GitHub, and a workspace whose settings lead there."""
    places = github_tests.place.__wrapped__(tmp_path)  # type: ignore[attr-defined]
    place = next(places)
    workspace = tmp_path / "workspace"
    options = {
        "publish": {"github_url": place.hub.api},
        "remotes": {"flashinfer_bench": str(place.upstream.git.path)},
    }
    files.write_text(workspace / "onboard.toml", tomli_w.dumps(options))
    monkeypatch.setenv("ONBOARD_GITHUB_TOKEN", place.token)
    monkeypatch.setattr("tasks.publish.github.Pace", lambda: github_tests.QUICK)
    yield replace(place, clone=workspace / "flashinfer-bench")
    assert next(places, None) is None


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_the_watch_sees_to_what_is_open_and_starts_what_may_go_on(
    shared: github_tests.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, names = shared.clone.parent, list(github_tests.ROWS)[:2]
    dataset = "https://huggingface.co/datasets/a/b/discussions/7"
    rows = [
        {**INTEGRATED, "phase3_status": "done", "definition_name": name, "op_type": "rmsnorm"}
        for name in names
    ]
    pulls = {name: {"flashinfer_trace_pr": dataset} for name in names}
    whole = run_of(*rows, phase4=pulls, model_slug="minimax-m2", hf_repo_id="MiniMaxAI/MiniMax-M2")
    path = workspace / manifest.file_name("minimax-m2", whole.date)
    manifest.create(path, whole)
    issue = shared.publisher.open_issue(github_tests.ISSUE)
    lacks = run_of(ASKED | {"fi_issue_url": issue}, repo_shas={"flashinfer": "f2"})
    manifest.create(workspace / manifest.file_name("m", lacks.date), lacks)
    (workspace / manifest.file_name("x", lacks.date)).write_text("{")
    started: list[str] = []

    def update_all(_: Path, more: list[str]) -> dict[str, str]:
        assert more == ["flashinfer_bench"]
        shared.update()
        return {**SHAS, "flashinfer_bench": git.short_sha(shared.clone)}

    def start_model(asked: OnboardRequest, commit: str, label: str) -> str:
        started.append(f"{asked.model_name}@{commit} {label}")
        return "id"

    monkeypatch.setattr("flows.watch.deployed", lambda: True)
    monkeypatch.setattr("flows.watch.check_crashes", lambda _: None)
    monkeypatch.setattr("flows.watch.update_all", update_all)
    monkeypatch.setattr("flows.watch.start_model", start_model)

    @flow
    def publish() -> None:
        for name in names:
            publish_coverage(path, name, dataset)

    def look() -> Watched:
        state = watch_upstream(WatchRequest(workspace=workspace), return_state=True)
        return came_to(state, Watched)

    shared.update()
    publish()
    first = look()
    assert first.rebased == names  # and nothing had to be done
    assert (first.waiting, first.failed) == ({"m": "FlashInfer has not changed"}, {})
    assert first.counts == "0 models go on, 1 wait"
    assert look().rebased == []

    # One of them lands, in the other's way, and the request is answered.
    shared.hub.merge(shared.upstream, 2)
    assert not shared.upstream.git.merged("main", "refs/pull/3/head")
    shared.hub.close(shared.upstream, 1, "It is in.")
    # What fails stops nothing, and is done the next time.
    shared.hub.fail(Fault("git-receive-pack", times=100))
    second = look()
    assert (second.rebased, list(second.failed)) == ([], names[1:])
    assert second.counts == "1 models go on, 0 wait, 1 could not be looked after"
    assert started == ["m@s2-f2 upstream"]
    shared.hub.fail()
    third = look()
    assert (third.rebased, third.failed, third.started) == (names[1:], {}, {"m": "id"})
    shared.hub.merge(shared.upstream, 3)
    after = CoverageDocument.parse(shared.upstream.git.git("show", f"main:{PATH}") + "\n")
    assert {after.statuses(github_tests.MODEL)[name] for name in names} == {"✅"}
    look()
    run = manifest.load(path)
    assert [run.links(entry)["coverage"].rpartition("/")[2] for entry in run.kernels] == ["2", "3"]
    shown = Artifact.get("report-minimax-m2")
    assert isinstance(shown, Shown)
    assert f"{names[1]}`: [dataset]({dataset}), [coverage]" in str(shown.data)
    assert str(shown.data).count("/pull/3) (merged)") == 1
