"""Shared fixtures: the sample's remotes (built once), and workspaces made from them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tomli_w
from filelock import FileLock
from hypothesis import HealthCheck, settings

from flows.embedded import server_process
from tasks.collect.keeper import free_port
from tasks.discover.inventory import Sources
from tasks.discover.phase import read_sources
from tasks.git import short_sha
from tasks.repos import clone
from tasks.repos.sample import make_sample
from tasks.settings import load_settings

DATA = Path(__file__).parent / "data"

# Processes of tests share the cores: torch's threads would spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Nothing is timed: machines differ.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what the installed extras cannot run."""
    missing = [
        name
        for name in ("torch", "flashinfer", "flashinfer_bench")
        if importlib.util.find_spec(name) is None
    ]
    for item in items:
        if missing and item.get_closest_marker("bench_extra"):
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on loopback while the block runs; yield the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.upper().startswith("ONBOARD_"):
                patch.delenv(name)
        patch.setattr("tasks.settings._SECRETS", Path("/nonexistent"))
        yield


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that all processes in which tests run side by side share; read only.

    Args:
        factory: of the process.
        name: of the folder.
        make: what makes it, where no process has done so.
    """
    root = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    folder, made = root / "shared" / name, root / f"{name}.made"
    with FileLock(root / f"{name}.lock"):
        if not made.exists():
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo workspace as `onboard sample` makes it; read only."""
    return shared(tmp_path_factory, "sample", lambda folder: make_sample(folder, print))


def write_workspace(folder: Path, sample: Path, **remotes: str) -> Path:
    """Make a workspace whose remotes and dumps are the sample's, except those given."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {path.stem.replace("-", "_"): str(path) for path in (sample / "remotes").glob("*.git")}
    settings = {
        "remotes": known | remotes,
        "collect": {"recorded_dumps": str(sample / "dumps")},
    }
    (folder / "onboard.toml").write_text(tomli_w.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def cloned(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with all clones made, and their sources read; read only, see `workspace`."""

    def make(folder: Path) -> None:
        options = load_settings(write_workspace(folder, sample))
        shas = {
            name: clone.update(name, url, options.clone(name)).sha
            for name, url in options.remotes.model_dump().items()
        }
        trees = (options.clone(name) for name in ("flashinfer", "sglang"))
        read_sources(*trees, shas, folder / ".cache")

    return shared(tmp_path_factory, "cloned", make)


@pytest.fixture(scope="session")
def indexes(cloned: Path) -> Sources:
    """What the clones' sources have."""
    trees = cloned / "flashinfer", cloned / "sglang"
    return read_sources(*trees, {tree.name: short_sha(tree) for tree in trees}, cloned / ".cache")


def copy_workspace(cloned: Path, folder: Path) -> Path:
    """Copy a workspace by hard links: git and this project replace files, they never edit them."""
    shutil.copytree(cloned, folder, copy_function=os.link, symlinks=True)
    return folder


@pytest.fixture
def workspace(cloned: Path, tmp_path: Path) -> Path:
    """A workspace of one's own, with all clones."""
    return copy_workspace(cloned, tmp_path / "workspace")


@pytest.fixture(scope="session")
def dumps(sample: Path) -> Path:
    """The recorded dumps of Qwen3-30B-A3B on an H200."""
    return sample / "dumps" / "qwen3-30b-a3b"


@pytest.fixture
def own_dumps(tmp_path: Path) -> Path:
    """A copy of the small recording (norms) to damage."""
    folder = tmp_path / "dumps"
    with tarfile.open(DATA / "dumps_h200" / "qwen3_30b_a3b_c.tar.xz") as packed:
        packed.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's folder with its database, which takes a while to make; read only."""

    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        with server_process(folder, free_port()):
            pass

    return shared(tmp_path_factory, "prefect", make)


@pytest.fixture(scope="session")
def prefect_server(prefect_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Prefect server with a database of its own for all flow tests."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    folder = tmp_path_factory.mktemp("prefect") / "server"
    shutil.copytree(prefect_home, folder)
    with server_process(folder, free_port()) as url, temporary_settings({PREFECT_API_URL: url}):
        yield
