"""A session's folder: what of it survives a crash, a damaged file, a launch of other kernels."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import tarfile
from pathlib import Path

import pytest

from tasks.collect import scratch, serve
from tasks.collect.engine import read_served, save_served
from tasks.collect.failures import Adjustment
from tasks.collect.place import Attempt, Outcome, Place, outcomes, unfinished
from tasks.collect.serve import Host
from tasks.collect.session import Mode, Served, Session, Traffic
from tasks.collect.store import CallStore
from tasks.errors import CollectError, InputError
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


def test_another_sglang_goes_on_with_the_session_and_another_plan_does_not(tmp_path: Path) -> None:
    planned = session()
    same = planned.model_copy(update={"sglang": "0.5.18"})
    other = planned.model_copy(update={"page_size": 64})
    told = planned.model_copy(update={"warnings": ("large",)})
    assert Place.of(tmp_path, planned).root == Place.of(tmp_path, same).root
    assert Place.of(tmp_path, planned).root == Place.of(tmp_path, told).root
    assert Place.of(tmp_path, planned).root != Place.of(tmp_path, other).root


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


@pytest.mark.parametrize(
    "text", ["", '{"session": ', "[]", '{"session": 3, "attempts": []}', "[" * 9999]
)
def test_damaged_attempts_are_named_and_cost_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (bad, _, _), (good, left, _) = killed(tmp_path, "bad"), killed(tmp_path, "good")
    (bad.root / "attempts.json").write_text(text)
    with pytest.raises(CollectError, match=r"bad-.*/attempts.json: .*remove the folder .*bad-"):
        bad.attempts()
    with caplog.at_level(logging.WARNING):
        assert unfinished(tmp_path) == [(session("good"), None)]
    assert "attempts.json" in caplog.text
    said = list[str]()
    own = Place.of(tmp_path, session("own"))
    serve._tidy(tmp_path, own, Host(CollectSettings()), said.append)
    assert not left.dumps.exists()
    assert ["left as it is" in line for line in said] == [True]
    assert (bad.root / "memory").exists()
    assert good.attempts() == [left]


def test_a_damaged_count_of_the_traffic_is_named(tmp_path: Path) -> None:
    file = tmp_path / "served.json"
    for text in ("", '{"requests": "many"}', "[]"):
        file.write_text(text)
        with pytest.raises(CollectError, match=r"served.json: .*remove it to send"):
            read_served(file)


def test_a_wave_that_is_sent_again_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "served.json"
    for served in (
        Served(requests=2),
        Served(requests=4, failed=1, errors={"e": 1}, waves_done=1),
        Served(requests=7, failed=2, errors={"e": 2}, waves_done=1),
    ):
        save_served(file, served)
    assert (read_served(file).requests, read_served(file).done.requests) == (7, 4)
    # The next launch begins where the complete waves ended.
    before = read_served(file).done
    assert before == Served(requests=4, failed=1, errors={"e": 1}, waves_done=1)
    save_served(file, Served(requests=8, failed=1, errors={"e": 1}, waves_done=2))
    assert read_served(file).done.requests == 8
    assert read_served(file).done.failed == 1


def left_behind(folder: Path, whose: Path, **owner: object) -> Path:
    """Leave a folder as a killed launch does."""
    (folder / "dump").mkdir(parents=True)
    note = {"host": socket.gethostname(), "session": str(whose), **owner}
    folder.with_name(f"{folder.name}.json").write_text(json.dumps(note))
    return folder


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(scratch, "SHARED", folder)
    return folder


def test_dumps_in_memory_go_when_their_launch_ends(memory: Path, tmp_path: Path) -> None:
    folder = scratch.folder_in_memory("s-1", 2, 0)
    assert folder is not None
    assert folder != scratch.folder_in_memory("s-1", 2, 0)
    with scratch.used(folder, tmp_path / "s-1"):
        (folder / "dump").mkdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert scratch.left() == []  # it is used
        with pytest.raises(CollectError, match="cannot be made"), scratch.used(folder, tmp_path):
            pass
    assert list(memory.iterdir()) == []
    assert scratch.folder_in_memory("s-1", 2, 1 << 62) is None


def test_what_cannot_be_removed_now_is_known_later(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left_behind(memory / f"onboard-{os.getuid()}-1-gone-1", tmp_path / "deleted")
    with monkeypatch.context() as patch:
        patch.setattr(scratch.shutil, "rmtree", lambda *_, **__: None)
        scratch.remove(folder)
    assert scratch.left() == [(folder, tmp_path / "deleted")]
    scratch.remove(folder)
    scratch.remove(folder)
    assert list(memory.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": "1"}', '{"pid": -1}'])
def test_a_damaged_note_of_a_keeper_is_named(tmp_path: Path, text: str) -> None:
    place, attempt, _ = killed(tmp_path, "s")
    (place.logs(1) / "keeper.json").write_text(text)
    with pytest.raises(InputError, match=r"attempt-1/keeper.json: "):
        serve._take_over(place, 1, attempt, Host(CollectSettings()))
    assert attempt.dumps.is_dir()


def test_dumps_of_sessions_that_are_gone_are_removed(memory: Path, tmp_path: Path) -> None:
    sessions, ours = tmp_path / "here", f"onboard-{os.getuid()}"
    own = Place.of(sessions, session("own"))
    gone = left_behind(memory / f"{ours}-1-gone-1", tmp_path / "deleted" / "s")
    kept = [
        left_behind(memory / f"{ours}-2-other-1", tmp_path / "deleted", host="another"),
        left_behind(memory / "onboard-99999-3-theirs-1", tmp_path / "deleted"),
        left_behind(memory / f"{ours}-4-odd-1", tmp_path / "deleted", session=3),
    ]
    (memory / f"{ours}-5-stale-1.json").write_text((memory / f"{gone.name}.json").read_text())
    (memory / f"{ours}-6-link-1").symlink_to(sessions)
    (memory / f"{ours}-6-link-1.json").write_text((memory / f"{gone.name}.json").read_text())
    used = memory / f"{ours}-7-used-1"
    said = list[str]()
    with scratch.used(used, tmp_path / "deleted" / "s"):
        serve._tidy(sessions, own, Host(CollectSettings()), said.append)
        assert used.is_dir()
    assert not gone.exists()
    assert ["whose session is gone" in line for line in said] == [True]
    assert all(folder.is_dir() for folder in kept)
    names = {path.name for path in memory.iterdir()}
    assert names == {f"{ours}-6-link-1"} | {
        name for folder in kept for name in (folder.name, f"{folder.name}.json")
    }


def test_dumps_of_another_workspaces_killed_session_are_taken_over(
    memory: Path, tmp_path: Path
) -> None:
    place, attempt, count = killed(tmp_path / "there", "s")
    (place.logs(1) / "go").touch()
    folder = memory / f"onboard-{os.getuid()}-1-s-1"
    left_behind(folder, place.root)
    shutil.rmtree(folder)
    attempt.dumps.rename(folder)
    place.record(session("s"), [attempt.model_copy(update={"dumps": folder})])
    own = Place.of(tmp_path / "here", session("own"))
    with place.alone(print, lambda: None):
        serve._tidy(tmp_path / "here", own, Host(CollectSettings()), print)
        assert folder.is_dir()  # somebody goes on with it
    serve._tidy(tmp_path / "here", own, Host(CollectSettings()), print)
    assert list(memory.iterdir()) == []
    with CallStore(place.store) as store:
        assert len(store.calls()) == count


def test_a_session_for_any_gpu_keeps_its_folder(tmp_path: Path) -> None:
    content = session().model_dump_json(exclude={"sglang", "gpu", "warnings"})
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    assert Place.of(tmp_path, session()).root.name == f"s-{digest}"
    newer = session().model_copy(update={"gpu": "SM100"})
    assert Place.of(tmp_path, newer).root != Place.of(tmp_path, session()).root


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
        serve._tidy(tmp_path, own, host, print)
    assert not left.dumps.exists()
    assert used.dumps.exists()
    with CallStore(idle.store) as store:
        assert len(store.calls()) == count


def test_calls_of_other_kernels_are_set_aside(tmp_path: Path) -> None:
    place, attempt, count = killed(tmp_path, "s")
    (place.logs(1) / "go").touch()
    serve._take_over(place, 1, attempt, Host(CollectSettings()))
    place.served.write_text(Served(waves_done=3).model_dump_json())
    place.set_aside(1)
    assert not place.store.exists()
    assert not place.served.exists()
    with CallStore(place.logs(1) / "calls.sqlite") as store:
        assert len(store.calls()) == count


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
