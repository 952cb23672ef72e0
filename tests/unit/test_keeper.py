"""A server's processes end with the worker, however either ends; real processes throughout."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.collect import keeper as module
from tasks.collect.keeper import PORT, Keeper, free_port
from tasks.collect.lease import lease
from tasks.collect.logs import LogFollower, Milestones, tail
from tasks.errors import CollectError
from tests.unit.test_lease import StopWaitingError, holders

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 30.0

# A server with a child, and an orphan in a session of its own that does not heed SIGTERM.
TREE = """
import os, signal, sys, time
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def live():
    while True:
        time.sleep(60)
if os.fork() == 0:
    say("pid", os.getpid())
    live()
if os.fork() == 0:
    if os.fork():
        os._exit(0)
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("pid", os.getpid())
    live()
say("pid", os.getpid())
"""
FOREVER = TREE + "live()"
WRITER = "import time\nwhile True:\n    print('x', flush=True)\n    time.sleep(0.001)\n"
WORKER = """
import json, os, sys, time
from pathlib import Path
from tasks.collect.keeper import Keeper
folder, server, forks = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "forks"
keeper = Keeper.start([sys.executable, "-c", server], environment={}, log=folder / "log",
    directory=folder / "leases", gpus=["0", "1"], count=2, grace=0.2)
keeper.wait_leased()
if forks and os.fork() == 0:
    time.sleep(600)
print(keeper.pid, flush=True)
time.sleep(600)
"""


def until(fact: Callable[[], Any]) -> Any:
    """Wait for a fact, and return it."""
    deadline = time.monotonic() + DEADLINE
    while not (value := fact()):
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)
    return value


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def tree_of(log: Path) -> list[psutil.Process]:
    """The three processes of `TREE`, once they all run."""

    def pids() -> list[int]:
        return [int(line.split()[1]) for line in tail(log, 50).splitlines() if "pid " in line]

    return [psutil.Process(pid) for pid in until(lambda: len(pids()) == 3 and pids())]


def until_ended(processes: list[psutil.Process]) -> None:
    until(lambda: all(ended(process) for process in processes))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Where a keeper works; all of it must be given back in the end."""
    yield {
        "environment": {},
        "log": tmp_path / "logs" / "server.log",
        "directory": tmp_path / "leases",
        "gpus": ["0", "1"],
        "count": 2,
        "grace": 0.1,
    }
    assert holders(tmp_path / "leases") == {}


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def last_event(keeper: Keeper) -> dict[str, Any]:
    keeper.poll()
    return keeper.events[-1]


def test_a_server_that_ends_by_itself(place: dict[str, Any]) -> None:
    code = (
        "import json, os, sys; print(json.dumps(dict(os.environ)), flush=True); "
        "print('bad', file=sys.stderr); sys.exit(3)"
    )
    place |= {"environment": {"NAME": "v", "CUDA_VISIBLE_DEVICES": "7", "LC_CTYPE": "C.UTF-8"}}
    with Keeper.start(python(code), **place) as keeper:
        assert keeper.wait_leased() == ("0", "1")
        until(lambda: not keeper.alive)
        assert keeper.returncode == 3
    assert [event["event"] for event in keeper.events] == ["leased", "started", "exit"]
    assert last_event(keeper) == {"event": "exit", "exit": 3, "stopped": False, "error": None}
    shown, error = tail(place["log"], 10).splitlines()
    expected = {"NAME": "v", "CUDA_VISIBLE_DEVICES": "0,1", "LC_CTYPE": "C.UTF-8"}
    assert json.loads(shown) == expected
    assert error == "bad"
    assert keeper.stop() == 3  # a second time it does nothing
    keeper.pause()
    keeper.resume()


def test_a_server_without_a_gpu_sees_none(place: dict[str, Any]) -> None:
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    with Keeper.start(python(code), **place | {"gpus": [], "count": 0}) as keeper:
        assert keeper.wait_leased() == ()
        until(lambda: not keeper.alive)
    assert tail(place["log"], 1) == "''"


def test_logs_are_appended(place: dict[str, Any]) -> None:
    place["log"].parent.mkdir()
    place["log"].write_text("before\n")
    with Keeper.start(python("print('after')"), **place) as keeper:
        until(lambda: not keeper.alive)
    assert place["log"].read_text() == "before\nafter\n"


