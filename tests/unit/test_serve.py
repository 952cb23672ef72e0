"""Sessions from start to rows, on a stand-in for SGLang that calls FlashInfer's own functions.

All are played at the start, side by side; what every test proves is read from what they left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from pydantic import SecretStr

from tasks.collect import serve as module
from tasks.collect.dumps import CallLog
from tasks.collect.failures import Kind
from tasks.collect.lease import lease
from tasks.collect.live import served_calls, session_table
from tasks.collect.place import Outcome, Place, outcomes
from tasks.collect.plan import Wish, plan_sessions
from tasks.collect.rows import find, form_of
from tasks.collect.serve import Host, SessionError, serve_session
from tasks.collect.session import Lengths, Session, Traffic
from tasks.collect.traffic import Limits, sampling_params, waves
from tasks.discover.sglang_index import index_sglang
from tasks.errors import CollectError, InputError
from tasks.model import Serving, read_config
from tasks.ops import registry
from tasks.ops.base import FlashInferApi, KernelSpec
from tasks.settings import CollectSettings
from tests.unit.test_collect import definition_of
from tests.unit.test_lease import holders

pytestmark = pytest.mark.bench_extra

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "fakes"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
PAGED_PLAN = "BatchPrefillWithPagedKVCacheWrapper.plan"
DECODE_PLAN = "BatchDecodeWithPagedKVCacheWrapper.plan"
HEADS = "h4_kv2_d16"
DECODE, PAGED = f"gqa_paged_decode_{HEADS}_ps", f"gqa_paged_prefill_causal_{HEADS}_ps"
RAGGED = f"gqa_ragged_prefill_causal_{HEADS}"
NORMS = ("rmsnorm_h128", "fused_add_rmsnorm_h128")
SAMPLING = "top_k_top_p_sampling_from_probs_v512"
NOT_SAMPLED = ("top_k_sampling_from_probs_v512", "top_p_sampling_from_probs_v512")
SMALL_DISK = 0.01
"""GB; less than settings may say."""
GRACE = 0.5
"""Seconds that a server has to end: orphans are deaf."""
SECRET, OTHERS_SECRET = "hf_of_this_run", "hf_of_the_environment"
WORKER = """
import sys
from pathlib import Path
from tasks.collect import serve as module
from tasks.collect.session import Session
from tests.unit.test_serve import GRACE, serve
module._GRACE = GRACE
serve(Path(sys.argv[1]), Session.model_validate_json(sys.argv[2]))
"""


def serve(
    folder: Path,
    session: Session,
    say: Any = lambda _: None,
    stopping: threading.Event | None = None,
    **limits: Any,
) -> Outcome:
    """Serve a session in a folder of its own, on a GPU of its own."""
    options = CollectSettings(
        incomplete_calls=True,  # no kernel runs here
        gpus=["0"],
        lease_dir=folder / "leases",
        start_seconds=120,
        stall_seconds=120,
    ).model_copy(update=limits)
    model = read_config(Path(session.model) / "config.json")
    host = Host(options, SecretStr(SECRET), stopping=stopping or threading.Event())
    return serve_session(session, model, folder / "sessions", host, say)


@dataclass
class Stage:
    """A session, where it is served, and what came of it."""

    folder: Path
    session: Session
    said: list[str] = field(default_factory=list)
    seen: list[psutil.Process] = field(default_factory=list)
    """Processes, as they were when the session's traffic began."""
    shown: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Their command lines and environments."""
    errors: list[SessionError] = field(default_factory=list)
    served: list[Outcome] = field(default_factory=list)

    def serve(self, **limits: Any) -> None:
        """Serve it once."""
        try:
            self.served.append(serve(self.folder, self.session, self.hear, **limits))
        except SessionError as error:
            self.errors.append(error)

    def hear(self, line: str) -> None:
        """Take a line for the operator; look at the processes when the server is ready."""
        self.said.append(line)
        if "ready, traffic begins" not in line:
            return
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # those of other sessions come and go
                environment = process.environ()
                self.shown.append((" ".join(process.cmdline()), environment))
                if environment.get("FAKE_SGLANG_STEPS") == str(self.noted):
                    self.seen.append(process)

    @property
    def place(self) -> Place:
        return Place.of(self.folder / "sessions", self.session)

    @property
    def noted(self) -> Path:
        return self.folder / "steps.jsonl"

    @property
    def log(self) -> CallLog:
        return self.place.calls()

    def server_log(self, number: int = 1) -> str:
        return (self.place.logs(number) / "server.log").read_text()

    def steps(self, phase: str) -> list[dict[str, Any]]:
        """What was called: the steps of a phase, of all launches."""
        found = [json.loads(line) for line in self.noted.read_text().splitlines()]
        return [step for step in found if step["phase"] == phase]

    def prompts(self) -> list[list[int]]:
        """Prompts that arrived, in their order."""
        lines = (self.folder / "served.jsonl").read_text().splitlines()
        return [json.loads(line)["input_ids"] for line in lines]

    def planned(self) -> list[list[list[int]]]:
        """The prompts of every wave."""
        limits = Limits(vocab_size=512, context_length=4096)
        return [
            [r.input_ids for r in wave.requests] for wave in waves(self.session.traffic, limits)
        ]

    def rows(self, name: str) -> tuple[int, dict[frozenset[Any], int]]:
        """A definition's calls, and its distinct rows as names with values, with how often each."""
        spec = SPECS[name]
        found = find(spec, form_of(definition_of(spec), name), self.log)
        rows = {}
        for candidate in found.candidates:
            tensors = candidate.remake().tensors
            stored = {key: tuple(values.tolist()) for key, values in tensors.items()}
            rows[frozenset((stored or candidate.axes).items())] = candidate.count
        return found.calls, rows


