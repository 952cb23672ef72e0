"""Serve one session on this host: start SGLang, send its traffic, drain what FlashInfer dumps.

One call of `serve_session` is one launch. What it collected is in the session's folder, whatever
happens to the process: a later call takes over what the last one left, sends only the waves that
are not done, and asks for less where memory was short. A session that is complete is not served
again.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import httpx
import psutil
from pydantic import SecretStr

from tasks import files
from tasks.collect import scratch
from tasks.collect.drain import Drain, scan_log
from tasks.collect.engine import Order, read_served, save_served
from tasks.collect.environment import passed_on
from tasks.collect.failures import (
    Adjustment,
    Failure,
    Kind,
    classify,
    failure_of,
    next_adjustment,
)
from tasks.collect.gate import check_session
from tasks.collect.keeper import PORT, Keeper
from tasks.collect.lease import visible_gpus
from tasks.collect.logs import LogFollower, Milestones, tail
from tasks.collect.place import Attempt, Outcome, Place, Say, all_places
from tasks.collect.plan import not_sent
from tasks.collect.session import Served, Session, Traffic
from tasks.collect.store import CallStore
from tasks.collect.traffic import HttpClient, Limits, drive, limits_of, waves
from tasks.errors import CollectError, InputError, OnboardError
from tasks.model import ModelConfig
from tasks.settings import CollectSettings

_ROOT = Path(__file__).resolve().parents[2]
_TEND_SECONDS = 0.25
_HEALTH_SECONDS = 2.0
_GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL: nothing that a server does at its end is wanted."""
_LAST_SECONDS = 60.0
"""For a server whose worker was killed to be ended by its keeper."""
_KEEPER = "keeper.json"
"""File in a launch's folder: which process guards its server."""
_READY = "ready"
"""File in a launch's folder: the offline engine is up."""
_GO = "go"
"""File in a launch's folder: the server is up, what it dumps from now on was served."""
_HOST_SECONDS = 30.0
"""For the host to say which GPUs it has."""
_LOG_LINES = 300
"""Of the end of the log, in which the reason of a failure is looked for."""
_CAPPED_POOL = 16_384
"""KV pool in tokens where wrappers' runs are recorded: each writes the whole of it."""
_UNLIMITED_DUMPS = {"FLASHINFER_DUMP_MAX_COUNT": str(10**9), "FLASHINFER_DUMP_MAX_SIZE_GB": "1e9"}
"""FlashInfer counts all it ever wrote; what bounds the disk is the consumer."""
_FIRST_IS_GONE = {Kind.DEVICE, Kind.KILLED, Kind.NETWORK, Kind.TIMEOUT, Kind.UNKNOWN}
"""How a host's server ends, as its log has it, when that of the first has ended."""


class SessionError(CollectError):
    """A launch failed; `failure` says how, `again` whether another may go better."""

    def __init__(self, message: str, failure: Failure, *, again: bool) -> None:
        super().__init__(message)
        self.failure = failure
        self.again = again


@dataclass(frozen=True)
class Host:
    """What this host has for a server."""

    options: CollectSettings
    """Interpreter, GPUs, limits."""
    token: SecretStr | None = None
    """The Hugging Face token, for gated weights; it reaches the server's environment only."""
    keep_dumps: bool = False
    """Whether what FlashInfer dumped is kept in the launch's folder; the disk is not bounded."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Ends the launch when somebody sets it."""

    def go_on(self) -> None:
        """Check that nobody wants it to end.

        Raises:
            CollectError: somebody does.
        """
        if self.stopping.is_set():
            raise CollectError("stopped before the session was complete; run it again to go on")


