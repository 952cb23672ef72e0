"""What is told of a definition whose sessions did not come to an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.collect.failures import Adjustment, Kind, failure_of
from tasks.collect.live import served_calls
from tasks.collect.place import Attempt, Place
from tasks.errors import CollectError
from tests.unit.test_place import outcome, session


def launched(sessions: Path, name: str, kind: Kind | None, reason: str = "") -> Place:
    """Leave a session whose last launch failed in a way, or was interrupted."""
    place = Place.of(sessions, session(name))
    used = Adjustment(max_total_tokens=None, tp=1, concurrency=1.0)
    failed = failure_of(Kind.TIMEOUT, "the first was too slow")
    attempts = [
        Attempt(adjustment=used, dumps=place.root / "1", failure=failed),
        Attempt(
            adjustment=used,
            dumps=place.root / "2",
            failure=failure_of(kind, reason) if kind else None,
        ),
    ]
    place.record(session(name), attempts)
    return place


def test_the_last_launchs_failure_is_told(tmp_path: Path) -> None:
    launched(tmp_path, "a", Kind.NO_DEVICE, "1 GPUs are asked for and there are 0")
    launched(tmp_path, "b", Kind.KILLED, "the server's keeper died")
    with pytest.raises(CollectError) as caught:
        served_calls(tmp_path, "d")
    assert str(caught.value) == (
        "d: session a failed: no such GPU: 1 GPUs are asked for and there are 0 (check nvidia-smi, "
        "the driver and the configured GPU ids); session b failed: killed by a signal: the "
        "server's keeper died (SIGKILL without a reason in the log is often the host's memory: "
        "see dmesg)"
    )


def test_an_interrupted_session_is_no_failure_and_not_unknown(tmp_path: Path) -> None:
    launched(tmp_path, "a", None)
    with pytest.raises(CollectError, match="^d: session a is not complete; onboard collect goes"):
        served_calls(tmp_path, "d")


def test_a_complete_session_says_more_than_a_failed_one(tmp_path: Path) -> None:
    launched(tmp_path, "a", Kind.JIT, "nvcc not found")
    place = launched(tmp_path, "b", None)
    place.finish(outcome(session("b")))
    calls, sessions = served_calls(tmp_path, "d")
    assert calls.calls == []
    assert sessions == [session("b")]
