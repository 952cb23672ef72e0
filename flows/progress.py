"""Progress on the terminal, read from the run manifest as it changes."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tasks import manifest
from tasks.errors import OnboardError
from tasks.manifest import RunManifest

_SECONDS = 0.3
_STYLE = {
    "failed": "red",
    "waiting": "yellow",
    "needs_reference": "yellow",
    "changes_requested": "yellow",
    "rejected": "red",
    "published": "green",
    "merged": "green",
    "existing": "dim",
    "collected": "cyan",
}


class _Lines(logging.Handler):
    """Log records as lines, which a terminal wraps and nothing else does."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        text = record.getMessage()
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def log_lines(console: Console) -> Iterator[None]:
    """Print what tasks log, a line each, while the block runs."""
    handler = _Lines(console)
    logger = logging.getLogger("prefect.task_runs")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class Progress:
    """Shows every kernel's state while the block runs.

    On a terminal a live table of the kernels that are not `existing`; elsewhere a line per change.
    The manifest is read, never written; the run does not know that it is watched.
    """

    def __init__(self, workspace: Path, model_slug: str, console: Console) -> None:
        self._workspace, self._slug, self._console = workspace, model_slug, console
        self._seen: Mapping[str, str] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._live = Live(console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        self._look()
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        if self._live:
            self._live.stop()

    def _watch(self) -> None:
        while not self._stop.wait(_SECONDS):
            self._look()

    def _look(self) -> None:
        path = manifest.latest(self._workspace, self._slug)
        if path is None:
            self._seen = self._seen or {}
            return
        try:
            run = manifest.load(path)
        except OnboardError:
            return  # The run itself reports a damaged manifest.
        states = {entry.definition_name: run.state(entry) for entry in run.kernels}
        if self._live:
            self._live.update(_table(run, states))
        elif self._seen is not None:
            for name, state in states.items():
                if state not in ("existing", self._seen.get(name, "new")):
                    self._console.print(f"  {name}: {state}", highlight=False, soft_wrap=True)
        self._seen = states


def _table(run: RunManifest, states: Mapping[str, str]) -> Table:
    counts = Counter(states.values())
    title = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    table = Table(title=f"{run.model_slug}: {title}", box=None, show_header=False)
    for name, state in states.items():
        if state != "existing":
            table.add_row(name, f"[{_STYLE.get(state, 'default')}]{state}")
    return table