def serve_session(
    session: Session, model: ModelConfig, sessions: Path, host: Host, say: Say
) -> Outcome:
    """Serve a session, once, unless it is complete already.

    Args:
        session: what to start and send.
        model: the model's config.
        sessions: folder of the sessions' folders.
        host: interpreter, GPUs, limits, token.
        say: told what an operator wants to know.

    Raises:
        SessionError: the server did not start, died, or showed other kernels than it should.
        CollectError: the GPUs or the folder could not be had.
        InputError: the traffic's file or the model's vocabulary is none to make requests of.
    """
    place, options = Place.of(sessions, session), host.options
    with place.alone(say, host.go_on):
        complete = place.outcome()
        if complete is not None:
            say(f"{session.id}: complete already, {sum(complete.fired.values())} calls")
            return complete
        _check_traffic(session, model)
        _tidy(sessions, place, host, say)
        attempts = place.attempts()
        for number, left in enumerate(attempts, start=1):
            _take_over(place, number, left, host)
        first = Adjustment(
            max_total_tokens=_CAPPED_POOL if _records_runs(session) else None,
            tp=session.tp,
            concurrency=1.0,
        )
        attempt = Attempt(
            adjustment=_adjusted(attempts, session, options) or first,
            dumps=_dump_folder(place, len(attempts) + 1, options),
        )
        place.record(session, [*attempts, attempt])
        launch = _Launch(
            session=session,
            model=model,
            place=place,
            attempt=attempt,
            number=len(attempts) + 1,
            host=host,
            say=say,
        )
        try:
            outcome = launch.run()
            place.finish(outcome)
        except Exception as error:
            host.go_on()  # a launch that somebody ended has not failed
            attempt.failure = _as_failure(error)
            made = [*attempts, attempt]
            place.record(session, made)
            if not isinstance(error, _LaunchError):
                raise
            if error.failure.kind is Kind.WRONG_KERNELS:
                place.set_aside(len(made))
            raise _session_error(place, session, made, error.failure, options) from error
        return outcome


def _as_failure(error: Exception) -> Failure:
    """Return why a launch failed that ended with an error."""
    if isinstance(error, _LaunchError):
        return error.failure
    reason = str(error) if isinstance(error, OnboardError) else f"{type(error).__name__}: {error}"
    return replace(failure_of(Kind.UNKNOWN, reason), retryable=False)


def _check_traffic(session: Session, model: ModelConfig) -> None:
    """Make the first wave, so that a file that cannot be read costs no launch."""
    limits = Limits(vocab_size=model.vocab_size, context_length=None)
    next(waves(session.traffic, limits, _folder(session.model)))


def _session_error(
    place: Place,
    session: Session,
    attempts: list[Attempt],
    failure: Failure,
    options: CollectSettings,
) -> SessionError:
    following = _next(attempts, session, options)
    log = place.logs(len(attempts)) / "server.log"
    told = f"; log: {log}" if log.exists() else ""
    hosts = ""
    if session.nodes > 1:
        hosts = (
            f"; one of {session.nodes} hosts: start it again on all, and where it counts as "
            "complete, remove outcome.json from its folder first"
        )
    return SessionError(
        f"{session.id}: {failure.reason} ({failure.advice}{told}{hosts})",
        failure,
        again=following is not None,
    )


def _next(attempts: list[Attempt], session: Session, options: CollectSettings) -> Adjustment | None:
    if session.nodes > 1:
        return None  # the other hosts would not know of it
    history = [(a.adjustment, a.failure) for a in attempts if a.failure is not None]
    return next_adjustment(history, session.tp_choices, len(visible_gpus(options.gpus)))


def _adjusted(
    attempts: list[Attempt], session: Session, options: CollectSettings
) -> Adjustment | None:
    """Return what this launch asks for, after the failures of earlier ones.

    Somebody who starts a session again that gave up has changed something: the last settings hold.
    """
    failed = [attempt for attempt in attempts if attempt.failure is not None]
    if not failed:
        return None
    return _next(attempts, session, options) or failed[-1].adjustment


def _records_runs(session: Session) -> bool:
    return any(name.endswith(".run") for name in session.record)


def _dump_folder(place: Place, number: int, options: CollectSettings) -> Path:
    """Return where FlashInfer is to dump: in memory, where there is room for the bound twice."""
    folder = scratch.folder_in_memory(place.root.name, number, 2 * options.disk_bytes)
    return folder or place.logs(number) / "dumps"


