"""Evaluate the baseline on the collected workloads with flashinfer-bench, where there is a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from tasks import files, sandbox
from tasks.dataset import DefinitionFiles
from tasks.errors import CollectError

_COMMAND = "from flashinfer_bench.cli.main import cli; cli()"
_SECONDS = 3600
_MEMORY_GB = 512


def evaluate(dataset: Path, op_type: str, name: str) -> str:
    """Run the baseline of one definition and store its traces in the dataset.

    Works on a copy of the definition's files, so that a failed evaluation leaves no trace behind.

    Returns:
        What came of it, as people read it; without a GPU or flashinfer-bench, why nothing did.

    Raises:
        CollectError: the evaluation failed, or a workload did not pass.
    """
    place = DefinitionFiles(op_type, name)
    if not (dataset / place.solutions).is_dir():
        return "not evaluated (the kernel has no baseline)"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if hidden or not any(Path("/dev").glob("nvidia[0-9]*")):
        return "not evaluated (no CUDA device on this host)"
    if importlib.util.find_spec("flashinfer_bench") is None:
        return "not evaluated (flashinfer-bench is not installed)"
    with tempfile.TemporaryDirectory(prefix="onboard-evaluate-") as folder:
        copy = Path(folder)
        for path in place.staged(dataset):
            if path == place.traces:
                continue
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(dataset / path, copy / path)
        outcome = sandbox.run_python(
            ["-c", _COMMAND, "run", "--local", folder, "--definitions", name],
            timeout=_SECONDS,
            memory_gb=_MEMORY_GB,
            cwd=copy,
        )
        if not outcome.ok:
            raise CollectError(f"{name}: evaluating the baseline {outcome.reason}")
        lines = [
            line
            for path in sorted((copy / "traces").rglob("*.jsonl"))
            for line in path.read_text().splitlines()
        ]
    statuses = Counter(json.loads(line)["evaluation"]["status"] for line in lines)
    failed = {status: count for status, count in statuses.items() if status != "PASSED"}
    if failed or not statuses:
        counted = ", ".join(f"{count} x {status}" for status, count in failed.items())
        raise CollectError(f"{name}: the baseline did not pass ({counted or 'no traces'})")
    files.write_text(dataset / place.traces, "\n".join(lines) + "\n")
    return f"PASSED on {statuses['PASSED']} workloads"
