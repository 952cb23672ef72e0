"""Running the command line as a user does, and dying in the middle of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

QWEN = ("--model-name", "qwen3-30b-a3b", "--hf-repo-id", "Qwen/Qwen3-30B-A3B")


def onboard(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `onboard ARGUMENTS` and return what it printed and how it ended."""
    return _python("from flows.cli import main; main()", *arguments, cwd=cwd)


def onboard_that_dies(fault: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `onboard ARGUMENTS` with statements first that make one function kill the process -9."""
    code = (
        "import os, signal\n"
        "def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{fault}\n"
        "from flows.cli import main; main()"
    )
    return _python(code, *arguments)


def _python(
    code: str, *arguments: str | Path, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PREFECT_", "ONBOARD_", "HF_"))
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
