"""Draining dumps into a store while they are written, and after every kind of crash."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.collect.drain import Drain, Drained, scan_log
from tasks.collect.dumps import DumpedCall, Unreadable, read_calls
from tasks.collect.store import CallStore
from tasks.errors import CollectError
from tasks.ops.base import DumpError
from tests.unit.test_dumps import (
    ARRAYS,
    PLAN,
    READS,
    dump,
    packed,
    record,
    replace_reader,
    torch_dump,
    unpack,
)

RUN = PLAN.replace(".plan", ".run")
GB = 1 << 30
CAPTURED = "the call was captured into a CUDA graph and no replay of it was dumped"


@pytest.fixture
def store(tmp_path: Path) -> CallStore:
    return CallStore(tmp_path / "store" / "calls.sqlite", reads=READS)


def make_drain(root: Path, store: CallStore, **options: Any) -> Drain:
    return Drain(root, store, **{"prefix": "s/", "bound": GB, "incomplete": False} | options)


def saved(**changes: Any) -> dict[str, Any]:
    return record(execution_status="inputs_saved", **changes)


def complete(folder: Path) -> None:
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write(json.dumps(record()) + "\n")


def ids(store: CallStore) -> list[int]:
    return [int(call.id[-4:]) for call in store.calls()]


def test_finished_calls_are_stored_and_their_folders_go(tmp_path: Path, store: CallStore) -> None:
    root = tmp_path / "d"
    drain = make_drain(root, store)
    assert drain.step() == Drained()
    dump(root)
    working = dump(root, saved(), call=2)
    dump(root, json.dumps(record()).encode()[:300], call=3)
    (root / "session.jsonl").write_text("x" * 10_000)
    drained = drain.step()
    assert (drained.calls, drained.left, drained.unreadable) == (1, 2, {})
    assert not (root / "session.jsonl").exists()
    assert drained.backlog == drain.backlog() > 0
    complete(working)
    assert drain.step().calls == 1
    final = drain.finish()
    assert (final.calls, final.left, final.backlog) == (0, 0, 0)
    assert final.unreadable == store.unreadable() == {"metadata.jsonl is truncated": 1}
    assert not list(root.iterdir())
    assert ids(store) == [1, 2]


def test_stored_calls_are_those_of_the_dumps(tmp_path: Path, store: CallStore) -> None:
    for archive in ("llama_calls", "mla_calls", "graph_replays"):
        unpack(archive, tmp_path / "d")
    read = read_calls(tmp_path / "d")
    wanted = [
        (call, {p: t.load() for p, t in call.tensors.items() if p in READS.get(call.name, ())})
        for call in read.calls
    ]
    make_drain(tmp_path / "d", store).finish()
    assert store.unreadable() == read.unreadable == {CAPTURED: 1}
    log = store.log()
    assert len(log.calls) == len(wanted) > 20
    for found, (call, loaded) in zip(log.calls, wanted, strict=True):
        assert (found.id, found.process) == (f"s/{call.id}", f"s/{call.process}")
        for name in ("name", "self_id", "captured", "values", "versions"):
            assert getattr(found, name) == getattr(call, name)
        assert list(found.tensors) == sorted(call.tensors)
        for parameter, tensor in call.tensors.items():
            kept = found.tensors[parameter]
            assert (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype)
            if parameter in loaded:
                assert np.array_equal(kept.load(), loaded[parameter])
            else:
                with pytest.raises(DumpError, match="not kept"):
                    kept.load()
    summary = store.summary()
    assert len(store.calls()) == len(wanted)
    assert summary.fired[PLAN] == {"s/graph:1726": 1, "s/llama:1293": 2}
    assert summary.versions["flashinfer"] == ["0.6.15.post1"]


def test_calls_whose_kernel_failed_wait_for_a_later_call(tmp_path: Path, store: CallStore) -> None:
    for number in (1, 2, 3):
        dump(tmp_path / "d", saved(), call=number, stamp=f"00{number}")
    drain = make_drain(tmp_path / "d", store, incomplete=True)
    assert drain.step().calls == 2
    assert drain.finish().calls == 1
    assert ids(store) == [1, 2, 3]
    assert not store.unreadable()


def test_calls_that_never_finish_do_not_hold_the_server_back(
    tmp_path: Path, store: CallStore
) -> None:
    """Beyond the bound, a call that others followed is given up; the last may still be running."""
    for number in (1, 2, 3):
        dump(tmp_path / "d", saved(), call=number, stamp=f"00{number}")
    assert make_drain(tmp_path / "d", store).step().left == 3
    drained = make_drain(tmp_path / "d", store, bound=1).step()
    assert (drained.left, drained.calls) == (1, 0)
    assert drained.unreadable == {"the call did not complete (inputs_saved)": 2}


def test_replays_are_drained_while_their_graph_lives(tmp_path: Path, store: CallStore) -> None:
    """The captured call's own folder stays: FlashInfer makes the next replay's record from it."""
    unpack("graph_replays", tmp_path)
    root = tmp_path / "graph"
    drain = make_drain(root, store)
    assert drain.step().calls == 1 + 2 + 2
    assert sorted(p.name for p in root.rglob("flush_*")) == ["flush_0003"] * 2
    (folder,) = root.glob("*_rmsnorm_call0006")
    shutil.copytree(
        folder / "graph_flushes" / "flush_0003", folder / "graph_flushes" / "flush_0004"
    )
    assert drain.step().calls == 1
    assert drain.step().calls == 0
    assert drain.finish().calls == 2
    assert store.unreadable() == {CAPTURED: 1}
    assert [c.id.rpartition("/")[2] for c in store.calls() if c.captured][:4] == [
        f"flush_000{n}" for n in (1, 2, 3, 4)
    ]
    assert not list(root.iterdir())


def test_whatever_is_left_is_counted_once(tmp_path: Path, store: CallStore) -> None:
    root = tmp_path / "d"
    (root / "20261120_180224_000_pid7_rmsnorm_call0001").mkdir(parents=True)
    (root / "strange_call0001").mkdir()
    (root / "link_call0001").symlink_to(tmp_path)
    (root / "notes.txt").write_text("keep")
    dump(root, b"[]", call=4)
    drain = make_drain(root, store)
    assert drain.step().unreadable == {"metadata.jsonl is not of the expected form": 1}
    drain.finish()
    drain.finish()
    assert store.unreadable() == {
        "metadata.jsonl is not of the expected form": 1,
        "metadata.jsonl cannot be read (not there)": 1,
        "the folder's name is not that of a dump": 1,
        "a symbolic link": 1,
        "not a dump of FlashInfer's (a foreign file)": 1,
    }
    assert [p.name for p in root.iterdir()] == ["notes.txt"]
    assert tmp_path.is_dir()


def test_what_cannot_be_loaded_is_the_reason_later(tmp_path: Path, store: CallStore) -> None:
    (dump(tmp_path / "d") / "inputs.safetensors").write_bytes(packed(ARRAYS)[:-3])
    make_drain(tmp_path / "d", store).step()
    (call,) = store.calls()
    assert call.tensors["indptr"].load().tolist() == [0, 1, 4]
    with pytest.raises(DumpError, match="arg_2 cannot be read .truncated"):
        call.tensors["indices"].load()


DIE = """
import os, signal, sys
from pathlib import Path
from tasks.collect import drain
from tasks.collect.store import CallStore
where, root, path = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
drain._BATCH = 4
store = CallStore(path, reads={reads!r})
renames = []
rename = Path.rename
def die_at_the_third(self, target):
    renames.append(1)
    if len(renames) == 3:
        die()
    return rename(self, target)
