"""A session's folder: what of it survives a crash, a damaged file, a launch of other kernels."""

from __future__ import annotations

import logging
import tarfile
from pathlib import Path

import pytest

from tasks.collect import serve
from tasks.collect.failures import Adjustment
from tasks.collect.place import Attempt, Outcome, Place, outcomes
from tasks.collect.serve import Host
from tasks.collect.session import Mode, Served, Session, Traffic
from tasks.collect.store import CallStore
from tasks.errors import CollectError
from tasks.settings import CollectSettings
from tests.conftest import DATA


def session(name: str = "s", mode: Mode = "decode") -> Session:
    return Session(
        id=name,
        model="m",
        tp=1,
        ep=1,
        page_size=1,
        mode=mode,
        flags=(),
        env={},
        record=(),
        expects={"d": ()},
        traffic=Traffic(),
        tp_choices=(1,),
    )


def outcome(served: Session) -> Outcome:
    return Outcome(
        session=served,
        launches=1,
        gpus=("0",),
        served=Served(output_tokens=30, seconds=2.0),
        fired={},
        missing={},
        notes=[],
        versions={},
        unreadable={},
        thinned=0,
        notices={},
        drained_mb=0.0,
        peak_mb=0.0,
        pauses=0,
    )


def dumps_in(folder: Path) -> int:
    """Unpack the recorded calls of a small run; return how many there are."""
    folder.mkdir(parents=True)
    with tarfile.open(DATA / "dumps_h200" / "moe_calls.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return len(list(folder.rglob("metadata.jsonl")))


def killed(sessions: Path, name: str) -> tuple[Place, Attempt, int]:
    """Leave what a launch does that was killed while it served."""
    place = Place.of(sessions, session(name))
    dumps = place.root / "memory"
    count = dumps_in(dumps)
    used = Adjustment(max_total_tokens=None, tp=1, concurrency=1.0)
    attempt = Attempt(adjustment=used, dumps=dumps)
    place.record(session(name), [attempt])
    place.logs(1).mkdir()
    return place, attempt, count


def test_a_damaged_session_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = Place.of(tmp_path, session("a")), Place.of(tmp_path, session("b"))
    for place, name in ((good, "a"), (bad, "b")):
        place.root.mkdir()
        place.finish(outcome(session(name)))
    (bad.root / "outcome.json").write_text('{"session": 3')
    with pytest.raises(CollectError, match=r"outcome.json: .*remove it to serve"):
        bad.outcome()
    with caplog.at_level(logging.WARNING):
        assert [found.session.id for _, found in outcomes(tmp_path)] == ["a"]
    assert str(bad.root) in caplog.text


def test_another_plan_has_another_folder(tmp_path: Path) -> None:
    other = session().model_copy(update={"flags": ("--page-size", "64")})
    assert Place.of(tmp_path, session()).root != Place.of(tmp_path, other).root


def test_calls_know_how_their_server_prefilled(tmp_path: Path) -> None:
    place, attempt, count = killed(tmp_path, "s")
    (place.logs(1) / "go").touch()
    serve._take_over(place, 1, attempt, Host(CollectSettings()))
    assert not attempt.dumps.exists()
    assert {call.prefill for call in place.calls().calls} == {""}
    place.finish(outcome(session("s", "paged_prefill")))
    calls = place.calls().calls
    assert {call.prefill for call in calls} == {"paged"}
    assert len(calls) == count


def test_what_was_dumped_before_a_server_was_ready_is_not_kept(tmp_path: Path) -> None:
    place, attempt, _ = killed(tmp_path, "s")
    serve._take_over(place, 1, attempt, Host(CollectSettings()))
    assert not attempt.dumps.exists()
    assert not place.store.exists()


def test_other_sessions_leftovers_are_taken_over_unless_they_are_served(tmp_path: Path) -> None:
    host = Host(CollectSettings())
    own, (idle, left, count), (busy, used, _) = (
        Place.of(tmp_path, session("own")),
        killed(tmp_path, "idle"),
        killed(tmp_path, "busy"),
    )
    (idle.logs(1) / "go").touch()
    with busy.alone(lambda text: None, lambda: None):
        serve._tidy(tmp_path, own, host)
    assert not left.dumps.exists()
    assert used.dumps.exists()
    with CallStore(idle.store) as store:
        assert store.summary().calls == count


def test_calls_of_other_kernels_are_set_aside(tmp_path: Path) -> None:
    place, attempt, count = killed(tmp_path, "s")
    (place.logs(1) / "go").touch()
    serve._take_over(place, 1, attempt, Host(CollectSettings()))
    place.served.write_text(Served(waves_done=3).model_dump_json())
    place.set_aside(1)
    assert not place.store.exists()
    assert not place.served.exists()
    with CallStore(place.logs(1) / "calls.sqlite") as store:
        assert store.summary().calls == count


def test_waiting_for_a_session_can_be_ended(tmp_path: Path) -> None:
    place, said = Place(tmp_path / "s"), list[str]()

    def go_on() -> None:
        if said:
            raise CollectError("stopped")

    with (
        place.alone(said.append, lambda: None),
        pytest.raises(CollectError, match="stopped"),
        Place(place.root).alone(said.append, go_on),
    ):
        pass
    assert said == ["s: another run serves it, waiting"]