def specs() -> dict[str, KernelSpec]:
    """The model's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(CONFIG))
        model = read_config(path)
    serving = Serving(tp=1, ep=1, origin="test")
    found = (item for op in registry().values() for item in op.required(model, serving))
    return {item.name: item for item in found if isinstance(item, KernelSpec)}


SPECS = specs()
FLAGS = index_sglang(FAKES).flags
SPECS_RECORDED = {
    name: provider.recorded
    for name, spec in SPECS.items()
    if isinstance(provider := registry()[spec.op_type].provider(spec), FlashInferApi)
}


def offsets(lengths: Sequence[int]) -> tuple[int, ...]:
    return (0, *accumulate(lengths))


def tables(step: dict[str, Any], size: int) -> dict[str, tuple[int, ...]]:
    """The page tables of a step."""
    pages = [slots[::size] for slots in step["slots"]]
    last = [(length - 1) % size + 1 for length in step["lengths"]]
    found = {
        "kv_indptr": offsets([len(each) for each in pages]),
        "kv_indices": tuple(slot // size for each in pages for slot in each),
    }
    return found if size == 1 else {**found, "kv_last_page_len": tuple(last)}


def new(step: dict[str, Any]) -> list[int]:
    """How many tokens of each request a step computed."""
    if step["phase"] == "decode":
        return [1] * len(step["lengths"])
    return [n - c for n, c in zip(step["lengths"], step["cached"], strict=True)]


def decoded(step: dict[str, Any], size: int) -> frozenset[Any]:
    return frozenset(tables(step, size).items())


def prefilled(step: dict[str, Any], size: int) -> frozenset[Any]:
    return frozenset({"qo_indptr": offsets(new(step)), **tables(step, size)}.items())


# What is played


def stage(
    root: Path, name: str, *names: str, fault: str = "", once: bool = False, **traffic: Any
) -> Stage:
    """Plan the session of some definitions, and make its folder."""
    folder = root / name
    folder.mkdir()
    fields = {"lengths": (Lengths(isl=96, osl=12),), "batch_sizes": (1, 3), "rounds": 1}
    wish = Wish(
        model=str(root),
        traffic=Traffic(**fields | traffic),
        env={
            "FAKE_SGLANG_FAULT": fault,
            "FAKE_SGLANG_SERVED": str(folder / "served.jsonl"),
            "FAKE_SGLANG_STEPS": str(folder / "steps.jsonl"),
            **({"FAKE_SGLANG_ONCE": str(folder / "once")} if once else {}),
        },
    )
    model = read_config(root / "config.json")
    plan = plan_sessions([SPECS[n] for n in names], model, wish, FLAGS)
    (session,) = plan.sessions
    return Stage(folder, session)


def until(fact: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (value := fact()):
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.02)
    return value


def play_ragged(root: Path) -> Stage:
    """A session that ends well, whose server plans the paged wrapper too and never runs it.

    Half of its waves are longer than the model's context.
    """
    lengths = (Lengths(isl=96, osl=12), Lengths(isl=4096, osl=12))
    played = stage(root, "ragged", RAGGED, fault="warm_up", lengths=lengths)
    record = (*played.session.record, PAGED_PLAN)
    played.session = played.session.model_copy(update={"record": record})
    played.serve()
    return played


def play_calls(root: Path) -> Stage:
    """Whole calls, which are large, on a small disk, of an engine that wants too much memory."""
    played = stage(
        root,
        "calls",
        *NORMS,
        SAMPLING,
        *NOT_SAMPLED,
        fault="oom_until_tokens=40000",
        lengths=(Lengths(isl=1024, osl=6),),
        batch_sizes=(1, 8),
        random_range_ratio=0.9,
    )
    for _ in range(4):
        played.serve(disk_gb=SMALL_DISK)
    return played


def play_crash(root: Path) -> Stage:
    """A server that dies in its second wave, and is started again; then asked for once more."""
    names = (f"{PAGED}1", f"{DECODE}1")
    played = stage(root, "crash", *names, fault="warm_up,crash_after=2", once=True)
    for _ in range(3):
        played.serve()
    return played


@dataclass
class Killed:
    """What a worker that was killed left."""

    stage: Stage
    stored: int
    left: int
    survivors: list[psutil.Process]
    holders: dict[str, Any]
    tree: int


def play_kill(root: Path) -> Killed:
    """A worker that stops draining, and is killed, while its server goes on."""
    names = (f"{PAGED}64", f"{DECODE}64")
    lengths = (Lengths(isl=96, osl=300),)
    played = stage(
        root,
        "kill",
        *names,
        fault="orphan",
        lengths=lengths,
        batch_sizes=(3,),
        random_range_ratio=1,
    )
    command = [sys.executable, "-c", WORKER, str(played.folder), played.session.model_dump_json()]
    worker = subprocess.Popen(command, cwd=ROOT)

    def steps() -> int:
        return len(played.noted.read_text().splitlines()) if played.noted.exists() else 0

    try:
        until(lambda: steps() > 20)
        worker.send_signal(signal.SIGSTOP)
        stopped = steps()
        until(lambda: steps() > stopped + 20)
        tree = psutil.Process(worker.pid).children(recursive=True)
    finally:
        worker.kill()
        worker.wait()
    until(lambda: not any(alive(process) for process in tree))
    (attempt,) = played.place.attempts()
    killed = Killed(
        stage=played,
        stored=len(played.log.calls),
        left=len([path for path in attempt.dumps.iterdir() if path.is_dir()]),
        survivors=[process for process in tree if alive(process)],
        holders=holders(played.folder / "leases"),
        tree=len(tree),
    )
    played.serve()
    return killed


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def play_requests(root: Path) -> Stage:
    """A server half of whose requests fail."""
    played = stage(root, "requests", RAGGED, fault="fail_requests=0.5,orphan")
    played.serve()
    return played


def play_triton(root: Path) -> Stage:
    """A server that takes no kernel of FlashInfer's."""
    played = stage(root, "triton", RAGGED, fault="no_flashinfer", batch_sizes=(1,))
    played.serve()
    return played


