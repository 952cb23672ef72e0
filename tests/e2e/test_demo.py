"""The demo itself, as `make demo` runs it, twice."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks import manifest
from tasks.git import git
from tests.e2e.commands import onboard

pytestmark = [pytest.mark.e2e, pytest.mark.bench_extra, pytest.mark.timeout(900)]

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"


def demo_commands(folder: Path) -> list[list[str]]:
    """Return the `onboard` commands of the Makefile's demo target, for another folder."""
    text = MAKEFILE.read_text().replace("\\\n", " ")
    target = re.search(r"^demo:.*?\n\n", text, re.DOTALL | re.MULTILINE)
    assert target is not None
    lines = re.findall(r"\$\(BIN\)/onboard (.*?)(?:\|\||$)", target[0], re.MULTILINE)
    return [line.replace("$(DEMO)", str(folder)).split() for line in lines]


@dataclass(frozen=True)
class Demo:
    """What the demo's commands have left and printed."""

    folder: Path
    commands: list[list[str]]
    codes: list[int]
    printed: list[str]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo after its first time."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    commands = demo_commands(folder)
    done = [onboard(*command) for command in commands]
    return Demo(folder, commands, [run.returncode for run in done], [run.stdout for run in done])


def test_demo(demo: Demo) -> None:
    assert [command[0] for command in demo.commands] == ["sample", "run", "run"]
    assert demo.codes == [0, 3, 0]
    assert "Report: 14 existing, 3 published, 1 waiting" in demo.printed[1]
    assert "Report: 11 defined, 5 existing, 10 published" in demo.printed[2]
    times = r"Time: server .*phase 0 .*phase 1 .*phase 2 .*phase 3 .*phase 4"
    assert re.search(times, demo.printed[1])
    # A dataset and a coverage commit for each of the thirteen published, the waiting one's pull
    # request, and the two kernel requests.
    texts = git("ls-files", "*.md", cwd=demo.folder / "outbox").splitlines()
    assert len(journal(demo.folder)) == len(texts) == 2 * 13 + 1 + 2


def test_demo_again(demo: Demo, tmp_path: Path) -> None:
    before = journal(demo.folder)
    manifests = {path: path.read_bytes() for path in demo.folder.glob("onboard_*.json")}
    assert len(manifests) == 2
    for command, code in zip(demo.commands, demo.codes, strict=True):
        done = onboard(*command)
        assert done.returncode == code
        if command[0] == "run":
            assert "Work: nothing was left to do, nothing was done twice" in done.stdout
    assert journal(demo.folder) == before
    assert {path: path.read_bytes() for path in manifests} == manifests
    check_with_flashinfer_bench(demo.folder / "flashinfer-trace", tmp_path / "report")


def journal(folder: Path) -> list[str]:
    return git("log", "--format=%s", cwd=folder / "outbox").splitlines()


def check_with_flashinfer_bench(dataset: Path, report: Path) -> None:
    """Run FlashInfer-Bench's own validator over the dataset, where this version has it."""
    if importlib.util.find_spec("flashinfer_bench.data.validate") is None:
        return
    subprocess.run(
        [
            *(sys.executable, "-m", "flashinfer_bench", "validate", "--disable-gpu"),
            *("--dataset", str(dataset), "--outputs", "json", "--output-folder", str(report)),
        ],
        check=True,
        capture_output=True,
    )
    (found,) = report.glob("*.json")
    levels = re.findall(r'"level": "(\w+)"', json.dumps(json.loads(found.read_text())))
    assert levels
    assert "error" not in levels


def test_fi_missing_files_an_issue_and_publishes_the_definition_only(demo: Demo) -> None:
    path = manifest.latest(demo.folder, "minimax-m1")
    assert path is not None
    found, workspace = manifest.load(path), demo.folder
    states = {entry.definition_name: found.state(entry) for entry in found.kernels}
    for stage in ("decode", "prefill"):
        entry = found.kernel(f"lightning_attn_{stage}_h8_d128")
        assert entry.fi_status == "fi_missing"
        assert entry.sgl_status == "n/a"
        assert entry.phase3_status == "skipped (fi_missing)"
        assert states[entry.definition_name] == "published"
        assert entry.fi_issue_url is not None
        issue = Path(entry.fi_issue_url.removeprefix("file://")).read_text()
        asked = f"lightning_attn for MiniMax-M1-80k ({entry.definition_name})"
        assert f"title: 'Kernel request: {asked}'" in issue
        assert re.search(r"SGLang: `python/sglang/\S+/lightning_attn.py:\d+` at", issue)
        assert "labels: enhancement, kernel-request" in issue
        assert "| `num_heads` | 8 |" in issue
        bare = workspace / "outbox" / "remotes" / "flashinfer-trace.git"
        branch = f"onboard/{entry.definition_name}"
        assert git("diff", "--name-only", "main", branch, cwd=bare).splitlines() == [
            f"definitions/lightning_attn/{entry.definition_name}.json",
            f"tests/references/test_{entry.definition_name}.py",
        ]
        definition = json.loads(git("show", f"{branch}:{entry_path(entry)}", cwd=bare))
        assert "status:unverified" in definition["tags"]
        where = f"outbox/issues/{entry.definition_name}.kernel-request.md"
        assert definition["description"].endswith(f" Kernel request: {where}.")
    # Integrated kernels are defined and wait for a run with workloads.
    assert states["rmsnorm_h6144"] == "defined"
    assert "rmsnorm_h6144" not in found.phase4
    # Nothing to collect for a kernel that torch runs.
    assert found.kernel("gemm_n32_k6144").phase3_status == "skipped (no FlashInfer call)"
    # Served nowhere: said so.
    assert "no model class in SGLang" in str(found.model_class)


def entry_path(entry: manifest.KernelEntry) -> str:
    return f"definitions/{entry.op_type}/{entry.definition_name}.json"