def _take_over(place: Place, number: int, left: Attempt, host: Host) -> None:
    """Keep what a launch that was killed had served and not drained, once its server is gone.

    Raises:
        CollectError: the server does not end.
    """
    if not left.dumps.is_dir():
        return
    _wait_gone(place.logs(number) / _KEEPER)
    if (place.logs(number) / _GO).exists():
        with CallStore(place.store) as store:
            _drain(place, store, number, left.dumps, host).finish()
    scratch.remove(left.dumps)


def _tidy(sessions: Path, own: Place, host: Host, say: Say) -> None:
    """Take over what killed launches of other sessions left, which lies in memory till then.

    What lies there of sessions that are gone, with their workspace, is removed.
    """
    roots = {place.root for place in all_places(sessions)}
    for folder, root in scratch.left():
        try:
            known = folder in [attempt.dumps for attempt in Place(root).attempts()]
        except CollectError:  # whose it is cannot be read: it stays
            continue
        if known:
            roots.add(root)
        else:
            scratch.remove(folder)
            say(f"{own.root.name}: removed {folder}, whose session is gone ({root})")
    for place in map(Place, sorted(roots - {own.root})):
        try:
            with place.if_idle() as idle:
                for number, left in enumerate(place.attempts() if idle else (), start=1):
                    _take_over(place, number, left, host)
        except OnboardError as error:  # it costs that session, not this one
            say(f"{own.root.name}: left as it is: {error}")


def _wait_gone(file: Path) -> None:
    """Wait for the keeper of an earlier launch, which ends its server when its worker dies."""
    if not file.exists():
        return
    known = files.read_json_object(file, "the keeper's note")
    pid, started = known.get("pid"), known.get("started")
    if type(pid) is not int or pid < 1:
        raise InputError(f"{file}: field pid: {pid!r} is no process id (remove the file)")
    try:
        keeper = psutil.Process(pid)
        if keeper.create_time() == started:
            keeper.wait(_LAST_SECONDS)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired as error:
        raise CollectError(
            f"{file.parent}: the server of that launch still ends (keeper {pid})"
        ) from error


def _drain(place: Place, store: CallStore, number: int, dumps: Path, host: Host) -> Drain:
    return Drain(
        dumps,
        store,
        prefix=f"{place.root.name}/{number}/",
        bound=host.options.disk_bytes,
        incomplete=host.options.incomplete_calls,
        keep=place.logs(number) / "kept" if host.keep_dumps else None,
    )


