"""The flows on a real Prefect server: every branch of the DAG, resuming, and one failing kernel."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.client.schemas.objects import State

from tasks import git as plain_git
from tasks import manifest
from tasks.git import AUTHOR, git
from tasks.request import OnboardRequest
from tests.conftest import DATA, copy_workspace, write_workspace

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]

INTEGRATED = {
    "gqa_paged_decode_h32_kv4_d128_ps1": 20,
    "gqa_ragged_prefill_causal_h32_kv4_d128": 12,
    "fused_add_rmsnorm_h2048": 1,
}
WAITING = "top_k_sampling_from_probs_v151936"


def request(workspace: Path, **options: Any) -> OnboardRequest:
    fields = {
        "model_name": "qwen3-30b-a3b",
        "hf_repo_id": "Qwen/Qwen3-30B-A3B",
        "config": DATA / "configs" / "Qwen--Qwen3-30B-A3B.json",
        "workspace": workspace,
        "phases": (1, 2, 3, 4),
    }
    return OnboardRequest(**fields | options)


def run(asked: OnboardRequest) -> tuple[State[Any], manifest.RunManifest]:
    from flows.onboard import onboard_model

    state = onboard_model(asked, return_state=True)
    path = manifest.latest(asked.workspace, asked.model_name)
    assert path is not None
    return state, manifest.load(path)


def states(found: manifest.RunManifest) -> dict[str, str]:
    return {entry.definition_name: found.state(entry) for entry in found.kernels}


def journal(workspace: Path) -> list[str]:
    return git("log", "--format=%s", cwd=workspace / "outbox").splitlines()


def branches(workspace: Path, remote: str) -> set[str]:
    bare = workspace / "outbox" / "remotes" / f"{remote}.git"
    return set(git("for-each-ref", "--format=%(refname:short)", "refs/heads", cwd=bare).split())


def runs_named(name: str) -> list[str]:
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name]))
        )
    return [run.state_name or "" for run in found]


@pytest.fixture(scope="module")
def onboarded(
    cloned: Path, prefect_server: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, State[Any]]:
    """A workspace in which the model was onboarded, and how that run ended; read only."""
    workspace = copy_workspace(cloned, tmp_path_factory.mktemp("onboarded") / "workspace")
    state, _ = run(request(workspace))
    return workspace, state


def manifest_of(workspace: Path) -> manifest.RunManifest:
    path = manifest.latest(workspace, "qwen3-30b-a3b")
    assert path is not None
    return manifest.load(path)


def test_existing_integrated_and_sgl_missing(onboarded: tuple[Path, State[Any]]) -> None:
    workspace, state = onboarded
    found = manifest_of(workspace)
    assert state.is_completed()
    assert state.message == "14 existing, 3 published, 1 waiting"
    assert len(found.kernels) == 18
    for name, rows in INTEGRATED.items():
        entry = found.kernel(name)
        assert states(found)[name] == "published"
        assert (entry.phase2_method, entry.phase3_status) == ("trace_template", "done")
        assert entry.workload_entries == rows
        assert entry.baseline_status
        assert entry.baseline_status.startswith("not evaluated")
    waiting = found.kernel(WAITING)
    assert (waiting.fi_status, waiting.sgl_status) == ("fi_supported", "sgl_missing")
    assert states(found)[WAITING] == "waiting"
    assert waiting.phase2_status == "done"
    assert waiting.phase3_status is None
    assert WAITING not in found.phase4
    existing = found.kernel("rmsnorm_h128").model_dump(exclude_unset=True)
    assert existing == {
        "definition_name": "rmsnorm_h128",
        "op_type": "rmsnorm",
        "phase1_status": "existing",
    }
    assert branches(workspace, "flashinfer-trace") == {"main"} | {
        f"onboard/{name}" for name in INTEGRATED
    }
    assert branches(workspace, "flashinfer-bench") == {"main"} | {
        f"feat/def-{name}.qwen3-30b-a3b" for name in INTEGRATED
    }
    # One flow run per kernel with work, named for the UI, the waiting one visible as such.
    assert runs_named(f"qwen3-30b-a3b/{WAITING}")[:1] == ["Waiting"]
    assert runs_named("qwen3-30b-a3b/rmsnorm_h128") == []

    before = manifest.dump(found), journal(workspace)
    again, found = run(request(workspace))
    assert again.is_completed()
    assert again.result().worked_on == []
    assert (manifest.dump(found), journal(workspace)) == before
    assert len(runs_named(f"qwen3-30b-a3b/{WAITING}")) == 1


def test_staged_and_published_files_are_the_same_and_of_the_datasets_form(
    onboarded: tuple[Path, State[Any]],
) -> None:
    bench = pytest.importorskip("flashinfer_bench.data")
    workspace, _ = onboarded
    dataset = workspace / "flashinfer-trace"
    bare = workspace / "outbox" / "remotes" / "flashinfer-trace.git"
    for name, count in INTEGRATED.items():
        changed = git("diff", "--name-only", "main", f"onboard/{name}", cwd=bare).splitlines()
        assert changed
        for path in changed:
            assert name in path
            assert (dataset / path).read_bytes() == git_bytes(bare, f"onboard/{name}:{path}")
        (definition,) = (p for p in changed if p.startswith("definitions/"))
        bench.Definition.model_validate(json.loads((dataset / definition).read_text()))
        (solution,) = (p for p in changed if p.startswith("solutions/"))
        bench.Solution.model_validate(json.loads((dataset / solution).read_text()))
        (rows,) = (p for p in changed if p.startswith("workloads/"))
        traces = [
            bench.Trace.model_validate(json.loads(line))
            for line in (dataset / rows).read_text().splitlines()
        ]
        assert len(traces) == count
        referenced = {
            value.path.removeprefix("./")
            for trace in traces
            for value in trace.workload.inputs.values()
            if value.type == "safetensors"
        }
        assert referenced == {p for p in changed if p.startswith("blob/")}


def git_bytes(repository: Path, name: str) -> bytes:
    return plain_git.run("show", name, cwd=repository)


def test_artifacts_show_the_inventory_and_the_report(workspace: Path) -> None:
    run(request(workspace, phases=(1,)))
    from prefect.artifacts import Artifact

    table = Artifact.get("inventory-qwen3-30b-a3b")
    report = Artifact.get("report-qwen3-30b-a3b")
    assert table is not None
    assert report is not None
    rows = json.loads(str(table.data))
    assert len(rows) == 18
    (row,) = (row for row in rows if row["definition"] == WAITING)
    reasons = row.pop("why")
    assert "no call of flashinfer.sampling.top_k_sampling_from_probs" in reasons
    assert row == {
        "definition": WAITING,
        "op type": "sampling",
        "phase 1": "new",
        "FlashInfer": "supported",
        "template": "yes",
        "SGLang": "missing",
        "state": "new",
        "server flags": "--sampling-backend flashinfer",
        "dataset PR": "-",
        "coverage PR": "-",
        "requests": "-",
    }
    assert f"| `{WAITING}` | new |" in str(report.data)


def test_one_kernels_failure_stops_no_other_and_a_retry_does_only_that_one(
    workspace: Path, dumps: Path, tmp_path: Path
) -> None:
    """The recording lacks the norm's calls at first: that kernel fails, alone."""
    real = tmp_path / "real"
    real.mkdir()
    shutil.copytree(dumps / "q330b_a", real / "q330b_a", copy_function=os.link)
    state, found = run(request(workspace, dumps=real))
    assert state.is_failed()
    assert state.message == "14 existing, 1 failed, 2 published, 1 waiting"
    failed = found.kernel("fused_add_rmsnorm_h2048")
    assert failed.error is not None
    assert "none of 122 recorded calls is a workload" in failed.error
    assert failed.phase2_status == "done"
    assert failed.phase3_status is None
    assert not (
        workspace / "flashinfer-trace/workloads/rmsnorm/fused_add_rmsnorm_h2048.jsonl"
    ).exists()
    before = journal(workspace)

    shutil.copytree(dumps / "q330b_c", real / "q330b_c", copy_function=os.link)
    state, found = run(request(workspace, dumps=real))
    assert state.is_completed()
    assert state.result().worked_on == ["fused_add_rmsnorm_h2048"]
    assert found.kernel("fused_add_rmsnorm_h2048").error is None
    assert journal(workspace)[2:] == before


