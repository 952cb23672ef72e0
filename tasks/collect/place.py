"""The folder of one session: what is known of it, on disk, whatever happens to who serves it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import files
from tasks.collect.dumps import CallLog
from tasks.collect.failures import Adjustment, Failure
from tasks.collect.session import Served, Session
from tasks.collect.store import CallStore
from tasks.errors import CollectError, first_problem

T = TypeVar("T")
Say = Callable[[str], None]
"""Told the operator's lines: few, for each costs the Prefect server some work."""


_LOCK_SECONDS = 1.0
_log = logging.getLogger(__name__)


class Attempt(BaseModel):
    """One launch of a session."""

    model_config = ConfigDict(extra="forbid")

    adjustment: Adjustment
    dumps: Path
    failure: Failure | None = None


class Outcome(BaseModel):
    """What a complete session came to."""

    model_config = ConfigDict(extra="forbid")

    session: Session
    launches: int
    gpus: tuple[str, ...]
    served: Served
    fired: dict[str, int]
    """Dumped name -> calls recorded, of all ranks."""
    missing: dict[str, str]
    """Definition -> why none of its calls was seen."""
    notes: list[str]
    versions: dict[str, list[str]]
    unreadable: dict[str, int]
    thinned: int
    """Calls whose tensors the store had no room for."""
    notices: dict[str, int]
    """What FlashInfer's own logs said of dumps that it did not write."""
    not_sent: dict[str, int] = {}
    """Why waves were not sent -> how many: nothing is cut to fit the model's context."""
    drained_mb: float
    """What was dumped in all while it was served, about."""
    peak_mb: float
    """The most that lay on disk in dumps at a time."""
    pauses: int
    """How often the server was stopped until the consumer had caught up."""

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second of traffic."""
        return self.served.output_tokens / self.served.seconds if self.served.seconds else 0.0


class Place:
    """The folder of one session: what is known of it, on disk.

    Its name has a digest of the session, so that another plan never takes this one's calls. The
    same plan with another SGLang does: what one version has shown is not collected again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = self.root / "calls.sqlite"
        self.served = self.root / "served.json"
        self._attempts = self.root / "attempts.json"
        self._outcome = self.root / "outcome.json"

    @classmethod
    def of(cls, sessions: Path, session: Session) -> Place:
        """Return a session's place in the folder of all sessions."""
        # What says nothing, or to people only, makes no other session.
        silent = {"sglang", "warnings"} | (set() if session.gpu else {"gpu"})
        content = session.model_dump_json(exclude=silent)
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        return cls(sessions / f"{files.safe_name(session.id, 'session id')}-{digest}")

    @contextmanager
    def alone(self, say: Say, go_on: Callable[[], None]) -> Iterator[None]:
        """Keep other processes out of the session while the block runs.

        Args:
            say: told if that means waiting.
            go_on: called while waiting; what it raises ends the wait.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".lock")
        waits = False
        while not lock.is_locked:
            go_on()
            try:
                lock.acquire(timeout=_LOCK_SECONDS)
            except Timeout:
                if not waits:
                    say(f"{self.root.name}: another run serves it, waiting")
                waits = True
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def if_idle(self) -> Iterator[bool]:
        """Hold the session while the block runs, if nobody else does; say whether it is held."""
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def outcome(self) -> Outcome | None:
        """Return how the session ended, if it is complete.

        Raises:
            CollectError: its file is damaged.
        """
        if not self._outcome.exists():
            return None
        try:
            return Outcome.model_validate_json(self._outcome.read_bytes())
        except ValidationError as error:
            field, reason = first_problem(error)
            raise CollectError(
                f"{self._outcome}: field {field}: {reason} (remove it to serve the session again)"
            ) from error

    def finish(self, outcome: Outcome) -> None:
        """Record that the session is complete."""
        files.write_text(self._outcome, outcome.model_dump_json(indent=2) + "\n")

    def attempts(self) -> list[Attempt]:
        """Return the launches so far.

        Raises:
            CollectError: their file is damaged.
        """
        made = self._made()
        return made.attempts if made else []

    def record(self, session: Session, attempts: list[Attempt]) -> None:
        """Record the launches so far, and of what."""
        made = _Attempts(session=session, attempts=attempts)
        files.write_text(self._attempts, made.model_dump_json(indent=2))

    def unfinished(self) -> tuple[Session, Failure | None] | None:
        """Return the session and how its last launch failed, if there was one and it is not over.

        A launch that was interrupted has not failed, nor has one that goes on.

        Raises:
            CollectError: the launches' file is damaged.
        """
        made = None if self._outcome.exists() else self._made()
        return (made.session, made.attempts[-1].failure) if made and made.attempts else None

    def _made(self) -> _Attempts | None:
        if not self._attempts.exists():
            return None
        try:
            return _Attempts.model_validate_json(self._attempts.read_bytes())
        except ValidationError as error:
            field, reason = first_problem(error)
            # Not the file alone: launches are counted, and what they collected has their numbers.
            raise CollectError(
                f"{self._attempts}: field {field or 'all'}: {reason} (remove the folder "
                f"{self.root} to serve the session anew)"
            ) from error

    def calls(self) -> CallLog:
        """Return what was drained; the calls know how their server was made to prefill."""
        log = CallStore(self.store).log()
        outcome = self.outcome()
        way = outcome.session.prefill if outcome else ""
        return CallLog([replace(call, prefill=way) for call in log.calls], log.unreadable)

    def set_aside(self, attempt: int) -> None:
        """Move what a launch collected into its folder: it is not what was asked for.

        The next launch begins anew, with all of the traffic.
        """
        for path in (*self.root.glob(f"{self.store.name}*"), self.served):
            if path.exists():
                path.rename(self.logs(attempt) / path.name)

    def logs(self, attempt: int) -> Path:
        """Return the folder of a launch's logs."""
        return self.root / f"attempt-{attempt}"


class _Attempts(BaseModel):
    session: Session
    attempts: list[Attempt]


def outcomes(sessions: Path) -> list[tuple[Place, Outcome]]:
    """Return the complete sessions of a folder, in the order of their names.

    One whose file is damaged is left out, with a warning: the others' calls are as good as ever.
    """
    read = ((place, _undamaged(place.outcome)) for place in all_places(sessions))
    return [(place, outcome) for place, outcome in read if outcome is not None]


def unfinished(sessions: Path) -> list[tuple[Session, Failure | None]]:
    """Return the sessions of a folder that are not complete, in the order of their names.

    Returns:
        Each with how its last launch failed, or nothing where that was interrupted or goes on. One
        whose file is damaged is left out, with a warning.
    """
    read = (_undamaged(place.unfinished) for place in all_places(sessions))
    return [left for left in read if left is not None]


def _undamaged(read: Callable[[], T | None]) -> T | None:
    try:
        return read()
    except CollectError as error:
        _log.warning("%s", error)
        return None


def all_places(sessions: Path) -> list[Place]:
    """Return the sessions of a folder, in the order of their names."""
    return [Place(path) for path in sorted(sessions.glob("*/")) if path.is_dir()]