@pytest.mark.parametrize(
    ("ending", "status"),
    [("sys.exit(0)", 0), ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV)],
)
def test_leftovers_of_a_server_that_ended_are_ended(
    place: dict[str, Any], tmp_path: Path, ending: str, status: int
) -> None:
    told = tmp_path / "told"
    wait = "while not os.path.exists(sys.argv[1]):\n    time.sleep(0.01)\n"
    command = [*python(TREE + wait + ending), str(told)]
    with Keeper.start(command, **place) as keeper:
        processes = tree_of(place["log"])
        told.touch()
        until(lambda: not keeper.alive)
        assert all(ended(process) for process in processes)  # before the keeper ends, not after
        assert keeper.returncode == status
        assert not last_event(keeper)["stopped"]


def test_stop_ends_the_whole_tree(place: dict[str, Any]) -> None:
    with Keeper.start(python(FOREVER), **place) as keeper:
        processes = tree_of(place["log"])
        assert list(holders(place["directory"])) == ["0", "1"]
        assert keeper.stop() == -signal.SIGTERM
        assert all(ended(process) for process in processes)
        assert holders(place["directory"]) == {}
    assert last_event(keeper)["stopped"]
    assert keeper.stop() == -signal.SIGTERM


def test_a_server_may_end_orderly_within_the_grace_period(place: dict[str, Any]) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True)\ntime.sleep(600)"
    )
    with Keeper.start(python(code), **place | {"grace": 0.0}) as keeper:
        until(lambda: "ready" in tail(place["log"], 1))
        assert keeper.stop(grace=DEADLINE) == 5


def test_an_error_in_the_worker_ends_the_server(place: dict[str, Any]) -> None:
    processes: list[psutil.Process] = []

    def work() -> None:
        with Keeper.start(python(FOREVER), **place):
            processes.extend(tree_of(place["log"]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(processes) == 3
    assert all(ended(process) for process in processes)


def test_sigterm_to_the_keeper_ends_the_server(place: dict[str, Any]) -> None:
    with Keeper.start(python(FOREVER), **place) as keeper:
        processes = tree_of(place["log"])
        os.kill(keeper.pid, signal.SIGTERM)
        until(lambda: not keeper.alive)
        assert all(ended(process) for process in processes)
        assert last_event(keeper)["stopped"]


@pytest.mark.parametrize("forks", ["forks", "does not"])
def test_kill_9_of_the_worker_leaves_nothing(tmp_path: Path, forks: str) -> None:
    # A process that the worker forked has the keeper's input too, which then does not end.
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path), FOREVER, forks],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    ) as worker:
        try:
            assert worker.stdout is not None
            keeper = psutil.Process(int(worker.stdout.readline()))
            processes = tree_of(tmp_path / "log")
            assert list(holders(tmp_path / "leases")) == ["0", "1"]
            worker.kill()
            until_ended([*processes, keeper])
            assert holders(tmp_path / "leases") == {}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)


def test_kill_9_of_the_keeper_kills_the_server(place: dict[str, Any]) -> None:
    with Keeper.start(python("import time; time.sleep(600)"), **place) as keeper:
        keeper.wait_leased()
        server = psutil.Process(keeper.events[-1]["pid"])
        os.kill(keeper.pid, signal.SIGKILL)
        until_ended([server])
        until(lambda: not keeper.alive)
        assert keeper.returncode == -signal.SIGKILL
        assert holders(place["directory"]) == {}


def test_stop_while_waiting_for_the_lease(place: dict[str, Any]) -> None:
    texts: list[str] = []
    with lease(place["directory"], ["0"], 1, on_wait=texts.append, session="first"):
        with Keeper.start(python("print('ran')"), **place) as keeper:

            def go_on() -> None:
                if texts:
                    raise StopWaitingError

            with pytest.raises(StopWaitingError):
                keeper.wait_leased(texts.append, go_on)
            assert keeper.stop() is None
        assert last_event(keeper) == {
            "event": "exit",
            "exit": None,
            "stopped": True,
            "error": None,
        }
        assert list(holders(place["directory"])) == ["0"]
    assert "waiting for 2 of GPUs 0, 1: GPU 0 is held by session first" in texts[0]
    assert tail(place["log"], 10) == ""


def test_a_lease_that_is_not_had_in_time_says_who_holds_it(place: dict[str, Any]) -> None:
    held = "gave up waiting for 2 of GPUs 0, 1: GPU 0 is held by session first"
    with (
        lease(place["directory"], ["0"], 1, on_wait=print, session="first"),
        Keeper.start(python("print('ran')"), **place, lease_timeout=0) as keeper,
        pytest.raises(CollectError, match=held),
    ):
        keeper.wait_leased()
    assert tail(place["log"], 10) == ""


