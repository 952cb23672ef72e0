"""kill -9 in every phase: nothing looks done that is not, and the next run ends as a clean one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import manifest
from tasks.git import git
from tests.conftest import write_workspace
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


@pytest.fixture(scope="session")
def clean(cloned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, object, object]:
    """The outcome of a run that nothing interrupts."""
    from tests.conftest import copy_workspace

    workspace = copy_workspace(cloned, tmp_path_factory.mktemp("clean") / "workspace")
    assert onboard(*arguments(workspace)).returncode == 3
    return outcome(workspace)


@pytest.mark.parametrize("phase", FAULTS)
def test_killed_and_run_again(
    phase: int, workspace: Path, sample: Path, tmp_path: Path, clean: tuple[object, object, object]
) -> None:
    if phase == 0:
        workspace = write_workspace(tmp_path / "fresh", sample)
    done = onboard_that_dies(FAULTS[phase], *arguments(workspace))
    assert done.returncode == -9, done.stderr
    path = manifest.latest(workspace, "qwen3-30b-a3b")
    if phase == 0:
        assert path is None
        assert not any((workspace / name).exists() for name in ("sglang", "flashinfer"))
    else:
        assert path is not None
        run = manifest.load(path)
        states = {run.state(entry) for entry in run.kernels}
        allowed = {
            1: set(),
            2: {"existing", "new"},
            3: {"existing", "new", "defined", "waiting"},
            4: {"existing", "new", "defined", "waiting", "collected"},
        }
        assert states <= allowed[phase]
        if phase == 3:
            assert not list((workspace / "flashinfer-trace").glob("workloads/gqa_*/*.jsonl"))
        if phase == 4:
            assert run.phase4 == {}

    again = onboard(*arguments(workspace))
    assert again.returncode == 3, again.stderr
    assert outcome(workspace) == clean