class _LaunchError(Exception):
    """A launch failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


@dataclass
class _Tally:
    """What the consumer saw of one launch."""

    peak: int = 0
    drained: int = 0
    pauses: int = 0


@dataclass
class _Launch:
    """One launch, from the lease to the gate."""

    session: Session
    model: ModelConfig
    place: Place
    attempt: Attempt
    number: int
    host: Host
    say: Say
    tally: _Tally = field(default_factory=_Tally)

    @property
    def options(self) -> CollectSettings:
        """The host's limits."""
        return self.host.options

    @property
    def logs(self) -> Path:
        """Where this launch's logs are."""
        return self.place.logs(self.number)

    @property
    def log(self) -> Path:
        """The server's whole output."""
        return self.logs / "server.log"

    @cached_property
    def traffic(self) -> Traffic:
        """The session's traffic, with fewer requests at a time where memory was short."""
        share = self.attempt.adjustment.concurrency
        # As many waves as ever, whose number says where a later launch goes on.
        sizes = tuple(max(1, int(size * share)) for size in self.session.traffic.batch_sizes)
        return self.session.traffic.model_copy(update={"batch_sizes": sizes})

    def run(self) -> Outcome:
        """Run it."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self._check_gpus()
        for reason, waves_left in not_sent(self.traffic, self._limits(), self._folder).items():
            self.say(f"{self.session.id}: {waves_left} waves will not be sent: {reason}")
        with (
            scratch.used(self.attempt.dumps, self.place.root),
            CallStore(self.place.store) as store,
        ):
            self.drain = _drain(self.place, store, self.number, self.attempt.dumps, self.host)
            self.store = store
            try:
                gpus = self._serve()
            finally:
                # Whatever happened, what was served is kept.
                self.tally.drained += self.drain.backlog()
                self.drain.finish()
                self._keep_small()
            return self._checked(store, gpus)

    # Serving

    def _serve(self) -> tuple[str, ...]:
        offline = self.session.mode == "decode" and self.session.nodes == 1
        command = self._engine_command() if offline else self._server_command()
        with Keeper.start(
            command,
            environment=self._environment(),
            log=self.log,
            directory=self.options.lease_dir,
            gpus=visible_gpus(self.options.gpus),
            count=self.attempt.adjustment.tp // self.session.nodes,
            session=self.place.root.name,
            folder=self.logs,
            lease_timeout=self.options.lease_seconds,
            grace=_GRACE,
        ) as keeper:
            self.keeper = keeper
            note = {"pid": keeper.pid, "started": psutil.Process(keeper.pid).create_time()}
            files.write_json(self.logs / _KEEPER, note)
            self.follower, self.milestones = LogFollower(self.log), Milestones()
            gpus = self._leased()
            self.say(f"{self.session.id}: launch {self.number} on GPU {', '.join(gpus)}")
            port = None if offline else keeper.port
            self._wait_ready(port)
            self.drain.discard()  # the start-up's calls served nobody
            (self.logs / _GO).touch()
            self.say(f"{self.session.id}: ready, traffic begins")
            if self.session.node_rank:
                self._follow()
            elif port is None:
                self._tend_until(lambda: not keeper.alive)
                if keeper.returncode:
                    raise self._failed()
            else:
                self._send(port)
        return gpus

    def _check_gpus(self) -> None:
        """Check that this host has GPUs that the session's kernels run on, if it says what it has.

        Raises:
            _LaunchError: it has others.
        """
        had = compute_capabilities() if self.session.gpu else ()
        wanted = self.session.gpu.removeprefix("SM")[:-1]
        if had and not any(capability.startswith(f"{wanted}.") for capability in had):
            raise _LaunchError(
                failure_of(
                    Kind.UNSUPPORTED,
                    f"its kernels run on {self.session.gpu} (compute capability {wanted}.x) only, "
                    f"and this host's GPUs are of {', '.join(sorted(set(had)))}",
                )
            )

    def _leased(self) -> tuple[str, ...]:
        """Wait for the GPUs.

        Raises:
            _LaunchError: there are not as many, they were not free in time, or the keeper ended.
        """
        try:
            return self.keeper.wait_leased(self.say, self.host.go_on)
        except CollectError as error:
            self.host.go_on()
            raise _LaunchError(self._not_leased(error)) from error

    def _not_leased(self, error: CollectError) -> Failure:
        told = {event["event"]: event for event in self.keeper.events}
        if told.get("exit", {"stopped": True})["stopped"]:
            return failure_of(Kind.KILLED, str(error))
        if self.attempt.adjustment.tp // self.session.nodes > len(visible_gpus(self.options.gpus)):
            return failure_of(Kind.NO_DEVICE, str(error))
        if "waiting" in told and "leased" not in told:
            return failure_of(Kind.NOT_FREE, str(error))
        return _as_failure(error)

    def _follow(self) -> None:
        """Drain what a host shows that is not the first, until the first has stopped.

        Its server ends with the first one's, or nothing is dumped any more.

        Raises:
            _LaunchError: its server ended for a reason of its own.
        """
        self._tend_until(lambda: not self.keeper.alive)
        error = self._failed() if self.keeper.returncode else None
        if error and error.failure.kind not in _FIRST_IS_GONE:
            raise error

    def _send(self, port: int) -> None:
        """Send the traffic over HTTP from a thread of its own, tending the server from this one."""
        with ThreadPoolExecutor(max_workers=1) as sender:
            sent: Future[Served] = sender.submit(lambda: asyncio.run(self._drive(port)))
            try:
                self._tend_until(lambda: sent.done() or not self.keeper.alive)
                if not sent.done():
                    raise self._failed()
                error = sent.exception()
                if error is not None:
                    raise self._not_sent(port, error) from error
            finally:
                self.keeper.stop()  # ends requests that are still waiting

    def _not_sent(self, port: int, error: BaseException) -> _LaunchError:
        """Return the error for traffic that failed: the server's own, if that is what it died of.

        A dying server's connections are gone before its processes are.
        """
        deadline = time.monotonic() + 2 * _GRACE
        self._tend_until(
            lambda: not self.keeper.alive or self._ready(port) or time.monotonic() > deadline
        )
        return self._failed(str(error), status=self.keeper.returncode or 0)

    async def _drive(self, port: int) -> Served:
        async with HttpClient(port, self.traffic) as client:
            return await drive(
                waves(self.traffic, self._limits(), self._folder),
                client.generate,
                traffic=self.traffic,
                before=read_served(self.place.served).done,
                on_progress=partial(save_served, self.place.served),
            )

    def _limits(self) -> Limits:
        return limits_of(self.model, self.attempt.adjustment.max_total_tokens)

    def _wait_ready(self, port: int | None) -> None:
        deadline = time.monotonic() + self.options.start_seconds
        ready = False

        def settled() -> bool:
            nonlocal ready
            ready = self._ready(port)
            return ready or not self.keeper.alive or time.monotonic() > deadline

        self._tend_until(settled, draining=False)
        if not ready:
            late = f"not ready after {self.options.start_seconds:.0f} s"
            raise self._failed(late if self.keeper.alive else "")

    def _ready(self, port: int | None) -> bool:
        if port is None:
            return (self.logs / _READY).exists()
        try:
            url = f"http://127.0.0.1:{port}/health"
            with httpx.Client(trust_env=False, timeout=_HEALTH_SECONDS) as client:
                return client.get(url).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _tend_until(self, done: Callable[[], bool], *, draining: bool = True) -> None:
        """Drain, follow the log and keep the disk bounded until something is done.

        Raises:
            _LaunchError: no request was answered for too long; on a host that follows the first,
                which has no answers, that is the end.
        """
        seen, since = -1, time.monotonic()
        while not done():
            self.host.go_on()
            for line in self.milestones.pick(self.follower.lines()):
                self.say(f"{self.session.id}: {line}")
            if draining:
                requests = read_served(self.place.served).requests
                if self._catch_up() or requests != seen:
                    seen, since = requests, time.monotonic()
                if time.monotonic() - since > self.options.stall_seconds:
                    if self.session.node_rank:
                        return
                    waited = f"no answer for {self.options.stall_seconds:.0f} s"
                    raise self._failed(waited)
            time.sleep(_TEND_SECONDS)

    def _catch_up(self) -> bool:
        """Drain what lies on disk, the server waiting if that is much; return if anything did."""
        backlog = self.drain.backlog()
        self.tally.peak = max(self.tally.peak, backlog)
        full = backlog > self.options.disk_bytes // 4
        if full:
            self.keeper.pause()
            self.tally.pauses += 1
        try:
            drained = self.drain.step()
            self.tally.drained += max(0, backlog - drained.backlog)
            self._keep_small()
        finally:
            if full:
                self.keeper.resume()
        return drained.calls > 0

    def _keep_small(self) -> None:
        """Keep what is not dumps within its part of the disk too."""
        for log in self.logs.glob("flashinfer_*.log"):
            scan_log(log, self.store)
        self.store.keep_within(self.options.disk_bytes // 2)

    def _failed(self, reason: str = "", *, status: int | None = None) -> _LaunchError:
        """Return the error for a launch that ended by itself, or that has to end for a reason.

        Args:
            reason: why, where the log does not tell; without a status, that it took too long.
            status: the server's exit status, if not as the keeper knows it.
        """
        ended = self.keeper.returncode if status is None else status
        failure = classify(tail(self.log, _LOG_LINES), ended)
        if reason and failure.kind in {Kind.TIMEOUT, Kind.UNKNOWN}:
            failure = replace(failure, reason=reason)
        return _LaunchError(failure)

    # Starting

    def _arguments(self) -> tuple[str, ...]:
        words = list(self.session.flags)
        words[words.index("--tp-size") + 1] = str(self.attempt.adjustment.tp)
        if self.attempt.adjustment.max_total_tokens is not None:
            words += ["--max-total-tokens", str(self.attempt.adjustment.max_total_tokens)]
        return ("--model-path", self.session.model, *words)

    def _server_command(self) -> tuple[str, ...]:
        host = ("--host", "127.0.0.1", "--port", PORT)
        return (self._python, "-m", "sglang.launch_server", *self._arguments(), *host)

    def _engine_command(self) -> tuple[str, ...]:
        order = self._order()
        path = self.logs / "order.json"
        files.write_text(path, order.model_dump_json(indent=2))
        return (self._python, "-m", "tasks.collect.engine", str(path))

    def _order(self) -> Order:
        return Order(
            arguments=self._arguments(),
            traffic=self.traffic,
            limits=self._limits(),
            model_folder=self._folder,
            served=self.place.served,
            ready=self.logs / _READY,
            go=self.logs / _GO,
        )

    @property
    def _folder(self) -> Path | None:
        return _folder(self.session.model)

    @property
    def _python(self) -> str:
        return str(self.options.python or sys.executable)

    def _environment(self) -> dict[str, str]:
        """Return all of the server's environment: what it needs of ours, FlashInfer's, its own."""
        ours = os.environ.get("PYTHONPATH")
        return {
            **passed_on(os.environ),
            "PYTHONPATH": os.pathsep.join([str(_ROOT), *([ours] if ours else [])]),
            "PYTHONUNBUFFERED": "1",
            **_UNLIMITED_DUMPS,
            "FLASHINFER_LOGLEVEL": "10",
            "FLASHINFER_LOGDEST": str(self.logs / "flashinfer_%i.log"),
            "FLASHINFER_DUMP_DIR": str(self.attempt.dumps),
            "FLASHINFER_DUMP_SAFETENSORS": "1",
            "FLASHINFER_DUMP_INCLUDE": ",".join(self.session.record),
            "FLASHINFER_DUMP_EXCLUDE": "*.__init__",
            **self.session.env,
            **({"HF_TOKEN": self.host.token.get_secret_value()} if self.host.token else {}),
        }

    def _as_served(self) -> Session:
        """Return the session as the last launch served it, adjusted to what there was room for."""
        tp, words = self.attempt.adjustment.tp, self._arguments()[2:]
        return self.session.model_copy(update={"tp": tp, "flags": words, "traffic": self.traffic})

    def _about_hosts(self) -> list[str]:
        """Say what cannot be known on a host that follows the first."""
        host, hosts = self.session.node_rank + 1, self.session.nodes
        text = f"host {host} of {hosts}: how the traffic went is known on the first"
        return [text] if host > 1 else []

    # The gate

    def _checked(self, store: CallStore, gpus: tuple[str, ...]) -> Outcome:
        summary = store.summary()
        fired = {name: sum(each.values()) for name, each in summary.fired.items()}
        report = check_session(self.session, fired, summary.captured, self.log, summary.versions)
        if report.failure:
            raise _LaunchError(report.failure)
        served = read_served(self.place.served).done
        return Outcome(
            session=self._as_served(),
            launches=self.number,
            gpus=gpus,
            served=served,
            fired=fired,
            missing=report.missing,
            notes=[*report.notes, *self._about_hosts()],
            versions=summary.versions,
            unreadable=dict(summary.unreadable),
            thinned=summary.thinned,
            notices=dict(summary.notices),
            not_sent=served.not_sent,
            drained_mb=round(self.tally.drained / 1e6, 1),
            peak_mb=round(self.tally.peak / 1e6, 1),
            pauses=self.tally.pauses,
        )


def compute_capabilities() -> tuple[str, ...]:
    """Return what this host's GPUs are (`9.0`), as the driver's tool says; nothing where it fails.

    Those that are not leased count too: in which order the tool numbers them is not CUDA's.
    """
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=_HOST_SECONDS,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    lines = (line.strip() for line in answer.stdout.splitlines())
    return tuple(line for line in lines if re.fullmatch(r"\d+\.\d+", line))


def _folder(model: str) -> Path | None:
    """Return the folder of a model that is on this host."""
    return Path(model) if Path(model).is_dir() else None