def test_a_port_is_chosen_when_the_gpus_are_there(place: dict[str, Any]) -> None:
    code = "import sys; print(sys.argv[1:])"
    with lease(place["directory"], ["1"], 1, on_wait=print):
        keeper = Keeper.start([*python(code), "--port", PORT, "{other}"], **place)
        until(keeper.poll)
        assert [event["event"] for event in keeper.events] == ["waiting"]
    with keeper:
        keeper.wait_leased()
        until(lambda: not keeper.alive)
    assert 1024 <= keeper.port < 65536
    assert tail(place["log"], 1) == f"['--port', '{keeper.port}', '{{other}}']"


def test_the_lease_is_taken_when_it_comes_free(place: dict[str, Any]) -> None:
    with lease(place["directory"], ["1"], 1, on_wait=print):
        keeper = Keeper.start(python("pass"), **place)
        until(keeper.poll)
    with keeper:
        assert keeper.wait_leased() == ("0", "1")


@pytest.mark.parametrize(
    ("change", "command", "message"),
    [
        ({"count": 3}, ["true"], r"3 GPUs are asked for and there are 2 \(0, 1\)"),
        ({}, ["/no/such/server"], "/no/such/server: cannot be started"),
        ({"folder": Path("/no/such/folder")}, ["true"], "No such file or directory"),
        ({"directory": Path("/proc/self/leases")}, ["true"], "GPUs cannot be leased there"),
    ],
)
def test_what_cannot_be_started_says_why(
    place: dict[str, Any], change: dict[str, Any], command: list[str], message: str
) -> None:
    with Keeper.start(command, **place | change) as keeper:
        with pytest.raises(CollectError, match=message):
            keeper.wait_leased()
        until(lambda: not keeper.alive)
        assert keeper.returncode is None


def test_a_log_that_cannot_be_written_is_an_error(place: dict[str, Any]) -> None:
    with pytest.raises(CollectError, match="/proc/nothing/log: the server cannot be started"):
        Keeper.start(["true"], **place | {"log": Path("/proc/nothing/log")})


def test_a_keeper_that_dies_is_reported(place: dict[str, Any]) -> None:
    with (
        Keeper.start(["a\0b"], **place) as keeper,
        pytest.raises(CollectError, match="keeper died: (?s:.)*ValueError: embedded null byte"),
    ):
        keeper.wait_leased()


def test_pause_stops_every_process_and_resume_lets_them_go_on(place: dict[str, Any]) -> None:
    code = "import os\nos.fork()\nos.setsid() if os.fork() == 0 else None\n" + WRITER
    with Keeper.start(python(code), **place) as keeper:
        keeper.wait_leased()
        processes = psutil.Process(keeper.pid).children
        until(lambda: len(processes(recursive=True)) == 4 and place["log"].stat().st_size)
        keeper.pause()
        until(lambda: {p.status() for p in processes(recursive=True)} == {psutil.STATUS_STOPPED})
        assert keeper.alive
        size = place["log"].stat().st_size
        assert {p.status() for p in processes(recursive=True)} == {psutil.STATUS_STOPPED}
        assert place["log"].stat().st_size == size
        keeper.resume()
        until(lambda: place["log"].stat().st_size > size)
        keeper.pause()
        assert keeper.stop() == -signal.SIGTERM  # stopped processes are ended too


