"""A GPU server that never outlives the worker that wanted it.

Between a worker and its server stands a small process, the keeper (`python -m
tasks.collect.keeper`). It holds the GPU lease, starts the server, and ends every process that
descends from it before it gives the GPUs back: when the server ends, when the worker asks, and when
the worker dies, by `kill -9` too. Orphans become the keeper's own children (it is their
"subreaper"), so a process that leaves its group, its session or its parent is still found. If the
keeper itself is killed, the kernel kills the server's main process with it.

The worker's side is `Keeper`. What is to run goes through the keeper's standard input, so neither
the command line nor a file shows the environment; the end of that input means stop. Events come
back as JSON lines.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import psutil

from tasks.collect.environment import passed_on
from tasks.collect.lease import lease
from tasks.collect.logs import tail
from tasks.errors import CollectError, OnboardError
from tasks.sandbox import die_with_parent

GRACE = 20.0
"""Seconds that a server has between SIGTERM and SIGKILL."""
PORT = "{port}"
"""Word of a command that becomes a free TCP port of 127.0.0.1 when the GPUs are leased."""

_ROOT = Path(__file__).resolve().parents[2]
_PR_SET_CHILD_SUBREAPER = 36
_MARGIN = 30.0  # for the keeper to start, to see the end of a stop, to be told
_STEP = 0.2


@dataclass(frozen=True)
class _Order:
    """What a keeper is to do."""

    worker: int
    command: tuple[str, ...]
    environment: dict[str, str]
    folder: str
    log: str
    directory: str
    gpus: tuple[str, ...]
    count: int
    session: str
    timeout: float | None
    grace: float


# The worker's side.


class Keeper:
    """A server and the keeper that guards it; for one thread, but `pause` and `resume` for all.

    Use it as a context manager: whatever happens inside, no process of the server is left after it.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path, grace: float) -> None:
        self.log = log
        self.events: list[dict[str, Any]] = []
        """What the keeper has told so far; `poll` adds to it."""
        self._process = process
        self._input = cast("FileIO", process.stdin)
        self._output = cast("FileIO", process.stdout)
        os.set_blocking(self._output.fileno(), False)
        self._grace = grace
        self._heard = b""

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        directory: Path,
        gpus: Sequence[str],
        count: int,
        session: str = "",
        folder: Path | None = None,
        lease_timeout: float | None = None,
        grace: float = GRACE,
    ) -> Self:
        """Start a keeper; it leases the GPUs, then starts the server.

        Args:
            command: the server's program and arguments; one of them may be `PORT`.
            environment: all of its environment; `CUDA_VISIBLE_DEVICES` is set to the leased GPUs.
            log: file that its output, and the keeper's own errors, are appended to.
            directory: where the GPUs are leased (see `lease`).
            gpus: ids of the GPUs to choose from.
            count: how many of them; 0 for a server without one.
            session: shown to others who wait for the GPUs.
            folder: its working folder; this process's if not given.
            lease_timeout: seconds to wait for the GPUs at most.
            grace: seconds between SIGTERM and SIGKILL.

        Raises:
            CollectError: the log cannot be written, or the keeper cannot be started.
        """
        order = _Order(
            worker=os.getpid(),
            command=tuple(command),
            environment=dict(environment),
            folder=str(folder or Path.cwd()),
            log=str(log.absolute()),
            directory=str(directory.absolute()),
            gpus=tuple(gpus),
            count=count,
            session=session,
            timeout=lease_timeout,
            grace=grace,
        )
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tasks.collect.keeper"],
                    env=passed_on(os.environ) | {"PYTHONPATH": str(_ROOT)},
                    cwd=_ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                    bufsize=0,
                )
        except OSError as error:
            raise CollectError(f"{log}: the server cannot be started ({error})") from error
        keeper = cls(process, log, grace)
        try:
            keeper._write(json.dumps(asdict(order)).encode() + b"\n")
        except OSError as error:
            keeper.stop(0)
            raise CollectError(
                f"the server's keeper did not start ({error}): {tail(log, 3)}"
            ) from error
        except BaseException:
            keeper.stop(0)
            raise
        return keeper

    def poll(self) -> list[dict[str, Any]]:
        """Return the keeper's new events, without waiting.

        Their `event` is `waiting` (with `text`), `leased` (`gpus`), `started` (`pid`, `port`) or,
        last, `exit`: with `exit`, the server's exit status, negative for a signal, None if it never
        ran; `stopped`, whether it was ended by the keeper; `error`, why it never ran, or None.
        """
        while not self._output.closed and (piece := self._output.read(1 << 16)):
            self._heard += piece
        *lines, self._heard = self._heard.split(b"\n")
        heard = [json.loads(line) for line in lines]
        self.events += heard
        return heard

    def wait_leased(
        self,
        on_wait: Callable[[str], None] = lambda _: None,
        go_on: Callable[[], None] = lambda: None,
    ) -> tuple[str, ...]:
        """Wait until the server is started, and return the ids of its GPUs.

        Args:
            on_wait: told who holds the GPUs, when that changes.
            go_on: called while waiting; what it raises ends the wait.

        Raises:
            CollectError: the lease or the start failed; if GPUs were not free in time, the text
                says who holds them.
        """
        leased: tuple[str, ...] = ()
        seen = 0
        while True:
            go_on()
            alive = self.alive  # before the events, so that the last of them are seen
            self.poll()
            for event in self.events[seen:]:
                match event["event"]:
                    case "waiting":
                        on_wait(event["text"])
                    case "leased":
                        leased = tuple(event["gpus"])
                    case "started":
                        return leased
                    case "exit":
                        raise CollectError(event["error"] or "the server was stopped")
            seen = len(self.events)
            if not alive:
                raise CollectError(f"the server's keeper died: {tail(self.log, 3)}")
            self._wait_for_output()

    @property
    def port(self) -> int:
        """The port that the server was given for `PORT`, once it is started."""
        (port,) = (event["port"] for event in self.events if event["event"] == "started")
        return int(port)

    @property
    def pid(self) -> int:
        """The keeper's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the keeper, so anything of the server, still runs."""
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """The server's exit status once nothing of it runs, negative for a signal; else None.

        None as well for one that never ran. A server whose keeper was killed was killed too.
        """
        if self.alive:
            return None
        self.poll()
        last = self.events[-1] if self.events else {}
        if last.get("event") == "exit":
            status: int | None = last["exit"]
            return status
        return -signal.SIGKILL

    def pause(self) -> None:
        """Stop every process of the server (SIGSTOP), not the keeper.

        SGLang's own watchdogs count the pause as time without progress.
        """
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let every process of the server go on (SIGCONT)."""
        for process in self._descendants():
            _signal(process, signal.SIGCONT)

    def stop(self, grace: float | None = None) -> int | None:
        """End the server and all that it started, and wait for that; does nothing the second time.

        A keeper that has not done it half a minute after the grace period is killed itself.

        Args:
            grace: seconds between SIGTERM and SIGKILL; as given to `start` if not given.

        Returns:
            As `returncode`.
        """
        seconds = self._grace if grace is None else grace
        with contextlib.suppress(OSError, ValueError):
            self._write(f"{seconds}\n".encode())
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            self._process.wait(seconds + _MARGIN)
        except subprocess.TimeoutExpired:
            self._end_by_force()
        status = self.returncode
        self._output.close()
        return status

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._input.write(data) :]

    def _wait_for_output(self) -> None:
        poll = select.poll()  # unlike select, for any number of open files
        poll.register(self._output, select.POLLIN)
        poll.poll(_STEP * 1000)

    def _descendants(self) -> list[psutil.Process]:
        if not self.alive:  # its number may be another's by now
            return []
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _end_by_force(self) -> None:
        """End a keeper that does not answer, after what it guards: its orphans are lost then."""
        self._signal_all(signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def _signal_all(self, number: int) -> None:
        """Send a signal after which a process starts no others, until all have had it."""
        reached: set[psutil.Process] = set()
        while fresh := set(self._descendants()) - reached:
            for process in fresh:
                _signal(process, number)
            reached |= fresh


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.Error):  # it is gone
        process.send_signal(number)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now.

    Another process may take it before the server does: a start that fails for that is retried.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The keeper's side: its own process, single-threaded.


class _StoppedError(Exception):
    """The server is to end."""

    def __init__(self, grace: float) -> None:
        super().__init__()
        self.grace = grace


class _Inbox:
    """What a keeper hears of: its input, the worker's death, signals, children that end."""

    def __init__(self) -> None:
        self._wakeup, written = os.pipe()
        for end in (self._wakeup, written):
            os.set_blocking(end, False)
        # A handler must be there for the number to be written; nothing else happens in it.
        for number in (
            signal.SIGCHLD,
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGHUP,
            signal.SIGQUIT,
        ):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        self._sources = [sys.stdin.fileno(), self._wakeup]
        self._heard = b""
        self._order: _Order | None = None

    def order(self) -> _Order:
        """Read the order, the first line of the input.

        Raises:
            _StoppedError: the worker died before it was written, or since.
        """
        while b"\n" not in self._heard:
            self.wait(None)
        line, self._heard = self._heard.split(b"\n", 1)
        self._order = _Order(**json.loads(line))
        # A process that the worker forked may still hold the other end of the input.
        with contextlib.suppress(OSError):  # some sandboxes lack it; they have the input's end
            self._sources.append(os.pidfd_open(self._order.worker))
        if os.getppid() != self._order.worker or self._heard:
            raise self._stopped()
        return self._order

    def wait(self, seconds: float | None) -> None:
        """Wait until a child ends, or some seconds at most.

        Raises:
            _StoppedError: the worker asks for it or is dead, or a signal says so.
        """
        for source in select.select(self._sources, [], [], seconds)[0]:
            if source == self._wakeup:
                if set(os.read(source, 4096)) - {signal.SIGCHLD}:
                    raise self._stopped()
                continue
            piece = os.read(source, 1 << 16) if source == sys.stdin.fileno() else b""
            self._heard += piece
            if not piece or (self._order and b"\n" in self._heard):
                raise self._stopped()

    def children(self, seconds: float) -> None:
        """Wait until a child ends, or some seconds at most, whatever else happens."""
        if select.select([self._wakeup], [], [], seconds)[0]:
            os.read(self._wakeup, 4096)

    def _stopped(self) -> _StoppedError:
        """Return the request to stop, with the grace period that it names, else the order's."""
        try:
            return _StoppedError(float(self._heard))
        except ValueError:
            return _StoppedError(self._order.grace if self._order else 0)


