"""The project's own images, made without a registry and without downloading anything.

To the Debian that `.ci/docker` made come this environment's Python and its installed packages,
these where the Dockerfiles put theirs, so that their `pip install` finds everything in place.
Nothing is made again that has not changed. Run as a module, it makes all images.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import docker
from docker.errors import DockerException, ImageNotFound
from docker.models.containers import Container
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = "onboard-test/debian:bookworm"
WORKER = "onboard-test/worker:latest"
CONTROL = "onboard-test/control:latest"
_BASE = "onboard-test/base"
_LABEL = "onboard-test"
_LOCK = "/tmp/onboard-test-images.lock"
_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
_EXTRAS = {"control": "bench,server", "worker": "bench"}
_SYSTEM_PACKAGES = {  # no compiler: the stand-in compiles no kernels
    "control": "ca-certificates git libseccomp2",
    "worker": "ca-certificates libseccomp2 python3-venv",
}
# Large, and only for compiling, checking or testing.
_LEFT_OUT = (
    "lib/python3*/config-*",
    "lib/python3*/site-packages",
    "lib/python3*/test",
    "_virtualenv.*",
    "__editable__*",
    "fib_onboard-*",
    "flashinfer/data/*",
    "mypy",
    "mypyc",
    "*__mypyc.*",
    "nccl",
    "nvidia_cutlass_dsl",
    "nvidia_cutlass_dsl_packages.pth",
    "torch/bin/protoc*",
    "torch/bin/test_*",
    "torch/include",
    "torch/test",
)


def why_not() -> str:
    """Return why images cannot be made here; empty if they can."""
    try:
        client = docker.from_env(timeout=10)
    except DockerException as error:
        return f"no Docker engine answers; run .ci/docker ({error})"
    try:
        client.images.get(DEBIAN)
    except ImageNotFound:
        return f"{DEBIAN} is not there; run .ci/docker"
    finally:
        client.close()
    return ""


def make(client: docker.DockerClient, image: str) -> str:
    """Build an image from its own Dockerfile, and return its name.

    Args:
        client: of the engine to build with.
        image: `WORKER` or `CONTROL`.
    """
    role = image.removeprefix("onboard-test/").partition(":")[0]
    arguments = {
        "EXTRAS": _EXTRAS[role],
        "PIP_NO_INDEX": "1",
        "SGLANG_VERSION": "",  # the tests bring a stand-in
        "SYSTEM_PACKAGES": _SYSTEM_PACKAGES[role],
    }
    with FileLock(_LOCK):
        arguments["BASE_IMAGE"] = _base(client)
        client.images.build(
            path=str(ROOT),
            dockerfile=f"docker/{role}.Dockerfile",
            tag=image,
            buildargs=arguments,
            network_mode="none",
            rm=True,
            forcerm=True,
        )
        client.images.prune(filters={"dangling": True, "label": _LABEL})
    return image


def _base(client: docker.DockerClient) -> str:
    """Make Debian with our installed packages in `/opt/venv`, unless that is there."""
    debian = client.images.get(DEBIAN)
    # A set: where this repository is on the path it is found twice.
    installed = sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions()})
    content = "\n".join([str(debian.id), sys.version, _LABEL, *_LEFT_OUT, *installed])
    name = f"{_BASE}:{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    try:
        client.images.get(name)
    except ImageNotFound:
        _commit_base(client, name)
        for older in client.images.list(_BASE):
            for tag in set(older.tags) - {name}:
                client.images.remove(tag)
    return name


def _commit_base(client: docker.DockerClient, name: str) -> None:
    container = client.containers.create(DEBIAN, "ldconfig", network_mode="none")
    try:
        for folder, names, target in _parts():
            _put(container, folder, names, target)
        container.put_archive("/", _scripts())
        container.start()  # finds libpython
        assert container.wait()["StatusCode"] == 0, container.logs()
        repository, _, tag = name.partition(":")
        container.commit(repository, tag, changes=f"LABEL {_LABEL}=")
    finally:
        container.remove(force=True)


def _parts() -> Iterator[tuple[Path, list[str], str]]:
    """Yield a folder, names in it, and where in the image they go."""
    packages = Path(docker.__file__).parents[1]
    yield packages, ["."], f"opt/venv/lib/{_PYTHON}/site-packages"
    prefix = Path(sys.base_prefix)
    if prefix != Path("/usr"):  # else it is Debian's, as the image's is
        names = [f"bin/{_PYTHON}", "bin/python3", f"lib/{_PYTHON}"]
        if sysconfig.get_config_var("Py_ENABLE_SHARED"):
            names.append(f"lib/{sysconfig.get_config_var('INSTSONAME')}")
        yield prefix, names, "usr/local"


def _put(container: Container, folder: Path, names: list[str], target: str) -> None:
    with subprocess.Popen(
        [
            *("tar", "--create", "--directory", str(folder), "--owner=0", "--group=0"),
            *(f"--transform=s,^,{target}/,S", *(f"--exclude={each}" for each in _LEFT_OUT)),
            *names,
        ],
        stdout=subprocess.PIPE,
    ) as tar:
        container.put_archive("/", tar.stdout)
    assert tar.returncode == 0


def _scripts() -> bytes:
    """Return a tar of the environment's commands, which name its Python in their first line."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for command in ("prefect", "pip"):
            text = (Path(sys.executable).parent / command).read_text()
            body = text.partition("\n")[2].encode()
            info = tarfile.TarInfo(f"opt/venv/bin/{command}")
            data = b"#!/opt/venv/bin/python3\n" + body
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


if __name__ == "__main__":
    engine = docker.from_env(timeout=600)
    for wanted in (WORKER, CONTROL):
        print(make(engine, wanted))
