"""Requests upstream, and a kernel whose reference nobody has written, on a real Prefect server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType

from flows.kernel import onboard_kernel
from flows.report import Report
from tasks import manifest, settings
from tasks.define import phase
from tasks.git import git
from tasks.manifest import KernelEntry
from tests.flow.test_branches import WAITING, journal, request, run, states
from tests.unit.test_supplied import WHOLE, run_with_a_foreign_kernel

pytestmark = [
    pytest.mark.flow,
    pytest.mark.bench_extra,
    pytest.mark.usefixtures("prefect_server"),
]

FOREIGN = "scale_rows_w4"
NORM = "fused_add_rmsnorm_h2048"
ROOT = Path(__file__).resolve().parents[2]


def test_template_requests_and_a_missing_reference_embedded(workspace: Path) -> None:
    _, found = run(request(workspace, phases=(1,)))
    path = manifest.latest(workspace, found.model_slug)
    assert path is not None
    fields = {"op_type": "scaling", "phase1_status": "new", "fi_status": "fi_missing"}
    foreign = KernelEntry.model_validate({"definition_name": FOREIGN, **fields})
    # No API of ours lacks a template in this FlashInfer.
    manifest.update_kernel(path, NORM, fi_trace_template=False)
    manifest.update_kernel(path, WAITING, fi_trace_template=False)
    manifest.update(path, lambda run: run.kernels.append(foreign))

    state, found = run(request(workspace, phases=(2, 3, 4)))
    assert state.is_completed()
    assert states(found)[FOREIGN] == "needs_reference"
    assert states(found)[NORM] == "published"
    entry = found.kernel(FOREIGN)
    assert entry.fi_issue_url is not None
    issue = Path(entry.fi_issue_url.removeprefix("file://"))
    assert "There is none yet." in issue.read_text()
    assert entry.phase3_status is None
    assert FOREIGN not in found.phase4
    report = Report(found, path)
    assert report.exit_code == 3
    assert f"--only {FOREIGN} --reference FILE.py" in report.markdown()
    for name in (NORM, WAITING):
        url = found.kernel(name).fi_trace_template_request_url
        assert url is not None
        text = Path(url.removeprefix("file://")).read_text()
        assert f'"name": "{name}"' in text
    assert found.kernel("gqa_paged_decode_h32_kv4_d128_ps1").fi_trace_template_request_url is None

    # Again: it still waits, nothing is asked twice.
    before = journal(workspace)
    state, found = run(request(workspace, phases=(2, 3, 4)))
    assert state.result().worked_on == [FOREIGN]
    assert journal(workspace) == before

    # Somebody gives the reference: the kernel goes on.
    phase.supply_reference(path, FOREIGN, WHOLE)
    state, found = run(request(workspace, phases=(2, 3, 4)))
    assert states(found)[FOREIGN] == "published"
    bare = workspace / "outbox" / "remotes" / "flashinfer-trace.git"
    file = f"onboard/{FOREIGN}:definitions/scaling/{FOREIGN}.json"
    described = json.loads(git("show", file, cwd=bare))["description"]
    assert described.endswith(f" Kernel request: outbox/issues/{FOREIGN}.kernel-request.md.")


class Served:
    """The deployed kernel flow; its runs are executed as a worker does, each in a process."""

    def __init__(self, client: SyncPrefectClient, path: Path) -> None:
        self.client, self.path = client, path
        made = onboard_kernel.to_deployment(
            name="served", entrypoint_type=EntrypointType.MODULE_PATH
        )
        self.deployment: UUID = made.apply()

    def create(self) -> UUID:
        asked = request(self.path.parent, model_name="m", hf_repo_id=None, config=None, phases=(2,))
        created = self.client.create_flow_run_from_deployment(
            self.deployment,
            parameters={
                "request": asked.model_dump(mode="json"),
                "path": str(self.path),
                "name": FOREIGN,
            },
        )
        return created.id

    def execute(self, run_id: UUID) -> FlowRun:
        """Run it until it ends or is suspended."""
        empty = self.path.parent / "worker"  # Prefect copies the folder that it begins in
        empty.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "flow-run", "execute", str(run_id)],
            cwd=empty,
            env={
                **os.environ,
                **get_current_settings().to_environment_variables(exclude_unset=True),
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        found = self.client.read_flow_run(run_id)
        assert found.state is not None, done.stderr
        return found

    def form(self, suspended: FlowRun) -> tuple[dict[str, Any], str]:
        """Return the form's schema and text, as the UI reads them."""
        assert suspended.state is not None
        keys = suspended.state.state_details.run_input_keyset
        assert keys is not None
        schema = self.client.read_flow_run_input(suspended.id, keys["schema"])
        text = self.client.read_flow_run_input(suspended.id, keys["description"])
        return json.loads(schema), json.loads(text)

    def resume(self, run_id: UUID, **given: str) -> str:
        return self.client.resume_flow_run(run_id, run_input=given or None).status.value


@pytest.mark.timeout(600)
def test_a_served_kernel_is_paused_until_somebody_gives_its_reference(tmp_path: Path) -> None:
    path = run_with_a_foreign_kernel(tmp_path)
    drafts = settings.load_settings(tmp_path).drafts(path.stem)
    phase.draft_all([manifest.load(path).kernel(FOREIGN)], "m", drafts)
    with get_client(sync_client=True) as client:
        served = Served(client, path)
        waiting = served.create()
        suspended = served.execute(waiting)
        assert suspended.state_name == "Suspended"
        schema, text = served.form(suspended)
        assert schema["required"] == ["reference"]
        assert schema["properties"]["reference"]["type"] == "string"
        assert "top-level `run`" in schema["properties"]["reference"]["description"]
        assert FOREIGN in text
        run = manifest.load(path)
        assert run.state(run.kernel(FOREIGN)) == "needs_reference"
        url = run.kernel(FOREIGN).fi_issue_url
        assert url is not None
        issue = Path(url.removeprefix("file://"))
        assert "There is none yet." in issue.read_text()

        # The next run of the model does not ask a second time.
        other = served.execute(served.create())
        assert (other.state_name, other.state_type) == ("Needs reference", "COMPLETED")

        assert served.resume(waiting) == "REJECT"
        assert served.resume(waiting, reference=WHOLE.replace("* factor", "- factor")) == "ACCEPT"
        again = served.execute(waiting)
        assert again.state_name == "Suspended"
        _, text = served.form(again)
        assert "the reference was refused" in text
        assert "proof" in text

        assert served.resume(waiting, reference=WHOLE) == "ACCEPT"
        assert served.execute(waiting).state_name == "Defined"
        entry = manifest.load(path).kernel(FOREIGN)
        assert (entry.phase2_status, entry.phase2_method) == ("done", "supplied")
        assert "There is none yet." not in issue.read_text()
        staged = tmp_path / "flashinfer-trace" / "definitions" / "scaling" / f"{FOREIGN}.json"
        described = json.loads(staged.read_text())["description"]
        assert described.count("Kernel request: outbox/issues/") == 1
