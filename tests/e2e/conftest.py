"""Workspaces for child processes: clones made, and Prefect's database."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import DATA, copy_workspace

CONFIG = DATA / "configs" / "Qwen--Qwen3-30B-A3B.json"


@pytest.fixture
def workspace(cloned: Path, prefect_home: Path, tmp_path: Path) -> Path:
    """A workspace of one's own, with all clones and a server's database (a copy: it is edited)."""
    folder = copy_workspace(cloned, tmp_path / "workspace")
    shutil.copytree(prefect_home, folder / ".prefect")
    return folder
