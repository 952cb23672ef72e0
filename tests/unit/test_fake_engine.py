"""The stand-in for SGLang shows what SGLang shows: its log, and dumps by FlashInfer itself."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tasks.collect.gate import check_session
from tasks.collect.keeper import free_port
from tasks.collect.session import Lengths, Served, Session, Traffic
from tasks.collect.traffic import HttpClient, Limits, drive, sampling_params, waves
from tasks.discover.sglang_index import index_sglang

FAKES = Path(__file__).parents[1] / "fakes"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
RAGGED = "BatchPrefillWithRaggedKVCacheWrapper"
PAGED = "BatchPrefillWithPagedKVCacheWrapper"
DECODE = "BatchDecodeWithPagedKVCacheWrapper"
RECORD = (
    f"{RAGGED}.plan",
    f"{RAGGED}.run",
    f"{PAGED}.plan",
    f"{DECODE}.plan",
    "rmsnorm",
    "fused_add_rmsnorm",
    "top_k_top_p_sampling_from_probs",
)
FLAGS = ("--attention-backend", "flashinfer", "--disable-cuda-graph", "--page-size", "64")
TRAFFIC = Traffic(
    lengths=(Lengths(isl=200, osl=3),),
    batch_sizes=(2, 4),
    rounds=1,
    random_range_ratio=0.9,
    shared_prefix=0.7,
)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(FAKES), **more}


def launch(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang.launch_server", "--model-path", "m", *arguments],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def serving(folder: Path, port: int) -> Iterator[None]:
    """A server in a session of its own, whose output is in `server.log`."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    record = {
        "FLASHINFER_LOGLEVEL": "10",
        "FLASHINFER_LOGDEST": str(folder / "flashinfer_%i.log"),
        "FLASHINFER_DUMP_DIR": str(folder / "dumps"),
        "FLASHINFER_DUMP_INCLUDE": ",".join(RECORD),
        "FLASHINFER_DUMP_SAFETENSORS": "1",
        "FAKE_SGLANG_SERVED": str(folder / "served.jsonl"),
    }
    place = ("--model-path", str(folder), "--port", str(port), "--max-total-tokens", "4096")
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *place, *FLAGS],
            env=environment(**record),
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + 120
            while "ready to roll" not in (folder / "server.log").read_text():
                assert server.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield
        finally:
            server.terminate()
            server.wait(30)


async def send(port: int) -> Served:
    async with HttpClient(port, TRAFFIC) as client:
        return await drive(
            waves(TRAFFIC, Limits(vocab_size=512, context_length=4096)),
            client.generate,
            traffic=TRAFFIC,
            on_progress=lambda _: None,
        )


def dumped(folder: Path, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the records and tensors of the calls of a name, in order."""
    found = []
    for call in sorted((folder / "dumps").glob(f"*_{name}_call*")):
        record = json.loads((call / "metadata.jsonl").read_text().splitlines()[-1])
        found.append((record, load_file(call / "inputs.safetensors")))
    return found


@pytest.mark.bench_extra
def test_a_server_dumps_what_it_was_sent(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, port):
        served = [asyncio.run(send(port)) for _ in range(2)]  # the second time all is cached
    planned = list(waves(TRAFFIC, Limits(vocab_size=512, context_length=4096)))
    requests = [request for wave in planned for request in wave.requests]
    for once in served:
        assert (once.requests, once.failed, once.waves_done) == (6, 0, 2)
        assert once.output_tokens == sum(request.max_new_tokens for request in requests)
    requests *= 2

    # What arrived is what was sent.
    lines = (tmp_path / "served.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted(
        json.dumps(
            {
                "input_ids": request.input_ids,
                "sampling_params": sampling_params(TRAFFIC, request.max_new_tokens),
            }
        )
        for request in requests
    )

    # Every name is there, from one process, which is not the one that was launched.
    records = [
        json.loads(line) for line in (tmp_path / "dumps" / "session.jsonl").read_text().splitlines()
    ]
    fired = Counter(record["function_name"] for record in records)
    assert set(fired) == set(RECORD)
    assert len({record["process_id"] for record in records}) == 1
    assert {record["execution_status"] for record in records} == {"inputs_saved"}

    # All new tokens were prefilled, in pages of 64 where they are cached: contiguous and aligned.
    new = [int(t["arg_1"][-1]) for _, t in dumped(tmp_path, f"{RAGGED}.plan")]
    cached = 0
    for record, tensors in dumped(tmp_path, f"{PAGED}.plan"):
        assert record["input_metadata"]["arg_8"] == 1
        end = int(tensors["arg_2"][-1])
        assert len(tensors["arg_3"]) == end + 256
        assert end % 64 == 0
        cached += end
    assert sum(new) + cached == sum(len(request.tokens) for request in requests)
    assert cached > 0
    for record, tensors in dumped(tmp_path, f"{DECODE}.plan"):
        assert [record["input_metadata"][f"arg_{n}"] for n in (4, 5, 6, 7)] == [4, 2, 16, 1]
        indptr, indices = tensors["arg_1"], tensors["arg_2"]
        assert len(indices) == indptr[-1]
        for start, end in pairwise(indptr):
            slots = indices[start:end]
            pages = slots[::64] // 64
            assert (slots[::64] % 64 == 0).all()
            assert (slots // 64 == pages.repeat(64)[: len(slots)]).all()

    # And the gate believes its log.
    session = Session(
        id="s",
        model=str(tmp_path),
        tp=1,
        ep=1,
        page_size=64,
        mode="ragged_prefill",
        flags=FLAGS,
        env={},
        record=RECORD,
        expects={name: (name,) for name in RECORD},
        traffic=TRAFFIC,
        tp_choices=(1,),
    )
    versions = {name: [records[0]["versions"][name]] for name in ("flashinfer", "torch")}
    report = check_session(session, fired, {}, tmp_path / "server.log", versions)
    assert (report.failure, report.missing) == (None, {})


@pytest.mark.parametrize(
    ("fault", "arguments", "status", "said"),
    [
        ("bad_flag", (), 2, "sglang serve: error: unrecognized arguments: --disable-piecewise"),
        ("", ("--no-such-flag",), 2, "sglang serve: error: unrecognized arguments: --no-such-flag"),
        (
            "oom_until_tokens=100",
            ("--max-total-tokens", "200"),
            1,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate",
        ),
        ("no_room", (), 1, "RuntimeError: Not enough memory. Please try to increase --mem-fr"),
    ],
)
def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, fault: str, arguments: tuple[str, ...], status: int, said: str
) -> None:
    once = tmp_path / "once"
    ended = launch(*arguments, FAKE_SGLANG_FAULT=fault, FAKE_SGLANG_ONCE=str(once))
    assert ended.returncode == status
    assert said in ended.stderr
    assert once.exists() == bool(fault)


def test_its_flags_are_read_from_its_source() -> None:
    flags = index_sglang(FAKES).flags
    wanted = {"--attention-backend", "--tp-size", "--tp", "--disable-cuda-graph", "--page-size"}
    assert wanted <= set(flags)
    assert "flashinfer" in flags["--attention-backend"].choices
