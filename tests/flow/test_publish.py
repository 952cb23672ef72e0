"""Publishing a run to a local Hub and a local GitHub: everything once, whatever goes wrong."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.utils import enable_progress_bars
from huggingface_hub.utils._http import default_client_factory
from prefect.client.orchestration import get_client
from prefect.logging.handlers import APILogHandler
from prefect.settings import get_current_settings
from typer.testing import CliRunner

from flows.cli import app
from tasks import manifest
from tasks.coverage_doc import PATH, CoverageDocument
from tasks.define.reference_test import render
from tasks.define.staged import fingerprint
from tasks.git import AUTHOR, git
from tasks.manifest import KernelEntry, RunManifest
from tasks.ops.base import KernelSpec
from tasks.publish import github as github_module
from tasks.publish import hub as hub_module
from tasks.publish import task
from tasks.publish.base import LARGEST_FILE, marker
from tasks.publish.publishers import Publishers
from tasks.repos import clone
from tasks.request import OnboardRequest, Step, remaining_steps
from tasks.settings import load_settings
from tasks.validate import bench
from tests.conftest import DATA, copy_workspace
from tests.fakes.github import GitHub
from tests.fakes.github_state import Repository
from tests.fakes.hub import Hub
from tests.fakes.hub import Repository as Dataset
from tests.fakes.web import EVERY, Answer, Fault, Request
from tests.unit.test_checklist import (
    BLOBS,
    COLLECTED,
    DEFINITION,
    MANIFEST,
    NAME,
    ROWS,
    TEST,
    TRACES,
)
from tests.unit.test_github_publisher import QUICK
from tests.unit.test_ops import specs
from tests.unit.test_supplied import RUN, SCHEMA
from tests.unit.test_supplied import TEST as FAMILY

pytestmark = pytest.mark.flow

LACKING, OTHER = "scale_rows_w4", "scale_rows_w8"
WAITING = "top_k_sampling_from_probs_v151936"
API = "flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper"
SHARED = "sampling.llama"
FORK = multiprocessing.get_context("fork")
FIRST = {"README.md": b"# Traces\n"}
BENCH, FLASHINFER, SGLANG = (
    "flashinfer-ai/flashinfer-bench",
    "flashinfer-ai/flashinfer",
    "sgl-project/sglang",
)
TRACE = "flashinfer-ai/flashinfer-trace"
STEPS = {
    Step.REQUEST_KERNEL: task.request_kernel,
    Step.REQUEST_TEMPLATE: task.request_template,
    Step.PREPARE_SGLANG: task.prepare_sglang,
    Step.PUBLISH_DATASET: task.publish_dataset,
}


def define(workspace: Path, name: str) -> KernelEntry:
    """Stage a definition that FlashInfer lacks, as phase 2 would; return its entry."""
    tags = ["stage:test", "status:unverified", "model:llama"]
    definition = {"name": name, "op_type": "scaling", **SCHEMA, "tags": tags, "reference": RUN}
    test = render(KernelSpec(name=name, op_type="scaling", variant="", axes={}), FAMILY)
    dataset = workspace / "flashinfer-trace"
    for path, text in (
        (f"definitions/scaling/{name}.json", json.dumps(definition)),
        (f"tests/references/test_{name}.py", test),
    ):
        (dataset / path).parent.mkdir(parents=True, exist_ok=True)
        (dataset / path).write_text(text)
    return KernelEntry(
        definition_name=name,
        op_type="scaling",
        phase1_status="new",
        fi_status="fi_missing",
        sgl_status="n/a",
        phase2_status="done",
        phase2_method="supplied",
        phase2_proof=["two rows"],
        phase2_versions={"torch": "2.13.0"},
        phase2_fingerprint=fingerprint(definition, test),
        phase3_status="skipped (fi_missing)",
    )


@pytest.fixture(scope="module")
def made(cloned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which all is made and nothing published: one kernel was collected on a GPU."""
    root = copy_workspace(cloned, tmp_path_factory.mktemp("made") / "workspace")
    with tarfile.open(DATA / "h200" / "served.tar.xz") as archive:
        archive.extractall(root, filter="data")
    collected = manifest.load(root / MANIFEST).kernels[0]
    test = render(KernelSpec.model_validate(collected.spec))
    (root / TEST).parent.mkdir(parents=True, exist_ok=True)
    (root / TEST).write_text(test)
    proved = fingerprint(json.loads((root / DEFINITION).read_text()), test)
    waiting = KernelEntry(
        definition_name=WAITING,
        op_type="sampling",
        phase1_status="new",
        fi_status="fi_supported",
        fi_trace_template=True,
        sgl_status="sgl_missing",
        phase2_status="done",
        spec=specs("Qwen--Qwen3-30B-A3B")[WAITING].model_dump(mode="json"),
    )
    lacking = [define(root, name) for name in (LACKING, OTHER)]

    def complete(run: RunManifest) -> None:
        run.kernels = [*lacking, *run.kernels, waiting]

    manifest.update_kernel(
        root / MANIFEST, NAME, phase2_fingerprint=proved, fi_trace_template=False
    )
    manifest.update(root / MANIFEST, complete)
    return root


