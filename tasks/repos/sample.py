"""The demo workspace: real inputs as local git remotes, for a machine with no account and no GPU.

FlashInfer and SGLang are the real packages, downloaded from the package index and committed as
their repositories have them (Python sources only: that is what phase 1 reads). The dataset, the
cookbook, the coverage document, two model configs and the recorded dumps come from `tests/data`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import tomli_w

from tasks import files
from tasks.coverage_doc import PATH as COVERAGE_PATH
from tasks.coverage_doc import CoverageDocument
from tasks.dataset import DefinitionFiles
from tasks.errors import InputError
from tasks.git import AUTHOR, git

DATA = Path(__file__).resolve().parents[2] / "tests" / "data"
CACHE = Path.home() / ".cache" / "fib-onboard" / "sources"

PACKAGES = {
    "flashinfer-python": "0.6.15.post1",
    "sglang": "0.5.17",
    "sglang-kernel": "0.4.5",
}
"""Versions that belong together, and that left the recorded dumps: SGLang pins the other two."""

LACKING = (
    DefinitionFiles("gqa_paged", "gqa_paged_decode_h32_kv4_d128_ps1"),
    DefinitionFiles("gqa_ragged", "gqa_ragged_prefill_causal_h32_kv4_d128"),
    DefinitionFiles("rmsnorm", "fused_add_rmsnorm_h2048"),
    DefinitionFiles("sampling", "top_k_sampling_from_probs_v151936"),
)
"""What the demo's dataset does not have of Qwen3-30B-A3B."""

MODELS = {"qwen3-30b-a3b": "Qwen--Qwen3-30B-A3B", "minimax-m1": "MiniMaxAI--MiniMax-M1-80k"}
_COVERED_MODEL = "Qwen3 30B A3B"
_WHEN = "2026-11-20T00:00:00+00:00"
_KEPT = {".py", ".md", ".txt", ""}


def download(package: str, version: str) -> Path:
    """Return the unpacked Python sources of a package, downloading its wheel the first time.

    Raises:
        InputError: pip cannot download it.
    """
    target = CACHE / f"{package}-{version}"
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".download-") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            + ["--disable-pip-version-check", "--only-binary=:all:", "--dest", folder]
            + ["--python-version=3.11", "--implementation=cp"]
            + [f"--abi={abi}" for abi in ("cp311", "abi3", "none")]
            + [f"--platform={p}_x86_64" for p in ("manylinux_2_34", "manylinux2014")]
            + [f"{package}=={version}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise InputError(f"{package} {version}: cannot be downloaded ({' '.join(lines)[:300]})")
        unpacked = Path(folder, "unpacked")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if PurePosixPath(name).suffix in _KEPT:
                    wheel.extract(name, unpacked)
        unpacked.rename(target)
    return target


def _commit(tree: Path, remote: Path, message: str) -> None:
    """Commit a folder as the only commit of a bare repository; equal folders give equal commits."""
    where = (f"--git-dir={remote}", f"--work-tree={tree}")
    git("init", "--quiet", "--bare", "--initial-branch=main", str(remote))
    git(*where, "-c", "core.bare=false", "add", "--all", "--force", ".")
    dates = {"GIT_AUTHOR_DATE": _WHEN, "GIT_COMMITTER_DATE": _WHEN}
    git(
        *(*where, "-c", "core.bare=false", "commit", "--quiet", "-m", message),
        env={**AUTHOR, **dates},
    )
    git("config", "uploadpack.allowFilter", "true", cwd=remote)


def _flashinfer(tree: Path) -> None:
    source = download("flashinfer-python", PACKAGES["flashinfer-python"])
    shutil.copytree(source / "flashinfer", tree / "flashinfer")


def _sglang(tree: Path) -> None:
    source = download("sglang", PACKAGES["sglang"])
    shutil.copytree(source / "sglang", tree / "python" / "sglang")
    kernel = download("sglang-kernel", PACKAGES["sglang-kernel"])
    shutil.copytree(kernel / "sgl_kernel", tree / "sgl-kernel" / "python" / "sgl_kernel")


def _cookbook(tree: Path) -> None:
    shutil.copytree(DATA / "sgl-cookbook", tree, dirs_exist_ok=True)


def _dataset(tree: Path) -> None:
    shutil.copytree(DATA / "mini-trace", tree, dirs_exist_ok=True)
    for place in LACKING:
        (tree / place.definition).unlink()
        (tree / place.workloads).unlink(missing_ok=True)


def _bench(tree: Path) -> None:
    text = (DATA / "flashinfer-bench" / COVERAGE_PATH).read_text(encoding="utf-8")
    document = CoverageDocument.parse(text)
    for place in LACKING:
        document.mark(_COVERED_MODEL, place.name, place.op_type, "❌")
    files.write_text(tree / COVERAGE_PATH, document.render())


_REPOSITORIES: dict[str, Callable[[Path], None]] = {
    "sglang": _sglang,
    "flashinfer": _flashinfer,
    "sgl_cookbook": _cookbook,
    "flashinfer_trace": _dataset,
    "flashinfer_bench": _bench,
}


def make_sample(workspace: Path, progress: Callable[[str], None]) -> bool:
    """Write the demo workspace; return False if it is already there.

    It is built beside its place and renamed, so that an interrupted one is not taken for whole.

    Args:
        workspace: the folder, which must not exist or be an earlier sample.
        progress: called with a line per step.

    Raises:
        InputError: the folder is something else, cannot be written, or a package cannot be had.
    """
    if (workspace / "onboard.toml").exists():
        return False
    if not DATA.is_dir():
        raise InputError(f"{DATA}: not found; the sample is made from a checkout of the project")
    if workspace.exists() and any(workspace.iterdir()):
        raise InputError(f"{workspace}: exists and is not a sample workspace")
    try:
        workspace.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=workspace.parent, prefix=f".{workspace.name}."))
    except OSError as error:
        raise InputError(f"{workspace.parent}: cannot be written ({error.strerror})") from error
    try:
        _fill(unfinished, progress)
        if workspace.exists():
            workspace.rmdir()
        unfinished.chmod(0o755)
        unfinished.rename(workspace)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _fill(folder: Path, progress: Callable[[str], None]) -> None:
    remotes = {}
    for name, fill in _REPOSITORIES.items():
        progress(f"remote {name}")
        with tempfile.TemporaryDirectory(dir=folder) as tree:
            fill(Path(tree))
            remote = folder / "remotes" / f"{name.replace('_', '-')}.git"
            _commit(Path(tree), remote, f"Sample of {name.replace('_', '-')}")
        remotes[name] = remote.relative_to(folder).as_posix()
    progress("model configs")
    for slug, name in MODELS.items():
        config = (DATA / "configs" / f"{name}.json").read_bytes()
        files.write_bytes(folder / "configs" / f"{slug}.json", config)
    progress("recorded dumps")
    dumps = folder / "dumps" / "qwen3-30b-a3b"
    dumps.mkdir(parents=True)
    for archive in sorted((DATA / "dumps_h200").glob("qwen3_30b_a3b_*.tar.xz")):
        with tarfile.open(archive) as packed:
            packed.extractall(dumps, filter="data")
    settings = {
        "remotes": remotes,
        "collect": {"recorded_dumps": "dumps"},
        "publish": {"to": "outbox"},  # whoever tries it may have tokens
    }
    files.write_text(folder / "onboard.toml", tomli_w.dumps(settings))
