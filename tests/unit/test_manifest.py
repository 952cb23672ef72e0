"""The run manifest: the contract with the original procedures, and writing it from many places."""

from __future__ import annotations

import datetime as dt
import json
import multiprocessing
from pathlib import Path

import pytest

from tasks import manifest
from tasks.errors import ManifestError
from tasks.manifest import KernelEntry, Route, RunManifest
from tasks.request import OnboardRequest, Step, remaining_steps

# The example in the original onboarding procedure (flashinfer-bench 40e6ca7, Apache-2.0), plus
# fields that neither it nor we define.
FOREIGN = {
    "model_slug": "qwen3-235b-a22b",
    "hf_repo_id": "Qwen/Qwen3-235B-A22B",
    "date": "2026-04-27",
    "repo_shas": {
        "sglang": "abc1234",
        "flashinfer": "def5678",
        "sgl_cookbook": "ghi9012",
        "flashinfer_trace": "jkl3456",
        "another_repo": "0123456",
    },
    "operator": {"name": "someone", "shift": None},
    "kernels": [
        {
            "definition_name": "gqa_paged_decode_h40_kv8_d128_ps1",
            "op_type": "gqa_paged",
            "phase1_status": "new",
            "fi_status": "fi_supported",
            "fi_trace_template": True,
            "sgl_status": "sgl_integrated",
            "phase2_status": "done",
            "phase2_method": "trace_dump",
            "phase3_status": "done",
            "workload_entries": 8,
            "reviewer": None,
        },
        {
            "definition_name": "rope_with_cos_sin_cache_neox_style_d128_rd128",
            "op_type": "rope",
            "phase1_status": "new",
            "fi_status": "fi_supported",
            "fi_trace_template": False,
            "fi_trace_template_request_url": "https://github.com/flashinfer-ai/flashinfer/issues/1",
            "sgl_status": "sgl_integrated",
            "phase2_status": "done",
            "phase2_method": "manual",
        },
        {
            "definition_name": "new_op_h512",
            "op_type": "new_op",
            "phase1_status": "new",
            "fi_status": "fi_missing",
            "sgl_status": "n/a",
            "fi_issue_url": "https://github.com/flashinfer-ai/flashinfer/issues/999",
            "phase2_status": "done",
            "phase3_status": "skipped (fi_missing)",
        },
        {"definition_name": "rmsnorm_h128", "op_type": "rmsnorm", "phase1_status": "existing"},
    ],
    "phase4": {
        "gqa_paged_decode_h40_kv8_d128_ps1": {
            "flashinfer_trace_pr": "https://huggingface.co/datasets/x/discussions/42",
            "flashinfer_bench_pr": "https://github.com/x/pull/57",
        }
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "onboard_qwen3-235b-a22b_20260427.json"
    file.write_text(json.dumps(FOREIGN))
    return file


def test_foreign_manifest_round_trips_with_unknown_fields(path: Path) -> None:
    run = manifest.update(path, lambda run: None)
    assert json.loads(path.read_text()) == FOREIGN
    assert [run.state(entry) for entry in run.kernels] == [
        "published",
        "defined",
        "defined",
        "existing",
    ]
    assert [entry.route for entry in run.kernels] == [
        Route.COLLECT,
        Route.COLLECT,
        Route.REQUEST_KERNEL,
        Route.NOTHING,
    ]


def test_update_of_one_kernel_changes_nothing_else(path: Path) -> None:
    manifest.update_kernel(path, "new_op_h512", phase3_status="done", workload_entries=3)
    expected = json.loads(json.dumps(FOREIGN))
    expected["kernels"][2] |= {"phase3_status": "done", "workload_entries": 3}
    assert json.loads(path.read_text()) == expected


def test_error_is_recorded_and_cleared_by_the_next_success(path: Path) -> None:
    manifest.record_error(path, "new_op_h512", "it broke")
    run = manifest.load(path)
    assert run.state(run.kernel("new_op_h512")) == "failed"
    manifest.update_kernel(path, "new_op_h512", phase2_status="done")
    assert manifest.load(path).kernel("new_op_h512").error is None
    manifest.record_error(path, "new_op_h512", "it broke again")
    manifest.clear_errors(path)
    assert json.loads(path.read_text()) == FOREIGN


def test_a_definition_published_alone_starts_over_when_it_can_be_collected(path: Path) -> None:
    manifest.record_pull_request(path, "new_op_h512", flashinfer_trace_pr="u")
    run = manifest.load(path)
    found = {"definition_name": "new_op_h512", "op_type": "new_op", "phase1_status": "new"}
    supported = {"fi_status": "fi_supported", "sgl_status": "sgl_integrated"}
    manifest.merge_discovery(run, [KernelEntry.model_validate(found | supported)])
    assert run.state(run.kernel("new_op_h512")) == "new"
    assert "new_op_h512" not in run.phase4
    manifest.merge_discovery(
        run, [KernelEntry.model_validate(found | {"phase1_status": "existing"})]
    )
    assert run.state(run.kernel("new_op_h512")) == "existing"


def test_a_definition_published_alone_keeps_its_pull_requests_when_it_has_landed(
    path: Path,
) -> None:
    manifest.record_pull_request(path, "new_op_h512", flashinfer_trace_pr="u")
    run = manifest.load(path)
    landed = {"definition_name": "new_op_h512", "op_type": "new_op", "phase1_status": "existing"}
    manifest.merge_discovery(run, [KernelEntry.model_validate(landed)])
    assert run.phase4["new_op_h512"].flashinfer_trace_pr == "u"


DAMAGE = {
    "truncated": (lambda text: text[: len(text) // 2], "not JSON"),
    "empty": (lambda text: "", "not JSON"),
    "a list": (lambda text: f"[{text}]", "a JSON list, expected an object"),
    "no slug": (lambda text: text.replace("model_slug", "slug"), "field model_slug: "),
    "bad date": (lambda text: text.replace("2026-04-27", "27 April"), "field date: "),
    "bad status": (lambda text: text.replace('"existing"', '"maybe"'), "phase1_status"),
    "bad count": (lambda text: text.replace(": 8,", ": -8,"), "workload_entries"),
    "path escape": (lambda text: text.replace("new_op_h512", "../../etc/x"), "definition_name"),
    "twice": (lambda text: text.replace("new_op_h512", "rmsnorm_h128"), "listed twice"),
    "other model": (lambda text: text.replace('"qwen3-235b-a22b"', '"llama"'), "model_slug"),
    "deep": (lambda text: "[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_manifest_names_file_and_field_and_is_left_alone(path: Path, kind: str) -> None:
    change, text = DAMAGE[kind]
    path.write_text(change(path.read_text()))
    before = path.read_bytes()
    for use in (manifest.load, lambda p: manifest.update(p, lambda run: None)):
        with pytest.raises(ManifestError, match=r".") as caught:
            use(path)
        assert str(path) in str(caught.value)
        assert text in str(caught.value)
        assert caught.value.exit_code == 2
    assert path.read_bytes() == before


def test_not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ManifestError, match="not UTF-8"):
        manifest.load(path)


def _count(path: Path, name: str, times: int) -> None:
    for _ in range(times):

        def add(run: RunManifest) -> None:
            entry = run.kernel(name)
            entry.workload_entries = (entry.workload_entries or 0) + 1
            extra = run.model_extra or {}
            run.total = extra.get("total", 0) + 1

        manifest.update(path, add)


def test_two_processes_writing_at_once_lose_nothing(path: Path) -> None:
    names, times = ["new_op_h512", "rmsnorm_h128"], 60
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count, args=(path, name, times)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    run = manifest.load(path)
    assert (run.model_extra or {})["total"] == 2 * times
    assert [run.kernel(name).workload_entries for name in names] == [times, times]
    assert sorted(p.name for p in path.parent.iterdir()) == [f".{path.name}.lock", path.name]


def test_merge_keeps_what_later_phases_wrote_unless_refreshed(path: Path) -> None:
    run = manifest.load(path)
    found = KernelEntry(
        definition_name="new_op_h512",
        op_type="new_op",
        phase1_status="new",
        fi_status="fi_supported",
        sgl_status="sgl_integrated",
    )
    manifest.merge_discovery(run, [found])
    entry = run.kernel("new_op_h512")
    assert entry.fi_status == "fi_supported"
    assert entry.fi_issue_url == "https://github.com/flashinfer-ai/flashinfer/issues/999"
    # Worked on and no longer named: kept. Never worked on: gone.
    assert {e.definition_name for e in run.kernels} == {
        "new_op_h512",
        "gqa_paged_decode_h40_kv8_d128_ps1",
        "rope_with_cos_sin_cache_neox_style_d128_rd128",
    }
    manifest.merge_discovery(run, [found], refresh=True)
    assert manifest.dump(run)["kernels"] == [found.model_dump(mode="json", exclude_unset=True)]
    assert run.phase4 == {}


def test_locate_continues_the_newest_manifest_and_refuses_another_models(
    path: Path, tmp_path: Path
) -> None:
    today = dt.date(2026, 11, 20)
    assert manifest.locate(tmp_path, "qwen3-235b-a22b", None, today) == path
    with pytest.raises(ManifestError, match="hf_repo_id.*'Qwen/Qwen3-235B-A22B'.*'other/model'"):
        manifest.locate(tmp_path, "qwen3-235b-a22b", "other/model", today)
    made = manifest.locate(tmp_path, "llama", "meta-llama/x", today)
    assert made.name == "onboard_llama_20261120.json"
    assert not made.exists()
    manifest.create(made, RunManifest(model_slug="llama", hf_repo_id=None, date=today))
    assert json.loads(made.read_text()) == {
        "model_slug": "llama",
        "hf_repo_id": None,
        "date": "2026-11-20",
    }


NEW = {"definition_name": "k", "op_type": "t", "phase1_status": "new"}
SUPPORTED = NEW | {"fi_status": "fi_supported"}
INTEGRATED = SUPPORTED | {"sgl_status": "sgl_integrated"}
MISSING = NEW | {"fi_status": "fi_missing", "sgl_status": "n/a"}
WAITING = SUPPORTED | {"sgl_status": "sgl_missing"}
DONE2, DONE3 = {"phase2_status": "done"}, {"phase3_status": "done"}
NO_TEMPLATE = {"fi_trace_template": False}
NEEDS = {"phase2_status": "needs_reference"}
D, R, T, S, C, PD, PC = (
    Step.DEFINE,
    Step.REQUEST_KERNEL,
    Step.REQUEST_TEMPLATE,
    Step.PREPARE_SGLANG,
    Step.COLLECT,
    Step.PUBLISH_DATASET,
    Step.PUBLISH_COVERAGE,
)


@pytest.mark.parametrize(
    ("entry", "options", "steps"),
    [
        (NEW | {"phase1_status": "existing"}, {}, ()),
        (INTEGRATED, {}, (D, C, PD, PC)),
        (INTEGRATED | DONE2, {}, (C, PD, PC)),
        (INTEGRATED | DONE2 | DONE3, {}, (PD, PC)),
        (INTEGRATED, {"skip_workload": True}, (D,)),
        (INTEGRATED, {"submit_prs": False}, (D, C)),
        (INTEGRATED, {"phases": (0, 1)}, ()),
        (INTEGRATED, {"phases": (0, 1, 2)}, (D,)),
        (INTEGRATED, {"phases": (3, 4)}, ()),
        (INTEGRATED | DONE2, {"phases": (4,)}, ()),
        (MISSING, {}, (D, R, PD, PC)),
        (MISSING | DONE2 | {"fi_issue_url": "u"}, {}, (PD, PC)),
        (WAITING, {}, (D, S)),
        (WAITING | DONE2 | {"sglang_pr_url": "u"}, {}, ()),
        (WAITING, {"skip_workload": True}, (D,)),
        (INTEGRATED | DONE2 | {"sglang_pr_url": "u"}, {}, (C, PD, PC)),
        (SUPPORTED | {"sgl_status": "n/a"}, {}, (D, PD, PC)),
        (INTEGRATED | NO_TEMPLATE, {}, (D, T, C, PD, PC)),
        (INTEGRATED | NO_TEMPLATE | DONE2, {"phases": (2,)}, (T,)),
        (INTEGRATED | NO_TEMPLATE | DONE2, {"phases": (3,)}, (C,)),
        (
            INTEGRATED | NO_TEMPLATE | DONE2 | DONE3 | {"fi_trace_template_request_url": "u"},
            {},
            (PD, PC),
        ),
        (WAITING | NO_TEMPLATE, {}, (D, T, S)),
        (WAITING | {"fi_trace_template": True}, {}, (D, S)),
        # A kernel that torch runs, and one that FlashInfer lacks: there is no API.
        (SUPPORTED | NO_TEMPLATE | {"sgl_status": "n/a"}, {}, (D, PD, PC)),
        (MISSING | NO_TEMPLATE, {}, (D, R, PD, PC)),
        (NEEDS | MISSING, {}, (D, R, PD, PC)),
        (NEEDS | MISSING | {"fi_issue_url": "u"}, {}, (D, R, PD, PC)),
        (NEEDS | INTEGRATED, {"phases": (3, 4)}, ()),
    ],
)
def test_remaining_steps(
    entry: dict[str, object], options: dict[str, object], steps: tuple[Step, ...], tmp_path: Path
) -> None:
    run = RunManifest(model_slug="m", hf_repo_id=None, date=dt.date(2026, 1, 1))
    request = OnboardRequest(model_name="m", workspace=tmp_path, **options)
    assert remaining_steps(run, KernelEntry.model_validate(entry), request) == steps


@pytest.mark.parametrize("kind", [MISSING, WAITING | {"sglang_pr_url": "u"}, INTEGRATED])
def test_state_of_a_kernel_that_needs_a_reference(kind: dict[str, object]) -> None:
    run = RunManifest(model_slug="m", hf_repo_id=None, date=dt.date(2026, 1, 1))
    entry = KernelEntry.model_validate(kind | NEEDS)
    assert run.state(entry) == "needs_reference"
    entry.error = "it broke"
    assert run.state(entry) == "failed"


def test_publishing_goes_on_with_the_second_pull_request(tmp_path: Path) -> None:
    run = RunManifest(
        model_slug="m",
        hf_repo_id=None,
        date=dt.date(2026, 1, 1),
        phase4={"k": {"flashinfer_trace_pr": "u"}},
    )
    entry = KernelEntry.model_validate(INTEGRATED | DONE2 | DONE3)
    request = OnboardRequest(model_name="m", workspace=tmp_path)
    assert remaining_steps(run, entry, request) == (PC,)