@dataclass
class Place:
    """A workspace, and the sites that it may publish to."""

    workspace: Path
    hub: Hub
    github: GitHub
    dataset: Dataset
    tokens: dict[str, str]
    environment: pytest.MonkeyPatch
    printed: str = ""

    @property
    def path(self) -> Path:
        return self.workspace / MANIFEST

    @property
    def run(self) -> RunManifest:
        return manifest.load(self.path)

    def give(self, *names: str) -> None:
        """Set tokens."""
        for name in names:
            self.environment.setenv(name, self.tokens[name])

    def publish(self, *options: str) -> int:
        """Run `onboard publish`."""
        self.forget_calls()
        arguments = ["publish", "--workspace", str(self.workspace), *options]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        self.printed += done.output
        return done.exit_code

    def publish_directly(self) -> None:
        """Do what is left of the run, kernel by kernel as the flow does, up to the first error."""
        asked = OnboardRequest(model_name="llama", workspace=self.workspace, phases=(4,))
        with self.environment.context() as patched:
            patched.setattr(task, "get_run_logger", logging.getLogger)
            for name in [entry.definition_name for entry in self.run.kernels]:
                run = self.run
                for step in remaining_steps(run, run.kernel(name), asked):
                    if step is Step.PUBLISH_COVERAGE:
                        dataset = self.run.phase4[name].flashinfer_trace_pr
                        task.publish_coverage.fn(self.path, name, str(dataset))
                    else:
                        STEPS[step].fn(self.path, name)

    def forget_calls(self) -> None:
        self.hub.seen.clear()
        self.github.seen.clear()

    def named(self, name: str) -> Repository:
        (found,) = (r for r in self.github.repositories if r.name == name)
        return found

    def texts(self, name: str) -> dict[str, str]:
        """Titles and texts of a repository's issues and pull requests."""
        return {issue.title: issue.body for issue in self.named(name).issues}

    def pulls(self) -> dict[str, str]:
        """Titles and texts of the dataset's pull requests."""
        return {p.title: p.events[0]["data"]["latest"]["raw"] for p in self.dataset.discussions}

    def markers(self) -> Counter[str]:
        """How often there is something of each kind, for each key."""
        texts = [issue.body for r in self.github.repositories for issue in r.issues]
        return Counter(
            text.rstrip().rpartition("\n")[2] for text in (*texts, *self.pulls().values())
        )

    def writes(self) -> list[str]:
        """What changed something at a site since the last run began."""
        reads = {"paths-info", "preupload", "git-upload-pack"}
        both = (*self.hub.seen, *self.github.seen)
        return [
            f"{c.method} {c.target}" for c in both if c.method != "GET" and c.endpoint not in reads
        ]

    def urls(self) -> dict[str, dict[str, str]]:
        return {entry.definition_name: self.run.links(entry) for entry in self.run.kernels}

    def errors(self) -> dict[str, str]:
        """The manifest's errors."""
        return {e.definition_name: e.error for e in self.run.kernels if e.error}


EVERYTHING = Counter(
    marker(key, kind)
    for key, kind in (
        *((name, "kernel-request") for name in (LACKING, OTHER)),
        (API, "template-request"),
        *((name, "dataset") for name in (LACKING, OTHER, NAME)),
        *((f"{name}.llama", "coverage") for name in (LACKING, OTHER, NAME)),
        (SHARED, "sglang"),
    )
)
BOTH = ("ONBOARD_HF_TOKEN", "ONBOARD_GITHUB_TOKEN")


