"""What `onboard sanitize` costs, whole processes: `python -m tests.bench.sanitize`.

With `--baseline PATH` to FlashInfer-Bench's scripts/sanitize_dumps.py, the same dumps go through
both, and ratios are printed; with `--slow` also the largest set, which takes it ten minutes.
Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.bench.synthetic import DEFINITIONS, Dumps, write_dumps
from tests.conftest import DATA

_CONFIG = DATA / "configs" / "meta-llama--Meta-Llama-3.1-8B.json"
_SETS = (
    ("500 dumps, keep 20", partial(write_dumps, count=500), 20),
    ("2,000 dumps, keep 20", partial(write_dumps, count=2000), 20),
    (
        "10,000 dumps, keep 500",
        partial(write_dumps, count=10_000, layers=1, sampling=False),
        500,
    ),
)


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    megabytes: float
    """Peak resident memory."""
    rows: int
    """Distinct true workloads among the rows it wrote."""


def measure(command: Sequence[str]) -> tuple[float, float]:
    """Run a command; return its seconds and its peak memory in MB."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with child:
        assert child.stderr is not None
        error = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{error.decode()}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def true_rows(dataset: Path, dumps: Dumps) -> int:
    """Count the true workloads that a dataset has, by their axes."""
    count = 0
    for name, truth in dumps.truth.items():
        for path in dataset.glob(f"workloads/*/{name}.jsonl"):
            lines = path.read_text().splitlines()
            axes = [json.loads(line)["workload"]["axes"] for line in lines]
            found = {tuple(sorted(each.items())) for each in axes}
            count += len(found & {workload[0] for workload in truth})
    return count


def best(command: Callable[[Path], list[str]], folder: Path, dumps: Dumps, times: int) -> Cost:
    """Return the shortest of several runs, each into a fresh dataset."""
    costs = []
    for turn in range(times):
        dataset = folder / f"dataset{turn}"
        shutil.copytree(DATA / "mini-trace" / "definitions", dataset / "definitions")
        costs.append(Cost(*measure(command(dataset)), true_rows(dataset, dumps)))
        shutil.rmtree(dataset)
    return min(costs)


def main() -> None:
    """Measure every set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", type=Path, help="FlashInfer-Bench's sanitize_dumps.py.")
    parser.add_argument("--times", type=int, default=5, help="Runs of ours; the best counts.")
    parser.add_argument("--slow", action="store_true", help="Give the baseline the largest set.")
    given = parser.parse_args()
    onboard = [sys.executable, "-c", "from flows.cli import main; main()", "sanitize"]
    for what, write, kept in _SETS:
        with tempfile.TemporaryDirectory(prefix="onboard-bench-") as name:
            folder, dump_dir = Path(name), Path(name, "dumps")
            dumps = write(dump_dir)

            def ours(dataset: Path, dump_dir: Path = dump_dir, kept: int = kept) -> list[str]:
                limits = ["--model-config", str(_CONFIG), "--max-workloads", str(kept)]
                return [*onboard, f"--dump-dir={dump_dir}", f"--dataset={dataset}", *limits]

            def theirs(dataset: Path, dump_dir: Path = dump_dir, kept: int = kept) -> list[str]:
                named = ["--definitions", *DEFINITIONS.values()]
                where = ["--dump-dir", str(dump_dir), "--flashinfer-trace-dir", str(dataset)]
                return [
                    *(sys.executable, str(given.baseline), *where, *named),
                    *("--replace", "--max-new-workloads", str(kept)),
                ]

            cost = best(ours, folder, dumps, given.times)
            print(f"sanitize: {what:24} {cost.seconds:7.2f} s {cost.megabytes:5.0f} MB", end="")
            print(f" {cost.rows:5} true workloads", flush=True)
            if given.baseline and (given.slow or kept <= 20):
                other = best(theirs, folder, dumps, 1)
                print(
                    f"  baseline: {other.seconds:7.2f} s ({other.seconds / cost.seconds:.1f} x) "
                    f"{other.megabytes:5.0f} MB {other.rows:5} true workloads",
                    flush=True,
                )


if __name__ == "__main__":
    main()
