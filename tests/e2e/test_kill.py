"""kill -9 in every phase: nothing looks done that is not, and the next run ends as a clean one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tasks import manifest
from tasks.git import git
from tests.conftest import copy_workspace, write_workspace
from tests.e2e.commands import QWEN, onboard, onboard_that_dies
from tests.e2e.conftest import CONFIG

pytestmark = [pytest.mark.e2e, pytest.mark.bench_extra]

# Where the process dies: just after the effect, just before it is recorded. Only modules that do
# not import Prefect are patched: it reads its settings when it is imported, once the server is up.
FAULTS = {
    0: "import tasks.repos.clone as m; m.git.short_sha = die; m.Path.rename = die",
    1: "import tasks.manifest as m; m.merge_discovery = die",
    2: (
        "import tasks.define.phase as m; stage = m.stage_definition\n"
        "def f(*a): stage(*a); die()\n"
        "m.stage_definition = f"
    ),
    3: (
        "import tasks.collect.write as m; write = m.files.write_text\n"
        "def f(path, text): die() if path.suffix == '.jsonl' else write(path, text)\n"
        "m.files.write_text = f"
    ),
    4: (
        "import tasks.publish.outbox as m; publish = m.Outbox._publish_branch\n"
        "def f(*a): publish(*a); die()\n"
        "m.Outbox._publish_branch = f"
    ),
}


def arguments(workspace: Path) -> tuple[str | Path, ...]:
    return ("run", *QWEN, "--config", CONFIG, "--workspace", workspace)


def outcome(workspace: Path) -> tuple[object, object, object]:
    """What a run leaves: staged bytes, published trees, and the manifest's states."""
    dataset = workspace / "flashinfer-trace"
    staged = {
        name: (dataset / name).read_bytes()
        for name in git("ls-files", "--others", cwd=dataset).splitlines()
    }
    trees = {
        line
        for remote in ("flashinfer-trace", "flashinfer-bench")
        for line in git(
            *("for-each-ref", "--format=%(refname) %(tree)"),
            cwd=workspace / "outbox" / "remotes" / f"{remote}.git",
        ).splitlines()
    }
    path = manifest.latest(workspace, "qwen3-30b-a3b")
    assert path is not None
    run = manifest.load(path)
    states = {entry.definition_name: run.state(entry) for entry in run.kernels}
    commits = sorted(git("log", "--format=%s", cwd=workspace / "outbox").splitlines())
    return (staged, trees, states | {"commits": str(commits)})


def check_killed(phase: int, workspace: Path) -> None:
    """Check that nothing of a phase looks done that is not."""
    path = manifest.latest(workspace, "qwen3-30b-a3b")
    if phase == 0:
        assert path is None
        assert not any((workspace / name).exists() for name in ("sglang", "flashinfer"))
        return
    assert path is not None
    run = manifest.load(path)
    allowed: dict[int, set[str]] = {
        1: set(),
        2: {"existing", "new"},
        3: {"existing", "new", "defined", "waiting"},
        4: {"existing", "new", "defined", "waiting", "collected"},
    }
    assert {run.state(entry) for entry in run.kernels} <= allowed[phase]
    if phase == 3:
        assert not list((workspace / "flashinfer-trace").glob("workloads/gqa_*/*.jsonl"))
    if phase == 4:
        assert run.phase4 == {}


@pytest.mark.timeout(900)
def test_killed_in_every_phase_and_run_again(
    cloned: Path, prefect_home: Path, sample: Path, tmp_path: Path
) -> None:
    """Of one run after another, each is killed a phase later, and the last one is let go on."""
    clean, killed = copy_workspace(cloned, tmp_path / "clean"), tmp_path / "killed"
    write_workspace(killed, sample)
    for workspace in (clean, killed):
        shutil.copytree(prefect_home, workspace / ".prefect")
    assert onboard(*arguments(clean)).returncode == 3
    for phase, fault in FAULTS.items():
        done = onboard_that_dies(fault, *arguments(killed))
        assert done.returncode == -9, done.stderr
        check_killed(phase, killed)
    again = onboard(*arguments(killed))
    assert again.returncode == 3, again.stderr
    assert outcome(killed) == outcome(clean)
