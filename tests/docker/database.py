"""A PostgreSQL of one's own for a test's Prefect server, which SQLite is too slow for."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.collect.keeper import free_port

_PROGRAMS = "/usr/lib/postgresql/*/bin"
_USER = "postgres"


def why_not() -> str:
    """Return why PostgreSQL and Redis cannot be run here; empty if they can."""
    there = _programs() and shutil.which("redis-server")
    return "" if there else "PostgreSQL or Redis is not installed (.ci/docker installs them)"


def _programs() -> Path | None:
    found = sorted(Path("/").glob(_PROGRAMS.removeprefix("/")))
    return found[-1] if found else None


class Database:
    """A database that can be taken away."""

    def __init__(self, folder: Path, programs: Path, port: int) -> None:
        self.url = f"postgresql+asyncpg://{_USER}@127.0.0.1:{port}/postgres"
        self._folder, self._programs, self._port = folder, programs, port
        self._run("initdb", "--auth=trust", f"--pgdata={folder}")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "start", "--wait", "--pgdata", self._folder, "--options", options)

    def stop(self) -> None:
        """Stop it at once, connections and all."""
        self._run("pg_ctl", "stop", "--mode=immediate", "--wait", "--pgdata", self._folder)

    def megabytes(self) -> float:
        """Return how large it is."""
        command = ["psql", "-h", "127.0.0.1", "-p", str(self._port), "-U", _USER, "-At", "-c"]
        query = "select sum(pg_database_size(oid)) from pg_database"
        done = subprocess.run(
            [str(self._programs / command[0]), *command[1:], query],
            check=True,
            capture_output=True,
            text=True,
        )
        return float(done.stdout) / 1e6

    def _run(self, program: str, *arguments: str | Path) -> None:
        """Run one of its programs as its user: it refuses to be root."""
        with (self._folder.parent / f"{self._folder.name}.log").open("ab") as log:
            subprocess.run(
                [str(self._programs / program), *map(str, arguments)],
                check=True,
                cwd=self._folder,
                env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=_USER if os.geteuid() == 0 else None,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )


@contextmanager
def database() -> Iterator[Database]:
    """Run a database while the block runs."""
    programs = _programs()
    assert programs, why_not()
    folder = Path(tempfile.mkdtemp(prefix="onboard-test-database-"))
    try:
        if os.geteuid() == 0:
            os.chown(folder, pwd.getpwnam(_USER).pw_uid, -1)
        made = Database(folder, programs, free_port())
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name}.log").unlink(missing_ok=True)