if where == "in a transaction":
    add = CallStore._add_call
    def die_at_the_sixth(self, call):
        if call.id.endswith("call0006"):
            die()
        return add(self, call)
    CallStore._add_call = die_at_the_sixth
elif where == "after the commit":
    drain.Drain._delete = die
elif where == "between renames":
    Path.rename = die_at_the_third
else:
    drain.shutil.rmtree = die
drain.Drain(root, store, prefix="s/", bound=1 << 30, incomplete=False).finish()
"""


@pytest.mark.parametrize(
    ("where", "stored"),
    [("in a transaction", 4), ("after the commit", 3), ("between renames", 3), ("at deletion", 3)],
)
def test_a_killed_drain_loses_nothing_and_counts_nothing_twice(
    tmp_path: Path, where: str, stored: int
) -> None:
    root, path = tmp_path / "d", tmp_path / "calls.sqlite"
    for number in range(1, 10):
        dump(root, b"[]" if number == 2 else None, call=number, stamp=f"00{number}")
    if where == "in a transaction":
        shutil.rmtree(next(root.glob("*call0002")))
    child = subprocess.run(
        [sys.executable, "-c", DIE.replace("{reads!r}", repr(READS)), where, root, path],
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    with CallStore(path, reads=READS) as store:
        assert len(store.calls()) == stored
        make_drain(root, store).finish()
        wanted = [1, 3, 4, 5, 6, 7, 8, 9]
        assert ids(store) == wanted
        bad = (
            {} if where == "in a transaction" else {"metadata.jsonl is not of the expected form": 1}
        )
        assert store.unreadable() == bad
        assert all(c.tensors["indices"].load().tolist() == [9, 8, 7, 6] for c in store.calls())
    assert not list(root.iterdir())


def test_a_folder_that_comes_back_is_not_stored_twice(tmp_path: Path, store: CallStore) -> None:
    drain = make_drain(tmp_path / "d", store)
    for _ in range(2):
        dump(tmp_path / "d")
        dump(tmp_path / "d", b"[]", call=2)
        drain.step()
    assert ids(store) == [1]
    assert list(store.unreadable().values()) == [1]


def call_of(
    number: int, *, length: int = 4, seed: int | None = None, name: str = PLAN, heads: int = 8
) -> DumpedCall:
    values = np.full(length, number if seed is None else seed, np.int32)
    return DumpedCall(
        id=f"s/20261120_180224_{number:03}_pid7_{name}_call{number:04d}",
        name=name,
        process="s:7",
        tensors={"indices": Array(values)},
        values={"num_qo_heads": heads, "sm_scale": 0.5, "causal": True},
        versions={"torch": "2"},
    )


class Array:
    """A tensor in memory."""

    dtype = "int32"

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.shape = values.shape

    def load(self) -> np.ndarray:
        return self._values


def test_ranks_share_their_tensors(store: CallStore) -> None:
    store.add(call_of(n, seed=1) for n in range(8))
    assert store.size() == 16
    assert len({c.tensors["indices"].load().tobytes() for c in store.calls()}) == 1


def test_thinning_keeps_records_and_what_differs_most(tmp_path: Path, store: CallStore) -> None:
    lengths = [100] * 20 + [1, 1000, 10, 100]
    store.add([call_of(n, length=length) for n, length in enumerate(lengths)])
    store.add([call_of(99, length=50, heads=4)])
    before = store.size()
    assert store.thin(before) == 0
    assert store.thin(8000) == 17
    kept = {}
    for call in store.calls():
        try:
            kept[int(call.id[-4:])] = len(call.tensors["indices"].load())
        except DumpError as error:
            assert "not kept (the store was full)" in str(error)
    # One of each length, of both head counts, and as many of the many alike as there is room for.
    assert {1, 10, 100, 1000, 50} == set(kept.values())
    assert len(store.calls()) == len(lengths) + 1
    assert store.size() == 4 * sum(kept.values()) <= 6000
    assert store.summary().thinned == 17
    again = CallStore(tmp_path / "again.sqlite", reads=READS)
    again.add([call_of(99, length=50, heads=4)])
    again.add([call_of(n, length=length) for n, length in reversed(list(enumerate(lengths)))])
    again.thin(8000)
    assert {c.id for c in again.calls() if c.tensors["indices"].content} == {
        c.id for c in store.calls() if c.tensors["indices"].content
    }


def test_the_records_of_calls_count_too(store: CallStore) -> None:
    """A quarter of the limit is left to tensors, however many calls there are."""
    store.add([call_of(n, length=1000) for n in range(20)])
    limit = 400_000
    assert store.keep_within(limit) == 0
    store.add([replace(call_of(n), values={"text": "x" * 1000}) for n in range(100, 500)])
    assert store.size() < limit // 4 < limit < store.file_size()
    assert store.keep_within(limit) == 0  # few enough
    store.add([call_of(n, length=1000) for n in range(1000, 1020)])
    assert store.keep_within(limit) > 0
    assert 0 < store.size() <= limit // 4
    assert len(store.calls()) == 440


def test_thinning_gives_disk_space_back(tmp_path: Path, store: CallStore) -> None:
    store.add([call_of(n, length=200_000) for n in range(20)])
    store.thin(2_000_000)
    store.close()
    assert (tmp_path / "store" / "calls.sqlite").stat().st_size < 3_000_000


def test_others_read_while_one_writes(tmp_path: Path, store: CallStore) -> None:
    path = tmp_path / "store" / "calls.sqlite"
    store.add([call_of(1)])
    seen = []

    def reading_others() -> Any:
        for number in (2, 3):
            yield call_of(number)
            with CallStore(path, reads=READS) as other:
                seen.append((ids(other), other.calls()[0].tensors["indices"].load().tolist()))

    store.add(reading_others())
    assert seen == [([1], [1] * 4)] * 2
    with CallStore(path) as other:
        assert ids(other) == [1, 2, 3]


def test_a_failing_transaction_leaves_nothing(store: CallStore) -> None:
    def failing() -> Any:
        yield call_of(1)
        yield Unreadable("s/x", "reason")
        raise KeyError

    with pytest.raises(KeyError):
        store.add(failing())
    assert (store.calls(), store.unreadable(), store.size()) == ([], {}, 0)
    assert store.add([call_of(1)])[0] == 1


@pytest.mark.parametrize("content", [b"no database at all, but long enough" * 40, None])
def test_a_file_that_is_no_store(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.sqlite"
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE t (a)")
            other.execute("PRAGMA user_version = 7")
        other.close()
    else:
        path.write_bytes(content)
    with pytest.raises(CollectError, match="x.sqlite: cannot be opened as a store of calls"):
        CallStore(path)


def test_torch_dumps_are_converted_before_their_folders_go(
    tmp_path: Path, store: CallStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3):
        torch_dump(tmp_path / "d", number)
    replace_reader(monkeypatch, dies_at="call0002")
    drain = make_drain(tmp_path / "d", store)
    assert drain.step().calls == 3
    assert drain.backlog() == 0
    first, second, third = (call.tensors["indices"] for call in store.calls())
    assert first.load().tolist() == third.load().tolist() == [9, 8, 7, 6]
    with pytest.raises(DumpError, match="its reader died"):
        second.load()


def test_what_the_start_up_dumped_can_be_discarded(tmp_path: Path, store: CallStore) -> None:
    unpack("graph_replays", tmp_path)
    root = tmp_path / "graph"
    dump(root, saved(), call=2)
    drain = make_drain(root, store, incomplete=True)
    assert drain.discard() == 1 + 1 + 3 + 3
    assert sorted(p.name[-8:] for p in root.iterdir()) == ["call0006", "call0009", "call0021"]
    dump(root, call=3)
    assert drain.finish().calls == 1
    assert ids(store) == [3]


LIMIT = "Dump limit reached (500 dumps). Skipping dump for rmsnorm. Increase it.\n"


def test_what_flashinfer_logs_is_counted_once(tmp_path: Path, store: CallStore) -> None:
    log = tmp_path / "flashinfer_7.log"
    assert scan_log(log, store) == {}
    log.write_text("a call\n" + LIMIT * 2 + "[DUMP ERROR (inputs) in rmsnorm]: disk full\nDump li")
    assert scan_log(log, store) == {"Dump limit reached": 2, "DUMP ERROR": 1}
    with log.open("a") as lines:
        lines.write("mit reached\nFailed to dump function call x: y\n")
    with CallStore(tmp_path / "store" / "calls.sqlite") as other:
        assert scan_log(log, other) == {"Dump limit reached": 1, "Failed to dump": 1}
    assert scan_log(log, store) == {}
    assert store.summary().notices == {
        "Dump limit reached": 3,
        "DUMP ERROR": 1,
        "Failed to dump": 1,
    }
    log.unlink()
    log.write_text("Dump size limit reached (20 GB)\n")
    assert sum(scan_log(log, store).values()) <= 1


def test_a_large_log_gives_its_space_back(
    tmp_path: Path, store: CallStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.collect.drain._LARGE_LOG", 1 << 20)
    log = tmp_path / "flashinfer.log"
    with log.open("a", buffering=1) as writer:
        for _ in range(3):
            writer.write("x" * (2 << 20) + "\n" + LIMIT)
            assert scan_log(log, store) == {"Dump limit reached": 1}
            assert log.stat().st_blocks * 512 < 1 << 20
    assert os.path.lexists(log)
    log.unlink()
    log.symlink_to("/etc/passwd")
    with pytest.raises(CollectError, match="symbolic link"):
        scan_log(log, store)
