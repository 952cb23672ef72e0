"""The demo itself, as `make demo` runs it, twice."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.git import git
from tests.e2e.commands import onboard

pytestmark = [pytest.mark.e2e, pytest.mark.bench_extra]

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"


def demo_commands(folder: Path) -> list[list[str]]:
    """Return the `onboard` commands of the Makefile's demo target, for another folder."""
    text = MAKEFILE.read_text().replace("\\\n", " ")
    target = re.search(r"^demo:.*?\n\n", text, re.DOTALL | re.MULTILINE)
    assert target is not None
    lines = re.findall(r"\$\(BIN\)/onboard (.*?)(?:\|\||$)", target[0], re.MULTILINE)
    return [line.replace("$(DEMO)", str(folder)).split() for line in lines]


def test_demo_then_again(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    commands = demo_commands(folder)
    assert [command[0] for command in commands] == ["sample", "run", "run"]
    codes, printed = [], []
    for command in commands:
        done = onboard(*command)
        codes.append(done.returncode)
        printed.append(done.stdout)
    assert codes == [0, 3, 0]
    assert "Report: 14 existing, 3 published, 1 waiting" in printed[1]
    assert "Report: 11 defined, 5 existing, 10 published" in printed[2]
    assert re.search(r"Time: server .*phase 0 .*phase 1 .*phase 2 .*phase 3 .*phase 4", printed[1])
    journal = git("log", "--format=%s", cwd=folder / "outbox").splitlines()
    # A dataset and a coverage commit for each of the thirteen published, the waiting one's pull
    # request, and the two kernel requests.
    texts = git("ls-files", "*.md", cwd=folder / "outbox").splitlines()
    assert len(journal) == len(texts) == 2 * 13 + 1 + 2
    manifests = {p: p.read_bytes() for p in folder.glob("onboard_*.json")}
    assert len(manifests) == 2

    for command, code in zip(commands, codes, strict=True):
        done = onboard(*command)
        assert done.returncode == code
        if command[0] == "run":
            assert "Work: nothing was left to do, nothing was done twice" in done.stdout
    assert git("log", "--format=%s", cwd=folder / "outbox").splitlines() == journal
    assert {p: p.read_bytes() for p in folder.glob("onboard_*.json")} == manifests
    check_with_flashinfer_bench(folder / "flashinfer-trace", tmp_path / "report")


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
