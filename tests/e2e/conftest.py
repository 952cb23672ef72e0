"""Workspaces for child processes: clones made, and Prefect's database migrated once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import DATA, copy_workspace, shared
from tests.e2e.commands import QWEN, onboard

CONFIG = DATA / "configs" / "Qwen--Qwen3-30B-A3B.json"


@pytest.fixture(scope="session")
def prefect_home(cloned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `.prefect` folder that a first run leaves."""

    def make(folder: Path) -> None:
        copy_workspace(cloned, folder)
        done = onboard("run", *QWEN, "--config", CONFIG, "--workspace", folder, "--phases", "1")
        assert done.returncode == 0, done.stderr

    return shared(tmp_path_factory, "home", make) / ".prefect"


@pytest.fixture
def workspace(cloned: Path, prefect_home: Path, tmp_path: Path) -> Path:
    """A workspace of one's own, with all clones and a migrated database (a copy: it is edited)."""
    folder = copy_workspace(cloned, tmp_path / "workspace")
    shutil.copytree(prefect_home, folder / ".prefect")
    return folder