class _Server:
    """The server's process, and all that descends from it."""

    def __init__(self, order: _Order, gpus: Sequence[str]) -> None:
        keeper = os.getpid()
        self.port = free_port()

        def die_with_keeper() -> None:
            die_with_parent()
            if os.getppid() != keeper:
                os._exit(1)

        with Path(order.log).open("ab") as log:
            self._process = subprocess.Popen(
                [str(self.port) if word == PORT else word for word in order.command],
                env=order.environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)},
                cwd=order.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=die_with_keeper,  # noqa: PLW1509  only system calls, and one thread
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        return self._process.returncode

    def reap(self) -> None:
        """Take notice of all children that have ended."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._process.pid:
                    self._process.returncode = os.waitstatus_to_exitcode(ended[1])

    def end(self, grace: float, inbox: _Inbox) -> None:
        """End every descendant of this process; return when there is none."""
        deadline = time.monotonic() + grace
        asked: set[psutil.Process] = set()
        while (left := self._descendants()) and (rest := deadline - time.monotonic()) > 0:
            for process in left - asked:
                _signal(process, signal.SIGTERM)
                _signal(process, signal.SIGCONT)  # a stopped one would not notice
            asked |= left
            inbox.children(min(rest, _STEP))
        while left := self._descendants():
            for process in left:
                _signal(process, signal.SIGKILL)
            inbox.children(_STEP)

    def _descendants(self) -> set[psutil.Process]:
        self.reap()
        return set(psutil.Process().children(recursive=True))


def _keep(order: _Order, inbox: _Inbox) -> tuple[int | None, bool, str | None]:
    """Carry out an order; return the server's exit status, if it was stopped, why it never ran."""
    server: _Server | None = None
    stopped, reason = False, None
    try:
        with lease(
            Path(order.directory),
            order.gpus,
            order.count,
            on_wait=lambda text: _tell("waiting", text=text),
            timeout=order.timeout,
            session=order.session,
            pause=inbox.wait,
        ) as gpus:
            _tell("leased", gpus=gpus)
            server = _Server(order, gpus)
            _tell("started", pid=server.pid, port=server.port)
            stopped = _watch(server, inbox, order.grace)
    except _StoppedError:
        stopped = True
    except OnboardError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{order.command[0]}: cannot be started ({error})"
    return server.status if server else None, stopped, reason


def _watch(server: _Server, inbox: _Inbox, grace: float) -> bool:
    """Wait for the server's end, or bring it about, and leave nothing; was it brought about?"""
    stopped = False
    try:
        server.reap()
        while server.status is None:
            inbox.wait(None)
            server.reap()
    except _StoppedError as request:
        stopped, grace = True, request.grace
    finally:
        server.end(grace, inbox)
    return stopped


def _tell(event: str, **facts: Any) -> None:
    """Write an event for the worker, who may be dead or not listening."""
    line = json.dumps({"event": event, **facts}).encode() + b"\n"
    with contextlib.suppress(BrokenPipeError, BlockingIOError):
        os.write(sys.stdout.fileno(), line)


def main() -> None:
    """Keep one server, as the order on standard input says."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.set_blocking(sys.stdout.fileno(), False)
    inbox = _Inbox()
    try:
        status, stopped, reason = _keep(inbox.order(), inbox)
    except _StoppedError:
        status, stopped, reason = None, True, None
    _tell("exit", exit=status, stopped=stopped, error=reason)


if __name__ == "__main__":
    main()