def test_stopping_before_publishing_and_going_on(workspace: Path) -> None:
    _, found = run(request(workspace, submit_prs=False))
    assert {states(found)[name] for name in INTEGRATED} == {"collected"}
    assert states(found)[WAITING] == "defined"
    assert found.phase4 == {}
    assert not (workspace / "outbox").exists()
    state, found = run(request(workspace, phases=(4,)))
    assert sorted(state.result().worked_on) == sorted([*INTEGRATED, WAITING])
    assert {states(found)[name] for name in INTEGRATED} == {"published"}


def test_refresh_forgets_but_publishes_nothing_twice(
    onboarded: tuple[Path, State[Any]], tmp_path: Path
) -> None:
    workspace = copy_workspace(onboarded[0], tmp_path / "workspace")
    before = sorted(journal(workspace))
    state, found = run(request(workspace, refresh=True))
    assert len(state.result().worked_on) == 4
    assert states(found)[WAITING] == "waiting"
    assert sorted(journal(workspace)) == before


def test_a_kernel_goes_on_when_sglang_has_merged(
    onboarded: tuple[Path, State[Any]], sample: Path, tmp_path: Path
) -> None:
    """Upstream starts to call the API: the waiting kernel is collected from, in the next run."""
    workspace = copy_workspace(onboarded[0], tmp_path / "workspace")
    assert states(manifest_of(workspace))[WAITING] == "waiting"
    merged = tmp_path / "sglang"
    git("clone", "--quiet", str(sample / "remotes" / "sglang.git"), str(merged))
    sampler = merged / "python/sglang/srt/layers/sampler.py"
    sampler.write_text(
        "from flashinfer.sampling import top_k_sampling_from_probs\n\n\n"
        "def draw(probs, k):\n    return top_k_sampling_from_probs(probs, k)\n"
        + sampler.read_text()
    )
    git("commit", "--quiet", "--all", "-m", "Merge", cwd=merged, env=AUTHOR)
    (workspace / "onboard.toml").unlink()  # a hard link: not to be written through
    write_workspace(workspace, sample, sglang=str(merged))
    state, found = run(request(workspace, phases=(0, 1, 2, 3, 4)))
    entry = found.kernel(WAITING)
    assert entry.sgl_status == "sgl_integrated"
    assert state.is_failed()
    from flows.onboard import Outcome
    from flows.outcome import came_to

    assert came_to(state, Outcome).worked_on == [WAITING]
    # The recording has no such call yet, which is now what is missing.
    assert entry.error is not None
    assert "its API was never called" in entry.error
