"""Collecting from served sessions, on a real Prefect server and a stand-in for SGLang."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName
from prefect.client.schemas.objects import State
from prefect.states import Failed

from tasks import files, manifest
from tasks.collect.place import outcomes
from tasks.collect.request import CollectRequest
from tasks.collect.session import Session
from tasks.dataset import DefinitionFiles
from tasks.manifest import KernelEntry, RepoShas, RunManifest
from tests.unit.test_collect import definition_of
from tests.unit.test_serve import CONFIG, DECODE, FAKES, NOT_SAMPLED, PAGED, SPECS

pytestmark = [
    pytest.mark.flow,
    pytest.mark.bench_extra,
    pytest.mark.usefixtures("prefect_server"),
]

SHOWN = (f"{DECODE}1", f"{PAGED}1")
NEVER = NOT_SAMPLED[0]
SLUG = "tiny-llama"


@dataclass
class Run:
    """A workspace with a manifest, whose model a first run of the flow has served."""

    path: Path
    env: dict[str, str]
    first: State[Any]

    @property
    def dataset(self) -> Path:
        return self.path.parent / "flashinfer-trace"

    @property
    def attempts(self) -> dict[str, int]:
        """Session -> its launches."""
        found = {}
        for place in (self.path.parent / "collected" / SLUG / "sessions").iterdir():
            text = (place / "attempts.json").read_text()
            found[place.name.rsplit("-", 1)[0]] = len(json.loads(text)["attempts"])
        return found

    def collect(self, *names: str) -> State[Any]:
        return collect(self.path, self.env, names)

    def bytes(self) -> dict[str, bytes]:
        """The dataset, the manifest and the sessions, file by file."""
        kept = [self.path, *self.dataset.rglob("*"), *self.path.parent.glob("collected/**/*.json")]
        return {str(path): path.read_bytes() for path in kept if path.is_file()}


def collect(path: Path, env: dict[str, str], names: tuple[str, ...]) -> State[Any]:
    from flows.collect import collect_workloads

    asked = CollectRequest(
        manifest=path,
        definitions=names,
        model_path=str(path.parent),
        batch_sizes=(1, 3),
        isl=96,
        osl=8,
        rounds=1,
        server_env=env,
    )
    return collect_workloads(asked, return_state=True)


def task_runs(name: str) -> list[tuple[int, str]]:
    """Return how often each task run of a name was started, and how it ended, in order."""
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(
            task_run_filter=TaskRunFilter(name=TaskRunFilterName(any_=[name]))
        )
    found.sort(key=lambda run: run.created)
    return [(run.run_count, run.state_name or "") for run in found]


@pytest.fixture(scope="module")
def run(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    workspace = tmp_path_factory.mktemp("workspace")
    # What somebody recorded elsewhere is not what this flow has served.
    settings: dict[str, Any] = {"gpus": ["0"], "lease_dir": "leases", "incomplete_calls": True}
    settings["recorded_dumps"] = "recorded"
    (workspace / "onboard.toml").write_text(tomli_w.dumps({"collect": settings}))
    (workspace / "config.json").write_text(json.dumps(CONFIG))
    path = workspace / manifest.file_name(SLUG, dt.date(2026, 1, 2))
    kernels = []
    for name in (*SHOWN, NEVER):
        spec = SPECS[name]
        place = DefinitionFiles(spec.op_type, name)
        files.write_json(workspace / "flashinfer-trace" / place.definition, definition_of(spec))
        kernels.append(
            KernelEntry(
                definition_name=name,
                op_type=spec.op_type,
                phase1_status="new",
                fi_status="fi_supported",
                sgl_status="sgl_integrated",
                phase2_status="done",
                spec=spec.model_dump(mode="json"),
            )
        )
    found = RunManifest(
        model_slug=SLUG,
        hf_repo_id="tiny/llama",
        date=dt.date(2026, 1, 2),
        repo_shas=RepoShas(),
        kernels=kernels,
    )
    manifest.create(path, found)
    once = workspace / "crashed"
    env = {"FAKE_SGLANG_FAULT": "crash_after=2", "FAKE_SGLANG_ONCE": str(once)}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAKES)
        patch.setenv("PYTHONPATH", str(FAKES))
        yield Run(path, env, collect(path, env, SHOWN))


def test_a_crash_is_tried_again_and_ends_in_rows(run: Run) -> None:
    assert run.first.is_completed()
    assert str(run.first.message).startswith("2 definitions have workloads, 0 failed, 0 cannot")
    rows = run.first.result().rows
    assert set(rows) == set(SHOWN)
    assert all(rows.values())
    # One session served both: it crashed, and the task's own retry went on.
    session = "tp1-ep1-ps1-paged-prefill"
    assert run.attempts == {session: 2}
    assert task_runs(f"collect {session}")[0] == (2, "Completed")
    [(_, outcome)] = outcomes(run.path.parent / "collected" / SLUG / "sessions")
    assert (outcome.launches, outcome.served.waves_done) == (2, 2)
    # No wheel, so its content names it.
    assert outcome.session.sglang.startswith("tree-")

    found = manifest.load(run.path)
    for name in SHOWN:
        entry = found.kernel(name)
        assert (entry.phase3_status, entry.workload_entries) == ("done", rows[name])
        assert entry.baseline_status is not None
        place = DefinitionFiles(entry.op_type, name)
        lines = (run.dataset / place.workloads).read_text().splitlines()
        assert len(lines) == rows[name]
        blobs = {
            given["path"].removeprefix("./")
            for line in lines
            for given in json.loads(line)["workload"]["inputs"].values()
            if given["type"] == "safetensors"
        }
        assert blobs == {
            str(path.relative_to(run.dataset)) for path in (run.dataset / place.blobs).iterdir()
        }
    assert found.kernel(NEVER).phase3_status is None


def test_hosts_serve_one_session_after_the_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share an address, and must not wait for each other at different sessions."""
    from prefect import flow

    from flows import collect as module

    events: list[str] = []

    @dataclass
    class Future:
        name: str
        state: State[Any] = field(default_factory=Failed)

        def wait(self) -> None:
            events.append(f"{self.name} ended")

    def submit(path: Path, session: Session, config: Path, **_: Any) -> Future:
        events.append(f"{session.id} begun")
        return Future(session.id)

    request = CollectRequest(
        manifest=run.path, definitions=(*SHOWN, NEVER), model_path=str(run.path.parent)
    )
    plan, config = module.plan_sessions(request)
    plan.sessions = [s.model_copy(update={"nodes": 2}) for s in plan.sessions]
    monkeypatch.setattr(module, "plan_sessions", lambda _: (plan, config))
    monkeypatch.setattr(module.collect_session, "submit", submit)
    monkeypatch.setattr(module, "wait", lambda futures: None)
    flow(module.serve_sessions)(request)
    names = [session.id for session in plan.sessions]
    assert len(names) == 2
    assert events == [f"{name} {what}" for name in names for what in ("begun", "ended")]


