"""deployments/compose.yaml and what prepares a machine for it."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOYMENTS = Path(__file__).resolve().parents[2] / "deployments"
_HOME = "${ONBOARD_HOME:-/srv/onboard}"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())
    return found


def _prepare(folder: Path) -> None:
    subprocess.run(
        [str(DEPLOYMENTS / "prepare.sh"), str(folder)],
        env={**os.environ, "USER_ID": str(os.getuid())},
        check=True,
    )


def test_only_the_server_is_published_and_only_here(compose: dict[str, Any]) -> None:
    ports = {name: each["ports"] for name, each in compose["services"].items() if "ports" in each}
    assert ports == {"server": ["${ONBOARD_LISTEN:-127.0.0.1}:4200:4200"]}


def test_secrets_are_files(compose: dict[str, Any], tmp_path: Path) -> None:
    for each in compose["services"].values():
        for name, value in each.get("environment", {}).items():
            named = re.search("PASSWORD|AUTH|TOKEN|PROFILES_PATH", name)
            assert not named or value.startswith("/run/secrets/")
    _prepare(tmp_path)
    files = [
        Path(each["file"].replace(_HOME, str(tmp_path))) for each in compose["secrets"].values()
    ]
    assert set(files) == set((tmp_path / "secrets").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o400}
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700


def test_the_server_and_its_clients_know_one_password(tmp_path: Path) -> None:
    _prepare(tmp_path)
    known = [
        tomllib.loads((tmp_path / "secrets" / f"{role}.toml").read_text())["profiles"][role]
        for role in ("server", "client")
    ]
    assert known[0]["PREFECT_SERVER_API_AUTH_STRING"] == known[1]["PREFECT_API_AUTH_STRING"]
    assert len(known[1]) == 1
    before = {path: path.read_bytes() for path in (tmp_path / "secrets").iterdir()}
    _prepare(tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "secrets").iterdir()} == before


def test_the_folder_is_that_of_the_settings(tmp_path: Path) -> None:
    script = shutil.copy(DEPLOYMENTS / "prepare.sh", tmp_path)
    (tmp_path / ".env").write_text(f"CONTROL_LIMIT=4\nONBOARD_HOME={tmp_path / 'home'}\n")
    environment = {**os.environ, "USER_ID": str(os.getuid())}
    environment.pop("ONBOARD_HOME", None)
    subprocess.run([script], env=environment, check=True)
    assert (tmp_path / "home" / "secrets" / "client.toml").exists()


def test_only_the_gpu_worker_reaches_the_engine(compose: dict[str, Any]) -> None:
    socket = "/var/run/docker.sock:/var/run/docker.sock"
    services = compose["services"].items()
    assert [name for name, each in services if socket in each.get("volumes", [])] == ["gpu-worker"]


def test_every_setting_is_in_the_example(compose: dict[str, Any]) -> None:
    used = set(re.findall(r"\${(\w+)", (DEPLOYMENTS / "compose.yaml").read_text()))
    example = (DEPLOYMENTS / ".env.example").read_text()
    assert used == set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