def play_pattern(root: Path) -> Stage:
    """A session that records another call than it expects."""
    played = stage(root, "pattern", RAGGED, batch_sizes=(1,))
    record = (f"flashinfer.prefill.{played.session.record[0]}", "rmsnorm")
    played.session = played.session.model_copy(update={"record": record})
    played.serve()
    return played


def play_hosts(root: Path) -> list[Stage]:
    """The second of two hosts: its server shows calls, then ends with the first's; or by itself."""
    ended, full = stage(root, "ended", RAGGED), stage(root, "full", RAGGED, fault="no_room")
    for played in (ended, full):
        hosts = ("--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "127.0.0.1:9")
        played.session = played.session.model_copy(
            update={
                "nodes": 2,
                "node_rank": 1,
                "tp": 2,
                "flags": (*played.session.flags, *hosts),
            }
        )

    def first_host(line: str) -> None:
        """Do as the first host's server does: share a batch with this one, then end."""
        ended.hear(line)
        if "ready, traffic begins" in line:
            command, _ = next(each for each in ended.shown if "--node-rank 1" in each[0])
            words = command.split()
            url = f"http://127.0.0.1:{words[words.index('--port') + 1]}/generate"
            asked = sampling_params(ended.session.traffic, 2)
            body = {"input_ids": [11, 12, 13], "sampling_params": asked}
            httpx.post(url, json=body, trust_env=False, timeout=60)
            for process in ended.seen:
                process.kill()

    ended.served.append(serve(ended.folder, ended.session, first_host))
    full.serve()
    return [ended, full]


def play_keeper(root: Path) -> Stage:
    """A session whose keeper is killed when the traffic begins."""
    played = stage(root, "keeper", RAGGED, batch_sizes=(1,))

    def kill(line: str) -> None:
        played.hear(line)
        if "ready, traffic begins" in line:
            keeper_of(played).kill()

    with suppress(SessionError):
        serve(played.folder, played.session, kill)
    until(lambda: not any(alive(process) for process in played.seen))
    return played


def keeper_of(played: Stage) -> psutil.Process:
    """The keeper of the first launch."""
    note = json.loads((played.place.logs(1) / "keeper.json").read_text())
    return psutil.Process(note["pid"])


def play_starts(root: Path) -> list[Stage]:
    """Servers that never come up."""
    flag = stage(root, "flag", RAGGED, fault="bad_flag")
    flag.serve()
    hanging = stage(root, "hanging", RAGGED, fault="hang_start")
    hanging.serve(start_seconds=3)
    return [flag, hanging]


PLAYS: tuple[Callable[[Path], Any], ...] = (
    play_kill,
    play_calls,
    play_crash,
    play_ragged,
    play_starts,
    play_requests,
    play_triton,
    play_pattern,
    play_hosts,
    play_keeper,
)


@pytest.fixture(scope="module")
def plays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    root = tmp_path_factory.mktemp("served")
    (root / "config.json").write_text(json.dumps(CONFIG))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setenv("PYTHONPATH", str(FAKES))
        patch.setenv("HF_TOKEN", OTHERS_SECRET)
        patch.setattr(module, "_GRACE", GRACE)
        yield {play.__name__.removeprefix("play_"): pool.submit(play, root) for play in PLAYS}
    for attempts in root.glob("*/sessions/*/attempts.json"):
        for attempt in Place(attempts.parent).attempts():
            shutil.rmtree(attempt.dumps, ignore_errors=True)


# What it comes to


def check_nothing_left(played: Stage) -> None:
    """No dumps, no process, no lease; the log is whole."""
    attempts = played.place.attempts()
    assert attempts
    assert not [attempt.dumps for attempt in attempts if attempt.dumps.exists()]
    assert holders(played.folder / "leases") == {}
    assert not any(alive(process) for process in played.seen)
    for number in range(1, len(attempts) + 1):
        for line in played.server_log(number).splitlines():
            if "orphan: pid" in line:
                assert not psutil.pid_exists(int(line.split()[-1]))


def check_complete(played: Stage, launches: int) -> Outcome:
    check_nothing_left(played)
    outcome = played.served[-1]
    assert outcome.launches == launches
    assert outcome.session.definitions == played.session.definitions
    assert outcome.gpus == ("0",)
    assert (outcome.unreadable, outcome.notices, outcome.thinned) == ({}, {}, 0)
    assert set(outcome.versions) >= {"flashinfer", "torch"}
    assert [found for _, found in outcomes(played.place.root.parent)] == [outcome]
    return outcome


def test_a_session_of_ragged_prefills(plays: dict[str, Future[Any]]) -> None:
    played: Stage = plays["ragged"].result()
    assert played.errors == []
    outcome = check_complete(played, 1)
    first, second, *rest = played.planned()
    assert rest == [[], []]
    assert played.prompts()[:1] == first
    assert sorted(played.prompts()[1:]) == sorted(second)
    assert (outcome.served.requests, outcome.served.failed, outcome.served.waves_done) == (4, 0, 4)
    ((reason, count),) = outcome.not_sent.items()
    assert count == 2
    assert reason.startswith("requests of 4096 + 12 tokens are longer than the server takes (4096")
    assert f"{played.session.id}: 2 waves will not be sent: {reason}" in played.said
    (row,) = session_table([outcome])
    assert (row["requests"], row["waves not sent"]) == ("4 (0 failed)", "2")

    # Nothing else counted: not what the server called before it was ready.
    steps = played.steps("prefill")
    (ragged_plan,) = SPECS_RECORDED[RAGGED]
    assert outcome.fired == {ragged_plan: len(steps), PAGED_PLAN: len(steps)}
    calls, rows = played.rows(RAGGED)
    assert calls == len(steps)
    expected = [offsets(step["lengths"]) for step in steps]
    assert set(rows) == {frozenset({"qo_indptr": n, "kv_indptr": n}.items()) for n in expected}
    assert sum(sum(new(step)) for step in steps) == sum(len(p) for p in played.prompts())
    # The paged wrapper was planned each time; it was not run.
    assert played.rows(f"{PAGED}1") == (0, {})


def test_whole_calls_of_an_engine_on_a_small_disk(plays: dict[str, Future[Any]]) -> None:
    played: Stage = plays["calls"].result()
    # Out of memory: a smaller pool each time, as long as that may help.
    assert [(e.failure.kind, e.again) for e in played.errors] == [(Kind.OUT_OF_MEMORY, True)] * 3
    pools = [attempt.adjustment.max_total_tokens for attempt in played.place.attempts()]
    assert pools == [None, 131_072, 65_536, 32_768]
    assert played.served[0].session.flags[-2:] == ("--max-total-tokens", "32768")
    assert "CUDA out of memory. Tried to allocate 20.00 GiB" in str(played.errors[0])
    outcome = check_complete(played, 4)
    first, second = played.planned()
    assert played.prompts()[:1] == first
    assert sorted(played.prompts()[1:]) == sorted(second)

    prefills, decodes = played.steps("prefill"), played.steps("decode")
    tokens = [sum(new(step)) for step in prefills + decodes]
    batches = [len(step["lengths"]) for step in prefills + decodes]
    for name, times in zip(NORMS, (1, 4), strict=True):  # two of each of two layers
        calls, rows = played.rows(name)
        assert calls == times * len(tokens)
        assert rows == {frozenset({("batch_size", n)}): times * tokens.count(n) for n in tokens}
    calls, rows = played.rows(SAMPLING)
    assert calls == len(batches)
    top_p = float(np.float32(played.session.traffic.top_p))
    assert rows == {
        frozenset({("top_k", (50,) * n), ("top_p", (top_p,) * n)}): batches.count(n)
        for n in batches
    }
    assert set(outcome.missing) == set(NOT_SAMPLED)

    # More was dumped than may lie there: the server had to wait, and nothing was lost.
    row = 2 * CONFIG["hidden_size"]
    assert sum(tokens) * row * (1 + 4 * 2) > SMALL_DISK * 1e9  # one input, and four times two
    assert outcome.pauses > 0
    assert outcome.peak_mb > 0


def test_a_crash_costs_the_wave_it_was_in(plays: dict[str, Future[Any]]) -> None:
    played: Stage = plays["crash"].result()
    (error,) = played.errors
    assert (error.failure.kind, error.again) == (Kind.KILLED, True)
    assert "server.log" in str(error)
    outcome = check_complete(played, 2)
    # The third time there was nothing to do.
    assert played.served == [outcome, outcome]
    assert len(played.place.attempts()) == 2
    assert played.said[-1].endswith(f"complete already, {sum(outcome.fired.values())} calls")

    first, second = played.planned()
    arrived = played.prompts()
    assert arrived[:1] == first
    assert sorted(arrived[-3:]) == sorted(second)
    assert arrived[1:-3]
    assert all(prompt in second for prompt in arrived[1:-3])
    # The wave that was sent twice counts once.
    assert (outcome.served.requests, outcome.served.waves_done) == (len(first) + len(second), 2)
    assert (outcome.served.failed, outcome.served.errors) == (0, {})

    # What the first launch called is there, once, and so is what the second did.
    prefills, decodes = played.steps("prefill"), played.steps("decode")
    assert outcome.fired == {PAGED_PLAN: len(prefills), DECODE_PLAN: len(decodes)}
    assert played.rows(f"{PAGED}1")[0] == len(prefills)
    assert set(played.rows(f"{PAGED}1")[1]) == {prefilled(step, 1) for step in prefills}
    assert played.rows(f"{DECODE}1")[0] == len(decodes)
    assert set(played.rows(f"{DECODE}1")[1]) == {decoded(step, 1) for step in decodes}
    processes = {call.process for call in played.log.calls}
    assert len(processes) == 2
    assert len({call.id for call in played.log.calls}) == len(played.log.calls)
    assert not played.log.unreadable
    # Prefixes were shared.
    assert any(any(step["cached"]) for step in prefills)


def test_a_killed_workers_server_is_gone_and_its_calls_are_not(
    plays: dict[str, Future[Any]],
) -> None:
    killed: Killed = plays["kill"].result()
    assert killed.tree >= 4  # keeper, server, scheduler, orphan
    assert killed.survivors == []
    assert killed.holders == {}
    assert killed.left >= 20
    played = killed.stage
    assert played.errors == []
    check_nothing_left(played)
    (outcome,) = played.served
    assert outcome.launches == 2
    assert outcome.served.failed == 0
    (wave,) = played.planned()
    assert sorted(played.prompts()) == sorted(wave * 2)

    steps = played.steps("prefill"), played.steps("decode")
    for name, shown, expected in (
        (f"{PAGED}64", prefilled, steps[0]),
        (f"{DECODE}64", decoded, steps[1]),
    ):
        calls, rows = played.rows(name)
        # A step may have been planned, and killed before it was noted.
        assert 0 <= calls - len(expected) <= 1
        assert len(set(rows) - {shown(step, 64) for step in expected}) <= 1
        assert set(rows) >= {shown(step, 64) for step in expected}
    first = f"{played.place.root.name}/1/"
    kept = [call for call in played.log.calls if call.id.startswith(first)]
    assert len(kept) >= killed.stored + 20  # all that followed when the worker drained no more
    assert sum(outcome.unreadable.values()) <= 1  # the call that it was in


def test_requests_that_fail_fail_the_session(plays: dict[str, Future[Any]]) -> None:
    played: Stage = plays["requests"].result()
    check_nothing_left(played)
    (error,) = played.errors
    assert "wave 2 (batch size 3): 1 of 3 requests failed, at most 2% may" in str(error)
    assert "HTTP 500: The request failed" in str(error)
    assert (error.failure.kind, error.again) == (Kind.UNKNOWN, True)
    served = json.loads(played.place.served.read_text())
    assert served["failed"] >= 1
    assert served["errors"]["HTTP 500: The request failed"] >= 1
    assert served["waves_done"] == 1
    assert played.place.outcome() is None
    assert played.log.calls  # what was served is kept


def test_a_server_without_flashinfer_fails_at_the_gate(plays: dict[str, Future[Any]]) -> None:
    played: Stage = plays["triton"].result()
    check_nothing_left(played)
    (error,) = played.errors
    assert (error.failure.kind, error.again) == (Kind.WRONG_KERNELS, False)
    assert "attention backend for prefill: triton, asked for flashinfer" in str(error)
    assert "give --prefill-attention-backend flashinfer" in str(error)
    assert played.place.outcome() is None
    assert played.log.calls == []


def test_a_pattern_that_matches_nothing_is_named(plays: dict[str, Future[Any]]) -> None:
    played: Stage = plays["pattern"].result()
    check_nothing_left(played)
    (error,) = played.errors
    assert (error.failure.kind, error.again) == (Kind.WRONG_KERNELS, False)
    (wanted,) = SPECS_RECORDED[RAGGED]
    norms = len(played.steps("prefill") + played.steps("decode"))
    assert f"none of the expected calls was made; these were: rmsnorm ({norms})" in str(error)
    assert f"record {wanted} (instead of flashinfer.prefill.{wanted}?)" in str(error)


def test_a_host_that_follows_the_first(plays: dict[str, Future[Any]]) -> None:
    ended, full = plays["hosts"].result()
    # One GPU of two is leased here, no traffic is sent from here, and what was shown is kept.
    outcome = check_complete(ended, 1)
    assert (outcome.session.tp, outcome.served.requests) == (2, 0)
    assert "host 2 of 2: how the traffic went is known on the first" in outcome.notes
    hosts = "--nnodes 2 --node-rank 1 --dist-init-addr 127.0.0.1:9"
    command = next(each for each, _ in ended.shown if "launch_server" in each and hosts in each)
    assert "--tp-size 2" in command
    assert re.search(rf"{re.escape(hosts)} --host 127\.0\.0\.1 --port \d+$", command)
    assert ended.prompts() == [[11, 12, 13]]
    assert outcome.fired == {SPECS_RECORDED[RAGGED][0]: 1}

    # Nothing is adjusted on one host alone.
    check_nothing_left(full)
    (error,) = full.errors
    assert (error.failure.kind, error.again) == (Kind.NO_ROOM_FOR_KV, False)
    assert "one of 2 hosts: start it again on all" in str(error)


def test_servers_that_do_not_start(plays: dict[str, Future[Any]]) -> None:
    flag, hanging = plays["starts"].result()
    check_nothing_left(flag)
    (error,) = flag.errors
    assert (error.failure.kind, error.again) == (Kind.BAD_FLAG, False)
    assert "unrecognized arguments: --disable-piecewise-cuda-graph" in str(error)
    check_nothing_left(hanging)
    (error,) = hanging.errors
    assert (error.failure.kind, error.again) == (Kind.TIMEOUT, True)
    assert "not ready after 3 s" in str(error)
    assert not (hanging.place.logs(1) / "go").exists()
    assert not (hanging.folder / "served.jsonl").exists()


def test_the_token_is_in_the_servers_environment_alone(plays: dict[str, Future[Any]]) -> None:
    stages: list[Stage] = [
        *(plays[name].result() for name in ("ragged", "calls", "crash")),
        plays["kill"].result().stage,
    ]
    for played in stages:
        assert played.seen  # the server and its scheduler
        assert not [command for command, _ in played.shown if "hf_of" in command]
        serving = [e for c, e in played.shown if "-m sglang" in c or "collect.engine" in c]
        assert len(serving) >= 2
        assert {e.get("HF_TOKEN") for e in serving} == {SECRET}
        keepers = [e for c, e in played.shown if "collect.keeper" in c]
        assert keepers
        assert not [e for e in keepers if "HF_TOKEN" in e]
        files = [path for path in played.folder.rglob("*") if path.is_file()]
        assert {"attempts.json", "server.log", "calls.sqlite"} <= {path.name for path in files}
        assert not [path for path in files if b"hf_of" in path.read_bytes()]
        assert not [line for line in played.said if "hf_of" in line]
    assert list(plays["calls"].result().folder.rglob("order.json"))


def test_traffic_that_cannot_be_made_costs_no_launch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "chats.json"
    played = stage(tmp_path, "none", RAGGED, kind="sharegpt", dataset=file)
    with pytest.raises(InputError, match=r"chats\.json"):
        serve(played.folder, played.session)
    assert played.place.attempts() == []


def failed(played: Stage, expected: Kind, **limits: Any) -> str:
    """Serve a session that fails before there is a server; return what is said of its kernel."""
    with pytest.raises(CollectError) as caught:
        serve(played.folder, played.session, played.hear, **limits)
    (attempt,) = played.place.attempts()
    assert attempt.failure is not None
    assert attempt.failure.kind is expected
    assert attempt.failure.reason in str(caught.value)
    retried = isinstance(caught.value, SessionError) and caught.value.again
    assert retried == attempt.failure.retryable
    assert not attempt.dumps.exists()
    return told_of(played)


def told_of(played: Stage) -> str:
    """What is said of the kernel of a session that is not complete."""
    with pytest.raises(CollectError) as caught:
        served_calls(played.folder / "sessions", RAGGED)
    return str(caught.value)


@pytest.fixture
def waiting(tmp_path: Path) -> Stage:
    """A session that is to be served."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return stage(tmp_path, "none", RAGGED)


def test_without_a_gpu_nothing_starts(waiting: Stage) -> None:
    told = failed(waiting, Kind.NO_DEVICE, gpus=[])
    assert "failed: no such GPU: 1 GPUs are asked for and there are 0" in told


@contextmanager
def held(played: Stage) -> Iterator[None]:
    """Hold the GPU while the block runs."""
    with lease(played.folder / "leases", ["0"], 1, on_wait=print, session="another"):
        yield


def test_gpus_that_are_not_free_in_time_are_a_failure(waiting: Stage) -> None:
    with held(waiting):
        told = failed(waiting, Kind.NOT_FREE, lease_seconds=0.1)
    assert "failed: no GPU was free in time: gave up waiting for 1 of GPUs 0: GPU 0 is held" in told
    assert "session another" in told


def test_a_keeper_that_is_killed_while_it_waits_is_a_failure(waiting: Stage) -> None:
    with held(waiting), pytest.raises(SessionError) as caught:
        serve(waiting.folder, waiting.session, lambda _: keeper_of(waiting).kill())
    assert (caught.value.failure.kind, caught.value.again) == (Kind.KILLED, True)
    assert "failed: killed by a signal: the server's keeper died" in told_of(waiting)


def test_a_keeper_that_is_killed_while_it_serves_is_a_failure(
    plays: dict[str, Future[Any]],
) -> None:
    played: Stage = plays["keeper"].result()
    assert played.seen
    (attempt,) = played.place.attempts()
    assert attempt.failure is not None
    assert (attempt.failure.kind, attempt.failure.retryable) == (Kind.KILLED, True)
    assert "failed: killed by a signal: ended by SIGKILL" in told_of(played)


def test_a_launch_that_is_interrupted_has_not_failed(waiting: Stage) -> None:
    stopping = threading.Event()
    with held(waiting), pytest.raises(CollectError, match="stopped before") as caught:
        serve(waiting.folder, waiting.session, lambda _: stopping.set(), stopping)
    assert not isinstance(caught.value, SessionError)
    assert [attempt.failure for attempt in waiting.place.attempts()] == [None]
    assert "is not complete; onboard collect goes on with it" in told_of(waiting)


def test_other_reasons_are_recorded_too(waiting: Stage) -> None:
    """The lease's folder cannot be made; nothing of it is the server's."""
    (waiting.folder / "file").touch()
    told = failed(waiting, Kind.UNKNOWN, lease_dir=waiting.folder / "file" / "leases")
    assert "file/leases: GPUs cannot be leased there" in told


@pytest.mark.parametrize(
    ("answer", "fails"),
    [
        ("echo 9.0; echo 9.0", True),
        ("echo 9.0; echo 10.3", False),
        ("echo 10.0", False),
        ("echo '[N/A]'", False),
        ("echo broken; exit 9", False),
    ],
)
def test_kernels_of_newer_gpus_cost_no_start(
    waiting: Stage, monkeypatch: pytest.MonkeyPatch, answer: str, fails: bool
) -> None:
    tool = waiting.folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(waiting.folder), prepend=os.pathsep)
    waiting.session = waiting.session.model_copy(update={"gpu": "SM100"})
    told = failed(waiting, Kind.UNSUPPORTED if fails else Kind.NO_DEVICE, gpus=[])
    expected = (
        "not supported: its kernels run on SM100 (compute capability 10.x) only, and this host's "
        "GPUs are of 9.0"
    )
    assert (expected in told) == fails