def test_a_keeper_that_does_not_answer_is_ended_after_its_server(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MARGIN", 0.2)
    with Keeper.start(python(FOREVER), **place) as keeper:
        processes = tree_of(place["log"])
        os.kill(keeper.pid, signal.SIGSTOP)
        assert keeper.stop(0) == -signal.SIGKILL
        assert not keeper.alive
        until_ended(processes)


def test_the_server_outlives_the_thread_that_started_it(place: dict[str, Any]) -> None:
    started: list[Keeper] = []
    thread = threading.Thread(target=lambda: started.append(Keeper.start(python(FOREVER), **place)))
    thread.start()
    thread.join()
    with started[0] as keeper:
        processes = tree_of(place["log"])
        assert keeper.alive
        assert not any(ended(process) for process in processes)


def test_other_children_do_not_hold_the_keepers_input(place: dict[str, Any]) -> None:
    with Keeper.start(python("import time; time.sleep(600)"), **place) as keeper:
        pipe = Path(f"/proc/{keeper.pid}/fd/0").readlink()
        listed = ["ls", "-l", "/proc/self/fd"]
        assert str(pipe) not in subprocess.check_output(listed, text=True)


def test_secrets_are_nowhere_but_in_the_servers_environment(place: dict[str, Any]) -> None:
    secret = "hf_" + "s" * 30
    place["environment"] = {"HF_TOKEN": secret, "LONG": "x" * 100_000}
    with Keeper.start(python(FOREVER), **place) as keeper:
        processes = tree_of(place["log"])
        assert all(process.environ()["HF_TOKEN"] == secret for process in processes)
        own = psutil.Process(keeper.pid)
        assert secret not in str(own.cmdline())
        assert secret not in str(own.environ())
        assert secret not in str(keeper.events)
    assert secret not in place["log"].read_text()


def test_free_ports_can_be_bound() -> None:
    assert 1024 <= free_port() < 65536


def test_a_log_is_followed_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower = LogFollower(path)
    assert follower.lines() == []
    with path.open("ab", buffering=0) as log:
        log.write(b"one\ntw")
        assert follower.lines() == ["one"]
        assert follower.lines() == []
        log.write(b"o\n\xff\n" + b"  0%\r 50%\r100%\n")
        assert follower.lines() == ["two", "\N{REPLACEMENT CHARACTER}", "100%"]
        log.write(b"y" * 1_000_000)
        assert [len(line) for line in follower.lines()] == [1 << 14]
        log.write(b"y" * 1_000_000 + b"\nz\n")
        assert follower.lines() == ["z"]


@given(
    lines=st.lists(
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["C", "Z"]))
    ),
    cuts=st.lists(st.integers(0, 10_000)),
)
@settings(max_examples=50)
def test_no_line_is_lost_or_told_twice(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("follow") / "log"
    data = "".join(f"{line}\n" for line in lines).encode()
    follower, heard = LogFollower(path), []
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    with path.open("ab", buffering=0) as log:
        for start, end in itertools.pairwise(places):
            log.write(data[start:end])
            heard += follower.lines()
    assert heard == lines


def test_tail_reads_only_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert tail(path, 3) == ""
    path.write_bytes(b"first\n" + b"x" * (2 << 20) + b"\nlast \xff\nend\n")
    assert tail(path, 2) == "last \N{REPLACEMENT CHARACTER}\nend"
    assert len(tail(path, 100)) < 1 << 20
    with pytest.raises(CollectError, match="cannot be read"):
        tail(tmp_path, 1)


# As SGLang 0.5.17 writes them.
DECODE = (
    "[2026-11-20 10:01:00] Decode batch, #running-req: 8, #token: 812, token usage: 0.01, "
    "cuda graph: False, gen throughput (token/s): 371.20, #queue-req: 0"
)
START = (
    "[2026-11-20 10:00:00] Load weight begin. avail mem=138.77 GB",
    "[2026-11-20 10:00:20] Load weight end. elapsed=20.11 s, type=LlamaForCausalLM, "
    "avail mem=123.60 GB, mem usage=15.17 GB.",
    "[2026-11-20 10:00:21] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 65536, "
    "K size: 4.00 GB, V size: 4.00 GB",
    "[2026-11-20 10:00:22] max_total_num_tokens=65536, chunked_prefill_size=8192, "
    "max_prefill_tokens=16384, max_running_requests=2048, context_len=8192, "
    "available_gpu_mem=110.02 GB",
    "[2026-11-20 10:00:40] The server is fired up and ready to roll!",
)
ERROR = "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_milestones_are_what_an_operator_wants() -> None:
    noise = ["[2026-11-20 10:00:00] INFO:     Started server process [1]", "", "  File 'x', line 1"]
    picked = Milestones().pick([*noise, *START, *noise, DECODE, DECODE, ERROR])
    assert picked == [*START, DECODE, ERROR]


def test_milestones_of_a_long_log_are_few() -> None:
    milestones = Milestones()
    picked = [
        line
        for _ in range(100)
        for line in milestones.pick([*START, *[DECODE] * 100, *[ERROR] * 100, "y" * 100_000])
    ]
    assert picked.count(DECODE) == 101
    assert picked.count(ERROR) == 30
    assert len(picked) < 160
    assert all(len(line) <= 300 for line in milestones.pick([f"{DECODE}{'y' * 10**6}"] * 100))
