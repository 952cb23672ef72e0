"""What orchestration costs: `python -m tests.bench.scale --models 50 --kernels 25`, without a GPU.

Every kernel's collection and evaluation do nothing here; everything else is real: a server with a
database, `onboard-model`, one `onboard-kernel` per kernel, their tasks and the manifest. Beside it,
in the same run and on a server of its own: as many bare Prefect flow runs with as many tasks that
do nothing. Prints wall time, the server's memory and its database's growth; asserts nothing.
"""

from __future__ import annotations

import argparse
import datetime as dt
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import psutil

from tasks import git, manifest
from tasks.manifest import DONE, KernelEntry, RunManifest
from tests.docker.database import database, why_not
from tests.docker.served import prefect_server

_AT_A_TIME = 8
"""Models side by side, as the control pool's queue lets."""
_WAYS = ("bare Prefect", "this project")
_IDLE_SECONDS, _IDLE_PERCENT = 5, 10.0
_STEPS = 2
"""Tasks of each kernel: collect, evaluate."""


class Cost(NamedTuple):
    """One way to do it."""

    seconds: float
    server_seconds: float
    """CPU of the server, until it has recorded everything."""
    memory_mb: float
    """The server's at the end."""
    grown_mb: float
    """The database's growth."""

    def line(self, what: str, runs: int) -> str:
        """Return it as a line of the table."""
        return (
            f"{what:14} {self.seconds:9.1f} s {1000 * self.seconds / runs:9.0f} ms/run "
            f"{self.server_seconds:9.1f} s CPU {self.memory_mb:8.0f} MB {self.grown_mb:9.1f} MB"
        )


def measured(what: str, folder: Path, asked: argparse.Namespace) -> Cost:
    """Do one way's work in a process of its own, on a server of its own."""
    folder.mkdir()
    with database() as store, prefect_server(folder, store.url) as prefect:
        process = psutil.Process(prefect.server.pid)
        before, cpu = store.megabytes(), sum(process.cpu_times()[:2])
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.bench.scale", "--way", what),
                *("--models", str(asked.models), "--kernels", str(asked.kernels)),
                *("--folder", str(folder.parent / "workspace")),
            ],
            env=prefect.environment(PREFECT_LOGGING_LEVEL="CRITICAL"),
            check=True,
            capture_output=True,
            text=True,
        )
        settle(process)
        return Cost(
            float(done.stdout.splitlines()[-1]),
            sum(process.cpu_times()[:2]) - cpu,
            process.memory_info().rss / 1e6,
            store.megabytes() - before,
        )


def settle(server: psutil.Process) -> None:
    """Wait until a server has recorded what it was sent: events go on after the last run's end."""
    idle = 0
    while idle < _IDLE_SECONDS:
        idle = idle + 1 if server.cpu_percent(interval=1.0) < _IDLE_PERCENT else 0


def workspace(folder: Path, models: int, kernels: int) -> None:
    """Make a workspace whose models have nothing left to do but to collect."""
    for name in ("sglang", "flashinfer", "sgl-cookbook", "flashinfer-trace"):
        clone = folder / name
        clone.mkdir(parents=True)
        git.run("init", "--quiet", cwd=clone)
        who = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")
        git.run(*who, "commit", "--quiet", "--allow-empty", "-m", "Nothing", cwd=clone)
    day = dt.date(2026, 1, 2)
    for model in range(models):
        entries = [
            KernelEntry(
                definition_name=f"gemm_n{1 + kernel}_k64",
                op_type="gemm",
                phase1_status="new",
                fi_status="fi_supported",
                sgl_status="sgl_integrated",
                phase2_status=DONE,
            )
            for kernel in range(kernels)
        ]
        run = RunManifest(model_slug=f"m{model}", hf_repo_id=None, date=day, kernels=entries)
        manifest.create(folder / manifest.file_name(run.model_slug, day), run)


def onboarded(folder: Path, models: int) -> None:
    """Run the product's flows, whose GPU steps do nothing."""
    from flows.onboard import onboard_model
    from tasks.request import OnboardRequest
    from tasks.step import step

    @step(3, "collect", "Nothing.")
    def collect(path: Path, name: str, dumps: Path | None) -> int:
        return 0

    @step(3, "evaluate baseline", "Nothing but the manifest's entry.")
    def evaluate(request: OnboardRequest, path: Path, name: str) -> None:
        manifest.update_kernel(path, name, phase3_status=DONE)

    def one(model: int) -> None:
        asked = OnboardRequest(model_name=f"m{model}", workspace=folder, phases=(3,))
        assert onboard_model(asked, return_state=True).is_completed()

    with (
        patch.multiple("flows.kernel", collect=collect, evaluate=evaluate),
        ThreadPoolExecutor(_AT_A_TIME) as pool,
    ):
        list(pool.map(one, range(models)))


def bare(models: int, kernels: int) -> None:
    """Run as many flows with as many tasks, and nothing of the product."""
    from prefect import flow, task
    from prefect.futures import wait
    from prefect.task_runners import ThreadPoolTaskRunner

    @task
    def nothing() -> None:
        return None

    @flow(name="bare-kernel")
    def kernel() -> None:
        for _ in range(_STEPS):
            nothing()

    @task
    def start(_: int) -> None:
        kernel()

    @flow(name="bare-model", task_runner=ThreadPoolTaskRunner(max_workers=8))  # type: ignore[arg-type]
    def model() -> None:
        wait(start.map(list(range(kernels))))

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        list(pool.map(lambda _: model(), range(models)))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--kernels", type=int, default=200)
    parser.add_argument("--way", choices=_WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        started = time.perf_counter()
        if asked.way == _WAYS[0]:
            bare(asked.models, asked.kernels)
        else:
            onboarded(asked.folder, asked.models)
        print(time.perf_counter() - started)
        return
    if reason := why_not():
        parser.exit(1, f"{reason}\n")
    runs = asked.models * (1 + asked.kernels)
    print(f"{asked.models} models x {asked.kernels} kernels: {runs} flow runs, {_STEPS} tasks each")
    with tempfile.TemporaryDirectory(prefix="onboard-bench-") as name:
        folder = Path(name)
        workspace(folder / "workspace", asked.models, asked.kernels)
        costs = []
        for what in _WAYS:
            costs.append(measured(what, folder / what, asked))
            print(costs[-1].line(what, runs), flush=True)
    other, one = costs
    print(
        f"this project / bare Prefect: {one.seconds / other.seconds:.2f} of the time, "
        f"{one.grown_mb - other.grown_mb:+.1f} MB in the database"
    )


if __name__ == "__main__":
    main()
