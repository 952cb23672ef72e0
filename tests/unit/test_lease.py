"""GPUs are lent to one process at a time, visibly, and come back however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.collect import lease as module
from tasks.collect.lease import Holder, lease, visible_gpus
from tasks.errors import CollectError, InputError

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from tasks.collect.lease import lease
directory, gpus, count = sys.argv[1:]
with lease(Path(directory), gpus.split(","), int(count), on_wait=print, session="other") as got:
    print(",".join(got), flush=True)
    sys.stdin.read()
"""


class StopWaitingError(Exception):
    """Ends a wait."""


def holders(directory: Path) -> dict[str, Holder | None]:
    """The GPUs of a directory that are held, with who holds them."""
    with module._alone(directory):
        gpus = [path.stem.removeprefix("gpu-") for path in directory.glob("gpu-*.lock")]
        return module._held(directory, module._ordered(gpus, "test"))


def unexpected(text: str) -> None:
    raise AssertionError(text)


@contextmanager
def other_holder(directory: Path, gpus: str, count: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds GPUs until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), gpus, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as child:
        try:
            assert child.stdout is not None
            assert len(child.stdout.readline().strip().split(",")) == count
            yield child
        finally:
            child.kill()


def test_lowest_free_gpus_in_ascending_order(tmp_path: Path) -> None:
    with lease(tmp_path, ["10", "2", "9"], 2, on_wait=unexpected, session="a") as first:
        assert first == ("2", "9")
        with lease(tmp_path, ["10", "2", "9"], 1, on_wait=unexpected) as second:
            assert second == ("10",)
            held = holders(tmp_path)
            assert list(held) == ["2", "9", "10"]
            assert held["2"] is not None
            assert (held["2"].pid, held["2"].session) == (os.getpid(), "a")
        assert list(holders(tmp_path)) == ["2", "9"]
    assert holders(tmp_path) == {}
    assert not list(tmp_path.glob("*.json"))


def test_none_is_a_lease_too(tmp_path: Path) -> None:
    with lease(tmp_path, [], 0, on_wait=unexpected) as got:
        assert got == ()


@pytest.mark.parametrize("count", [3, -1])
def test_more_than_there_are_is_refused_at_once(tmp_path: Path, count: int) -> None:
    with (
        pytest.raises(CollectError, match=rf"{count} GPUs .* there are 2 \(0, 1\)"),
        lease(tmp_path, ["0", "1"], count, on_wait=unexpected),
    ):
        pass


@pytest.mark.parametrize(
    ("gpus", "error"),
    [(["../0"], InputError), ([""], InputError), (["0", "0"], CollectError)],
)
def test_impossible_ids_are_refused(
    tmp_path: Path, gpus: list[str], error: type[Exception]
) -> None:
    with pytest.raises(error), lease(tmp_path, gpus, 1, on_wait=unexpected):
        pass
    assert not list(tmp_path.iterdir())


def test_waiting_is_told_once_and_nothing_is_held_meanwhile(tmp_path: Path) -> None:
    texts: list[str] = []
    polls = 0

    def pause(seconds: float) -> None:
        nonlocal polls
        polls += 1
        assert list(holders(tmp_path)) == ["0", "1"]  # the free third is not kept while waiting
        if polls == 5:
            raise StopWaitingError

    with (
        other_holder(tmp_path, "0,1", 2) as other,
        pytest.raises(StopWaitingError),
        lease(tmp_path, ["0", "1", "2"], 2, on_wait=texts.append, pause=pause),
    ):
        pass
    assert len(texts) == 1
    assert "waiting for 2 of GPUs 0, 1, 2: GPU 0 is held by session other" in texts[0]
    assert f"pid {other.pid} on " in texts[0]


def test_a_change_of_holders_is_told(tmp_path: Path) -> None:
    texts: list[str] = []
    with other_holder(tmp_path, "0", 1) as first, other_holder(tmp_path, "1", 1) as second:

        def pause(seconds: float) -> None:
            if len(texts) == 1:
                first.communicate()
            else:
                second.communicate()

        with lease(tmp_path, ["0", "1"], 2, on_wait=texts.append, pause=pause) as got:
            assert got == ("0", "1")
    assert [str(first.pid) in text for text in texts] == [True, False]
    assert [str(second.pid) in text for text in texts] == [True, True]


def test_gives_up_in_time_and_says_who_holds(tmp_path: Path) -> None:
    with (
        other_holder(tmp_path, "0", 1),
        pytest.raises(CollectError, match="gave up waiting for 1 of GPUs 0: .* session other"),
        lease(tmp_path, ["0"], 1, on_wait=unexpected, timeout=0),
    ):
        pass


def test_a_killed_holder_gives_back_and_its_note_is_ignored(tmp_path: Path) -> None:
    with other_holder(tmp_path, "0", 1) as other:
        assert list(holders(tmp_path)) == ["0"]
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / "gpu-0.json").exists()
    assert holders(tmp_path) == {}
    with lease(tmp_path, ["0"], 1, on_wait=unexpected) as got:
        assert got == ("0",)
        note = json.loads((tmp_path / "gpu-0.json").read_text())
        assert note["pid"] == os.getpid()


@pytest.mark.parametrize("note", ["", "{", '{"pid": "x"}', "[" * 100_000, None])
def test_an_unreadable_note_is_a_holder_without_a_name(tmp_path: Path, note: str | None) -> None:
    with other_holder(tmp_path, "0", 1):
        if note is None:
            (tmp_path / "gpu-0.json").unlink()
        else:
            (tmp_path / "gpu-0.json").write_text(note)
        assert holders(tmp_path) == {"0": None}
        with (
            pytest.raises(CollectError, match="GPU 0 is held by a process that left no note"),
            lease(tmp_path, ["0"], 1, on_wait=unexpected, timeout=0),
        ):
            pass


def test_a_lock_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "gpu-0.lock").mkdir()
    with (
        pytest.raises(CollectError, match="cannot be leased there"),
        lease(tmp_path, ["0"], 1, on_wait=unexpected),
    ):
        pass


def test_waiters_for_two_of_three_all_get_their_turn(tmp_path: Path) -> None:
    taken: set[str] = set()
    turns: list[tuple[str, ...]] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                with lease(
                    tmp_path, ["0", "1", "2"], 2, on_wait=lambda _: None, pause=lambda _: None
                ) as got:
                    assert not taken & set(got)
                    taken.update(got)
                    turns.append(got)
                    taken.difference_update(got)
        except BaseException as error:  # reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert len(turns) == 15
    assert holders(tmp_path) == {}


def test_configured_gpus_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert visible_gpus(["3", "1"], devices=tmp_path) == ("1", "3")
    assert visible_gpus([], devices=tmp_path) == ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("2, 0", ("0", "2")),
        ("1,-1,0", ("1",)),
        ("GPU-b1c2,GPU-a0d1", ("GPU-a0d1", "GPU-b1c2")),
    ],
)
def test_gpus_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == expected


def test_one_gpu_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,0")
    with pytest.raises(CollectError, match="CUDA_VISIBLE_DEVICES: GPU 0 is named twice"):
        visible_gpus()


def test_gpus_of_the_device_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(devices=tmp_path) == ()
    for name in ("nvidia2", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    assert visible_gpus(devices=tmp_path) == ("0", "1")  # as CUDA counts them


@given(st.text(max_size=40))
def test_no_environment_breaks_it(value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", value.replace("\0", ""))
        try:
            ids = visible_gpus()
        except (CollectError, InputError):
            return
        assert all("/" not in name and not name.startswith(".") for name in ids)