def test_sessions_and_realism_are_artifacts(run: Run) -> None:
    from prefect.artifacts import Artifact

    table = Artifact.get(f"sessions-{SLUG}")
    assert table is not None
    (row,) = json.loads(str(table.data))
    assert (row["session"], row["launches"]) == ("tp1-ep1-ps1-paged-prefill", "2")
    for name in SHOWN:
        report = Artifact.get(f"realism-{name.replace('_', '-')}")
        assert report is not None
        assert "data:image/png;base64," in str(report.data)
        assert name in str(report.data)


def test_a_second_run_serves_nothing_and_changes_nothing(run: Run) -> None:
    before = run.bytes()
    again = run.collect(*SHOWN)
    assert again.is_completed()
    assert again.result() == run.first.result()
    assert run.attempts == {"tp1-ep1-ps1-paged-prefill": 2}
    assert run.bytes() == before


def test_a_session_that_shows_nothing_is_not_tried_again(run: Run) -> None:
    """No request makes SGLang call that function; the other definitions have their workloads."""
    state = run.collect(*SHOWN, NEVER)
    assert state.is_failed()
    from flows.collect import Collection
    from flows.outcome import came_to

    found = came_to(state, Collection)
    assert found.rows == run.first.result().rows
    assert set(found.failed) == {NEVER}
    assert run.attempts == {"tp1-ep1-ps1-paged-prefill": 2, "tp1-ep1-ps1-calls": 1}
    assert task_runs("collect tp1-ep1-ps1-calls") == [(1, "Failed")]
    after = manifest.load(run.path)
    assert [after.kernel(name).phase3_status for name in SHOWN] == ["done", "done"]
    entry = after.kernel(NEVER)
    assert entry.phase3_status is None
    assert after.state(entry) == "failed"
    assert entry.error == found.failed[NEVER]
    assert f"{NEVER}: session tp1-ep1-ps1-calls failed: other kernels ran" in entry.error
    assert "temperature 0" in entry.error
