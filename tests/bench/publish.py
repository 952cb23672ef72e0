"""What publishing to the Hub costs: `python -m tests.bench.publish`, to a local server.

Thirty definitions with twenty blobs each. Beside it, in the same run and to a server of its own:
a call of `upload_file` for every file, as FlashInfer-Bench's scripts publish. Prints calls, commits
and seconds of a definition, how often each blob was hashed, and how many uploads there were at a
time; asserts nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from huggingface_hub import HfApi, constants, lfs
from huggingface_hub.utils import disable_progress_bars
from pydantic import SecretStr

from tasks.publish.base import Branch, Post
from tasks.publish.hub import HubPublisher
from tests.fakes.hub import Hub
from tests.fakes.web import Answer, Request

_NAME = "flashinfer-ai/flashinfer-trace"
_TEXTS = (
    "definitions/gemm/{}.json",
    "tests/references/test_{}.py",
    "solutions/baseline/gemm/{0}/flashinfer_wrapper_{0}.json",
    "workloads/gemm/{}.jsonl",
    "traces/flashinfer/gemm/{}.jsonl",
)


class CountingHub(Hub):
    """A Hub that sees how many uploads there are at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._now = 0
        self._counting = threading.Lock()

    def answer(self, request: Request) -> Answer | None:
        upload = request.path.startswith("/storage/")
        with self._counting:
            self._now += upload
            self.most = max(self.most, self._now)
        try:
            return super().answer(request)
        finally:
            with self._counting:
                self._now -= upload


class Cost(NamedTuple):
    """One way to do it."""

    seconds: float
    calls: int
    commits: int
    hashes: int
    most: int
    """Uploads at a time."""

    def line(self, way: str, definitions: int, blobs: int) -> str:
        """Return it as a line of the table."""
        return (
            f"{way:16} {self.calls / definitions:8.1f} calls {self.commits / definitions:6.1f} "
            f"commits {1000 * self.seconds / definitions:7.0f} ms/definition "
            f"{self.hashes / (definitions * blobs):5.2f} hashes/blob {self.most:3} at a time"
        )


def made(folder: Path, number: int, blobs: int, size: int) -> tuple[Post, Branch]:
    """Write a definition's files; return what publishes them."""
    name = f"gemm_n{128 * (number + 1)}_k4096"
    random = np.random.default_rng(number)
    texts = {path.format(name): random.bytes(500).hex().encode() for path in _TEXTS}
    folders = f"blob/workloads/gemm/{name}"
    large = {f"{folders}/{name}_{n}.safetensors": random.bytes(size) for n in range(blobs)}
    for path, content in (texts | large).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    files = {PurePosixPath(path): folder / path for path in texts | large}
    title = f"Add {name}: definition + workloads"
    return Post(name, "dataset", _NAME, title, title), Branch(name, folder, title, files)


class Target(NamedTuple):
    """Where to publish, and as whom."""

    url: str
    token: str
    locks: Path


def one_commit(to: Target, post: Post, branch: Branch) -> None:
    """Open a pull request as a run does, with a publisher for each."""
    publisher = HubPublisher(_NAME, SecretStr(to.token), to.url, to.locks)
    publisher.open_pull_request(post, branch)


def upload_each(to: Target, post: Post, branch: Branch) -> None:
    """Open a pull request with the first file, and upload every other to it."""
    api = HfApi(to.url, to.token)
    revision = None
    for path, source in branch.files.items():
        info = api.upload_file(
            path_or_fileobj=source,
            path_in_repo=str(path),
            repo_id=_NAME,
            repo_type="dataset",
            commit_message=post.title,
            revision=revision,
            create_pr=revision is None,
        )
        revision = revision or info.pr_revision


_WAYS: dict[str, Callable[[Target, Post, Branch], None]] = {
    "upload_file each": upload_each,
    "this project": one_commit,
}


def measured(way: str, work: list[tuple[Post, Branch]], locks: Path) -> Cost:
    """Publish everything one way, to a server of its own."""
    hashed: list[str] = []
    compute = lfs.sha_fileobj

    def counted(file: object) -> bytes:
        hashed.append(str(getattr(file, "name", "")))
        return compute(file)  # type: ignore[arg-type]

    with CountingHub() as hub, patch.object(lfs, "sha_fileobj", counted):
        repository = hub.repository(_NAME, {"README.md": b"# Traces\n"})
        target = Target(hub.url, hub.user("contributor"), locks)
        start = time.perf_counter()
        for post, branch in work:
            _WAYS[way](target, post, branch)
        seconds = time.perf_counter() - start
        commits = len(repository.commits) - 1
        return Cost(seconds, hub.calls.total(), commits, len(hashed), hub.most)


def main() -> None:
    """Measure both ways, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--definitions", type=int, default=30)
    parser.add_argument("--blobs", type=int, default=20)
    parser.add_argument("--kilobytes", type=int, default=256, help="of each blob")
    asked = parser.parse_args()
    disable_progress_bars()
    constants.HF_HUB_DISABLE_XET = True  # the local server has none
    with tempfile.TemporaryDirectory(prefix="onboard-bench-") as folder:
        size = 1024 * asked.kilobytes
        work = [
            made(Path(folder, "clone"), number, asked.blobs, size)
            for number in range(asked.definitions)
        ]
        costs = [measured(way, work, Path(folder, "locks")) for way in _WAYS]
    for way, cost in zip(_WAYS, costs, strict=True):
        print(cost.line(way, asked.definitions, asked.blobs))
    theirs, ours = costs
    print(
        f"this project / upload_file each: {ours.calls / theirs.calls:.2f} of the calls, "
        f"{ours.commits / theirs.commits:.2f} of the commits, "
        f"{ours.seconds / theirs.seconds:.2f} of the time"
    )


if __name__ == "__main__":
    main()