@pytest.fixture
def place(
    made: Path, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    workspace = copy_workspace(made, tmp_path / "workspace")
    clock = SimpleNamespace(sleep=lambda _: None)
    monkeypatch.setattr("tenacity.nap.time", clock)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(github_module, "Pace", lambda: QUICK)
    # What takes torch to say of a dataset is tested with the validator.
    said = {"reference_build": "not run", "flashinfer_bench": {"version": None, "models": ""}}
    monkeypatch.setattr(bench, "ask", lambda *_: said)
    hub_module._set_up.cache_clear()
    with Hub() as hub, GitHub(tmp_path / "github") as github:
        dataset = hub.repository(TRACE, FIRST, writers={"maintainer"})
        may = {"maintainer"}
        for name in (BENCH, SGLANG):
            bare = sample / "remotes" / f"{name.rpartition('/')[2]}.git"
            github.repository(name, bare, writers=may)
        github.repository(FLASHINFER, FIRST, writers=may)
        tokens = dict(zip(BOTH, (hub.user("contributor"), github.user("contributor")), strict=True))
        monkeypatch.setenv("ONBOARD_HF_ENDPOINT", hub.url)
        monkeypatch.setenv("ONBOARD_PUBLISH__GITHUB_URL", github.api)
        yield Place(workspace, hub, github, dataset, tokens, monkeypatch)
    enable_progress_bars()
    set_client_factory(default_client_factory)


@pytest.fixture
def served(place: Place, prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The same, with a Prefect server for the command."""
    url = get_current_settings().api.url
    assert url
    monkeypatch.setenv("PREFECT_API_URL", url)
    return place


def staged(workspace: Path, name: str) -> dict[str, bytes]:
    """What phases 2 and 3 left of a definition, by its path in the dataset."""
    dataset = workspace / "flashinfer-trace"
    listed = git("ls-files", "--others", cwd=dataset).splitlines()
    return {path: (dataset / path).read_bytes() for path in listed if name in path}


def check_complete(place: Place) -> None:
    """Check that everything is published, once, with what it is to have, and recorded."""
    assert place.markers() == EVERYTHING
    urls = place.urls()
    assert not place.errors()
    for name in (LACKING, OTHER, NAME):
        assert place.run.state(place.run.kernel(name)) == "published"
        (pull,) = (p for p in place.dataset.discussions if f"Add {name}: " in p.title)
        assert (
            urls[name]["dataset"] == f"{place.hub.url}/datasets/{TRACE}/discussions/{pull.number}"
        )
        changed = place.dataset.changes(pull)
        assert {path: blob and blob.content for path, blob in changed.items()} == staged(
            place.workspace, name
        )
        (coverage,) = (i for i in place.named(BENCH).issues if f" {name} " in i.title)
        assert urls[name]["coverage"] == f"{place.github.url}/{BENCH}/pull/{coverage.number}"
        assert urls[name]["dataset"] in coverage.body
        assert coverage.pull
        assert coverage.pull.head.name == "contributor/flashinfer-bench"
        assert coverage.pull.head.git.changed("main", coverage.pull.ref) == [("modified", PATH)]
    for name in (LACKING, OTHER):
        request = urls[name]["kernel request"]
        assert request.startswith(f"{place.github.url}/{FLASHINFER}/issues/")
        texts = place.texts(BENCH)
        assert request in texts[f"docs: mark {name} as covered for llama"]
        assert request in place.pulls()[f"Add {name}: definition + reference test"]
        definition = json.loads(
            (place.workspace / f"flashinfer-trace/definitions/scaling/{name}.json").read_text()
        )
        assert definition["description"].endswith(f" Kernel request: {request}.")
    (draft,) = place.named(SGLANG).issues
    assert draft.pull
    assert draft.pull.draft
    assert urls[WAITING] == {"SGLang": f"{place.github.url}/{SGLANG}/pull/{draft.number}"}
    assert urls[NAME]["template request"].startswith(f"{place.github.url}/{FLASHINFER}/issues/")
    assert not [url for of in urls.values() for url in of.values() if url.startswith("file:")]


def read_all(read: Callable[..., list[Any]]) -> Iterator[Any]:
    """Read what a Prefect server has, page by page."""
    for number in count():
        found = read(limit=200, offset=200 * number, sort=None)
        yield from found
        if len(found) < 200:
            return


def check_no_token(place: Place) -> None:
    """Check that no token is in anything that was written, printed, logged or shown."""
    APILogHandler().flush()
    with get_client(sync_client=True) as client:
        logs = [log.message for log in read_all(client.read_logs)]
        shown = [str(artifact.data) for artifact in read_all(client.read_artifacts)]
    texts = [*logs, *shown, place.printed, str(place.pulls())]
    texts += [issue.body for r in place.github.repositories for issue in r.issues]
    assert logs
    assert shown
    files = (path for path in place.workspace.rglob("*") if path.is_file())
    # The others are links to what was there before.
    written = [path.read_bytes() for path in files if path.stat().st_nlink == 1]
    assert place.path.read_bytes() in written
    for token in place.tokens.values():
        assert not [text for text in texts if token in text]
        assert not [content for content in written if token.encode() in content]


def test_everything_is_published_once(served: Place) -> None:
    served.give(*BOTH)
    assert served.publish() == 0, served.printed
    check_complete(served)
    assert (
        "12 rows"
        in served.pulls()[
            f"Add {NAME}: definition + reference test + baseline solution + workloads + traces"
        ]
    )
    assert not (served.workspace / "outbox").exists()

    before = served.path.read_bytes()
    assert served.publish() == 0
    assert served.printed.endswith("nothing to publish\n")
    assert not served.hub.seen
    assert not served.github.seen
    assert served.path.read_bytes() == before
    assert served.publish("--definitions", WAITING) == 1
    assert f"failed: {WAITING}: there is nothing to publish of it yet" in served.printed
    check_no_token(served)


def test_what_the_manifest_has_forgotten_is_found(place: Place) -> None:
    place.give(*BOTH)
    place.publish_directly()
    place.forget_calls()
    manifest.update(place.path, lambda run: setattr(run, "phase4", {}))
    for name in (LACKING, OTHER):
        manifest.update_kernel(place.path, name, fi_issue_url=None)
    manifest.update_kernel(place.path, NAME, fi_trace_template_request_url=None)
    manifest.update_kernel(place.path, WAITING, sglang_pr_url=None)
    place.publish_directly()
    assert place.hub.seen
    assert place.writes() == []
    check_complete(place)


# A run that dies.


DEATHS = (
    ("github", Fault("issues/create")),
    ("github", Fault("issues/create", after=True)),
    ("hub", Fault("commit")),
    ("hub", Fault("commit", after=True)),
    ("github", Fault("repos/create-fork", after=True)),
    ("github", Fault("git-receive-pack")),
    ("github", Fault("git-receive-pack", after=True)),
    ("github", Fault("pulls/create")),
    ("github", Fault("pulls/create", after=True)),
    ("hub", Fault("lfs-upload", after=True)),
    ("hub", Fault("commit", after=True)),
    ("github", Fault("git-receive-pack", after=True)),
    ("github", Fault("pulls/create", after=True)),
)
"""Where run after run dies, each going on where the last one did: at effects of both sites."""


def test_killed_run_after_run_there_is_one_of_everything(place: Place) -> None:
    place.give(*BOTH)
    for site, fault in DEATHS:
        started = threading.Event()
        child = FORK.Process(target=place.publish_directly)

        def kill(child: Any = child, started: threading.Event = started) -> None:
            started.wait(60)
            child.kill()

        server = {"hub": place.hub, "github": place.github}[site]
        server.fail(Fault(fault.endpoint, after=fault.after, act=kill))
        child.start()
        started.set()
        child.join(60)
        server.fail()
        assert child.exitcode == -signal.SIGKILL, (site, fault)
    place.publish_directly()
    check_complete(place)
    place.forget_calls()
    place.publish_directly()
    assert not place.hub.seen
    assert not place.github.seen


# What goes wrong with one definition.


def edit_lines(path: Path, change: Callable[[list[Any]], object]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    replace(path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())


def replace(path: Path, content: bytes) -> None:
    """Write a file that may be a hard link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def a_blob(workspace: Path) -> Path:
    return min((workspace / BLOBS).iterdir())


def too_large(workspace: Path) -> None:
    blob = a_blob(workspace)
    replace(blob, blob.read_bytes())
    os.truncate(blob, LARGEST_FILE + 1)  # sparse: no bytes are written


DAMAGE: dict[str, Callable[[Path], object]] = {
    "blobs: rows name": lambda root: a_blob(root).unlink(),
    "blobs: no row names": lambda root: shutil.copy(a_blob(root), root / BLOBS / "x.safetensors"),
    "traces: 1 x RUNTIME_ERROR": lambda root: edit_lines(
        root / TRACES, lambda lines: lines[0]["evaluation"].update(status="RUNTIME_ERROR")
    ),
    "file sizes: ": too_large,
}


def test_what_is_open_is_brought_up_to_date_when_it_is_named(served: Place) -> None:
    served.give(*BOTH)
    assert served.publish() == 0, served.printed
    before = served.urls()

    def without_the_last(lines: list[Any]) -> None:
        gone.append(lines.pop()["workload"]["uuid"])

    gone: list[str] = []
    edit_lines(served.workspace / ROWS, without_the_last)
    (uuid,) = gone
    edit_lines(
        served.workspace / TRACES,
        lambda lines: lines.remove(next(x for x in lines if x["workload"]["uuid"] == uuid)),
    )
    (blob,) = (served.workspace / BLOBS).glob(f"*{uuid}*")
    blob.unlink()
    collected = json.loads((served.workspace / COLLECTED).read_text())
    del collected["provenance"]["workloads"][uuid]
    replace(served.workspace / COLLECTED, json.dumps(collected).encode())
    assert served.publish() == 0
    assert served.printed.endswith("nothing to publish\n")

    assert served.publish("--definitions", NAME) == 0, served.printed
    check_complete(served)
    assert served.urls() == before
    assert len(staged(served.workspace, NAME)) > 10
    assert served.publish("--definitions", NAME) == 0
    assert not served.writes()

    # What nobody can bring up to date stays where it is.
    for token in BOTH:
        served.environment.delenv(token)
    assert served.publish("--definitions", NAME) == 0
    assert served.urls() == before
    assert not (served.workspace / "outbox").exists()


def test_a_damaged_manifest_stops_no_other_model(served: Place) -> None:
    damaged = served.workspace / "onboard_another_20260101.json"
    damaged.write_text("{")
    assert served.publish("--check") == 1
    assert "3 of 3 definitions may be published" in served.printed
    assert f"onboard: {damaged}: " in served.printed
    assert served.publish() == 1
    assert all(served.run.state(served.run.kernel(n)) == "published" for n in (LACKING, NAME))


def test_what_is_wrong_with_one_definition_stops_no_other(served: Place, made: Path) -> None:
    served.give(*BOTH)
    others = EVERYTHING.copy()
    del others[marker(NAME, "dataset")], others[marker(f"{NAME}.llama", "coverage")]
    folder = served.workspace / "flashinfer-trace"
    for said, damage in DAMAGE.items():
        damage(served.workspace)
        assert served.publish() == 1
        (error,) = served.errors().values()
        assert error.startswith(f"{NAME}: its dataset pull request is not opened: ")
        assert said in error
        assert served.run.state(served.run.kernel(NAME)) == "failed"
        assert served.markers() == others
        shutil.rmtree(folder / "blob")
        shutil.rmtree(folder / "traces")
        for part in ("blob", "traces"):
            copy = made / "flashinfer-trace" / part
            shutil.copytree(copy, folder / part, copy_function=os.link)
    assert served.publish() == 0
    check_complete(served)


def test_a_token_without_rights_and_a_repository_that_moved(served: Place) -> None:
    served.give(*BOTH)
    served.hub.move(served.dataset, "flashinfer-ai/elsewhere")
    served.github.move(served.named(SGLANG), "sgl-project/renamed")
    assert served.publish("--definitions", f"{LACKING},{WAITING}") == 1
    moved = f"{TRACE}: has moved to flashinfer-ai/elsewhere; if that is where to publish, set it"
    assert served.errors()[LACKING].startswith(moved)
    assert served.errors()[WAITING].startswith(f"{SGLANG}: has moved to sgl-project/renamed; ")

    served.hub.move(served.dataset, TRACE)
    del served.hub.moved["datasets", TRACE]
    served.environment.setenv("ONBOARD_HF_TOKEN", served.hub.user("reader", read_only=True))
    assert served.publish("--definitions", NAME) == 1
    assert (
        "the token (ONBOARD_HF_TOKEN, or the Secret block hf-token) may not"
        in (served.errors()[NAME])
    )
    asked = ((LACKING, "kernel-request"), (API, "template-request"))
    assert served.markers() == dict.fromkeys((marker(*of) for of in asked), 1)
    check_no_token(served)


def test_a_site_that_is_down_and_a_document_that_changes_meanwhile(served: Place) -> None:
    served.give(*BOTH)
    served.github.fail(Fault(EVERY, times=10**6, status=503))
    assert served.publish("--definitions", f"{NAME},{LACKING}") == 1
    assert all("GitHub fails (no); run it again later" in e for e in served.errors().values())
    assert len(served.errors()) == 2
    assert not served.markers()

    served.github.fail()
    upstream, route = served.named(BENCH), served.github.route
    before = upstream.git.sha("main")

    def others(request: Request) -> tuple[str, Callable[[], Answer]]:
        """Let somebody else rewrite the branch while the first edit of it is on its way."""
        if "flashinfer-bench.git" in request.path and "service=git-receive-pack" in request.target:
            served.github.route = route  # type: ignore[method-assign]
            fork = served.named("contributor/flashinfer-bench").git
            tip = fork.git("commit-tree", "main^{tree}", "-p", "main", "-m", "theirs")
            fork.update(f"refs/heads/feat/def-{LACKING}.llama", tip)
        return route(request)

    served.github.route = others  # type: ignore[method-assign]
    assert served.publish() == 1
    assert list(served.errors()) == [LACKING]
    assert "git push" in served.errors()[LACKING]
    fork = served.named("contributor/flashinfer-bench").git
    fork.git("update-ref", "-d", f"refs/heads/feat/def-{LACKING}.llama")

    # Another model's row lands: what was made for the document as it was is opened all the same.
    document = CoverageDocument.parse(upstream.git.git("show", f"{before}:{PATH}") + "\n")
    document.add_model("Somebody's", "LlamaForCausalLM")
    document.mark("Somebody's", LACKING, "scaling", "🟡")
    sha = upstream.git.commit("main", {PATH: document.render().encode()}, "docs: another model")
    assert upstream.git.sha("main") == sha != before
    assert served.publish() == 0
    check_complete(served)


# The outbox.


def test_what_is_in_the_outbox_is_sent_once_there_are_tokens(served: Place) -> None:
    served.publish_directly()
    outbox = served.workspace / "outbox"
    assert {url.partition(":")[0] for of in served.urls().values() for url in of.values()} == {
        "file"
    }
    for url in (url for of in served.urls().values() for url in of.values()):
        entry = Path(url.removeprefix("file://"))
        assert marker("", "").split("::")[0] in entry.read_text()
        assert os.access(entry.with_suffix(".sh"), os.R_OK)
        assert entry.with_suffix(".diff").exists() == (entry.parent.name == "pull-requests")
    journal = git("log", "--format=%H", cwd=outbox)
    assert served.publish() == 0
    assert served.printed.endswith("nothing to publish\n")

    # A token for one site: what links the other's stays in the outbox with it.
    served.give("ONBOARD_GITHUB_TOKEN")
    served.publish_directly()
    requests = {mark for mark in EVERYTHING if "-request" in mark or ":sglang" in mark}
    assert served.markers() == dict.fromkeys(requests, 1)
    assert "outbox" not in "".join(served.texts(FLASHINFER).values())
    assert served.publish() == 0
    assert served.printed.endswith("nothing to publish\n")

    served.give("ONBOARD_HF_TOKEN")
    assert served.publish("--check") == 0
    assert served.publish() == 0, served.printed
    check_complete(served)
    assert "outbox/" not in "".join((*served.texts(BENCH).values(), *served.pulls().values()))
    assert served.publish() == 0
    assert served.printed.endswith("nothing to publish\n")
    assert git("merge-base", journal.split()[0], "HEAD", cwd=outbox) == journal.split()[0]
    check_no_token(served)


def test_only_the_hub_has_a_token_at_first(place: Place) -> None:
    place.publish_directly()
    place.give("ONBOARD_HF_TOKEN")
    place.publish_directly()
    urls = place.urls()
    for name in (LACKING, OTHER, NAME):
        assert urls[name]["dataset"].startswith(place.hub.url)
        entry = Path(urls[name]["coverage"].removeprefix("file://"))
        assert urls[name]["dataset"] in entry.read_text()
    assert not place.github.seen
    place.give("ONBOARD_GITHUB_TOKEN")
    place.publish_directly()
    check_complete(place)


def test_what_is_on_main_already_is_published(place: Place) -> None:
    place.give(*BOTH)
    place.hub.push(place.dataset, staged(place.workspace, NAME))
    upstream, local = place.named(BENCH), place.workspace / "flashinfer-bench"
    document = CoverageDocument.read(local / PATH)
    document.add_model("llama", "LlamaForCausalLM")
    document.mark("llama", NAME, "gqa_paged", "✅")
    upstream.git.commit("main", {PATH: document.render().encode()}, "docs: somebody was faster")
    upstream.git.git("config", "uploadpack.allowFilter", "true")
    clone.update("flashinfer_bench", str(upstream.git.path), local)
    place.publish_directly()
    urls = place.urls()[NAME]
    path = DEFINITION.partition("/")[2]
    assert urls["dataset"] == f"{place.hub.url}/datasets/{TRACE}/blob/main/{path}"
    assert urls["coverage"] == f"{place.github.url}/{BENCH}/blob/main/{PATH}"
    assert not [title for title in (*place.pulls(), *place.texts(BENCH)) if f" {NAME}" in title]
    sites = Publishers.of(load_settings(place.workspace))
    became = [sites.state_of(url) for url in (urls["dataset"], urls["coverage"])]
    assert [known and known.state for known in became] == ["merged", "merged"]
    place.forget_calls()
    place.publish_directly()
    assert not place.hub.seen
    assert not place.github.seen


def test_what_only_a_person_can_begin_stays_in_the_outbox(place: Place) -> None:
    place.give(*BOTH)
    sampler = place.workspace / "sglang/python/sglang/srt/layers/sampler.py"
    text = sampler.read_text()
    called = "from flashinfer.sampling import top_k_sampling_from_probs\n"
    replace(sampler, f"{called}{text}".encode())
    git("commit", "--quiet", "--all", "-m", "Merge", cwd=sampler.parent, env=AUTHOR)
    place.publish_directly()
    entry = Path(place.urls()[WAITING]["SGLang"].removeprefix("file://"))
    assert entry.parent == place.workspace / "outbox" / "by-hand"
    assert entry.exists()
    assert not place.texts(SGLANG)
    before = git("log", cwd=place.workspace / "outbox")
    place.publish_directly()
    assert git("log", cwd=place.workspace / "outbox") == before


def test_the_check(served: Place) -> None:
    served.give(*BOTH)
    assert served.publish("--check", "--json") == 0
    (found,) = json.loads(served.printed)
    assert found["manifest"] == str(served.path)
    assert {item["definition"]: item["ready"] for item in found["definitions"]} == {
        LACKING: True,
        OTHER: True,
        NAME: True,
    }
    a_blob(served.workspace).unlink()
    served.printed = ""
    assert served.publish("--check", "--json") == 1
    (found,) = json.loads(served.printed)
    (wrong,) = (item for item in found["definitions"] if not item["ready"])
    assert wrong["definition"] == NAME
    failed = [item["item"] for item in wrong["dataset"] if item["blocks"] and not item["ok"]]
    assert failed == ["workloads", "blobs"]
    assert served.publish("--check", "--definitions", LACKING) == 0
    assert served.publish("--check", "--definitions", "nothing") == 2
    assert served.publish("--check", "--definitions", WAITING) == 1
    assert not served.hub.seen
    assert not served.github.seen
    assert not (served.workspace / "outbox").exists()
