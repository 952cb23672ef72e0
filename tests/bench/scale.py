"""What orchestration costs: `python -m tests.bench.scale --models 50 --kernels 25`, without a GPU.

Every kernel's collection and evaluation do nothing here; everything else is real: a server with a
database, `onboard-model`, one `onboard-kernel` per kernel, their tasks and the manifest. Beside it,
in the same run and on a server of its own: as many bare Prefect flow runs with as many tasks that
do nothing. Prints wall time, the server's memory and its database's growth; asserts nothing.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil

from tasks import git, manifest
from tasks.manifest import DONE, KernelEntry, RunManifest
from tests.docker.database import database, why_not
from tests.docker.served import Prefect, prefect_server

_AT_A_TIME = 8
"""Models side by side, as the control pool's queue lets."""
_STEPS = 2
"""Tasks of each kernel: collect, evaluate."""


class Cost(NamedTuple):
    """One way to do it."""

    seconds: float
    server_seconds: float
    """CPU of the server."""
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


@contextmanager
def server(folder: Path) -> Iterator[tuple[Prefect, Callable[[], float]]]:
    """Run a server, and this process's Prefect with it; yields what tells its database's size."""
    with database() as store, prefect_server(folder, store.url) as prefect:
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        with temporary_settings(
            {PREFECT_API_URL: prefect.url, PREFECT_API_AUTH_STRING: prefect.password}
        ):
            yield prefect, store.megabytes


def measured(folder: Path, work: Callable[[], None]) -> Cost:
    """Do some work on a server of its own."""
    with server(folder) as (prefect, megabytes):
        process = psutil.Process(prefect.server.pid)
        before, cpu = megabytes(), sum(process.cpu_times()[:2])
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        return Cost(
            seconds,
            sum(process.cpu_times()[:2]) - cpu,
            process.memory_info().rss / 1e6,
            megabytes() - before,
        )


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
    asked = parser.parse_args()
    if reason := why_not():
        parser.exit(1, f"{reason}\n")
    os.environ["PREFECT_LOGGING_LEVEL"] = "CRITICAL"
    runs = asked.models * (1 + asked.kernels)
    print(f"{asked.models} models x {asked.kernels} kernels: {runs} flow runs, {_STEPS} tasks each")
    costs: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory(prefix="onboard-bench-") as name:
        folder = Path(name)
        workspace(folder / "workspace", asked.models, asked.kernels)
        works: dict[str, Callable[[], Any]] = {
            "bare Prefect": lambda: bare(asked.models, asked.kernels),
            "this project": lambda: onboarded(folder / "workspace", asked.models),
        }
        for what, work in works.items():
            (folder / what).mkdir()
            costs[what] = measured(folder / what, work)
            print(costs[what].line(what, runs), flush=True)
    one, other = costs["this project"], costs["bare Prefect"]
    print(
        f"this project / bare Prefect: {one.seconds / other.seconds:.2f} of the time, "
        f"{one.grown_mb / other.grown_mb:.2f} of the database"
    )


if __name__ == "__main__":
    main()
